//! Solving the experts of a layer, each on the tokens that the router sends to it.
//!
//! The router is not quantized. Where it sends a token follows from the quantized stream; the unquantized stream takes the
//! same way, so that both say something about the same linears. Experts are solved in two halves, gate and up, then down:
//! each half is a pass over all tokens for as many experts as have room for their moments at a time. What stands between
//! the halves is computed again and not kept.
//!
//! An expert that got fewer tokens than it has inputs is starved: its Hessian would have no full rank, and damping alone
//! would decide most of its codes. The other tokens fill it up: each of them counts `(inputs - tokens) / others`, so that all
//! together count as much as what is missing. docs/models.md has what that is worth, and what else was tried.

use gptq_kernels::Backend;
use gptq_runtime::layout::{LinearGroup, Mlp, Role};
use gptq_runtime::model::{Layer, Tokens};
use serde::{Deserialize, Serialize};

use super::activation_cache::{Pass, Touched};
use super::{ActivationCache, Method, Parts, Solving};
use crate::Result;
use crate::moments::{Evidence, Reaching};

/// Bytes of moments at a time on a device whose memory is the host's.
const HOST_BYTES: usize = 4 << 30;

/// How many calibration tokens each expert of a layer was solved with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertTokens {
    /// By expert.
    pub tokens: Vec<usize>,
    /// Experts with fewer tokens than inputs, which the other tokens filled up.
    pub starved: Vec<usize>,
}

/// Where the router sends the tokens of each chunk, in the order of a pass.
struct Routes {
    activations: Vec<Chunk>,
    /// Of an expert's gate and up.
    inputs: usize,
    totals: ExpertTokens,
}

struct Chunk {
    rows: usize,
    experts: Vec<Tokens>,
}

/// What a chunk brings to one MLP.
enum TokenSelection<'a> {
    All,
    Rows(&'a [u32]),
    /// All rows, each with a weight.
    Weighed(Vec<f32>),
}

impl<B: Backend> Solving<'_, '_, B> {
    /// Solves all experts of the layer, and the MLP that all tokens go through beside them. `None` where they
    /// are rounded to nearest, without tokens.
    pub(super) fn solve_experts(&mut self) -> Result<Option<ExpertTokens>> {
        let routes = self.routes()?;
        for half in [Role::GateUp, Role::Down] {
            let members: Vec<usize> = self.members(half);
            let room = self.room(&members)?;
            for some in members.chunks(room) {
                let mut evidence = self.evidence_of(some, &routes)?;
                for (place, evidence) in some.iter().zip(&mut evidence) {
                    self.solve(*place, evidence.take().as_ref())?;
                }
            }
        }
        Ok((self.walk.params.method != Method::Rtn).then_some(routes.totals))
    }

    /// Places of one half's groups, in the order in which they are read.
    fn members(&self, half: fn(Mlp) -> Role) -> Vec<usize> {
        let of_half = |role| matches!(role, Role::GateUp(mlp) | Role::Down(mlp) if half(mlp) == role);
        (0..self.spec.groups.len()).filter(|place| of_half(self.spec.groups[*place].role)).collect()
    }

    /// Groups whose moments have room at the same time.
    fn room(&self, members: &[usize]) -> Result<usize> {
        let widest = members.iter().map(|place| self.spec.groups[*place].dims().1).max().unwrap_or(0);
        let layout = self.walk.activations.layout();
        let one = 4 * widest * widest * layout.streams * (1 + usize::from(layout.holds_out));
        let free = match self.walk.backend.memory()? {
            Some(memory) => memory.available.saturating_sub(memory.used) / 2,
            None => HOST_BYTES,
        };
        Ok((free / one.max(1)).max(1))
    }

    /// Asks the router about all tokens.
    fn routes(&mut self) -> Result<Routes> {
        let is_expert = |group: &&LinearGroup| matches!(group.role, Role::GateUp(Mlp::Expert(_)));
        let count = self.spec.groups.iter().filter(is_expert).count();
        let mut totals = ExpertTokens { tokens: vec![0; count], starved: vec![] };
        let mut activations = Vec::new();
        let inputs = self.walk.files.config.hidden_size;
        if self.walk.params.method == Method::Rtn {
            return Ok(Routes { activations, inputs, totals });
        }
        let (backend, layer) = (self.walk.backend, &self.layers[0]);
        each_input(backend, &mut self.walk.activations, &mut |held_out, streams| {
            let (Some(mixture), Some(x)) = (layer.mixture(), streams.first()) else { return Ok(()) };
            let experts = mixture.assignments(backend, &mixture.route(backend, x)?)?;
            if !held_out {
                let totals = totals.tokens.iter_mut().zip(&experts);
                totals.for_each(|(total, expert)| *total += expert.rows.len());
            }
            activations.push(Chunk { rows: backend.shape(x).0, experts });
            Ok(())
        })?;
        self.clock.lap(|phases| &mut phases.forward);
        totals.starved = (0..count).filter(|expert| totals.tokens[*expert] < inputs).collect();
        Ok(Routes { activations, inputs, totals })
    }

