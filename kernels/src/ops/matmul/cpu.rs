use std::ops::Range;
use std::sync::OnceLock;

use candle_core::Tensor;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{MatMul, check, check_parts, check_values};
use crate::cpu::{DenseRow, GEMV_ROWS, Isa, Panels, RowSource, Sketch, View, linear};
use crate::ops::sample;
use crate::{Cpu, Device, Dtype, HostTensor, Result, RowSampling};

/// A weight `[out, in]`, kept in the checkpoint's own type and widened row by row; or one that was quantized and stands
/// for its values.
pub struct CpuWeight(Kind);

enum Kind {
    Dense(Dense),
    Quantized(Panels),
}

struct Dense {
    values: Values,
    dims: (usize, usize),
    bias: Option<Vec<f32>>,
    /// Of a head, made when it is first asked for the scores that decide a draw.
    sketch: OnceLock<Sketch>,
}

enum Values {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
}

impl MatMul for Cpu {
    type Weight = CpuWeight;

    fn weight(&self, parts: &[HostTensor], biases: &[HostTensor]) -> Result<CpuWeight> {
        let dims = check_parts(parts, biases)?;
        let dtype = parts[0].dtype;
        let uniform = parts.iter().all(|p| p.dtype == dtype);
        let halves =
            || parts.iter().flat_map(|p| p.bytes.chunks_exact(2)).map(|b| u16::from_le_bytes([b[0], b[1]]));
        let values = match dtype {
            Dtype::F16 if uniform => Values::F16(halves().map(f16::from_bits).collect()),
            Dtype::BF16 if uniform => Values::BF16(halves().map(bf16::from_bits).collect()),
            _ => Values::F32(parts.iter().flat_map(HostTensor::to_f32).collect()),
        };
        let bias = (!biases.is_empty()).then(|| biases.iter().flat_map(HostTensor::to_f32).collect());
        Ok(CpuWeight::dense(values, dims, bias))
    }

    fn weight_from_f32(
        &self,
        values: Vec<f32>,
        dims: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<CpuWeight> {
        check_values(&values, dims, bias.as_deref())?;
        Ok(CpuWeight::dense(Values::F32(values), dims, bias))
    }

    fn matmul_kernel(&self, weight: &CpuWeight, rows: usize) -> &'static str {
        match &weight.0 {
            Kind::Dense(_) if rows <= GEMV_ROWS => "rows widened in registers",
            Kind::Dense(_) => "faer",
            Kind::Quantized(panels) => panels.kernel_name(rows, Isa::best()),
        }
    }

    fn matmul(&self, x: &Tensor, weight: &CpuWeight) -> Result<Tensor> {
        let dims = weight.dims();
        check(self.shape(x), dims)?;
        let x = View::of(x)?;
        let y = match &weight.0 {
            Kind::Dense(dense) => linear(&x, x.rows, dense, dense.bias.as_deref()),
            Kind::Quantized(panels) => panels.product(&x, x.rows, Isa::best()),
        };
        self.tensor(y, (x.rows, dims.0))
    }

    fn scores(&self, x: &Tensor, weight: &CpuWeight, sampling: &[RowSampling]) -> Result<Tensor> {
        check(self.shape(x), weight.dims())?;
        sample::check((self.shape(x).0, weight.dims().0), sampling)?;
        let Some(dense) = weight.sketched(sampling) else { return self.logits(x, weight) };
        let x = View::of(x)?;
        let sketch = dense.sketch.get_or_init(|| Sketch::of(dense));
        self.tensor(sketch.scores(&x, dense, sampling), (x.rows, dense.dims.0))
    }

    fn share_read(&self, weight: &CpuWeight, sampling: &[RowSampling]) -> f64 {
        weight.sketched(sampling).map_or(1.0, |dense| 1.0 / dense.values.element_size() as f64)
    }
}

impl Values {
    fn element_size(&self) -> usize {
        match self {
            Self::F16(_) | Self::BF16(_) => 2,
            Self::F32(_) => 4,
        }
    }
}

impl CpuWeight {
    fn dense(values: Values, dims: (usize, usize), bias: Option<Vec<f32>>) -> Self {
        Self(Kind::Dense(Dense { values, dims, bias, sketch: OnceLock::new() }))
    }

    pub(crate) fn quantized(panels: Panels) -> Self {
        Self(Kind::Quantized(panels))
    }

    /// The weight, where its sketch is enough for all tokens that are drawn.
    fn sketched(&self, sampling: &[RowSampling]) -> Option<&Dense> {
        let enough = sampling.iter().all(|row| row.deciding().is_some());
        match &self.0 {
            Kind::Dense(dense @ Dense { bias: None, .. }) if enough => Some(dense),
            _ => None,
        }
    }

    /// `(out, in)`
    pub(crate) fn dims(&self) -> (usize, usize) {
        match &self.0 {
            Kind::Dense(dense) => dense.dims,
            Kind::Quantized(panels) => panels.dims(),
        }
    }

    /// Writes row `row`, `in` values.
    pub(crate) fn write_row(&self, row: usize, out: &mut [f32]) {
        match &self.0 {
            Kind::Dense(dense) => dense.write_row(row, out),
            Kind::Quantized(panels) => panels.write_row(row, out),
        }
    }
}

impl RowSource for Dense {
    fn dims(&self) -> (usize, usize) {
        self.dims
    }

    fn row(&self, row: usize) -> DenseRow<'_> {
        let span = row * self.dims.1..(row + 1) * self.dims.1;
        match &self.values {
            Values::F16(values) => DenseRow::F16(&values[span]),
            Values::BF16(values) => DenseRow::BF16(&values[span]),
            Values::F32(values) => DenseRow::F32(&values[span]),
        }
    }

    fn write_row(&self, row: usize, out: &mut [f32]) {
        let span = row * self.dims.1..(row + 1) * self.dims.1;
        match &self.values {
            Values::F16(values) => values[span].convert_to_f32_slice(out),
            Values::BF16(values) => values[span].convert_to_f32_slice(out),
            Values::F32(values) => out.copy_from_slice(&values[span]),
        }
    }

    fn borrow_rows(&self, rows: Range<usize>) -> Option<&[f32]> {
        match &self.values {
            Values::F32(values) => Some(&values[rows.start * self.dims.1..rows.end * self.dims.1]),
            Values::F16(_) | Values::BF16(_) => None,
        }
    }
}
