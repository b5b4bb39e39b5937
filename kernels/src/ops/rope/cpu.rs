use candle_core::Tensor;

use super::{Rope, RopeShape, check, frequency_rows};
use crate::cpu::{Parts, View, each_row};
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
        let positions = batch.positions();
        let [k_parts, v_parts] = [&mut k, &mut v].map(|rows| Parts::of(rows));
        each_row(&mut q, q_width, |row, q| {
            // SAFETY: every row has its own q, k and v.
            let [k, v] = [&k_parts, &v_parts].map(|parts| unsafe { parts.part(row * kv_width, kv_width) });
            let qkv = &qkv[row * (q_width + 2 * kv_width)..];
            q.copy_from_slice(&qkv[..q_width]);
            k.copy_from_slice(&qkv[q_width..][..kv_width]);
            v.copy_from_slice(&qkv[q_width + kv_width..][..kv_width]);
            if let Some((q_weight, k_weight, eps)) = &norms {
                q.chunks_exact_mut(d).for_each(|head| normalise(head, q_weight, *eps));
                k.chunks_exact_mut(d).for_each(|head| normalise(head, k_weight, *eps));
            }
            let frequencies = &inv_freq[tables[row] as usize * d / 2..][..d / 2];
            let turns: Vec<_> = frequencies.iter().map(|f| (positions[row] as f32 * f).sin_cos()).collect();
            q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d)).for_each(|head| rotate(head, &turns));
        });
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
