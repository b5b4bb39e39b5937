//! GPTQ (Frantar et al. 2022, arXiv 2210.17323, Algorithm 1), for one stage of linears that share an input.
//!
//! | paper | here |
//! | --- | --- |
//! | W, rows of it | `weights`: the stage's `[out_i, in]` matrices, stacked along `out` |
//! | H = 2 X X^T | [`crate::moments::Moments::hessian`]: `X X^T`; the factor only scales the loss, see [`loss`] |
//! | lambda | `damp_percent` x the mean of H's diagonal |
//! | Cholesky(H^-1)^T | `factor`: upper triangular U with `U^T U = (H + lambda I)^-1` |
//! | B | the blocks of `order::blocks`, at most 128 columns |
//! | Q, E | codes and errors inside [`gptq_kernels::GptqSweep::sweep_block`] |
//!
//! Rounding to nearest is the same sweep with H = I.
//!
//! Around the sweep, where the [`Recipe`] has them (with C and R of [`crate::moments::Moments`]):
//!
//! - the target `W* = W + (W C + R) (H + lambda I)^-1`, whose outputs are nearest to those of the unquantized model
//!   (Qronos 2505.11695, GPTAQ 2504.02692, LoaQ 2509.06297): W goes four fifths of the way there;
//! - coordinate descent on the codes and a refit of the scales lower `(W* - Q) (H + lambda I) (W* - Q)^T` further.
//!
//! Both are kept for those linears alone for which tokens say so that were held out, see [`crate::guard`].

use std::time::Instant;

use gptq_kernels::{Backend, Device, GridSpec, HostTensor};
use gptq_runtime::quant_config::QuantConfig;

use crate::guard::{Judge, Verdict};
use crate::moments::Evidence;
use crate::recipe::{Recipe, Target};
use crate::sequential::{Layout, Phases};
use crate::spread::Spread;
use crate::{Error, Result, order};

/// How a linear is solved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Gptq,
    /// Round to nearest, the baseline: needs no calibration.
    Rtn,
}

/// How much of the way to its target a weight goes. What few tokens say of the target is partly noise: on held-out text all of
/// the way leaves some percent more divergence (docs/quality.md).
const TARGET_SHARE: f32 = 0.8;

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
    /// Output features of each.
    outputs: Vec<usize>,
    bias: Option<Vec<f32>>,
}

/// A solved stage.
pub struct Solved<B: Backend> {
    /// All linears of the stage, stacked along `out`, on the device.
    pub packed: B::Packed,
    /// Of each output row as the sweep left it, in the Hessian's own scale.
    pub losses: Vec<f32>,
    /// The damp that the factorization needed: the one asked for, or more.
    pub damp_percent: f64,
    /// What held-out tokens said of each linear, where there were any.
    pub verdicts: Option<Vec<Verdict>>,
    /// Of the Hessian's diagonal, where there is one.
    pub spread: Option<Spread>,
    /// Time for the factorization, for target, sweep and refinement, and for packing.
    pub phases: Phases,
}

/// The damp from which the ladder starts where none was asked for, and where it ends.
const LADDER: std::ops::Range<f64> = 0.01..1.0;

