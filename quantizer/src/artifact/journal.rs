//! The journal of an unfinished artifact: a line about the run, then one for every finished layer.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fingerprint::Fingerprint;
use super::folder::sync;
use crate::record::{LayerRecord, QuantizeLog};
use crate::{Error, Result};

pub(super) const JOURNAL: &str = "journal.jsonl";

/// The first line.
#[derive(Serialize, Deserialize)]
pub(super) struct Run {
    /// The fingerprint.
    pub settings: Value,
    /// Layers in all.
    pub layers: usize,
    /// The run may replace a finished output.
    pub replaces: bool,
}

/// What a journal says.
pub(super) struct Journal {
    pub run: Run,
    /// Of the finished layers, in order.
    pub records: Vec<LayerRecord>,
    /// Bytes of whole lines; a last line that was cut off counts for nothing.
    whole: u64,
}

impl Journal {
    /// The journal in a work folder; `None` where there is none.
    pub fn read(work: &Path) -> Result<Option<Self>> {
        let path = work.join(JOURNAL);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(Error::io(&path))?,
        };
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        let invalid = |line: usize, problem: String| Error::Output {
            path: path.clone(),
            problem: format!("line {line}: {problem} (--force begins anew)"),
        };
        let mut lines = bytes[..whole].split_inclusive(|b| *b == b'\n').zip(1..);
        let Some((first, _)) = lines.next() else { return Ok(None) };
        let run: Run = serde_json::from_slice(first).map_err(|error| invalid(1, error.to_string()))?;
        let mut records = Vec::new();
        for (line, number) in lines {
            let record: LayerRecord =
                serde_json::from_slice(line).map_err(|error| invalid(number, error.to_string()))?;
            if record.layer != records.len() || record.layer >= run.layers {
                let expected = format!("expected layer {} of {}", records.len(), run.layers);
                return Err(invalid(number, format!("{expected}, got layer {}", record.layer)));
            }
            records.push(record);
        }
        Ok(Some(Self { run, records, whole: whole as u64 }))
    }

    /// Writes the first line of a new journal. It appears whole or not at all.
    pub fn create(work: &Path, fingerprint: &Fingerprint, layers: usize, replaces: bool) -> Result<()> {
        let run = Run { settings: fingerprint.to_json(), layers, replaces };
        let line = format!("{}\n", serde_json::to_string(&run).unwrap_or_default());
        let (temporary, path) = (work.join("journal.new"), work.join(JOURNAL));
        fs::write(&temporary, line).map_err(Error::io(&temporary))?;
        sync(&temporary)?;
        fs::rename(&temporary, &path).map_err(Error::io(&path))?;
        sync(work)
    }

    /// Cuts off a line that is not whole.
    pub fn repair(&self, work: &Path) -> Result<()> {
        let path = work.join(JOURNAL);
        let file = OpenOptions::new().write(true).open(&path).map_err(Error::io(&path))?;
        file.set_len(self.whole).map_err(Error::io(&path))
    }

    /// Whether the output is what this run made: it was put in place, and only cleaning up was interrupted. No two runs
    /// take the same seconds, so the records of its layers tell.
    pub fn is_placed(&self, out: &Path) -> Result<bool> {
        let log = QuantizeLog::read_if_ours(out)?;
        Ok(self.records.len() == self.run.layers && log.is_some_and(|log| log.layers == self.records))
    }

    /// For a run without `--resume`.
    pub fn describe(&self) -> String {
        format!("{} of {} layers of an interrupted run are done", self.records.len(), self.run.layers)
    }
}

/// Adds the line of a finished layer and makes it durable.
pub(super) fn append(journal: &mut File, record: &LayerRecord) -> std::io::Result<()> {
    let line = serde_json::to_string(record)?;
    journal.write_all(format!("{line}\n").as_bytes())?;
    journal.sync_data()
}
