//! One running generation seen from the server: tokens become text, stop strings end it.

use std::collections::VecDeque;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Shared;
use super::error::ApiError;
use super::text::Pieces;
use crate::engine::{Event, Request, Token};
use crate::generate::FinishReason;
use crate::sampling::{Adjustments, SamplingParams};

/// What to generate, checked against the limits.
#[derive(Clone)]
pub struct Plan {
    pub prompt: Vec<u32>,
    pub max_new_tokens: usize,
    pub eos_token_ids: Vec<u32>,
    pub sampling: SamplingParams,
    pub adjustments: Adjustments,
    pub top_n: usize,
    pub stop: Vec<String>,
}

/// A token and the text that it lets out.
pub struct Step {
    pub token: Token,
    pub text: String,
}

/// Dropping it cancels the request in the engine.
pub struct Generation {
    events: UnboundedReceiver<Event>,
    pieces: Box<dyn Pieces>,
    stops: StopStrings,
    ended: bool,
    _permit: std::sync::Arc<OwnedSemaphorePermit>,
}

/// Starts `count` generations of one plan; each has a seed of its own, the first one the plan's.
pub fn start(shared: &Shared, plan: &Plan, count: usize) -> Result<Vec<Generation>, ApiError> {
    let permit = std::sync::Arc::new(shared.permit()?);
    (0..count as u64)
        .map(|i| {
            let (sender, events) = unbounded_channel();
            let request = Request {
                prompt: plan.prompt.clone(),
                max_new_tokens: plan.max_new_tokens,
                eos_token_ids: plan.eos_token_ids.clone(),
                sampling: SamplingParams {
                    seed: plan.sampling.seed.wrapping_add(i),
                    ..plan.sampling.clone()
                },
                adjustments: plan.adjustments.clone(),
                top_n: plan.top_n,
                events: sender,
            };
            if !shared.engine.submit(request) {
                return Err(ApiError::unhealthy());
            }
            Ok(Generation {
                events,
                pieces: shared.text.pieces(),
                stops: StopStrings { stops: plan.stop.clone(), held: String::new() },
                ended: false,
                _permit: permit.clone(),
            })
        })
        .collect()
}

impl Generation {
    /// The next token, `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<Step, ApiError>> {
        if self.ended {
            return None;
        }
        let step = match self.events.recv().await {
            Some(Event::Token(token)) => self.step(token),
            Some(Event::Failed(message)) => Err(ApiError::generation(message)),
            None => Err(ApiError::incomplete()),
        };
        self.ended = !matches!(&step, Ok(step) if step.token.finish.is_none());
        if self.ended {
            self.events.close();
        }
        Some(step)
    }

    fn step(&mut self, mut token: Token) -> Result<Step, ApiError> {
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
        Ok(Step { token, text })
    }

    /// All of it.
    pub async fn collect(mut self) -> Result<Vec<Step>, ApiError> {
        let mut steps = VecDeque::new();
        while let Some(step) = self.next().await {
            steps.push_back(step?);
        }
        Ok(steps.into())
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
