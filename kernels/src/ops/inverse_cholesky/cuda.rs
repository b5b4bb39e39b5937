use std::ops::Range;

use cudarc::cusolver::sys::{cublasFillMode_t, cusolverDnSpotrf, cusolverDnSpotrf_bufferSize};

use super::{InverseCholesky, check};
use crate::cuda::{Args, Cuda, Launch, Operand};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::{Error, Result};

pub(crate) const SOURCE: &str = include_str!("inverse_cholesky.cu");

/// Rows of the triangles that one block of threads inverts, a thread a column.
const LEAF: usize = 64;

impl InverseCholesky for Cuda {
    fn inverse_cholesky(&self, hessian: &CudaMatrix, order: &[u32], damp: f32) -> Result<CudaMatrix> {
        let size = hessian.dims.1;
        check(size, order)?;
        let reversed = self.alloc::<f32>(size * size)?;
        let order = self.upload(order)?;
        let args = Args::new([self.address(&reversed), self.address(&hessian.values), self.address(&order)])
            .ints([size])
            .floats([damp]);
        self.launch("reversed_lower", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        self.factor(self.address(&reversed), size)?;
        self.invert(self.address(&reversed), size)?;
        let u = CudaMatrix { values: self.alloc(size * size)?, dims: (size, size) };
        let not_finite = self.zeros::<u32>(1)?;
        let args = Args::new([self.address(&u.values), self.address(&not_finite), self.address(&reversed)])
            .ints([size]);
        self.launch("turn_inverse", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        match self.download(&not_finite.slice(..))?[0] {
            0 => Ok(u),
            _ => Err(Error::NotPositiveDefinite { pivot: 0, size }),
        }
    }

    fn damped(&self, hessian: &CudaMatrix, order: &[u32], damp: f32) -> Result<CudaMatrix> {
        let size = hessian.dims.1;
        check(size, order)?;
        let out = CudaMatrix { values: self.alloc(size * size)?, dims: (size, size) };
        let order = self.upload(order)?;
        let args =
            Args::new([self.address(&out.values), self.address(&hessian.values), self.address(&order)])
                .ints([size])
                .floats([damp]);
        self.launch("damped", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        Ok(out)
    }
}

impl Cuda {
    /// Replaces the lower triangle at `matrix`, column-major, by its Cholesky factor.
    fn factor(&self, matrix: u64, size: usize) -> Result<()> {
        let failed =
            |error: cudarc::cusolver::result::CusolverError| Error::cuda("cuSOLVER", format!("{error:?}"));
        let solver = self.solver()?;
        let lower = cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
        let info = self.zeros::<i32>(1)?;
        let info_address = self.address(&info) as *mut i32;
        let (n, a, mut length) = (size as i32, matrix as *mut f32, 0);
        // SAFETY: `matrix` is a square of this size, and the work space has the size cuSOLVER asks for.
        unsafe {
            cusolverDnSpotrf_bufferSize(solver.cu(), lower, n, a, n, &mut length).result().map_err(failed)?;
            let work = self.alloc::<f32>(length as usize)?;
            let work_address = self.address(&work) as *mut f32;
            cusolverDnSpotrf(solver.cu(), lower, n, a, n, work_address, length, info_address)
                .result()
                .map_err(failed)?;
        }
        match self.download(&info.slice(..))?[0] {
            0 => Ok(()),
            pivot => Err(Error::NotPositiveDefinite { pivot: pivot.unsigned_abs() as usize - 1, size }),
        }
    }

    /// Replaces a lower triangle, column-major and zero above, by its inverse.
    fn invert(&self, matrix: u64, size: usize) -> Result<()> {
        let args = Args::new([matrix]).ints([size]);
        let leaves = Launch::blocks(size.div_ceil(LEAF), LEAF as u32).shared(4 * LEAF * (LEAF + 1));
        self.launch("invert_leaves", leaves, &args)?;
        let half = (size / 2).next_multiple_of(LEAF);
        let work = self.alloc::<f32>(half * half)?;
        self.join_inverses(matrix, size, 0..size, self.address(&work))
    }

    /// The inverse of `[A 0; B C]` on the diagonal places `span`: with A and C inverted, B becomes `-C B A`.
    fn join_inverses(&self, matrix: u64, size: usize, span: Range<usize>, work: u64) -> Result<()> {
        if span.len() <= LEAF {
            return Ok(());
        }
        let half = (span.len() / 2).next_multiple_of(LEAF);
        let middle = span.start + half;
        self.join_inverses(matrix, size, span.start..middle, work)?;
        self.join_inverses(matrix, size, middle..span.end, work)?;
        let rest = span.end - middle;
        let at = |row: usize, column: usize| Operand::wide(matrix + 4 * (column * size + row) as u64, size);
        let product = Operand::wide(work, rest);
        self.gemm(
            (rest, half, half),
            (1.0, 0.0),
            at(middle, span.start),
            at(span.start, span.start),
            product,
        )?;
        self.gemm((rest, half, rest), (-1.0, 0.0), at(middle, middle), product, at(middle, span.start))
    }
}
