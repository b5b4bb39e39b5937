//! Writing an artifact so that it is never half there.
//!
//! Everything happens in `.NAME.partial` beside the final folder NAME: safetensors files of their full length,
//! header first, each tensor at its offset as it is done, and a journal with a line for every finished layer.
//! At the end the folder is renamed. A run that was killed goes on from the last line of the journal.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::Value;

use super::fingerprint::Fingerprint;
use super::folder::{self, LOCK, sync};
use super::journal::{self, JOURNAL};
use super::layout::{ArtifactLayout, Place};
use crate::{Error, Result};

/// What to do with what is already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutMode {
    /// The output must not exist, or be empty; an interrupted run is started over.
    New,
    /// An interrupted run with the same settings goes on.
    Resume,
    /// A finished output is replaced when the new one is complete.
    Force,
}

/// An artifact being written.
pub struct ArtifactWriter {
    out: PathBuf,
    work: PathBuf,
    mode: OutMode,
    layout: ArtifactLayout,
    files: Vec<File>,
    journal: File,
    written: Mutex<BTreeSet<String>>,
    /// Held until the end: two runs must not write the same output.
    _lock: File,
}

impl ArtifactWriter {
    /// Starts or goes on with the artifact `out`. Returns the journal's records of the layers that an
    /// interrupted run has finished, in order; none for a new run.
    pub fn begin(
        out: &Path,
        layout: ArtifactLayout,
        fingerprint: &Fingerprint,
        mode: OutMode,
    ) -> Result<(Self, Vec<Value>)> {
        let out = folder::resolve(out)?;
        folder::check_free(&out, mode)?;
        let work = folder::work_folder(&out)?;
        fs::create_dir_all(&work).map_err(Error::io(&work))?;
        let lock = folder::lock(&work)?;
        let records = match mode {
            OutMode::Resume => journal::finished_layers(&work, fingerprint)?,
            OutMode::New | OutMode::Force => Vec::new(),
        };
        if mode != OutMode::Resume && work.join(JOURNAL).exists() {
            tracing::info!(
                "{}: an interrupted run is started over, resuming was not asked for",
                out.display()
            );
        }
        if records.is_empty() {
            journal::start_over(&work, &layout, fingerprint)?;
        }
        let open = |name: &str| {
            let path = work.join(name);
            OpenOptions::new().read(true).write(true).open(&path).map_err(Error::io(&path))
        };
        let files = layout.files.iter().map(|file| open(&file.name)).collect::<Result<Vec<_>>>()?;
        for (file, planned) in files.iter().zip(&layout.files) {
            let length = file.metadata().map_err(Error::io(&work))?.len();
            if length != planned.length {
                let problem = format!("expected {} of {} bytes, got {length}", planned.name, planned.length);
                return Err(Error::Output { path: work, problem });
            }
        }
        let path = work.join(JOURNAL);
        let journal = OpenOptions::new().append(true).open(&path).map_err(Error::io(&path))?;
        let prefixes: Vec<_> = (0..records.len()).map(gptq_runtime::layout::layer_prefix).collect();
        let done = layout.names().filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        let written = Mutex::new(done.map(String::from).collect());
        Ok((Self { out, work, mode, layout, files, journal, written, _lock: lock }, records))
    }

    /// Writes one tensor at its place.
    pub fn write_tensor(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let place = self.place(name)?;
        let length = place.bytes.end - place.bytes.start;
        if bytes.len() as u64 != length {
            return Err(self.problem(format!("{name}: expected {length} bytes, got {}", bytes.len())));
        }
        self.files[place.file].write_all_at(bytes, place.bytes.start).map_err(Error::io(&self.work))?;
        let fresh = self.written.lock().map_or(true, |mut written| written.insert(name.into()));
        if fresh { Ok(()) } else { Err(self.problem(format!("{name} was written twice"))) }
    }

