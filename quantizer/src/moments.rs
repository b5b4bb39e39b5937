//! What is summed up over the tokens that reach a stage: all that solving knows of them.

use gptq_kernels::Backend;

use crate::Result;
use crate::recipe::Target;

/// Sums over tokens, by input feature; x is what the quantized stages before make.
pub struct Moments<B: Backend> {
    /// `H = sum x x^T`, `[in, in]`
    pub hessian: B::Matrix,
    /// `C = sum (x_f - x) x^T`, `[in, in]`: x_f is the input in the unquantized model.
    pub shift: Option<B::Matrix>,
    /// `R = sum (h_f - h) x^T`, `[out, in]`: h is the hidden state that the stage's output is added to.
    pub residual: Option<B::Matrix>,
}

/// What some tokens bring to a stage.
pub struct Reaching<'a, T> {
    /// `[tokens, in]`
    pub input: &'a T,
    /// `[tokens, hidden]`, where a residual target asks for it.
    pub hidden: Option<&'a T>,
}

/// The moments that a stage is solved with, and those of tokens that were kept out to judge by.
pub struct Evidence<B: Backend> {
    pub solving: Moments<B>,
    pub held_out: Option<Moments<B>>,
}

impl<B: Backend> Evidence<B> {
    /// A Hessian alone, of all tokens.
    pub fn of(hessian: B::Matrix) -> Self {
        Self { solving: Moments { hessian, shift: None, residual: None }, held_out: None }
    }
}

impl<B: Backend> Moments<B> {
    /// Of no token yet. `dims` are `(out, in)` of a stage; the outputs of one that `ends_block` are added to the residual
    /// stream.
    pub fn new(backend: &B, dims: (usize, usize), ends_block: bool, target: Target) -> Result<Self> {
        let (rows, size) = dims;
        let shifted = target != Target::None;
        let residual = target == Target::Residual && ends_block;
        Ok(Self {
            hessian: backend.hessian(size)?,
            shift: shifted.then(|| backend.products(size, size)).transpose()?,
            residual: residual.then(|| backend.products(rows, size)).transpose()?,
        })
    }

    /// Adds the tokens of a tile, as the quantized stages before make them and as the unquantized model has them.
    pub fn add(
        &mut self,
        backend: &B,
        quantized: &Reaching<B::Tensor>,
        original: Option<&Reaching<B::Tensor>>,
    ) -> Result<()> {
        let x = quantized.input;
        backend.accumulate(&mut self.hessian, x)?;
        let Some(original) = original else { return Ok(()) };
        if let Some(shift) = &mut self.shift {
            backend.accumulate_difference(shift, original.input, x, x)?;
        }
        if let (Some(residual), Some(of_original), Some(h)) =
            (&mut self.residual, original.hidden, quantized.hidden)
        {
            backend.accumulate_difference(residual, of_original, h, x)?;
        }
        Ok(())
    }

    /// `P = W C + R` for weights in the order of a sweep; `None` where the target is the weights themselves.
    pub fn pull(&self, backend: &B, weights: &B::Matrix, order: &[u32]) -> Result<Option<B::Matrix>> {
        let pull = |shift| backend.sweep_pull(weights, order, shift, self.residual.as_ref());
        Ok(self.shift.as_ref().map(pull).transpose()?)
    }
}
