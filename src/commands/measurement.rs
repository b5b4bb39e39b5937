//! Measuring an artifact beside its checkpoint, and writing down what was found.

use std::cell::OnceCell;
use std::path::Path;

use anyhow::Result;
use gptq_calibration::Sequences;
use gptq_calibration::dataset::Dataset;
use gptq_kernels::Backend;
use gptq_quantizer::artifact::hash_tokens;
use gptq_quantizer::record::{EvaluationRecord, Protocol as Record, QuantizeLog};
use gptq_quantizer::{NUMERICS, card};
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::perplexity::Baseline;

use super::eval::{self, Protocol};

/// The text on which artifacts are compared with their checkpoint.
pub struct Measurement {
    pub dataset: Dataset,
    pub protocol: Protocol,
}

/// A measurement on its way through one or more artifacts.
pub struct Measuring<'a, B: Backend> {
    device: B,
    files: &'a ModelFiles,
    text: Sequences,
    record: Record,
    /// Loaded where something is left to be measured.
    baseline: OnceCell<Model<B>>,
}

impl<'a, B: Backend> Measuring<'a, B> {
    /// Reads the text; `files` and `dir` are the checkpoint's.
    pub fn new(device: &B, files: &'a ModelFiles, dir: &Path, measurement: &Measurement) -> Result<Self> {
        let text = measurement.protocol.windows(&measurement.dataset, dir)?;
        let record = Record {
            dataset: measurement.dataset.name.clone(),
            join: text.join.name().into(),
            ctx: text.ids.first().map_or(0, Vec::len),
            windows: text.ids.len(),
            tokens: hash_tokens(&text.ids),
            arithmetic: device.arithmetic(),
            numerics: NUMERICS,
        };
        Ok(Self { device: device.clone(), files, text, record, baseline: OnceCell::new() })
    }

    /// Measures the artifact in `out`, unless its log has the very measurement, and puts what was found into its log and
    /// onto its card.
    pub fn complete(&self, title: &str, out: &Path, log: &mut QuantizeLog) -> Result<()> {
        if log.evaluation.as_ref().is_some_and(|evaluation| evaluation.protocol == self.record) {
            return Ok(());
        }
        let baseline = match self.baseline.get() {
            Some(baseline) => baseline,
            None => {
                let loaded = Model::load(self.device.clone(), self.files)?;
                self.baseline.get_or_init(|| loaded)
            }
        };
        let model = eval::load(&self.device, out)?;
        let found = eval::measure(title, &model, Some(Baseline::Beside(baseline)), &self.text.ids)?;
        log.evaluation = Some(EvaluationRecord {
            protocol: self.record.clone(),
            tokens_scored: found.tokens_scored,
            perplexity: found.perplexity,
            baseline_perplexity: found.comparison.as_ref().map(|c| c.baseline_perplexity),
            kl_divergence: found.comparison.as_ref().map(|c| c.kl_divergence),
            top1_agreement: found.comparison.as_ref().map(|c| c.top1_agreement),
        });
        Ok(card::update(out, log, &self.files.config)?)
    }
}
