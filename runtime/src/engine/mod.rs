//! Many sequences at once over one paged KV cache: continuous batching, chunked prefill, preemption by
//! recomputing. Token ids in, token ids out: text is not known here.

mod blocks;
mod executor;
mod limits;
mod listener;
mod scheduler;
mod sequence;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};

use gptq_kernels::{Backend, KV_BLOCK_ROWS};

use crate::Result;
use crate::model::Model;
use crate::sampling::{SamplingParams, TokenProbability};
use executor::{Executor, LocalExecutor, StepOutput};
use limits::CacheMemory;
pub use limits::{CacheSize, EngineLimits, PrefillLimits};
use listener::Unheard;
pub use listener::{Events, Listener, events};
use scheduler::Scheduler;
use sequence::Sequence;
pub use sequence::{Event, PromptToken, Request, Task, Token};

/// The way to an engine; it ends when it is told to, or when every handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    /// `None` ends the engine.
    requests: Sender<Option<Request>>,
    pub stats: Arc<EngineStats>,
}

/// What the engine is doing, for health and metrics.
#[derive(Default)]
pub struct EngineStats {
    pub ready: AtomicBool,
    pub waiting: AtomicUsize,
    pub running: AtomicUsize,
    pub used_blocks: AtomicUsize,
    pub total_blocks: AtomicUsize,
    pub steps: AtomicU64,
    pub tokens: AtomicU64,
    /// Prompt tokens whose keys were there already.
    pub cached_tokens: AtomicU64,
    /// Times that a sequence gave up its blocks to be computed again.
    pub preemptions: AtomicU64,
}

/// The engine's end of the channel.
pub struct Inbox {
    requests: Receiver<Option<Request>>,
    stats: Arc<EngineStats>,
}

/// A channel to an engine that starts later.
pub fn handle() -> (EngineHandle, Inbox) {
    let (sender, receiver) = channel();
    let stats = Arc::new(EngineStats::default());
    (EngineHandle { requests: sender, stats: stats.clone() }, Inbox { requests: receiver, stats })
}

impl EngineHandle {
    /// Queues a request. `false` where the engine has ended.
    pub fn submit(&self, request: Request) -> bool {
        self.requests.send(Some(request)).is_ok()
    }

    /// Ends the engine after its current step; what still runs hears no more.
    pub fn stop(&self) {
        // An engine that has ended already needs no telling.
        let _ = self.requests.send(None);
    }
}

/// Serves requests until it is told to stop.
///
/// # Errors
/// What keeps it from beginning; later, a device that is lost. By then all waiting requests have been told.
pub fn run<B: Backend>(model: &Model<B>, limits: EngineLimits, inbox: Inbox) -> Result<()> {
    let mut engine = started(LocalExecutor::new(model), limits)?;
    // The first client finds counters at zero and nothing in the cache.
    let blocks = engine.blocks;
    (engine.scheduler, engine.stats) = (limits.scheduler(blocks), inbox.stats);
    engine.stats.total_blocks.store(blocks, Relaxed);
    engine.stats.ready.store(true, Relaxed);
    let tokens = blocks * KV_BLOCK_ROWS;
    tracing::info!(tokens, full_sequences = tokens / limits.max_total_tokens.max(1), "KV cache");
    engine.serve(&inbox.requests)
}

/// An engine that has run its largest step, with a cache of its final size.
fn started<E: Executor>(mut executor: E, limits: EngineLimits) -> Result<Engine<E>> {
    let before = executor.memory()?;
    let blocks = limits.first_blocks(before.is_some())?;
    executor.allocate_cache(blocks)?;
    let cache = before.zip(executor.memory()?).map(|(before, after)| CacheMemory { before, after, blocks });
    let mut engine = Engine::new(executor, limits, blocks);
    engine.warm_up()?;
    let (CacheSize::Share(share), Some(cache)) = (limits.cache, cache) else { return Ok(engine) };
    let Some(memory) = engine.executor.memory()? else { return Ok(engine) };
    let blocks = cache.blocks(memory, share, &limits)?;
    let Engine { mut executor, .. } = engine;
    executor.allocate_cache(blocks)?;
    let mut engine = Engine::new(executor, limits, blocks);
    engine.warm_up()?;
    Ok(engine)
}

