//! The block manager: which blocks of the KV cache are free.

use gptq_kernels::KV_BLOCK_ROWS;

/// Hands out the blocks of a cache of fixed size.
pub struct Blocks {
    free: Vec<u32>,
    total: usize,
}

impl Blocks {
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), total }
    }

    /// Lets `blocks` cover `tokens` tokens. `false`, and nothing is taken, where too few are free.
    pub fn grow(&mut self, blocks: &mut Vec<u32>, tokens: usize) -> bool {
        let missing = tokens.div_ceil(KV_BLOCK_ROWS).saturating_sub(blocks.len());
        if missing > self.free.len() {
            return false;
        }
        blocks.extend(self.free.drain(self.free.len() - missing..));
        true
    }

    /// Takes all of `blocks` back.
    pub fn release(&mut self, blocks: &mut Vec<u32>) {
        self.free.append(blocks);
    }

    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_held_once_and_come_back() {
        let mut manager = Blocks::new(4);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(manager.grow(&mut a, 17) && manager.grow(&mut b, 32));
        assert_eq!((a.len(), b.len(), manager.used()), (2, 2, 4));
        assert!(a.iter().all(|block| !b.contains(block)));
        assert!(manager.grow(&mut a, 32), "no further block is needed");
        assert!(!manager.grow(&mut a, 33));
        assert_eq!(a.len(), 2, "a refusal takes nothing");
        manager.release(&mut b);
        assert!(manager.grow(&mut a, 33));
    }
}
