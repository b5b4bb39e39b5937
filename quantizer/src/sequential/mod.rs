//! The walk through the model: every group of linears is solved on inputs that the quantized groups before it made.
//!
//! One forward pass serves everything: while the activations of tokens advance through a solved stage, the next
//! stage's Hessian grows from what they become. That is `true_sequential` at one pass instead of five.

mod activation_cache;
mod agreement;
mod mixture;
mod phases;
mod reader;

pub use activation_cache::{ActivationCache, Layout, Placement};
pub use agreement::Agreement;
pub use mixture::ExpertTokens;
pub use phases::Phases;
use reader::Read;
pub use reader::Reader;

use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{Backend, Batch};
use gptq_runtime::layout::{self, LayerSpec, LinearGroup, Role, Stage};
use gptq_runtime::model::{Layer, ModelFiles, Projection, State};

use crate::gptq::{self, GptqParams, Method, Solved};
use crate::moments::{Evidence, Moments, Reaching};
use crate::recipe::Target;
use crate::{Error, Result};
use activation_cache::{Parts, Pass, Touched};
use phases::Clock;

/// A walk that stands before some layer. One stream of activations goes through what is quantized; where the target asks for
/// it, a second one goes the same way through the weights as they were.
pub struct Walk<'a, B: Backend> {
    backend: &'a B,
    files: &'a ModelFiles,
    params: &'a GptqParams,
    activations: ActivationCache<B>,
}

/// A solved layer, its groups in the order of its spec.
pub struct SolvedLayer<B: Backend> {
    pub groups: Vec<Solved<B>>,
    /// Where the layer has experts.
    pub experts: Option<ExpertTokens>,
    pub phases: Phases,
}

/// A layer on its way through the walk.
struct Solving<'w, 'a, B: Backend> {
    walk: &'w mut Walk<'a, B>,
    index: usize,
    spec: LayerSpec,
    /// For each stream.
    layers: Vec<Layer<B>>,
    reader: &'w Reader<B>,
    /// Weights of the next group, where they were needed before it is solved.
    coming: Option<Read<B>>,
    /// The stage that the unquantized stream is behind already, while the quantized one stands before it.
    ahead: Option<Stage>,
    /// Groups of another solution, which the quantized stream goes through.
    through: Option<&'w [PackedLinear<'static>]>,
    on_group: &'w mut dyn FnMut(Role),
    clock: Clock<B::Mark>,
    /// By the groups of the spec.
    solved: Vec<Option<Solved<B>>>,
}

impl<'a, B: Backend> Walk<'a, B> {
    /// A walk before layer 0, over activations of [`GptqParams::layout`]. Rounding to nearest needs no tokens; GPTQ needs at
    /// least one.
    pub fn start(
        backend: &'a B,
        files: &'a ModelFiles,
        params: &'a GptqParams,
        activations: ActivationCache<B>,
    ) -> Self {
        Self { backend, files, params, activations }
    }

