//! The activations of all calibration tokens: on the device as far as they fit, the rest in host memory.

use gptq_kernels::{Backend, Batch, Memory};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout::{self, Stage};
use gptq_runtime::model::{self, ModelFiles};

use crate::Result;

/// Tokens of one tile, if sequences are shorter.
const TILE_TOKENS: usize = 2048;

/// A tensor on the device or out of its way.
pub(super) enum Held<B: Backend> {
    Here(B::Tensor),
    Parked(B::Parked),
}

impl<B: Backend> Clone for Held<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Here(tensor) => Self::Here(tensor.clone()),
            Self::Parked(parked) => Self::Parked(parked.clone()),
        }
    }
}

impl<B: Backend> Held<B> {
    fn keep(backend: &B, tensor: B::Tensor, stays: bool) -> Result<Self> {
        Ok(match stays {
            true => Self::Here(tensor),
            false => Self::Parked(backend.park(&tensor)?),
        })
    }

    fn bring(&self, backend: &B) -> Result<B::Tensor> {
        Ok(match self {
            Self::Here(tensor) => tensor.clone(),
            Self::Parked(parked) => backend.fetch(parked)?,
        })
    }
}

/// Several whole sequences that advance together.
struct Tile<B: Backend> {
    batch: Batch,
    /// On the device, all the time.
    stays: bool,
    /// `[tokens, hidden]`, the residual stream.
    hidden: Held<B>,
    /// `[tokens, in]` of the next stage.
    input: Held<B>,
}

impl<B: Backend> Clone for Tile<B> {
    fn clone(&self) -> Self {
        let (hidden, input) = (self.hidden.clone(), self.input.clone());
        Self { batch: self.batch.clone(), stays: self.stays, hidden, input }
    }
}

/// All tiles of a calibration set. A clone shares the activations as long as neither moves on, which is how
/// several branches start from the same embedded tokens.
pub struct Tiles<B: Backend> {
    tiles: Vec<Tile<B>>,
    sequences: usize,
    placement: Placement,
}

impl<B: Backend> Clone for Tiles<B> {
    fn clone(&self) -> Self {
        Self { tiles: self.tiles.clone(), ..*self }
    }
}

/// Where the activations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub tiles: usize,
    /// Tiles that stay on the device; the others are in host memory between two uses.
    pub on_device: usize,
    /// Bytes of all activations.
    pub bytes: usize,
}

/// A tile's tensors on the device, as far as a step reads or writes them.
pub(super) struct Parts<T> {
    pub hidden: Option<T>,
    /// A step that returns `hidden` alone leaves a tile whose input is its hidden state.
    pub input: Option<T>,
}

/// What happens to a tile.
type Step<'a, T> = dyn FnMut(&Batch, Parts<T>) -> Result<Parts<T>> + 'a;

/// Which of them a step reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    Hidden,
    Input,
    Both,
}

impl<B: Backend> Tiles<B> {
    /// The embedded tokens, before layer 0.
    pub fn embed(backend: &B, files: &ModelFiles, sequences: &[Vec<u32>]) -> Result<Self> {
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let groups: Vec<_> = sequences.chunks((TILE_TOKENS / longest.max(1)).max(1)).collect();
        let rows = groups.iter().map(|group| group.iter().map(Vec::len).sum()).max().unwrap_or(0);
        let size = backend.element_size();
        let placement = Placement::choose(backend.memory()?, &files.config, (groups.len(), rows), size);
        let mut tiles = Vec::with_capacity(groups.len());
        if !groups.is_empty() {
            let embedding = model::embedding(backend, files)?;
            for (i, group) in groups.iter().enumerate() {
                let stays = i < placement.on_device;
                let hidden = backend.embedding(&embedding, &group.concat())?;
                let hidden = Held::keep(backend, hidden, stays)?;
                let batch = Batch::fresh(group.iter().map(Vec::len));
                tiles.push(Tile { batch, stays, input: hidden.clone(), hidden });
            }
        }
        Ok(Self { tiles, sequences: sequences.len(), placement })
    }

