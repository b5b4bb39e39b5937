//! `gptq generate`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{Context, Result};
use gptq_kernels::Backend;
use gptq_runtime::generate::{FinishReason, GenerateParams, Session};
use gptq_text::StopStrings;
use gptq_text::chat::{ChatTemplate, Conversation, message};
use gptq_text::tokenizer::Tokenizer;
use serde_json::json;

use super::common::{self, Chosen};
use super::sampling::GenerationDefaults;
use crate::args::GenerateArgs;
use crate::output;

pub fn run(args: &GenerateArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    match common::device(args.device, &common::model_config(&dir)?)? {
        Chosen::Cpu(cpu) => generate(&cpu, args, &dir),
        Chosen::Gpu(gpu) => generate(&gpu, args, &dir),
    }
}

fn generate<B: Backend>(device: &B, args: &GenerateArgs, dir: &Path) -> Result<()> {
    let tokenizer = Tokenizer::load(dir)?;
    let (prompt, stops) = prompt(args, dir)?;
    let ids = tokenizer.encode(&prompt, !args.chat)?;
    let model = common::load_model(device, dir)?.with_kv_dtype(args.kv_cache.kv_cache_dtype.into());
    let defaults = GenerationDefaults::read(dir)?;
    let mut params = defaults.params(&args.sampling, args.max_new_tokens)?;
    params.min_new_tokens = args.min_new_tokens.unwrap_or(params.min_new_tokens);
    if !args.ignore_eos {
        params.eos_token_ids = defaults.end_ids(&model.config, &tokenizer, &stops);
    }
    let (stops, least) = (StopStrings::new(args.stop.clone()), params.min_new_tokens);
    let mut out = Output { stops, least, stream: !args.json, ..Output::silent() };
    let started = Instant::now();
    let (reason, count) = complete(&mut Session::new(&model, 0), &tokenizer, &ids, &params, &mut out)?;
    let seconds = started.elapsed().as_secs_f64();
    // The token that ends a text was generated too, and a server counts it.
    let count = count + usize::from(reason == FinishReason::EosToken);
    if args.json {
        output::json(&json!({
            "text": out.text, "finish_reason": reason, "prompt_tokens": ids.len(),
            "generated_tokens": count, "seed": params.sampling.seed, "seconds": seconds,
            "tokens_per_second": count as f64 / seconds,
        }))?;
    } else {
        say!("")?;
    }
    Ok(())
}

/// Runs the model and feeds `out` with text; returns why it ended and how many tokens it made.
pub fn complete<B: Backend>(
    session: &mut Session<'_, B>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    params: &GenerateParams,
    out: &mut Output,
) -> Result<(FinishReason, usize)> {
    let mut stream = tokenizer.stream(true);
    let mut count = 0;
    let mut failure = None;
    let reason = session.generate(prompt, params, &mut |id| {
        count += 1;
        // Special tokens have no piece of text, but may be what ends it.
        let special = tokenizer.is_special(id);
        let piece = if special {
            tokenizer.decode(&[id], false)
        } else {
            stream.push(id).map(Option::unwrap_or_default)
        };
        match piece {
            Ok(piece) => out.push(&piece, !special, count),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    if reason != FinishReason::StopSequence {
        if let Some(piece) = stream.finish()? {
            let _ = out.push(&piece, true, count);
        }
        out.finish()?;
    }
    Ok((reason, count))
}

/// Text as it grows: shown at once, but for what may yet become a stop string.
pub struct Output<'a> {
    pub text: String,
    pub stops: StopStrings,
    /// Tokens before which no stop string ends the text.
    pub least: usize,
    /// Print while generating.
    pub stream: bool,
    /// Set once the rest of the text is not wanted.
    pub stopped: Option<&'a AtomicBool>,
}

impl<'a> Output<'a> {
    /// Kept, and ended by nothing.
    pub fn silent() -> Self {
        Self { text: String::new(), stops: StopStrings::default(), least: 0, stream: false, stopped: None }
    }

    /// Shown as it comes, until `stopped` becomes true.
    pub fn streamed(stopped: &'a AtomicBool) -> Self {
        Self { stream: true, stopped: Some(stopped), ..Self::silent() }
    }

    /// Takes the text of the token with this number, or as much of it as is whole.
    fn push(&mut self, piece: &str, shown: bool, number: usize) -> ControlFlow<()> {
        let (text, ended) = self.stops.push(piece, shown, number > self.least);
        let stopped = self.stopped.is_some_and(|stopped| stopped.load(Relaxed));
        match self.show(&text) {
            Ok(()) if !ended && !stopped => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }

    /// What was held back.
    fn finish(&mut self) -> std::io::Result<()> {
        let rest = self.stops.finish();
        self.show(&rest)
    }

    fn show(&mut self, text: &str) -> std::io::Result<()> {
        self.text.push_str(text);
        if self.stream && !text.is_empty() {
            let mut stdout = std::io::stdout();
            stdout.write_all(text.as_bytes())?;
            stdout.flush()?;
        }
        Ok(())
    }
}

/// The prompt as the model wants it, and the texts that end its turn.
fn prompt(args: &GenerateArgs, dir: &Path) -> Result<(String, Vec<String>)> {
    if !args.chat {
        return Ok((args.prompt.clone(), Vec::new()));
    }
    let template =
        ChatTemplate::load(dir).context("--chat")?.with_default_system(args.default_system.clone());
    let mut messages: Vec<_> = args.system.iter().map(|system| message("system", system)).collect();
    messages.push(message("user", &args.prompt));
    let stops = template.stop_tokens().into_iter().map(String::from).collect();
    Ok((template.render(&Conversation::new(&messages))?, stops))
}
