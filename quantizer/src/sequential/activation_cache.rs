//! The activations of all calibration tokens: on the device as far as they fit, the rest in host memory.

use gptq_kernels::{Backend, Batch, Memory};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout::{self, Stage};
use gptq_runtime::model::{self, ModelFiles};

use crate::{Error, Result};

/// Tokens of one chunk, if sequences are shorter.
const CHUNK_TOKENS: usize = 2048;

/// One sequence in so many is held out.
const HELD_OUT: usize = 8;

/// A tensor on the device or out of its way.
#[derive(Clone)]
enum Held<B: Backend> {
    Here(B::Tensor),
    Offloaded(B::Offloaded),
    /// On its way through a pass that writes it anew.
    Taken,
}

impl<B: Backend> Held<B> {
    fn keep(backend: &B, tensor: B::Tensor, stays: bool) -> Result<Self> {
        Ok(match stays {
            true => Self::Here(tensor),
            false => Self::Offloaded(backend.offload(&tensor)?),
        })
    }

    fn bring(&self, backend: &B) -> Result<B::Tensor> {
        match self {
            Self::Here(tensor) => Ok(tensor.clone()),
            Self::Offloaded(offloaded) => Ok(backend.fetch(offloaded)?),
            Self::Taken => Err(Error::invalid("activations", "a pass that failed has not given them back")),
        }
    }
}

/// Several whole sequences that advance together.
#[derive(Clone)]
struct Chunk<B: Backend> {
    batch: Batch,
    /// On the device, all the time.
    stays: bool,
    /// Kept out of what stages are solved with.
    held_out: bool,
    /// Of each stream.
    streams: Vec<Activations<B>>,
}

/// A chunk's part of one stream: what one model has made of its tokens so far.
#[derive(Clone)]
struct Activations<B: Backend> {
    /// `[tokens, hidden]`, the residual stream.
    hidden: Held<B>,
    /// `[tokens, in]` of the next stage.
    input: Held<B>,
}

/// All chunks of a calibration set. A clone shares the activations as long as neither moves on, which is how
/// several branches start from the same embedded tokens.
#[derive(Clone)]
pub struct ActivationCache<B: Backend> {
    chunks: Vec<Chunk<B>>,
    layout: Layout,
    placement: Placement,
}

/// What a walk wants of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The quantized stream, and perhaps the unquantized one after it.
    pub streams: usize,
    /// Sequences to judge by, in chunks of their own after the others.
    pub holds_out: bool,
}

/// Where the activations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub chunks: usize,
    /// ActivationCache that stay on the device; the others are in host memory between two uses.
    pub on_device: usize,
    /// Bytes of all activations.
    pub bytes: usize,
}

/// A chunk's tensors of one stream on the device, as far as a pass reads or writes them.
pub(super) struct Parts<T> {
    pub hidden: Option<T>,
    pub input: Option<T>,
}

/// A chunk on its way through a pass.
pub(super) struct Passing<'a> {
    pub batch: &'a Batch,
    pub held_out: bool,
}

/// What happens to a chunk: of each stream, what is read becomes what is written.
type Step<'a, T> = dyn FnMut(Passing, Vec<Parts<T>>) -> Result<Vec<Parts<T>>> + 'a;

/// What a pass does to the activations.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    pub reads: Touched,
    /// Where the hidden state alone is written, it is the input too.
    pub writes: Touched,
    /// Leaves all others where they are.
    pub held_out_only: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Touched {
    Hidden,
    Input,
    Both,
    Nothing,
}

impl Touched {
    fn hidden(self) -> bool {
        matches!(self, Self::Hidden | Self::Both)
    }

    fn input(self) -> bool {
        matches!(self, Self::Input | Self::Both)
    }
}

impl Layout {
    /// Sequences that solving does not see, of `count`: every eighth, or the last where there are fewer.
    pub fn held_out(&self, count: usize) -> usize {
        (0..count).filter(|i| self.is_held_out(*i, count)).count()
    }

