//! `gptq generate`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use gptq_calibration::chat::{ChatTemplate, Conversation, message};
use gptq_calibration::tokenizer::Tokenizer;
use gptq_kernels::Backend;
use gptq_runtime::generate::{FinishReason, GenerateParams, Session};
use gptq_runtime::model::Model;
use gptq_runtime::sampling::SamplingParams;
use serde_json::json;

use super::common::{self, DeviceKind, OnDevice};
use super::eval;
use crate::args::{GenerateArgs, SamplingArgs};
use crate::output;

pub fn run(args: &GenerateArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let config = common::model_config(&dir)?;
    common::on_device(args.device, &config, Generate { args, dir: &dir })
}

/// The part that needs a device.
struct Generate<'a> {
    args: &'a GenerateArgs,
    dir: &'a Path,
}

impl OnDevice for Generate<'_> {
    type Output = ();

    fn run<B: Backend>(self, device: B, _kind: DeviceKind) -> Result<()> {
        let Self { args, dir } = self;
        let tokenizer = Tokenizer::load(dir)?;
        let (prompt, stops) = prompt(args, dir)?;
        let ids = tokenizer.encode(&prompt, !args.chat)?;
        let model = eval::load(&device, dir)?.with_kv_dtype(args.kv_cache.kv_cache_dtype.into());
        let params = GenerateParams {
            max_new_tokens: args.max_new_tokens,
            eos_token_ids: end_ids(&model, &tokenizer, &stops),
            sampling: sampling(&args.sampling),
        };
        let mut out =
            Output { text: String::new(), shown: 0, stops: &args.stop, stream: !args.json, stopped: None };
        let started = Instant::now();
        let (reason, count) = complete(&mut Session::new(&model, 0), &tokenizer, &ids, &params, &mut out)?;
        let seconds = started.elapsed().as_secs_f64();
        if args.json {
            output::json(&json!({
                "text": out.text, "finish_reason": reason, "prompt_tokens": ids.len(),
                "generated_tokens": count, "seed": params.sampling.seed, "seconds": seconds,
                "tokens_per_second": count as f64 / seconds,
            }))?;
        } else {
            output::line(format_args!(""))?;
        }
        Ok(())
    }
}

pub fn sampling(args: &SamplingArgs) -> SamplingParams {
    SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed.unwrap_or_else(clock_seed),
    }
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
        match stream.push(id) {
            Ok(Some(piece)) => out.push(&piece),
            Ok(None) => ControlFlow::Continue(()),
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
            let _ = out.push(&piece);
        }
        out.show(out.text.len())?;
    }
    Ok((reason, count))
}

/// Text as it grows: shown at once, but for what may yet become a stop string.
pub struct Output<'a> {
    pub text: String,
    pub shown: usize,
    pub stops: &'a [String],
    /// Print while generating.
    pub stream: bool,
    /// Somebody wants no more.
    pub stopped: Option<&'a AtomicBool>,
}

impl<'a> Output<'a> {
    /// Shown as it comes, until `stopped` becomes true.
    pub fn streamed(stopped: &'a AtomicBool) -> Self {
        Self { text: String::new(), shown: 0, stops: &[], stream: true, stopped: Some(stopped) }
    }

    fn push(&mut self, piece: &str) -> ControlFlow<()> {
        self.text.push_str(piece);
        let found = self
            .stops
            .iter()
            .filter(|s| !s.is_empty())
            .filter_map(|stop| self.text.find(stop.as_str()))
            .min();
        if let Some(end) = found {
            self.text.truncate(end);
            let _ = self.show(end);
            return ControlFlow::Break(());
        }
        let safe = self.text.len() - self.held_back();
        let stopped = self.stopped.is_some_and(|stopped| stopped.load(Relaxed));
        match self.show(safe) {
            Ok(()) if !stopped => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }

    /// Bytes at the end that are the beginning of a stop string.
    fn held_back(&self) -> usize {
        let begins = |stop: &String| {
            (1..stop.len())
                .rev()
                .find(|n| stop.is_char_boundary(*n) && self.text.ends_with(&stop[..*n]))
                .unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }

    fn show(&mut self, end: usize) -> std::io::Result<()> {
        if self.stream && end > self.shown {
            let mut stdout = std::io::stdout();
            stdout.write_all(&self.text.as_bytes()[self.shown..end])?;
            stdout.flush()?;
        }
        self.shown = self.shown.max(end);
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

/// The ids that end a turn.
pub fn end_ids<B: Backend>(model: &Model<B>, tokenizer: &Tokenizer, stops: &[String]) -> Vec<u32> {
    let of_template = stops.iter().filter_map(|stop| tokenizer.token_id(stop));
    model.config.eos_token_ids.iter().copied().chain(of_template).collect()
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fed(stops: &[&str], pieces: &[&str]) -> (String, bool, Vec<usize>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut out = Output { text: String::new(), shown: 0, stops: &stops, stream: false, stopped: None };
        let mut shown = Vec::new();
        let mut stopped = false;
        for piece in pieces {
            stopped = out.push(piece).is_break();
            shown.push(out.shown);
            if stopped {
                break;
            }
        }
        (out.text, stopped, shown)
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_shown() {
        assert_eq!(fed(&["END"], &["ab", "E", "N", "D", "cd"]), ("ab".into(), true, vec![2, 2, 2, 2]));
    }

    #[test]
    fn a_beginning_that_does_not_become_a_stop_is_shown_later() {
        assert_eq!(fed(&["END"], &["abE", "x"]), ("abEx".into(), false, vec![2, 4]));
    }

    #[test]
    fn the_earliest_of_several_stops_counts() {
        assert_eq!(fed(&["c", "b"], &["abc"]), ("a".into(), true, vec![1]));
    }
}
