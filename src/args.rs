//! The command line, typed. What each verb does with it is in `commands/`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Quantize Llama-family checkpoints with GPTQ, measure what each branch costs, and run the result.
///
/// Without a verb the demo runs: six branches of a small built-in model, their table and a text.
#[derive(Parser)]
#[command(name = "gptq", version = env!("GPTQ_VERSION"), propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Option<Verb>,

    /// Say more: -v for decisions, -vv for details
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Subcommand)]
pub enum Verb {
    Demo(DemoArgs),
    Quantize(QuantizeArgs),
    Branches(BranchesArgs),
    Table(TableArgs),
    Eval(EvalArgs),
    Generate(GenerateArgs),
    Inspect(InspectArgs),
    Synth(SynthArgs),
    Bench(BenchArgs),
    Completions(CompletionsArgs),
}

/// The whole story on a small built-in model, in under a minute
///
/// Quantizes the six branches of a publisher's card, measures size, perplexity, KL divergence and top-1
/// agreement of each against the fp16 model, and writes a short text with the main branch.
#[derive(Args, Default)]
#[command(after_help = "Examples:\n  gptq demo\n  gptq demo --out my-branches --force")]
pub struct DemoArgs {
    /// Where the model, the artifacts and the table go
    #[arg(long, default_value = "gptq-demo")]
    pub out: Option<PathBuf>,

    /// Replace an output folder that is not empty (default when no verb is given)
    #[arg(long)]
    pub force: bool,
}

/// Quantize one checkpoint into one artifact
///
/// Writes model.safetensors (or shards), quantize_config.json, config.json with quantization_config, the
/// tokenizer and licence files, a model card and a log with every linear's loss.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq quantize ./Llama-2-7b --out ./Llama-2-7B-GPTQ
  gptq quantize ./model --out ./q8 --bits 8 --group-size -1 --dataset my-texts.jsonl
  gptq quantize ./model --out ./as-published --dataset wikitext2:test --join raw --seq-len 8192 --seed 0
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

    /// Solve columns by descending Hessian diagonal (default)
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

    /// Take the grids from the original weights, groups in file order: every reader understands the result
    #[arg(long)]
    pub static_groups: bool,

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
/// 128g and 32g, all with act-order and damp 0.1.
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
}

/// How an artifact is written.
#[derive(Args)]
pub struct OutputArgs {
    /// Go on with an interrupted run; the files become the same, bit for bit
    #[arg(long)]
    pub resume: bool,

    /// Replace a finished artifact; other folders are never replaced
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,

    /// Split the weights into files of at most this size, e.g. 5GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_shard_size: Option<u64>,

    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceArg,

    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// Which text the Hessians see.
#[derive(Args)]
pub struct CalibrationArgs {
    /// A .parquet, .jsonl or .txt file, a folder of them, or wikitext2[:train|validation|test]
    #[arg(long, value_name = "SPEC", default_value = "wikitext2:train")]
    pub dataset: String,

    /// How rows become one text: joined by blank lines, or concatenated as they are
    #[arg(long, value_enum, default_value_t = JoinArg::Raw)]
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

/// The provided-files table: predicted from a config alone, or measured from artifacts
#[derive(Args)]
#[command(after_help = "Examples:
  gptq table causallm-7b
  gptq table ./model/config.json --json
  gptq table ./model --artifacts ./branches")]
pub struct TableArgs {
    /// Model folder, config.json, or a preset: causallm-7b, causallm-14b, llama2-7b, tinyllama-1.1b
    pub model: String,

    /// Read the table off the artifacts in this folder instead
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,

    /// Branches to list instead of the card's six
    #[arg(long, value_name = "FILE.toml")]
    pub plan: Option<PathBuf>,

    /// Data set named in the table
    #[arg(long, default_value = "wikitext")]
    pub dataset: String,

    /// Sequence length named in the table
    #[arg(long, default_value_t = 8192)]
    pub seq_len: usize,