struct Engine<E: Executor> {
    executor: E,
    scheduler: Scheduler,
    limits: EngineLimits,
    /// Of the cache.
    blocks: usize,
    stats: Arc<EngineStats>,
    /// Requests so far.
    serial: u64,
    /// Whether a step is scheduled before the tokens that it begins with have been sampled.
    async_scheduling: bool,
    /// A step that was scheduled so.
    next: Option<StepInFlight<E>>,
}

/// A step that the device works on: its tokens are not known yet.
struct StepInFlight<E: Executor> {
    /// The sequences that get one.
    serials: Vec<u64>,
    sampled: E::Sampled,
    /// Alternatives to be reported with each.
    tops: Vec<Vec<TokenProbability>>,
}

impl<E: Executor> Engine<E> {
    fn new(executor: E, limits: EngineLimits, blocks: usize) -> Self {
        let async_scheduling = executor.is_asynchronous();
        let (scheduler, stats) = (limits.scheduler(blocks), Arc::default());
        Self { executor, scheduler, limits, blocks, stats, serial: 0, async_scheduling, next: None }
    }

    fn serve(&mut self, requests: &Receiver<Option<Request>>) -> Result<()> {
        loop {
            if self.scheduler.is_idle() {
                self.report();
                match requests.recv() {
                    Ok(Some(request)) => self.accept(request),
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
            while let Ok(message) = requests.try_recv() {
                match message {
                    Some(request) => self.accept(request),
                    None => return Ok(()),
                }
            }
            if let Err(lost) = self.step() {
                self.give_up(&lost.to_string(), requests);
                return Err(lost);
            }
        }
    }

    /// A prefill and a decoding step, before the server says that it is ready. On a device with memory of its
    /// own it is the largest prefill: kernels are compiled, and memory is seen to suffice. A processor would take
    /// minutes for it and learn nothing.
    fn warm_up(&mut self) -> Result<()> {
        let largest = match self.executor.memory()? {
            Some(_) => self.limits.prefill.alone,
            None => self.limits.prefill.alone.min(KV_BLOCK_ROWS),
        };
        let (count, prompt) = self.limits.largest_prompts(largest);
        let new_tokens = self.limits.max_total_tokens.saturating_sub(prompt).clamp(1, 2);
        // Failures come back as values.
        for first in 0..count as u32 {
            // Prompts that begin alike would be computed once.
            let mut ids = vec![0; prompt];
            ids[0] = first % self.executor.vocab().max(1) as u32;
            let task = Task::new(ids, new_tokens, SamplingParams::greedy());
            self.accept(Request { task, events: Box::new(Unheard) });
        }
        while !self.scheduler.is_idle() {
            self.try_step()?;
        }
        Ok(())
    }

    fn accept(&mut self, request: Request) {
        self.serial += 1;
        let limits = (self.limits.max_total_tokens, self.executor.vocab());
        match Sequence::new(request, self.serial, limits) {
            Ok(sequence) => self.scheduler.waiting.push_back(sequence),
            Err(refused) => refused.events.take(Event::Failed(refused.error.to_string())),
        }
    }

    /// A step that failed ends everything that was running: the cache can no longer be trusted. An error where the device
    /// is lost, and with it every step to come.
    fn step(&mut self) -> Result<()> {
        let Err(error) = self.try_step() else { return Ok(()) };
        tracing::error!(%error, running = self.scheduler.running.len(), "a step failed");
        let message = error.to_string();
        self.next = None;
        self.scheduler.running.iter().for_each(|sequence| sequence.fail(&message));
        self.scheduler.remove(&vec![true; self.scheduler.running.len()]);
        self.scheduler.blocks.forget_all();
        // What breaks a device for good is reported by every later call, waiting included.
        self.executor.synchronize()
    }

    /// Tells all waiting requests that nothing will come.
    fn give_up(&mut self, message: &str, requests: &Receiver<Option<Request>>) {
        self.stats.ready.store(false, Relaxed);
        self.scheduler.waiting.drain(..).for_each(|sequence| sequence.fail(message));
        for request in requests.try_iter().flatten() {
            request.events.take(Event::Failed(message.into()));
        }
        self.report();
    }

    /// Asks for a step, where none is on its way, and for the one after it where that is possible already; then takes the
    /// tokens of the first.
    fn try_step(&mut self) -> Result<()> {
        self.scheduler.drop_cancelled();
        let in_flight = match self.next.take() {
            Some(in_flight) => Some(in_flight),
            None => self.schedule()?,
        };
        self.report();
        self.scheduler.cache_full_blocks();
        let Some(in_flight) = in_flight else { return Ok(()) };
        if self.async_scheduling {
            self.next = self.schedule_ahead(&in_flight)?;
        }
        self.take(in_flight)
    }

    /// The next step; `None` where no sequence gets a token.
    fn schedule(&mut self) -> Result<Option<StepInFlight<E>>> {
        let step = self.scheduler.schedule();
        self.stats.cached_tokens.fetch_add(step.cached as u64, Relaxed);
        self.stats.preemptions.fetch_add(step.preempted as u64, Relaxed);
        if step.ids.is_empty() {
            return Ok(None);
        }
        let running = &mut self.scheduler.running;
        let sampling: Vec<_> = step.ready.iter().map(|i| running[*i].next_sampling()).collect();
        let StepOutput { scores, expected } = self.executor.step(&step, &sampling)?;
        self.stats.steps.fetch_add(1, Relaxed);
        for ((i, _), tokens) in step.continued.iter().zip(expected) {
            if let Some(prompt) = &mut running[*i].expected {
                prompt.extend(tokens);
            }
        }
        let Some(scores) = scores else { return Ok(None) };
        let count = step.ready.iter().map(|i| running[*i].top_n()).max().unwrap_or(0);
        let mut tops = self.executor.top_tokens(&scores, count)?;
        tops.iter_mut().zip(&step.ready).for_each(|(top, i)| top.truncate(running[*i].top_n()));
        let serials = step.ready.iter().map(|i| running[*i].serial).collect();
        Ok(Some(StepInFlight { serials, sampled: self.executor.sample(&scores, &sampling)?, tops }))
    }

    /// Asynchronous scheduling: the step after one whose tokens are being sampled. Results of sequences that turn out to
    /// have ended are discarded, and their KV blocks are overwritten by the next owner.
    fn schedule_ahead(&mut self, in_flight: &StepInFlight<E>) -> Result<Option<StepInFlight<E>>> {
        let Some(batch) = self.scheduler.schedule_ahead(&in_flight.serials) else { return Ok(None) };
        let sampling: Vec<_> = self.scheduler.running.iter_mut().map(Sequence::sampling_ahead).collect();
        let scores = self.executor.step_ahead(&in_flight.sampled, &batch, &sampling)?;
        self.stats.steps.fetch_add(1, Relaxed);
        let (serials, tops) = (in_flight.serials.clone(), vec![Vec::new(); sampling.len()]);
        Ok(Some(StepInFlight { serials, sampled: self.executor.sample(&scores, &sampling)?, tops }))
    }

    /// Waits for the sampled tokens and sends each to its sequence, where that is still running.
    fn take(&mut self, in_flight: StepInFlight<E>) -> Result<()> {
        let tokens = self.executor.sampled_tokens(&in_flight.sampled)?;
        let running = &mut self.scheduler.running;
        let mut done = vec![false; running.len()];
        for ((serial, token), top) in in_flight.serials.iter().zip(tokens).zip(in_flight.tops) {
            // In order of arrival.
            if let Ok(i) = running.binary_search_by_key(serial, |sequence| sequence.serial) {
                self.stats.tokens.fetch_add(u64::from(!running[i].only_scores()), Relaxed);
                done[i] = running[i].take(token, top);
            }
        }
        self.scheduler.remove(&done);
        if self.scheduler.running.is_empty() {
            self.next = None;
        }
        Ok(())
    }

    fn report(&self) {
        self.stats.waiting.store(self.scheduler.waiting.len(), Relaxed);
        self.stats.running.store(self.scheduler.running.len(), Relaxed);
        self.stats.used_blocks.store(self.scheduler.blocks.used(), Relaxed);
    }
}
