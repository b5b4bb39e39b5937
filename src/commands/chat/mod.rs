//! `gptq chat`: a conversation in the terminal, or with what a pipe says.

mod interrupt;
mod lines;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use gptq_kernels::Backend;
use gptq_runtime::generate::{GenerateParams, Session};
use gptq_runtime::model::Model;
use gptq_text::chat::{ChatTemplate, Conversation, message};
use gptq_text::tokenizer::Tokenizer;
use serde_json::Value;

use super::common::{self, Chosen};
use super::generate::{self, Output};
use super::sampling::GenerationDefaults;
use crate::args::ChatArgs;
use crate::output;
use interrupt::Interrupt;
use lines::{Line, Lines};

const HELP: &str = "/reset forgets the conversation, /system TEXT begins a new one with other instructions,
/quit or Ctrl-D ends, Ctrl-C stops an answer";

/// Tokens of a conversation that the cache has room for before it grows.
const ROOM: usize = 2048;

pub fn run(args: &ChatArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    match common::device(args.device, &common::model_config(&dir)?)? {
        Chosen::Cpu(cpu) => chat(&cpu, args, &dir),
        Chosen::Gpu(gpu) => chat(&gpu, args, &dir),
    }
}

fn chat<B: Backend>(device: &B, args: &ChatArgs, dir: &Path) -> Result<()> {
    let template = ChatTemplate::load(dir).context("chat")?.with_default_system(args.default_system.clone());
    let tokenizer = Tokenizer::load(dir)?;
    let model = common::load_model(device, dir)?.with_kv_dtype(args.kv_cache.kv_cache_dtype.into());
    let stops: Vec<String> = template.stop_tokens().into_iter().map(String::from).collect();
    let defaults = GenerationDefaults::read(dir)?;
    let params = GenerateParams {
        eos_token_ids: defaults.end_ids(&model.config, &tokenizer, &stops),
        ..defaults.params(&args.sampling, args.max_new_tokens)?
    };
    let mut talk = Talk {
        model: &model,
        session: Session::new(&model, ROOM),
        tokenizer: &tokenizer,
        template: &template,
        params,
        system: args.system.clone(),
        turns: Vec::new(),
        interrupt: Interrupt::listen()?,
    };
    talk.hold()
}

struct Talk<'a, B: Backend> {
    model: &'a Model<B>,
    session: Session<'a, B>,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    params: GenerateParams,
    system: Option<String>,
    /// Messages of the user and answers in turn.
    turns: Vec<Value>,
    interrupt: Arc<Interrupt>,
}

impl<B: Backend> Talk<'_, B> {
    /// Until the input ends or `/quit`.
    fn hold(&mut self) -> Result<()> {
        let mut lines = Lines::open()?;
        loop {
            let line = match lines.next()? {
                Line::Text(line) => line,
                Line::Interrupted => interrupt::end(),
                Line::End => return Ok(()),
            };
            match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
                ("", _) => {}
                ("/quit", _) => return Ok(()),
                ("/help", _) => say!("{HELP}")?,
                ("/reset", _) => self.turns.clear(),
                ("/system", text) => {
                    self.system = Some(text.trim().to_owned()).filter(|text| !text.is_empty());
                    self.turns.clear();
                }
                (command, _) if command.starts_with('/') => {
                    note!("unknown command {command}: expected /reset, /system TEXT, /help or /quit");
                }
                _ => self.answer(line.trim())?,
            }
        }
    }

    fn answer(&mut self, said: &str) -> Result<()> {
        self.turns.push(message("user", said));
        let prompt = match self.prompt() {
            Ok(prompt) => prompt,
            Err(refusal) => {
                note!("{}", output::chain(&refusal).replace('\n', " "));
                self.turns.pop();
                return Ok(());
            }
        };
        let mut out = Output::streamed(&self.interrupt.stopped);
        self.interrupt.answering(true);
        let answered = generate::complete(&mut self.session, self.tokenizer, &prompt, &self.params, &mut out);
        self.interrupt.answering(false);
        answered?;
        let (tokens, computed) = (prompt.len(), self.session.computed());
        tracing::info!(tokens, computed, "the conversation so far");
        say!("")?;
        self.turns.push(message("assistant", &out.text));
        Ok(())
    }

    /// The conversation as the model wants it, without its oldest turns where there is no room for all. An error
    /// where the template refuses it, or where even the last message leaves no room for an answer.
    fn prompt(&mut self) -> Result<Vec<u32>> {
        let limit = self.model.config.context_length();
        let mut forgotten = 0;
        loop {
            let system = self.system.iter().map(|system| message("system", system));
            let messages: Vec<Value> = system.chain(self.turns.iter().cloned()).collect();
            let prompt = self.template.render(&Conversation::new(&messages))?;
            let ids = self.tokenizer.encode(&prompt, false)?;
            if ids.len() + self.params.max_new_tokens.min(limit / 4) <= limit {
                if forgotten > 0 {
                    note!("the context of {limit} tokens is full: oldest turns forgotten: {forgotten}");
                }
                return Ok(ids);
            }
            if self.turns.len() < 3 {
                let tokens = ids.len();
                anyhow::bail!(
                    "the message is too long: {tokens} tokens leave no room in a context of {limit}"
                );
            }
            self.turns.drain(..2);
            forgotten += 1;
        }
    }
}
