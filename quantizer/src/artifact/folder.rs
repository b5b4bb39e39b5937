//! The folder that an artifact gets, and the work folder beside it that takes its name at the end.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::writer::OutMode;
use crate::{Error, Result};

pub(super) const LOCK: &str = "lock";

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
pub(super) fn check_free(out: &Path, mode: OutMode) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    if !out.is_dir() {
        return Err(problem(out, "expected a folder, got a file"));
    }
    let device = |path: &Path| fs::metadata(path).map(|data| data.dev()).map_err(Error::io(path));
    if device(out)? != device(&parent(out))? {
        return Err(problem(
            out,
            "expected a folder that can be replaced, got a mount point (name one inside it)",
        ));
    }
    match mode {
        _ if is_empty(out) => Ok(()),
        OutMode::Force if out.join("quantize_config.json").is_file() => Ok(()),
        OutMode::Force => Err(problem(out, "expected an artifact to replace, got a folder of other files")),
        OutMode::New => {
            Err(problem(out, "expected a new or empty folder, got one with files (--force replaces it)"))
        }
        OutMode::Resume => {
            Err(problem(out, "expected an interrupted run, got a finished output (--force replaces it)"))
        }
    }
}

/// `.NAME.partial` beside `NAME`.
pub(super) fn work_folder(out: &Path) -> Result<PathBuf> {
    beside(out, "partial")
}

/// Holds the work folder for this process, until the file is dropped.
pub(super) fn lock(work: &Path) -> Result<File> {
    let path = work.join(LOCK);
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(problem(work, "another process is writing this output")),
        Err(TryLockError::Error(cause)) => Err(Error::Io { path, cause }),
    }
}

/// Gives the work folder its final name. An old output is moved aside first and deleted last.
pub(super) fn rename(work: &Path, out: &Path, mode: OutMode) -> Result<()> {
    let old = beside(out, "replaced")?;
    if mode == OutMode::Force && out.exists() && !is_empty(out) {
        // What an interrupted replacement left aside is older than what is replaced now.
        remove(&old)?;
        fs::rename(out, &old).map_err(Error::io(out))?;
    } else if out.exists() {
        fs::remove_dir(out).map_err(Error::io(out))?;
    }
    fs::rename(work, out).map_err(Error::io(out))?;
    if mode == OutMode::Force { remove(&old) } else { Ok(()) }
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

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// A hidden folder in the same place, so that renaming stays inside one file system.
fn beside(out: &Path, kind: &str) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| problem(out, "expected a folder name"))?;
    Ok(parent(out).join(format!(".{}.{kind}", name.to_string_lossy())))
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() { fs::remove_dir_all(folder).map_err(Error::io(folder)) } else { Ok(()) }
}

fn problem(path: &Path, problem: &str) -> Error {
    Error::Output { path: path.into(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_never_be_replaced_is_refused_before_any_work() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        for mode in [OutMode::New, OutMode::Resume, OutMode::Force] {
            assert!(check_free(&file, mode).unwrap_err().to_string().contains("got a file"));
            #[cfg(target_os = "linux")]
            assert!(check_free(Path::new("/proc"), mode).unwrap_err().to_string().contains("mount point"));
        }
        assert!(resolve(Path::new("..")).is_err());
    }

    #[test]
    fn what_an_earlier_replacement_left_does_not_stop_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (folder, file) in [("a", "old"), (".a.replaced", "older"), (".a.partial", "new")] {
            fs::create_dir(path(folder)).unwrap();
            fs::write(path(folder).join(file), "x").unwrap();
        }
        rename(&path(".a.partial"), &path("a"), OutMode::Force).unwrap();
        assert!(path("a").join("new").exists() && !path("a").join("old").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn only_force_deletes_what_a_replacement_left_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path(".a.partial")).unwrap();
        fs::create_dir(path(".a.replaced")).unwrap();
        rename(&path(".a.partial"), &path("a"), OutMode::New).unwrap();
        assert!(path("a").exists() && path(".a.replaced").exists());
    }
}
