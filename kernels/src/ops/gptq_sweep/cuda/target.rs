//! Weights as they were, and the target of a sweep that makes up for errors in its input.

use std::ops::Range;

use super::{CudaSource, CudaSweep};
use crate::cuda::{Args, Cuda, Launch, Operand};
use crate::error::expect;
use crate::ops::gptq_sweep::{SweepTarget, Wanted, check_wanted};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::ops::matmul::cuda::CudaWeight;
use crate::{Device, Result};

/// Columns of one panel of a product with a triangle.
const PANEL: usize = 1024;

impl SweepTarget for Cuda {
    fn source_weight(&self, source: &CudaSource, bias: Option<Vec<f32>>) -> Result<CudaWeight> {
        let k = source.in_features;
        let rows: usize = source.parts.iter().map(|part| part.rows).sum();
        let size = self.dtype().size();
        let values = self.alloc::<u8>(rows * k * size)?;
        let mut target = self.address(&values);
        for part in &source.parts {
            let count = part.rows * k;
            let args =
                Args::new([target, self.arrived(&part.bytes)?]).long(count).ints([part.dtype as usize]);
            self.launch("sweep_store", Launch::threads(count), &args)?;
            target += (count * size) as u64;
        }
        let bias = bias.map(|bias| self.tensor(bias, (1, rows))).transpose()?;
        Ok(CudaWeight::new(values.into(), (rows, k), false, bias))
    }

    fn sweep_weights(&self, sweep: &CudaSweep) -> Result<CudaMatrix> {
        Ok(CudaMatrix { values: self.copied(&sweep.weights)?, dims: sweep.dims() })
    }

    fn sweep_pull(
        &self,
        weights: &CudaMatrix,
        order: &[u32],
        wanted: Wanted<&CudaMatrix>,
    ) -> Result<CudaMatrix> {
        let (rows, k) = weights.dims;
        check_wanted((weights.dims, order), wanted, |matrix| matrix.dims)?;
        let places = self.upload(order)?;
        let places = self.address(&places);
        let (values, factors, by) = match wanted {
            Wanted::OfInputs(shift) => {
                (self.alloc(rows * k)?, (1.0, 0.0), self.taken(shift, places, places, (k, k))?)
            }
            Wanted::Outputs(outputs, hessian) => {
                let values = self.taken(outputs, 0, places, weights.dims)?;
                (values, (-1.0, 1.0), self.damped_by(hessian, order, (0.0, 0.0))?.values)
            }
        };
        let wide = |slice| Operand::wide(self.address(slice), k);
        self.gemm_wide((k, rows, k), factors, [wide(&by), wide(&weights.values), wide(&values)])?;
        Ok(CudaMatrix { values, dims: weights.dims })
    }

    fn sweep_toward(
        &self,
        sweep: &mut CudaSweep,
        pull: &CudaMatrix,
        factor: &CudaMatrix,
        share: f32,
    ) -> Result<()> {
        let (rows, k) = sweep.dims();
        expect("sweep_toward", ((rows, k), (k, k)), (pull.dims, factor.dims))?;
        let half = self.alloc::<f32>(rows * k)?;
        let (p, w) = (self.address(&pull.values), self.address(&sweep.weights));
        let (u, half) = (self.address(&factor.values), self.address(&half));
        let at =
            |matrix: u64, row: usize, column: usize| Operand::wide(matrix + 4 * (row * k + column) as u64, k);
        // Of U only what is not zero: columns of P U^T take those of P from theirs on, and columns of the second product rows
        // of U up to theirs.
        let panels = || (0..k).step_by(PANEL).map(|start| start..(start + PANEL).min(k));
        for Range { start, end } in panels() {
            let sizes = (end - start, rows, k - start);
            let u = at(u, start, start).transposed();
            self.gemm_wide(sizes, (1.0, 0.0), [u, at(p, 0, start), at(half, 0, start)])?;
        }
        for Range { start, end } in panels() {
            let sizes = (end - start, rows, end);
            self.gemm_wide(sizes, (share, 1.0), [at(u, 0, start), at(half, 0, 0), at(w, 0, start)])?;
        }
        Ok(())
    }
}
