use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::{QuantMatMul, check};
use crate::cpu::{RowSource, View, linear, widen_bytes, widen_nibbles};
use crate::ops::matmul::cpu::CpuWeight;
use crate::packing::PackedLinear;
use crate::{Cpu, Device, MatMul, Result};

/// Codes in sweep order: features sorted by group, so that a group is one run of columns.
pub struct CpuQuantWeight {
    codes: Codes,
    dims: (usize, usize),
    /// Columns of each group, in sweep order.
    groups: Vec<Range<usize>>,
    /// `[out, groups]`
    scales: Vec<f32>,
    /// `[out, groups]`
    zeros: Vec<f32>,
    /// Input feature of each column; `None` where the order is the file's own.
    order: Option<Vec<u32>>,
    bias: Option<Vec<f32>>,
}

/// Codes `[out, in]`. Up to 4 bits, 32 codes are 16 bytes: byte `j` holds code `j` low and code `j + 16` high.
enum Codes {
    Nibbles(Vec<u8>),
    Bytes(Vec<u8>),
}

/// Codes of one run of nibbles.
const NIBBLE_RUN: usize = 32;

impl QuantMatMul for Cpu {
    type QuantWeight = CpuQuantWeight;

    fn quant_weight(&self, packed: &PackedLinear) -> Result<CpuQuantWeight> {
        packed.check()?;
        let (n, k, groups) = (packed.out_features, packed.in_features, packed.groups());
        let mut order: Vec<u32> = (0..k as u32).collect();
        order.sort_by_key(|i| packed.g_idx[*i as usize]);
        let codes = packed.codes();
        let sorted =
            codes.par_chunks_exact(k).map(|row| order.iter().map(|i| row[*i as usize]).collect::<Vec<u8>>());
        let codes = if packed.bits <= 4 {
            Codes::Nibbles(sorted.flat_map_iter(|row| nibbles(&row)).collect())
        } else {
            Codes::Bytes(sorted.flatten_iter().collect())
        };
        let mut sizes = vec![0; groups];
        packed.g_idx.iter().for_each(|g| sizes[*g as usize] += 1);
        let ends = sizes.iter().scan(0, |end, size| {
            *end += size;
            Some(*end)
        });
        let turned = |value: &dyn Fn(usize) -> f32| {
            (0..n * groups).map(|i| value(i % groups * n + i / groups)).collect()
        };
        let (zeros, scales) = (packed.zeros(), packed.scales.to_f32());
        Ok(CpuQuantWeight {
            codes,
            dims: (n, k),
            groups: ends.zip(&sizes).map(|(end, size)| end - size..end).collect(),
            scales: turned(&|i| scales[i]),
            zeros: turned(&|i| zeros[i] as f32),
            order: (!order.is_sorted()).then_some(order),
            bias: packed.bias.clone(),
        })
    }

    fn quant_matmul(&self, x: &Tensor, weight: &CpuQuantWeight) -> Result<Tensor> {
        let (n, k) = weight.dims;
        check(self.shape(x), k)?;
        let x = View::of(x)?;
        let y = match &weight.order {
            Some(order) => {
                let mut sorted = vec![0.0; x.len()];
                sorted.par_chunks_exact_mut(k).zip(x.par_chunks_exact(k)).for_each(|(sorted, x)| {
                    sorted.iter_mut().zip(order).for_each(|(y, i)| *y = x[*i as usize]);
                });
                linear(&sorted, x.rows, weight, weight.bias.as_deref())
            }
            None => linear(&x, x.rows, weight, weight.bias.as_deref()),
        };
        self.tensor(y, (x.rows, n))
    }

    fn dense_weight(&self, packed: &PackedLinear) -> Result<CpuWeight> {
        packed.check()?;
        self.weight_from_f32(
            packed.dequantized(),
            (packed.out_features, packed.in_features),
            packed.bias.clone(),
        )
    }
}

impl RowSource for CpuQuantWeight {
    fn dims(&self) -> (usize, usize) {
        self.dims
    }

    fn write_row(&self, row: usize, out: &mut [f32]) {
        match &self.codes {
            Codes::Nibbles(codes) => {
                let bytes = out.len().div_ceil(NIBBLE_RUN) * NIBBLE_RUN / 2;
                widen_nibbles(&codes[row * bytes..][..bytes], out);
            }
            Codes::Bytes(codes) => widen_bytes(&codes[row * out.len()..][..out.len()], out),
        }
        for (g, columns) in self.groups.iter().enumerate() {
            let (scale, zero) =
                (self.scales[row * self.groups.len() + g], self.zeros[row * self.groups.len() + g]);
            out[columns.clone()].iter_mut().for_each(|x| *x = (*x - zero) * scale);
        }
    }
}

fn nibbles(row: &[u8]) -> Vec<u8> {
    let code = |run: &[u8], j: usize| run.get(j).copied().unwrap_or(0);
    let run_bytes = |run: &[u8]| {
        (0..NIBBLE_RUN / 2).map(|j| code(run, j) | code(run, j + NIBBLE_RUN / 2) << 4).collect::<Vec<_>>()
    };
    row.chunks(NIBBLE_RUN).flat_map(run_bytes).collect()
}
