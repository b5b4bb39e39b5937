//! The table of contents: every operation a backend must have, checked by the compiler.

use crate::{
    Add, Attention, Embedding, GptqSweep, Hessian, InverseCholesky, MatMul, QuantMatMul, RmsNorm, Rope,
    Sample, SiluMul, TokenLoss, TopLogits,
};

/// A device that can run a model, measure it and quantize it.
pub trait Backend:
    Embedding
    + RmsNorm
    + Rope
    + Attention
    + Add
    + SiluMul
    + MatMul
    + QuantMatMul
    + TokenLoss
    + TopLogits
    + Sample
    + Hessian
    + InverseCholesky
    + GptqSweep
{
}

impl<T> Backend for T where
    T: Embedding
        + RmsNorm
        + Rope
        + Attention
        + Add
        + SiluMul
        + MatMul
        + QuantMatMul
        + TokenLoss
        + TopLogits
        + Sample
        + Hessian
        + InverseCholesky
        + GptqSweep
{
}
