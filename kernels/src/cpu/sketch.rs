//! A head in eight bits, beside the head itself: it rules out most of a vocabulary.
//!
//! A token is decided by the largest scores. The sketch gives every score to within a bound, and reads half as much memory
//! as 16 bits take; only tokens that come near enough to the largest are then multiplied as they are stored. Their scores
//! are those that [`super::linear`] gives a few tokens, to the last bit.

use super::dense::dots;
use super::panels::{RUN, Rounded};
use super::{Isa, Panels, Parts, RowSource, map, maximum, team};
use crate::RowSampling;

/// Rows that a thread takes at a time.
const TASK: usize = 32;

/// See [the module](self).
pub(crate) struct Sketch {
    panels: Panels,
    /// Of every row what its score may be off by, where the input has length 1.
    doubts: Vec<f32>,
}

impl Sketch {
    pub fn of(head: &impl RowSource) -> Self {
        let (n, k) = head.dims();
        let (panels, rows) = Panels::rounded((n, k), |row, out| head.write_row(row, out));
        Self { panels, doubts: rows.iter().map(|row| doubt(row, k)).collect() }
    }

    /// Of the tokens x, `[tokens, in]`, the scores that decide what each draws, and minus infinity for all others.
    pub fn scores(&self, x: &[f32], head: &impl RowSource, sampling: &[RowSampling]) -> Vec<f32> {
        let (n, k) = head.dims();
        let mut scores = self.panels.product(x, sampling.len(), Isa::best());
        let candidates = map(sampling.len(), |t| {
            let rows = self.candidates(&x[t * k..][..k], &scores[t * n..][..n], &sampling[t]);
            rows.into_iter().map(move |row| (t, row)).collect::<Vec<_>>()
        });
        let candidates = candidates.concat();
        scores.fill(f32::NEG_INFINITY);
        let parts = Parts::of(&mut scores);
        team::for_each(candidates.len().div_ceil(TASK), |task| {
            for (t, row) in candidates.iter().skip(task * TASK).take(TASK) {
                // SAFETY: every score is written once.
                let score = unsafe { parts.part(t * n + row, 1) };
                dots(head.row(*row), &x[t * k..][..k], score, Isa::best());
            }
        });
        scores
    }

    /// Rows whose scores may be among those that decide. What is no number is always one of them.
    fn candidates(&self, x: &[f32], rough: &[f32], sampling: &RowSampling) -> Vec<usize> {
        let length = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        let least = |(score, doubt): (&f32, &f32)| score - doubt * length;
        let mut least: Vec<f32> = rough.iter().zip(&self.doubts).map(least).collect();
        let changed = || sampling.changes.iter().map(|change| change.id as usize);
        // The scores that are changed may end anywhere: the others are chosen as if those were not there.
        changed().for_each(|id| least[id] = f32::NEG_INFINITY);
        let largest = match sampling.deciding() {
            Some(1) => maximum(&least),
            Some(count) if count < least.len() => {
                let known = |score: &f32| if score.is_nan() { f32::NEG_INFINITY } else { *score };
                let mut sorted: Vec<f32> = least.iter().map(known).collect();
                *sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
            }
            _ => f32::NEG_INFINITY,
        };
        // What a draw takes for equally likely, and what is lost in the sums here.
        let bar = largest - sampling.temperature * 1e-6 - largest.abs() * 1e-6;
        changed().for_each(|id| least[id] = f32::INFINITY);
        let most = least.iter().zip(&self.doubts).map(|(least, doubt)| least + 2.0 * doubt * length);
        most.enumerate().filter(|(_, most)| most.is_nan() || *most >= bar).map(|(row, _)| row).collect()
    }
}

