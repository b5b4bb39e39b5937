//! GPTQ (Frantar et al. 2022, arXiv 2210.17323, Algorithm 1), for one stage of linears that share an input.
//!
//! | paper | here |
//! | --- | --- |
//! | W, rows of it | `weights`: the stage's `[out_i, in]` matrices, stacked along `out` |
//! | H = 2 X X^T | `hessian`: `X X^T`; the factor only scales the loss, see [`loss`] |
//! | lambda | `damp_percent` x the mean of H's diagonal |
//! | Cholesky(H^-1)^T | `factor`: upper triangular U with `U^T U = (H + lambda I)^-1` |
//! | B | the blocks of `order::blocks`, at most 128 columns |
//! | Q, E | codes and errors inside [`gptq_kernels::GptqSweep::sweep_block`] |
//!
//! Rounding to nearest is the same sweep with H = I.

use std::time::Instant;

use gptq_kernels::{Backend, Device, GridSpec, HostTensor};
use gptq_runtime::quant_config::QuantConfig;

use crate::recipe::Recipe;
use crate::{Error, Result, order};

/// How a linear is solved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Gptq,
    /// Round to nearest, the baseline: needs no calibration.
    Rtn,
}

/// Everything that decides the codes of a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct GptqParams {
    /// What files say of it, with the recipe's order.
    pub quant: QuantConfig,
    pub method: Method,
    pub recipe: Recipe,
    /// Round scales to f16 as the file does; off only to compare with references that do not.
    pub f16_scales: bool,
}

/// The linears of one stage on their way to the device, stacked along `out`.
pub struct StageWeights<B: Backend> {
    source: B::Source,
    in_features: usize,
    bias: Option<Vec<f32>>,
}

/// A solved stage.
pub struct Solved<B: Backend> {
    /// All linears of the stage, stacked along `out`, on the device.
    pub packed: B::Packed,
    /// Of each output row, in the Hessian's own scale.
    pub losses: Vec<f32>,
    /// The damp that the factorization needed: the one asked for, or more.
    pub damp_percent: f64,
    /// Time for the factorization, for the sweep with its grids, and for packing.
    pub seconds: [f64; 3],
}

/// The damp from which the ladder starts where none was asked for, and where it ends.
const LADDER: std::ops::Range<f64> = 0.01..1.0;

/// Solves one stage. `hessian` is `None` for [`Method::Rtn`] alone.
/// Fails with [`Error::Damp`] where no damp below 1 makes the Hessian positive definite.
pub fn solve<B: Backend>(
    backend: &B,
    StageWeights { source, in_features, bias }: StageWeights<B>,
    hessian: Option<&B::Matrix>,
    params: &GptqParams,
) -> Result<Solved<B>> {
    let quant = &params.quant;
    let mut watch = Stopwatch::start();
    let diagonal = hessian.map_or(Ok(vec![1.0; in_features]), |h| backend.diagonal(h))?;
    let dead: Vec<u32> = (0..).zip(&diagonal).filter(|(_, h)| **h == 0.0).map(|(i, _)| i).collect();
    let grouping = order::grouping(&diagonal, quant.group_size, params.recipe.order);
    let (factor, damp_percent) = match hessian {
        Some(h) => {
            let (u, damp) = damped_factor(backend, h, &diagonal, &grouping.order, quant.damp_percent)?;
            (Some(u), damp)
        }
        None => (None, 0.0),
    };
    let factored = watch.lap(backend)?;
    let mut sweep = backend.sweep_start(&source, &dead, &grouping, &params.grid_spec())?;
    for block in order::blocks(&grouping) {
        backend.sweep_block(&mut sweep, factor.as_ref(), block)?;
    }
    let swept = watch.lap(backend)?;
    let (packed, losses) = backend.sweep_pack(sweep, quant.format.zero_offset(), bias)?;
    let seconds = [factored, swept, watch.lap(backend)?];
    Ok(Solved { packed, losses, damp_percent, seconds })
}

/// The factor at the damp asked for, or at the first doubling of it that works.
fn damped_factor<B: Backend>(
    backend: &B,
    hessian: &B::Matrix,
    diagonal: &[f32],
    order: &[u32],
    asked: f64,
) -> Result<(B::Matrix, f64)> {
    let mean = diagonal.iter().map(|h| *h as f64).sum::<f64>() / diagonal.len().max(1) as f64;
    if !mean.is_finite() {
        return Err(Error::NotFiniteActivations);
    }
    let mut damp = asked;
    loop {
        match backend.inverse_cholesky(hessian, order, (damp * mean) as f32) {
            Ok(factor) => return Ok((factor, damp)),
            Err(gptq_kernels::Error::NotPositiveDefinite { .. }) => {
                let next = (2.0 * damp).max(LADDER.start);
                if next >= LADDER.end {
                    return Err(Error::Damp { last: damp });
                }
                damp = next;
            }
            Err(other) => return Err(other.into()),
        }
    }
}

impl GptqParams {
    /// The order of columns is the recipe's, whatever `quant` says of it. Scales are stored in f16.
    pub fn new(quant: QuantConfig, method: Method, recipe: Recipe) -> Self {
        Self { quant: recipe.order.of(quant), method, recipe, f16_scales: true }
    }

    fn grid_spec(&self) -> GridSpec {
        GridSpec {
            bits: self.quant.bits,
            sym: self.quant.sym,
            kind: self.recipe.grid,
            min_zero: self.quant.format.zero_offset(),
            f16_scales: self.f16_scales,
        }
    }
}

impl<B: Backend> StageWeights<B> {
    /// Reads `[out_i, in]` weights and the biases of those that have one.
    pub fn read(backend: &B, weights: &[HostTensor], biases: &[HostTensor]) -> Result<Self> {
        let in_features = weights.first().map_or(Ok(0), |weight| weight.dims2().map(|dims| dims.1))?;
        let bias: Vec<f32> = biases.iter().flat_map(HostTensor::to_f32).collect();
        let source = backend.sweep_source(weights)?;
        Ok(Self { source, in_features, bias: (!bias.is_empty()).then_some(bias) })
    }
}

/// The loss of some rows as other tools report it, `sum ((w - q) / U_ii)^2 / 2` with H = 2 / sequences * X X^T.
pub fn loss(rows: &[f32], sequences: usize) -> f64 {
    let sum: f64 = rows.iter().map(|loss| *loss as f64).sum();
    sum * 2.0 / sequences.max(1) as f64
}

/// Times the device's work, not only the asking for it.
struct Stopwatch(Instant);

impl Stopwatch {
    fn start() -> Self {
        Self(Instant::now())
    }

    /// Seconds since the last lap, once the device is done.
    fn lap(&mut self, device: &impl Device) -> Result<f64> {
        device.synchronize()?;
        Ok(std::mem::replace(&mut self.0, Instant::now()).elapsed().as_secs_f64())
    }
}
