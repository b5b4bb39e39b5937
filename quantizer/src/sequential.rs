//! The walk through the model: every stage is solved on inputs that the quantized stages before it made.
//!
//! One forward pass serves everything: while the tiles of tokens advance through a solved stage, the next
//! stage's Hessian grows from what they become. That is `true_sequential` at one pass instead of five.

use std::time::{Duration, Instant};

use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{Backend, Batch, Device, Hessian, HostTensor};
use gptq_runtime::layout::{LinearSpec, Stage};
use gptq_runtime::model::{self, Layer, ModelFiles, Projection, State};

use crate::gptq::{self, GptqParams, Method};
use crate::{Error, Result};

/// Tokens of one tile, if sequences are shorter.
const TILE_TOKENS: usize = 2048;

/// Several whole sequences that advance together.
struct Tile<T> {
    batch: Batch,
    hidden: T,
}

/// A walk that stands before some layer.
pub struct Walk<'a, B: Backend> {
    backend: &'a B,
    files: &'a ModelFiles,
    params: &'a GptqParams,
    tiles: Vec<Tile<B::Tensor>>,
    sequences: usize,
}

/// The states of all tiles before a stage, and the Hessian of its input; none for rounding to nearest.
type Entered<B> = (Vec<State<<B as Device>::Tensor>>, Option<<B as Hessian>::Matrix>);

/// One solved linear, ready to be written.
pub struct SolvedLinear {
    pub spec: LinearSpec,
    pub packed: PackedLinear,
    pub loss: f64,
    pub damp_percent: f64,
}

/// A solved layer, with the time its phases took.
pub struct SolvedLayer {
    pub linears: Vec<SolvedLinear>,
    pub phases: Phases,
}

/// Where the time of a layer went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phases {
    pub forward: Duration,
    pub hessian: Duration,
    pub factor: Duration,
    /// Reading the weights, grids, codes, packing.
    pub sweep: Duration,
    /// Cutting the stage into its linears.
    pub pack: Duration,
}

impl<'a, B: Backend> Walk<'a, B> {
    /// A walk before layer 0. Rounding to nearest takes no sequences; GPTQ takes at least one.
    pub fn start(
        backend: &'a B,
        files: &'a ModelFiles,
        params: &'a GptqParams,
        sequences: &[Vec<u32>],
    ) -> Result<Self> {
        let embedding = model::embedding(backend, files)?;
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let tile = |sequences: &[Vec<u32>]| -> Result<Tile<B::Tensor>> {
            let hidden = backend.embedding(&embedding, &sequences.concat())?;
            Ok(Tile { batch: Batch::fresh(sequences.iter().map(Vec::len)), hidden })
        };
        let tiles =
            sequences.chunks((TILE_TOKENS / longest.max(1)).max(1)).map(tile).collect::<Result<_>>()?;
        Ok(Self { backend, files, params, tiles, sequences: sequences.len() })
    }

    /// Solves layer `index` and moves behind it; `on_stage` is told of each stage before it is solved.
    pub fn solve_layer(&mut self, index: usize, on_stage: &mut dyn FnMut(Stage)) -> Result<SolvedLayer> {
        let mut clock = Clock::new();
        let mut layer = Layer::without_linears(self.backend, self.files, index)?;
        let (mut states, mut hessian) = self.enter(&layer, &mut clock)?;
        let mut linears = Vec::new();
        for stage in Stage::ALL {
            on_stage(stage);
            let solved = self.solve_stage(index, stage, hessian.take(), &mut clock);
            let packed = solved.map_err(|e| e.at(index, stage)).map(|(packed, mut stage)| {
                linears.append(&mut stage);
                packed
            })?;
            if self.is_last(index) && stage == Stage::Down {
                break;
            }
            layer.replace(stage, Projection::dequantized(self.backend, &packed)?);
            hessian = self.advance(&layer, stage, &mut states, &mut clock)?;
        }
        self.leave(states);
        Ok(SolvedLayer { linears, phases: clock.phases })
    }

    /// Moves behind layer `index`, which an earlier run solved: `stages` are its stages' linears, stacked.
    pub fn skip_layer(&mut self, index: usize, stages: &[PackedLinear; 4]) -> Result<()> {
        let mut layer = Layer::without_linears(self.backend, self.files, index)?;
        for stage in Stage::ALL {
            layer.replace(stage, Projection::dequantized(self.backend, &stages[stage as usize])?);
        }
        for tile in &mut self.tiles {
            tile.hidden = layer.forward(self.backend, tile.hidden.clone(), &tile.batch, None)?;
        }
        Ok(())
    }

    fn is_last(&self, index: usize) -> bool {
        index + 1 == self.files.config.num_hidden_layers
    }

