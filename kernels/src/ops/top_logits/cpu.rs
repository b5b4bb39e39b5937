use candle_core::Tensor;
use rayon::prelude::*;

use super::{Likeliest, TopLogits, check, largest};
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
    let candidates = largest(row, count);
    let most = candidates.first().map_or(0.0, |best| best.1);
    let total = |temperature: f32| row.iter().map(|x| ((x - most) / temperature).exp()).sum();
    Likeliest { candidates, total: total(temperature), plain_total: total(1.0) }
}
