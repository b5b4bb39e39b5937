//! Writing an artifact so that it is never half there.
//!
//! Everything happens in the work folder beside the final one: safetensors files of their full length, header first, each
//! tensor at its offset as it is done, and a journal with a line for every finished layer. At the end the artifact alone
//! is put in place. A run that was killed goes on from the last line of the journal.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;

use super::folder::{self, WorkFolder, sync};
use super::journal::{self, JOURNAL};
use super::layout::{ArtifactLayout, Place};
use crate::record::LayerRecord;
use crate::{Error, Result};

/// An artifact being written.
pub struct ArtifactWriter {
    work: WorkFolder,
    /// Where the artifact is made.
    dir: PathBuf,
    /// A finished output may be replaced at the end.
    replaces: bool,
    layout: ArtifactLayout,
    files: Vec<File>,
    journal: File,
    /// Names of tensors.
    written: Mutex<BTreeSet<String>>,
    /// Names of small files.
    added: Vec<String>,
}

impl ArtifactWriter {
    /// Opens the files of a run whose journal has `done` finished layers.
    pub(super) fn open(
        work: WorkFolder,
        layout: ArtifactLayout,
        done: usize,
        replaces: bool,
    ) -> Result<Self> {
        let dir = work.artifact();
        let mut files = Vec::with_capacity(layout.files.len());
        for planned in &layout.files {
            let path = dir.join(&planned.name);
            let data = path.symlink_metadata().map_err(Error::io(&path))?;
            if !data.is_file() || data.len() != planned.length {
                let problem = format!("expected a file of {} bytes, got {}", planned.length, data.len());
                return Err(Error::Output { path, problem });
            }
            files.push(OpenOptions::new().read(true).write(true).open(&path).map_err(Error::io(&path))?);
        }
        let path = work.path.join(JOURNAL);
        let journal = OpenOptions::new().append(true).open(&path).map_err(Error::io(&path))?;
        let prefixes: Vec<_> = (0..done).map(gptq_runtime::layout::layer_prefix).collect();
        let written = layout.names().filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        let written = Mutex::new(written.map(String::from).collect());
        Ok(Self { work, dir, replaces, layout, files, journal, written, added: Vec::new() })
    }

    /// Writes one tensor at its place.
    pub fn write_tensor(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let place = self.place(name)?;
        let length = place.bytes.end - place.bytes.start;
        if bytes.len() as u64 != length {
            return Err(self.problem(format!("{name}: expected {length} bytes, got {}", bytes.len())));
        }
        let written = self.files[place.file].write_all_at(bytes, place.bytes.start);
        written.map_err(Error::io(&self.path(place.file)))?;
        let fresh = self.written.lock().map_or(true, |mut written| written.insert(name.into()));
        if fresh { Ok(()) } else { Err(self.problem(format!("{name} was written twice"))) }
    }

