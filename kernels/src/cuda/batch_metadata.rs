//! A batch's description on the GPU: made at its first use, kept while the layers of one pass ask for it.

use std::sync::{Arc, PoisonError};

use cudarc::driver::CudaSlice;

use super::{Arg, Cuda};
use crate::{Batch, KV_BLOCK_ROWS, Result, SequenceRows};

/// Everything in one array, in this order.
pub(crate) struct BatchMetadata {
    numbers: CudaSlice<u32>,
    sequences: usize,
    rows: usize,
    /// Whether every sequence has the blocks that its tokens need.
    paged: bool,
}

impl Cuda {
    pub(crate) fn metadata(&self, batch: &Batch) -> Result<Arc<BatchMetadata>> {
        let mut last = self.inner.metadata.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, metadata)) = last.as_ref().filter(|(known, _)| known == batch) {
            return Ok(metadata.clone());
        }
        let metadata = Arc::new(BatchMetadata::new(self, batch)?);
        *last = Some((batch.clone(), metadata.clone()));
        Ok(metadata)
    }
}

impl Cuda {
    /// The batch's description for a captured step alone: the next batch gets another.
    pub(super) fn take_metadata(&self, batch: &Batch) -> Result<Arc<BatchMetadata>> {
        let metadata = self.metadata(batch)?;
        *self.inner.metadata.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(metadata)
    }
}

impl BatchMetadata {
    fn new(gpu: &Cuda, batch: &Batch) -> Result<Self> {
        let (numbers, paged) = Self::numbers(batch);
        let (sequences, rows) = (batch.sequences.len(), batch.rows());
        Ok(Self { numbers: gpu.upload(&numbers)?, sequences, rows, paged })
    }

    /// Describes another batch in the same memory; false where it does not have the same shape.
    pub fn rewrite(&self, gpu: &Cuda, batch: &Batch) -> Result<bool> {
        let (numbers, paged) = Self::numbers(batch);
        let same = (numbers.len(), batch.sequences.len(), batch.rows(), paged)
            == (self.numbers.len(), self.sequences, self.rows, self.paged);
        if same {
            gpu.overwrite(&self.numbers, &numbers)?;
        }
        Ok(same)
    }

    fn numbers(batch: &Batch) -> (Vec<u32>, bool) {
        let sequences = &batch.sequences;
        let paged = sequences.iter().all(|s| s.blocks.len() * KV_BLOCK_ROWS >= s.context + s.rows);
        let starts = |of: &dyn Fn(&SequenceRows) -> usize| -> Vec<u32> {
            sequences.iter().scan(0, |next, s| Some(std::mem::replace(next, *next + of(s) as u32))).collect()
        };
        let slot = |blocks: &[u32], position: usize| {
            blocks[position / KV_BLOCK_ROWS] * KV_BLOCK_ROWS as u32 + (position % KV_BLOCK_ROWS) as u32
        };
        let slots = sequences
            .iter()
            .filter(|_| paged)
            .flat_map(|s| (s.context..s.context + s.rows).map(move |position| slot(&s.blocks, position)));
        let mut numbers = starts(&|s| s.rows);
        numbers.extend(sequences.iter().map(|s| s.rows as u32));
        numbers.extend(sequences.iter().map(|s| s.context as u32));
        numbers.extend(starts(&|s| table_length(s)));
        numbers.extend(batch.positions());
        numbers.extend(slots);
        numbers.extend(sequences.iter().flat_map(table));
        (numbers, paged)
    }

    fn at(&self, gpu: &Cuda, place: usize) -> u64 {
        gpu.address(&self.numbers) + 4 * place as u64
    }

    /// `struct Batch` of the attention kernels, from sequence `first` on.
    pub fn batch(&self, gpu: &Cuda, first: usize, cached: bool) -> Arg {
        let n = self.sequences;
        let table = self.at(gpu, 4 * n + self.rows + if self.paged { self.rows } else { 0 });
        Arg::Batch([
            self.at(gpu, first),
            self.at(gpu, n + first),
            self.at(gpu, 2 * n + first),
            if cached { table } else { 0 },
            self.at(gpu, 3 * n + first),
        ])
    }

    /// Position of every row in its own sequence.
    pub fn positions(&self, gpu: &Cuda) -> u64 {
        self.at(gpu, 4 * self.sequences)
    }

    /// Every row's place in the cache.
    pub fn slots(&self, gpu: &Cuda) -> u64 {
        self.at(gpu, 4 * self.sequences + self.rows)
    }
}

/// A sequence's blocks take room for a multiple of so many: as it grows, a captured step still fits.
const TABLE: usize = 64;

fn table_length(sequence: &SequenceRows) -> usize {
    sequence.blocks.len().next_multiple_of(TABLE)
}

fn table(sequence: &SequenceRows) -> impl Iterator<Item = u32> {
    sequence.blocks.iter().copied().chain(std::iter::repeat(0)).take(table_length(sequence))
}
