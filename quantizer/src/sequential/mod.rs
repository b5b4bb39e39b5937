//! The walk through the model: every stage is solved on inputs that the quantized stages before it made.
//!
//! One forward pass serves everything: while the tiles of tokens advance through a solved stage, the next
//! stage's Hessian grows from what they become. That is `true_sequential` at one pass instead of five.

mod agreement;
mod phases;
mod reader;
mod tiles;

pub use agreement::Agreement;
pub use phases::Phases;
pub use reader::Reader;
pub use tiles::{Layout, Placement, Tiles};

use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{Backend, Batch};
use gptq_runtime::layout::Stage;
use gptq_runtime::model::{self, Layer, ModelFiles, Projection, State};

use crate::gptq::{self, GptqParams, Method, Solved};
use crate::moments::{Evidence, Moments, Reaching};
use crate::recipe::Target;
use crate::{Error, Result};
use phases::Clock;
use tiles::{Parts, Pass, Touched};

/// A walk that stands before some layer. One stream of activations goes through what is quantized; where the target asks for
/// it, a second one goes the same way through the weights as they were.
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
    /// A walk before layer 0, over tiles of [`GptqParams::layout`]. Rounding to nearest needs no tokens; GPTQ needs at
    /// least one.
    pub fn start(backend: &'a B, files: &'a ModelFiles, params: &'a GptqParams, tiles: Tiles<B>) -> Self {
        Self { backend, files, params, tiles }
    }

    /// Solves layer `index`, whose weights `reader` gives next, and moves behind it; `on_stage` is told of
    /// each stage before it is solved. The quantized stream goes through what was solved, or `through` the stages of
    /// another solution, to compare with it from equal inputs.
    pub fn solve_layer(
        &mut self,
        index: usize,
        reader: &Reader<B>,
        through: Option<&[PackedLinear; 4]>,
        on_stage: &mut dyn FnMut(Stage),
    ) -> Result<SolvedLayer<B>> {
        let mut clock = Clock::new();
        let mut layers = self.layers(index)?;
        let mut evidence = self.enter(&layers, &mut clock)?;
        let mut stages = Vec::with_capacity(Stage::ALL.len());
        let mut coming = None;
        for stage in Stage::ALL {
            on_stage(stage);
            let (weights, read) = coming.take().map_or_else(|| reader.next(), Ok)?;
            clock.lap(|phases| &mut phases.wait);
            let solved = gptq::solve(self.backend, &weights, evidence.take().as_ref(), self.params);
            let solved = solved.map_err(|error| error.at(index, stage))?;
            clock.skip();
            clock.phases += solved.phases;
            clock.phases.read += read;
            let of_quantized = || match through {
                Some(stages) => self.backend.dense_weight(&stages[stage as usize]),
                None => self.backend.packed_weight(&solved.packed),
            };
            // Nobody looks behind the last stage but who compares both streams.
            let last = self.is_last(index) && stage == Stage::Down;
            if !last || layers.len() > 1 {
                for (stream, layer) in layers.iter_mut().enumerate() {
                    let weight =
                        if stream == 0 { of_quantized()? } else { weights.original(self.backend)? };
                    layer.replace(stage, Projection::Dense(weight));
                }
                let missing = match self.wants_residual(after(stage)) {
                    true => Some(coming.insert(reader.next()?).0.without_bias(self.backend)?),
                    false => None,
                };
                clock.lap(|phases| &mut phases.wait);
                evidence = self.advance(&layers, stage, (last, missing.as_ref()), &mut clock)?;
            }
            stages.push(solved);
        }
        Ok(SolvedLayer { stages, phases: clock.phases })
    }

    /// Moves behind layer `index`, which an earlier run solved: `stages` are its stages' linears, stacked.
    pub fn skip_layer(&mut self, index: usize, stages: &[PackedLinear; 4]) -> Result<()> {
        let mut layers = self.layers(index)?;
        for stage in Stage::ALL {
            for (stream, layer) in layers.iter_mut().enumerate() {
                let projection = match stream {
                    0 => Projection::dequantized(self.backend, &stages[stage as usize])?,
                    _ => {
                        let weights = reader::read(self.backend, self.files, index, stage)?;
                        Projection::Dense(weights.original(self.backend)?)
                    }
                };
                layer.replace(stage, projection);
            }
        }
        let whole = Pass { reads: Touched::Hidden, writes: Touched::Hidden, held_out_only: false };
        self.tiles.each(self.backend, whole, &mut |tile, streams| {
            let forward = |(layer, parts): (&Layer<B>, Parts<B::Tensor>)| {
                let hidden = parts.hidden.map(|hidden| layer.forward(self.backend, hidden, tile.batch, None));
                Ok(Parts { hidden: hidden.transpose()?, input: None })
            };
            let moved = layers.iter().zip(streams).map(forward).collect();
            self.backend.synchronize()?;
            moved
        })
    }

    /// How near the quantized stream is to the other one behind the last layer, for the tokens held out; `None` where
    /// there is no other one.
    pub fn agreement(&mut self) -> Result<Option<Agreement>> {
        agreement::measure(self.backend, self.files, &mut self.tiles)
    }

    /// Layer `index` without linears, for each stream.
    fn layers(&self, index: usize) -> Result<Vec<Layer<B>>> {
        let layer = |_| Ok(Layer::without_linears(self.backend, self.files, index)?);
        (0..self.tiles.layout().streams).map(layer).collect()
    }

    /// Whether what tokens bring to a stage is summed up by what its weights make of it.
    fn wants_residual(&self, stage: Option<Stage>) -> bool {
        self.params.recipe.target == Target::Residual && stage.is_some_and(Stage::ends_block)
    }

    fn is_last(&self, index: usize) -> bool {
        index + 1 == self.files.config.num_hidden_layers
    }

    /// Makes all tiles' inputs of the first stage, and what is known of them.
    fn enter(&mut self, layers: &[Layer<B>], clock: &mut Clock) -> Result<Option<Evidence<B>>> {
        let mut evidence = self.evidence(Stage::Qkv)?;
        let pass = Pass { reads: Touched::Hidden, writes: Touched::Input, held_out_only: false };
        self.tiles.each(self.backend, pass, &mut |tile, streams| {
            let enter = |(layer, parts): (&Layer<B>, Parts<B::Tensor>)| {
                let state = parts.hidden.map(|hidden| layer.enter(self.backend, hidden)).transpose()?;
                Ok(Parts { hidden: None, input: state.map(|state| state.input) })
            };
            let moved = layers.iter().zip(streams).map(enter).collect::<Result<Vec<_>>>()?;
            add(self.backend, &mut evidence, (tile.held_out, None), &moved, clock)?;
            Ok(moved)
        })?;
        Ok(evidence)
    }

    /// Moves all tiles behind `stage`, or those held out alone, while what is known of the next stage's inputs grows;
    /// `weights` are the next stage's where that needs them.
    fn advance(
        &mut self,
        layers: &[Layer<B>],
        stage: Stage,
        (held_out_only, weights): (bool, Option<&B::Weight>),
        clock: &mut Clock,
    ) -> Result<Option<Evidence<B>>> {
        let next = after(stage);
        let mut evidence = next.map_or(Ok(None), |next| self.evidence(next))?;
        let pass = Pass {
            reads: if stage.ends_block() || weights.is_some() { Touched::Both } else { Touched::Input },
            writes: match (stage.ends_block(), next) {
                (false, _) => Touched::Input,
                (true, Some(_)) => Touched::Both,
                (true, None) => Touched::Hidden,
            },
            held_out_only,
        };
        self.tiles.each(self.backend, pass, &mut |tile, streams| {
            let moved = |(layer, parts)| behind(self.backend, layer, stage, parts, tile.batch);
            let moved = layers.iter().zip(streams).map(moved).collect::<Result<Vec<_>>>()?;
            add(self.backend, &mut evidence, (tile.held_out, weights), &moved, clock)?;
            Ok(moved)
        })?;
        Ok(evidence)
    }

    /// Nothing yet known of the inputs of `stage`; `None` where rounding to nearest needs none.
    fn evidence(&self, stage: Stage) -> Result<Option<Evidence<B>>> {
        if self.params.method == Method::Rtn {
            return Ok(None);
        }
        let linears = model::stage_linears(self.files, stage);
        let width = linears.first().map_or(0, |linear| linear.in_features);
        let dims = (linears.iter().map(|linear| linear.out_features).sum(), width);
        let empty = || Moments::new(self.backend, dims, stage.ends_block(), self.params.recipe.target);
        let held_out = self.tiles.layout().holds_out.then(empty).transpose()?;
        Ok(Some(Evidence { solving: empty()?, held_out }))
    }
}

