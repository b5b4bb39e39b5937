//! What can be told to the verbs that speak to a hub.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Fetch a model from a hub, every byte verified
///
/// Files go to the cache that all hub clients share (HF_HOME, HF_HUB_CACHE), or to --local-dir. What is there already is
/// read and verified, not fetched. An interrupted download goes on with the same command. HF_ENDPOINT, HF_TOKEN and
/// HTTPS_PROXY are respected. Prints the folder.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq download someone/Model-7B-GPTQ
  gptq download someone/Model-7B-GPTQ:gptq-4bit-32g-actorder_True --local-dir ./model
  gptq download someone/Model-7B config.json tokenizer.json
  gptq download someone/Model-7B --include '*.safetensors' --exclude 'consolidated*' --dry-run")]
pub struct DownloadArgs {
    /// Hub id, or hub-id:branch
    pub repo: String,

    /// Files to fetch [default: all]
    pub files: Vec<String>,

    /// Branch, tag or commit
    #[arg(long)]
    pub revision: Option<String>,

    #[arg(long, value_enum, default_value_t = RepoTypeArg::Model)]
    pub repo_type: RepoTypeArg,

    /// Put plain files there, and nothing into the cache
    #[arg(long, value_name = "DIR", conflicts_with = "cache_dir")]
    pub local_dir: Option<PathBuf>,

    /// Use this cache
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Only files that fit; may be given several times. * also crosses /
    #[arg(long, value_name = "PATTERN", conflicts_with = "files")]
    pub include: Vec<String>,

    /// No files that fit; may be given several times
    #[arg(long, value_name = "PATTERN", conflicts_with = "files")]
    pub exclude: Vec<String>,

    /// Fetch also what is there
    #[arg(long)]
    pub force_download: bool,

    /// Say what would be fetched, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub token: TokenArgs,

    /// Connections at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub max_workers: u16,

    /// Print folder, commit and files as JSON
    #[arg(long)]
    pub json: bool,
}

/// Who asks.
#[derive(Args)]
pub struct TokenArgs {
    /// Token to show to the hub [default: HF_TOKEN, or the file that `hf auth login` has written]
    #[arg(long, value_name = "TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepoTypeArg {
    Model,
    Dataset,
}
