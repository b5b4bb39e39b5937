//! What several verbs need: finding models and texts, turning texts into sequences, choosing the device.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use gptq_calibration::dataset::{self, Dataset, DatasetRoots, DatasetSpec, Join};
use gptq_calibration::sampling::{SampleRequest, Sampling};
use gptq_hub::Wanted;
use gptq_kernels::{Backend, Cpu, Cuda, Dtype, KvDtype};
use gptq_quantizer::plan::Plan;
use gptq_quantizer::recipe::Preset;
use gptq_quantizer::record::CalibrationRecord;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::soundness::summary;
use gptq_text::tokenizer::Tokenizer;

use crate::args::{
    CalibrationArgs, ComputeArg, DeviceArg, DeviceArgs, JoinArg, KvDtypeArg, PlanArg, SamplingArg,
};

/// The folder of a model given as folder, hub id or hub-id:branch. What is missing of one on the hub is fetched.
pub fn model_dir(model: &str) -> Result<PathBuf> {
    super::fetch::model(model, Wanted::Model)
}

/// The config.json of a model named as before. Nothing else of one on the hub is fetched.
pub fn config_file(model: &str) -> Result<PathBuf> {
    const CONFIG: &str = "config.json";
    Ok(super::fetch::model(model, Wanted::Files(vec![CONFIG.into()]))?.join(CONFIG))
}

/// What the model in a folder says of itself.
pub fn model_config(dir: &Path) -> Result<ModelConfig> {
    Ok(ModelConfig::from_file(&dir.join("config.json"))?)
}

/// The branches of a plan; `preset` is that of those that name none.
pub fn plan(plan: &PlanArg, preset: Preset) -> Result<Plan> {
    Ok(match plan {
        PlanArg::Card => Plan::card(preset),
        PlanArg::Portable => Plan::portable(preset),
        PlanArg::File(path) => Plan::from_toml(path, preset)?,
    })
}

/// Opens a model folder; what is amiss with it without making a number wrong goes to stderr.
pub fn open_model(dir: &Path) -> Result<ModelFiles> {
    let files = ModelFiles::open(dir)?;
    for note in summary(&files.notes) {
        note!("note: {}: {note}", dir.display());
    }
    Ok(files)
}

/// Loads a model folder onto the device.
pub fn load_model<B: Backend>(device: &B, dir: &Path) -> Result<Model<B>> {
    Ok(Model::load(device.clone(), &open_model(dir)?)?)
}

/// The device that was chosen.
pub enum Chosen {
    Cpu(Cpu),
    Gpu(Cuda),
}

/// What a device is good for, where defaults depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Gpu,
}

/// Picks the device, once, for a model of this config. `auto` takes the first GPU, and says why where there
/// is none.
pub fn device(args: DeviceArgs, config: &ModelConfig) -> Result<Chosen> {
    let ordinal = match args.device {
        DeviceArg::Cpu => return Ok(Chosen::Cpu(Cpu::new())),
        DeviceArg::Cuda(ordinal) => ordinal,
        DeviceArg::Auto => 0,
    };
    let dtype = match (args.dtype, config.dtype) {
        (ComputeArg::Auto, Dtype::BF16) | (ComputeArg::Bf16, _) => Dtype::BF16,
        (ComputeArg::Auto, _) | (ComputeArg::F16, _) => Dtype::F16,
        (ComputeArg::F32, _) => Dtype::F32,
    };
    let memory = args.max_gpu_memory.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    match Cuda::new(ordinal, dtype, memory) {
        Ok(gpu) => Ok(Chosen::Gpu(gpu)),
        Err(error) if args.device == DeviceArg::Auto => {
            note!("computing on the CPU ({error})");
            Ok(Chosen::Cpu(Cpu::new()))
        }
        Err(error) => Err(error.into()),
    }
}

/// A data set given on the command line. Conversations in it are written by the model's chat template.
pub fn dataset(spec: &str, text_field: Option<&str>, model_dir: &Path) -> Result<Dataset> {
    let spec: DatasetSpec = spec.parse()?;
    let roots = DatasetRoots::from_env().with_hub(super::fetch::dataset);
    Ok(dataset::load(&spec, &roots)?.with_text_field(text_field).with_template_of(model_dir))
}