    /// All tiles' states before the first stage, and its Hessian.
    fn enter(&self, layer: &Layer<B>, clock: &mut Clock) -> Result<Entered<B>> {
        let mut states = Vec::with_capacity(self.tiles.len());
        for tile in &self.tiles {
            states.push(layer.enter(self.backend, tile.hidden.clone())?);
        }
        clock.lap(|phases| &mut phases.forward);
        let mut hessian = self.hessian(Stage::Qkv)?;
        for state in &states {
            self.accumulate(&mut hessian, state)?;
        }
        clock.lap(|phases| &mut phases.hessian);
        Ok((states, hessian))
    }

    /// Moves all tiles behind `stage`, while the next stage's Hessian grows.
    fn advance(
        &self,
        layer: &Layer<B>,
        stage: Stage,
        states: &mut Vec<State<B::Tensor>>,
        clock: &mut Clock,
    ) -> Result<Option<B::Matrix>> {
        let next = Stage::ALL.get(stage as usize + 1);
        let mut hessian = next.map_or(Ok(None), |next| self.hessian(*next))?;
        let before = std::mem::take(states);
        for (tile, state) in self.tiles.iter().zip(before) {
            let state = layer.advance(self.backend, stage, state, &tile.batch, None)?;
            self.backend.synchronize()?;
            clock.lap(|phases| &mut phases.forward);
            self.accumulate(&mut hessian, &state)?;
            self.backend.synchronize()?;
            clock.lap(|phases| &mut phases.hessian);
            states.push(state);
        }
        Ok(hessian)
    }

    fn leave(&mut self, states: Vec<State<B::Tensor>>) {
        for (tile, state) in self.tiles.iter_mut().zip(states) {
            tile.hidden = state.hidden;
        }
    }

    /// An empty Hessian for the inputs of `stage`; none where rounding to nearest needs none.
    fn hessian(&self, stage: Stage) -> Result<Option<B::Matrix>> {
        let width = model::stage_linears(self.files, stage).first().map_or(0, |linear| linear.in_features);
        Ok(match self.params.method {
            Method::Gptq => Some(self.backend.hessian(width)?),
            Method::Rtn => None,
        })
    }

    fn accumulate(&self, hessian: &mut Option<B::Matrix>, state: &State<B::Tensor>) -> Result<()> {
        match hessian {
            Some(hessian) => Ok(self.backend.accumulate(hessian, &state.input)?),
            None => Ok(()),
        }
    }

    /// Solves the linears of one stage in one sweep, since they share Hessian and order. Returns the stage's
    /// stack, and its linears one by one.
    fn solve_stage(
        &self,
        index: usize,
        stage: Stage,
        hessian: Option<B::Matrix>,
        clock: &mut Clock,
    ) -> Result<(PackedLinear, Vec<SolvedLinear>)> {
        let specs = model::stage_linears(self.files, stage);
        let (weights, biases) = model::dense_parts(self.files, index, &specs)?;
        let mut solved = gptq::solve(self.backend, &weights, hessian.as_ref(), self.params)?;
        clock.phases.factor += Duration::from_secs_f64(solved.seconds[0]);
        clock.phases.sweep += Duration::from_secs_f64(solved.seconds[1]);
        clock.skip();
        let bias: Vec<f32> = biases.iter().flat_map(HostTensor::to_f32).collect();
        solved.packed.bias = (!bias.is_empty()).then_some(bias);
        let mut start = 0;
        let split = specs.iter().map(|spec| {
            let rows = start..start + spec.out_features;
            start = rows.end;
            let loss = solved.loss(rows.clone(), self.sequences);
            let packed = solved.packed.rows(rows)?;
            Ok(SolvedLinear { spec: *spec, packed, loss, damp_percent: solved.damp_percent })
        });
        let linears = split.collect::<Result<_>>()?;
        clock.lap(|phases| &mut phases.pack);
        Ok((solved.packed, linears))
    }
}

/// Splits the time of a layer into phases.
struct Clock {
    last: Instant,
    phases: Phases,
}

impl Clock {
    fn new() -> Self {
        Self { last: Instant::now(), phases: Phases::default() }
    }

    /// Forgets the time since the last lap, which was booked otherwise.
    fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// Books the time since the last lap.
    fn lap(&mut self, phase: fn(&mut Phases) -> &mut Duration) {
        let now = Instant::now();
        *phase(&mut self.phases) += now - self.last;
        self.last = now;
    }
}

impl Error {
    fn at(self, layer: usize, stage: Stage) -> Self {
        Self::Stage { layer, stage: stage.name(), cause: Box::new(self) }
    }
}
