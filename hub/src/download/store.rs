//! Where files end up: the shared cache, or a folder of plain files with Python's notes beside them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Destination, DownloadPlan, Request};
use crate::RepoCache;
use crate::cache::{link, replace};
use crate::client::Client;
use crate::transfer::partial;
use crate::tree::{Entry, Tree};

/// The files of one repository, here.
pub(crate) enum Store {
    Cache(RepoCache),
    Folder(PathBuf),
}

/// Where one file is written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub target: PathBuf,
    pub lock: PathBuf,
    pub partial_folder: PathBuf,
    pub partial_name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Present {
    No,
    /// Its name or a note says that its content was right.
    Known,
    /// A file of the right size.
    Unknown,
}

/// Below a folder of plain files, where Python has its notes.
const NOTES: &str = ".cache/huggingface";

impl Store {
    pub fn new(client: &Client, request: &Request) -> Self {
        match &request.destination {
            Destination::Cache => Self::Cache(RepoCache::new(&client.settings.cache, &request.repo)),
            Destination::Folder(folder) => Self::Folder(folder.clone()),
        }
    }

    /// Where everything goes.
    pub fn root(&self) -> &Path {
        match self {
            Self::Cache(cache) => &cache.root,
            Self::Folder(folder) => folder,
        }
    }

    /// What the user gets.
    pub fn folder(&self, commit: &str) -> PathBuf {
        match self {
            Self::Cache(cache) => cache.snapshot(commit),
            Self::Folder(folder) => folder.clone(),
        }
    }

    pub fn tree(&self, commit: &str) -> Option<Tree> {
        match self {
            Self::Cache(cache) => cache.tree(commit),
            Self::Folder(folder) => {
                let path = folder.join(NOTES).join("trees").join(format!("{commit}.json"));
                Tree::from_kept(&gptq_input::read(&path, 256 << 20).ok()?)
            }
        }
    }

    /// Before the first file: what the commit holds.
    pub fn prepare(&self, plan: &DownloadPlan) -> io::Result<()> {
        match self {
            Self::Cache(cache) => {
                fs::create_dir_all(cache.snapshot(&plan.commit))?;
                cache.write_tree(&plan.commit, &plan.tree)
            }
            Self::Folder(folder) => {
                let notes = folder.join(NOTES);
                fs::create_dir_all(&notes)?;
                let ignore = notes.join(".gitignore");
                if !ignore.exists() {
                    replace(&ignore, b"*")?;
                }
                replace(&notes.join("trees").join(format!("{}.json", plan.commit)), &plan.tree.to_kept())
            }
        }
    }

    /// After the last file: what the revision names.
    pub fn conclude(&self, plan: &DownloadPlan) -> io::Result<()> {
        match self {
            Self::Cache(cache) => cache.write_ref(&plan.revision, &plan.commit),
            Self::Folder(_) => Ok(()),
        }
    }

    pub fn place(&self, entry: &Entry) -> Place {
        match self {
            Self::Cache(cache) => {
                let target = cache.blob(&entry.oid);
                let partial_folder = target.parent().unwrap_or(Path::new("")).to_owned();
                let partial_name = entry.oid.to_string();
                Place { lock: cache.lock(&entry.oid), target, partial_folder, partial_name }
            }
            Self::Folder(folder) => {
                let note = folder.join(NOTES).join("download").join(&entry.path);
                let name = note.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Place {
                    target: folder.join(&entry.path),
                    lock: note.with_file_name(format!("{name}.lock")),
                    partial_folder: note.parent().unwrap_or(Path::new("")).to_owned(),
                    partial_name: format!("{name}.{}", entry.oid),
                }
            }
        }
    }

    /// Bytes of a file that an interrupted run has left.
    pub fn kept(&self, entry: &Entry, piece: u64) -> u64 {
        let place = self.place(entry);
        partial::kept(&place.partial_folder, &place.partial_name, entry.size, piece)
    }

    /// What is there of a file, without reading it.
    pub fn is_present(&self, entry: &Entry, commit: &str) -> Present {
        let has_size =
            |path: &Path| fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == entry.size);
        match self {
            Self::Cache(cache) => {
                let there =
                    has_size(&cache.snapshot(commit).join(&entry.path)) || has_size(&cache.blob(&entry.oid));
                if there { Present::Known } else { Present::No }
            }
            Self::Folder(folder) => {
                let path = folder.join(&entry.path);
                match has_size(&path) {
                    false => Present::No,
                    true if self.is_noted(entry, &path) => Present::Known,
                    true => Present::Unknown,
                }
            }
        }
    }

    /// Whether a note says that the file had this content, and it was not written to since.
    fn is_noted(&self, entry: &Entry, path: &Path) -> bool {
        let note = fs::read_to_string(self.note(entry)).unwrap_or_default();
        let lines: Vec<_> = note.lines().map(str::trim).collect();
        let [_, etag, time, ..] = lines[..] else { return false };
        let modified = fs::metadata(path).and_then(|found| found.modified()).ok();
        let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let (Some(modified), Ok(noted)) = (modified, time.parse::<f64>()) else { return false };
        etag == entry.oid.as_str() && modified.as_secs_f64() - 1.0 <= noted
    }

    fn note(&self, entry: &Entry) -> PathBuf {
        let place = self.place(entry);
        let name = place.target.file_name().unwrap_or_default().to_string_lossy();
        place.partial_folder.join(format!("{name}.metadata"))
    }

    /// Reads a file that is there and compares its hash.
    pub fn is_sound(&self, entry: &Entry, commit: &str) -> io::Result<bool> {
        let blob = self.place(entry).target;
        let path = match self {
            Self::Cache(cache) if !blob.is_file() => cache.snapshot(commit).join(&entry.path),
            _ => blob,
        };
        let mut hasher = entry.oid.hasher(entry.size);
        let length = hasher.update_from(gptq_input::open(&path)?)?;
        Ok(length == entry.size && hasher.finish() == entry.oid)
    }

    /// Makes a file that is there and right findable.
    pub fn settle(&self, entry: &Entry, commit: &str) -> io::Result<()> {
        match self {
            Self::Cache(cache) => {
                let blob = cache.blob(&entry.oid);
                // Without links the content lies in the snapshot itself.
                if blob.is_file() {
                    link::point(&cache.snapshot(commit), &entry.path, &blob)?;
                }
                Ok(())
            }
            Self::Folder(folder) if self.is_noted(entry, &folder.join(&entry.path)) => Ok(()),
            Self::Folder(_) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
                replace(&self.note(entry), format!("{commit}\n{}\n{now}\n", entry.oid).as_bytes())
            }
        }
    }
}
