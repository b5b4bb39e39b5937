//! One running generation seen from the server: tokens become text, stop strings end it.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use futures_util::future::try_join_all;
use gptq_runtime::engine::{Event, PromptToken, Request, Task, Token};
use gptq_runtime::generate::FinishReason;
use gptq_text::StopStrings;
use tokio::sync::mpsc::UnboundedReceiver;

use super::Call;
use super::error::ApiError;
use super::events::events;
use super::metrics::Finished;
use super::text::Pieces;

/// What to generate, checked against the limits.
#[derive(Clone)]
pub struct GenerationParams {
    pub task: Task,
    pub stops: StopStrings,
    /// Special tokens that belong to the text all the same.
    pub kept: &'static [&'static str],
    /// All of them do.
    pub all_special: bool,
}

/// A token and the text that it lets out.
pub struct Step {
    /// None where the prompt alone was wanted.
    pub token: Option<Token>,
    pub text: String,
    /// With the first token, the prompt where its probabilities are wanted.
    pub prompt: Vec<PromptToken>,
    pub finish: Option<FinishReason>,
}

/// Dropping it cancels the request in the engine.
pub struct Generation {
    events: UnboundedReceiver<Event>,
    pieces: Box<dyn Pieces>,
    stops: StopStrings,
    all_special: bool,
    /// Before so many tokens no stop string ends the text.
    least: usize,
    /// The prompt alone is wanted.
    only_scores: bool,
    ended: bool,
    call: Call,
    prompt: Vec<PromptToken>,
    input_length: usize,
    tokens: usize,
    arrived: Instant,
    started: Instant,
}

/// Starts `count` generations of each plan, plan after plan. Each has a seed of its own, a plan's first one the
/// plan's.
pub fn start(call: &Call, plans: &[GenerationParams], count: usize) -> Result<Vec<Generation>, ApiError> {
    let each = plans.iter().flat_map(|plan| (0..count as u64).map(move |i| (plan, i)));
    each.map(|(plan, i)| Generation::start(call, plan, i)).collect()
}

/// All tokens of all generations.
pub async fn collect(generations: Vec<Generation>) -> Result<Vec<Vec<Step>>, ApiError> {
    try_join_all(generations.into_iter().map(Generation::collect)).await
}

/// The logarithm of the probability of all tokens together.
pub fn likelihood(steps: &[Step]) -> f32 {
    steps.iter().filter_map(|step| Some(step.token.as_ref()?.logprob)).sum()
}

impl Generation {
    fn start(call: &Call, plan: &GenerationParams, number: u64) -> Result<Self, ApiError> {
        let (listener, events) = events();
        let mut task = plan.task.clone();
        task.sampling.seed = task.sampling.seed.wrapping_add(number);
        if !call.engine.submit(Request { task, events: listener }) {
            return Err(ApiError::unhealthy());
        }
        call.metrics.asked();
        let now = Instant::now();
        Ok(Self {
            events,
            pieces: call.text.pieces_keeping(plan.kept),
            stops: plan.stops.clone(),
            all_special: plan.all_special,
            least: plan.task.min_new_tokens,
            only_scores: plan.task.max_new_tokens == 0,
            ended: false,
            call: call.clone(),
            prompt: Vec::new(),
            input_length: plan.task.prompt.len(),
            tokens: 0,
            arrived: now,
            started: now,
        })
    }

    /// The next token, `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<Step, ApiError>> {
        if self.ended {
            return None;
        }
        let step = loop {
            break match self.events.recv().await {
                Some(Event::Started(at)) => {
                    self.started = at;
                    continue;
                }
                Some(Event::Prompt(prompt)) if self.only_scores => Ok(scored(prompt)),
                Some(Event::Prompt(prompt)) => {
                    self.prompt = prompt;
                    continue;
                }
                Some(Event::Token(token)) => self.step(token),
                Some(Event::Failed(message)) => Err(ApiError::generation(message)),
                None => Err(ApiError::incomplete()),
            };
        };
        match &step {
            Ok(step) if step.finish.is_none() => {}
            Ok(_) => {
                self.end();
                self.call.metrics.finished(&self.finished());
            }
            Err(error) => {
                self.end();
                self.call.metrics.failed(error.kind);
            }
        }
        Some(step)
    }

    fn end(&mut self) {
        self.ended = true;
        self.events.close();
    }

    fn finished(&self) -> Finished {
        Finished {
            input_length: self.input_length,
            tokens: self.tokens,
            queue: self.started.saturating_duration_since(self.arrived),
            inference: self.started.elapsed(),
        }
    }

    fn step(&mut self, token: Token) -> Result<Step, ApiError> {
        self.tokens += 1;
        self.call.access.tokens.fetch_add(1, Relaxed);
        let (mut piece, mut shown, mut finish) = (String::new(), true, token.finish);
        if finish != Some(FinishReason::EosToken) {
            piece = self.pieces.push(token.id).map_err(ApiError::generation)?;
            // A special token has no piece of text, but may be what ends it.
            if piece.is_empty() && self.call.text.is_special(token.id) {
                piece = self.call.text.token_text(token.id);
                shown = self.all_special;
            }
        }
        let armed = self.tokens > self.least;
        let (mut text, mut stopped) = self.stops.push(&piece, shown, armed);
        if finish.is_some() && !stopped {
            let rest = self.pieces.finish().map_err(ApiError::generation)?;
            let (more, stops) = self.stops.push(&rest, true, armed);
            (text, stopped) = (text + &more, stops);
        }
        if stopped {
            finish = Some(FinishReason::StopSequence);
        } else if finish.is_some() {
            text += &self.stops.finish();
        }
        Ok(Step { token: Some(token), text, prompt: std::mem::take(&mut self.prompt), finish })
    }

    async fn collect(mut self) -> Result<Vec<Step>, ApiError> {
        let mut steps = Vec::new();
        while let Some(step) = self.next().await {
            steps.push(step?);
        }
        Ok(steps)
    }
}

/// A prompt that is not to be continued.
fn scored(prompt: Vec<PromptToken>) -> Step {
    Step { token: None, text: String::new(), prompt, finish: Some(FinishReason::Length) }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.call.metrics.failed("cancelled");
        }
    }
}