    /// Exact bytes, tensor and element counts as JSON
    #[arg(long)]
    pub json: bool,
}

/// Perplexity by the GPTQ protocol, and the distance to a baseline
#[derive(Args)]
#[command(after_help = "Examples:
  gptq eval ./Llama-2-7B-GPTQ
  gptq eval ./q4 --baseline ./model --ctx 1024 --max-windows 64 --json")]
pub struct EvalArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// A .parquet, .jsonl or .txt file, a folder of them, or wikitext2[:train|validation|test]
    #[arg(long, value_name = "SPEC", default_value = "wikitext2:test")]
    pub dataset: String,

    /// How rows become one text: joined by blank lines (the paper's way), or concatenated as they are
    #[arg(long, value_enum, default_value_t = JoinArg::Paper)]
    pub join: JoinArg,

    /// Tokens of a window
    #[arg(long, default_value_t = 2048)]
    pub ctx: usize,

    /// Use the first windows only
    #[arg(long, value_name = "N")]
    pub max_windows: Option<usize>,

    /// Model to compare with: KL divergence and top-1 agreement over the same windows
    #[arg(long, value_name = "MODEL")]
    pub baseline: Option<String>,

    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceArg,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Generate text
#[derive(Args)]
#[command(after_help = "Examples:
  gptq generate ./gptq-demo/main --prompt \"The river\" --max-new-tokens 100
  gptq generate ./q4 --chat --system \"You are a poet.\" --prompt \"Write a haiku\" --temperature 0")]
pub struct GenerateArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// Text to continue, or with --chat the user's message
    #[arg(long)]
    pub prompt: String,

    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,

    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f32,

    /// Smallest set of tokens with this much probability
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f32,

    /// Keep this many tokens; 0 keeps all
    #[arg(long, default_value_t = 40)]
    pub top_k: usize,

    /// Above 1 makes tokens seen before less likely
    #[arg(long, default_value_t = 1.1)]
    pub repetition_penalty: f32,

    /// Equal seeds give equal texts (default: another one each time)
    #[arg(long)]
    pub seed: Option<u64>,

    /// Stop before this text; may be given several times
    #[arg(long, value_name = "S")]
    pub stop: Vec<String>,

    /// Wrap the prompt in the model's chat template
    #[arg(long)]
    pub chat: bool,

    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceArg,

    /// Print text, tokens and speed as JSON at the end instead of streaming
    #[arg(long)]
    pub json: bool,
}

/// What a model folder holds and whether it is sound
#[derive(Args)]
#[command(
    after_help = "Examples:\n  gptq inspect ./Llama-2-7B-GPTQ\n  gptq inspect ./q4 --json\n\nThe exit status is 1 where something is unsound."
)]
pub struct InspectArgs {
    /// Model folder
    pub dir: PathBuf,

    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Write a random checkpoint of a given architecture, for tests of scale
#[derive(Args)]
#[command(
    after_help = "Examples:\n  gptq synth tinyllama-1.1b --out ./random-1b\n  gptq synth ./config.json --out ./random --dtype bf16 --seed 7"
)]
pub struct SynthArgs {
    /// causallm-7b, causallm-14b, llama2-7b, tinyllama-1.1b, or a config.json
    pub arch: String,

    /// Output folder; it appears when the checkpoint is complete
    #[arg(long)]
    pub out: PathBuf,

    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Type of the weights (default: the config's)
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,

    /// Split the weights into files of at most this size
    #[arg(long, value_name = "SIZE", default_value = "10GB", value_parser = parse_size)]
    pub max_shard_size: u64,
}

/// Measure this machine and how near the program comes to it
#[derive(Args)]
#[command(
    after_help = "Examples:\n  gptq bench cpu\n  gptq bench cpu --model ./model --dataset wikitext2:validation --samples 64 --seq-len 1024"
)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchVerb,
}

