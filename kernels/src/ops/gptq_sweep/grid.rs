//! The uniform grid of one row of one group: its scale and its zero point.

use half::f16;

/// Which of the grids that could serve a row of a group is taken; numbered as the kernels know them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GridKind {
    /// The one that reaches every weight: symmetric ones as far to both sides as the largest magnitude.
    #[default]
    Absmax,
    /// The shrunken range with the least `sum |q - w|^2.4`.
    Mse,
    /// Of the candidates of a group the one with which the sweep over the group's own columns leaves the least
    /// `sum ((w - q) / U_ii)^2`. Symmetric scales have a sign: the largest weight becomes the lowest code, which lies
    /// one step farther out than the highest.
    Loop,
}

/// How grids are found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridSpec {
    /// Bits of a code.
    pub bits: u32,
    /// The zero point is the middle code and the range is even around 0.
    pub sym: bool,
    pub kind: GridKind,
    /// Smallest zero point that the file format can hold: 1 for v1, 0 for v2.
    pub min_zero: u8,
    /// Round scales to f16 before they are used, so that what is solved is what is stored.
    pub f16_scales: bool,
}

/// Ranges tried by the search: 1, 0.99, ... 0.21 of the whole.
const SHRINK_STEPS: usize = 80;
const SHRINK_GRID: f32 = 100.0;
/// Exponent of the search's error norm, from the reference code of the paper.
const SHRINK_NORM: f32 = 2.4;

/// Ranges that [`GridKind::Loop`] tries, as shares of the whole.
const LOOP_SHARES: [f64; 12] = [1.06, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5];
/// Of symmetric grids, those that are tried with the largest weight at the highest code as well.
const LOOP_MIRRORED: [f64; 4] = [1.0, 0.95, 0.9, 0.85];
/// Most candidates of a group.
pub(crate) const CANDIDATES: usize = LOOP_SHARES.len() + LOOP_MIRRORED.len();

/// The largest weight of a symmetric group lies on a tie, 7.5 steps of 15. Rounding noise must not decide
/// it from run to run and from device to device, so quotients within it of a tie count as the tie.
pub(crate) const TIES_OUTWARD: f32 = 1.0 + 4.0 * f32::EPSILON;

/// The nearest whole number, ties to even, below 2^22: without the call that [`f32::round_ties_even`] is where the processor at
/// hand is not known when compiling. Beyond, where every code is the last one, 2^22.
fn rounded(x: f32) -> f32 {
    const MOST: f32 = 4_194_304.0;
    // Floats of this size are whole numbers: adding it rounds.
    const WHOLE: f32 = 3.0 * MOST;
    (x.clamp(-MOST, MOST) + WHOLE) - WHOLE
}

/// `value = (code - zero) * scale`
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    pub scale: f32,
    pub zero: f32,
    pub max_code: f32,
}

impl Grid {
    pub fn code(&self, w: f32) -> f32 {
        (rounded(w / self.scale * TIES_OUTWARD) + self.zero).clamp(0.0, self.max_code)
    }

    pub fn value(&self, code: f32) -> f32 {
        (code - self.zero) * self.scale
    }

    fn error(&self, weights: &[f32]) -> f32 {
        weights.iter().map(|w| (self.value(self.code(*w)) - w).abs().powf(SHRINK_NORM)).sum()
    }
}

impl GridSpec {
    /// The grid of the given weights of one row, from these weights alone. Of the candidates of [`GridKind::Loop`] it is
    /// the one with the least `sum |q - w|^2.4`: where no sweep runs through the group, columns do not make up for
    /// one another.
    pub(crate) fn find(&self, weights: &[f32]) -> Grid {
        let (min, max) = self.range(weights);
        let whole = self.grid(min, max);
        match self.kind {
            GridKind::Absmax => whole,
            GridKind::Mse => self.least_of_shrunken(weights, (min, max), whole),
            GridKind::Loop => {
                let candidates = self.candidates(weights);
                let errors: Vec<f32> = candidates.iter().map(|grid| grid.error(weights)).collect();
                candidates[least(&errors)]
            }
        }
    }