/// Calibration sequences, and the record of where they came from.
pub struct Calibration {
    pub sequences: Vec<Vec<u32>>,
    pub record: CalibrationRecord,
}

impl Calibration {
    /// Loads, joins, encodes and samples the text that the command line asks for.
    pub fn load(args: &CalibrationArgs, model_dir: &Path, kind: DeviceKind) -> Result<Self> {
        let spec = args.dataset.as_str();
        let dataset = dataset(spec, args.text_field.as_deref(), model_dir)
            .with_context(|| format!("calibration data set {spec}"))?;
        Self::from_dataset(args, &dataset, model_dir, kind)
    }

    pub fn from_dataset(
        args: &CalibrationArgs,
        dataset: &Dataset,
        model_dir: &Path,
        kind: DeviceKind,
    ) -> Result<Self> {
        let (samples, seq_len) = size(args, kind);
        let request = SampleRequest {
            samples,
            seq_len,
            sampling: match args.sampling {
                SamplingArg::Consecutive => Sampling::Consecutive,
                SamplingArg::Random => Sampling::Random,
            },
            seed: args.seed,
        };
        let sequences = dataset
            .sample(&Tokenizer::load(model_dir)?, args.join.into(), &request)
            .with_context(|| format!("calibration data set {}", dataset.name))?;
        let record = record(args, kind, sequences.join, (&dataset.name, sequences.fingerprint));
        Ok(Self { sequences: sequences.ids, record })
    }

    /// Random token ids, for tests of scale.
    pub fn random(args: &CalibrationArgs, kind: DeviceKind, vocab_size: usize) -> Self {
        let (samples, seq_len) = size(args, kind);
        let mut state = args.seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as usize % vocab_size.max(1)) as u32
        };
        let sequences = (0..samples).map(|_| (0..seq_len).map(|_| next()).collect()).collect();
        let text = ("random token ids", format!("seed {}", args.seed));
        Self { sequences, record: record(args, kind, args.join.into(), text) }
    }
}

/// Sequences and their length. Where the command line leaves them open: enough for a stable Hessian, little enough for the
/// device. A publisher's 128 x 8192 are given by hand.
fn size(args: &CalibrationArgs, kind: DeviceKind) -> (usize, usize) {
    let (samples, seq_len) = match kind {
        DeviceKind::Cpu => (32, 1024),
        DeviceKind::Gpu => (128, 2048),
    };
    (args.samples.unwrap_or(samples), args.seq_len.unwrap_or(seq_len))
}

fn record(
    args: &CalibrationArgs,
    kind: DeviceKind,
    join: Join,
    (dataset, fingerprint): (&str, String),
) -> CalibrationRecord {
    let (samples, seq_len) = size(args, kind);
    let (join, sampling) = (join.name().into(), name(args.sampling));
    CalibrationRecord {
        dataset: dataset.into(),
        fingerprint,
        join,
        sampling,
        samples,
        seq_len,
        seed: args.seed,
    }
}

impl From<JoinArg> for Join {
    fn from(arg: JoinArg) -> Self {
        match arg {
            JoinArg::Paper => Self::Paper,
            JoinArg::Raw => Self::Raw,
            JoinArg::Lines => Self::Lines,
        }
    }
}

impl From<KvDtypeArg> for KvDtype {
    fn from(arg: KvDtypeArg) -> Self {
        match arg {
            KvDtypeArg::Auto => Self::Auto,
            KvDtypeArg::Int8 => Self::Int8,
        }
    }
}

/// For titles: nothing, where the cache is as one expects it.
pub fn kv_note(dtype: impl Into<KvDtype>) -> &'static str {
    match dtype.into() {
        KvDtype::Auto => "",
        KvDtype::Int8 => ", int8 KV cache",
    }
}

/// As the command line has it.
pub fn name(arg: impl ValueEnum) -> String {
    arg.to_possible_value().map_or(String::new(), |value| value.get_name().into())
}
