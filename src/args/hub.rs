//! Arguments of the verbs that speak to a hub.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Download a model from a hub and verify every byte
///
/// Files go to the cache that all hub clients share (HF_HOME, HF_HUB_CACHE), or to --local-dir. Files that are
/// present are verified, not fetched again. An interrupted download goes on with the same command. HF_ENDPOINT, HF_TOKEN and
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

    /// Files to download [default: all]
    pub files: Vec<String>,

    /// Branch, tag or commit
    #[arg(long)]
    pub revision: Option<String>,

    #[arg(long, value_enum, default_value_t = RepoTypeArg::Model)]
    pub repo_type: RepoTypeArg,

    /// Write plain files into this folder, and nothing into the cache
    #[arg(long, value_name = "DIR", conflicts_with = "cache_dir")]
    pub local_dir: Option<PathBuf>,

    /// Cache folder instead of the shared one
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Download only files that match this pattern; may be given several times. * also matches /
    #[arg(long, value_name = "PATTERN", conflicts_with = "files")]
    pub include: Vec<String>,

    /// Skip files that match this pattern; may be given several times
    #[arg(long, value_name = "PATTERN", conflicts_with = "files")]
    pub exclude: Vec<String>,

    /// Download files again that are present
    #[arg(long)]
    pub force_download: bool,

    /// Show what would be downloaded, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub token: TokenArgs,

    /// Concurrent connections
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub max_workers: u16,

    /// Print folder, commit and files as JSON
    #[arg(long)]
    pub json: bool,
}

/// Access to the hub.
#[derive(Args)]
pub struct TokenArgs {
    /// Access token [default: HF_TOKEN, or the file that `hf auth login` has written]
    #[arg(long, value_name = "TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

impl SendingArgs {
    /// Whether any of them was given.
    pub fn is_any(&self) -> bool {
        self.private || self.yes || self.token.token.is_some()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepoTypeArg {
    Model,
    Dataset,
}

/// Publish an artifact, or all branches of a run, on a hub
///
/// Everything that would change is shown first, and nothing is sent before it was confirmed. Unchanged files
/// are not sent again, so that the same command goes on after an interruption. What was sent is read back and compared.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq push ./q4 someone/Model-7B-GPTQ --dry-run
  gptq push ./q4 someone/Model-7B-GPTQ --branch gptq-4bit-32g-actorder_True
  gptq push ./branches someone/Model-7B-GPTQ --private --yes")]
pub struct PushArgs {
    /// An artifact's folder, or a folder of branches as `gptq branches` makes it
    pub dir: PathBuf,

    /// Hub id; created if it does not exist
    pub repo: String,

    /// Branch for a single artifact [default: main]
    #[arg(long)]
    pub branch: Option<String>,

    /// Open pull requests on an existing repository instead of committing
    #[arg(long)]
    pub create_pr: bool,

    /// Show what would be sent, and send nothing
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub sending: SendingArgs,

    /// Print plan and commits as JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of an upload.
#[derive(Args)]
pub struct SendingArgs {
    /// Create the repository as a private one, if it does not exist
    #[arg(long)]
    pub private: bool,

    /// Send without a confirmation
    #[arg(long)]
    pub yes: bool,

    #[command(flatten)]
    pub token: TokenArgs,

    /// Concurrent connections
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub max_workers: u16,
}

/// Write the README.md of a repository: of an artifact, or of every branch of a run
///
/// Files and figures come from the artifacts, the prompt template from the model's chat template, licence and original card
/// from the base model. Pictures that `gptq report` has made are shown.
#[derive(Args)]
#[command(after_help = "Examples:
  gptq card ./branches --repo someone/Model-7B-GPTQ
  gptq card ./q4 --repo someone/Model-7B-GPTQ --base-model someone/Model-7B --print")]
pub struct CardArgs {
    /// An artifact's folder, or a folder of branches as `gptq branches` makes it
    pub dir: PathBuf,

    /// Hub id that the files will have, for the commands on the card
    #[arg(long)]
    pub repo: String,

    /// Branch of a single artifact [default: main]
    #[arg(long)]
    pub branch: Option<String>,

    /// Folder or hub id of the model that was quantized [default: as the log says]
    #[arg(long, value_name = "MODEL")]
    pub base_model: Option<String>,

    /// Print the first branch's card, and write nothing
    #[arg(long)]
    pub print: bool,
}

/// One page about a run: sizes, losses, seconds; and its pictures as SVG files
#[derive(Args)]
#[command(after_help = "Examples:
  gptq report ./branches
  gptq report ./branches --out /tmp/report.html")]
pub struct ReportArgs {
    /// An artifact's folder, or a folder of branches as `gptq branches` makes it
    pub dir: PathBuf,

    /// The page; pictures go beside it [default: report.html in DIR]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}
