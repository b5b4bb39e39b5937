//! One new token a sequence on Hopper: rotation, cache and attention as one kernel.

use cudarc::driver::CudaSlice;

use super::cuda::{Call, Part, Product};
use super::cuda_cache::Kept;
use super::{AttentionShape, KvDtype, check};
use crate::cuda::{Args, BatchMetadata, Cuda, CudaOrder, CudaTensor, Launch, Layout};
use crate::ops::rope;
use crate::{Batch, Device, Dtype, Pairing, Result, RopeShape, SequenceRows};

pub(crate) const PARTS_SOURCE: &str = include_str!("step_parts.cu");
pub(crate) const SOURCE: &str = include_str!("step.cu");
pub(crate) const INT8_SOURCE: &str = include_str!("step_int8.cu");

/// Threads of a block, and blocks of a head at most: as in the kernel.
const THREADS: u32 = 256;
const SPLITS: usize = 8;

/// What the blocks of a head leave for the one that joins it: `struct Shares` of the kernels. Every layer's in turn.
pub(super) struct Shares {
    found: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
}

/// The kernels of one head size and cache, of Llama's attention and of any: for few and for many blocks.
macro_rules! kernels {
    ($suffix:literal) => {
        [
            [concat!("attention_step_", $suffix), concat!("attention_steps_", $suffix)],
            [concat!("attention_step_any_", $suffix), concat!("attention_steps_any_", $suffix)],
        ]
    };
}

fn kernels_for(head_dim: usize, dtype: KvDtype, plain: bool) -> Option<[&'static str; 2]> {
    let [of_llama, of_any] = match (head_dim, dtype) {
        (16, KvDtype::Auto) => kernels!("16"),
        (16, KvDtype::Int8) => kernels!("int8_16"),
        (32, KvDtype::Auto) => kernels!("32"),
        (32, KvDtype::Int8) => kernels!("int8_32"),
        (64, KvDtype::Auto) => kernels!("64"),
        (64, KvDtype::Int8) => kernels!("int8_64"),
        (128, KvDtype::Auto) => kernels!("128"),
        (128, KvDtype::Int8) => kernels!("int8_128"),
        _ => return None,
    };
    Some(if plain { of_llama } else { of_any })
}

/// Whether this is Llama's attention, with nothing that other families add.
fn is_plain<T>(rope: &RopeShape<T>, shape: &AttentionShape) -> bool {
    rope.turned == rope.head_dim
        && rope.pairing == Pairing::Halves
        && rope.stretch == 1.0
        && rope.query_growth.is_none()
        && shape.soft_cap.is_none()
}

impl Cuda {
    /// The kernel, where there is one and each of the sequences has one new row. It knows one table of frequencies.
    pub(super) fn step_kernel(
        &self,
        sequences: &[SequenceRows],
        (rope, shape): (&RopeShape<CudaTensor>, &AttentionShape),
        dtype: KvDtype,
    ) -> Option<&'static str> {
        let possible = self.is_hopper() && self.dtype() != Dtype::F32 && self.shape(&rope.inv_freq).0 == 1;
        let one_each = sequences.iter().all(|sequence| sequence.rows == 1);
        let kernels = kernels_for(shape.head_dim, dtype, is_plain(rope, shape));
        let kernels = kernels.filter(|_| possible && one_each)?;
        let many = shape.heads * sequences.len() > self.step_blocks();
        Some(kernels[usize::from(many)])
    }

    /// Blocks of the kernel for few of them that run at a time.
    fn step_blocks(&self) -> usize {
        2 * self.multiprocessors()
    }

    /// Blocks that share the keys of a head: as many as fill the GPU, whatever the context, so that a captured
    /// step fits them all.
    fn step_splits(&self, sequences: usize, shape: &AttentionShape) -> usize {
        (self.step_blocks() / (shape.heads * sequences)).clamp(1, SPLITS)
    }

    /// Room for the shares of all heads, where there are several of one.
    pub(super) fn step_shares(&self, head_dim: usize) -> Result<Shares> {
        let blocks = self.step_blocks();
        Ok(Shares { found: self.zeros(blocks * (head_dim + 2))?, arrived: self.zeros(blocks)? })
    }

    /// All sequences of a batch.
    pub(super) fn attention_step(
        &self,
        kernel: &'static str,
        product: Product,
        batch: &Batch,
        shape: &AttentionShape,
        order: Option<&CudaOrder>,
    ) -> Result<CudaTensor> {
        rope::check(self, product.qkv, batch, product.rope)?;
        let (rows, width) = (batch.rows(), shape.heads * shape.head_dim);
        let kv = (rows, shape.kv_heads * shape.head_dim);
        check([(rows, width), kv, kv], batch, shape, Some(&product.cache.shape))?;
        let metadata = self.metadata(batch)?;
        let (y, layout) = self.new_tensor_in((rows, width), order)?;
        let whole = Part { sequences: 0..rows, row: 0 };
        self.step(kernel, product, (&metadata, &whole), shape, (self.values(&y)?, layout))?;
        Ok(y)
    }

    /// Those of a batch's sequences that have one new row, neighbours, while others have more.
    pub(super) fn step_of_part(
        &self,
        kernel: &'static str,
        product: Product,
        call: &Call,
        part: &Part,
    ) -> Result<()> {
        let plain = Layout::of(self, None, part.sequences.len());
        self.step(kernel, product, (call.metadata, part), call.shape, (self.real(call.y)?, plain))
    }

    /// y: that of the batch's first row
    fn step(
        &self,
        kernel: &'static str,
        Product { qkv, rope, cache }: Product,
        (metadata, part): (&BatchMetadata, &Part),
        shape: &AttentionShape,
        (y, layout): (u64, Layout),
    ) -> Result<()> {
        let first = |address: u64, width: usize| address + (part.row * width * self.dtype().size()) as u64;
        let (q_norm, k_norm, eps) = match &rope.norms {
            Some(norms) => (self.real(&norms.q)?, self.real(&norms.k)?, norms.eps),
            None => (0, 0, 0.0),
        };
        let growth = rope.query_growth.unwrap_or(rope::NO_GROWTH);
        let (y, qkv) = (first(y, shape.heads * shape.head_dim), first(self.real(qkv)?, self.shape(qkv).1));
        let args = match &cache.kept {
            Kept::Real(real) => Args::new([y, qkv]).addresses(real.addresses(self)),
            Kept::Codes(codes) => Args::new([y, qkv]).and(codes.arg(self)),
        };
        let args = args
            .and(metadata.batch(self, part.sequences.start, true))
            .addresses([self.wide(&rope.inv_freq)?, q_norm, k_norm, layout.places])
            .ints([shape.heads, shape.kv_heads, shape.window.unwrap_or(0)])
            .floats([eps, shape.scale])
            .ints([layout.panel_tokens])
            .addresses([self.address(&cache.shares.found), self.address(&cache.shares.arrived)])
            .ints([rope.turned, usize::from(rope.pairing == Pairing::Neighbours)])
            .floats([rope.stretch, growth.beta])
            .ints([growth.original])
            .floats([shape.soft_cap.unwrap_or(0.0)]);
        let sequences = part.sequences.len();
        let launch = Launch::grid(shape.heads, self.step_splits(sequences, shape), sequences, THREADS);
        self.launch(kernel, launch.early().mostly_shared(), &args)
    }
}
