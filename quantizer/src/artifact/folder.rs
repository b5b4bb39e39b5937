//! The folder that an artifact gets, and the work folder beside it in which a run makes it.
//!
//! The work folder of NAME is `.NAME.partial`. It holds `lock`, the journal, and `artifact`, which alone is moved: nothing
//! else of a run is ever inside the final folder. Without a journal there is nothing in it that anybody could go on with.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::journal::JOURNAL;
use crate::{Error, Result};

const LOCK: &str = "lock";

/// A work folder, held for this process until it is dropped.
pub(super) struct WorkFolder {
    pub path: PathBuf,
    /// The final folder.
    pub out: PathBuf,
    _lock: File,
}

impl WorkFolder {
    /// Makes the work folder where it is missing. One process at a time can hold it.
    pub fn hold(out: &Path) -> Result<Self> {
        let path = beside(out, "partial")?;
        let lock = path.join(LOCK);
        loop {
            fs::create_dir_all(&path).map_err(Error::io(&path))?;
            let file = match OpenOptions::new().create(true).truncate(false).write(true).open(&lock) {
                // Another process has removed the folder just now.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => {
                    // Only an empty folder goes.
                    let _ = fs::remove_dir(&path);
                    return Err(Error::io(&lock)(error));
                }
                Ok(file) => file,
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(problem(&path, "another process is writing this output"));
                }
                Err(TryLockError::Error(cause)) => return Err(Error::Io { path: lock, cause }),
            }
            // A lock whose file was removed by its last holder excludes no other process.
            let held = file.metadata().map_err(Error::io(&lock))?;
            if fs::metadata(&lock).is_ok_and(|named| (named.dev(), named.ino()) == (held.dev(), held.ino())) {
                return Ok(Self { path, out: out.into(), _lock: file });
            }
        }
    }

    /// Where the artifact is made.
    pub fn artifact(&self) -> PathBuf {
        self.path.join("artifact")
    }

    /// Ends a replacement that was interrupted between its two renames, where they could not be one.
    pub fn recover(&self) -> Result<()> {
        let old = beside(&self.out, "replaced")?;
        match (exists(&old), exists(&self.out)) {
            (false, _) => Ok(()),
            (true, false) => fs::rename(&old, &self.out).map_err(Error::io(&old)),
            (true, true) => remove(&old),
        }
    }

    /// Empties the work folder but for the lock.
    pub fn clear(&self) -> Result<()> {
        // Without its journal, a half-emptied folder cannot pass for a run to resume.
        let journal = self.path.join(JOURNAL);
        if exists(&journal) {
            remove(&journal)?;
            sync(&self.path)?;
        }
        for entry in fs::read_dir(&self.path).map_err(Error::io(&self.path))? {
            let entry = entry.map_err(Error::io(&self.path))?.path();
            if entry.file_name() != Some(LOCK.as_ref()) {
                remove(&entry)?;
            }
        }
        Ok(())
    }

    /// Removes the work folder.
    pub fn remove(self) -> Result<()> {
        self.clear()?;
        remove(&self.path.join(LOCK))?;
        match fs::remove_dir(&self.path) {
            // The next process may have begun.
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound) => {
                Ok(())
            }
            removed => removed.map_err(Error::io(&self.path)),
        }
    }

    /// After a failure: keeps what can be resumed and removes anything else, as far as that works.
    pub fn give_up(self) {
        if !exists(&self.path.join(JOURNAL)) {
            let _ = self.remove();
        }
    }

    /// Gives the artifact its final name. What is at that name is exchanged for it in one step, so that there is an
    /// artifact at any time.
    pub fn place(&self, replaces: bool) -> Result<()> {
        let (new, out) = (self.artifact(), &self.out);
        if is_vacant(out)? {
            fs::rename(&new, out).map_err(Error::io(out))?;
        } else if !replaces {
            return Err(problem(out, "expected a new or empty folder, got one that was filled meanwhile"));
        } else if !exchange(&new, out).map_err(Error::io(out))? {
            let old = beside(out, "replaced")?;
            fs::rename(out, &old).map_err(Error::io(out))?;
            fs::rename(&new, out).map_err(Error::io(out))?;
            sync(&parent(out))?;
            remove(&old)?;
        }
        sync(&parent(out))
    }
}

