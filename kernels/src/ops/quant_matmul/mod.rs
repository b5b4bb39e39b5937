//! The quantized linear layer: weights stay integer codes until the moment they are used.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod few_rows;

use crate::packing::PackedLinear;
use crate::{Error, MatMul, Result};

/// `y[t, n] = sum_k x[t, k] * (code[n, k] - zero[g, n]) * scale[g, n] + bias[n]` with `g = g_idx[k]`.
/// x: `[tokens, in]`, result: `[tokens, out]`
pub trait QuantMatMul: MatMul {
    /// A quantized weight, repacked once into the order in which this device reads it.
    type QuantWeight: Send + Sync;

    fn quant_weight(&self, packed: &PackedLinear) -> Result<Self::QuantWeight>;

    fn quant_matmul(&self, x: &Self::Tensor, weight: &Self::QuantWeight) -> Result<Self::Tensor>;

    /// The same weight dequantized, for many products with many rows.
    fn dense_weight(&self, packed: &PackedLinear) -> Result<Self::Weight>;
}

/// `x` must be as wide as the weight.
pub(crate) fn check(x: (usize, usize), in_features: usize) -> Result<()> {
    if x.1 != in_features {
        return Err(Error::shape("quant_matmul", (x.0, in_features), x));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, matmul_f64, random, tolerance};
    use crate::{Cpu, Quantized};

    /// A random linear whose features belong to groups as `g_idx` says.
    fn solved(bits: u32, n: usize, g_idx: Vec<u32>) -> Quantized {
        let groups = *g_idx.iter().max().unwrap() as usize + 1;
        let max = (1u32 << bits) - 1;
        let codes =
            random(5, n * g_idx.len()).iter().map(|x| ((x + 1.0) * 0.5 * max as f32).round() as u8).collect();
        let scales =
            random(6, groups * n).iter().map(|x| half::f16::from_f32(x.abs() + 0.01).to_f32()).collect();
        let zeros = random(7, groups * n).iter().map(|x| 1 + (x.abs() * (max - 1) as f32) as u8).collect();
        Quantized { bits, codes, scales, zeros, g_idx, losses: vec![0.0; n] }
    }

    fn conforms(device: &impl QuantMatMul, tolerance: f64) {
        let contiguous = |k: usize, size: usize| (0..k).map(|i| (i / size) as u32).collect::<Vec<_>>();
        let scattered =
            |k: usize, size: usize| (0..k).map(|i| ((i * 37 % k) / size) as u32).collect::<Vec<_>>();
        for (risk, m, n, bits, g_idx) in [
            ("one row, one group", 1, 32, 4, contiguous(128, 128)),
            ("act-order", 3, 64, 4, scattered(256, 32)),
            ("act-order, many rows", 70, 64, 4, scattered(256, 64)),
            ("eight bits", 2, 32, 8, scattered(128, 128)),
            ("eight bits, many rows", 33, 32, 8, contiguous(128, 32)),
            ("three bits straddle words", 4, 32, 3, scattered(96, 32)),
            ("two bits", 9, 32, 2, contiguous(64, 16)),
            ("a short last group", 2, 32, 4, contiguous(72, 32)),
            ("one group over several units", 7, 64, 4, contiguous(512, 512)),
            ("groups of one chunk", 8, 96, 4, scattered(448, 64)),
            ("groups of two chunks, a second tile of tokens", 9, 64, 4, scattered(1152, 128)),
            ("groups of many chunks", 17, 32, 4, scattered(1024, 512)),
            ("two groups a chunk, every tile of tokens", 64, 64, 4, scattered(320, 32)),
            ("eight bits, groups of four chunks", 40, 64, 8, scattered(640, 128)),
            ("eight bits, groups of two chunks", 1, 32, 8, scattered(192, 64)),
            ("eight bits, no groups", 12, 32, 8, contiguous(96, 96)),
            ("outputs that are no whole tiles", 1, 40, 4, scattered(256, 64)),
            ("one row more than the kernel takes", 65, 64, 8, scattered(256, 128)),
        ] {
            let k = g_idx.len();
            for zero_offset in [0, 1] {
                let solved = solved(bits, n, g_idx.clone());
                let mut packed = PackedLinear::pack(&solved, zero_offset).unwrap();
                let bias = random(9, n);
                packed.bias = Some(bias.clone());
                let x = random(8, m * k);
                let mut expected = matmul_f64(&x, &solved.dequantized(), (m, n, k));
                for row in expected.chunks_mut(n) {
                    row.iter_mut().zip(&bias).for_each(|(y, b)| *y += *b as f64);
                }
                let x = device.tensor(x, (m, k)).unwrap();
                let weight = device.quant_weight(&packed).unwrap();
                let y = device.quant_matmul(&x, &weight).unwrap();
                assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
                let wide = device.tensor(vec![0.0; k + 1], (1, k + 1)).unwrap();
                assert!(device.quant_matmul(&wide, &weight).is_err(), "{risk}: an input of the wrong width");
            }
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    fn agrees_with_f64_on_cuda() {
        crate::testing::cards().iter().for_each(|card| conforms(card, tolerance(card)));
    }
}
