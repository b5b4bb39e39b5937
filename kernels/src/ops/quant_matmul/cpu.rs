use candle_core::Tensor;

use super::{QuantMatMul, check};
use crate::cpu::{Isa, Panels, View};
use crate::ops::matmul::cpu::CpuWeight;
use crate::packing::PackedLinear;
use crate::{Cpu, Device, Result};

/// A quantized weight, repacked into panels.
pub struct CpuQuantWeight(Panels);

impl QuantMatMul for Cpu {
    type QuantWeight = CpuQuantWeight;

    fn quant_weight(&self, packed: &PackedLinear) -> Result<CpuQuantWeight> {
        Ok(CpuQuantWeight(Panels::pack(packed)?))
    }

    fn quant_matmul(&self, x: &Tensor, CpuQuantWeight(weight): &CpuQuantWeight) -> Result<Tensor> {
        let (n, k) = weight.dims();
        check(self.shape(x), k)?;
        let x = View::of(x)?;
        self.tensor(weight.product(&x, x.rows, Isa::best()), (x.rows, n))
    }

    fn quant_matmul_kernel(&self, CpuQuantWeight(weight): &CpuQuantWeight, rows: usize) -> &'static str {
        weight.kernel_name(rows, Isa::best())
    }

    fn dense_weight(&self, packed: &PackedLinear) -> Result<CpuWeight> {
        Ok(CpuWeight::quantized(Panels::pack(packed)?))
    }
}
