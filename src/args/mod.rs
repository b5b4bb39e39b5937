//! The command line, typed. What each verb does with it is in `commands/`.

mod bench;
mod hub;
mod quantize;
mod recipe;
mod serve;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

pub use bench::{
    AgreementBenchArgs, BenchArgs, BenchVerb, CpuBenchArgs, DecodeBenchArgs, LoadBenchArgs, MatmulBenchArgs,
    PrefillBenchArgs, QualityBenchArgs, QuantizeBenchArgs, ReferenceBenchArgs, ServeBenchArgs,
};
pub use hub::{CardArgs, DownloadArgs, PushArgs, RepoTypeArg, ReportArgs, SendingArgs};
pub use quantize::{BranchesArgs, CalibrationArgs, OutputArgs, QuantizeArgs};
pub use serve::{OpenRouteArg, ServeArgs};
pub use values::{
    ComputeArg, DeviceArg, DeviceArgs, DtypeArg, FormatArg, JoinArg, KvCacheArgs, KvDtypeArg, MethodArg,
    PlanArg, SamplingArg,
};
use values::{parse_plan, parse_size, parse_top_k};

/// Quantize Llama-family checkpoints with GPTQ, measure what each branch costs, and run the result.
///
/// Without a verb the demo runs: six branches of a small built-in model, their table and a text.
#[derive(Parser)]
#[command(name = "gptq", version = env!("GPTQ_VERSION"), propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Option<Verb>,

    /// More log output: -v for decisions, -vv for details
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
    Chat(ChatArgs),
    Serve(ServeArgs),
    Inspect(InspectArgs),
    Synth(SynthArgs),
    Download(DownloadArgs),
    Push(PushArgs),
    Card(CardArgs),
    Report(ReportArgs),
    Bench(BenchArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Run everything on a small built-in model, in under a minute
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

/// The provided-files table: predicted from a config alone, or measured from artifacts
#[derive(Args)]
#[command(after_help = "Examples:
  gptq table causallm-7b
  gptq table ./model/config.json --json
  gptq table ./model --artifacts ./branches")]
pub struct TableArgs {
    /// Model folder, hub id, config.json, or a preset (causallm-7b, qwen3-8b, qwen3-30b-a3b, gemma-3-4b, ...)
    pub model: String,

    /// Read the table off the artifacts in this folder instead
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,

    /// Branches to list: card, portable, or those of a file
    #[arg(long, value_name = "PLAN", default_value = "card", value_parser = parse_plan)]
    pub plan: PlanArg,

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
  gptq eval ./q4 --baseline ./model --ctx 1024 --max-windows 64 --json
  gptq eval ./q4 --baseline ./q4 --kv-cache-dtype int8
  gptq eval ./q4 --baseline ./q4 --baseline-on-cpu --device cuda")]
pub struct EvalArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// A .parquet, .jsonl, .json or .txt file (the last three also as .gz or .zst), a folder of them, or
    /// wikitext2[:train|validation|test]
    #[arg(long, value_name = "SPEC", default_value = "wikitext2:test")]
    pub dataset: String,

    /// Field (JSON) or column (parquet) of a row that is read: a text, or a conversation [default: text, messages,
    /// conversations, or instruction with output]
    #[arg(long, value_name = "NAME")]
    pub text_field: Option<String>,

    /// How rows become one text. A .txt file is one row
    #[arg(long, value_enum, default_value_t = JoinArg::Paper)]
    pub join: JoinArg,

    /// Window length in tokens
    #[arg(long, default_value_t = 2048)]
    pub ctx: usize,

    /// Maximum number of windows
    #[arg(long, value_name = "N")]
    pub max_windows: Option<usize>,

    /// Model to compare with: KL divergence and top-1 agreement over the same windows. It runs without a KV cache
    #[arg(long, value_name = "MODEL")]
    pub baseline: Option<String>,

    /// Compute the baseline on the CPU in f32; with the same model, what the GPU makes of it. Logits are compared too
    #[arg(long, requires = "baseline")]
    pub baseline_on_cpu: bool,

    #[command(flatten)]
    pub kv_cache: KvCacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Sampling parameters
#[derive(Args)]
pub struct SamplingArgs {
    /// 0 takes the most likely token (default: as generation_config.json says, 0.7 where there is none)
    #[arg(long)]
    pub temperature: Option<f32>,

    /// Smallest set of tokens with this much probability (default: likewise, or 0.95)
    #[arg(long)]
    pub top_p: Option<f32>,

    /// Keep this many tokens; 0 and -1 keep all (default: likewise, or 40)
    #[arg(long, allow_negative_numbers = true, value_parser = parse_top_k)]
    pub top_k: Option<usize>,

    /// Keep tokens with at least this fraction of the most likely token's probability (default: likewise, or 0)
    #[arg(long)]
    pub min_p: Option<f32>,

    /// Typical sampling: keep the most typical tokens with this much probability (default: likewise, or 1)
    #[arg(long)]
    pub typical_p: Option<f32>,

    /// Repetition penalty: above 1 makes tokens of the context less likely (default: likewise, or 1)
    #[arg(long)]
    pub repetition_penalty: Option<f32>,

    /// Seed of the sampling (default: a random one)
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Chat with a model in the terminal
///
/// Answers are streamed; Ctrl-C stops an answer. Lines are edited, and the arrows find earlier ones. /reset forgets
/// the conversation, /system TEXT begins a new one with other instructions, /help lists these, /quit (or Ctrl-D) ends.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq chat ./gptq-demo/main
  gptq chat ./q4 --system \"You are a poet.\" --temperature 0.9
  echo \"Who are you?\" | gptq chat ./q4 --temperature 0")]
pub struct ChatArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// System message where none is given, also after /system without a text
    #[arg(long, value_name = "TEXT")]
    pub default_system: Option<String>,

    /// Maximum number of new tokens in an answer (default: as generation_config.json says, else 512)
    #[arg(long)]
    pub max_new_tokens: Option<usize>,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    #[command(flatten)]
    pub kv_cache: KvCacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,
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

    /// Maximum number of new tokens (default: as generation_config.json says, else 512)
    #[arg(long)]
    pub max_new_tokens: Option<usize>,

    /// Minimum number of new tokens: end-of-text tokens are not sampled before
    #[arg(long, value_name = "N")]
    pub min_new_tokens: Option<usize>,

    /// Ignore end-of-text tokens and continue up to the maximum
    #[arg(long)]
    pub ignore_eos: bool,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Stop string; may be given several times
    #[arg(long, value_name = "S")]
    pub stop: Vec<String>,

    /// Wrap the prompt in the model's chat template
    #[arg(long)]
    pub chat: bool,

    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// System message of the chat where --system gives none
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub default_system: Option<String>,

    #[command(flatten)]
    pub kv_cache: KvCacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print text, tokens and speed as JSON at the end instead of streaming
    #[arg(long)]
    pub json: bool,
}

