//! Which sequences take part in the next step. First come, first served.

use std::collections::VecDeque;

use gptq_kernels::{Batch, KV_BLOCK_ROWS, SequenceRows};

use super::blocks::Blocks;
use super::executor::Continued;
use super::limits::{PrefillLimits, UNSPLIT};
use super::sequence::Sequence;

/// Waiting and running sequences, each in order of arrival.
pub(super) struct Scheduler {
    pub waiting: VecDeque<Sequence>,
    pub running: Vec<Sequence>,
    pub blocks: Blocks,
    prefill: PrefillLimits,
    max_running: usize,
    prefix_cache: bool,
}

/// One forward pass.
#[derive(Default)]
pub(super) struct Step {
    pub ids: Vec<u32>,
    pub batch: Batch,
    /// Rows whose logits are wanted, and the running sequences they belong to.
    pub rows: Vec<u32>,
    pub ready: Vec<usize>,
    /// Rows of prompts whose probabilities are wanted, and the running sequences they belong to.
    pub continued: Vec<(usize, Continued)>,
    /// Tokens that new sequences found in the cache.
    pub cached: usize,
    /// Sequences that gave up their blocks.
    pub preempted: usize,
}

impl Scheduler {
    pub fn new(blocks: usize, prefill: PrefillLimits, max_running: usize, prefix_cache: bool) -> Self {
        let (waiting, running) = (VecDeque::new(), Vec::new());
        Self { waiting, running, blocks: Blocks::new(blocks), prefill, max_running, prefix_cache }
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Drops sequences whose receivers are gone.
    pub fn drop_cancelled(&mut self) {
        self.waiting.retain(|sequence| !sequence.is_cancelled());
        let done: Vec<_> = self.running.iter().map(Sequence::is_cancelled).collect();
        self.remove(&done);
    }

    /// Takes out the running sequences marked in `done`.
    pub fn remove(&mut self, done: &[bool]) {
        for (sequence, _) in self.running.iter_mut().zip(done).filter(|(_, done)| **done) {
            self.blocks.release(&mut sequence.blocks);
        }
        let mut done = done.iter();
        self.running.retain(|_| done.next() != Some(&true));
    }

    /// To be called after a step was asked for: its full blocks can serve other sequences. A block without a name is
    /// never found.
    pub fn cache_full_blocks(&mut self) {
        if !self.prefix_cache {
            return;
        }
        for sequence in &mut self.running {
            let done = &sequence.ids[..sequence.context.min(sequence.ids.len())];
            self.blocks.cache(done, &sequence.blocks, &mut sequence.prefix);
        }
    }

    /// The next step: one row for each sequence that decodes, and prompt chunks as far as the budget goes.
    pub fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        let mut budget = self.budget();
        let mut i = 0;
        while i < self.running.len() {
            let rows = budget.rows(self.running[i].pending());
            if rows > 0 && !self.grow_or_preempt(i, rows, &mut step) {
                break;
            }
            budget.take(self.running[i].pending(), rows);
            step.push(&mut self.running[i], i, rows);
            i += 1;
        }
        while self.running.len() < self.max_running && budget.all > 0 {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            if !self.admit(&mut sequence) {
                self.waiting.push_front(sequence);
                break;
            }
            step.cached += sequence.context;
            let rows = budget.rows(sequence.pending());
            budget.take(sequence.pending(), rows);
            step.push(&mut sequence, self.running.len(), rows);
            self.running.push(sequence);
        }
        step
    }

    /// The batch of a step for the tokens after those that `serials`' sequences are getting; `None` where other things
    /// come first: a waiting sequence may be admitted, or one needs to be looked at before.
    pub fn schedule_ahead(&mut self, serials: &[u64]) -> Option<Batch> {
        let may_come = !self.waiting.is_empty() && self.running.len() < self.max_running;
        let all = self.running.iter().map(|sequence| &sequence.serial).eq(serials);
        if may_come || !all || !self.running.iter().all(Sequence::is_predictable) {
            return None;
        }
        for sequence in &mut self.running {
            // A block that was taken already is needed for the next step in any case.
            if !self.blocks.grow(&mut sequence.blocks, sequence.context + 1) {
                return None;
            }
        }
        let rows = |sequence: &mut Sequence| {
            let (context, blocks) = (sequence.context, sequence.blocks.clone());
            sequence.context += 1;
            SequenceRows { rows: 1, context, blocks }
        };
        Some(Batch { sequences: self.running.iter_mut().map(rows).collect() })
    }