    /// What is known of the inputs of some groups, after a pass over all tokens.
    fn evidence_of(&mut self, members: &[usize], routes: &Routes) -> Result<Vec<Option<Evidence<B>>>> {
        let walk = &self.walk;
        let empty = |place: &usize| walk.evidence(&self.spec.groups[*place], false);
        let mut evidence = members.iter().map(empty).collect::<Result<Vec<_>>>()?;
        if evidence.iter().all(Option::is_none) {
            return Ok(evidence);
        }
        let roles: Vec<Role> = members.iter().map(|place| self.spec.groups[*place].role).collect();
        let (backend, layers, clock) = (self.walk.backend, &self.layers, &mut self.clock);
        let mut chunk = 0;
        clock.begin(backend)?;
        each_input(backend, &mut self.walk.activations, &mut |held_out, streams| {
            for (role, evidence) in roles.iter().zip(evidence.iter_mut().flatten()) {
                let selection = routes.selection(chunk, *role);
                let input = |(layer, x)| input(backend, layer, *role, x, &selection);
                let inputs = layers.iter().zip(streams).map(input).collect::<Result<Option<Vec<_>>>>()?;
                let Some(inputs) = inputs else { continue };
                clock.mark(backend, |phases| &mut phases.forward)?;
                let reaching = |input| Reaching { input, hidden: None };
                let moments = match (held_out, &mut evidence.held_out) {
                    (true, Some(held_out)) => held_out,
                    _ => &mut evidence.solving,
                };
                moments.add(backend, &reaching(&inputs[0]), inputs.get(1).map(reaching).as_ref(), None)?;
                clock.mark(backend, |phases| &mut phases.hessian)?;
            }
            chunk += 1;
            Ok(())
        })?;
        clock.settle(backend)?;
        Ok(evidence)
    }
}

impl Routes {
    /// What a chunk brings to the MLP of a role.
    fn selection(&self, chunk: usize, role: Role) -> TokenSelection<'_> {
        let (Role::GateUp(Mlp::Expert(index)) | Role::Down(Mlp::Expert(index))) = role else {
            return TokenSelection::All;
        };
        let rows = &self.activations[chunk].experts[index].rows;
        match self.share(index) {
            None => TokenSelection::Rows(rows),
            Some(share) => {
                // Moments are sums of squares.
                let mut weights = vec![(share as f32).sqrt(); self.activations[chunk].rows];
                rows.iter().for_each(|row| weights[*row as usize] = 1.0);
                TokenSelection::Weighed(weights)
            }
        }
    }

    /// How much a token counts that is not an expert's own; `None` where its own are enough.
    fn share(&self, expert: usize) -> Option<f64> {
        self.totals.starved.contains(&expert).then(|| {
            let all: usize = self.activations.iter().map(|chunk| chunk.rows).sum();
            let own: usize = self.activations.iter().map(|chunk| chunk.experts[expert].rows.len()).sum();
            let missing = self.inputs.saturating_sub(self.totals.tokens[expert]);
            (missing as f64 / (all - own).max(1) as f64).min(1.0)
        })
    }
}

/// The inputs of a group in a chunk; `None` where no token reaches it.
fn input<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    role: Role,
    x: &B::Tensor,
    selection: &TokenSelection,
) -> Result<Option<B::Tensor>> {
    let x = match selection {
        TokenSelection::Rows([]) => return Ok(None),
        TokenSelection::Rows(rows) => backend.gather_rows(x, rows)?,
        TokenSelection::All | TokenSelection::Weighed(_) => x.clone(),
    };
    let x = match (role, layer.mixture()) {
        (Role::Down(mlp), Some(mixture)) => mixture.gate_up(backend, mlp, &x)?,
        _ => x,
    };
    Ok(Some(match selection {
        TokenSelection::Weighed(weights) => backend.weigh_rows(&x, weights)?,
        TokenSelection::All | TokenSelection::Rows(_) => x,
    }))
}

/// What is told whether a chunk is held out, and its inputs of each stream.
type Look<'a, T> = dyn FnMut(bool, &[T]) -> Result<()> + 'a;

/// Shows all activations' inputs, those of each stream, without changing them.
fn each_input<B: Backend>(
    backend: &B,
    activations: &mut ActivationCache<B>,
    look: &mut Look<B::Tensor>,
) -> Result<()> {
    let pass = Pass { reads: Touched::Input, writes: Touched::Nothing, held_out_only: false };
    activations.each(backend, pass, &mut |chunk, streams| {
        let inputs: Vec<B::Tensor> = streams.into_iter().filter_map(|parts| parts.input).collect();
        look(chunk.held_out, &inputs)?;
        Ok(inputs.into_iter().map(|input| Parts { hidden: None, input: Some(input) }).collect())
    })
}