/// Describe and check a model folder
#[derive(Args)]
#[command(
    after_help = "Examples:\n  gptq inspect ./Llama-2-7B-GPTQ\n  gptq inspect ./q4 --json\n\nThe exit status is 1 where something is unsound."
)]
pub struct InspectArgs {
    /// Model folder, hub id, or hub-id:branch
    pub model: String,

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
    /// a preset (causallm-7b, qwen3-8b, qwen3-30b-a3b, gemma-3-4b, ...), or a config.json
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

/// Print a completion script for a shell
#[derive(Args)]
#[command(
    after_help = "Examples:\n  gptq completions bash > /etc/bash_completion.d/gptq\n  gptq completions zsh > ~/.zfunc/_gptq"
)]
pub struct CompletionsArgs {
    pub shell: Shell,
}

/// Write man pages, one for the program and one for every command
#[derive(Args)]
#[command(after_help = "Examples:\n  gptq man --out /usr/local/share/man/man1 && man gptq-quantize")]
pub struct ManArgs {
    /// Folder for the pages, made where it is not there
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use gptq_quantizer::recipe::Order;

    #[test]
    fn the_definition_is_consistent_and_every_verb_shows_an_example() {
        Cli::command().debug_assert();
        for verb in Cli::command().get_subcommands().filter(|verb| verb.get_name() != "help") {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:"), "{}", verb.get_name());
        }
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
        let order = |flags: &[&str]| parse(flags).recipe.order();
        assert!(order(&[]).is_none() && !parse(&[]).asym && parse(&["--asym"]).asym);
        for (flags, expected) in [
            (&["--no-act-order"][..], Order::File),
            (&["--no-act-order", "--act-order"], Order::ActOrder),
            (&["--no-static-groups", "--static-groups"], Order::StaticGroups),
            (&["--static-groups", "--no-static-groups"], Order::ActOrder),
            (&["--act-order", "--static-groups"], Order::StaticGroups),
            (&["--order", "gar"], Order::Gar),
        ] {
            assert_eq!(order(flags), Some(expected), "{flags:?}");
        }
    }
}