/// Solves one stage. `evidence` is `None` for [`Method::Rtn`] alone.
/// Fails with [`Error::Damp`] where no damp below 1 makes the Hessian positive definite.
pub fn solve<B: Backend>(
    backend: &B,
    weights: &StageWeights<B>,
    evidence: Option<&Evidence<B>>,
    params: &GptqParams,
) -> Result<Solved<B>> {
    let quant = &params.quant;
    let mut watch = Stopwatch::start();
    let mut phases = Phases::default();
    let hessian = evidence.map(|evidence| &evidence.solving.hessian);
    let diagonal = hessian.map_or(Ok(vec![1.0; weights.in_features]), |h| backend.diagonal(h))?;
    let dead: Vec<u32> = (0..).zip(&diagonal).filter(|(_, h)| **h == 0.0).map(|(i, _)| i).collect();
    let grouping = order::grouping(&diagonal, quant.group_size, params.recipe.order);
    let factor = hessian
        .map(|h| Factor::find(backend, h, &diagonal, &grouping.order, quant.damp_percent))
        .transpose()?;
    phases.factor = watch.lap(backend)?;
    let mut sweep = backend.sweep_start(&weights.source, &dead, &grouping, &params.grid_spec())?;
    let mut around =
        Around { backend, recipe: &params.recipe, order: &grouping.order, judge: None, verdicts: None };
    if let (Some(evidence), Some(factor)) = (evidence, &factor) {
        around.begin(&mut sweep, evidence, factor, &weights.outputs)?;
    }
    let target = around.refines().then(|| backend.sweep_weights(&sweep)).transpose()?;
    phases.target = watch.lap(backend)?;
    for block in order::blocks(&grouping) {
        backend.sweep_block(&mut sweep, factor.as_ref().map(|factor| &factor.upper), block)?;
    }
    phases.sweep = watch.lap(backend)?;
    let swept = around.swept(&sweep)?;
    if let (Some(hessian), Some(factor), Some(target)) = (hessian, &factor, target) {
        let damped = backend.damped(hessian, &grouping.order, factor.damp)?;
        around.refine(&mut sweep, (&target, &damped), &swept)?;
    }
    let verdicts = around.verdicts;
    phases.refine = watch.lap(backend)?;
    let (packed, losses) = backend.sweep_pack(sweep, quant.format.zero_offset(), weights.bias.clone())?;
    phases.pack = watch.lap(backend)?;
    let damp_percent = factor.map_or(0.0, |factor| factor.damp_percent);
    let spread = hessian.and_then(|_| Spread::of(&diagonal));
    Ok(Solved { packed, losses, damp_percent, verdicts, spread, phases })
}

/// What happens before and after the sweep, and what held-out tokens say of it.
struct Around<'a, B: Backend> {
    backend: &'a B,
    recipe: &'a Recipe,
    order: &'a [u32],
    judge: Option<Judge<'a, B>>,
    verdicts: Option<Vec<Verdict>>,
}

impl<'a, B: Backend> Around<'a, B> {
    fn refines(&self) -> bool {
        self.recipe.rounds > 0
    }

    /// Moves a sweep that has only just begun to the recipe's target.
    fn begin(
        &mut self,
        sweep: &mut B::Sweep,
        evidence: &Evidence<B>,
        factor: &Factor<B>,
        outputs: &'a [usize],
    ) -> Result<()> {
        if let Some(held_out) = &evidence.held_out {
            self.judge = Some(Judge::new(self.backend, sweep, held_out, self.order, outputs)?);
            self.verdicts = Some(vec![Verdict::default(); outputs.len()]);
        }
        if self.recipe.target == Target::None {
            return Ok(());
        }
        let weights = self.backend.sweep_weights(sweep)?;
        let Some(pull) = evidence.solving.pull(self.backend, &weights, self.order)? else { return Ok(()) };
        let before = self.judge.is_some().then(|| self.backend.sweep_copy(sweep)).transpose()?;
        self.backend.sweep_toward(sweep, &pull, &factor.upper, TARGET_SHARE)?;
        if let (Some(judge), Some(before), Some(verdicts)) = (&self.judge, before, &mut self.verdicts) {
            // Weights that nothing moved and nothing rounded have no loss.
            let found = judge.keep_better(sweep, &before, &vec![0.0; outputs.len()])?;
            verdicts.iter_mut().zip(found).for_each(|(verdict, loss)| verdict.target = Some(loss));
        }
        Ok(())
    }

    /// What held-out tokens say of a finished sweep.
    fn swept(&mut self, sweep: &B::Sweep) -> Result<Vec<f64>> {
        let (Some(judge), Some(verdicts)) = (&self.judge, &mut self.verdicts) else { return Ok(vec![]) };
        let swept = judge.losses(sweep)?;
        verdicts.iter_mut().zip(&swept).for_each(|(verdict, loss)| verdict.swept = *loss);
        Ok(swept)
    }

