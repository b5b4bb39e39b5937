//! The table of contents: every operation a backend must have, checked by the compiler.

use crate::{
    Add, Attention, Cpu, Cuda, Embedding, Experts, Gated, GptqSweep, Hessian, InverseCholesky, MatMul,
    QuantMatMul, RmsNorm, Rope, Sample, Scale, SweepRefine, SweepTarget, TokenLoss, TopLogits,
};

/// A device that can run a model, measure it and quantize it.
pub trait Backend:
    Embedding
    + RmsNorm
    + Rope
    + Attention
    + Add
    + Scale
    + Gated
    + MatMul
    + QuantMatMul
    + Experts
    + TokenLoss
    + TopLogits
    + Sample
    + Hessian
    + InverseCholesky
    + GptqSweep
    + SweepTarget
    + SweepRefine
{
}

impl Backend for Cpu {}

impl Backend for Cuda {}
