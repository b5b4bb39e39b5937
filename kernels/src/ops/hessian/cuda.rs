use cudarc::driver::CudaSlice;

use super::{Hessian, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch, Operand};
use crate::{Device, Error, Result};

/// A square f32 matrix on the card, row-major.
pub struct CudaMatrix {
    pub(crate) values: CudaSlice<f32>,
    pub(crate) size: usize,
}

/// Columns of one panel: a product of the part at and below the diagonal each.
const PANEL: usize = 1024;

impl Hessian for Cuda {
    type Matrix = CudaMatrix;

    fn hessian(&self, size: usize) -> Result<CudaMatrix> {
        Ok(CudaMatrix { values: self.zeros(size * size)?, size })
    }

    fn accumulate(&self, hessian: &mut CudaMatrix, x: &CudaTensor) -> Result<()> {
        let size = hessian.size;
        let (rows, _) = self.shape(x);
        check(self.shape(x), size)?;
        let (h, x) = (self.address(&hessian.values), self.real(x)?);
        // The row-major lower triangle is the column-major upper one: panel by panel, rows 0 to the panel's end.
        for start in (0..size).step_by(PANEL) {
            let end = (start + PANEL).min(size);
            let a = Operand::real(x, size);
            let b = Operand::real(x + (self.dtype().size() * start) as u64, size).transposed();
            let c = Operand::wide(h + 4 * (start * size) as u64, size);
            self.gemm((end, end - start, rows), (1.0, 1.0), a, b, c)?;
        }
        Ok(())
    }

    fn products(&self, _rows: usize, _columns: usize) -> Result<CudaMatrix> {
        Err(not_yet("products of two streams"))
    }

    fn accumulate_difference(
        &self,
        _products: &mut CudaMatrix,
        _a: &CudaTensor,
        _b: &CudaTensor,
        _x: &CudaTensor,
    ) -> Result<()> {
        Err(not_yet("products of two streams"))
    }

    fn matrix_to_vec(&self, matrix: &CudaMatrix) -> Result<Vec<f32>> {
        self.download(&matrix.values.slice(..))
    }

    fn diagonal(&self, hessian: &CudaMatrix) -> Result<Vec<f32>> {
        let size = hessian.size;
        let diagonal = self.alloc::<f32>(size)?;
        let args = [
            Arg::Address(self.address(&diagonal)),
            Arg::Address(self.address(&hessian.values)),
            Arg::Int(size as i32),
        ];
        self.launch("take_diagonal", Launch::threads(size), &args)?;
        self.download(&diagonal.slice(..))
    }
}

/// What only the CPU has so far.
pub(crate) fn not_yet(what: &'static str) -> Error {
    Error::cuda("quantize", format!("{what}: not on a GPU yet; --preset card and --device cpu work"))
}
