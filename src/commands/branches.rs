//! `gptq branches`: every branch of a plan from one checkpoint, with its table.

use std::path::Path;

use anyhow::{Context, Result};
use gptq_calibration::Sequences;
use gptq_calibration::dataset::Dataset;
use gptq_kernels::Backend;
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::engines::{self, Facts, Place};
use gptq_quantizer::gptq::{GptqParams, Method};
use gptq_quantizer::plan::{Branch, Plan};
use gptq_quantizer::produce::{self, Job, Source};
use gptq_quantizer::sequential::Tiles;
use gptq_quantizer::table::{self, Row};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::model::Model;
use gptq_runtime::perplexity::Baseline;

use super::common::{self, Calibration, DeviceKind, OnDevice};
use super::eval::{self, Protocol};
use super::quantize::{self, EVAL_CTX};
use crate::args::{BranchesArgs, JoinArg};
use crate::output;

pub fn run(args: &BranchesArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let plan = match &args.plan {
        Some(path) => Plan::from_toml(path)?,
        None => Plan::card(),
    };
    let measurement = match &args.eval_dataset {
        Some(spec) => Some(Measurement {
            dataset: common::dataset(spec, None, &dir).with_context(|| format!("data set {spec}"))?,
            protocol: Protocol { join: JoinArg::Paper, ctx: EVAL_CTX, max_windows: None },
        }),
        None => None,
    };
    let work = MakeAll { args, dir: &dir, plan: &plan, measurement: measurement.as_ref() };
    let config = common::model_config(&dir)?;
    let rows = common::on_device(args.output.device, &config, work)?;
    match args.output.json {
        true => output::json(&rows)?,
        false => {
            output::text(format_args!("{}", table::to_terminal(&rows)))?;
            print_advice(&plan, &config)?;
        }
    }
    Ok(())
}

/// Which programs will not load what was written; branches of which the same is true share a line.
fn print_advice(plan: &Plan, config: &ModelConfig) -> Result<()> {
    let mut lines: Vec<(String, Vec<&str>)> = Vec::new();
    for branch in &plan.branches {
        for line in engines::advice(&Facts::of_settings(config, &branch.quant_config()), Place::Plan) {
            match lines.iter_mut().find(|(known, _)| *known == line) {
                Some((_, branches)) => branches.push(&branch.name),
                None => lines.push((line, vec![&branch.name])),
            }
        }
    }
    for (line, branches) in lines {
        output::line(format_args!("{line} ({})", branches.join(", ")))?;
    }
    Ok(())
}

/// The part that needs a device.
struct MakeAll<'a> {
    args: &'a BranchesArgs,
    dir: &'a Path,
    plan: &'a Plan,
    measurement: Option<&'a Measurement>,
}

impl OnDevice for MakeAll<'_> {
    type Output = Vec<Row>;

    fn run<B: Backend>(self, device: B, kind: DeviceKind) -> Result<Vec<Row>> {
        let Self { args, dir, plan, measurement } = self;
        let work = Work {
            model: &args.model,
            dir,
            out: &args.out,
            mode: args.output.mode(),
            max_shard_size: args.output.max_shard_size,
            calibration: &Calibration::load(&args.calibration, dir, kind)?,
            measurement,
            device,
        };
        work.make_all(plan)
    }
}

/// What all branches share.
pub struct Work<'a, B> {
    pub model: &'a str,
    pub dir: &'a Path,
    pub out: &'a Path,
    pub mode: OutMode,
    pub max_shard_size: Option<u64>,
    pub calibration: &'a Calibration,
    pub measurement: Option<&'a Measurement>,
    pub device: B,
}

/// The text on which branches are compared with the checkpoint.
pub struct Measurement {
    pub dataset: Dataset,
    pub protocol: Protocol,
}

impl<B: Backend> Work<'_, B> {
    /// Makes every branch and returns the measured table. With `--resume`, finished branches are kept.
    pub fn make_all(&self, plan: &Plan) -> Result<Vec<Row>> {
        let files = common::open_model(self.dir)?;
        for branch in &plan.branches {
            produce::check_settings(&files, &params(branch))
                .with_context(|| format!("branch {}", branch.name))?;
        }
        std::fs::create_dir_all(self.out).with_context(|| self.out.display().to_string())?;
        let text = match self.measurement {
            Some(m) => Some(m.protocol.windows(&m.dataset, self.dir)?),
            None => None,
        };
        let baseline = match self.measurement {
            Some(_) => Some(Model::load(self.device.clone(), &files)?),
            None => None,
        };
        let source = Source::check(self.model, self.dir, &files)?;
        // All branches start from the same embedded tokens; a measurement in between needs the memory more.
        let tiles = match self.measurement {
            None => Some(Tiles::embed(&self.device, &files, &self.calibration.sequences)?),
            Some(_) => None,
        };
        for (i, branch) in plan.branches.iter().enumerate() {
            let out = self.out.join(&branch.name);
            if self.mode == OutMode::Resume && out.join(gptq_quantizer::record::LOG_FILE).exists() {
                note!("{} is complete", out.display());
                continue;
            }
            let title = format!("[{}/{}] {}", i + 1, plan.branches.len(), branch.name);
            let tiles = match &tiles {
                Some(tiles) => tiles.clone(),
                None => Tiles::embed(&self.device, &files, &self.calibration.sequences)?,
            };
            self.make(&title, branch, &out, &source, tiles, baseline.as_ref().zip(text.as_ref()))
                .with_context(|| format!("branch {}", branch.name))?;
        }
        Ok(table::measure(self.out)?)
    }

    fn make(
        &self,
        title: &str,
        branch: &Branch,
        out: &Path,
        source: &Source,
        tiles: Tiles<B>,
        baseline: Option<(&Model<B>, &Sequences)>,
    ) -> Result<()> {
        let params = params(branch);
        let job = Job {
            source,
            params: &params,
            zero_bias: true,
            sequences: &self.calibration.sequences,
            calibration: Some(&self.calibration.record),
            out,
            mode: self.mode,
            max_shard_size: self.max_shard_size,
        };
        let mut log = quantize::make(&self.device, &job, tiles, title)?;
        if let (Some(m), Some((baseline, text))) = (self.measurement, baseline) {
            let model = eval::load(&self.device, out)?;
            let result = eval::measure(
                &format!("{title}, measuring"),
                &model,
                Some(Baseline::Beside(baseline)),
                &text.ids,
            )?;
            let evaluation = quantize::evaluation(&m.dataset.name, text.join, &result);
            quantize::record_evaluation(&mut log, out, source.files(), evaluation)?;
        }
        Ok(())
    }
}

fn params(branch: &Branch) -> GptqParams {
    GptqParams { quant: branch.quant_config(), method: Method::Gptq, mse: branch.mse, f16_scales: true }
}
