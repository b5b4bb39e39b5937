//! Weights as they were, and the target of a sweep that makes up for errors in its input.

use super::{CudaSource, CudaSweep};
use crate::cuda::{Arg, Cuda, Launch, Operand};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::ops::matmul::cuda::CudaWeight;
use crate::{Device, Error, Result};

impl Cuda {
    pub(super) fn stored_values(&self, source: &CudaSource, bias: Option<Vec<f32>>) -> Result<CudaWeight> {
        let k = source.in_features;
        let rows: usize = source.parts.iter().map(|part| part.rows).sum();
        let size = self.dtype().size();
        let values = self.alloc::<u8>(rows * k * size)?;
        let mut target = self.address(&values);
        for part in &source.parts {
            let count = part.rows * k;
            let args = [
                Arg::Address(target),
                Arg::Address(self.arrived(&part.bytes)?),
                Arg::Long(count as u64),
                Arg::Int(part.dtype as i32),
            ];
            self.launch("sweep_store", Launch::threads(count), &args)?;
            target += (count * size) as u64;
        }
        let bias = bias.map(|bias| self.tensor(bias, (1, rows))).transpose()?;
        Ok(CudaWeight::new(values.into(), (rows, k), false, bias))
    }

    /// `W C + R` in sweep order.
    pub(super) fn pull(
        &self,
        weights: &CudaMatrix,
        order: &[u32],
        shift: &CudaMatrix,
        residual: Option<&CudaMatrix>,
    ) -> Result<CudaMatrix> {
        let (rows, k) = weights.dims;
        let fits = order.len() == k
            && shift.dims == (k, k)
            && residual.is_none_or(|residual| residual.dims == weights.dims);
        if !fits {
            let got = (order.len(), shift.dims, residual.map(|residual| residual.dims));
            return Err(Error::shape("sweep_pull", (k, (k, k), weights.dims), got));
        }
        let order = self.upload(order)?;
        let order = self.address(&order);
        let values = match residual {
            Some(residual) => self.taken(residual, 0, order, weights.dims)?,
            None => self.zeros(rows * k)?,
        };
        let shift = self.taken(shift, order, order, (k, k))?;
        let (c, w) =
            (Operand::wide(self.address(&shift), k), Operand::wide(self.address(&weights.values), k));
        self.gemm((k, rows, k), (1.0, 1.0), c, w, Operand::wide(self.address(&values), k))?;
        Ok(CudaMatrix { values, dims: weights.dims })
    }

    /// `W += (P U^T) U`
    pub(super) fn move_toward(
        &self,
        sweep: &mut CudaSweep,
        pull: &CudaMatrix,
        factor: &CudaMatrix,
    ) -> Result<()> {
        let (rows, k) = sweep.dims();
        if pull.dims != (rows, k) || factor.dims != (k, k) {
            return Err(Error::shape("sweep_toward", ((rows, k), (k, k)), (pull.dims, factor.dims)));
        }
        let half = self.alloc::<f32>(rows * k)?;
        let wide = |address: u64| Operand::wide(address, k);
        let (u, half) = (wide(self.address(&factor.values)), wide(self.address(&half)));
        self.gemm((k, rows, k), (1.0, 0.0), u.transposed(), wide(self.address(&pull.values)), half)?;
        self.gemm((k, rows, k), (1.0, 1.0), u, half, wide(self.address(&sweep.weights)))
    }
}