    /// Solves layer `index`, whose weights `reader` gives next, and moves behind it; `on_group` is told of
    /// each group before it is solved. The quantized stream goes through what was solved, or `through` the groups of
    /// another solution, to compare with it from equal inputs.
    pub fn solve_layer(
        &mut self,
        index: usize,
        reader: &Reader<B>,
        through: Option<&[PackedLinear<'static>]>,
        on_group: &mut dyn FnMut(Role),
    ) -> Result<SolvedLayer<B>> {
        let spec = layout::layer(&self.files.config, index);
        let layers = self.layers(index)?;
        let solved = spec.groups.iter().map(|_| None).collect();
        let (walk, clock, coming, ahead) = (self, Clock::new(), None, None);
        let mut solving =
            Solving { walk, index, spec, layers, reader, coming, ahead, through, on_group, clock, solved };
        let experts = solving.stages()?;
        let Solving { solved, clock, .. } = solving;
        Ok(SolvedLayer { groups: solved.into_iter().flatten().collect(), experts, phases: clock.phases })
    }

    /// Moves behind layer `index`, which an earlier run solved: `groups` are its groups' linears, stacked.
    pub fn skip_layer(&mut self, index: usize, groups: &[PackedLinear]) -> Result<()> {
        let mut layers = self.layers(index)?;
        let spec = layout::layer(&self.files.config, index);
        for (group, packed) in spec.groups.iter().zip(groups) {
            for (stream, layer) in layers.iter_mut().enumerate() {
                let weight = match stream {
                    0 => self.backend.dense_weight(packed)?,
                    _ => reader::read(self.backend, self.files, index, group)?.original(self.backend)?,
                };
                layer.replace(group.role, Projection::Dense(weight));
            }
        }
        let whole = Pass { reads: Touched::Hidden, writes: Touched::Hidden, held_out_only: false };
        self.activations.each(self.backend, whole, &mut |chunk, streams| {
            let forward = |(layer, parts): (&Layer<B>, Parts<B::Tensor>)| {
                let hidden =
                    parts.hidden.map(|hidden| layer.forward(self.backend, hidden, chunk.batch, None));
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
        agreement::measure(self.backend, self.files, &mut self.activations)
    }

    /// Layer `index` without linears, for each stream.
    fn layers(&self, index: usize) -> Result<Vec<Layer<B>>> {
        let layer = |_| Ok(Layer::without_linears(self.backend, self.files, index)?);
        (0..self.activations.layout().streams).map(layer).collect()
    }

    /// Nothing yet known of the inputs of `group`, whose outputs are added to the residual stream where `adds` says so;
    /// `None` where rounding to nearest needs none.
    fn evidence(&self, group: &LinearGroup, adds: bool) -> Result<Option<Evidence<B>>> {
        if self.params.method == Method::Rtn {
            return Ok(None);
        }
        let empty = || Moments::new(self.backend, group.dims(), adds, self.params.recipe.target);
        let held_out = self.activations.layout().holds_out.then(empty).transpose()?;
        Ok(Some(Evidence { solving: empty()?, held_out }))
    }
}

impl<B: Backend> Solving<'_, '_, B> {
    fn stages(&mut self) -> Result<Option<ExpertTokens>> {
        let mut evidence = self.enter()?;
        let mut experts = None;
        let stages = self.spec.stages();
        for (i, stage) in stages.iter().enumerate() {
            match self.spec.first_of(*stage) {
                Some(_) if *stage == Stage::Mixture => experts = self.solve_experts()?,
                Some(place) => self.solve(place, evidence.take().as_ref())?,
                None => {}
            }
            let next = stages.get(i + 1).copied();
            // Where only one stream is there, the activations behind the last stage are not needed.
            let last = next.is_none() && self.index + 1 == self.walk.files.config.num_hidden_layers;
            if !last || self.layers.len() > 1 {
                evidence = self.advance(*stage, next, last)?;
            }
        }
        Ok(experts)
    }

    /// Whether the unquantized stream shall go through `next` too: what its outputs should be is then known before it is
    /// solved. Reads the stage's weights.
    fn goes_ahead(&mut self, next: Option<Stage>) -> Result<bool> {
        let residual = self.walk.params.recipe.target == Target::Residual;
        let Some(next) = next.filter(|next| residual && self.layers[0].adds_products(*next)) else {
            return Ok(false);
        };
        let (Some(place), Some(layer)) = (self.spec.first_of(next), self.layers.get_mut(1)) else {
            return Ok(false);
        };
        let coming = self.coming.insert(self.reader.next()?);
        let weight = coming.0.original(self.walk.backend)?;
        layer.replace(self.spec.groups[place].role, Projection::Dense(weight));
        self.clock.lap(|phases| &mut phases.wait);
        Ok(true)
    }

    /// Solves the group at a place of the spec and puts it into the layers.
    fn solve(&mut self, place: usize, evidence: Option<&Evidence<B>>) -> Result<()> {
        let (backend, role) = (self.walk.backend, self.spec.groups[place].role);
        (self.on_group)(role);
        let (weights, read) = self.coming.take().map_or_else(|| self.reader.next(), Ok)?;
        self.clock.lap(|phases| &mut phases.wait);
        let solved = gptq::solve(backend, &weights, evidence, self.walk.params);
        let solved = solved.map_err(|error| error.at(self.index, role))?;
        self.clock.skip();
        self.clock.phases += solved.phases;
        self.clock.phases.read += read;
        let passed = self.ahead == Some(role.stage());
        for (stream, layer) in self.layers.iter_mut().enumerate() {
            let weight = match (stream, self.through) {
                (0, Some(groups)) => backend.dense_weight(&groups[place])?,
                (0, None) => backend.packed_weight(&solved.packed)?,
                _ if passed => continue,
                _ => weights.original(backend)?,
            };
            layer.replace(role, Projection::Dense(weight));
        }
        self.solved[place] = Some(solved);
        Ok(())
    }

    /// What is known of the inputs of a stage's linears: nothing yet. Experts have each their own.
    fn evidence(&self, stage: Stage) -> Result<Option<Evidence<B>>> {
        match self.spec.first_of(stage) {
            Some(place) if stage != Stage::Mixture => {
                self.walk.evidence(&self.spec.groups[place], self.layers[0].adds_products(stage))
            }
            _ => Ok(None),
        }
    }

    /// Makes all activations' inputs of the first stage, and what is known of them.
    fn enter(&mut self) -> Result<Option<Evidence<B>>> {
        let mut evidence = self.evidence(Stage::Qkv)?;
        let pass = Pass { reads: Touched::Hidden, writes: Touched::Input, held_out_only: false };
        let (backend, layers, clock) = (self.walk.backend, &self.layers, &mut self.clock);
        clock.begin(backend)?;
        self.walk.activations.each(backend, pass, &mut |chunk, streams| {
            let enter = |(layer, parts): (&Layer<B>, Parts<B::Tensor>)| {
                let state = parts.hidden.map(|hidden| layer.enter(backend, hidden)).transpose()?;
                Ok(Parts { hidden: None, input: state.map(|state| state.input) })
            };
            let moved = layers.iter().zip(streams).map(enter).collect::<Result<Vec<_>>>()?;
            add(backend, &mut evidence, (chunk.held_out, None), &moved, clock)?;
            Ok(moved)
        })?;
        clock.settle(backend)?;
        Ok(evidence)
    }

    /// Moves all activations behind `stage`, or those held out alone, while what is known of the next stage grows.
    fn advance(
        &mut self,
        stage: Stage,
        next: Option<Stage>,
        held_out_only: bool,
    ) -> Result<Option<Evidence<B>>> {
        let mut evidence = next.map_or(Ok(None), |next| self.evidence(next))?;
        let goes_ahead = self.goes_ahead(next)?;
        let pass = Pass {
            reads: if stage.ends_block() || goes_ahead { Touched::Both } else { Touched::Input },
            writes: match (stage.ends_block() || goes_ahead, next) {
                (false, _) => Touched::Input,
                (true, Some(_)) => Touched::Both,
                (true, None) => Touched::Hidden,
            },
            held_out_only,
        };
        let bias =
            self.coming.as_ref().map(|(weights, _)| weights.bias(self.walk.backend)).transpose()?.flatten();
        // Of the quantized stream and of the unquantized one.
        let ahead = next.filter(|_| goes_ahead);
        let passed = self.ahead == Some(stage);
        let stages = [[Some(stage), None], [(!passed).then_some(stage), ahead]];
        let (backend, layers, clock) = (self.walk.backend, &self.layers, &mut self.clock);
        clock.begin(backend)?;
        self.walk.activations.each(backend, pass, &mut |chunk, streams| {
            let moved = |(stream, parts): (usize, Parts<B::Tensor>)| {
                stages[stream].iter().flatten().try_fold(parts, |parts, stage| {
                    behind(backend, &layers[stream], *stage, parts, chunk.batch)
                })
            };
            let moved = streams.into_iter().enumerate().map(moved).collect::<Result<Vec<_>>>()?;
            add(backend, &mut evidence, (chunk.held_out, bias.as_ref()), &moved, clock)?;
            Ok(moved)
        })?;
        clock.settle(backend)?;
        self.ahead = ahead;
        Ok(evidence)
    }
}

/// What a stage makes of a chunk.
fn behind<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    stage: Stage,
    parts: Parts<B::Tensor>,
    batch: &Batch,
) -> Result<Parts<B::Tensor>> {
    Ok(match (parts.hidden, parts.input) {
        (Some(hidden), Some(input)) if stage.ends_block() => {
            let State { hidden, input } = layer.rejoin(backend, stage, &input, hidden)?;
            // Behind a layer the hidden state is the input too.
            Parts { hidden: Some(hidden), input: (stage == Stage::O).then_some(input) }
        }
        (hidden, Some(input)) => Parts { hidden, input: Some(layer.follow(backend, stage, &input, batch)?) },
        (hidden, None) => Parts { hidden, input: None },
    })
}

/// Adds a chunk's activations to what is known, making and adding them each in its phase.
fn add<B: Backend>(
    backend: &B,
    evidence: &mut Option<Evidence<B>>,
    (held_out, bias): (bool, Option<&B::Weight>),
    streams: &[Parts<B::Tensor>],
    clock: &mut Clock<B::Mark>,
) -> Result<()> {
    clock.mark(backend, |phases| &mut phases.forward)?;
    fn reaching<T>(parts: &Parts<T>) -> Option<Reaching<'_, T>> {
        let input = parts.input.as_ref().or(parts.hidden.as_ref())?;
        Some(Reaching { input, hidden: parts.hidden.as_ref() })
    }
    let moments = evidence.as_mut().and_then(|evidence| match held_out {
        true => evidence.held_out.as_mut(),
        false => Some(&mut evidence.solving),
    });
    if let (Some(moments), Some(quantized)) = (moments, streams.first().and_then(reaching)) {
        moments.add(backend, &quantized, streams.get(1).and_then(reaching).as_ref(), bias)?;
        clock.mark(backend, |phases| &mut phases.hessian)?;
    }
    Ok(())
}

impl Error {
    fn at(self, layer: usize, role: Role) -> Self {
        Self::Stage { layer, stage: role.name(), cause: Box::new(self) }
    }
}
