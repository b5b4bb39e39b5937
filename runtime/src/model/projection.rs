//! The linears of one group as one matrix: they share their input, so they are stacked along `out`.

use gptq_kernels::packing::{PackedLinear, Scales};
use gptq_kernels::{Activation, Backend, Dtype, HostTensor, Norm};
use rayon::prelude::*;

use super::ModelFiles;
use crate::Result;
use crate::layout::{self, LinearGroup, LinearSpec};
use crate::quant_config::QuantConfig;
use crate::soundness::{Module, Stored, zeros_as_v2};

/// The weights of one group on a backend.
pub enum Projection<B: Backend> {
    Dense(B::Weight),
    Quantized(B::QuantWeight),
    /// Linears that cannot share a matrix, since groups or widths differ or some are dense: one product each, outputs side
    /// by side.
    Parts(Vec<Self>),
}

/// The weights of one group as they were read, dense or quantized as the files are.
pub enum HostProjection<'a> {
    /// Weights and biases.
    Dense(Vec<HostTensor<'a>>, Vec<HostTensor<'a>>),
    Quantized(PackedLinear<'a>),
    /// Each linear by itself.
    Parts(Vec<Self>),
}

impl<'a> HostProjection<'a> {
    /// Reads a group of layer `index`.
    pub fn read(files: &'a ModelFiles, index: usize, group: &LinearGroup) -> Result<Self> {
        let modules = group.linears.iter().map(|linear| files.module(index, linear.clone()));
        let modules = modules.collect::<Result<Vec<_>>>()?;
        if modules.iter().all(|module| module.quant.is_none()) {
            let (weights, biases) = dense_parts(files, index, &group.linears)?;
            return Ok(Self::Dense(weights, biases));
        }
        let read = |module: &Module| match &module.quant {
            Some(quant) => Ok(Self::Quantized(packed(files, quant, module)?)),
            None => {
                let (weight, bias) = dense_parts(files, index, std::slice::from_ref(&module.linear))?;
                Ok(Self::Dense(weight, bias))
            }
        };
        let parts = modules.par_iter().map(read).collect::<Result<Vec<_>>>()?;
        Ok(Self::stacked(parts))
    }

    /// As one matrix, where that can be.
    fn stacked(parts: Vec<Self>) -> Self {
        let mut packed = Vec::new();
        let mut others = Vec::new();
        for part in parts {
            match part {
                Self::Quantized(linear) if others.is_empty() => packed.push(linear),
                other => others.push(other),
            }
        }
        let separate = |packed: Vec<PackedLinear<'a>>| packed.into_iter().map(Self::Quantized);
        if !others.is_empty() {
            return Self::Parts(separate(packed).chain(others).collect());
        }
        match PackedLinear::stack(packed) {
            Ok(whole) => Self::Quantized(whole),
            Err(packed) => Self::Parts(separate(packed).collect()),
        }
    }
}

impl<B: Backend> Projection<B> {
    /// Gate and up for [`Self::normed_gate_up`] alone, whose result may come in the order in which the next linear wants its
    /// input.
    pub fn gated(backend: &B, read: &HostProjection, order: Option<&B::Order>) -> Result<Self> {
        match read {
            HostProjection::Quantized(whole) => Ok(Self::Quantized(backend.gated_weight(whole, order)?)),
            HostProjection::Dense(..) | HostProjection::Parts(_) => Self::new(backend, read),
        }
    }

    /// Puts what was read of a group on the device.
    pub fn new(backend: &B, read: &HostProjection) -> Result<Self> {
        Ok(match read {
            HostProjection::Dense(weights, biases) => Self::Dense(backend.weight(weights, biases)?),
            HostProjection::Quantized(whole) => Self::Quantized(backend.quant_weight(whole)?),
            HostProjection::Parts(parts) => {
                Self::Parts(parts.iter().map(|part| Self::new(backend, part)).collect::<Result<_>>()?)
            }
        })
    }

    /// The order in which the weight would best get its input.
    pub fn input_order(&self, backend: &B) -> Option<B::Order> {
        match self {
            Self::Quantized(weight) => backend.input_order(weight),
            Self::Dense(_) | Self::Parts(_) => None,
        }
    }

    /// `x` as the weight would best get it.
    pub fn ordered_input(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor> {
        match self {
            Self::Quantized(weight) => Ok(backend.ordered_input(x, weight)?),
            Self::Dense(_) | Self::Parts(_) => Ok(x.clone()),
        }
    }

    /// Names of the kernels that multiply so many rows.
    pub fn kernels(&self, backend: &B, rows: usize) -> Vec<&'static str> {
        match self {
            Self::Dense(weight) => vec![backend.matmul_kernel(weight, rows)],
            Self::Quantized(weight) => vec![backend.quant_matmul_kernel(weight, rows)],
            Self::Parts(parts) => parts.iter().flat_map(|part| part.kernels(backend, rows)).collect(),
        }
    }

