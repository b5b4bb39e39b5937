//! `gptq report`

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use gptq_hub::MAIN;
use gptq_quantizer::publish::Published;
use gptq_quantizer::report;
use gptq_quantizer::table::Row;

use super::push;
use crate::args::ReportArgs;

pub fn run(args: &ReportArgs) -> Result<()> {
    let branches = published(&args.dir, None)?;
    let name = branches.iter().find_map(|published| Some(published.log.as_ref()?.model.clone()));
    let name = name.unwrap_or_else(|| args.dir.display().to_string());
    let page = args.out.clone().unwrap_or_else(|| args.dir.join("report.html"));
    write(&page, &report::page(&name, &branches))?;
    for picture in report::pictures(&branches) {
        write(&page.with_file_name(picture.file), &picture.to_svg())?;
    }
    Ok(())
}

/// The artifacts of a folder: main, then those of fewer bits, then the smaller ones.
pub fn published(dir: &Path, branch: Option<&str>) -> Result<Vec<Published>> {
    let mut branches = Vec::new();
    for (name, folder) in push::branches(dir, branch)? {
        let published = Published::read(&folder, &name)?;
        branches
            .push(published.with_context(|| format!("{}: expected quantized weights", folder.display()))?);
    }
    let place = |row: &Row| (row.branch != MAIN, row.bits, row.size_bytes);
    branches.sort_by_key(|published| place(&published.row));
    Ok(branches)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())?;
    Ok(say!("{}", path.display())?)
}
