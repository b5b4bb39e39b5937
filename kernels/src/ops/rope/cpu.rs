use candle_core::Tensor;

use super::{Pairing, Rope, RopeShape, check, frequency_rows};
use crate::cpu::{Parts, View, new_rows, zeroed};
use crate::ops::rms_norm::cpu::normalise;
use crate::{Batch, Cpu, Device, Result};

impl Rope for Cpu {
    fn rope(&self, qkv: &Tensor, batch: &Batch, shape: &RopeShape<Tensor>) -> Result<[Tensor; 3]> {
        check(self, qkv, batch, shape)?;
        let (qkv, inv_freq) = (View::of(qkv)?, View::of(&shape.inv_freq)?);
        let norms = match &shape.norms {
            Some(norms) => Some((View::of(&norms.q)?, View::of(&norms.k)?, norms.eps)),
            None => None,
        };
        let d = shape.head_dim;
        let (q_width, kv_width) = (shape.heads * d, shape.kv_heads * d);
        let [mut k, mut v] = [(); 2].map(|()| Vec::with_capacity(qkv.rows * kv_width));
        let (tables, positions) = (frequency_rows(batch, inv_freq.rows), batch.positions());
        let turn = |table: u32, position: u32, turns: &mut [(f32, f32)]| {
            let frequencies = &inv_freq[table as usize * (d / 2)..];
            for (turn, frequency) in turns.iter_mut().zip(frequencies) {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                *turn = (sin * shape.stretch, cos * shape.stretch);
            }
        };
        // Where sequences have most of their positions in common, each is turned once.
        let (turned, last) = (shape.turned / 2, positions.iter().max().map_or(0, |last| *last as usize));
        let common = (inv_freq.rows == 1 && 2 * last < qkv.rows)
            .then(|| new_rows(last + 1, turned, |position, turns| turn(0, position as u32, turns)));
        let kv = [&mut k, &mut v].map(|x: &mut Vec<f32>| {
            let rows = qkv.rows * kv_width;
            Parts::of(&mut x.spare_capacity_mut()[..rows])
        });
        let q = new_rows(qkv.rows, q_width, |row, q| {
            // SAFETY: every row has its own q, k and v.
            let [k, v] = [0, 1].map(|i| zeroed(unsafe { kv[i].part(row * kv_width, kv_width) }));
            let qkv = &qkv[row * (q_width + 2 * kv_width)..];
            q.copy_from_slice(&qkv[..q_width]);
            k.copy_from_slice(&qkv[q_width..][..kv_width]);
            v.copy_from_slice(&qkv[q_width + kv_width..][..kv_width]);
            if let Some((q_weight, k_weight, eps)) = &norms {
                // Of one head, or of all together.
                q.chunks_exact_mut(q_weight.len()).for_each(|part| normalise(part, q_weight, *eps));
                k.chunks_exact_mut(k_weight.len()).for_each(|part| normalise(part, k_weight, *eps));
            }
            let mut own = Vec::new();
            let turns = match &common {
                Some(common) => &common[positions[row] as usize * turned..][..turned],
                None => {
                    own.resize(turned, (0.0, 0.0));
                    turn(tables[row], positions[row], &mut own);
                    &own[..]
                }
            };
            let heads = q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d));
            heads.for_each(|head| rotate(&mut head[..shape.turned], turns, shape.pairing));
            if let Some(growth) = shape.query_growth {
                let factor = growth.factor(positions[row] as usize);
                q.iter_mut().for_each(|x| *x *= factor);
            }
        });
        let rows = qkv.rows;
        // SAFETY: all rows have been written.
        unsafe {
            k.set_len(rows * kv_width);
            v.set_len(rows * kv_width);
        }
        Ok([
            self.tensor(q, (rows, q_width))?,
            self.tensor(k, (rows, kv_width))?,
            self.tensor(v, (rows, kv_width))?,
        ])
    }
}

fn rotate(turned: &mut [f32], turns: &[(f32, f32)], pairing: Pairing) {
    let turn = |a: &mut f32, b: &mut f32, (sin, cos): &(f32, f32)| {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    };
    match pairing {
        Pairing::Halves => {
            let (first, second) = turned.split_at_mut(turns.len());
            first.iter_mut().zip(second).zip(turns).for_each(|((a, b), angle)| turn(a, b, angle));
        }
        Pairing::Neighbours => {
            let pairs = turned.as_chunks_mut().0.iter_mut().zip(turns);
            pairs.for_each(|([a, b], angle)| turn(a, b, angle));
        }
    }
}
