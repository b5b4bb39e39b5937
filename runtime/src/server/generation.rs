//! One running generation seen from the server: tokens become text, stop strings end it.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use futures_util::future::try_join_all;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Call;
use super::error::ApiError;
use super::metrics::Finished;
use super::text::Pieces;
use crate::engine::{Event, PromptToken, Request, Task, Token};
use crate::generate::FinishReason;

/// What to generate, checked against the limits.
#[derive(Clone)]
pub struct Plan {
    pub task: Task,
    pub stop: Vec<String>,
}

/// A token and the text that it lets out.
pub struct Step {
    pub token: Token,
    pub text: String,
    /// With the first token, the prompt where its probabilities are wanted.
    pub prompt: Vec<PromptToken>,
}

/// Dropping it cancels the request in the engine.
pub struct Generation {
    events: UnboundedReceiver<Event>,
    pieces: Box<dyn Pieces>,
    stops: StopStrings,
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
pub fn start(call: &Call, plans: &[Plan], count: usize) -> Result<Vec<Generation>, ApiError> {
    let each = plans.iter().flat_map(|plan| (0..count as u64).map(move |i| (plan, i)));
    each.map(|(plan, i)| Generation::start(call, plan, i)).collect()
}

/// All tokens of all generations.
pub async fn collect(generations: Vec<Generation>) -> Result<Vec<Vec<Step>>, ApiError> {
    try_join_all(generations.into_iter().map(Generation::collect)).await
}

/// The logarithm of the probability of all tokens together.
pub fn likelihood(steps: &[Step]) -> f32 {
    steps.iter().map(|step| step.token.logprob).sum()
}

impl Generation {
    fn start(call: &Call, plan: &Plan, number: u64) -> Result<Self, ApiError> {
        let (sender, events) = unbounded_channel();
        let mut task = plan.task.clone();
        task.sampling.seed = task.sampling.seed.wrapping_add(number);
        if !call.engine.submit(Request { task, events: sender }) {
            return Err(ApiError::unhealthy());
        }
        call.metrics.asked();
        let now = Instant::now();
        Ok(Self {
            events,
            pieces: call.text.pieces(),
            stops: StopStrings { stops: plan.stop.clone(), held: String::new() },
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
            Ok(step) if step.token.finish.is_none() => {}
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

    fn step(&mut self, mut token: Token) -> Result<Step, ApiError> {
        self.tokens += 1;
        self.call.access.tokens.fetch_add(1, Relaxed);
        let mut text = String::new();
        if token.finish != Some(FinishReason::EosToken) {
            text = self.pieces.push(token.id).map_err(ApiError::generation)?;
        }
        if token.finish.is_some() {
            text += &self.pieces.finish().map_err(ApiError::generation)?;
        }
        let (mut text, stopped) = self.stops.push(&text);
        if stopped {
            token.finish = Some(FinishReason::StopSequence);
        } else if token.finish.is_some() {
            text += &self.stops.held;
        }
        Ok(Step { token, text, prompt: std::mem::take(&mut self.prompt) })
    }

    async fn collect(mut self) -> Result<Vec<Step>, ApiError> {
        let mut steps = Vec::new();
        while let Some(step) = self.next().await {
            steps.push(step?);
        }
        Ok(steps)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.call.metrics.failed("cancelled");
        }
    }
}

/// Lets text through up to the first stop string, and holds back what may become one.
struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// The text that is safe to show, and whether a stop string ended it.
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(end);
            return (std::mem::take(&mut self.held), true);
        }
        let beginning = |stop: &String| {
            (1..stop.len()).rev().find(|n| stop.is_char_boundary(*n) && self.held.ends_with(&stop[..*n]))
        };
        let keep = self.stops.iter().filter_map(beginning).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_across_pieces_is_never_shown_and_a_false_beginning_is() {
        let mut stops = StopStrings { stops: vec!["END".into(), "é!".into()], held: String::new() };
        let shown = ["abE", "x", "é", "?E", "N", "D."].map(|piece| stops.push(piece));
        let text: String = shown.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(text, "abExé?");
        assert_eq!(shown.map(|(_, stopped)| stopped), [false, false, false, false, false, true]);
    }
}
