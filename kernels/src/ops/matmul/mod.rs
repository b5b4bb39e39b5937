//! The dense linear layer.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::error::expect;
use crate::{Add, Error, HostTensor, Result, RowSampling};

/// `y[t, n] = sum_k x[t, k] * weight[n, k] + bias[n]`.
/// x: `[tokens, in]`, weight: `[out, in]` in the checkpoint's type, result: `[tokens, out]`
pub trait MatMul: Add {
    /// A dense weight on this device, with its bias.
    type Weight: Send + Sync;

    /// Several `[out_i, in]` matrices stacked along `out`, with a bias for each or for none.
    fn weight(&self, parts: &[HostTensor], biases: &[HostTensor]) -> Result<Self::Weight>;

    /// A weight `[out, in]` from f32 values.
    fn weight_from_f32(
        &self,
        values: Vec<f32>,
        shape: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<Self::Weight>;

    /// Name of the kernel that multiplies so many rows by this weight.
    fn matmul_kernel(&self, weight: &Self::Weight, rows: usize) -> &'static str;

    fn matmul(&self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor>;

    /// `residual + matmul(x)`; a device may write it over the residual where no other tensor shares its memory.
    fn matmul_add(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        residual: Self::Tensor,
    ) -> Result<Self::Tensor> {
        self.add(&residual, &self.matmul(x, weight)?)
    }

    /// [`Self::matmul`] with an f32 result even where activations are narrower: the model's scores.
    fn logits(&self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor> {
        self.matmul(x, weight)
    }

    /// The scores that tokens are drawn from, in the way that `sampling` says for each row: those that cannot decide which
    /// token it is may be minus infinity.
    fn scores(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        sampling: &[RowSampling],
    ) -> Result<Self::Tensor> {
        let _ = sampling;
        self.logits(x, weight)
    }

    /// How much of the weight's memory [`Self::scores`] reads at least.
    fn share_read(&self, weight: &Self::Weight, sampling: &[RowSampling]) -> f64 {
        let _ = (weight, sampling);
        1.0
    }
}

/// The parts must share `in`, and every part has a bias as long as its `out`, or none has.
/// Returns `(out, in)` of the whole.
pub(crate) fn check_parts(parts: &[HostTensor], biases: &[HostTensor]) -> Result<(usize, usize)> {
    let dims = parts.iter().map(HostTensor::dims2).collect::<Result<Vec<_>>>()?;
    let Some(&(_, in_features)) = dims.first() else {
        return Err(Error::shape("matmul weight", "at least one part", 0));
    };
    if let Some(odd) = dims.iter().find(|d| d.1 != in_features) {
        return Err(Error::shape("matmul weight", (odd.0, in_features), odd));
    }
    let outs: Vec<_> = dims.iter().map(|d| d.0).collect();
    let bias_lengths = biases.iter().map(|b| Ok(b.dims2()?.1)).collect::<Result<Vec<_>>>()?;
    if !biases.is_empty() && bias_lengths != outs {
        return Err(Error::shape("matmul biases", outs, bias_lengths));
    }
    Ok((outs.iter().sum(), in_features))
}

/// Values of all of a weight `(out, in)`, and a bias for every output.
pub(crate) fn check_values(values: &[f32], dims: (usize, usize), bias: Option<&[f32]>) -> Result<()> {
    if values.len() != dims.0 * dims.1 {
        return Err(Error::shape("matmul weight", dims, values.len()));
    }
    bias.map_or(Ok(()), |bias| expect("matmul bias", dims.0, bias.len()))
}

/// `x` must be as wide as the weight.
pub(crate) fn check(x: (usize, usize), weight: (usize, usize)) -> Result<()> {
    expect("matmul", (x.0, weight.1), x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, matmul_f64, random, tolerance};
    use crate::{Cpu, Dtype};
    use half::{bf16, f16};

    /// Bytes of `values` in `dtype`, and what they are worth after that rounding.
    fn store(values: &[f32], dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
        let one = |x: &f32| match dtype {
            Dtype::F16 => (f16::from_f32(*x).to_le_bytes().to_vec(), f16::from_f32(*x).to_f32()),
            Dtype::BF16 => (bf16::from_f32(*x).to_le_bytes().to_vec(), bf16::from_f32(*x).to_f32()),
            Dtype::F32 => (x.to_le_bytes().to_vec(), *x),
        };
        let (bytes, rounded): (Vec<_>, Vec<_>) = values.iter().map(one).unzip();
        (bytes.concat(), rounded)
    }

    /// To a residual whose memory is shared, which must stay as it was, and to one whose memory is not.
    fn adds<D: MatMul>(
        device: &D,
        risk: &str,
        (x, weight): (&D::Tensor, &D::Weight),
        product: &[f64],
        tolerance: f64,
    ) {
        let rows = device.shape(x).0;
        let residual = random(5, product.len());
        let expected: Vec<f64> = product.iter().zip(&residual).map(|(y, r)| y + *r as f64).collect();
        let tensor = device.tensor(residual, (rows, product.len() / rows)).unwrap();
        let before = device.to_vec(&tensor).unwrap();
        let y = device.matmul_add(x, weight, tensor.clone()).unwrap();
        assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
        assert!(
            device.to_vec(&tensor).unwrap() == before,
            "{risk}: a residual that is held was written over"
        );
        let y = device.matmul_add(x, weight, tensor).unwrap();
        assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
        let narrow = device.tensor(vec![0.0; rows], (rows, 1)).unwrap();
        assert!(device.matmul_add(x, weight, narrow).is_err(), "{risk}: a residual of the wrong width");
    }

    fn conforms(device: &impl MatMul, tolerance: f64) {
        for (risk, m, n, k, dtype) in [
            ("one row", 1, 33, 70, Dtype::F16),
            ("a few rows", 5, 64, 128, Dtype::BF16),
            ("a second tile of tokens", 12, 90, 96, Dtype::F16),
            ("more rows than a dot product takes", 9, 40, 64, Dtype::F16),
            ("many rows", 130, 96, 65, Dtype::BF16),
            ("f32 is borrowed", 20, 31, 17, Dtype::F32),
        ] {
            let x = random(1, m * k);
            let (first, first_values) = store(&random(2, n * k), dtype);
            let (second, second_values) = store(&random(3, 7 * k), dtype);
            let (bias, bias_values) = store(&random(4, n + 7), dtype);
            let parts = [
                HostTensor::new(dtype, vec![n, k], &first).unwrap(),
                HostTensor::new(dtype, vec![7, k], &second).unwrap(),
            ];
            let split = n * dtype.size();
            let biases = [
                HostTensor::new(dtype, vec![n], &bias[..split]).unwrap(),
                HostTensor::new(dtype, vec![7], &bias[split..]).unwrap(),
            ];
            let w = [first_values, second_values].concat();
            let mut expected = matmul_f64(&x, &w, (m, n + 7, k));
            let x = device.tensor(x, (m, k)).unwrap();
            let weight = device.weight(&parts, &[]).unwrap();
            let y = device.matmul(&x, &weight).unwrap();
            assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
            adds(device, risk, (&x, &weight), &expected, tolerance);
            for row in expected.chunks_mut(n + 7) {
                row.iter_mut().zip(&bias_values).for_each(|(y, b)| *y += *b as f64);
            }
            let weight = device.weight(&parts, &biases).unwrap();
            let y = device.matmul(&x, &weight).unwrap();
            assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
            adds(device, risk, (&x, &weight), &expected, tolerance);
            assert!(device.weight(&parts, &biases[..1]).is_err(), "{risk}: a bias for one part only");
            let narrow = device.tensor(vec![0.0; k + 1], (1, k + 1)).unwrap();
            assert!(device.matmul(&narrow, &weight).is_err(), "{risk}: an input of the wrong width");
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(|gpu| conforms(gpu, tolerance(gpu)));
    }
}