    /// Whether products with it dequantize a weight first.
    pub fn is_dequantized(&self, backend: &B) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Quantized(weight) => backend.is_dequantized(weight),
            Self::Parts(parts) => parts.iter().any(|part| part.is_dequantized(backend)),
        }
    }

    /// `next` will be read after this one.
    pub fn read_next(&self, backend: &B, next: &Self) {
        if let (Self::Quantized(weight), Self::Quantized(next)) = (self, next) {
            backend.read_next(weight, next);
        }
    }

    /// `forward(rms_norm(x))`
    pub fn normed(&self, backend: &B, x: &B::Tensor, norm: Norm<B::Tensor>) -> Result<B::Tensor> {
        match self {
            Self::Quantized(weight) => Ok(backend.normed_quant_matmul(x, norm, weight)?),
            Self::Dense(_) | Self::Parts(_) => {
                self.forward(backend, &backend.rms_norm(x, norm.weight, norm.eps)?)
            }
        }
    }

    /// `gated(forward(rms_norm(x)))`, in the order that the next group wants.
    pub fn normed_gate_up(
        &self,
        backend: &B,
        x: &B::Tensor,
        norm: Norm<B::Tensor>,
        activation: Activation,
    ) -> Result<B::Tensor> {
        match self {
            Self::Quantized(weight) => Ok(backend.normed_gate_up(x, norm, weight, activation)?),
            Self::Dense(_) | Self::Parts(_) => {
                Ok(backend.gated(&self.normed(backend, x, norm)?, activation)?)
            }
        }
    }

    /// `residual + forward(x)`
    pub fn add_to(&self, backend: &B, x: &B::Tensor, residual: B::Tensor) -> Result<B::Tensor> {
        Ok(match self {
            Self::Quantized(weight) => backend.quant_matmul_add(x, weight, residual)?,
            Self::Dense(weight) => backend.matmul_add(x, weight, residual)?,
            Self::Parts(_) => backend.add(&residual, &self.forward(backend, x)?)?,
        })
    }

    /// `[tokens, in]` to `[tokens, out of all linears]`.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor> {
        Ok(match self {
            Self::Dense(weight) => backend.matmul(x, weight)?,
            Self::Quantized(weight) => backend.quant_matmul(x, weight)?,
            Self::Parts(parts) => {
                let products = parts.iter().map(|part| part.forward(backend, x));
                match &products.collect::<Result<Vec<_>>>()?[..] {
                    [whole] => whole.clone(),
                    outputs => backend.join_columns(outputs)?,
                }
            }
        })
    }
}

/// Weights and biases of dense linears, as they lie in the checkpoint.
pub fn dense_parts<'a>(
    files: &'a ModelFiles,
    index: usize,
    linears: &[LinearSpec],
) -> Result<(Vec<HostTensor<'a>>, Vec<HostTensor<'a>>)> {
    let name = |linear: &LinearSpec, tensor: &str| {
        format!("{}{}.{tensor}", layout::layer_prefix(index), linear.module)
    };
    let weight =
        |l: &LinearSpec| files.checkpoint.tensor(&name(l, "weight"), &[l.out_features, l.in_features]);
    let bias = |l: &LinearSpec| files.checkpoint.tensor(&name(l, "bias"), &[l.out_features]);
    let weights = linears.iter().map(weight).collect::<Result<_>>()?;
    let biases = linears.iter().filter(|l| l.bias).map(bias).collect::<Result<_>>()?;
    Ok((weights, biases))
}

/// One linear of an artifact: v1 or v2, with or without `g_idx` and bias.
fn packed<'a>(files: &'a ModelFiles, quant: &QuantConfig, module: &Module) -> Result<PackedLinear<'a>> {
    let (k, n, bits) = (module.linear.in_features, module.linear.out_features, quant.bits as usize);
    let group_size = quant.group_size.unwrap_or(k).min(k);
    let groups = k.div_ceil(group_size);
    let name = |tensor: &str| format!("{}.{tensor}", module.name);
    let zeros = files.checkpoint.words(&name("qzeros"), &[groups, n * bits / 32])?.into_owned();
    let bias = match files.checkpoint.contains(&name("bias")) {
        true => Some(files.checkpoint.tensor(&name("bias"), &[n])?.to_f32())
            .filter(|b| b.iter().any(|x| *x != 0.0)),
        false => None,
    };
    Ok(PackedLinear {
        bits: quant.bits,
        in_features: k,
        out_features: n,
        qweight: vec![files.checkpoint.words(&name("qweight"), &[k * bits / 32, n])?],
        qzeros: zeros_as_v2(zeros, quant, n),
        scales: scales(&files.checkpoint.tensor(&name("scales"), &[groups, n])?),
        g_idx: Stored::read(&files.checkpoint, module, quant)?.groups(k, group_size),
        zero_offset: 0,
        bias,
    })
}

/// Scales with the values that the file gives them.
fn scales(stored: &HostTensor) -> Scales {
    match stored.dtype {
        Dtype::F16 => Scales::F16(stored.to_f16()),
        Dtype::BF16 | Dtype::F32 => Scales::exact(stored.to_f32()),
    }
}
