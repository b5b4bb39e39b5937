//! Measuring artifacts beside their checkpoint, and writing down what was found.

use std::cell::OnceCell;
use std::ops::ControlFlow;
use std::path::Path;

use gptq_kernels::Backend;
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::perplexity::{Baseline, evaluate};

use crate::artifact::hash_tokens;
use crate::record::{EvaluationRecord, Protocol, QuantizeLog};
use crate::{NUMERICS, Result, card};

/// A measurement on its way through one or more artifacts of a checkpoint.
pub struct Measuring<'a, B: Backend> {
    device: B,
    checkpoint: &'a ModelFiles,
    windows: Vec<Vec<u32>>,
    protocol: Protocol,
    /// Loaded where something is left to be measured.
    baseline: OnceCell<Model<B>>,
}

impl<'a, B: Backend> Measuring<'a, B> {
    /// On windows of one length, cut from a data set whose rows were joined by the convention of this name.
    pub fn new(
        device: &B,
        checkpoint: &'a ModelFiles,
        dataset: &str,
        join: &str,
        windows: Vec<Vec<u32>>,
    ) -> Self {
        let protocol = Protocol {
            dataset: dataset.into(),
            join: join.into(),
            ctx: windows.first().map_or(0, Vec::len),
            windows: windows.len(),
            tokens: hash_tokens(&windows),
            arithmetic: device.arithmetic(),
            numerics: NUMERICS,
        };
        Self { device: device.clone(), checkpoint, windows, protocol, baseline: OnceCell::new() }
    }

    /// Windows that an artifact is measured on.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// Whether a log has the very measurement already.
    pub fn is_in(&self, log: &QuantizeLog) -> bool {
        log.evaluation.as_ref().is_some_and(|evaluation| evaluation.protocol == self.protocol)
    }

    /// Measures the artifact in `out`, whose files are `artifact`, and puts what was found into its log and onto its card.
    /// `on_windows` is told of windows that are done and may stop.
    ///
    /// # Errors
    /// Those of loading and evaluating, among them [`gptq_runtime::Error::Stopped`], and of writing the log.
    pub fn complete(
        &self,
        out: &Path,
        artifact: &ModelFiles,
        log: &mut QuantizeLog,
        on_windows: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<()> {
        let baseline = match self.baseline.get() {
            Some(baseline) => baseline,
            None => {
                let loaded = Model::load(self.device.clone(), self.checkpoint)?;
                self.baseline.get_or_init(|| loaded)
            }
        };
        let model = Model::load(self.device.clone(), artifact)?;
        let found = evaluate(&model, Some(Baseline::Beside(baseline)), &self.windows, on_windows)?;
        log.evaluation = Some(EvaluationRecord {
            protocol: self.protocol.clone(),
            tokens_scored: found.tokens_scored,
            perplexity: found.perplexity,
            baseline_perplexity: found.comparison.as_ref().map(|c| c.baseline_perplexity),
            kl_divergence: found.comparison.as_ref().map(|c| c.kl_divergence),
            top1_agreement: found.comparison.as_ref().map(|c| c.top1_agreement),
        });
        card::update(out, log, &self.checkpoint.config)
    }
}