    pub fn sequences(&self) -> usize {
        self.sequences
    }

    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Takes every tile through `step`; meanwhile the next one is on its way to the device.
    pub(super) fn each(&mut self, backend: &B, reads: Reads, step: &mut Step<B::Tensor>) -> Result<()> {
        let bring = |tile: Option<&Tile<B>>| tile.map(|tile| tile.bring(backend, reads)).transpose();
        let mut coming = bring(self.tiles.first())?;
        for i in 0..self.tiles.len() {
            let Some(parts) = coming else { break };
            coming = bring(self.tiles.get(i + 1))?;
            let tile = &mut self.tiles[i];
            let Parts { hidden, input } = step(&tile.batch, parts)?;
            match (hidden, input) {
                (None, None) => {}
                (None, Some(input)) => tile.input = Held::keep(backend, input, tile.stays)?,
                (Some(hidden), None) => {
                    tile.hidden = Held::keep(backend, hidden, tile.stays)?;
                    tile.input = tile.hidden.clone();
                }
                (Some(hidden), Some(input)) => {
                    tile.hidden = Held::keep(backend, hidden, tile.stays)?;
                    tile.input = Held::keep(backend, input, tile.stays)?;
                }
            }
        }
        Ok(())
    }
}

impl<B: Backend> Tile<B> {
    fn bring(&self, backend: &B, reads: Reads) -> Result<Parts<B::Tensor>> {
        let wanted = |held: &Held<B>, wanted| match wanted {
            true => held.bring(backend).map(Some),
            false => Ok(None),
        };
        Ok(Parts {
            hidden: wanted(&self.hidden, reads != Reads::Input)?,
            input: wanted(&self.input, reads != Reads::Hidden)?,
        })
    }
}

impl Placement {
    /// Keeps as many of `tiles` tiles of `rows` tokens as fit beside what solving a layer needs.
    /// `size` is the bytes of one activation.
    fn choose(
        memory: Option<Memory>,
        config: &ModelConfig,
        (tiles, rows): (usize, usize),
        size: usize,
    ) -> Self {
        let linears = layout::linears(config);
        let widest = linears.iter().map(|linear| linear.in_features).max().unwrap_or(0);
        let tile = rows * size * (config.hidden_size + widest);
        let bytes = tiles * tile;
        let Some(memory) = memory else {
            return Self { tiles, on_device: tiles, bytes };
        };
        let left = memory.available.saturating_sub(memory.used + working_set(config, rows, size));
        Self { tiles, on_device: tiles.min(left / tile.max(1)), bytes }
    }
}

/// Bytes that one layer needs while it is solved, beside the activations that wait: an upper bound.
fn working_set(config: &ModelConfig, rows: usize, size: usize) -> usize {
    let linears = layout::linears(config);
    let weights = |stage: Stage| -> usize {
        linears.iter().filter(|l| l.stage == stage).map(|l| l.out_features * l.in_features).sum()
    };
    let outputs =
        |stage: Stage| -> usize { linears.iter().filter(|l| l.stage == stage).map(|l| l.out_features).sum() };
    let stages = Stage::ALL.into_iter();
    let largest = stages.clone().map(weights).max().unwrap_or(0);
    let all: usize = stages.clone().map(weights).sum();
    let widest_output = stages.map(outputs).max().unwrap_or(0);
    let widest = linears.iter().map(|linear| linear.in_features).max().unwrap_or(0);
    // The product and what follows it, with the tiles before and after, coming and leaving.
    let moving = rows * size * (2 * widest_output + 4 * (config.hidden_size + widest));
    // A Hessian, its reversal, the factor, and what inverting takes.
    let solver = 4 * 4 * widest * widest;
    // f32 weights, codes in two orders, and two stages read ahead; f32 errors of 128 columns.
    let sweep = largest * (4 + 2) + 2 * 4 * largest + 4 * 128 * widest_output;
    // The layer dequantized, and packed layers on their way to the writer.
    let layer = all * size + 3 * all;
    (moving + solver + sweep + layer) * 11 / 10
}
