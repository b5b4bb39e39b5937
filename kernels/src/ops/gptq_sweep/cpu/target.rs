//! The target of a sweep that makes up for errors in its input.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::{Accum, MatMut, MatRef};
use ndarray::Array2;
use rayon::prelude::*;

use super::{CpuSource, CpuSweep};
use crate::cpu::{all_cores, axpy};
use crate::error::expect;
use crate::ops::gptq_sweep::{SweepTarget, Wanted, check_wanted};
use crate::ops::hessian::cpu::values;
use crate::ops::inverse_cholesky::cpu::ordered;
use crate::{Cpu, Error, MatMul, Result};

/// The row-major values of a matrix as faer sees them.
pub(super) fn view(matrix: &Array2<f32>) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(matrix.as_slice().unwrap_or_default(), matrix.nrows(), matrix.ncols())
}

impl SweepTarget for Cpu {
    fn source_weight(&self, source: &CpuSource, bias: Option<Vec<f32>>) -> Result<Self::Weight> {
        let rows = source.values.len() / source.in_features.max(1);
        self.weight_from_f32(source.values.clone(), (rows, source.in_features), bias)
    }

    fn sweep_weights(&self, sweep: &CpuSweep) -> Result<Array2<f32>> {
        let values: Vec<f32> = sweep.rows.iter().flat_map(|row| &row.weights).copied().collect();
        let dims = sweep.dims();
        Array2::from_shape_vec(dims, values)
            .map_err(|_| Error::shape("gptq_sweep weights", dims, "other rows"))
    }

    fn sweep_pull(
        &self,
        weights: &Array2<f32>,
        order: &[u32],
        wanted: Wanted<&Array2<f32>>,
    ) -> Result<Array2<f32>> {
        let dims = weights.dim();
        check_wanted((dims, order), wanted, Array2::dim)?;
        let (mut pull, sign, by) = match wanted {
            Wanted::OfInputs(shift) => (Array2::zeros(dims), 1.0, gathered(shift, order, order)),
            Wanted::Outputs(outputs, hessian) => {
                let rows: Vec<u32> = (0..dims.0 as u32).collect();
                (gathered(outputs, &rows, order), -1.0, ordered(hessian, order))
            }
        };
        let target = MatMut::from_row_major_slice_mut(values(&mut pull), dims.0, dims.1);
        matmul(target, Accum::Add, view(weights), view(&by), sign, all_cores());
        Ok(pull)
    }

    fn sweep_toward(
        &self,
        sweep: &mut CpuSweep,
        pull: &Array2<f32>,
        factor: &Array2<f32>,
        share: f32,
    ) -> Result<()> {
        let dims = sweep.dims();
        expect("sweep_toward", (dims, (dims.1, dims.1)), (pull.dim(), factor.dim()))?;
        let (whole, upper, lower) =
            (BlockStructure::Rectangular, BlockStructure::TriangularUpper, BlockStructure::TriangularLower);
        let product = |left: &Array2<f32>, right: MatRef<f32>, right_shape| {
            let mut result = Array2::zeros(dims);
            let target = MatMut::from_row_major_slice_mut(values(&mut result), dims.0, dims.1);
            triangular_matmul(
                target,
                whole,
                Accum::Replace,
                view(left),
                whole,
                right,
                right_shape,
                1.0,
                all_cores(),
            );
            result
        };
        let half = product(pull, view(factor).transpose(), lower);
        let change = product(&half, view(factor), upper);
        let changes = change.as_slice().unwrap_or_default().par_chunks_exact(dims.1.max(1));
        let rows = sweep.rows.par_iter_mut().zip(changes);
        rows.for_each(|(row, change)| axpy(share, change, &mut row.weights));
        Ok(())
    }
}

/// Rows and columns of a matrix in another order.
fn gathered(matrix: &Array2<f32>, rows: &[u32], columns: &[u32]) -> Array2<f32> {
    let mut result = Array2::zeros((rows.len(), columns.len()));
    values(&mut result).par_chunks_exact_mut(columns.len().max(1)).zip(rows).for_each(|(out, row)| {
        let row = matrix.row(*row as usize);
        out.iter_mut().zip(columns).for_each(|(out, column)| *out = row[*column as usize]);
    });
    result
}
