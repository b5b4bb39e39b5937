use candle_core::Tensor;
use rayon::prelude::*;

use super::{Divergence, TokenLoss, check_pair, check_targets};
use crate::cpu::{View, exp_in_place, maximum};
use crate::{Cpu, Device, Result};

impl TokenLoss for Cpu {
    fn token_loss(&self, logits: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        check_targets(self.shape(logits), targets)?;
        let logits = View::of(logits)?;
        let loss = |(row, target): (&[f32], &u32)| {
            let (log_total, _) = exponentials(row);
            log_total - row[*target as usize]
        };
        Ok(logits.par_chunks_exact(logits.columns).zip(targets).map(loss).collect())
    }

    fn divergence(&self, reference: &Tensor, logits: &Tensor) -> Result<Vec<Divergence>> {
        check_pair(self.shape(reference), self.shape(logits))?;
        let (p, q) = (View::of(reference)?, View::of(logits)?);
        Ok(p.par_chunks_exact(p.columns)
            .zip(q.par_chunks_exact(q.columns))
            .map(|(p, q)| distance(p, q))
            .collect())
    }
}

fn distance(p: &[f32], q: &[f32]) -> Divergence {
    let ((log_p, weights), (log_q, _)) = (exponentials(p), exponentials(q));
    let total: f64 = weights.iter().map(|w| *w as f64).sum();
    let spread: f64 = weights.iter().zip(p).zip(q).map(|((w, p), q)| *w as f64 * (p - q) as f64).sum();
    Divergence { kl: (spread / total - log_p as f64 + log_q as f64) as f32, same_top1: first(p) == first(q) }
}

/// `ln sum exp(row)` and the exponentials, the largest being 1.
fn exponentials(row: &[f32]) -> (f32, Vec<f32>) {
    let largest = maximum(row);
    let mut weights = row.to_vec();
    let total = exp_in_place(&mut weights, largest);
    (largest + total.ln(), weights)
}

/// Index of the largest value, the first where several are equal.
fn first(row: &[f32]) -> Option<usize> {
    let largest = maximum(row);
    row.iter().position(|x| *x == largest)
}