/// What the product of a row of `k` values and an input of length 1 may be off by where the row was rounded: by Cauchy and
/// Schwarz the length of what was lost; and as a share of the row's own length what rounding an input to 16 bits, a run at
/// a time, and sums in f32 lose.
fn doubt(row: &Rounded, k: usize) -> f32 {
    let arithmetic = (RUN as f32).sqrt() / 65534.0 + (k + RUN) as f32 * f32::EPSILON;
    // A hundredth more: the rounded row may be longer, and these sums lose something too.
    1.01 * (row.lost.sqrt() + arithmetic * row.squares.sqrt())
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::cpu::DenseRow;
    use crate::testing::random;
    use crate::{Change, Cpu, Device, Sample};

    struct Head {
        values: Vec<f16>,
        dims: (usize, usize),
    }

    impl RowSource for Head {
        fn dims(&self) -> (usize, usize) {
            self.dims
        }

        fn row(&self, row: usize) -> DenseRow<'_> {
            DenseRow::F16(&self.values[row * self.dims.1..][..self.dims.1])
        }

        fn write_row(&self, row: usize, out: &mut [f32]) {
            let row = &self.values[row * self.dims.1..][..self.dims.1];
            out.iter_mut().zip(row).for_each(|(out, value)| *out = value.to_f32());
        }
    }

    /// Rows of many sizes, the last of which are each the same as the one before but for its last digits.
    fn head(n: usize, k: usize) -> Head {
        let mut values = random(1, n * k);
        for (row, values) in values.chunks_exact_mut(k).enumerate() {
            values.iter_mut().for_each(|x| *x *= (1 + row % 5) as f32);
        }
        for row in n / 2..n {
            values.copy_within((row - 1) * k..row * k, row * k);
            values[row * k + row % k] *= 1.001;
        }
        Head { values: values.into_iter().map(f16::from_f32).collect(), dims: (n, k) }
    }

    fn all_scores(head: &Head, x: &[f32]) -> Vec<f32> {
        super::super::linear(x, x.len() / head.dims.1, head, None)
    }

    #[test]
    fn draws_are_those_of_all_scores() {
        let changes = (0..300).step_by(7).map(|id| Change { id, added: -40.0, repeated: 1.3 }).collect();
        let greedy = RowSampling { logprob: false, ..RowSampling::likeliest() };
        let top_k = RowSampling { temperature: 0.9, top_k: 20, random: 3 << 62, ..greedy.clone() };
        let narrow = RowSampling { top_p: 0.7, random: 1 << 63, ..top_k.clone() };
        let changed = RowSampling { changes, ..greedy.clone() };
        let beyond = RowSampling { top_k: 5000, random: 5 << 61, ..top_k.clone() };
        let sampling = [greedy, top_k, narrow, changed, beyond];
        for (n, k) in [(1000, 256), (333, 70), (2048, 1000)] {
            let head = head(n, k);
            let sketch = Sketch::of(&head);
            for round in 0..20 {
                let x = random(7 + round, sampling.len() * k);
                let (all, few) = (all_scores(&head, &x), sketch.scores(&x, &head, &sampling));
                let draw = |scores: &[f32]| {
                    let scores = Cpu.tensor(scores.to_vec(), (sampling.len(), n)).unwrap();
                    let drawn = Cpu.sample(&scores, &sampling).unwrap();
                    drawn.into_iter().map(|token| token.map(|token| token.id)).collect::<Vec<_>>()
                };
                assert_eq!(draw(&few), draw(&all), "{n} x {k}, round {round}");
                let kept = few.iter().zip(&all).filter(|(few, _)| few.is_finite());
                kept.for_each(|(few, all)| assert_eq!(few.to_bits(), all.to_bits(), "a score of its own"));
                let computed = few[..n].iter().filter(|score| score.is_finite()).count();
                assert!(computed < n * 3 / 4, "{computed} of {n} computed: nothing is ruled out");
            }
        }
    }

    #[test]
    fn scores_are_within_their_bounds() {
        let head = head(400, 300);
        let sketch = Sketch::of(&head);
        for (round, factor) in [1e-20, 1.0, 1e20].into_iter().enumerate() {
            let mut x = random(round as u64, 300);
            x.iter_mut().for_each(|x| *x *= factor);
            x[17] *= 1000.0;
            let length = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let (all, rough) = (all_scores(&head, &x), sketch.panels.product(&x, 1, Isa::best()));
            for ((all, rough), doubt) in all.iter().zip(&rough).zip(&sketch.doubts) {
                assert!(f64::from((all - rough).abs()) <= f64::from(*doubt) * length, "{all} and {rough}");
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_ruled_out() {
        let mut head = head(100, 64);
        head.values[20 * 64 + 3] = f16::NAN;
        head.values[30 * 64 + 3] = f16::INFINITY;
        let sketch = Sketch::of(&head);
        let greedy = RowSampling { logprob: false, ..RowSampling::likeliest() };
        let mut x = random(3, 64);
        let scores = sketch.scores(&x, &head, std::slice::from_ref(&greedy));
        assert!(scores[20].is_nan() && scores[30].is_infinite());
        x[5] = f32::NAN;
        assert!(sketch.scores(&x, &head, &[greedy]).iter().all(|score| score.is_nan()));
    }
}