/// The next stage of the same layer.
fn after(stage: Stage) -> Option<Stage> {
    Stage::ALL.get(stage as usize + 1).copied()
}

/// What a stage makes of a tile.
fn behind<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    stage: Stage,
    parts: Parts<B::Tensor>,
    batch: &Batch,
) -> Result<Parts<B::Tensor>> {
    Ok(match (parts.hidden, parts.input) {
        (Some(hidden), Some(input)) if stage.ends_block() => {
            let State { hidden, input } = layer.rejoin(backend, stage, &input, &hidden)?;
            Parts { hidden: Some(hidden), input: Some(input) }
        }
        (hidden, Some(input)) => Parts { hidden, input: Some(layer.follow(backend, stage, &input, batch)?) },
        (hidden, None) => Parts { hidden, input: None },
    })
}

/// Waits for the tile's activations, then adds them to what is known, each in its phase.
fn add<B: Backend>(
    backend: &B,
    evidence: &mut Option<Evidence<B>>,
    (held_out, weights): (bool, Option<&B::Weight>),
    streams: &[Parts<B::Tensor>],
    clock: &mut Clock,
) -> Result<()> {
    backend.synchronize()?;
    clock.lap(|phases| &mut phases.forward);
    fn reaching<T>(parts: &Parts<T>) -> Option<Reaching<'_, T>> {
        Some(Reaching { input: parts.input.as_ref()?, hidden: parts.hidden.as_ref() })
    }
    let moments = evidence.as_mut().and_then(|evidence| match held_out {
        true => evidence.held_out.as_mut(),
        false => Some(&mut evidence.solving),
    });
    if let (Some(moments), Some(quantized)) = (moments, streams.first().and_then(reaching)) {
        moments.add(backend, &quantized, streams.get(1).and_then(reaching).as_ref(), weights)?;
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
