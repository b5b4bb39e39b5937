use cudarc::driver::CudaSlice;

use super::{Hessian, check, check_difference, check_products};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch, Operand};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("hessian.cu");

/// An f32 matrix on the GPU, row-major.
pub struct CudaMatrix {
    pub(crate) values: CudaSlice<f32>,
    /// `(rows, columns)`
    pub(crate) dims: (usize, usize),
}

/// Columns of one panel, where there is no kernel for the whole: a product of the part at and below the diagonal each.
const PANEL: usize = 1024;

impl Hessian for Cuda {
    type Matrix = CudaMatrix;

    fn hessian(&self, size: usize) -> Result<CudaMatrix> {
        Ok(CudaMatrix { values: self.zeros(size * size)?, dims: (size, size) })
    }

    fn accumulate(&self, hessian: &mut CudaMatrix, x: &CudaTensor) -> Result<()> {
        let size = hessian.dims.1;
        let (rows, _) = self.shape(x);
        check(self.shape(x), size)?;
        if self.has_hessian_kernel(size) {
            return self.accumulate_on_hopper(hessian, x);
        }
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

    fn products(&self, rows: usize, columns: usize) -> Result<CudaMatrix> {
        Ok(CudaMatrix { values: self.zeros(rows * columns)?, dims: (rows, columns) })
    }

    fn accumulate_products(&self, products: &mut CudaMatrix, a: &CudaTensor, x: &CudaTensor) -> Result<()> {
        let (rows, columns) = products.dims;
        check_products(products.dims, [self.shape(a), self.shape(x)])?;
        let tokens = self.shape(x).0;
        let (x, a) = (Operand::real(self.real(x)?, columns), Operand::real(self.real(a)?, rows));
        let target = Operand::wide(self.address(&products.values), columns);
        self.gemm((columns, rows, tokens), (1.0, 1.0), x, a.transposed(), target)
    }

    fn difference(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        let shape = self.shape(a);
        check_difference(shape, self.shape(b))?;
        let difference = self.new_tensor(shape)?;
        let count = shape.0 * shape.1;
        let args = [
            Arg::Address(self.real(&difference)?),
            Arg::Address(self.real(a)?),
            Arg::Address(self.real(b)?),
            Arg::Long(count as u64),
        ];
        self.launch("stream_difference", Launch::threads(count.div_ceil(8)), &args)?;
        Ok(difference)
    }

    fn matrix_to_vec(&self, matrix: &CudaMatrix) -> Result<Vec<f32>> {
        self.download(&matrix.values.slice(..))
    }

    fn diagonal(&self, hessian: &CudaMatrix) -> Result<Vec<f32>> {
        let size = hessian.dims.1;
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
