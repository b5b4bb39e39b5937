//! The walk through the model: every stage is solved on inputs that the quantized stages before it made.
//!
//! One forward pass serves everything: while the tiles of tokens advance through a solved stage, the next
//! stage's Hessian grows from what they become. That is `true_sequential` at one pass instead of five.

mod phases;
mod reader;
mod tiles;

pub use phases::Phases;
pub use reader::Reader;
pub use tiles::{Placement, Tiles};

use gptq_kernels::Backend;
use gptq_kernels::packing::PackedLinear;
use gptq_runtime::layout::Stage;
use gptq_runtime::model::{self, Layer, ModelFiles, Projection, State};

use crate::gptq::{self, GptqParams, Method, Solved};
use crate::{Error, Result};
use phases::Clock;
use tiles::{Parts, Reads};

/// A walk that stands before some layer.
pub struct Walk<'a, B: Backend> {
    backend: &'a B,
    files: &'a ModelFiles,
    params: &'a GptqParams,
    tiles: Tiles<B>,
}

/// A solved layer, its stages in the order of [`Stage::ALL`].
pub struct SolvedLayer<B: Backend> {
    pub stages: Vec<Solved<B>>,
    pub phases: Phases,
}

impl<'a, B: Backend> Walk<'a, B> {
    /// A walk before layer 0. Rounding to nearest needs no tokens; GPTQ needs at least one.
    pub fn start(backend: &'a B, files: &'a ModelFiles, params: &'a GptqParams, tiles: Tiles<B>) -> Self {
        Self { backend, files, params, tiles }
    }

    /// Solves layer `index`, whose weights `reader` gives next, and moves behind it; `on_stage` is told of
    /// each stage before it is solved. The activations go through what was solved, or `through` the stages of
    /// another solution, to compare with it from equal inputs.
    pub fn solve_layer(
        &mut self,
        index: usize,
        reader: &Reader<B>,
        through: Option<&[PackedLinear; 4]>,
        on_stage: &mut dyn FnMut(Stage),
    ) -> Result<SolvedLayer<B>> {
        let mut clock = Clock::new();
        let mut layer = Layer::without_linears(self.backend, self.files, index)?;
        let mut hessian = self.enter(&layer, &mut clock)?;
        let mut stages = Vec::with_capacity(Stage::ALL.len());
        for stage in Stage::ALL {
            on_stage(stage);
            let solved = self.solve_stage(hessian.take(), reader, &mut clock);
            let solved = solved.map_err(|error| error.at(index, stage))?;
            let last = self.is_last(index) && stage == Stage::Down;
            if !last {
                let weight = match through {
                    Some(stages) => self.backend.dense_weight(&stages[stage as usize])?,
                    None => self.backend.packed_weight(&solved.packed)?,
                };
                layer.replace(stage, Projection::Dense(weight));
                hessian = self.advance(&layer, stage, &mut clock)?;
            }
            stages.push(solved);
        }
        Ok(SolvedLayer { stages, phases: clock.phases })
    }

    /// Moves behind layer `index`, which an earlier run solved: `stages` are its stages' linears, stacked.
    pub fn skip_layer(&mut self, index: usize, stages: &[PackedLinear; 4]) -> Result<()> {
        let mut layer = Layer::without_linears(self.backend, self.files, index)?;
        for stage in Stage::ALL {
            layer.replace(stage, Projection::dequantized(self.backend, &stages[stage as usize])?);
        }
        self.tiles.each(self.backend, Reads::Hidden, &mut |batch, parts| {
            let hidden = parts.hidden.map(|hidden| layer.forward(self.backend, hidden, batch, None));
            self.backend.synchronize()?;
            Ok(Parts { hidden: hidden.transpose()?, input: None })
        })
    }

    fn is_last(&self, index: usize) -> bool {
        index + 1 == self.files.config.num_hidden_layers
    }

    /// Makes all tiles' inputs of the first stage, and its Hessian.
    fn enter(&mut self, layer: &Layer<B>, clock: &mut Clock) -> Result<Option<B::Matrix>> {
        let mut hessian = self.hessian(Stage::Qkv)?;
        self.tiles.each(self.backend, Reads::Hidden, &mut |_, parts| {
            let input = parts.hidden.map(|hidden| layer.enter(self.backend, hidden)).transpose()?;
            let input = input.map(|state| state.input);
            accumulate(self.backend, &mut hessian, input.as_ref(), clock)?;
            Ok(Parts { hidden: None, input })
        })?;
        Ok(hessian)
    }

    /// Moves all tiles behind `stage`, while the next stage's Hessian grows.
    fn advance(&mut self, layer: &Layer<B>, stage: Stage, clock: &mut Clock) -> Result<Option<B::Matrix>> {
        let next = Stage::ALL.get(stage as usize + 1);
        let mut hessian = next.map_or(Ok(None), |next| self.hessian(*next))?;
        let reads = if stage.ends_block() { Reads::Both } else { Reads::Input };
        self.tiles.each(self.backend, reads, &mut |batch, parts| {
            let parts = match (parts.hidden, parts.input) {
                (None, Some(input)) => {
                    let input = layer.follow(self.backend, stage, &input, batch)?;
                    Parts { hidden: None, input: Some(input) }
                }
                (Some(hidden), Some(input)) => {
                    let State { hidden, input } = layer.rejoin(self.backend, stage, &input, &hidden)?;
                    Parts { hidden: Some(hidden), input: next.map(|_| input) }
                }
                (hidden, None) => Parts { hidden, input: None },
            };
            accumulate(self.backend, &mut hessian, parts.input.as_ref(), clock)?;
            Ok(parts)
        })?;
        Ok(hessian)
    }

    /// An empty Hessian for the inputs of `stage`; none where rounding to nearest needs none.
    fn hessian(&self, stage: Stage) -> Result<Option<B::Matrix>> {
        let width = model::stage_linears(self.files, stage).first().map_or(0, |linear| linear.in_features);
        Ok(match self.params.method {
            Method::Gptq => Some(self.backend.hessian(width)?),
            Method::Rtn => None,
        })
    }

    /// Solves the linears of one stage in one sweep, since they share Hessian and order.
    fn solve_stage(
        &self,
        hessian: Option<B::Matrix>,
        reader: &Reader<B>,
        clock: &mut Clock,
    ) -> Result<Solved<B>> {
        let (weights, read) = reader.next()?;
        clock.lap(|phases| &mut phases.wait);
        let solved = gptq::solve(self.backend, weights, hessian.as_ref(), self.params)?;
        clock.skip();
        let [factor, sweep, pack] = solved.seconds;
        let phases = &mut clock.phases;
        (phases.read, phases.factor) = (phases.read + read, phases.factor + factor);
        (phases.sweep, phases.pack) = (phases.sweep + sweep, phases.pack + pack);
        Ok(solved)
    }
}

/// Waits for the tile's activations, then adds them to the Hessian, each in its phase.
fn accumulate<B: Backend>(
    backend: &B,
    hessian: &mut Option<B::Matrix>,
    input: Option<&B::Tensor>,
    clock: &mut Clock,
) -> Result<()> {
    backend.synchronize()?;
    clock.lap(|phases| &mut phases.forward);
    if let (Some(hessian), Some(input)) = (hessian, input) {
        backend.accumulate(hessian, input)?;
        backend.synchronize()?;
        clock.lap(|phases| &mut phases.hessian);
    }
    Ok(())
}

impl Error {
    fn at(self, layer: usize, stage: Stage) -> Self {
        Self::Stage { layer, stage: stage.name(), cause: Box::new(self) }
    }
}