    /// What [`GridKind::Loop`] chooses from, those to be preferred first.
    ///
    /// Symmetric: scale `-+p a / h`, a the largest magnitude, h the middle code, positive where the largest weight is
    /// negative: it becomes code 0 for p = 1; then some with the other sign. Asymmetric: p times the whole range.
    pub(crate) fn candidates(&self, weights: &[f32]) -> Vec<Grid> {
        let (min, max) = self.range(weights);
        if !self.sym {
            return LOOP_SHARES
                .iter()
                .map(|p| self.grid((p * min as f64) as f32, (p * max as f64) as f32))
                .collect();
        }
        let max_code = ((1u32 << self.bits) - 1) as f32;
        let zero = (max_code + 1.0) / 2.0;
        // The range is even; which of its ends is a weight decides the sign.
        let sign = if weights.iter().any(|w| *w == max && max > 0.0) { -1.0 } else { 1.0 };
        let grid = |p: f64| Grid { scale: self.stored(p * max as f64 / zero as f64), zero, max_code };
        let own = LOOP_SHARES.iter().map(|p| grid(sign * p));
        own.chain(LOOP_MIRRORED.iter().map(|p| grid(-sign * p))).collect()
    }

    fn least_of_shrunken(&self, weights: &[f32], (min, max): (f32, f32), whole: Grid) -> Grid {
        let mut best = (whole.error(weights), whole);
        for step in 1..SHRINK_STEPS {
            let p = 1.0 - step as f32 / SHRINK_GRID;
            let zero = self.sym.then_some(whole.zero);
            let grid = Grid {
                zero: zero.unwrap_or(self.grid(p * min, p * max).zero),
                ..self.grid(p * min, p * max)
            };
            let error = grid.error(weights);
            if error < best.0 {
                best = (error, grid);
            }
        }
        best.1
    }

    /// The range to cover; it always holds 0.
    ///
    /// Symmetric ranges reach as far to both sides also where all weights have one sign: the zero point is the
    /// middle code anyway, so a range from 0 would leave the larger half of positive weights without codes.
    fn range(&self, weights: &[f32]) -> (f32, f32) {
        let mut min = weights.iter().fold(0f32, |a, b| a.min(*b));
        let mut max = weights.iter().fold(0f32, |a, b| a.max(*b));
        if self.sym {
            max = max.max(-min);
            min = -max;
        }
        if min == 0.0 && max == 0.0 { (-1.0, 1.0) } else { (min, max) }
    }

    fn grid(&self, min: f32, max: f32) -> Grid {
        let max_code = ((1u32 << self.bits) - 1) as f32;
        // In f64: an even range of an odd number of steps has its zero on a tie, which f32 would miss.
        let step = (max as f64 - min as f64) / max_code as f64;
        if self.sym {
            return Grid { scale: self.stored(step), zero: (max_code + 1.0) / 2.0, max_code };
        }
        let zero = (-min as f64 / step).round_ties_even() as f32;
        match zero < self.min_zero as f32 {
            true => {
                let zero = self.min_zero as f32;
                Grid { scale: self.stored(max as f64 / (max_code - zero) as f64), zero, max_code }
            }
            false => Grid { scale: self.stored(step), zero: zero.min(max_code), max_code },
        }
    }

    /// The scale as the file will hold it, never zero.
    pub(crate) fn stored(&self, scale: f64) -> f32 {
        let magnitude = match self.f16_scales {
            true => f16::from_f64(scale.abs()).max(f16::MIN_POSITIVE_SUBNORMAL).to_f32(),
            false => (scale.abs() as f32).max(f32::MIN_POSITIVE),
        };
        magnitude.copysign(scale as f32)
    }
}

