use cudarc::driver::CudaSlice;

use super::fragments::{Around, DEQUANTIZED, Fragments, GATES, Gates};
use super::{QuantMatMul, check};
use crate::cuda::{Args, Cuda, CudaOrder, CudaTensor, Launch};
use crate::ops::matmul::cuda::CudaWeight;
use crate::packing::{PackedLinear, Scales};
use crate::{Activation, Add, Device, Error, Gated, MatMul, Norm, Result, RmsNorm};

pub(crate) const SOURCE: &str = include_str!("quant_matmul.cu");

/// Features that one block of the dequantizing kernel takes.
const TILE: usize = 32;

/// The file's tensors on the GPU.
pub(crate) struct StoredWeight {
    pub qweight: CudaSlice<u32>,
    pub qzeros: CudaSlice<u32>,
    /// f16; f32 where a scale is not exactly an f16.
    pub scales: CudaSlice<u8>,
    pub wide_scales: bool,
    pub g_idx: CudaSlice<u32>,
    pub bits: u32,
    pub zero_offset: u8,
    /// `(out, in)`
    pub dims: (usize, usize),
    pub bias: Option<Vec<f32>>,
}

/// A quantized weight on the GPU.
pub struct CudaQuantWeight {
    form: Form,
    /// In which a product with gates comes.
    result: Option<CudaOrder>,
}

enum Form {
    /// For few rows at the speed of memory.
    Fragments(Fragments),
    /// Any other: odd shapes and groups, f32, scales that f16 does not hold. Dequantized for every product.
    Stored(StoredWeight),
}

impl QuantMatMul for Cuda {
    type QuantWeight = CudaQuantWeight;

    fn quant_weight(&self, packed: &PackedLinear) -> Result<CudaQuantWeight> {
        self.repacked(packed, None)
    }

    fn gated_weight(&self, packed: &PackedLinear, order: Option<&CudaOrder>) -> Result<CudaQuantWeight> {
        self.repacked(packed, Some(Gates { order }))
    }

    fn quant_matmul_kernel(&self, weight: &CudaQuantWeight, rows: usize) -> &'static str {
        match &weight.form {
            Form::Fragments(fragments) => fragments.kernel_name(rows),
            Form::Stored(_) => DEQUANTIZED,
        }
    }

    fn is_dequantized(&self, weight: &CudaQuantWeight) -> bool {
        matches!(weight.form, Form::Stored(_))
    }

    fn input_order(&self, weight: &CudaQuantWeight) -> Option<CudaOrder> {
        match &weight.form {
            Form::Fragments(fragments) => fragments.order.clone(),
            Form::Stored(_) => None,
        }
    }

    fn ordered_input(&self, x: &CudaTensor, weight: &CudaQuantWeight) -> Result<CudaTensor> {
        self.in_order(x, self.input_order(weight).as_ref())
    }

    fn read_next(&self, weight: &CudaQuantWeight, next: &CudaQuantWeight) {
        if let (Form::Fragments(weight), Form::Fragments(next)) = (&weight.form, &next.form) {
            // What was said first stays true.
            let _ = weight.next.set(next.codes.clone());
        }
    }

    fn quant_matmul(&self, x: &CudaTensor, weight: &CudaQuantWeight) -> Result<CudaTensor> {
        match &weight.form {
            Form::Fragments(fragments) if fragments.gated => {
                Err(Error::shape("quant_matmul", "a weight without gates", "gates"))
            }
            Form::Fragments(fragments) => fragments.product(self, x, Around::default()),
            Form::Stored(stored) => {
                check(self.shape(x), stored.dims.1)?;
                self.matmul(x, &self.dequantize(stored)?)
            }
        }
    }

    fn quant_matmul_add(
        &self,
        x: &CudaTensor,
        weight: &CudaQuantWeight,
        residual: CudaTensor,
    ) -> Result<CudaTensor> {
        match &weight.form {
            Form::Fragments(fragments) if !fragments.gated => fragments.product_added(self, x, residual),
            Form::Fragments(_) => self.add(&residual, &self.quant_matmul(x, weight)?),
            Form::Stored(stored) => {
                check(self.shape(x), stored.dims.1)?;
                self.matmul_add(x, &self.dequantize(stored)?, residual)
            }
        }
    }

    fn normed_quant_matmul(
        &self,
        x: &CudaTensor,
        norm: Norm<CudaTensor>,
        weight: &CudaQuantWeight,
    ) -> Result<CudaTensor> {
        match &weight.form {
            Form::Fragments(fragments) if !fragments.gated => {
                fragments.product(self, x, Around { norm: Some(norm), ..Around::default() })
            }
            _ => self.quant_matmul(&self.rms_norm(x, norm.weight, norm.eps)?, weight),
        }
    }

    fn normed_gate_up(
        &self,
        x: &CudaTensor,
        norm: Norm<CudaTensor>,
        weight: &CudaQuantWeight,
        activation: Activation,
    ) -> Result<CudaTensor> {
        let order = weight.result.as_ref();
        match &weight.form {
            // The products' own kernels have no exact form of GELU.
            Form::Fragments(fragments) if fragments.gated && activation == Activation::Gelu => {
                let y = fragments.product(self, x, Around { norm: Some(norm), ..Around::default() })?;
                self.gated_in_order(&y, GATES, activation, order)
            }
            Form::Fragments(fragments) if fragments.gated => {
                let activation = Some(activation);
                fragments.product(
                    self,
                    x,
                    Around { norm: Some(norm), activation, order, ..Around::default() },
                )
            }
            _ => {
                let y = self.gated(&self.normed_quant_matmul(x, norm, weight)?, activation)?;
                self.in_order(&y, order)
            }
        }
    }

    fn dense_weight(&self, packed: &PackedLinear) -> Result<CudaWeight> {
        self.dequantize(&self.stored_weight(packed)?)
    }
}

