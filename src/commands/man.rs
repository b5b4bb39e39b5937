//! `gptq man`

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::args::{Cli, ManArgs};

pub fn run(args: &ManArgs) -> Result<()> {
    let folder = || format!("--out {}", args.out.display());
    std::fs::create_dir_all(&args.out).with_context(folder)?;
    clap_mangen::generate_to(Cli::command(), &args.out).with_context(folder)
}
