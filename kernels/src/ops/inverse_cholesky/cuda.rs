use std::ops::Range;

use super::{InverseCholesky, check};
use crate::cuda::{Args, Cuda, Launch, Operand};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::{Error, Result};

pub(crate) const SOURCE: &str = include_str!("inverse_cholesky.cu");

/// Rows of a triangle that one block of threads factors and inverts at once, and that block's threads, as in the kernel.
const LEAF: usize = 128;
const LEAF_THREADS: u32 = 1024;

/// Columns that are factored before their products are subtracted from the rest of the matrix, a multiple of [`LEAF`].
const PANEL: usize = 512;

/// Columns of one product with a triangle.
const STRIP: usize = 2048;

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
        let (inverse, failed) = (self.zeros::<f32>(size * size)?, self.upload(&[u32::MAX])?);
        let half = size.div_ceil(2).next_multiple_of(PANEL);
        let work = self.alloc::<f32>(half * half)?;
        let factoring = Factoring {
            gpu: self,
            size,
            rest: self.address(&reversed),
            inverse: self.address(&inverse),
            work: self.address(&work),
            failed: self.address(&failed),
        };
        factoring.factor()?;
        factoring.join(0..size)?;
        let u = CudaMatrix { values: reversed, dims: (size, size) };
        let args =
            Args::new([self.address(&u.values), self.address(&failed), self.address(&inverse)]).ints([size]);
        self.launch("turn_inverse", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        match self.download(&failed.slice(..))?[0] {
            u32::MAX => Ok(u),
            pivot => Err(Error::NotPositiveDefinite { pivot: pivot as usize, size }),
        }
    }

    fn damped(&self, hessian: &CudaMatrix, order: &[u32], damp: f32) -> Result<CudaMatrix> {
        self.damped_by(hessian, order, (damp, 1.0 + damp))
    }
}

impl Cuda {
    /// The permuted Hessian, both triangles, with `damp` added to its diagonal, or `dead` where that is zero.
    pub(crate) fn damped_by(
        &self,
        hessian: &CudaMatrix,
        order: &[u32],
        (damp, dead): (f32, f32),
    ) -> Result<CudaMatrix> {
        let size = hessian.dims.1;
        check(size, order)?;
        let out = CudaMatrix { values: self.alloc(size * size)?, dims: (size, size) };
        let order = self.upload(order)?;
        let args =
            Args::new([self.address(&out.values), self.address(&hessian.values), self.address(&order)])
                .ints([size])
                .floats([damp, dead]);
        self.launch("damped", Launch::grid(size.div_ceil(256), size, 1, 256), &args)?;
        Ok(out)
    }
}

/// A matrix on its way to the inverse of its Cholesky factor; all matrices are column-major.
struct Factoring<'a> {
    gpu: &'a Cuda,
    size: usize,
    /// What is left to factor; the lower triangle counts.
    rest: u64,
    /// Zeros at first. [`Self::factor`] writes the factor below the panels on the diagonal, and in these their inverses;
    /// [`Self::join`] makes it the inverse of the whole factor.
    inverse: u64,
    /// A quarter of a matrix.
    work: u64,
    /// The first pivot that is not positive.
    failed: u64,
}

impl Factoring<'_> {
    fn factor(&self) -> Result<()> {
        for start in (0..self.size).step_by(PANEL) {
            let panel = start..(start + PANEL).min(self.size);
            self.panel(panel.clone())?;
            let (width, below) = (panel.len(), panel.end..self.size);
            // L of the rows below, by the panel's inverse.
            let factors = [
                self.rest(below.start, panel.start),
                self.inverse(panel.start, panel.start).transposed(),
                self.inverse(below.start, panel.start),
            ];
            self.gpu.gemm_wide((below.len(), width, width), (1.0, 0.0), factors)?;
            // L L^T is subtracted from the rest, strip by strip from the diagonal down.
            for start in below.clone().step_by(STRIP) {
                let strip = start..(start + STRIP).min(self.size);
                let left = self.inverse(strip.start, panel.start);
                let factors = [left, left.transposed(), self.rest(strip.start, strip.start)];
                let sizes = (self.size - strip.start, strip.len(), width);
                self.gpu.gemm_wide(sizes, (-1.0, 1.0), factors)?;
            }
        }
        Ok(())
    }

    /// Factors and inverts on the diagonal places `span`: with `[A; B C]` there, A first, then what B leaves of C.
    fn panel(&self, span: Range<usize>) -> Result<()> {
        if span.len() <= LEAF {
            let places = [self.rest, self.inverse, self.failed];
            let args = Args::new(places).ints([self.size, span.start, span.len()]);
            return self.gpu.launch("factor_leaf", Launch::blocks(1, LEAF_THREADS), &args);
        }
        let middle = span.start + (span.len() / 2).next_multiple_of(LEAF);
        let (half, rest) = (middle - span.start, span.end - middle);
        self.panel(span.start..middle)?;
        let left = self.inverse(middle, span.start);
        let factors =
            [self.rest(middle, span.start), self.inverse(span.start, span.start).transposed(), left];
        self.gpu.gemm_wide((rest, half, half), (1.0, 0.0), factors)?;
        let factors = [left, left.transposed(), self.rest(middle, middle)];
        self.gpu.gemm_wide((rest, rest, half), (-1.0, 1.0), factors)?;
        self.panel(middle..span.end)?;
        self.below(span.start, middle, span.end)
    }

    /// Joins the inverses of the panels in `span`.
    fn join(&self, span: Range<usize>) -> Result<()> {
        if span.len() <= PANEL {
            return Ok(());
        }
        let middle = span.start + (span.len() / 2).next_multiple_of(PANEL);
        self.join(span.start..middle)?;
        self.join(middle..span.end)?;
        self.below(span.start, middle, span.end)
    }

    /// The inverse of `[A 0; B C]`: with A and C inverted, B becomes `-C B A`. Of the triangles only what is not zero counts.
    fn below(&self, start: usize, middle: usize, end: usize) -> Result<()> {
        let rest = end - middle;
        let work = |row: usize, column: usize| {
            Operand::wide(self.work + (size_of::<f32>() * (column * rest + row)) as u64, rest)
        };
        for first in (start..middle).step_by(STRIP) {
            let strip = first..(first + STRIP).min(middle);
            let factors = [self.inverse(middle, first), self.inverse(first, first), work(0, first - start)];
            self.gpu.gemm_wide((rest, strip.len(), middle - first), (1.0, 0.0), factors)?;
        }
        for first in (middle..end).step_by(STRIP) {
            let strip = first..(first + STRIP).min(end);
            let factors = [self.inverse(first, middle), work(0, 0), self.inverse(first, start)];
            let sizes = (strip.len(), middle - start, strip.end - middle);
            self.gpu.gemm_wide(sizes, (-1.0, 0.0), factors)?;
        }
        Ok(())
    }

    fn rest(&self, row: usize, column: usize) -> Operand {
        self.at(self.rest, row, column)
    }

    fn inverse(&self, row: usize, column: usize) -> Operand {
        self.at(self.inverse, row, column)
    }

    fn at(&self, matrix: u64, row: usize, column: usize) -> Operand {
        Operand::wide(matrix + (size_of::<f32>() * (column * self.size + row)) as u64, self.size)
    }
}
