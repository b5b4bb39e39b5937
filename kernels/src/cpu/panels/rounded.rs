//! Rows of a weight that is not quantized, rounded to eight bits.

use multiversion::multiversion;

use super::pack::runs;
use super::{Lanes, OwnedScales, OwnedZeros, PANEL, Panels, Parts, RUN, pairs_in_word, team};
use crate::cpu::LongLived;

/// The code of zero.
const ZERO: u8 = 128;

/// Values that are summed up at a time.
const LANES: usize = 16;

/// What became of a row.
#[derive(Clone, Copy, Default)]
pub(crate) struct Rounded {
    /// Sum of the squares of its values.
    pub squares: f32,
    /// The same of what rounding changed.
    pub lost: f32,
}

/// A run of a row in eight bits.
struct Run {
    codes: [u8; RUN],
    scale: f32,
    rounded: Rounded,
}

impl Panels {
    /// Every run of 128 features has a scale of its own. `write(row, out)` writes the values of a row.
    pub fn rounded((n, k): (usize, usize), write: impl Fn(usize, &mut [f32]) + Sync) -> (Self, Vec<Rounded>) {
        let (panels, groups) = (n.div_ceil(PANEL), k.div_ceil(RUN));
        let g_idx: Vec<u32> = (0..k).map(|i| (i / RUN) as u32).collect();
        let runs = runs(&g_idx, groups, 2 * pairs_in_word(8));
        let words = runs.last().map_or(0, |run| run.at + run.words);
        let mut codes = LongLived::<Lanes>::zeros(panels * words);
        let mut scales = vec![[0.0; PANEL]; panels * groups];
        let mut rows = vec![Rounded::default(); n];
        let parts = (Parts::of(&mut codes), Parts::of(&mut scales), Parts::of(&mut rows));
        team::for_each(panels, |panel| {
            let row = panel * PANEL;
            // SAFETY: every panel is written by one thread.
            let (codes, scales) =
                unsafe { (parts.0.part(panel * words, words), parts.1.part(panel * groups, groups)) };
            // SAFETY: as above.
            let rows = unsafe { parts.2.part(row, PANEL.min(n - row)) };
            let mut values = vec![0.0; k];
            for (lane, rounded) in rows.iter_mut().enumerate() {
                write(row + lane, &mut values);
                for (run, scales) in runs.iter().zip(&mut *scales) {
                    let mut padded = [0.0; RUN];
                    padded[..run.columns.len()].copy_from_slice(&values[run.columns.clone()]);
                    let made = round(&padded);
                    scales[lane] = made.scale;
                    rounded.squares += made.rounded.squares;
                    rounded.lost += made.rounded.lost;
                    let words = codes[run.at..][..run.words].iter_mut();
                    for (word, [a, b, c, d]) in words.zip(made.codes.as_chunks().0) {
                        word.0[lane] = u32::from_le_bytes([*a, *c, *b, *d]);
                    }
                }
            }
        });
        let (scales, zeros) = (OwnedScales::F32(scales), OwnedZeros::Same(u16::from(ZERO)));
        let (order, bias) = (None, None);
        (Self { bits: 8, dims: (n, k), runs, groups, words, codes, scales, zeros, order, bias }, rows)
    }
}

/// To multiples of a 127th of the largest. Where a value is infinite or no number, so is what was lost.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn round(values: &[f32; RUN]) -> Run {
    /// Adding it rounds to an integer, which then stands in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    /// Below, its reciprocal might not be finite.
    const SMALLEST: f32 = 1e-30;
    let largest = values.iter().fold(0, |largest, x| (x.to_bits() & (u32::MAX >> 1)).max(largest));
    let scale = f32::from_bits(largest) / f32::from(ZERO - 1);
    let rate = if scale < SMALLEST { 0.0 } else { scale.recip() };
    let (mut codes, mut sums) = ([0; RUN], [[0f32; LANES]; 2]);
    let blocks = values.as_chunks::<LANES>().0.iter().zip(codes.as_chunks_mut::<LANES>().0);
    for (values, codes) in blocks {
        for lane in 0..LANES {
            let x = values[lane];
            let shifted = x * rate + ROUNDER;
            codes[lane] = (shifted.to_bits() as u8).wrapping_add(ZERO);
            let lost = x - (shifted - ROUNDER) * scale;
            sums[0][lane] += x * x;
            sums[1][lane] += lost * lost;
        }
    }
    let [squares, lost] = sums.map(|lanes| lanes.iter().sum());
    Run { codes, scale, rounded: Rounded { squares, lost } }
}