    /// Refines a finished sweep for its target; the Hessian is the damped one.
    fn refine(
        &mut self,
        sweep: &mut B::Sweep,
        (target, hessian): (&B::Matrix, &B::Matrix),
        swept: &[f64],
    ) -> Result<()> {
        let rounds = self.recipe.rounds;
        let (Some(judge), Some(verdicts)) = (&self.judge, &mut self.verdicts) else {
            return Ok(self.backend.sweep_refine(sweep, target, hessian, rounds)?);
        };
        let before = self.backend.sweep_copy(sweep)?;
        self.backend.sweep_refine(sweep, target, hessian, rounds)?;
        let refined = judge.keep_better(sweep, &before, swept)?;
        verdicts.iter_mut().zip(refined).for_each(|(verdict, loss)| verdict.refined = Some(loss));
        Ok(())
    }
}

/// U, with what was added to the Hessian's diagonal.
struct Factor<B: Backend> {
    upper: B::Matrix,
    damp: f32,
    damp_percent: f64,
}

impl<B: Backend> Factor<B> {
    /// The factor at the damp asked for, or at the first doubling of it that works.
    fn find(backend: &B, hessian: &B::Matrix, diagonal: &[f32], order: &[u32], asked: f64) -> Result<Self> {
        let mean = diagonal.iter().map(|h| *h as f64).sum::<f64>() / diagonal.len().max(1) as f64;
        if !mean.is_finite() {
            return Err(Error::NotFiniteActivations);
        }
        let mut damp_percent = asked;
        loop {
            let damp = (damp_percent * mean) as f32;
            match backend.inverse_cholesky(hessian, order, damp) {
                Ok(upper) => return Ok(Self { upper, damp, damp_percent }),
                Err(gptq_kernels::Error::NotPositiveDefinite { .. }) => {
                    let next = (2.0 * damp_percent).max(LADDER.start);
                    if next >= LADDER.end {
                        return Err(Error::Damp { last: damp_percent });
                    }
                    damp_percent = next;
                }
                Err(other) => return Err(other.into()),
            }
        }
    }
}

impl GptqParams {
    /// The order of columns is the recipe's, whatever `quant` says of it. Scales are stored in f16.
    pub fn new(quant: QuantConfig, method: Method, recipe: Recipe) -> Self {
        Self { quant: recipe.order.of(quant), method, recipe, f16_scales: true }
    }

    /// What a walk with these settings wants of its chunks.
    pub fn layout(&self) -> Layout {
        let recipe = &self.recipe;
        let streams = if recipe.target == Target::None { 1 } else { 2 };
        Layout { streams, holds_out: streams > 1 || recipe.rounds > 0 }
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
        let dims = weights.iter().map(HostTensor::dims2).collect::<Result<Vec<_>, _>>()?;
        let in_features = dims.first().map_or(0, |dims| dims.1);
        let outputs = dims.iter().map(|dims| dims.0).collect();
        let bias: Vec<f32> = biases.iter().flat_map(HostTensor::to_f32).collect();
        let source = backend.sweep_source(weights)?;
        Ok(Self { source, in_features, outputs, bias: (!bias.is_empty()).then_some(bias) })
    }

    /// The stage as it was, as one dense weight.
    pub fn original(&self, backend: &B) -> Result<B::Weight> {
        Ok(backend.source_weight(&self.source, self.bias.clone())?)
    }

    /// The biases of all outputs as a table of one row, if there are any.
    pub fn bias(&self, backend: &B) -> Result<Option<B::Weight>> {
        let table = |bias: &Vec<f32>| backend.weight_from_f32(bias.clone(), (1, bias.len()), None);
        Ok(self.bias.as_ref().map(table).transpose()?)
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