#[derive(Subcommand)]
pub enum BenchVerb {
    /// Phases of quantization and the speed of decoding, beside this CPU's own ceilings
    Cpu(BenchCpuArgs),
}

#[derive(Args)]
pub struct BenchCpuArgs {
    /// Model to quantize (default: the built-in one)
    #[arg(long)]
    pub model: Option<String>,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Print a completion script for a shell
#[derive(Args)]
#[command(
    after_help = "Examples:\n  gptq completions bash > /etc/bash_completion.d/gptq\n  gptq completions zsh > ~/.zfunc/_gptq"
)]
pub struct CompletionsArgs {
    pub shell: Shell,
}

/// `None` is one group a row, -1 on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSize(pub Option<usize>);

/// `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// The first card, or the CPU where there is none.
    Auto,
    Cpu,
    Cuda(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    Gptq,
    Rtn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    Gptq,
    #[value(name = "gptq_v2")]
    GptqV2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum JoinArg {
    Paper,
    Raw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SamplingArg {
    Consecutive,
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    F16,
    Bf16,
}

fn parse_device(text: &str) -> Result<DeviceArg, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceArg::Auto),
        None if text == "cpu" => Ok(DeviceArg::Cpu),
        None if text == "cuda" => Ok(DeviceArg::Cuda(0)),
        Some(("cuda", number)) => number.parse().map(DeviceArg::Cuda).map_err(|_| "expected cuda:N".into()),
        _ => Err("expected auto, cpu, cuda or cuda:N".into()),
    }
}

fn parse_bits(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bits) if matches!(bits, 2 | 3 | 4 | 8) => Ok(bits),
        _ => Err("expected 2, 3, 4 or 8".into()),
    }
}

fn parse_group_size(text: &str) -> Result<GroupSize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(GroupSize(None)),
        Ok(size) if (1..1 << 24).contains(&size) => Ok(GroupSize(Some(size as usize))),
        _ => Err("expected -1 or a positive number".into()),
    }
}

fn parse_damp(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(damp) if damp > 0.0 && damp < 1.0 => Ok(damp),
        _ => Err("expected a number above 0 and below 1".into()),
    }
}

/// Bytes with an optional decimal suffix: 500MB, 5GB.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("expected a number with B, KB, MB or GB".into()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| "expected a number with B, KB, MB or GB")?;
    number.checked_mul(factor).filter(|size| *size > 0).ok_or("expected a positive size below 2^64".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent_and_every_verb_shows_an_example() {
        Cli::command().debug_assert();
        for verb in Cli::command().get_subcommands().filter(|verb| verb.get_name() != "help") {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:"), "{}", verb.get_name());
        }
    }

    #[test]
    fn sizes_and_groups_are_read_as_people_write_them() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(
            parse_size("5 apples").is_err()
                && parse_size("0").is_err()
                && parse_size("99999999999GB").is_err()
        );
        assert_eq!(parse_group_size("-1"), Ok(GroupSize(None)));
        assert!(parse_group_size("0").is_err() && parse_group_size("-2").is_err());
        assert_eq!(parse_device("cuda:3"), Ok(DeviceArg::Cuda(3)));
        assert!(parse_device("cuda:x").is_err() && parse_device("tpu").is_err());
        assert!(parse_bits("5").is_err() && parse_damp("1").is_err() && parse_damp("NaN").is_err());
    }

    #[test]
    fn the_last_of_two_opposite_flags_counts() {
        let parse = |flags: &[&str]| {
            let base = ["gptq", "quantize", "m", "--out", "o"];
            match Cli::try_parse_from(base.iter().chain(flags)).map(|cli| cli.verb) {
                Ok(Some(Verb::Quantize(args))) => args,
                _ => panic!("not a quantize command"),
            }
        };
        assert!(!parse(&[]).no_act_order && !parse(&[]).asym);
        assert!(parse(&["--no-act-order", "--asym"]).no_act_order);
        assert!(!parse(&["--no-act-order", "--act-order"]).no_act_order);
    }
}
