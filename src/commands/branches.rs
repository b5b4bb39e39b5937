//! `gptq branches`: every branch of a plan from one checkpoint, with its table.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use gptq_hub::RepoId;
use gptq_kernels::Backend;
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::engines::{self, Facts, Place};
use gptq_quantizer::measure::Measuring;
use gptq_quantizer::plan::{Branch, Plan};
use gptq_quantizer::produce::{self, Job, Source};
use gptq_quantizer::sequential::ActivationCache;
use gptq_quantizer::table::{self, Row};
use gptq_runtime::config::ModelConfig;

use super::card;
use super::common::{self, Calibration, Chosen, DeviceKind};
use super::measurement::{self, Measurement};
use super::push::{self, Push};
use super::quantize;
use crate::args::BranchesArgs;
use crate::{output, stop};

pub fn run(args: &BranchesArgs) -> Result<()> {
    // What could not be sent in the end is told now, hours before.
    match &args.push {
        Some(repo) => {
            RepoId::model(repo)?;
            push::check_answerable(&args.sending)?;
        }
        None => {
            ensure!(!args.sending.is_any(), "--private, --yes and --token: expected --push REPO beside them")
        }
    }
    let dir = common::model_dir(&args.model)?;
    let plan = common::plan(&args.plan, args.preset)?;
    let measurement = match &args.eval_dataset {
        Some(spec) => Some(quantize::measurement(spec, &dir)?),
        None => None,
    };
    let config = common::model_config(&dir)?;
    let rows = match common::device(args.output.device, &config)? {
        Chosen::Cpu(cpu) => make_all(cpu, DeviceKind::Cpu, args, &dir, &plan, measurement.as_ref()),
        Chosen::Gpu(gpu) => make_all(gpu, DeviceKind::Gpu, args, &dir, &plan, measurement.as_ref()),
    }
    .map_err(stop::advise)?;
    match args.output.json {
        true => output::json(&rows)?,
        false => {
            output::text(format_args!("{}", table::to_terminal(&rows)))?;
            print_advice(&plan, &config)?;
        }
    }
    match &args.push {
        Some(repo) => {
            let names: Vec<_> = plan.branches.iter().map(|branch| branch.name.as_str()).collect();
            card::for_push(&args.out, &names, &RepoId::model(repo)?)?;
            let branches =
                plan.branches.iter().map(|branch| (branch.name.clone(), args.out.join(&branch.name)));
            let sending = &args.sending;
            let branches = branches.collect();
            Push { repo, branches, create_pr: false, dry_run: false, sending, json: false }.run()
        }
        None => Ok(()),
    }
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
        say!("{line} ({})", branches.join(", "))?;
    }
    Ok(())
}

fn make_all<B: Backend>(
    device: B,
    kind: DeviceKind,
    args: &BranchesArgs,
    dir: &Path,
    plan: &Plan,
    measurement: Option<&Measurement>,
) -> Result<Vec<Row>> {
    let work = Work {
        model: &args.model,
        dir,
        out: &args.out,
        mode: args.output.mode(),
        max_shard_size: args.output.max_shard_size,
        calibration: &Calibration::load(&args.calibration, dir, kind)?,
        measurement,
        device,
        stop: stop::on_signals()?,
    };
    work.make_all(plan)
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
    /// Once it is set, the work ends at the next safe point.
    pub stop: &'a AtomicBool,
}

impl<B: Backend> Work<'_, B> {
    /// Makes and measures every branch and returns the table. With `--resume`, what is done already is kept.
    pub fn make_all(&self, plan: &Plan) -> Result<Vec<Row>> {
        let files = common::open_model(self.dir)?;
        for branch in &plan.branches {
            produce::check_settings(&files, &branch.params())
                .with_context(|| format!("branch {}", branch.name))?;
        }
        std::fs::create_dir_all(self.out).with_context(|| self.out.display().to_string())?;
        let measuring = match self.measurement {
            Some(measurement) => Some(measurement.begin(&self.device, &files, self.dir)?),
            None => None,
        };
        let source = Source::check(self.model, self.dir, &files)?;
        // Branches alike start from the same embedded tokens; a measurement in between needs the memory more.
        let mut embedded: Option<ActivationCache<B>> = None;
        for (i, branch) in plan.branches.iter().enumerate() {
            let title = format!("[{}/{}] {}", i + 1, plan.branches.len(), branch.name);
            let layout = branch.params().layout();
            let activations = match embedded.take().filter(|activations| activations.layout() == layout) {
                Some(activations) => activations,
                None => ActivationCache::embed(&self.device, &files, &self.calibration.sequences, layout)?,
            };
            if measuring.is_none() {
                embedded = Some(activations.clone());
            }
            self.make(&title, branch, &source, activations, measuring.as_ref())
                .with_context(|| format!("branch {}", branch.name))?;
        }
        Ok(table::measure(self.out)?)
    }

    fn make(
        &self,
        title: &str,
        branch: &Branch,
        source: &Source,
        activations: ActivationCache<B>,
        measuring: Option<&Measuring<B>>,
    ) -> Result<()> {
        let (out, params) = (self.out.join(&branch.name), branch.params());
        let job = Job {
            calibration: Some(&self.calibration.record),
            mode: self.mode,
            max_shard_size: self.max_shard_size,
            stop: self.stop,
            ..Job::new(source, &params, &self.calibration.sequences, &out)
        };
        let mut log = quantize::make(&self.device, &job, activations, title)?;
        match measuring {
            Some(measuring) => {
                measurement::complete(measuring, &format!("{title}, measuring"), &out, &mut log)
            }
            None => Ok(()),
        }
    }
}
