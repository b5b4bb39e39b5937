//! What is summed up over the tokens that reach a stage: all that solving knows of them.

use gptq_kernels::{Backend, Wanted};

use crate::Result;
use crate::recipe::Target;

/// Sums over tokens, by input feature; x is what the quantized stages before make, x_f the same in the unquantized model.
/// What the target wants is known by the inputs ([`Self::shift`]), or by the outputs ([`Self::outputs`]), which is a smaller
/// sum where a stage has more inputs than outputs.
pub struct Moments<B: Backend> {
    /// `H = sum x x^T`, `[in, in]`
    pub hessian: B::Matrix,
    /// `C = sum (x_f - x) x^T`, `[in, in]`
    pub shift: Option<B::Matrix>,
    /// `S = sum (W x_f + h_f - h) x^T`, `[out, in]`: h is the hidden state that the stage's output is added to.
    pub outputs: Option<B::Matrix>,
}

/// What some tokens bring to a stage.
pub struct Reaching<'a, T> {
    /// `[tokens, in]`
    pub input: &'a T,
    /// `[tokens, hidden]`, where a residual target asks for it: before the stage, and in the unquantized model behind it.
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
        Self { solving: Moments { hessian, shift: None, outputs: None }, held_out: None }
    }
}

impl<B: Backend> Moments<B> {
    /// Of no token yet. `dims` are `(out, in)` of a stage; the outputs of one that `ends_block` are added to the residual
    /// stream.
    pub fn new(backend: &B, dims: (usize, usize), ends_block: bool, target: Target) -> Result<Self> {
        let (rows, size) = dims;
        let by_outputs = target == Target::Residual && ends_block;
        let by_inputs = target != Target::None && !by_outputs;
        Ok(Self {
            hessian: backend.hessian(size)?,
            shift: by_inputs.then(|| backend.products(size, size)).transpose()?,
            outputs: by_outputs.then(|| backend.products(rows, size)).transpose()?,
        })
    }

    /// Adds the tokens of a chunk, as the quantized stages before make them and as the unquantized model has them. `bias` is
    /// a table `[1, out]` of the stage's own, if it has one: both models add it, so that it is no difference.
    pub fn add(
        &mut self,
        backend: &B,
        quantized: &Reaching<B::Tensor>,
        original: Option<&Reaching<B::Tensor>>,
        bias: Option<&B::Weight>,
    ) -> Result<()> {
        let x = quantized.input;
        backend.accumulate(&mut self.hessian, x)?;
        let Some(original) = original else { return Ok(()) };
        if let Some(shift) = &mut self.shift {
            backend.accumulate_products(shift, &backend.difference(original.input, x)?, x)?;
        }
        if let (Some(outputs), Some(behind), Some(before)) =
            (&mut self.outputs, original.hidden, quantized.hidden)
        {
            let mut wanted = backend.difference(behind, before)?;
            if let Some(bias) = bias {
                let tokens = backend.shape(&wanted).0;
                wanted = backend.difference(&wanted, &backend.embedding(bias, &vec![0; tokens])?)?;
            }
            backend.accumulate_products(outputs, &wanted, x)?;
        }
        Ok(())
    }

    /// How outputs would have to change, for weights in the order of a sweep; `None` where the target is the weights
    /// themselves.
    pub fn pull(&self, backend: &B, weights: &B::Matrix, order: &[u32]) -> Result<Option<B::Matrix>> {
        let wanted = match (&self.shift, &self.outputs) {
            (_, Some(outputs)) => Wanted::Outputs(outputs, &self.hessian),
            (Some(shift), None) => Wanted::OfInputs(shift),
            (None, None) => return Ok(None),
        };
        Ok(Some(backend.sweep_pull(weights, order, wanted)?))
    }
}
