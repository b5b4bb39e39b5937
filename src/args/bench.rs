//! What `bench` can be told.

mod serve;
mod speed;

use clap::{Args, Subcommand};

use gptq_quantizer::recipe::{Named, Preset};

pub use serve::ServeBenchArgs;
pub use speed::{DecodeBenchArgs, LoadBenchArgs, MatmulBenchArgs, PrefillBenchArgs};

use super::quantize::CalibrationArgs;
use super::recipe::named;
use super::values::{DeviceArgs, GroupSize, JoinArg, parse_bits, parse_damp, parse_group_size};

/// Benchmarks, each beside a ceiling of the same machine
///
/// Every figure stands beside a ceiling that was measured in the same run, on the same device.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq bench cpu ./model --samples 64 --seq-len 1024
  gptq bench quantize
  gptq bench quantize ./model --dataset wikitext2:validation --samples 64 --seq-len 1024
  gptq bench quality ./model --seeds 3 --max-windows 64
  gptq bench reference causallm-7b
  gptq bench agreement ./model --device cuda --dtype f32
  gptq bench decode ./Llama-2-7B-GPTQ --batch 1,8,64 --context 128
  gptq bench prefill ./Llama-2-7B-GPTQ --tokens 512,8192
  gptq bench matmul ./Llama-2-7B-GPTQ --tokens 1,64
  gptq bench load ./Llama-2-7B-GPTQ --json
  gptq bench serve ./Llama-2-7B-GPTQ --clients 64 --requests 256 --prompt-tokens 128 --tokens 256
  gptq bench serve --url http://127.0.0.1:3000 --clients 64 --seconds 30")]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchVerb,
}

#[derive(Subcommand)]
pub enum BenchVerb {
    Cpu(CpuBenchArgs),
    Quantize(QuantizeBenchArgs),
    Quality(QualityBenchArgs),
    Reference(ReferenceBenchArgs),
    Agreement(AgreementBenchArgs),
    Decode(DecodeBenchArgs),
    Prefill(PrefillBenchArgs),
    Load(LoadBenchArgs),
    Matmul(MatmulBenchArgs),
    Serve(ServeBenchArgs),
}

/// CPU: quantizing, prefill and decoding as shares of peak GEMM speed and read bandwidth
///
/// The GEMM is one of large f32 matrices; bandwidth is that of all cores reading memory. A checkpoint is
/// quantized with the settings of the branch main and the preset card, and the result decodes; an artifact only decodes.
#[derive(Args)]
pub struct CpuBenchArgs {
    /// Model folder or hub id (default: the built-in model)
    pub model: Option<String>,

    /// Keep the artifact in this folder (default: a temporary one, removed at the end)
    #[arg(long, value_name = "DIR")]
    pub out: Option<std::path::PathBuf>,

    /// Random token ids instead of a text, for a checkpoint without a tokenizer
    #[arg(long)]
    pub random_tokens: bool,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    /// Number of tokens to generate in each sequence
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,

    /// Context length at the first step
    #[arg(long, default_value_t = 0)]
    pub context: usize,

    /// Batch sizes, measured one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_parser = at_least_one)]
    pub batch: Vec<usize>,

    /// Prompt lengths; each prompt is one forward pass
    #[arg(long, value_delimiter = ',', default_value = "512", value_parser = at_least_one)]
    pub prompt: Vec<usize>,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Quantization: seconds of every phase, beside the least that the hardware allows
#[derive(Args)]
pub struct QuantizeBenchArgs {
    /// Model folder or hub id (default: the built-in model)
    pub model: Option<String>,

    /// Branches to make: main alone, or all six
    #[arg(long)]
    pub all_branches: bool,

    /// Quantization preset of the branches
    #[arg(long, value_parser = named::<Preset>(), default_value = Preset::default().name())]
    pub preset: Preset,

    /// Keep the artifacts in this folder (default: a temporary one, removed at the end)
    #[arg(long, value_name = "DIR")]
    pub out: Option<std::path::PathBuf>,

    /// Random token ids instead of a text, for a checkpoint without a tokenizer
    #[arg(long)]
    pub random_tokens: bool,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Presets compared: perplexity, KL divergence, top-1 agreement, layer losses, seconds
///
/// Every preset quantizes the model with every calibration seed; all are measured on the same windows of held-out text.
/// The loss of a stage is the squared error of its outputs against those of the checkpoint, each with
/// its own inputs, as a share of their squares; the mean over all stages. Means over seeds, with sample deviations.
#[derive(Args)]
pub struct QualityBenchArgs {
    /// Model folder or hub id (default: the built-in model and its texts)
    pub model: Option<String>,

    /// Presets to compare
    #[arg(long, value_delimiter = ',', value_parser = named::<Preset>(), default_value = "best,fast,card")]
    pub presets: Vec<Preset>,

    /// Number of calibration seeds, from --seed on
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub seeds: u32,

    /// Bits per weight: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4, value_parser = parse_bits)]
    pub bits: u32,

    /// Input features that share a scale; -1 for one scale per output row
    #[arg(long, default_value = "128", allow_hyphen_values = true, value_parser = parse_group_size)]
    pub group_size: GroupSize,

    /// Damping: fraction of the mean Hessian diagonal that is added to the diagonal
    #[arg(long, default_value_t = 0.1, value_parser = parse_damp)]
    pub damp_percent: f64,

    /// Evaluation text, given as for --dataset
    #[arg(long, value_name = "SPEC", default_value = "wikitext2:test")]
    pub eval_dataset: String,

    /// How its rows become one text
    #[arg(long, value_enum, default_value_t = JoinArg::Paper)]
    pub eval_join: JoinArg,

    /// Window length in tokens
    #[arg(long, default_value_t = 1024)]
    pub ctx: usize,

    /// Maximum number of windows
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub max_windows: usize,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures of every run as JSON
    #[arg(long)]
    pub json: bool,
}

/// GPTQ's loss against round-to-nearest and an f64 reference, on layers of a real shape
///
/// Weights are random, inputs correlated as trained models' are; the objective `(w - q) H (w - q)^T` is
/// computed in f64 for a sample of rows of every linear.
#[derive(Args)]
pub struct ReferenceBenchArgs {
    /// a preset (causallm-7b, qwen3-8b, qwen3-30b-a3b, gemma-3-4b, ...), or a config.json
    pub arch: String,

    /// Layers to solve
    #[arg(long, default_value_t = 2)]
    pub layers: usize,

    /// Tokens of the synthetic inputs
    #[arg(long, default_value_t = 32768)]
    pub tokens: usize,

    /// Rows of every linear that the f64 reference solves
    #[arg(long, default_value_t = 8)]
    pub rows: usize,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Agreement of a device's codes and losses with the CPU's
///
/// Every stage is solved by both on the inputs that the CPU's stages before it make: the smallest difference of
/// a sum may flip a code, and from there on two independent runs differ.
#[derive(Args)]
pub struct AgreementBenchArgs {
    /// Model folder or hub id
    pub model: String,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number, 1 or more".into())
}
