//! `gptq table`

use std::path::Path;

use anyhow::Result;
use gptq_quantizer::recipe::Preset;
use gptq_quantizer::table;
use gptq_runtime::config::{ModelConfig, PRESETS};

use super::common;
use crate::args::TableArgs;
use crate::output;

pub fn run(args: &TableArgs) -> Result<()> {
    let rows = match &args.artifacts {
        Some(dir) => table::measure(dir)?,
        None => {
            let plan = common::plan(&args.plan, Preset::default())?;
            table::predict(&config(&args.model)?, &plan, &args.dataset, args.seq_len)?
        }
    };
    match args.json {
        true => output::json(&rows)?,
        false => output::text(format_args!("{}", table::to_markdown(&rows)))?,
    }
    Ok(())
}

/// A preset's name, a config.json, or a model.
pub fn config(model: &str) -> Result<ModelConfig> {
    if PRESETS.contains(&model) {
        return Ok(ModelConfig::preset(model)?);
    }
    let path = Path::new(model);
    if path.is_file() {
        return Ok(ModelConfig::from_file(path)?);
    }
    Ok(ModelConfig::from_file(&common::config_file(model)?)?)
}
