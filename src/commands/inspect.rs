//! `gptq inspect`

use std::process::ExitCode;

use anyhow::Result;
use gptq_quantizer::inspect::inspect;

use super::common;
use crate::args::InspectArgs;
use crate::output;

/// The exit status is the verdict.
pub fn run(args: &InspectArgs) -> Result<ExitCode> {
    let report = inspect(&common::model_dir(&args.model)?)?;
    match args.json {
        true => output::json(&report)?,
        false => output::text(format_args!("{}", report.to_terminal()))?,
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
