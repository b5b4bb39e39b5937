//! What several verbs need: finding models and texts, turning texts into sequences, choosing the device.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use gptq_calibration::dataset::{self, Dataset, DatasetRoots, DatasetSpec, Join};
use gptq_calibration::hub::{HubCache, ModelRef};
use gptq_calibration::sampling::{SampleRequest, Sampling, sample};
use gptq_calibration::tokenizer::Tokenizer;
use gptq_kernels::Cpu;
use gptq_quantizer::record::CalibrationRecord;

use crate::args::{CalibrationArgs, DeviceArg, JoinArg, SamplingArg};

/// Sequences and their length where the command line leaves them open: enough for a stable Hessian, little
/// enough for a processor. A publisher's 128 x 8192 are given by hand.
const CPU_SAMPLES: usize = 32;
const CPU_SEQ_LEN: usize = 1024;

/// The folder of a model given as folder, hub id or hub-id:branch.
pub fn model_dir(model: &str) -> Result<PathBuf> {
    Ok(ModelRef::parse(model)?.resolve(&HubCache::from_env()?)?)
}

/// The one device of this build; `auto` takes the best there is.
pub fn device(arg: DeviceArg) -> Cpu {
    match arg {
        DeviceArg::Auto | DeviceArg::Cpu => Cpu::new(),
    }
}

/// The rows of a data set given on the command line.
pub fn dataset(spec: &str) -> Result<Dataset> {
    let spec: DatasetSpec = spec.parse()?;
    Ok(dataset::load(&spec, &DatasetRoots::from_env()?)?)
}

/// Tokens of a whole text, encoded in one call.
pub fn tokens(dir: &Path, text: &str) -> Result<Vec<u32>> {
    let tokenizer = Tokenizer::load(dir)?;
    Ok(tokenizer.encode(text, true)?)
}

/// Calibration sequences, and the record of where they came from.
pub struct Calibration {
    pub sequences: Vec<Vec<u32>>,
    pub record: CalibrationRecord,
}

impl Calibration {
    /// Loads, joins, encodes and samples the text that the command line asks for.
    pub fn load(args: &CalibrationArgs, model_dir: &Path) -> Result<Self> {
        let spec = args.dataset.as_str();
        let dataset = dataset(spec).with_context(|| format!("calibration data set {spec}"))?;
        Self::from_dataset(args, &dataset, model_dir)
    }

    pub fn from_dataset(args: &CalibrationArgs, dataset: &Dataset, model_dir: &Path) -> Result<Self> {
        let request = SampleRequest {
            samples: args.samples.unwrap_or(CPU_SAMPLES),
            seq_len: args.seq_len.unwrap_or(CPU_SEQ_LEN),
            sampling: match args.sampling {
                SamplingArg::Consecutive => Sampling::Consecutive,
                SamplingArg::Random => Sampling::Random,
            },
            seed: args.seed,
        };
        let text = dataset.join(args.join.into());
        let tokens = tokens(model_dir, &text)?;
        let sequences =
            sample(&tokens, &request).with_context(|| format!("calibration data set {}", dataset.name))?;
        let record = CalibrationRecord {
            dataset: dataset.name.clone(),
            fingerprint: dataset.fingerprint(),
            join: args.join.name().into(),
            sampling: args.sampling.name().into(),
            samples: request.samples,
            seq_len: request.seq_len,
            seed: request.seed,
        };
        Ok(Self { sequences, record })
    }
}

impl From<JoinArg> for Join {
    fn from(arg: JoinArg) -> Self {
        match arg {
            JoinArg::Paper => Self::Paper,
            JoinArg::Raw => Self::Raw,
        }
    }
}

impl JoinArg {
    pub fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper",
            Self::Raw => "raw",
        }
    }
}

impl SamplingArg {
    fn name(self) -> &'static str {
        match self {
            Self::Consecutive => "consecutive",
            Self::Random => "random",
        }
    }
}