    /// The bytes of a tensor that was written, in this run or before.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>> {
        let place = self.place(name)?;
        let mut bytes = vec![0; (place.bytes.end - place.bytes.start) as usize];
        let read = self.files[place.file].read_exact_at(&mut bytes, place.bytes.start);
        read.map_err(Error::io(&self.path(place.file)))?;
        Ok(bytes)
    }

    /// Makes a layer's tensors durable, then says so in the journal.
    pub fn layer_done(&mut self, record: &LayerRecord) -> Result<()> {
        self.sync_files()?;
        journal::append(&mut self.journal, record).map_err(Error::io(&self.work.path.join(JOURNAL)))
    }

    /// Adds a small file.
    pub fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        // It may be there from a run that was interrupted at its end.
        if folder::exists(&path) {
            folder::remove(&path)?;
        }
        let written = File::create_new(&path).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        self.added.push(name.into());
        written.map_err(Error::io(&path))
    }

    /// Makes everything durable and puts the artifact in place.
    pub fn finish(mut self) -> Result<()> {
        let written = self.written.lock().map_or(BTreeSet::new(), |written| written.clone());
        if let Some(missing) = self.layout.names().find(|name| !written.contains(*name)) {
            return Err(self.problem(format!("{missing} was never written")));
        }
        if let Some(index) = self.layout.index() {
            self.add_file("model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
        }
        self.remove_strays()?;
        self.sync_files()?;
        sync(&self.dir)?;
        // Until here a failure leaves a run that can be resumed; from here on the artifact is there.
        self.work.place(self.replaces)?;
        self.work.remove()
    }

    /// Removes whatever somebody else has put among the artifact's files.
    fn remove_strays(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let entry = entry.map_err(Error::io(&self.dir))?;
            let name = entry.file_name();
            let planned = self.layout.files.iter().map(|file| &file.name);
            if !planned.chain(&self.added).any(|ours| name == **ours) {
                tracing::warn!("{} is no file of the artifact and is left out", entry.path().display());
                folder::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn sync_files(&self) -> Result<()> {
        let sync = |(i, file): (usize, &File)| file.sync_data().map_err(Error::io(&self.path(i)));
        self.files.iter().enumerate().try_for_each(sync)
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.join(&self.layout.files[file].name)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.layout.place(name).ok_or_else(|| self.problem(format!("{name} has no place in the artifact")))
    }

    fn problem(&self, problem: String) -> Error {
        Error::Output { path: self.work.out.clone(), problem }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{Begun, Fingerprint, OutMode, begin as begin_artifact};
    use super::*;
    use crate::record::QuantizeLog;
    use gptq_runtime::layout::{StoredDtype, TensorSpec};

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

    fn try_begin(out: &Path, bits: u32, mode: OutMode) -> Result<Begun> {
        begin_artifact(out, layout(), &print(bits), mode)
    }

    fn begin(out: &Path, mode: OutMode) -> (ArtifactWriter, Vec<LayerRecord>) {
        match try_begin(out, 4, mode).unwrap() {
            Begun::Writing(writer, records) => (*writer, records),
            Begun::Finished(_) => panic!("finished"),
        }
    }

    fn refusal(out: &Path, bits: u32, mode: OutMode) -> String {
        try_begin(out, bits, mode).err().unwrap().to_string()
    }

    fn record(layer: usize) -> LayerRecord {
        LayerRecord { layer, ..LayerRecord::default() }
    }

    fn write_layer(writer: &mut ArtifactWriter, layer: usize) {
        writer.write_tensor(TENSORS[layer], &[layer as u8; 16]).unwrap();
        writer.layer_done(&record(layer)).unwrap();
    }

    /// Writes what is left, with the log that a finished artifact is known by.
    fn finish(mut writer: ArtifactWriter, from: usize) -> Result<()> {
        (from..2).for_each(|layer| write_layer(&mut writer, layer));
        writer.write_tensor(TENSORS[2], &[2; 16]).unwrap();
        let log = QuantizeLog {
            settings: print(4).to_json(),
            layers: vec![record(0), record(1)],
            ..QuantizeLog::default()
        };
        writer.add_file("quantize_config.json", b"{}")?;
        writer.add_file(crate::record::LOG_FILE, &log.to_bytes())?;
        writer.finish()
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
        finish(begin(&whole, OutMode::New).0, 0).unwrap();
        let (mut writer, _) = begin(&torn, OutMode::New);
        write_layer(&mut writer, 0);
        writer.write_tensor(TENSORS[1], &[99; 16]).unwrap();
        drop(writer);
        assert!(!torn.exists(), "nothing has the final name before the end");
        let work = dir.path().join(".torn.partial");
        OpenOptions::new().append(true).open(work.join(JOURNAL)).unwrap().write_all(b"{\"layer\":").unwrap();
        for stray in [work.join("stray"), work.join("artifact/stray")] {
            fs::write(stray, "x").unwrap();
        }
        let (writer, records) = begin(&torn, OutMode::Resume);
        assert_eq!(records, [record(0)]);
        assert_eq!(writer.read_tensor(TENSORS[0]).unwrap(), [0; 16]);
        finish(writer, 1).unwrap();
        assert_eq!(contents(&torn), contents(&whole), "without the strays");
        assert!(!work.exists());
    }

    #[test]
    fn an_interrupted_run_is_neither_thrown_away_nor_mixed_without_being_asked_to() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        write_layer(&mut begin(&out, OutMode::New).0, 0);
        let message = refusal(&out, 4, OutMode::New);
        assert!(message.contains("1 of 2 layers") && message.contains("--resume"), "{message}");
        let message = refusal(&out, 8, OutMode::Resume);
        assert!(message.contains("bits 4, this one has 8"), "{message}");
        assert_eq!(begin(&out, OutMode::Resume).1.len(), 1, "it is as it was");
        assert!(begin(&out, OutMode::Force).1.is_empty());
    }

    #[test]
    fn a_finished_output_stays_or_is_replaced_as_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        finish(begin(&out, OutMode::New).0, 0).unwrap();
        assert!(matches!(try_begin(&out, 4, OutMode::Resume), Ok(Begun::Finished(_))));
        assert!(refusal(&out, 4, OutMode::New).contains("--resume keeps it"));
        assert!(refusal(&out, 8, OutMode::New).contains("--force replaces it"));
        assert!(refusal(&out, 8, OutMode::Resume).contains("bits 4, this one has 8"));
        fs::write(out.join("old"), "x").unwrap();
        write_layer(&mut begin(&out, OutMode::Force).0, 0);
        assert!(out.join("old").exists(), "until the new one is complete");
        let (writer, records) = begin(&out, OutMode::Resume);
        assert_eq!(records.len(), 1, "a replacement is resumed");
        finish(writer, 1).unwrap();
        assert!(!out.join("old").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn an_artifact_that_is_in_place_already_is_not_exchanged_back() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        finish(begin(&out, OutMode::New).0, 0).unwrap();
        // As if the process had ended right after the exchange: the old output lies where the new one was made.
        let (mut writer, _) = begin(&out, OutMode::Force);
        (0..2).for_each(|layer| write_layer(&mut writer, layer));
        drop(writer);
        for mode in [OutMode::Resume, OutMode::New] {
            let found = try_begin(&out, 4, mode);
            assert!(!matches!(found, Ok(Begun::Writing(..))));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "what was left is removed");
        }
    }

    #[test]
    fn other_files_are_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("precious"), "x").unwrap();
        for mode in [OutMode::New, OutMode::Resume, OutMode::Force, OutMode::ResumeOrForce] {
            assert!(refusal(&out, 4, mode).contains("other files"));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a refusal leaves nothing");
    }

    #[test]
    fn a_missing_tensor_a_second_write_and_a_wrong_length_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, _) = begin(&dir.path().join("a"), OutMode::New);
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
        let (writer, _) = begin(&out, OutMode::New);
        fs::create_dir(&out).unwrap();
        fs::write(out.join("from elsewhere"), "x").unwrap();
        assert!(finish(writer, 0).is_err() && out.join("from elsewhere").exists());
        fs::remove_dir_all(&out).unwrap();
        assert_eq!(begin(&out, OutMode::Resume).1.len(), 2);
    }

    #[test]
    fn a_link_to_an_empty_folder_is_written_through_and_one_to_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (link, real) = (dir.path().join("link"), dir.path().join("real"));
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(refusal(&link, 4, OutMode::New).contains("link"));
        fs::create_dir(&real).unwrap();
        finish(begin(&link, OutMode::New).0, 0).unwrap();
        assert!(link.is_symlink() && real.join("model.safetensors.index.json").exists());
    }
}
