use cudarc::driver::CudaSlice;

use super::{QuantMatMul, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::ops::matmul::cuda::CudaWeight;
use crate::packing::PackedLinear;
use crate::{Device, MatMul, Result};

pub(crate) const SOURCE: &str = include_str!("quant_matmul.cu");

/// Features that one block of the dequantizing kernel takes.
const TILE: usize = 32;

/// The file's tensors on the card.
pub struct CudaQuantWeight {
    qweight: CudaSlice<u32>,
    qzeros: CudaSlice<u32>,
    scales: CudaSlice<u16>,
    g_idx: CudaSlice<u32>,
    bits: u32,
    zero_offset: u8,
    /// `(out, in)`
    dims: (usize, usize),
    bias: Option<Vec<f32>>,
}

impl QuantMatMul for Cuda {
    type QuantWeight = CudaQuantWeight;

    fn quant_weight(&self, packed: &PackedLinear) -> Result<CudaQuantWeight> {
        packed.check()?;
        Ok(CudaQuantWeight {
            qweight: self.upload(&packed.qweight)?,
            qzeros: self.upload(&packed.qzeros)?,
            scales: self.upload(bytemuck::cast_slice(&packed.scales))?,
            g_idx: self.upload(&packed.g_idx)?,
            bits: packed.bits,
            zero_offset: packed.zero_offset,
            dims: (packed.out_features, packed.in_features),
            bias: packed.bias.clone(),
        })
    }

    fn quant_matmul(&self, x: &CudaTensor, weight: &CudaQuantWeight) -> Result<CudaTensor> {
        check(self.shape(x), weight.dims.1)?;
        self.matmul(x, &self.dequantize(weight)?)
    }

    fn dense_weight(&self, packed: &PackedLinear) -> Result<CudaWeight> {
        self.dequantize(&self.quant_weight(packed)?)
    }
}

impl Cuda {
    fn dequantize(&self, weight: &CudaQuantWeight) -> Result<CudaWeight> {
        let (n, k) = weight.dims;
        let values = self.alloc::<u16>(n * k)?;
        let args = [
            Arg::Address(self.address(&values)),
            Arg::Address(self.address(&weight.qweight)),
            Arg::Address(self.address(&weight.qzeros)),
            Arg::Address(self.address(&weight.scales)),
            Arg::Address(self.address(&weight.g_idx)),
            Arg::Int(k as i32),
            Arg::Int(n as i32),
            Arg::Int(weight.bits as i32),
            Arg::Int(weight.zero_offset as i32),
        ];
        self.launch("dequantize", Launch::grid(n.div_ceil(256), k.div_ceil(TILE), 1, 256), &args)?;
        let bias = weight.bias.clone().map(|bias| self.tensor(bias, (1, n))).transpose()?;
        Ok(CudaWeight::new(values, (n, k), true, bias))
    }
}
