//! What an engine may take, and how much of a device's memory its cache gets.

use gptq_kernels::{Backend, Device, KV_BLOCK_ROWS, Memory};

use super::scheduler::Scheduler;
use crate::model::Model;
use crate::{Error, Result};

/// What the engine may take.
#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Prompt and new tokens of one sequence.
    pub max_total_tokens: usize,
    pub prefill: PrefillLimits,
    pub cache: CacheSize,
    /// Sequences of one step.
    pub max_running: usize,
    /// A beginning that was computed for one sequence serves the others.
    pub prefix_cache: bool,
}

/// Prompt tokens of one step.
#[derive(Clone, Copy, Debug)]
pub struct PrefillLimits {
    /// Of all prompts.
    pub alone: usize,
    /// Of all long prompts together, and of the sequences that wait for their next token meanwhile: the step takes as much
    /// longer for them. Prompts of up to 512 tokens, or so many where that is less, are not cut, since many short steps
    /// would take longer in all.
    pub beside: usize,
}

/// Longer prompts are cut into chunks while other sequences decode.
pub(super) const UNSPLIT: usize = 512;

impl PrefillLimits {
    /// A processor computes many rows no faster than few, and all sequences wait for the step's end.
    pub const CPU: Self = Self { alone: 512, beside: 128 };
    /// A GPU computes many rows at a time as fast as few, up to a point: chunks of 1536 gain 1 % over these, and delay
    /// tokens by another 6 ms (7B, H200).
    pub const GPU: Self = Self { alone: 4096, beside: 1024 };

    /// What is good for a device: one with memory of its own is a GPU.
    ///
    /// # Errors
    /// Where the device cannot be asked.
    pub fn of<D: Device>(device: &D) -> Result<Self> {
        Ok(if device.memory()?.is_some() { Self::GPU } else { Self::CPU })
    }
}

/// What the KV cache of all sequences holds.
#[derive(Clone, Copy, Debug)]
pub enum CacheSize {
    Tokens(usize),
    /// What is left of this share of the device's memory when the weights and the largest step have theirs, up to what
    /// all sequences of a step can use. On a device without memory of its own four sequences of full length.
    Share(f64),
}

/// Sequences of full length in the cache of a device without memory of its own.
const SEQUENCES_ON_HOST: usize = 4;

impl EngineLimits {
    /// For sequences of up to so many tokens, 128 at a time, with a cache in what is left of nine tenths of the device's
    /// memory.
    ///
    /// # Errors
    /// Where the device cannot be asked.
    pub fn new<B: Backend>(model: &Model<B>, max_total_tokens: usize) -> Result<Self> {
        // Where frequencies depend on a sequence's length, another one's keys do not fit.
        let config = &model.config;
        let by_length = config.rope_scaling.longest_unscaled(config.max_position_embeddings).is_some();
        Ok(Self {
            max_total_tokens,
            prefill: PrefillLimits::of(model.backend())?,
            cache: CacheSize::Share(0.9),
            max_running: 128,
            prefix_cache: !by_length,
        })
    }

    pub(super) fn scheduler(&self, blocks: usize) -> Scheduler {
        let PrefillLimits { alone, beside } = self.prefill;
        let prefill = PrefillLimits { alone: alone.max(1), beside: beside.clamp(1, alone.max(1)) };
        Scheduler::new(blocks, prefill, self.max_running.max(1), self.prefix_cache)
    }

    /// Blocks of one sequence of full length, the fewest that serve.
    pub(super) fn least_blocks(&self) -> usize {
        self.max_total_tokens.div_ceil(KV_BLOCK_ROWS)
    }

    /// Prompts of equal length that make up the largest prefill.
    pub(super) fn largest_prompts(&self, tokens: usize) -> (usize, usize) {
        let longest = self.max_total_tokens.saturating_sub(2).max(1);
        let count = tokens.div_ceil(longest).max(1);
        (count, (tokens / count).clamp(1, longest))
    }

    /// Blocks to begin with: all of them, where their number is known before a step was run.
    /// `own_memory`: the device has memory of its own.
    pub(super) fn first_blocks(&self, own_memory: bool) -> Result<usize> {
        let least = self.least_blocks();
        match self.cache {
            CacheSize::Tokens(tokens) if tokens / KV_BLOCK_ROWS < least => Err(Error::Parameter {
                name: "max_batch_total_tokens",
                expected: "at least max_total_tokens, rounded up to 16",
                got: tokens as f32,
            }),
            CacheSize::Tokens(tokens) => Ok(tokens / KV_BLOCK_ROWS),
            CacheSize::Share(_) if own_memory => Ok(least * self.largest_prompts(self.prefill.alone).0),
            CacheSize::Share(_) => Ok(least * SEQUENCES_ON_HOST),
        }
    }
}

/// Memory of a device before its first cache, of so many blocks, and after.
pub(super) struct CacheMemory {
    pub before: Memory,
    pub after: Memory,
    pub blocks: usize,
}

impl CacheMemory {
    /// Blocks that fit into a share of the memory, as it is when the largest step has run.
    pub fn blocks(&self, memory: Memory, share: f64, limits: &EngineLimits) -> Result<usize> {
        let (before, after) = (self.before.used, self.after.used);
        // One more than was asked for: steps that are filled up write there.
        let block = (after.saturating_sub(before) / (self.blocks + 1)).max(1);
        let step = memory.peak.saturating_sub(after);
        let room = (memory.available as f64 * share) as usize;
        let fits = (room.saturating_sub(before + step) / block).saturating_sub(1);
        let least = limits.least_blocks();
        if fits < least {
            return Err(Error::CacheRoom {
                tokens: limits.max_total_tokens,
                fits: fits * KV_BLOCK_ROWS,
                share,
                available: memory.available,
            });
        }
        Ok(fits.min(least.saturating_mul(limits.max_running.max(1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_prefill_is_as_many_prompts_as_it_takes() {
        let limits = |total| EngineLimits {
            max_total_tokens: total,
            prefill: PrefillLimits { alone: 4096, beside: 512 },
            cache: CacheSize::Share(0.9),
            max_running: 8,
            prefix_cache: true,
        };
        assert_eq!(limits(4096).largest_prompts(4096), (2, 2048));
        assert_eq!(limits(8192).largest_prompts(4096), (1, 4096));
        assert_eq!(limits(100).largest_prompts(4096), (42, 97));
        assert_eq!(limits(2).largest_prompts(1), (1, 1));
    }
}