/// Exchanges two folders; `false` where the system or the file system cannot.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    use nix::errno::Errno;
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    match renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn exchange(_one: &Path, _other: &Path) -> io::Result<bool> {
    Ok(false)
}

/// The folder that `out` leads to: links are followed, so that the link itself stays.
pub(super) fn resolve(out: &Path) -> Result<PathBuf> {
    if out.file_name().is_none() {
        return Err(problem(out, "expected a folder name"));
    }
    match fs::canonicalize(out) {
        Err(error) if error.kind() == ErrorKind::NotFound && out.is_symlink() => {
            Err(problem(out, "expected a folder, got a link to nothing"))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(out.into()),
        resolved => resolved.map_err(Error::io(out)),
    }
}

/// Refuses, before any work, an output that could not be put in place at the end.
pub(super) fn check_replaceable(out: &Path) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    if !out.is_dir() {
        return Err(problem(out, "expected a folder, got a file"));
    }
    let device = |path: &Path| fs::metadata(path).map(|data| data.dev()).map_err(Error::io(path));
    match device(out)? == device(&parent(out))? {
        true => Ok(()),
        false => Err(problem(
            out,
            "expected a folder that can be replaced, got a mount point (name one inside it)",
        )),
    }
}

/// Whether a name is free, or an empty folder's.
pub(super) fn is_vacant(out: &Path) -> Result<bool> {
    match fs::read_dir(out) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        entries => Ok(entries.map_err(Error::io(out))?.next().is_none()),
    }
}

pub(super) fn parent(out: &Path) -> PathBuf {
    match out.parent() {
        Some(parent) if parent != Path::new("") => parent.into(),
        _ => ".".into(),
    }
}

/// Makes a file or a folder's list of names durable.
pub(super) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

/// Whether something has this name, a link to nothing included.
pub(super) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Removes a file, a link or a folder with what is in it.
pub(super) fn remove(path: &Path) -> Result<()> {
    let is_folder = path.symlink_metadata().map_err(Error::io(path))?.is_dir();
    let removed = if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(Error::io(path))
}

/// A hidden folder in the same place, so that renaming stays inside one file system.
fn beside(out: &Path, kind: &str) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| problem(out, "expected a folder name"))?;
    Ok(parent(out).join(format!(".{}.{kind}", name.to_string_lossy())))
}

pub(super) fn problem(path: &Path, problem: &str) -> Error {
    Error::Output { path: path.into(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &Path, file: &str) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join(file), "x").unwrap();
    }

    #[test]
    fn what_can_never_be_replaced_is_refused_before_any_work() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(check_replaceable(&file).unwrap_err().to_string().contains("got a file"));
        #[cfg(target_os = "linux")]
        assert!(check_replaceable(Path::new("/proc")).unwrap_err().to_string().contains("mount point"));
        assert!(resolve(Path::new("..")).is_err());
    }

    #[test]
    fn what_is_replaced_lies_in_the_work_folder_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        folder(&out, "old");
        let work = WorkFolder::hold(&out).unwrap();
        folder(&work.artifact(), "new");
        assert!(work.place(false).is_err() && out.join("old").exists());
        work.place(true).unwrap();
        assert!(out.join("new").exists() && !out.join("old").exists());
        work.remove().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_replacement_that_was_interrupted_between_two_renames_is_recovered() {
        let dir = tempfile::tempdir().unwrap();
        let (out, old) = (dir.path().join("a"), dir.path().join(".a.replaced"));
        folder(&old, "old");
        let work = WorkFolder::hold(&out).unwrap();
        work.recover().unwrap();
        assert!(out.join("old").exists() && !old.exists(), "before the second: the old one is back");
        folder(&old, "older");
        work.recover().unwrap();
        assert!(out.join("old").exists() && !old.exists(), "after the second: the old one goes");
    }

    #[test]
    fn a_work_folder_is_held_once_and_a_failure_keeps_nothing_but_a_journal() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        let work = WorkFolder::hold(&out).unwrap();
        assert!(WorkFolder::hold(&out).err().unwrap().to_string().contains("another process"));
        folder(&work.artifact(), "half");
        work.give_up();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let work = WorkFolder::hold(&out).unwrap();
        fs::write(work.path.join(JOURNAL), "{}\n").unwrap();
        work.give_up();
        assert!(dir.path().join(".a.partial").join(JOURNAL).exists());
    }
}
