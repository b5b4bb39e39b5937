//! The block manager: which blocks of the KV cache are free, and which hold the beginning of a known text.

use std::collections::{BTreeSet, HashMap};

use gptq_kernels::KV_BLOCK_ROWS;

/// Hands out the blocks of a cache of fixed size. A full block keeps its content until its room is needed, and a
/// sequence that begins with the same tokens takes it instead of computing it.
pub struct Blocks {
    /// Those without content first, then the ones that were given back longest ago.
    free: BTreeSet<Free>,
    slots: Vec<Slot>,
    known: HashMap<Content, u32>,
    /// Blocks given back, and texts cached, so far.
    clock: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Free {
    /// 0 for a block without content.
    since: u64,
    block: u32,
}

#[derive(Default)]
struct Slot {
    holders: usize,
    /// Where in `free` it stands.
    since: u64,
    cached: Option<Cached>,
}

struct Cached {
    content: Content,
    hash: PrefixHash,
}

/// What a full block holds: its tokens and everything before them. Compared whole, so no two texts are mistaken
/// for one another.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Content {
    before: PrefixHash,
    ids: [u32; KV_BLOCK_ROWS],
}

/// What stands for all tokens up to the end of a cached block, as a hash of them would; but it is a number that is used
/// once, so that it cannot collide. The default is the empty prefix.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct PrefixHash(u64);

/// How far a sequence's blocks are cached.
#[derive(Default)]
pub struct CachedPrefix {
    blocks: usize,
    end: PrefixHash,
}

impl Blocks {
    pub fn new(total: usize) -> Self {
        let free = (0..total as u32).map(|block| Free { since: 0, block }).collect();
        let slots = (0..total).map(|_| Slot::default()).collect();
        Self { free, slots, known: HashMap::new(), clock: 0 }
    }

    /// Lets `blocks` cover `tokens` tokens. `false`, and nothing is taken, where too few are free.
    pub fn grow(&mut self, blocks: &mut Vec<u32>, tokens: usize) -> bool {
        let missing = tokens.div_ceil(KV_BLOCK_ROWS).saturating_sub(blocks.len());
        if missing > self.free.len() {
            return false;
        }
        for _ in 0..missing {
            let Some(Free { block, .. }) = self.free.pop_first() else { return false };
            self.forget(block);
            self.slots[block as usize].holders = 1;
            blocks.push(block);
        }
        true
    }

    /// Holds the known blocks that `ids` begin with, but never all of `ids`: one token is left to compute.
    pub fn reuse(&mut self, ids: &[u32]) -> (Vec<u32>, CachedPrefix) {
        let (mut blocks, mut end) = (Vec::new(), PrefixHash::default());
        for ids in ids[..ids.len().saturating_sub(1)].as_chunks().0 {
            let Some(&block) = self.known.get(&Content { before: end, ids: *ids }) else { break };
            let slot = &mut self.slots[block as usize];
            if slot.holders == 0 {
                self.free.remove(&Free { since: slot.since, block });
            }
            slot.holders += 1;
            end = slot.cached.as_ref().map_or(end, |cached| cached.hash);
            blocks.push(block);
        }
        let prefix = CachedPrefix { blocks: blocks.len(), end };
        (blocks, prefix)
    }

    /// Names the full blocks of a sequence, `ids` being the tokens whose keys are in the cache.
    pub fn cache(&mut self, ids: &[u32], blocks: &[u32], prefix: &mut CachedPrefix) {
        let full = ids.as_chunks().0.iter().zip(blocks).skip(prefix.blocks);
        for (ids, &block) in full {
            let content = Content { before: prefix.end, ids: *ids };
            // Two sequences may have computed the same text side by side: one block is enough.
            let known =
                self.known.get(&content).and_then(|&block| self.slots[block as usize].cached.as_ref());
            prefix.end = match known {
                Some(cached) => cached.hash,
                None => {
                    self.clock += 1;
                    let hash = PrefixHash(self.clock);
                    self.known.insert(content.clone(), block);
                    self.slots[block as usize].cached = Some(Cached { content, hash });
                    hash
                }
            };
            prefix.blocks += 1;
        }
    }

    /// Takes all of `blocks` back. Their last ones will be overwritten first, since a text is found from its
    /// beginning.
    pub fn release(&mut self, blocks: &mut Vec<u32>) {
        for block in blocks.drain(..).rev() {
            let slot = &mut self.slots[block as usize];
            slot.holders -= 1;
            if slot.holders == 0 {
                self.clock += 1;
                slot.since = if slot.cached.is_some() { self.clock } else { 0 };
                self.free.insert(Free { since: slot.since, block });
            }
        }
    }

    /// Forgets what every block holds.
    pub fn forget_all(&mut self) {
        (0..self.slots.len() as u32).for_each(|block| self.forget(block));
    }

    fn forget(&mut self, block: u32) {
        if let Some(cached) = self.slots[block as usize].cached.take() {
            self.known.remove(&cached.content);
        }
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: u32) -> Vec<u32> {
        (0..n).collect()
    }

    /// A sequence over `ids` whose keys are all computed.
    fn computed(manager: &mut Blocks, ids: &[u32]) -> Vec<u32> {
        let (mut blocks, mut prefix) = manager.reuse(ids);
        assert!(manager.grow(&mut blocks, ids.len()));
        manager.cache(ids, &blocks, &mut prefix);
        blocks
    }

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

    #[test]
    fn full_blocks_of_the_same_beginning_are_shared_and_the_one_being_written_is_not() {
        let mut manager = Blocks::new(8);
        let mut first = computed(&mut manager, &ids(40));
        let mut second = computed(&mut manager, &ids(40));
        assert_eq!(first[..2], second[..2]);
        assert_ne!(first[2], second[2]);
        assert_eq!(manager.reuse(&ids(32)).0, first[..1], "the last token is always computed");
        let mut other = ids(40);
        other[3] = 7;
        assert!(
            manager.reuse(&other).0.is_empty(),
            "a later block with the same tokens has another text before it"
        );
        manager.release(&mut first);
        assert_eq!(manager.reuse(&ids(40)).0, second[..2], "still held by the second");
        manager.release(&mut second);
    }

    #[test]
    fn content_outlives_its_sequence_until_the_room_is_needed() {
        let mut manager = Blocks::new(4);
        let mut first = computed(&mut manager, &ids(48));
        let blocks = first.clone();
        manager.release(&mut first);
        assert_eq!(manager.used(), 0);
        let mut other = Vec::new();
        assert!(manager.grow(&mut other, 32));
        let (mut again, _) = manager.reuse(&ids(48));
        assert_eq!(again, blocks[..2], "the end of the text went first");
        manager.release(&mut again);
        manager.forget_all();
        assert!(manager.reuse(&ids(48)).0.is_empty());
    }
}