/// Place of the least value, the first of equal ones; NaN is never it.
pub(crate) fn least(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] < values[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(bits: u32, sym: bool) -> GridSpec {
        GridSpec { bits, sym, kind: GridKind::Absmax, min_zero: 0, f16_scales: false }
    }

    #[test]
    fn symmetric_grids_have_the_middle_code_as_zero() {
        let grid = spec(4, true).find(&[-0.75, 0.1, 1.5]);
        assert_eq!((grid.scale, grid.zero), (2.0 * 1.5 / 15.0, 8.0));
    }

    /// The zero point is the middle code, so a range that begins at 0 would cut everything above its half.
    #[test]
    fn symmetric_grids_reach_the_largest_weight_whatever_the_signs() {
        let weights: Vec<f32> = (1..=64).map(|i| i as f32 / 64.0).collect();
        let whole = [2, 3, 4, 8].map(|bits| (bits, GridKind::Absmax));
        let searched = [(4, GridKind::Mse), (8, GridKind::Mse)];
        for (bits, kind) in whole.into_iter().chain(searched) {
            for sign in [1.0, -1.0] {
                let weights: Vec<f32> = weights.iter().map(|w| sign * w).collect();
                let grid = GridSpec { kind, ..spec(bits, true) }.find(&weights);
                assert_eq!(grid.zero, 2f32.powi(bits as i32 - 1));
                // On a tie the largest code is half a step away; the search may give up a little of the end.
                let reach = if kind == GridKind::Mse { 1.5 } else { 0.501 } * grid.scale;
                let worst = weights.iter().map(|w| (grid.value(grid.code(*w)) - w).abs()).fold(0.0, f32::max);
                assert!(worst <= reach, "{bits} bits, {kind:?}, sign {sign}: {worst} of {}", grid.scale);
            }
        }
    }

    #[test]
    fn the_largest_weight_is_a_tie_whatever_its_last_bits() {
        for i in 1..1000 {
            let largest = -0.37 - i as f32 * 1e-5;
            assert_eq!(spec(4, true).find(&[largest, 0.1]).code(largest), 0.0, "{largest}");
        }
    }

    #[test]
    fn an_all_zero_row_gets_a_usable_grid() {
        for sym in [true, false] {
            let grid = spec(4, sym).find(&[0.0; 8]);
            assert!(grid.scale > 0.0);
            assert_eq!(grid.value(grid.code(0.0)), 0.0);
        }
    }

    #[test]
    fn asymmetric_grids_reach_both_ends() {
        let grid = spec(4, false).find(&[-1.0, 0.0, 2.0]);
        assert_eq!(grid.zero, 5.0);
        assert!((grid.value(grid.code(-1.0)) + 1.0).abs() < 1e-6);
        assert!((grid.value(grid.code(2.0)) - 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_zero_that_v1_cannot_hold_is_moved_and_the_range_still_covered() {
        let grid = GridSpec { min_zero: 1, ..spec(4, false) }.find(&[0.0, 1.0, 2.8]);
        assert_eq!(grid.zero, 1.0);
        assert!((grid.value(grid.code(2.8)) - 2.8).abs() < 1e-6);
    }

    #[test]
    fn a_scale_below_f16_does_not_become_zero() {
        let grid = GridSpec { f16_scales: true, ..spec(4, true) }.find(&[1e-9, -1e-9]);
        assert!(grid.scale > 0.0 && grid.code(1e-9) == 8.0);
    }

    #[test]
    fn the_search_never_makes_the_error_larger() {
        let weights: Vec<f32> = (0..64).map(|i| ((i * 29 % 64) as f32 / 32.0 - 1.0).powi(5)).collect();
        let searched = GridSpec { kind: GridKind::Mse, ..spec(3, true) }.find(&weights);
        assert!(searched.error(&weights) < spec(3, true).find(&weights).error(&weights));
    }

    #[test]
    fn the_largest_weight_of_a_signed_grid_is_the_lowest_code_whatever_its_sign() {
        for bits in [2, 3, 4, 8] {
            let spec = GridSpec { kind: GridKind::Loop, f16_scales: true, ..spec(bits, true) };
            for sign in [1.0, -1.0] {
                let weights = [0.2 * sign, -0.5 * sign, 0.75 * sign, 0.0];
                let candidates = spec.candidates(&weights);
                assert_eq!(candidates.len(), CANDIDATES);
                let whole = candidates[1];
                assert_eq!((whole.code(weights[2]), whole.scale < 0.0), (0.0, sign > 0.0), "{bits} bits");
                assert_eq!(whole.value(0.0), weights[2], "three quarters have an exact scale");
                assert!(candidates.iter().all(|grid| grid.zero == 2f32.powi(bits as i32 - 1)));
                assert!(candidates.iter().all(|grid| f16::from_f32(grid.scale).to_f32() == grid.scale));
            }
        }
    }

    #[test]
    fn every_candidate_of_an_empty_or_tiny_group_can_be_used() {
        for (sym, weights) in [(true, [0.0; 4]), (false, [0.0; 4]), (true, [1e-12; 4]), (false, [-1e-12; 4])]
        {
            let spec = GridSpec { kind: GridKind::Loop, f16_scales: true, ..spec(4, sym) };
            for grid in spec.candidates(&weights) {
                assert!(grid.scale != 0.0 && grid.value(grid.code(weights[0])).is_finite());
            }
            assert!(spec.find(&weights).value(spec.find(&weights).code(0.0)) == 0.0);
        }
    }
}
