//! What `quantize` and `branches` can be told.

use std::path::PathBuf;

use clap::Args;

use gptq_quantizer::recipe::{Named, Preset};

use super::hub::SendingArgs;
use super::recipe::{RecipeArgs, named};
use super::values::{
    DeviceArgs, FormatArg, GroupSize, JoinArg, MethodArg, PlanArg, SamplingArg, parse_bits, parse_damp,
    parse_group_size, parse_plan, parse_size,
};

/// Quantize one checkpoint into one artifact
///
/// Writes model.safetensors (or shards), quantize_config.json, config.json with quantization_config, the
/// tokenizer and licence files, a model card and a log with every linear's loss.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq quantize ./Llama-2-7b --out ./Llama-2-7B-GPTQ
  gptq quantize ./model --out ./q8 --bits 8 --group-size -1 --dataset my-texts.jsonl
  gptq quantize ./model --out ./as-published --preset card --dataset wikitext2:test --join raw \
    --samples 128 --seq-len 8192 --seed 0
  gptq quantize ./model --out ./q4 --resume        # goes on after an interruption")]
pub struct QuantizeArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// Output folder; it appears when the artifact is complete
    #[arg(long)]
    pub out: PathBuf,

    /// Bits per weight: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4, value_parser = parse_bits)]
    pub bits: u32,

    /// Input features that share a scale; -1 for one scale per output row
    #[arg(long, default_value = "128", allow_hyphen_values = true, value_parser = parse_group_size)]
    pub group_size: GroupSize,

    /// Damping: fraction of the mean Hessian diagonal that is added to the diagonal
    #[arg(long, default_value_t = 0.1, value_parser = parse_damp)]
    pub damp_percent: f64,

    /// Symmetric: an even range around zero (default)
    #[arg(long, overrides_with = "asym")]
    pub sym: bool,

    /// Asymmetric: the range from the smallest to the largest weight
    #[arg(long)]
    pub asym: bool,

    #[command(flatten)]
    pub recipe: RecipeArgs,

    /// gptq, or rtn: round to nearest, without calibration
    #[arg(long, value_enum, default_value_t = MethodArg::Gptq)]
    pub method: MethodArg,

    /// Checkpoint format: gptq (v1) or gptq_v2, which differ in how zero points are stored
    #[arg(long, value_enum, default_value_t = FormatArg::Gptq)]
    pub checkpoint_format: FormatArg,

    /// Leave out the all-zero bias tensors that AutoGPTQ writes
    #[arg(long)]
    pub no_bias: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    /// Measure the artifact's perplexity on this text afterwards and put it on the card
    #[arg(long, value_name = "SPEC")]
    pub eval_dataset: Option<String>,
}

/// Quantize every branch of a plan, one folder each, and print their table
///
/// Without a plan: the six branches of the usual card, 4-bit 128g (main), 32g and 64g, 8-bit without groups,
/// 128g and 32g, all with act-order and damp 0.1. Five of them are act-order files with groups, as published.
/// --plan portable makes files that every program loads: 4-bit 128g (main), 32g and 64g, groups in file order.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq branches ./Llama-2-7b --out ./branches
  gptq branches ./model --out ./portable --plan portable
  gptq branches ./model --out ./branches --plan plan.toml --dataset wikitext2:test

plan.toml:
  [[branch]]
  name = \"main\"
  bits = 4
  group_size = 128      # -1 for none
  # damp_percent = 0.1, sym = true, format = \"gptq\", preset = \"best\", order = \"act-order\", grid = \"loop\",
  # target = \"asymmetric\", rounds = 2")]
pub struct BranchesArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// Folder that gets one folder a branch
    #[arg(long)]
    pub out: PathBuf,

    /// Branches to make: card, portable, or those of a file
    #[arg(long, value_name = "PLAN", default_value = "card", value_parser = parse_plan)]
    pub plan: PlanArg,

    /// Preset of branches whose plan names none, as for quantize; their column orders stay
    #[arg(long, value_parser = named::<Preset>(), default_value = Preset::default().name())]
    pub preset: Preset,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    /// Measure each branch's perplexity and KL divergence on this text
    #[arg(long, value_name = "SPEC")]
    pub eval_dataset: Option<String>,

    /// Publish all branches in this repository on the hub afterwards, as `gptq card` and `gptq push` do
    #[arg(long, value_name = "REPO", conflicts_with = "json")]
    pub push: Option<String>,

    #[command(flatten)]
    pub sending: SendingArgs,
}

/// How an artifact is written.
#[derive(Args)]
pub struct OutputArgs {
    /// Resume an interrupted run, also one begun with --force; the files become the same, bit for bit. What is finished with the
    /// same settings is kept, other settings are refused
    #[arg(long)]
    pub resume: bool,

    /// Start over, and replace a finished artifact once the new one is complete; other folders are never replaced. With
    /// --resume: only what has other settings
    #[arg(long)]
    pub force: bool,

    /// Split the weights into files of at most this size, e.g. 5GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_shard_size: Option<u64>,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// Calibration data.
#[derive(Args, Clone)]
pub struct CalibrationArgs {
    /// A .parquet, .jsonl, .json or .txt file (the last three also as .gz or .zst), a folder of them, or
    /// wikitext2[:train|validation|test]
    #[arg(long, value_name = "SPEC", default_value = "wikitext2:train")]
    pub dataset: String,

    /// Field (JSON) or column (parquet) of a row that is read: a text, or a conversation [default: text, messages,
    /// conversations, or instruction with output]
    #[arg(long, value_name = "NAME")]
    pub text_field: Option<String>,

    /// How rows become one text. A .txt file is one row
    #[arg(long, value_enum, default_value_t = JoinArg::Lines)]
    pub join: JoinArg,

    /// Number of calibration sequences (default: 128 on a GPU, 32 on a CPU)
    #[arg(long)]
    pub samples: Option<usize>,

    /// Length of a calibration sequence in tokens (default: 2048 on a GPU, 1024 on a CPU)
    #[arg(long, value_name = "T")]
    pub seq_len: Option<usize>,

    /// Seed of the random offsets
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Take sequences at random offsets, or one after another from the start
    #[arg(long, value_enum, default_value_t = SamplingArg::Random)]
    pub sampling: SamplingArg,
}
