use candle_core::Tensor;
use rayon::prelude::*;

use super::{Rope, RopeShape, check, frequency_rows};
use crate::cpu::View;
use crate::ops::rms_norm::cpu::normalise;
use crate::{Batch, Cpu, Device, Result};

impl Rope for Cpu {
    fn rope(&self, qkv: &Tensor, batch: &Batch, shape: &RopeShape<Tensor>) -> Result<[Tensor; 3]> {
        check(self.shape(qkv), self.shape(&shape.inv_freq), batch, shape)?;
        let (qkv, inv_freq) = (View::of(qkv)?, View::of(&shape.inv_freq)?);
        let norms = match &shape.norms {
            Some(norms) => Some((View::of(&norms.q)?, View::of(&norms.k)?, norms.eps)),
            None => None,
        };
        let d = shape.head_dim;
        let (q_width, kv_width) = (shape.heads * d, shape.kv_heads * d);
        let mut q = vec![0.0; qkv.rows * q_width];
        let mut k = vec![0.0; qkv.rows * kv_width];
        let mut v = vec![0.0; qkv.rows * kv_width];
        let tables = frequency_rows(batch, inv_freq.rows);
        let places = batch.positions().into_par_iter().zip(tables);
        let rows = (qkv.par_chunks_exact(qkv.columns), places);
        let outputs = (
            q.par_chunks_exact_mut(q_width),
            k.par_chunks_exact_mut(kv_width),
            v.par_chunks_exact_mut(kv_width),
        );
        rows.into_par_iter().zip(outputs.into_par_iter()).for_each(
            |((row, (position, table)), (q, k, v))| {
                q.copy_from_slice(&row[..q_width]);
                k.copy_from_slice(&row[q_width..][..kv_width]);
                v.copy_from_slice(&row[q_width + kv_width..]);
                if let Some((q_weight, k_weight, eps)) = &norms {
                    q.chunks_exact_mut(d).for_each(|head| normalise(head, q_weight, *eps));
                    k.chunks_exact_mut(d).for_each(|head| normalise(head, k_weight, *eps));
                }
                let frequencies = &inv_freq[table as usize * d / 2..][..d / 2];
                let turns: Vec<_> = frequencies.iter().map(|f| (position as f32 * f).sin_cos()).collect();
                q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d)).for_each(|head| rotate(head, &turns));
            },
        );
        let rows = qkv.rows;
        Ok([
            self.tensor(q, (rows, q_width))?,
            self.tensor(k, (rows, kv_width))?,
            self.tensor(v, (rows, kv_width))?,
        ])
    }
}

fn rotate(head: &mut [f32], turns: &[(f32, f32)]) {
    let (first, second) = head.split_at_mut(turns.len());
    for ((a, b), (sin, cos)) in first.iter_mut().zip(second).zip(turns) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