impl Cuda {
    fn repacked(&self, packed: &PackedLinear, gates: Option<Gates>) -> Result<CudaQuantWeight> {
        let stored = self.stored_weight(packed)?;
        let form = match Fragments::new(self, packed, &stored, gates)? {
            Some(fragments) => Form::Fragments(fragments),
            None => Form::Stored(stored),
        };
        Ok(CudaQuantWeight { form, result: gates.and_then(|gates| gates.order).cloned() })
    }

    fn stored_weight(&self, packed: &PackedLinear) -> Result<StoredWeight> {
        packed.check()?;
        Ok(StoredWeight {
            qweight: self.upload_parts(&packed.qweight_pieces().collect::<Vec<_>>())?,
            qzeros: self.upload_parts(&[&packed.qzeros])?,
            scales: self.upload_parts(&[packed.scales.bytes()])?,
            wide_scales: matches!(packed.scales, Scales::F32(_)),
            g_idx: self.upload(&packed.g_idx)?,
            bits: packed.bits,
            zero_offset: packed.zero_offset,
            dims: (packed.out_features, packed.in_features),
            bias: packed.bias.clone(),
        })
    }

    pub(crate) fn dequantize(&self, weight: &StoredWeight) -> Result<CudaWeight> {
        let (n, k) = weight.dims;
        let values = self.alloc::<u8>(n * k * self.dtype().size())?;
        let args =
            Args::new([self.address(&values), self.address(&weight.qweight), self.address(&weight.qzeros)])
                .addresses([self.address(&weight.scales), self.address(&weight.g_idx)])
                .ints([k, n, weight.bits as usize, weight.zero_offset as usize])
                .ints([usize::from(weight.wide_scales)]);
        self.launch("dequantize", Launch::grid(n.div_ceil(256), k.div_ceil(TILE), 1, 256), &args)?;
        let bias = weight.bias.clone().map(|bias| self.tensor(bias, (1, n))).transpose()?;
        Ok(CudaWeight::new(values.into(), (n, k), true, bias))
    }
}