    /// The bytes of a tensor that was written, in this run or before.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>> {
        let place = self.place(name)?;
        let mut bytes = vec![0; (place.bytes.end - place.bytes.start) as usize];
        self.files[place.file].read_exact_at(&mut bytes, place.bytes.start).map_err(Error::io(&self.work))?;
        Ok(bytes)
    }

    /// Makes a layer's tensors durable, then says so in the journal.
    pub fn layer_done(&mut self, record: &Value) -> Result<()> {
        for file in &self.files {
            file.sync_data().map_err(Error::io(&self.work))?;
        }
        self.journal.write_all(format!("{record}\n").as_bytes()).map_err(Error::io(&self.work))?;
        self.journal.sync_data().map_err(Error::io(&self.work))
    }

    /// Adds a small file.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.work.join(name);
        fs::write(&path, bytes).map_err(Error::io(&path))
    }

    /// Makes everything durable and gives the folder its name.
    pub fn finish(self) -> Result<()> {
        let written = self.written.lock().map_or(BTreeSet::new(), |written| written.clone());
        if let Some(missing) = self.layout.names().find(|name| !written.contains(*name)) {
            return Err(self.problem(format!("{missing} was never written")));
        }
        if let Some(index) = self.layout.index() {
            self.add_file("model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
        }
        for entry in fs::read_dir(&self.work).map_err(Error::io(&self.work))? {
            sync(&entry.map_err(Error::io(&self.work))?.path())?;
        }
        sync(&self.work)?;
        folder::rename(&self.work, &self.out, self.mode)?;
        // Until here a failure leaves a run that can be resumed, and the lock keeps others out of its folder.
        for name in [JOURNAL, LOCK] {
            let path = self.out.join(name);
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        sync(&self.out)?;
        sync(&folder::parent(&self.out))
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.layout.place(name).ok_or_else(|| self.problem(format!("{name} has no place in the artifact")))
    }

    fn problem(&self, problem: String) -> Error {
        Error::Output { path: self.out.clone(), problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_runtime::layout::{StoredDtype, TensorSpec};
    use serde_json::json;

    const TENSORS: [&str; 3] = ["model.layers.0.x", "model.layers.1.x", "model.norm.weight"];

    fn layout() -> ArtifactLayout {
        let spec = |name: &str| TensorSpec::new(name, StoredDtype::F32, [4]);
        ArtifactLayout::new(TENSORS.map(spec).to_vec(), &[], Some(32))
    }

    fn print(bits: u32) -> Fingerprint {
        let mut print = Fingerprint::new();
        print.insert("bits", bits);
        print
    }

    fn begin(out: &Path, mode: OutMode) -> Result<(ArtifactWriter, Vec<Value>)> {
        ArtifactWriter::begin(out, layout(), &print(4), mode)
    }

    fn finish(mut writer: ArtifactWriter, from: usize) {
        for (i, name) in TENSORS.iter().enumerate().skip(from) {
            writer.write_tensor(name, &[i as u8; 16]).unwrap();
            writer.layer_done(&json!({ "layer": i })).unwrap();
        }
        writer.finish().unwrap();
    }

    fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
        let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
        let mut files: Vec<_> =
            entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect();
        files.sort();
        files
    }

    #[test]
    fn an_interrupted_run_goes_on_and_ends_in_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, torn) = (dir.path().join("whole"), dir.path().join("torn"));
        finish(begin(&whole, OutMode::New).unwrap().0, 0);
        let (mut writer, _) = begin(&torn, OutMode::New).unwrap();
        writer.write_tensor(TENSORS[0], &[0; 16]).unwrap();
        writer.layer_done(&json!({ "layer": 0 })).unwrap();
        writer.write_tensor(TENSORS[1], &[99; 16]).unwrap();
        drop(writer);
        assert!(!torn.exists(), "nothing has the final name before the end");
        let journal = dir.path().join(".torn.partial").join(JOURNAL);
        OpenOptions::new().append(true).open(journal).unwrap().write_all(b"{\"layer\":").unwrap();
        let (writer, records) = begin(&torn, OutMode::Resume).unwrap();
        assert_eq!(records, [json!({ "layer": 0 })]);
        assert_eq!(writer.read_tensor(TENSORS[0]).unwrap(), [0; 16]);
        finish(writer, 1);
        assert_eq!(contents(&torn), contents(&whole));
        assert!(!dir.path().join(".torn.partial").exists());
    }

    #[test]
    fn other_settings_cannot_resume_a_run() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        begin(&out, OutMode::New).unwrap();
        let message =
            ArtifactWriter::begin(&out, layout(), &print(8), OutMode::Resume).err().unwrap().to_string();
        assert!(message.contains("bits 4, this one has 8"), "{message}");
    }

    #[test]
    fn an_output_with_files_is_only_replaced_by_force_and_only_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("precious"), "x").unwrap();
        assert!(begin(&out, OutMode::New).is_err() && begin(&out, OutMode::Resume).is_err());
        assert!(begin(&out, OutMode::Force).is_err(), "what is no artifact is never replaced");
        fs::write(out.join("quantize_config.json"), "{}").unwrap();
        let (writer, _) = begin(&out, OutMode::Force).unwrap();
        assert!(out.join("precious").exists());
        finish(writer, 0);
        assert!(!out.join("precious").exists() && out.join("model.safetensors.index.json").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn two_runs_cannot_write_one_output() {
        let dir = tempfile::tempdir().unwrap();
        let first = begin(&dir.path().join("a"), OutMode::New).unwrap();
        let message = begin(&dir.path().join("a"), OutMode::New).err().unwrap().to_string();
        assert!(message.contains("another process"), "{message}");
        drop(first);
    }

    #[test]
    fn a_missing_tensor_a_second_write_and_a_wrong_length_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, _) = begin(&dir.path().join("a"), OutMode::New).unwrap();
        writer.write_tensor(TENSORS[0], &[0; 16]).unwrap();
        assert!(writer.write_tensor(TENSORS[0], &[0; 16]).is_err());
        assert!(writer.write_tensor(TENSORS[1], &[0; 15]).is_err());
        assert!(writer.write_tensor("other", &[0; 16]).is_err());
        assert!(writer.finish().is_err());
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn a_last_step_that_fails_does_not_cost_the_finished_layers() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        let (mut writer, _) = begin(&out, OutMode::New).unwrap();
        for name in TENSORS {
            writer.write_tensor(name, &[1; 16]).unwrap();
            writer.layer_done(&json!({})).unwrap();
        }
        fs::create_dir(&out).unwrap();
        fs::write(out.join("from elsewhere"), "x").unwrap();
        assert!(writer.finish().is_err() && out.join("from elsewhere").exists());
        fs::remove_dir_all(&out).unwrap();
        let (_, records) = begin(&out, OutMode::Resume).unwrap();
        assert_eq!(records.len(), TENSORS.len());
    }

    #[test]
    fn a_link_to_an_empty_folder_is_written_through_and_one_to_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (link, real) = (dir.path().join("link"), dir.path().join("real"));
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let message = begin(&link, OutMode::New).err().unwrap().to_string();
        assert!(message.contains("link"), "{message}");
        fs::create_dir(&real).unwrap();
        finish(begin(&link, OutMode::New).unwrap().0, 0);
        assert!(link.is_symlink() && real.join("model.safetensors.index.json").exists());
    }
}
