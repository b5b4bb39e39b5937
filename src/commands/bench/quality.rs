//! `gptq bench quality`: what presets are worth, on text that they did not see, over several calibration seeds.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use gptq_calibration::dataset::Dataset;
use gptq_kernels::Backend;
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::gptq::{GptqParams, Method};
use gptq_quantizer::layer_loss::stage_losses;
use gptq_quantizer::produce::{Job, Source, check_settings};
use gptq_quantizer::recipe::{Named, Preset};
use gptq_quantizer::sequential::ActivationCache;
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::perplexity::Baseline;
use gptq_runtime::quant_config::QuantConfig;
use serde::Serialize;

use super::Workspace;
use crate::args::{CalibrationArgs, QualityBenchArgs, SamplingArg};
use crate::commands::common::{self, Calibration, Chosen, DeviceKind};
use crate::commands::eval::{self, Protocol};
use crate::commands::{demo, quantize};
use crate::output;

/// Windows of the evaluation text over which outputs of single stages are compared.
const LOSS_WINDOWS: usize = 4;

pub fn run(args: &QualityBenchArgs) -> Result<()> {
    if args.seeds > 1 && args.calibration.sampling == SamplingArg::Consecutive {
        bail!(
            "--seeds {}: expected --sampling random, consecutive windows are the same for every seed",
            args.seeds
        );
    }
    let work = Workspace::new()?;
    let (name, dir) = work.model(args.model.as_deref())?;
    let files = common::open_model(&dir)?;
    let out = &work.path().join("artifact");
    let measure = Measure { args, name: &name, dir: &dir, files: &files, out };
    let report = match common::device(args.device, &files.config)? {
        Chosen::Cpu(cpu) => measure.report(&cpu, DeviceKind::Cpu)?,
        Chosen::Gpu(gpu) => measure.report(&gpu, DeviceKind::Gpu)?,
    };
    match args.json {
        true => Ok(output::json(&report)?),
        false => report.print(),
    }
}

/// Everything that was found.
#[derive(Serialize)]
struct Report {
    device: String,
    protocol: String,
    baseline_perplexity: f64,
    presets: Vec<Found>,
}

/// One preset over all seeds; means and sample deviations by figure.
#[derive(Serialize)]
struct Found {
    preset: &'static str,
    mean: BTreeMap<&'static str, f64>,
    deviation: BTreeMap<&'static str, f64>,
    runs: Vec<Run>,
}

#[derive(Serialize)]
struct Run {
    seed: u64,
    figures: BTreeMap<&'static str, f64>,
}

/// Figures with their headings and digits, in the order of the table.
const FIGURES: [(&str, &str, usize); 5] = [
    ("perplexity", "Perplexity", 3),
    ("kl_divergence", "KL div", 5),
    ("top1_percent", "Top-1 %", 2),
    ("stage_loss_percent", "Stage loss %", 3),
    ("seconds", "Seconds", 1),
];

/// The part that needs a device.
struct Measure<'a> {
    args: &'a QualityBenchArgs,
    name: &'a str,
    dir: &'a Path,
    files: &'a ModelFiles,
    out: &'a Path,
}

