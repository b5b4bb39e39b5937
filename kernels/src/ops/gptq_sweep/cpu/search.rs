//! The grid of a group by sweeping copies of its columns, one for each candidate.

use multiversion::multiversion;
use ndarray::Array2;

use crate::ops::gptq_sweep::grid::{CANDIDATES, Grid, least};
use crate::ops::gptq_sweep::{GridSpec, LOOP_WINDOW, TIES_OUTWARD};

/// One number of every candidate.
type Lanes = [f32; CANDIDATES];

/// The candidates side by side: every step of the sweep is the same for all.
struct Candidates {
    scale: Lanes,
    zero: Lanes,
    max_code: f32,
}

/// The candidate with the least `sum ((w - q) / U_ii)^2` over the group's columns, which begin at `start`.
pub(super) fn least_swept(spec: &GridSpec, weights: &[f32], u: &Array2<f32>, start: usize) -> Grid {
    let grids = spec.candidates(weights);
    // Lanes beyond the last candidate repeat the first.
    let grid = |lane: usize| grids.get(lane).unwrap_or(&grids[0]);
    let candidates = Candidates {
        scale: std::array::from_fn(|lane| grid(lane).scale),
        zero: std::array::from_fn(|lane| grid(lane).zero),
        max_code: grids[0].max_code,
    };
    let (u, size) = (u.as_slice().unwrap_or_default(), u.ncols());
    let mut errors = [0.0; CANDIDATES];
    for (window, first) in weights.chunks(LOOP_WINDOW).zip((start..).step_by(LOOP_WINDOW)) {
        sweep_copies(window, &u[first * size + first..], size, &candidates, &mut errors);
    }
    grids[least(&errors[..grids.len()])]
}

/// Sweeps a window once for every candidate. `u` begins at its first diagonal element; `size` lies between two rows of it.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn sweep_copies(window: &[f32], u: &[f32], size: usize, candidates: &Candidates, errors: &mut Lanes) {
    let mut copies = [[0f32; CANDIDATES]; LOOP_WINDOW];
    copies.iter_mut().zip(window).for_each(|(copy, w)| *copy = [*w; CANDIDATES]);
    let Candidates { scale, zero, max_code } = candidates;
    for i in 0..window.len() {
        let u_row = &u[i * size..][i..window.len()];
        let mut error = [0f32; CANDIDATES];
        for lane in 0..CANDIDATES {
            let w = copies[i][lane];
            let steps = (w / scale[lane] * TIES_OUTWARD).round_ties_even();
            let code = (steps + zero[lane]).clamp(0.0, *max_code);
            error[lane] = (w - (code - zero[lane]) * scale[lane]) / u_row[0];
            errors[lane] = error[lane].mul_add(error[lane], errors[lane]);
        }
        for (copy, u) in copies[i + 1..].iter_mut().zip(&u_row[1..]) {
            for lane in 0..CANDIDATES {
                copy[lane] = (-error[lane]).mul_add(*u, copy[lane]);
            }
        }
    }
}
