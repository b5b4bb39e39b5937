use super::{MatMul, check, check_parts, check_values};
use crate::cuda::{Args, Bytes, Cuda, CudaTensor, Launch, Operand};
use crate::error::expect;
use crate::{Add, Device, Dtype, HostTensor, Result};

pub(crate) const SMALL_M_SOURCE: &str = include_str!("small_m.cu");

/// Threads of a block of the small-M kernels, and the outputs that it makes.
pub(crate) const SMALL_M_THREADS: u32 = 256;
pub(crate) const SMALL_M_OUTPUTS: usize = 16;

/// Up to so many rows reading the weights once is all that counts, and cuBLAS is not made for it.
const SMALL_M: usize = 16;

/// Features of a chunk of the dense kernel.
const CHUNK: usize = 32;

/// A dense weight `[out, in]` in the compute type.
pub struct CudaWeight {
    values: Bytes,
    dims: (usize, usize),
    /// Stored `[in, out]`, as dequantizing leaves it.
    turned: bool,
    bias: Option<CudaTensor>,
}

impl CudaWeight {
    pub(crate) fn new(values: Bytes, dims: (usize, usize), turned: bool, bias: Option<CudaTensor>) -> Self {
        Self { values, dims, turned, bias }
    }

    pub(crate) fn dims(&self) -> (usize, usize) {
        self.dims
    }

    pub(crate) fn values(&self) -> &Bytes {
        &self.values
    }
}

impl MatMul for Cuda {
    type Weight = CudaWeight;

    fn weight(&self, parts: &[HostTensor], biases: &[HostTensor]) -> Result<CudaWeight> {
        let dims = check_parts(parts, biases)?;
        let values = self.upload_real(parts)?;
        let bias: Vec<f32> = biases.iter().flat_map(HostTensor::to_f32).collect();
        let bias = if bias.is_empty() { None } else { Some(self.tensor(bias, (1, dims.0))?) };
        Ok(CudaWeight::new(values, dims, false, bias))
    }

    fn weight_from_f32(
        &self,
        values: Vec<f32>,
        dims: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<CudaWeight> {
        check_values(&values, dims, bias.as_deref())?;
        let bias = bias.map(|bias| self.tensor(bias, (1, dims.0))).transpose()?;
        Ok(CudaWeight::new(self.upload_bytes(&[&self.encode(&values)])?, dims, false, bias))
    }

    fn matmul_kernel(&self, weight: &CudaWeight, rows: usize) -> &'static str {
        if self.takes_small_m((rows, weight.dims.1), weight) { "small_m_dense" } else { "cuBLAS" }
    }

    fn matmul(&self, x: &CudaTensor, weight: &CudaWeight) -> Result<CudaTensor> {
        check(self.shape(x), weight.dims)?;
        let y = self.new_tensor((self.shape(x).0, weight.dims.0))?;
        if self.takes_small_m(self.shape(x), weight) {
            self.small_m_dense(x, weight, self.real(&y)?, false)?;
            return Ok(y);
        }
        let target = Operand::real(self.real(&y)?, weight.dims.0);
        self.product(x, weight, 0.0, target)?;
        if let Some(bias) = &weight.bias {
            let args = Args::new([self.real(&y)?, self.real(bias)?]).ints([weight.dims.0]);
            self.launch("add_bias", Launch::blocks(y.shape().0, 256), &args)?;
        }
        Ok(y)
    }

    fn matmul_add(
        &self,
        x: &CudaTensor,
        weight: &CudaWeight,
        mut residual: CudaTensor,
    ) -> Result<CudaTensor> {
        check(self.shape(x), weight.dims)?;
        let shape = (self.shape(x).0, weight.dims.0);
        expect("matmul residual", shape, self.shape(&residual))?;
        if weight.bias.is_some() || self.takes_small_m(self.shape(x), weight) {
            return self.add(&residual, &self.matmul(x, weight)?);
        }
        // A shared residual is copied and added to in place as well: product and residual are then rounded once in both
        // cases, so that the bits do not depend on whether the memory is shared.
        let sum = if residual.is_alone() { residual } else { self.copy(&residual)? };
        self.product(x, weight, 1.0, Operand::real(self.real(&sum)?, shape.1))?;
        Ok(sum)
    }

    fn logits(&self, x: &CudaTensor, weight: &CudaWeight) -> Result<CudaTensor> {
        check(self.shape(x), weight.dims)?;
        let y = self.new_wide_tensor((self.shape(x).0, weight.dims.0))?;
        if self.takes_small_m(self.shape(x), weight) && weight.bias.is_none() {
            self.small_m_dense(x, weight, self.wide(&y)?, true)?;
            return Ok(y);
        }
        self.product(x, weight, 0.0, Operand::wide(self.wide(&y)?, weight.dims.0))?;
        Ok(y)
    }
}

impl Cuda {
    fn takes_small_m(&self, (rows, k): (usize, usize), weight: &CudaWeight) -> bool {
        let aligned = !weight.turned && k.is_multiple_of(CHUNK);
        self.dtype() != Dtype::F32 && aligned && (1..=SMALL_M).contains(&rows)
    }

    fn small_m_dense(&self, x: &CudaTensor, weight: &CudaWeight, y: u64, wide: bool) -> Result<()> {
        let ((rows, k), n) = (self.shape(x), weight.dims.0);
        let args = Args::new([y, self.real(x)?, self.arrived(&weight.values)?])
            .addresses([self.real_or_none(weight.bias.as_ref())?])
            .ints([rows, k, n, usize::from(wide)]);
        let kernel = if rows <= 8 { "small_m_dense_1" } else { "small_m_dense_2" };
        let launch = Launch::blocks(n.div_ceil(SMALL_M_OUTPUTS), SMALL_M_THREADS).early();
        self.launch(kernel, launch, &args)
    }

    /// `target = x weight^T + beta target`
    fn product(&self, x: &CudaTensor, weight: &CudaWeight, beta: f32, target: Operand) -> Result<()> {
        let (rows, k) = self.shape(x);
        let (n, address) = (weight.dims.0, self.arrived(&weight.values)?);
        let w =
            if weight.turned { Operand::real(address, n) } else { Operand::real(address, k).transposed() };
        self.gemm((n, rows, k), (1.0, beta), w, Operand::real(self.real(x)?, k), target)
    }
}
