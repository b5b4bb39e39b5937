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

    /// Removes what other programs have put among the artifact's files.
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