impl Measure<'_> {
    fn report<B: Backend>(&self, device: &B, kind: DeviceKind) -> Result<Report> {
        let Self { args, name, dir, files, out } = *self;
        let (train, test) = self.texts()?;
        let protocol = Protocol { join: args.eval_join, ctx: args.ctx, max_windows: Some(args.max_windows) };
        let windows = protocol.windows(&test, dir)?.ids;
        let source = Source::check(name, dir, files)?;
        let original = Model::load(device.clone(), files)?;
        let mut found: Vec<Found> = args.presets.iter().map(|preset| Found::of(*preset)).collect();
        let mut baseline_perplexity = f64::NAN;
        for seed in (args.calibration.seed..).take(args.seeds as usize) {
            let with_seed = CalibrationArgs { seed, ..args.calibration.clone() };
            let calibration = Calibration::from_dataset(&with_seed, &train, dir, kind)?;
            for (found, preset) in found.iter_mut().zip(&args.presets) {
                let title = format!("{}, seed {seed}", preset.name());
                let seconds = self.make(device, &title, *preset, &source, &calibration)?;
                let quantized = common::load_model(device, out)?;
                let measured =
                    eval::measure(&title, &quantized, Some(Baseline::Beside(&original)), &windows)?;
                let comparison = measured.comparison.context("a baseline was given")?;
                let few = &windows[..windows.len().min(LOSS_WINDOWS)];
                let losses = stage_losses(&original, &quantized, few)?;
                let loss = losses.iter().map(|stage| stage.loss).sum::<f64>() / losses.len().max(1) as f64;
                baseline_perplexity = comparison.baseline_perplexity;
                let values = [
                    measured.perplexity,
                    comparison.kl_divergence,
                    100.0 * comparison.top1_agreement,
                    100.0 * loss,
                    seconds,
                ];
                let figures = FIGURES.iter().map(|figure| figure.0).zip(values).collect();
                found.runs.push(Run { seed, figures });
            }
        }
        found.iter_mut().for_each(Found::summarize);
        let protocol = format!(
            "{} bits, groups of {}; {} windows of {} tokens of {}, rows joined {}; stage loss over {} of them",
            args.bits,
            args.group_size.0.map_or("a row".into(), |size| size.to_string()),
            windows.len(),
            args.ctx,
            test.name,
            gptq_calibration::dataset::Join::from(args.eval_join).name(),
            windows.len().min(LOSS_WINDOWS),
        );
        Ok(Report { device: device.name(), protocol, baseline_perplexity, presets: found })
    }

    /// To calibrate with, and to measure on.
    fn texts(&self) -> Result<(Dataset, Dataset)> {
        let (calibration, dir) = (&self.args.calibration, self.dir);
        if self.args.model.is_none() {
            return Ok((demo::train_text(), demo::test_text()));
        }
        let load = |spec: &str| {
            common::dataset(spec, calibration.text_field.as_deref(), dir)
                .with_context(|| format!("data set {spec}"))
        };
        Ok((load(&calibration.dataset)?, load(&self.args.eval_dataset)?))
    }

    /// Makes the artifact and returns how long that took.
    fn make<B: Backend>(
        &self,
        device: &B,
        title: &str,
        preset: Preset,
        source: &Source,
        calibration: &Calibration,
    ) -> Result<f64> {
        let quant = QuantConfig {
            bits: self.args.bits,
            group_size: self.args.group_size.0,
            damp_percent: self.args.damp_percent,
            ..QuantConfig::default()
        };
        let params = GptqParams::new(quant, Method::Gptq, preset.recipe());
        check_settings(self.files, &params)?;
        let job = Job {
            calibration: Some(&calibration.record),
            mode: OutMode::Force,
            ..Job::new(source, &params, &calibration.sequences, self.out)
        };
        let activations = ActivationCache::embed(device, self.files, job.sequences, params.layout())?;
        Ok(quantize::make(device, &job, activations, title)?.seconds)
    }
}

impl Found {
    fn of(preset: Preset) -> Self {
        Self { preset: preset.name(), mean: BTreeMap::new(), deviation: BTreeMap::new(), runs: Vec::new() }
    }

    fn summarize(&mut self) {
        for (name, ..) in FIGURES {
            let values: Vec<f64> = self.runs.iter().map(|run| run.figures[name]).collect();
            let (mean, deviation) = spread(&values);
            self.mean.insert(name, mean);
            self.deviation.insert(name, deviation);
        }
    }
}

/// Mean and sample standard deviation; the latter of one value is 0.
fn spread(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0).max(1.0)).sqrt())
}

impl Report {
    fn print(&self) -> Result<()> {
        say!("{}, on {}", self.protocol, self.device)?;
        say!("perplexity of the checkpoint {:.3}\n", self.baseline_perplexity)?;
        let headings: String = FIGURES.iter().map(|(_, heading, _)| format!("  {heading:>20}")).collect();
        say!("{:<6}{headings}", "Preset")?;
        for found in &self.presets {
            let cell = |(name, _, digits): &(&str, &str, usize)| {
                let (mean, deviation) = (found.mean[name], found.deviation[name]);
                format!("  {:>20}", format!("{mean:.digits$} +- {deviation:.digits$}"))
            };
            let cells: String = FIGURES.iter().map(cell).collect();
            say!("{:<6}{cells}", found.preset)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_those_of_a_sample() {
        assert_eq!(spread(&[1.0, 2.0, 6.0]), (3.0, 7f64.sqrt()));
        assert_eq!(spread(&[4.0]), (4.0, 0.0));
    }
}
