//! Files that are to be published, with their hashes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Cause, Result, Subject};
use crate::name::is_file_name;
use crate::oid::{Hasher, Oid};
use crate::tree::Entry;

/// Files of at least this size always go to the storage for large files, so that their name is a sha256 everywhere.
pub(super) const ALWAYS_LARGE: u64 = 10 << 20;

/// A file here and its name there.
#[derive(Clone, Debug)]
pub struct LocalFile {
    /// In the repository.
    pub path: String,
    pub source: PathBuf,
    pub size: u64,
    pub(super) sha256: Oid,
    /// Of files that may be small ones.
    pub(super) git: Option<Oid>,
}

impl LocalFile {
    /// Reads and hashes a file.
    pub fn read(source: &Path, path: &str) -> Result<Self> {
        let subject = Subject::default().file(path);
        if !is_file_name(path) {
            return Err(subject.fails(Cause::UnsafeName { name: path.to_owned() }));
        }
        let hashed = |source: &Path| -> io::Result<Self> {
            let file = gptq_input::open(source)?;
            let size = file.metadata()?.len();
            let mut sha256 = Hasher::sha256();
            let read = sha256.update_from(&file)?;
            let git = match size < ALWAYS_LARGE {
                true => {
                    let mut git = Hasher::git(size);
                    git.update_from(gptq_input::open(source)?)?;
                    Some(git.finish())
                }
                false => None,
            };
            let (path, source) = (path.to_owned(), source.to_owned());
            Ok(Self { path, source, size: read, sha256: sha256.finish(), git })
        };
        hashed(source).map_err(subject.io(source))
    }

    /// Whether a file there has the same content.
    pub fn is(&self, there: &Entry) -> bool {
        there.size == self.size && (there.oid == self.sha256 || self.git.as_ref() == Some(&there.oid))
    }

    pub(super) fn open(&self) -> io::Result<File> {
        gptq_input::open(&self.source)
    }

    /// The whole content of a small file.
    pub(super) fn bytes(&self, subject: &Subject) -> Result<Vec<u8>> {
        let subject = subject.file(&self.path);
        let bytes = gptq_input::read(&self.source, ALWAYS_LARGE).map_err(subject.io(&self.source))?;
        let mut hasher = Hasher::sha256();
        hasher.update(&bytes);
        match hasher.finish() == self.sha256 {
            true => Ok(bytes),
            false => Err(subject.fails(Cause::ChangedHere)),
        }
    }
}
