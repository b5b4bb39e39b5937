//! A client beside the engine: token ids in, token ids out.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use gptq_runtime::engine::{EngineHandle, Event, Request, Task, Token};
use gptq_runtime::sampling::SamplingParams;
use gptq_server::events;
use gptq_server::text::TextCodec;
use tokio::sync::mpsc::UnboundedReceiver;

use super::load::{Ask, Client, Outcome, Times};
use crate::output;

#[derive(Clone)]
pub struct Direct {
    pub engine: EngineHandle,
    pub text: Arc<dyn TextCodec>,
    pub eos_token_ids: Vec<u32>,
}

impl Direct {
    /// Returns when the engine has answered something, which it does once it is ready.
    pub async fn ready(&self) -> Result<()> {
        let mut events = self.submit(vec![0], 1, 0.0, 0)?;
        next(&mut events).await.map(|_| ())
    }

    /// What the server makes of the same request.
    fn submit(
        &self,
        prompt: Vec<u32>,
        max_new_tokens: usize,
        temperature: f32,
        seed: u64,
    ) -> Result<UnboundedReceiver<Event>> {
        let (listener, events) = events();
        let sampling = SamplingParams { temperature, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed };
        let mut task = Task::new(prompt, max_new_tokens, sampling);
        task.eos_token_ids.clone_from(&self.eos_token_ids);
        if !self.engine.submit(Request { task, events: listener }) {
            bail!("the engine has ended");
        }
        Ok(events)
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.text.encode(text, add_special).map_err(|error| anyhow!(error))
    }

    /// `None` where the client left.
    async fn take(&self, ask: &Ask, start: Instant, prompt: Vec<u32>) -> Result<Option<Times>> {
        let mut events = self.submit(prompt, ask.tokens, ask.temperature, ask.seed)?;
        let (mut times, mut last, mut tokens) = (Times::default(), start, 0);
        while ask.leaves.is_none_or(|leaves| tokens < leaves) {
            let token = next(&mut events).await?;
            let now = Instant::now();
            match tokens {
                0 => times.first_token = (now - start).as_secs_f64(),
                _ => times.between.push((now - last).as_secs_f64()),
            }
            (last, tokens) = (now, tokens + 1);
            if token.finish.is_some() {
                return Ok(Some(times));
            }
        }
        Ok(None)
    }
}

impl Client for Direct {
    async fn length(&mut self, text: &str) -> Result<usize> {
        Ok(self.encode(text, false)?.len())
    }

    /// Encoding is not the engine's work and ends before the clock starts.
    async fn stream(&mut self, ask: &Ask) -> Outcome {
        let prompt = match self.encode(&ask.text, true) {
            Ok(prompt) => prompt,
            Err(error) => return Outcome::Broken(output::chain(&error)),
        };
        match self.take(ask, Instant::now(), prompt).await {
            Ok(Some(times)) => Outcome::Whole(times),
            Ok(None) => Outcome::Left,
            Err(error) => Outcome::Broken(output::chain(&error)),
        }
    }
}

async fn next(events: &mut UnboundedReceiver<Event>) -> Result<Token> {
    loop {
        match events.recv().await.context("the engine ended in the middle of an answer")? {
            Event::Token(token) => return Ok(token),
            Event::Started(_) | Event::Prompt(_) => {}
            Event::Failed(message) => bail!(message),
        }
    }
}
