use candle_core::Tensor;

use super::{Likeliest, TopLogits, check, largest};
use crate::cpu::{View, map};
use crate::{Cpu, Device, Result};

impl TopLogits for Cpu {
    fn top_logits(&self, logits: &Tensor, count: usize) -> Result<Vec<Likeliest>> {
        check(self.shape(logits).1, count)?;
        let logits = View::of(logits)?;
        let width = logits.columns;
        Ok(map(logits.rows, |i| likeliest(&logits[i * width..][..width], count)))
    }
}

fn likeliest(row: &[f32], count: usize) -> Likeliest {
    let candidates = largest(row, count);
    let most = candidates.first().map_or(0.0, |best| best.1);
    Likeliest { candidates, total: row.iter().map(|x| (x - most).exp()).sum() }
}
