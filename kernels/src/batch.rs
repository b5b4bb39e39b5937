//! Which rows of an activation tensor belong to which sequence.

/// Rows of one block of a paged KV cache.
pub const KV_BLOCK_ROWS: usize = 16;

/// One sequence's part of a batch: `rows` consecutive rows that continue after `context` earlier tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// Rows of this sequence in the batch.
    pub rows: usize,
    /// Tokens of this sequence that are already in the KV cache.
    pub context: usize,
    /// The sequence's KV blocks in order, `KV_BLOCK_ROWS` rows each; empty when no cache is used.
    pub blocks: Vec<u32>,
}

/// Several sequences end to end: calibration, perplexity, prefill and batched decode are all this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub sequences: Vec<SequenceRows>,
}

impl Batch {
    /// Fresh sequences of the given lengths, without a cache.
    pub fn fresh(lengths: impl IntoIterator<Item = usize>) -> Self {
        let sequences =
            lengths.into_iter().map(|rows| SequenceRows { rows, context: 0, blocks: Vec::new() }).collect();
        Self { sequences }
    }

    /// Rows of all sequences.
    pub fn rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows).sum()
    }

    /// The position of every row inside its own sequence.
    pub fn positions(&self) -> Vec<u32> {
        self.sequences.iter().flat_map(|s| s.context as u32..(s.context + s.rows) as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_in_each_sequence_and_go_on_after_the_context() {
        let mut batch = Batch::fresh([2, 3]);
        batch.sequences[1].context = 5;
        assert_eq!(batch.positions(), [0, 1, 5, 6, 7]);
        assert_eq!(batch.rows(), 5);
    }
}
