//! `gptq eval`

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use gptq_calibration::Sequences;
use gptq_calibration::dataset::{Dataset, Join};
use gptq_kernels::{Backend, Cpu};
use gptq_quantizer::record::QuantizeLog;
use gptq_runtime::model::Model;
use gptq_runtime::perplexity::{Baseline, Evaluation, evaluate};
use gptq_text::tokenizer::Tokenizer;
use serde_json::json;

use super::common::{self, Chosen};
use crate::args::{EvalArgs, JoinArg};
use crate::output;
use crate::progress::Progress;
use crate::stop;

pub fn run(args: &EvalArgs) -> Result<()> {
    let started = Instant::now();
    let dir = common::model_dir(&args.model)?;
    let dataset = common::dataset(&args.dataset, args.text_field.as_deref(), &dir)
        .with_context(|| format!("data set {}", args.dataset))?;
    let protocol = Protocol { join: args.join, ctx: args.ctx, max_windows: args.max_windows };
    let text = protocol.windows(&dataset, &dir)?;
    let calibrated_on_it = was_calibrated_on(&dir, &text.fingerprint);
    if calibrated_on_it {
        note!(
            "warning: {} was calibrated on this very text; its perplexity here is flattered",
            dir.display()
        );
    }
    let baseline = args.baseline.as_ref().map(|model| common::model_dir(model)).transpose()?;
    let kv_dtype = args.kv_cache.kv_cache_dtype;
    let (result, device) = match common::device(args.device, &common::model_config(&dir)?)? {
        Chosen::Cpu(cpu) => evaluate_on(&cpu, args, &dir, baseline.as_deref(), &text.ids)?,
        Chosen::Gpu(gpu) => evaluate_on(&gpu, args, &dir, baseline.as_deref(), &text.ids)?,
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let mut value = serde_json::to_value(&result)?;
        if let Some(map) = value.as_object_mut() {
            if let Some(serde_json::Value::Object(comparison)) = map.remove("comparison") {
                map.extend(comparison);
            }
            map.insert("dataset".into(), json!(dataset.name));
            map.insert("join".into(), json!(text.join.name()));
            map.insert("kv_cache_dtype".into(), json!(common::name(kv_dtype)));
            map.insert("calibrated_on_this_text".into(), json!(calibrated_on_it));
            map.insert("seconds".into(), json!(seconds));
        }
        output::json(&value)?;
        return Ok(());
    }
    say!("perplexity      {:.4}", result.perplexity)?;
    if let Some(comparison) = &result.comparison {
        say!("baseline        {:.4}", comparison.baseline_perplexity)?;
        say!("KL divergence   {:.6} nats a token, from the baseline", comparison.kl_divergence)?;
        say!("top-1 agreement {:.2} %", 100.0 * comparison.top1_agreement)?;
        if let Some(nmse) = comparison.logit_nmse {
            say!("logits          {nmse:.1e} of the baseline's squares, computed in f32 on the CPU")?;
        }
    }
    say!("protocol        {}{}", describe(&dataset.name, text.join, &result), common::kv_note(kv_dtype))?;
    say!("time            {seconds:.1} s on {}", device)?;
    Ok(())
}

/// Returns the device's name too.
fn evaluate_on<B: Backend>(
    device: &B,
    args: &EvalArgs,
    dir: &Path,
    baseline: Option<&Path>,
    windows: &[Vec<u32>],
) -> Result<(Evaluation, String)> {
    let (beside, on_cpu) = match baseline {
        Some(dir) if args.baseline_on_cpu => (None, Some(common::load_model(&Cpu::new(), dir)?)),
        Some(dir) => (Some(common::load_model(device, dir)?), None),
        None => (None, None),
    };
    let baseline = on_cpu.as_ref().map(Baseline::OnCpu).or(beside.as_ref().map(Baseline::Beside));
    let kv_dtype = args.kv_cache.kv_cache_dtype.into();
    let model = common::load_model(device, dir)?.with_kv_dtype(kv_dtype);
    Ok((measure("evaluating", &model, baseline, windows)?, device.name()))
}

/// How a text becomes windows.
pub struct Protocol {
    pub join: JoinArg,
    pub ctx: usize,
    pub max_windows: Option<usize>,
}

impl Protocol {
    /// Consecutive windows from the start of the text.
    pub fn windows(&self, dataset: &Dataset, model_dir: &Path) -> Result<Sequences> {
        let tokenizer = Tokenizer::load(model_dir)?;
        dataset
            .windows(&tokenizer, self.join.into(), self.ctx, self.max_windows)
            .with_context(|| format!("data set {}", dataset.name))
    }
}

/// The protocol beside a number.
pub fn describe(dataset: &str, join: Join, result: &Evaluation) -> String {
    format!(
        "{dataset}, rows joined {}, {} windows of {} tokens, {} tokens scored",
        join.name(),
        result.windows,
        result.ctx,
        result.tokens_scored
    )
}

/// Evaluates with a progress bar, until a signal comes that is waited for.
pub fn measure<B: Backend>(
    title: &str,
    model: &Model<B>,
    baseline: Option<Baseline<B>>,
    windows: &[Vec<u32>],
) -> Result<Evaluation> {
    Ok(evaluate(model, baseline, windows, &mut progress(title, windows.len()))?)
}

/// Shows how many windows are done, and stops once a signal has come.
pub fn progress(title: &str, windows: usize) -> impl FnMut(usize) -> ControlFlow<()> + use<> {
    let mut progress = Progress::start(title, windows as u64);
    move |done| {
        progress.advance(done as u64);
        if stop::is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Whether the artifact's own log names this text as its calibration text.
fn was_calibrated_on(dir: &Path, fingerprint: &str) -> bool {
    let log = QuantizeLog::read(dir).ok().flatten();
    log.and_then(|log| log.calibration).is_some_and(|c| c.fingerprint == fingerprint)
}
