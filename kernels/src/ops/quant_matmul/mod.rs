//! The quantized linear layer: weights stay integer codes until the moment they are used.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod fragments;
pub(crate) mod hopper;
pub(crate) mod medium_m;
pub(crate) mod small_m;

use crate::error::expect;
use crate::packing::PackedLinear;
use crate::{Activation, Add, Gated, MatMul, Norm, Result, RmsNorm};

/// `y[t, n] = sum_k x[t, k] * (code[n, k] - zero[g, n]) * scale[g, n] + bias[n]` with `g = g_idx[k]`.
/// x: `[tokens, in]`, result: `[tokens, out]`
pub trait QuantMatMul: MatMul + RmsNorm + Gated + Add {
    /// A quantized weight, repacked once into the order in which this device reads it.
    type QuantWeight: Send + Sync;

    fn quant_weight(&self, packed: &PackedLinear) -> Result<Self::QuantWeight>;

    fn quant_matmul(&self, x: &Self::Tensor, weight: &Self::QuantWeight) -> Result<Self::Tensor>;

    /// A weight whose first half of outputs are gates of the second, for [`Self::normed_gate_up`] alone. What that
    /// makes comes in `order`, the one in which the next weight wants it.
    fn gated_weight(&self, packed: &PackedLinear, _order: Option<&Self::Order>) -> Result<Self::QuantWeight> {
        self.quant_weight(packed)
    }

    /// Name of the kernel that multiplies so many rows by this weight, chosen from what the weight's shape and groups allow,
    /// which was found when it was loaded.
    fn quant_matmul_kernel(&self, weight: &Self::QuantWeight, rows: usize) -> &'static str;

    /// Whether every product dequantizes the weight first, where the device could do better with another one.
    fn is_dequantized(&self, _weight: &Self::QuantWeight) -> bool {
        false
    }

    /// The order in which the weight would best get its input; `None` for the model's own.
    fn input_order(&self, _weight: &Self::QuantWeight) -> Option<Self::Order> {
        None
    }

    /// `x` as the weight would best get it.
    fn ordered_input(&self, x: &Self::Tensor, _weight: &Self::QuantWeight) -> Result<Self::Tensor> {
        Ok(x.clone())
    }

    /// `next` is what will be read after `weight`: a device may begin with it ahead of time.
    fn read_next(&self, _weight: &Self::QuantWeight, _next: &Self::QuantWeight) {}

    /// `residual + quant_matmul(x)`; a device may write it over the residual where no other tensor shares its memory.
    fn quant_matmul_add(
        &self,
        x: &Self::Tensor,
        weight: &Self::QuantWeight,
        residual: Self::Tensor,
    ) -> Result<Self::Tensor> {
        self.add(&residual, &self.quant_matmul(x, weight)?)
    }

    /// `quant_matmul(rms_norm(x))`
    fn normed_quant_matmul(
        &self,
        x: &Self::Tensor,
        norm: Norm<Self::Tensor>,
        weight: &Self::QuantWeight,
    ) -> Result<Self::Tensor> {
        self.quant_matmul(&self.rms_norm(x, norm.weight, norm.eps)?, weight)
    }

    /// `gated(quant_matmul(rms_norm(x)))` of a gated weight, in the order that it was told.
    fn normed_gate_up(
        &self,
        x: &Self::Tensor,
        norm: Norm<Self::Tensor>,
        weight: &Self::QuantWeight,
        activation: Activation,
    ) -> Result<Self::Tensor> {
        self.gated(&self.normed_quant_matmul(x, norm, weight)?, activation)
    }

    /// The same weight dequantized, for many products with many rows.
    fn dense_weight(&self, packed: &PackedLinear) -> Result<Self::Weight>;
}

