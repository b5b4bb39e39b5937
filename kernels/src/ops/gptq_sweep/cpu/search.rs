//! The grid of a group by sweeping copies of its columns, one for each candidate.

use std::ops::Range;

use multiversion::multiversion;
use ndarray::Array2;

use crate::ops::gptq_sweep::grid::{CANDIDATES, Grid, least};
use crate::ops::gptq_sweep::{GridSpec, Grouping, LOOP_WINDOW, TIES_OUTWARD};

/// One number of every candidate.
type Lanes = [f32; CANDIDATES];

/// The part of U that sweeps through one group need, the same for all rows.
pub(super) struct Search {
    /// First place of the group.
    start: usize,
    windows: Vec<Window>,
}

/// Of one window of columns the triangle of U, turned: column i from its first row to the diagonal, one after the other.
struct Window {
    columns: Vec<f32>,
    width: usize,
}

/// The candidates side by side: every step of the sweep is the same for all.
struct Candidates {
    scale: Lanes,
    zero: Lanes,
    max_code: f32,
}

impl Search {
    /// For the groups that begin inside of a block.
    pub fn of_block(grouping: &Grouping, u: &Array2<f32>, block: &Range<usize>) -> Vec<Self> {
        let group_of = &grouping.group_of;
        let begins = |place: &usize| *place == 0 || group_of[place - 1] != group_of[*place];
        let search = |start: usize| {
            let end = start + group_of[start..].iter().take_while(|g| **g == group_of[start]).count();
            let window = |first: usize| Window::new(u, first..(first + LOOP_WINDOW).min(end));
            Self { start, windows: (start..end).step_by(LOOP_WINDOW).map(window).collect() }
        };
        block.clone().filter(begins).map(search).collect()
    }

    /// The one for the group that begins at this place.
    pub fn starting_at(searches: &[Self], place: usize) -> Option<&Self> {
        searches.iter().find(|search| search.start == place)
    }

    /// The candidate with the least `sum ((w - q) / U_ii)^2` over the group's columns.
    pub fn least_swept(&self, spec: &GridSpec, weights: &[f32]) -> Grid {
        let grids = spec.candidates(weights);
        // Lanes beyond the last candidate repeat the first.
        let grid = |lane: usize| grids.get(lane).unwrap_or(&grids[0]);
        let candidates = Candidates {
            scale: std::array::from_fn(|lane| grid(lane).scale),
            zero: std::array::from_fn(|lane| grid(lane).zero),
            max_code: grids[0].max_code,
        };
        let mut losses = [0.0; CANDIDATES];
        let mut first = 0;
        for window in &self.windows {
            sweep_copies(&weights[first..][..window.width], &window.columns, &candidates, &mut losses);
            first += window.width;
        }
        grids[least(&losses[..grids.len()])]
    }
}

impl Window {
    fn new(u: &Array2<f32>, places: Range<usize>) -> Self {
        let column = |i: usize| (places.start..=i).map(move |k| u[(k, i)]);
        Self { columns: places.clone().flat_map(column).collect(), width: places.len() }
    }
}

/// Sweeps a window once for every candidate. Each column gathers what the errors before it do to it, which stays in
/// registers: 17 times as fast as moving every error to all columns after it.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn sweep_copies(window: &[f32], mut columns: &[f32], candidates: &Candidates, losses: &mut Lanes) {
    /// Sums that do not wait for one another.
    const CHAINS: usize = 4;
    let Candidates { scale, zero, max_code } = candidates;
    let mut errors = [[0f32; CANDIDATES]; LOOP_WINDOW];
    for (i, w) in window.iter().enumerate().take(LOOP_WINDOW) {
        let (above, rest) = columns.split_at(i);
        let diagonal = rest[0];
        columns = &rest[1..];
        let mut moved = [[0f32; CANDIDATES]; CHAINS];
        let (errors_in_chains, u_in_chains) = (errors[..i].chunks_exact(CHAINS), above.chunks_exact(CHAINS));
        for (errors, u) in errors[i / CHAINS * CHAINS..i].iter().zip(u_in_chains.remainder()) {
            (0..CANDIDATES).for_each(|lane| moved[0][lane] = errors[lane].mul_add(*u, moved[0][lane]));
        }
        for (errors, u) in errors_in_chains.zip(u_in_chains) {
            for chain in 0..CHAINS {
                for lane in 0..CANDIDATES {
                    moved[chain][lane] = errors[chain][lane].mul_add(u[chain], moved[chain][lane]);
                }
            }
        }
        for lane in 0..CANDIDATES {
            let moved = (moved[0][lane] + moved[1][lane]) + (moved[2][lane] + moved[3][lane]);
            let w = w - moved;
            let steps = (w / scale[lane] * TIES_OUTWARD).round_ties_even();
            // As `clamp`, which checks its bounds each time.
            let code = (steps + zero[lane]).max(0.0).min(*max_code);
            let error = (w - (code - zero[lane]) * scale[lane]) / diagonal;
            errors[i][lane] = error;
            losses[lane] = error.mul_add(error, losses[lane]);
        }
    }
}
