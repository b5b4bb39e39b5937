//! `gptq inspect`

use std::process::ExitCode;

use anyhow::Result;
use gptq_quantizer::inspect::inspect;

use crate::args::InspectArgs;

/// The exit status is the verdict.
pub fn run(args: &InspectArgs) -> Result<ExitCode> {
    let report = inspect(&args.dir)?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{}", report.to_terminal()),
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