/// `x` must be as wide as the weight.
pub(crate) fn check(x: (usize, usize), in_features: usize) -> Result<()> {
    expect("quant_matmul", (x.0, in_features), x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gated::tests::{ALL, activated};
    use crate::packing::Scales;
    use crate::testing::{NMSE_FIXED, assert_close, matmul_f64, random, tolerance};
    use crate::{Cpu, Quantized};

    /// A random linear whose features belong to groups as `g_idx` says, with scales of both signs.
    fn solved(bits: u32, n: usize, g_idx: Vec<u32>) -> Quantized {
        let groups = *g_idx.iter().max().unwrap() as usize + 1;
        let max = (1u32 << bits) - 1;
        let codes =
            random(5, n * g_idx.len()).iter().map(|x| ((x + 1.0) * 0.5 * max as f32).round() as u8).collect();
        let scale = |x: &f32| half::f16::from_f32((x.abs() + 0.01).copysign(*x)).to_f32();
        let scales = random(6, groups * n).iter().map(scale).collect();
        let zeros = random(7, groups * n).iter().map(|x| 1 + (x.abs() * (max - 1) as f32) as u8).collect();
        Quantized { bits, codes, scales, zeros, g_idx, losses: vec![0.0; n] }
    }

    /// `x W^T + bias` in f64, for `rows` rows of x.
    fn biased_f64(x: &[f32], weight: &Quantized, bias: &[f32], rows: usize) -> Vec<f64> {
        let (n, k) = weight.dims();
        let mut y = matmul_f64(x, &weight.dequantized(), (rows, n, k));
        y.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += *b as f64);
        y
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
            ("two bits, one row", 1, 64, 2, scattered(512, 64)),
            ("two bits, groups of half a chunk, panels", 20, 64, 2, scattered(256, 32)),
            ("three bits, one row", 1, 64, 3, scattered(512, 128)),
            ("three bits, two tiles of panels", 130, 224, 3, scattered(256, 128)),
            ("a short last group", 2, 32, 4, contiguous(72, 32)),
            ("one group over several units", 7, 64, 4, contiguous(512, 512)),
            ("groups of one chunk", 8, 96, 4, scattered(448, 64)),
            ("groups of two chunks, a second tile of tokens", 9, 64, 4, scattered(1152, 128)),
            ("groups of many chunks", 17, 32, 4, scattered(1024, 512)),
            ("two groups a chunk, every tile of tokens", 64, 64, 4, scattered(320, 32)),
            ("eight bits, groups of four chunks", 40, 64, 8, scattered(640, 128)),
            ("eight bits, groups of two chunks", 1, 32, 8, scattered(192, 64)),
            ("eight bits, groups of half a chunk", 3, 64, 8, scattered(256, 16)),
            ("eight bits, no groups", 12, 32, 8, contiguous(96, 96)),
            ("outputs that are no whole tiles", 1, 40, 4, scattered(256, 64)),
            ("one row more than the kernel takes", 65, 64, 8, scattered(256, 128)),
            ("panels, fewer outputs than a block has", 16, 32, 4, scattered(1024, 128)),
            ("panels, a last block of its own size", 33, 416, 4, scattered(512, 64)),
            ("panels with two groups a chunk", 100, 96, 4, scattered(640, 32)),
            ("panels and one group", 128, 160, 4, contiguous(896, 896)),
            ("panels, one block for all features", 12, 24576, 4, scattered(128, 128)),
            ("panels, two blocks of three groups", 9, 12288, 4, scattered(1024, 256)),
            ("few rows of a wide weight", 5, 12288, 4, scattered(512, 128)),
            ("panels of eight bits, two groups a stage", 64, 128, 8, scattered(576, 32)),
            ("panels of eight bits, all features one group", 31, 4096, 8, contiguous(512, 512)),
            ("panels, a second tile of one token", 129, 224, 4, scattered(512, 128)),
            ("panels, tiles and few outputs whose features are divided", 300, 64, 4, scattered(1024, 64)),
            ("panels of eight bits, eight tiles", 1024, 224, 8, contiguous(256, 32)),
            ("more rows than panels have", 2049, 64, 4, scattered(256, 32)),
        ] {
            let k = g_idx.len();
            for zero_offset in [0, 1] {
                let solved = solved(bits, n, g_idx.clone());
                let mut packed = PackedLinear::pack(&solved, zero_offset).unwrap();
                let bias = random(9, n);
                packed.bias = Some(bias.clone());
                let x = random(8, m * k);
                let expected = biased_f64(&x, &solved, &bias, m);
                let x = device.tensor(x, (m, k)).unwrap();
                let weight = device.quant_weight(&packed).unwrap();
                let y = device.quant_matmul(&x, &weight).unwrap();
                assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
                let wide = device.tensor(vec![0.0; k + 1], (1, k + 1)).unwrap();
                assert!(device.quant_matmul(&wide, &weight).is_err(), "{risk}: an input of the wrong width");
            }
        }
    }

    /// What surrounds a product in a model, done with it, against the same done apart in f64.
    fn surroundings_conform(device: &impl QuantMatMul, tolerance: f64) {
        let scattered =
            |k: usize, size: usize| -> Vec<u32> { (0..k).map(|i| ((i * 37 % k) / size) as u32).collect() };
        for (risk, m, n, bits, g_idx, next_n) in [
            ("one row", 1, 96, 4, scattered(512, 128), 32),
            ("more tiles than blocks", 2, 4608, 4, scattered(256, 32), 32),
            ("eight rows, several rounds", 8, 4608, 4, scattered(256, 64), 32),
            ("four rows, normed by every block", 4, 64, 4, scattered(4096, 128), 32),
            ("rows longer than the threads reach at once", 3, 64, 4, scattered(5120, 128), 32),
            ("a row that they reach in four turns", 1, 64, 4, scattered(13824, 128), 32),
            ("two groups a chunk, as many rows as have sums for each", 4, 256, 4, scattered(512, 32), 32),
            ("two groups a chunk, a row more", 5, 256, 4, scattered(512, 32), 32),
            ("few rows of a wide weight", 7, 12288, 4, scattered(256, 128), 32),
            ("few rows, the next weight alone is wide", 6, 256, 4, scattered(256, 64), 12288),
            ("eight bits", 3, 64, 8, scattered(384, 128), 32),
            ("eight bits, small groups", 1, 64, 8, scattered(384, 32), 32),
            ("one group", 1, 64, 4, vec![0; 768], 32),
            ("groups larger than a portion", 4, 64, 4, scattered(2048, 1024), 32),
            ("no whole portions", 1, 64, 4, scattered(320, 64), 32),
            ("rows for the tensor cores", 20, 64, 4, scattered(512, 128), 32),
            ("panels for the next weight too", 33, 512, 4, scattered(512, 128), 32),
            ("the next weight alone takes panels", 12, 256, 4, scattered(576, 64), 32),
            ("panels of eight bits", 128, 768, 8, scattered(256, 64), 32),
            ("many rows", 70, 64, 4, scattered(512, 128), 32),
            ("two tiles of panels for the next weight too", 130, 512, 4, scattered(512, 128), 32),
            ("tiles of panels for the next weight alone", 257, 256, 4, scattered(576, 64), 32),
            ("more rows than panels have", 2050, 512, 4, scattered(512, 128), 32),
            ("three bits", 2, 64, 3, scattered(256, 64), 32),
        ] {
            let k = g_idx.len();
            let solved = solved(bits, n, g_idx);
            let mut packed = PackedLinear::pack(&solved, 1).unwrap();
            let (bias, x) = (random(9, n), random(8, m * k));
            // Small, so that gates times what they gate stay within f16.
            let norm: Vec<f32> = random(10, k).iter().map(|x| x / 64.0).collect();
            packed.bias = Some(bias.clone());
            let plain = |x: &[f32]| biased_f64(x, &solved, &bias, m);
            let tensor =
                |x: &[f32], width: usize| device.tensor(x.to_vec(), (x.len() / width, width)).unwrap();
            let (on_device, weight) = (tensor(&x, k), device.quant_weight(&packed).unwrap());
            let close = |what: &str, y: &_, expected: &[f64]| {
                let risk = format!("{risk}, {what}");
                assert_close(&risk, &device.to_vec(y).unwrap(), expected, tolerance);
            };

            let residual = random(11, m * n);
            let sums: Vec<_> = plain(&x).iter().zip(&residual).map(|(y, r)| y + *r as f64).collect();
            let y = device.quant_matmul_add(&on_device, &weight, tensor(&residual, n)).unwrap();
            close("residual", &y, &sums);
            packed.bias = None;
            let unbiased = device.quant_weight(&packed).unwrap();
            let sums: Vec<_> = sums.iter().enumerate().map(|(i, y)| y - bias[i % n] as f64).collect();
            let y = device.quant_matmul_add(&on_device, &unbiased, tensor(&residual, n)).unwrap();
            close("residual without bias", &y, &sums);
            packed.bias = Some(bias.clone());

            let mut normed = x.clone();
            for row in normed.chunks_mut(k) {
                let mean = row.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / k as f64;
                let factor = 1.0 / (mean + 1e-5).sqrt();
                row.iter_mut().zip(&norm).for_each(|(x, w)| *x = (*x as f64 * factor * *w as f64) as f32);
            }
            let products = plain(&normed);
            let norm_weight = tensor(&norm, k);
            let norm = Norm { weight: &norm_weight, eps: 1e-5 };
            close("norm", &device.normed_quant_matmul(&on_device, norm, &weight).unwrap(), &products);

            let gated = |activation| -> Vec<f64> {
                let pairs = products.chunks(n).flat_map(|row| row[..n / 2].iter().zip(&row[n / 2..]));
                pairs.map(|(gate, up)| activated(*gate, activation) * up).collect()
            };
            let gates = device.gated_weight(&packed, None).unwrap();
            for activation in ALL {
                let y = device.normed_gate_up(&on_device, norm, &gates, activation).unwrap();
                close(&format!("gates, {activation:?}"), &y, &gated(activation));
            }

            // The result goes straight into a weight of `next_n` outputs with an order of its own.
            let mut next = self::solved(bits, next_n, scattered(n / 2, n / 4));
            // So that f16 holds the sums.
            next.scales.iter_mut().for_each(|scale| *scale /= 64.0);
            let next = PackedLinear::pack(&next, 1).unwrap();
            let next_weight = device.quant_weight(&next).unwrap();
            let order = device.input_order(&next_weight);
            let gates = device.gated_weight(&packed, order.as_ref()).unwrap();
            for activation in ALL {
                let y = device.normed_gate_up(&on_device, norm, &gates, activation).unwrap();
                let rounded: Vec<f32> = gated(activation).iter().map(|x| *x as f32).collect();
                let expected = matmul_f64(&rounded, &next.dequantized(), (m, next_n, n / 2));
                let what = format!("order, {activation:?}");
                close(&what, &device.quant_matmul(&y, &next_weight).unwrap(), &expected);
            }
        }
    }

    /// Of bf16 and f32 files; sums stay within f16.
    fn wide_scales_conform(device: &impl QuantMatMul, tolerance: f64) {
        for (bits, rows) in [(4, 1), (4, 40), (8, 3), (3, 9)] {
            let (n, k) = (64, 256);
            let mut solved = solved(bits, n, (0..k as u32).map(|i| i / 64).collect());
            let mut packed = PackedLinear::pack(&solved, 0).unwrap();
            solved.scales.iter_mut().for_each(|scale| *scale = *scale * 0.123_456_78 + 1e-8);
            packed.scales = Scales::exact(solved.scales.clone());
            assert!(matches!(packed.scales, Scales::F32(_)));
            let x = random(8, rows * k);
            let expected = biased_f64(&x, &solved, &vec![0.0; n], rows);
            let weight = device.quant_weight(&packed).unwrap();
            let y = device.quant_matmul(&device.tensor(x, (rows, k)).unwrap(), &weight).unwrap();
            let risk = format!("scales of {bits} bits that f16 does not hold, {rows} rows");
            assert_close(&risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_FIXED);
        wide_scales_conform(&Cpu::new(), NMSE_FIXED);
        surroundings_conform(&Cpu::new(), NMSE_FIXED);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(|gpu| {
            conforms(gpu, tolerance(gpu));
            wide_scales_conform(gpu, tolerance(gpu));
            surroundings_conform(gpu, tolerance(gpu));
        });
    }
}
