//! One folder an operation: `mod.rs` declares it (formula, shapes, checks, tests), one file a backend.

pub mod add;
pub mod attention;
pub mod embedding;
pub mod experts;
pub mod gated;
pub mod gptq_sweep;
pub mod hessian;
pub mod inverse_cholesky;
pub mod matmul;
pub mod quant_matmul;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod scale;
pub mod token_loss;
pub mod top_logits;
