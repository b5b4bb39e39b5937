//! The operations of GPTQ and of Llama-family models, one folder an op, behind one [`Backend`] trait.
//!
//! ```
//! use gptq_kernels::{Cpu, Device, RmsNorm};
//!
//! let cpu = Cpu::new();
//! let x = cpu.tensor(vec![3.0, 4.0], (1, 2))?;
//! let weight = cpu.tensor(vec![1.0, 1.0], (1, 2))?;
//! let y = cpu.to_vec(&cpu.rms_norm(&x, &weight, 0.0)?)?;
//! assert!((y[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
//! # Ok::<(), gptq_kernels::Error>(())
//! ```

// Calls into CUDA, and vectors of the processor at hand.
#![allow(unsafe_code)]

mod backend;
mod batch;
mod cpu;
mod cuda;
mod device;
mod error;
mod host;
mod ops;
pub mod packing;
#[cfg(test)]
mod testing;

pub use backend::Backend;
pub use batch::{Batch, KV_BLOCK_ROWS, SequenceRows};
pub use cpu::{Cpu, ReadMemory};
pub use cuda::Cuda;
pub use device::{Device, Memory};
pub use error::{Error, Result};
pub use host::{Dtype, HostTensor};
pub use ops::add::Add;
pub use ops::attention::{Attention, AttentionShape, KvDtype, KvShape};
pub use ops::embedding::Embedding;
pub use ops::experts::{Experts, HostExpert, Route, RouterScores, Routing};
pub use ops::gated::{Activation, Gated};
pub use ops::gptq_sweep::{
    GptqSweep, GridKind, GridSpec, Grouping, LOOP_WINDOW, Quantized, SweepRefine, SweepTarget, Wanted,
};
pub use ops::hessian::Hessian;
pub use ops::inverse_cholesky::InverseCholesky;
pub use ops::matmul::MatMul;
pub use ops::quant_matmul::QuantMatMul;
pub use ops::rms_norm::{Norm, RmsNorm};
pub use ops::rope::{Pairing, QkNorm, QueryGrowth, Rope, RopeShape};
pub use ops::sample::{Change, RowSampling, Sample, SampledToken};
pub use ops::scale::Scale;
pub use ops::token_loss::{Divergence, TokenLoss};
pub use ops::top_logits::{Likeliest, MOST_CANDIDATES, TopLogits, largest};