    /// Sequences that decode take their rows out of the chunks: a pass of a little more than `beside` rows would take as
    /// long as one with the next tile of rows filled.
    fn budget(&self) -> Budget {
        let PrefillLimits { alone, beside } = self.prefill;
        match self.running.iter().filter(|sequence| sequence.pending() == 1).count() {
            0 => Budget { all: alone, long: usize::MAX, chunks: alone },
            decodes => {
                let chunks = beside.saturating_sub(decodes).max(beside.div_ceil(2));
                Budget { all: alone, long: beside.min(UNSPLIT), chunks }
            }
        }
    }

    /// Gives a new sequence blocks for all it has, what is cached among them. Running sequences keep room for one more
    /// block each, or the new sequence would be preempted at once.
    fn admit(&mut self, sequence: &mut Sequence) -> bool {
        let tokens = sequence.ids.len();
        (sequence.blocks, sequence.prefix) = self.blocks.reuse(sequence.reusable());
        sequence.context = sequence.blocks.len() * KV_BLOCK_ROWS;
        let needed = tokens.div_ceil(KV_BLOCK_ROWS) - sequence.blocks.len();
        let fits = needed + self.running.len() <= self.blocks.free();
        if fits && self.blocks.grow(&mut sequence.blocks, tokens) {
            sequence.start();
            return true;
        }
        self.release(sequence);
        false
    }

    /// Gives all blocks of a sequence back: it will be computed again.
    fn release(&mut self, sequence: &mut Sequence) {
        self.blocks.release(&mut sequence.blocks);
        (sequence.context, sequence.prefix) = Default::default();
    }

    /// Finds blocks for a running sequence; preempts younger ones for them, which are computed again later. `false` where
    /// the sequence itself was preempted.
    fn grow_or_preempt(&mut self, i: usize, rows: usize, step: &mut Step) -> bool {
        let length = self.running[i].context + rows;
        while !self.blocks.grow(&mut self.running[i].blocks, length) {
            let Some(mut youngest) = self.running.pop() else { return false };
            self.release(&mut youngest);
            self.waiting.push_front(youngest);
            step.preempted += 1;
            if self.running.len() == i {
                return false;
            }
        }
        true
    }
}

/// Prompt tokens that a step may still take.
struct Budget {
    all: usize,
    /// A prompt with more tokens to compute is a long one,
    long: usize,
    /// and all long ones together take so many.
    chunks: usize,
}

impl Budget {
    /// Rows of a sequence with so many tokens to compute. A single one is its next token, and free.
    fn rows(&self, pending: usize) -> usize {
        match pending {
            1 => 1,
            short if short <= self.long => short.min(self.all),
            long => long.min(self.chunks).min(self.all),
        }
    }

    fn take(&mut self, pending: usize, rows: usize) {
        self.all -= if pending > 1 { rows } else { 0 };
        self.chunks -= if pending > self.long { rows } else { 0 };
    }
}

impl Step {
    /// Adds the next `rows` tokens of a sequence and counts them as done.
    fn push(&mut self, sequence: &mut Sequence, index: usize, rows: usize) {
        if rows == 0 {
            return;
        }
        let range = sequence.context..sequence.context + rows;
        if let Some(places) = sequence.unknown(range.start, range.end) {
            let first = self.ids.len() + places.start - range.start;
            let rows = first..first + places.len();
            let next = sequence.ids[places.start + 1..places.end + 1].to_vec();
            self.continued.push((index, Continued { rows, next, top_n: sequence.top_n() }));
        }
        self.ids.extend_from_slice(&sequence.ids[range]);
        let (context, blocks) = (sequence.context, sequence.blocks.clone());
        self.batch.sequences.push(SequenceRows { rows, context, blocks });
        sequence.context += rows;
        if sequence.pending() == 0 {
            self.rows.push(self.ids.len() as u32 - 1);
            self.ready.push(index);
        }
    }
}