    fn is_held_out(&self, i: usize, count: usize) -> bool {
        self.holds_out && (i % HELD_OUT == HELD_OUT - 1 || count < HELD_OUT && i + 1 == count)
    }
}

impl<B: Backend> ActivationCache<B> {
    /// The embedded tokens, before layer 0.
    ///
    /// # Errors
    /// A single sequence where some are to be held out.
    pub fn embed(backend: &B, files: &ModelFiles, sequences: &[Vec<u32>], layout: Layout) -> Result<Self> {
        if layout.holds_out && sequences.len() == 1 {
            let problem = "expected two sequences or more, of which one is held out to judge by, got 1 \
                           (--target none --rounds 0 need none)";
            return Err(Error::invalid("calibration", problem));
        }
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let together = (CHUNK_TOKENS / longest.max(1)).max(1);
        let parts = [false, true].map(|wanted| {
            let of = |(i, ids)| (layout.is_held_out(i, sequences.len()) == wanted).then_some(ids);
            (wanted, sequences.iter().enumerate().filter_map(of).collect::<Vec<&Vec<u32>>>())
        });
        let groups: Vec<(bool, &[&Vec<u32>])> = parts
            .iter()
            .flat_map(|(held_out, part)| part.chunks(together).map(|group| (*held_out, group)))
            .collect();
        let rows = groups.iter().map(|(_, group)| group.iter().map(|ids| ids.len()).sum()).max().unwrap_or(0);
        let size = backend.element_size();
        let placement =
            Placement::choose(backend.memory()?, &files.config, (groups.len(), rows), size, layout);
        let mut chunks = Vec::with_capacity(groups.len());
        if !groups.is_empty() {
            let embedding = model::embedding(backend, files)?;
            for (i, (held_out, group)) in groups.iter().enumerate() {
                let stays = i < placement.on_device;
                let ids: Vec<u32> = group.iter().flat_map(|ids| ids.iter()).copied().collect();
                let rows = backend.embedding(&embedding, &ids)?;
                let hidden = Held::keep(backend, model::scaled(backend, &files.config, rows)?, stays)?;
                let one = || Activations { hidden: hidden.clone(), input: hidden.clone() };
                let streams = (0..layout.streams).map(|_| one()).collect();
                let batch = Batch::fresh(group.iter().map(|ids| ids.len()));
                chunks.push(Chunk { batch, stays, held_out: *held_out, streams });
            }
        }
        Ok(Self { chunks, layout, placement })
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Takes every chunk through `step`; meanwhile the next one is on its way to the device.
    pub(super) fn each(&mut self, backend: &B, pass: Pass, step: &mut Step<B::Tensor>) -> Result<()> {
        let mut chunks: Vec<_> =
            self.chunks.iter_mut().filter(|chunk| chunk.held_out || !pass.held_out_only).collect();
        let mut coming = chunks.first_mut().map(|chunk| chunk.bring(backend, pass)).transpose()?;
        for i in 0..chunks.len() {
            let Some(parts) = coming else { break };
            coming = chunks.get_mut(i + 1).map(|chunk| chunk.bring(backend, pass)).transpose()?;
            let passing = Passing { batch: &chunks[i].batch, held_out: chunks[i].held_out };
            let written = step(passing, parts)?;
            chunks[i].keep(backend, pass.writes, written)?;
        }
        Ok(())
    }
}

impl<B: Backend> Chunk<B> {
    /// What the pass reads. The residual stream is given away where it is written too, so that it can be written in place.
    fn bring(&mut self, backend: &B, pass: Pass) -> Result<Vec<Parts<B::Tensor>>> {
        let bring = |held: &Held<B>, wanted: bool| wanted.then(|| held.bring(backend)).transpose();
        let parts = |activations: &mut Activations<B>| {
            let input = bring(&activations.input, pass.reads.input())?;
            let hidden = bring(&activations.hidden, pass.reads.hidden())?;
            if pass.reads.hidden() && pass.writes.hidden() {
                activations.hidden = Held::Taken;
            }
            Ok(Parts { hidden, input })
        };
        self.streams.iter_mut().map(parts).collect()
    }

