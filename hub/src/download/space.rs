//! Whether there is room, before the first byte.

use std::path::Path;

use super::store::Store;
use crate::error::{Cause, Result, Subject};
use crate::tree::Entry;

/// # Errors
/// Where what is missing needs more than the disk has.
pub(super) fn check(missing: &[Entry], subject: &Subject, store: &Store, piece: u64) -> Result<()> {
    let needs = missing.iter().map(|entry| entry.size.saturating_sub(store.kept(entry, piece))).sum();
    let Some(has) = free(store.root()).filter(|has| needs > *has) else { return Ok(()) };
    let dir = store.root().to_owned();
    let subject = match missing {
        [one] => subject.file(&one.path),
        _ => subject.clone(),
    };
    Err(subject.fails(Cause::Disk { needs, has, dir }))
}

/// Bytes that this user may still write to the disk of a folder, or of the nearest one above it that is there. None where
/// the system does not say.
#[cfg(unix)]
#[allow(clippy::useless_conversion, clippy::unnecessary_cast, reason = "32 bits on some systems")]
fn free(folder: &Path) -> Option<u64> {
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    let found = nix::sys::statvfs::statvfs(there).ok()?;
    Some(u64::from(found.blocks_available()) * found.fragment_size() as u64)
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::tree::Tree;

    #[test]
    fn a_file_that_does_not_fit_is_refused_with_both_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let not_yet = folder.path().join("not/yet");
        let (size, blob) = (1u64 << 60, "0".repeat(40));
        let kept = format!(
            r#"{{"format_version": 1, "files": {{"big.bin": {{"size": {size}, "blob_id": "{blob}"}}}}}}"#
        );
        let tree = Tree::from_kept(kept.as_bytes()).unwrap();
        let entries: Vec<_> = tree.iter().cloned().collect();
        let error = check(&entries, &Subject::default(), &Store::Folder(not_yet), 1).unwrap_err().to_string();
        assert!(
            error.starts_with("big.bin: needs 1152921504.61 GB, ") && error.contains("not/yet has "),
            "{error}"
        );
        assert!(!folder.path().join("not").exists());
        assert!(free(folder.path()).unwrap() > 0);
    }
}
