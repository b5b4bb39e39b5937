//! Which sequences take part in the next step. First come, first served.

use std::collections::VecDeque;

use gptq_kernels::{Batch, SequenceRows};

use super::blocks::Blocks;
use super::sequence::Sequence;

/// Waiting and running sequences, each in order of arrival.
pub(super) struct Scheduler {
    pub waiting: VecDeque<Sequence>,
    pub running: Vec<Sequence>,
    pub blocks: Blocks,
    /// Prompt tokens of one step.
    prefill: usize,
    max_running: usize,
}

/// One forward pass.
#[derive(Default)]
pub(super) struct Step {
    pub ids: Vec<u32>,
    pub batch: Batch,
    /// Rows whose logits are wanted, and the running sequences they belong to.
    pub rows: Vec<u32>,
    pub ready: Vec<usize>,
}

impl Scheduler {
    pub fn new(blocks: usize, prefill: usize, max_running: usize) -> Self {
        let (waiting, running) = (VecDeque::new(), Vec::new());
        Self { waiting, running, blocks: Blocks::new(blocks), prefill, max_running }
    }

    /// Drops what nobody waits for any more.
    pub fn drop_cancelled(&mut self) {
        self.waiting.retain(|sequence| !sequence.is_cancelled());
        self.finish(|sequence| sequence.is_cancelled());
    }

    /// Takes running sequences out and frees their blocks.
    pub fn finish(&mut self, done: impl Fn(&Sequence) -> bool) {
        for sequence in self.running.iter_mut().filter(|sequence| done(sequence)) {
            self.blocks.release(&mut sequence.blocks);
        }
        self.running.retain(|sequence| !done(sequence));
    }

    /// Takes out the running sequences marked in `done`.
    pub fn remove(&mut self, done: &[bool]) {
        for (sequence, _) in self.running.iter_mut().zip(done).filter(|(_, done)| **done) {
            self.blocks.release(&mut sequence.blocks);
        }
        let mut done = done.iter();
        self.running.retain(|_| done.next() != Some(&true));
    }

    /// The next step: one row for each sequence that decodes, and prompt chunks as far as the budget goes.
    pub fn next(&mut self) -> Step {
        let mut step = Step::default();
        let mut budget = self.prefill;
        let mut i = 0;
        while i < self.running.len() {
            let rows = self.rows(&self.running[i], budget);
            if rows > 0 && !self.make_room(i, rows) {
                break;
            }
            budget -= if self.running[i].pending() > 1 { rows } else { 0 };
            step.push(&mut self.running[i], i, rows);
            i += 1;
        }
        while self.running.len() < self.max_running && budget > 0 {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            let rows = sequence.pending().min(budget);
            if !self.blocks.grow(&mut sequence.blocks, rows) {
                self.waiting.push_front(sequence);
                break;
            }
            budget -= rows;
            step.push(&mut sequence, self.running.len(), rows);
            self.running.push(sequence);
        }
        step
    }

    fn rows(&self, sequence: &Sequence, budget: usize) -> usize {
        match sequence.pending() {
            1 => 1,
            pending => pending.min(budget),
        }
    }

    /// Finds blocks for a running sequence; younger ones give theirs up and start over later. `false` where
    /// the sequence itself had to.
    fn make_room(&mut self, i: usize, rows: usize) -> bool {
        let length = self.running[i].context + rows;
        while !self.blocks.grow(&mut self.running[i].blocks, length) {
            let Some(mut youngest) = self.running.pop() else { return false };
            self.blocks.release(&mut youngest.blocks);
            youngest.context = 0;
            self.waiting.push_front(youngest);
            if self.running.len() == i {
                return false;
            }
        }
        true
    }
}

impl Step {
    /// Adds the next `rows` tokens of a sequence and counts them as done.
    fn push(&mut self, sequence: &mut Sequence, index: usize, rows: usize) {
        if rows == 0 {
            return;
        }
        let range = sequence.context..sequence.context + rows;
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