    fn keep(&mut self, backend: &B, writes: Touched, parts: Vec<Parts<B::Tensor>>) -> Result<()> {
        for (activations, parts) in self.streams.iter_mut().zip(parts) {
            if let (true, Some(hidden)) = (writes.hidden(), parts.hidden) {
                activations.hidden = Held::keep(backend, hidden, self.stays)?;
                activations.input = activations.hidden.clone();
            }
            if let (true, Some(input)) = (writes.input(), parts.input) {
                activations.input = Held::keep(backend, input, self.stays)?;
            }
        }
        Ok(())
    }
}

impl Placement {
    /// Keeps as many of `chunks` chunks of `rows` tokens as fit beside what solving a layer needs.
    /// `size` is the bytes of one activation.
    fn choose(
        memory: Option<Memory>,
        config: &ModelConfig,
        (chunks, rows): (usize, usize),
        size: usize,
        layout: Layout,
    ) -> Self {
        let widest = Sizes::of(config).widest_kept;
        let chunk = rows * size * (config.hidden_size + widest) * layout.streams;
        let bytes = chunks * chunk;
        let Some(memory) = memory else {
            return Self { chunks, on_device: chunks, bytes };
        };
        let left = memory.available.saturating_sub(memory.used + working_set(config, rows, size, layout));
        Self { chunks, on_device: chunks.min(left / chunk.max(1)), bytes }
    }
}

/// The largest groups of a model.
struct Sizes {
    /// Weights of one group.
    largest: usize,
    /// Weights of one layer.
    all: usize,
    /// Input and output features.
    widest: usize,
    widest_output: usize,
    /// Input features of what is kept between two stages: not those of experts.
    widest_kept: usize,
}

impl Sizes {
    fn of(config: &ModelConfig) -> Self {
        let mut sizes =
            Self { largest: 0, all: 0, widest: 0, widest_output: 0, widest_kept: config.hidden_size };
        for index in 0..config.num_hidden_layers {
            let mut all = 0;
            for group in layout::layer(config, index).groups {
                let (out, inputs) = group.dims();
                all += out * inputs;
                sizes.largest = sizes.largest.max(out * inputs);
                sizes.widest = sizes.widest.max(inputs);
                sizes.widest_output = sizes.widest_output.max(out);
                if group.role.stage() != Stage::Mixture {
                    sizes.widest_kept = sizes.widest_kept.max(inputs);
                }
            }
            sizes.all = sizes.all.max(all);
        }
        sizes
    }
}

/// Bytes that one layer needs while it is solved, beside the activations that wait: an upper bound.
fn working_set(config: &ModelConfig, rows: usize, size: usize, layout: Layout) -> usize {
    let Sizes { largest, all, widest, widest_output, .. } = Sizes::of(config);
    // The product and what follows it, with the chunks before and after, coming and leaving.
    let moving = rows * size * (2 * widest_output + 4 * (config.hidden_size + widest)) * layout.streams;
    let (apart, judged) = ((layout.streams - 1) * 4, layout.holds_out as usize * 4);
    // A Hessian, its reversal (then the factor), the inverse, and what inverting takes; the damped Hessian and one of the
    // tokens held out, as it was and in the sweep's order; with a second stream the differences of both, and one in the
    // sweep's order.
    let solver = widest * widest * (4 * 4 + 3 * judged + 3 * apart);
    // The factors of a product in parts.
    let solver = solver + 3 * 4 * 1024 * (widest + widest_output.max(widest));
    // f32 weights, codes in two orders, and two stages read ahead; f32 errors of 512 columns. What is judged and refined:
    // the weights as they were, a copy of the sweep, differences and their product; with a second stream the target, and
    // what pulls towards it for both sets of tokens, with the half of the product.
    let sweep = largest * (4 + 2) + 2 * 4 * largest + 4 * 512 * widest_output;
    let sweep = sweep + largest * (judged * 5 + apart * 4);
    // The layer dequantized, and packed layers on their way to the writer.
    let layer = all * size * layout.streams + 3 * all;
    (moving + solver + sweep + layer) * 11 / 10
}
