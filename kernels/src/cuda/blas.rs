//! Products by cuBLAS. Our matrices are row-major, cuBLAS's column-major: a row-major `[r, c]` is its `[c, r]`.

use std::ffi::c_void;

use cudarc::cublas::result::{CublasError, gemm_ex};
use cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t};

use super::Cuda;
use crate::{Dtype, Error, Result};

/// One factor or result: where it starts, whether it is transposed, and the distance of its columns in
/// cuBLAS's sense.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub address: u64,
    pub transposed: bool,
    pub stride: usize,
    /// f32 instead of the compute type.
    pub wide: bool,
}

/// Products on the tensor cores also for f32, whose values are rounded to 11 bits: by itself only for sums that have to be
/// compared, no more.
pub(crate) const TF32: cublasComputeType_t = cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32;

impl Operand {
    pub fn real(address: u64, stride: usize) -> Self {
        Self { address, transposed: false, stride, wide: false }
    }

    pub fn wide(address: u64, stride: usize) -> Self {
        Self { address, transposed: false, stride, wide: true }
    }

    /// The part of a row-major f32 matrix from this row and column on.
    pub fn part(self, row: usize, column: usize) -> Self {
        let before = size_of::<f32>() * (row * self.stride + column);
        Self { address: self.address + before as u64, ..self }
    }

    pub fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }
}

impl Cuda {
    /// `c = alpha a b + beta c`, column-major `m x n` with `k` in between, sums in f32.
    pub(crate) fn gemm(
        &self,
        sizes: (usize, usize, usize),
        factors: (f32, f32),
        a: Operand,
        b: Operand,
        c: Operand,
    ) -> Result<()> {
        self.gemm_as(cublasComputeType_t::CUBLAS_COMPUTE_32F, sizes, factors, [a, b, c])
    }

    /// The same, computed so.
    pub(crate) fn gemm_as(
        &self,
        compute: cublasComputeType_t,
        (m, n, k): (usize, usize, usize),
        (alpha, beta): (f32, f32),
        [a, b, c]: [Operand; 3],
    ) -> Result<()> {
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        let failed = |error: CublasError| Error::cuda("cuBLAS", format!("{error:?}"));
        let kind = |operand: Operand| match (operand.wide, self.dtype()) {
            (true, _) | (false, Dtype::F32) => cudaDataType_t::CUDA_R_32F,
            (false, Dtype::BF16) => cudaDataType_t::CUDA_R_16BF,
            (false, Dtype::F16) => cudaDataType_t::CUDA_R_16F,
        };
        let turn = |operand: Operand| match operand.transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        };
        // SAFETY: the callers have checked the shapes, and the memory lives until the stream has used it, since
        // freeing is ordered on the same stream.
        unsafe {
            gemm_ex(
                *self.inner.blas.handle(),
                turn(a),
                turn(b),
                m as i32,
                n as i32,
                k as i32,
                (&raw const alpha).cast(),
                a.address as *const c_void,
                kind(a),
                a.stride as i32,
                b.address as *const c_void,
                kind(b),
                b.stride as i32,
                (&raw const beta).cast(),
                c.address as *mut c_void,
                kind(c),
                c.stride as i32,
                compute,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(failed)
    }
}
