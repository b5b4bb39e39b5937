//! What is summed up over the tokens that reach a stage: all that solving knows of them.

use gptq_kernels::Backend;

use crate::Result;
use crate::recipe::Target;

/// Sums over tokens, by input feature; x is what the quantized stages before make, x_f the same in the unquantized model.
/// What pulls towards the target is known by the inputs alone ([`Self::shift`]), or by what they make
/// ([`Self::residual`]), which is a smaller sum where a stage has more inputs than outputs.
pub struct Moments<B: Backend> {
    /// `H = sum x x^T`, `[in, in]`
    pub hessian: B::Matrix,
    /// `C = sum (x_f - x) x^T`, `[in, in]`
    pub shift: Option<B::Matrix>,
    /// `R = sum (W (x_f - x) + h_f - h) x^T`, `[out, in]`: h is the hidden state that the stage's output is added to.
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
        let residual = target == Target::Residual && ends_block;
        let shifted = target != Target::None && !residual;
        Ok(Self {
            hessian: backend.hessian(size)?,
            shift: shifted.then(|| backend.products(size, size)).transpose()?,
            residual: residual.then(|| backend.products(rows, size)).transpose()?,
        })
    }

    /// Adds the tokens of a chunk, as the quantized stages before make them and as the unquantized model has them. `weights`
    /// are the stage's own, without biases, where a residual target asks for them.
    pub fn add(
        &mut self,
        backend: &B,
        quantized: &Reaching<B::Tensor>,
        original: Option<&Reaching<B::Tensor>>,
        weights: Option<&B::Weight>,
    ) -> Result<()> {
        let x = quantized.input;
        backend.accumulate(&mut self.hessian, x)?;
        let Some(original) = original else { return Ok(()) };
        if let Some(shift) = &mut self.shift {
            backend.accumulate_products(shift, &backend.difference(original.input, x)?, x)?;
        }
        if let (Some(residual), Some(h_f), Some(h), Some(weights)) =
            (&mut self.residual, original.hidden, quantized.hidden, weights)
        {
            let made = backend.matmul(&backend.difference(original.input, x)?, weights)?;
            let missing = backend.add(&made, &backend.difference(h_f, h)?)?;
            backend.accumulate_products(residual, &missing, x)?;
        }
        Ok(())
    }

    /// `P = W C + R` for weights in the order of a sweep; `None` where the target is the weights themselves.
    pub fn pull(&self, backend: &B, weights: &B::Matrix, order: &[u32]) -> Result<Option<B::Matrix>> {
        let (shift, residual) = (self.shift.as_ref(), self.residual.as_ref());
        let any = shift.is_some() || residual.is_some();
        Ok(any.then(|| backend.sweep_pull(weights, order, shift, residual)).transpose()?)
    }
}
