//! What `--eval-dataset` asks for: the text, how it becomes windows, and progress while an artifact is measured.

use std::path::Path;

use anyhow::Result;
use gptq_calibration::dataset::Dataset;
use gptq_kernels::Backend;
use gptq_quantizer::measure::Measuring;
use gptq_quantizer::record::QuantizeLog;
use gptq_runtime::model::ModelFiles;

use super::common;
use super::eval::{self, Protocol};

/// The text on which artifacts are compared with their checkpoint.
pub struct Measurement {
    pub dataset: Dataset,
    pub protocol: Protocol,
}

impl Measurement {
    /// Reads the text; `files` and `dir` are the checkpoint's.
    pub fn begin<'a, B: Backend>(
        &self,
        device: &B,
        files: &'a ModelFiles,
        dir: &Path,
    ) -> Result<Measuring<'a, B>> {
        let text = self.protocol.windows(&self.dataset, dir)?;
        Ok(Measuring::new(device, files, &self.dataset.name, text.join.name(), text.ids))
    }
}

/// Measures the artifact in `out`, unless its log has the very measurement.
pub fn complete<B: Backend>(
    measuring: &Measuring<B>,
    title: &str,
    out: &Path,
    log: &mut QuantizeLog,
) -> Result<()> {
    if measuring.is_in(log) {
        return Ok(());
    }
    let artifact = common::open_model(out)?;
    let mut on_windows = eval::progress(title, measuring.windows());
    Ok(measuring.complete(out, &artifact, log, &mut on_windows)?)
}
