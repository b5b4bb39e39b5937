//! Locks between processes, Python's among them: a process holds a blob's lock while it fetches the blob.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

/// Released when it is dropped, or with the process. The file stays, as Python leaves it.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "held, not used")] File);

/// What came of asking for a lock.
#[derive(Debug)]
pub(crate) enum Asked {
    Mine(Lock),
    /// Another process has it.
    Held,
    /// The file system has no locks.
    Unknown,
}

/// Asks once, and does not wait.
pub(crate) fn ask(path: &Path) -> io::Result<Asked> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    // Users that share a cache share its locks.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o664);
    let file = options.open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Asked::Mine(Lock(file))),
        Err(TryLockError::WouldBlock) => Ok(Asked::Held),
        Err(TryLockError::Error(_)) => Ok(Asked::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".locks/models--a--b/x.lock");
        let first = ask(&path).unwrap();
        assert!(matches!(first, Asked::Mine(_)));
        assert!(matches!(ask(&path).unwrap(), Asked::Held));
        drop(first);
        assert!(matches!(ask(&path).unwrap(), Asked::Mine(_)));
        assert!(path.exists());
    }
}
