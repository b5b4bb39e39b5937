//! The journal of an unfinished artifact: a line with the run's fingerprint, then one for every finished layer.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use super::fingerprint::Fingerprint;
use super::folder::{LOCK, sync};
use super::layout::ArtifactLayout;
use crate::{Error, Result};

pub(super) const JOURNAL: &str = "journal.jsonl";

/// Empties the work folder and lays out files and journal.
pub(super) fn start_over(work: &Path, layout: &ArtifactLayout, fingerprint: &Fingerprint) -> Result<()> {
    // Without its journal, a half-emptied folder cannot pass for a run to resume.
    let journal = work.join(JOURNAL);
    if journal.exists() {
        fs::remove_file(&journal).map_err(Error::io(&journal))?;
    }
    for entry in fs::read_dir(work).map_err(Error::io(work))? {
        let path = entry.map_err(Error::io(work))?.path();
        if path.file_name() != Some(LOCK.as_ref()) {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    for planned in &layout.files {
        let path = work.join(&planned.name);
        let file = File::create(&path).map_err(Error::io(&path))?;
        file.write_all_at(&planned.header, 0).map_err(Error::io(&path))?;
        file.set_len(planned.length).map_err(Error::io(&path))?;
        file.sync_all().map_err(Error::io(&path))?;
    }
    // The journal comes last and at once: where it exists, the files have their headers and lengths.
    let temporary = work.join("journal.new");
    let first = format!("{}\n", fingerprint.to_json());
    fs::write(&temporary, first).map_err(Error::io(&temporary))?;
    sync(&temporary)?;
    fs::rename(&temporary, &journal).map_err(Error::io(&journal))?;
    sync(work)
}

/// Records of the layers that the journal says are finished. A last line that was cut off counts for nothing.
pub(super) fn finished_layers(work: &Path, fingerprint: &Fingerprint) -> Result<Vec<Value>> {
    let path = work.join(JOURNAL);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let lines = bytes[..whole].split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let mut values = Vec::new();
    for line in lines {
        let invalid =
            |error: serde_json::Error| Error::Output { path: path.clone(), problem: error.to_string() };
        values.push(serde_json::from_slice(line).map_err(invalid)?);
    }
    if values.is_empty() {
        return Ok(values);
    }
    if let Some(difference) = fingerprint.difference(&values.remove(0)) {
        let problem = format!("cannot resume, the interrupted run had {difference}");
        return Err(Error::Output { path: work.into(), problem });
    }
    if whole < bytes.len() {
        let file = OpenOptions::new().write(true).open(&path).map_err(Error::io(&path))?;
        file.set_len(whole as u64).map_err(Error::io(&path))?;
    }
    Ok(values)
}
