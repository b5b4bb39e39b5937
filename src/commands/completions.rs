//! `gptq completions`

use anyhow::Result;
use clap::CommandFactory;

use crate::args::{Cli, CompletionsArgs};
use crate::output;

pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "gptq", &mut script);
    output::text(format_args!("{}", String::from_utf8_lossy(&script)))?;
    Ok(())
}
