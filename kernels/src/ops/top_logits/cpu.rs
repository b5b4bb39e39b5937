use candle_core::Tensor;
use rayon::prelude::*;

use super::{Likeliest, TopLogits, check};
use crate::cpu::View;
use crate::{Cpu, Device, Result};

impl TopLogits for Cpu {
    fn top_logits(&self, logits: &Tensor, count: usize, temperatures: &[f32]) -> Result<Vec<Likeliest>> {
        check(self.shape(logits), count, temperatures)?;
        let logits = View::of(logits)?;
        let rows = logits.par_chunks_exact(logits.columns).zip(temperatures);
        Ok(rows.map(|(row, temperature)| likeliest(row, count, *temperature)).collect())
    }
}

fn likeliest(row: &[f32], count: usize, temperature: f32) -> Likeliest {
    let mut candidates: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
    let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, descending);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(descending);
    let largest = candidates.first().map_or(0.0, |best| best.1);
    let total = |temperature: f32| row.iter().map(|x| ((x - largest) / temperature).exp()).sum();
    Likeliest { candidates, total: total(temperature), plain_total: total(1.0) }
}
