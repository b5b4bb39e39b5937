//! What `quantize` and `branches` can be told.

use std::path::PathBuf;

use clap::Args;

use super::hub::SendingArgs;
use super::values::{
    DeviceArgs, FormatArg, GroupSize, JoinArg, MethodArg, SamplingArg, parse_bits, parse_damp,
    parse_group_size, parse_size,
};

/// Quantize one checkpoint into one artifact
///
/// Writes model.safetensors (or shards), quantize_config.json, config.json with quantization_config, the
/// tokenizer and licence files, a model card and a log with every linear's loss.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq quantize ./Llama-2-7b --out ./Llama-2-7B-GPTQ
  gptq quantize ./model --out ./q8 --bits 8 --group-size -1 --dataset my-texts.jsonl
  gptq quantize ./model --out ./as-published --no-static-groups --dataset wikitext2:test --join raw \
    --samples 128 --seq-len 8192 --seed 0
  gptq quantize ./model --out ./q4 --resume        # goes on after an interruption")]
pub struct QuantizeArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// Output folder; it appears when the artifact is complete
    #[arg(long)]
    pub out: PathBuf,

    /// Bits of a code: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4, value_parser = parse_bits)]
    pub bits: u32,

    /// Input features that share a scale; -1 for one scale per output row
    #[arg(long, default_value = "128", allow_hyphen_values = true, value_parser = parse_group_size)]
    pub group_size: GroupSize,

    /// Solve columns by descending Hessian diagonal (default for gptq)
    #[arg(long, overrides_with = "no_act_order")]
    pub act_order: bool,

    /// Solve columns in their own order
    #[arg(long)]
    pub no_act_order: bool,

    /// Share of the mean Hessian diagonal that is added to it
    #[arg(long, default_value_t = 0.1, value_parser = parse_damp)]
    pub damp_percent: f64,

    /// Even range around zero (default)
    #[arg(long, overrides_with = "asym")]
    pub sym: bool,

    /// Range from the smallest to the largest weight
    #[arg(long)]
    pub asym: bool,

    /// Take the grids from the original weights, groups in file order (default with act-order): vLLM 0.33 and
    /// lmdeploy read the result, too
    #[arg(long, overrides_with = "no_static_groups")]
    pub static_groups: bool,

    /// Find each grid when its group is reached. With act-order, groups are then scattered over the inputs, as in
    /// published files, and the file says desc_act: true
    #[arg(long)]
    pub no_static_groups: bool,

    /// Search each grid for the range with the least error (slower)
    #[arg(long)]
    pub mse: bool,

    /// gptq, or rtn: round to nearest, without calibration
    #[arg(long, value_enum, default_value_t = MethodArg::Gptq)]
    pub method: MethodArg,

    /// How zero points are stored: gptq (v1) or gptq_v2
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
/// 128g and 32g, all with act-order and damp 0.1. Five of them are act-order files with groups, as published;
/// static_groups = true in a plan makes files that every program loads.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq branches ./Llama-2-7b --out ./branches
  gptq branches ./model --out ./branches --plan plan.toml --dataset wikitext2:test

plan.toml:
  [[branch]]
  name = \"main\"
  bits = 4
  group_size = 128      # -1 for none
  # act_order = true, damp_percent = 0.1, sym = true, static_groups = false, mse = false, format = \"gptq\"")]
pub struct BranchesArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// Folder that gets one folder a branch
    #[arg(long)]
    pub out: PathBuf,

    /// Branches to make instead of the card's six
    #[arg(long, value_name = "FILE.toml")]
    pub plan: Option<PathBuf>,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    /// Measure each branch's perplexity and KL divergence on this text
    #[arg(long, value_name = "SPEC")]
    pub eval_dataset: Option<String>,

    /// Publish all branches in this repository on the hub afterwards, as `gptq push` does
    #[arg(long, value_name = "REPO", conflicts_with = "json")]
    pub push: Option<String>,

    #[command(flatten)]
    pub sending: SendingArgs,
}

/// How an artifact is written.
#[derive(Args)]
pub struct OutputArgs {
    /// Go on with an interrupted run, of --force too; the files become the same, bit for bit. What is finished with the
    /// same settings is kept, other settings are refused
    #[arg(long)]
    pub resume: bool,

    /// Begin anew, and replace a finished artifact once the new one is complete; other folders are never replaced. With
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

/// Which text the Hessians see.
#[derive(Args)]
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

    /// Sequences (default: 128 on a GPU, 32 on a CPU)
    #[arg(long)]
    pub samples: Option<usize>,

    /// Tokens of a sequence (default: 2048 on a GPU, 1024 on a CPU)
    #[arg(long, value_name = "T")]
    pub seq_len: Option<usize>,

    /// Seed of the random offsets
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Take sequences at random offsets, or one after another from the start
    #[arg(long, value_enum, default_value_t = SamplingArg::Random)]
    pub sampling: SamplingArg,
}
