//! A snapshot's links to the blobs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Makes `snapshots/<commit>/<path>` lead to the blob, whatever was there. Where a file system has no links, the content
/// moves there, as Python's cache has it then; it returns whether there is a link.
pub(crate) fn point(snapshot: &Path, path: &str, blob: &Path) -> io::Result<bool> {
    point_with(symlink, snapshot, path, blob)
}

fn point_with(
    symlink: impl Fn(&Path, &Path) -> io::Result<()>,
    snapshot: &Path,
    path: &str,
    blob: &Path,
) -> io::Result<bool> {
    let pointer = snapshot.join(path);
    if leads_to(&pointer, blob) {
        return Ok(true);
    }
    if let Some(folder) = pointer.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = super::beside(&pointer);
    match symlink(&relative(path, blob), &beside) {
        Ok(()) => fs::rename(&beside, &pointer).map(|()| true).inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        }),
        Err(cause) if has_no_links(&cause) => fs::rename(blob, &pointer).map(|()| false),
        Err(cause) => Err(cause),
    }
}

/// Whether a link is there already and leads to that file.
fn leads_to(pointer: &Path, blob: &Path) -> bool {
    let is_link = fs::symlink_metadata(pointer).is_ok_and(|found| found.is_symlink());
    is_link && matches!((fs::canonicalize(pointer), fs::canonicalize(blob)), (Ok(a), Ok(b)) if a == b)
}

/// `../../blobs/<hash>`, with one step more for every folder of the path.
fn relative(path: &str, blob: &Path) -> PathBuf {
    let up = "../".repeat(2 + path.matches('/').count());
    PathBuf::from(up).join("blobs").join(blob.file_name().unwrap_or_default())
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

/// What network drives, FAT and Windows without the privilege answer.
fn has_no_links(cause: &io::Error) -> bool {
    matches!(
        cause.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput
    ) || cfg!(windows)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn links_are_relative_and_replace_whatever_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let repo = folder.path().join("repo");
        let (snapshot, blob) = (repo.join("snapshots/c0"), repo.join("blobs/b0"));
        fs::create_dir_all(repo.join("blobs")).unwrap();
        fs::write(&blob, "content").unwrap();
        for path in ["x.json", "deep/er/x.json"] {
            for _ in 0..2 {
                assert!(point(&snapshot, path, &blob).unwrap());
            }
        }
        let link = fs::read_link(snapshot.join("deep/er/x.json")).unwrap();
        assert_eq!(link, Path::new("../../../../blobs/b0"));
        fs::remove_file(snapshot.join("x.json")).unwrap();
        symlink(Path::new("../../blobs/gone"), &snapshot.join("x.json")).unwrap();
        point(&snapshot, "x.json", &blob).unwrap();
        // The cache may be moved as a whole.
        fs::rename(&repo, folder.path().join("moved")).unwrap();
        assert_eq!(fs::read(folder.path().join("moved/snapshots/c0/x.json")).unwrap(), b"content");
        assert_eq!(fs::read_dir(folder.path().join("moved/snapshots/c0")).unwrap().count(), 2);
    }

    #[test]
    fn where_there_are_no_links_the_content_moves_into_the_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let (snapshot, blob) = (folder.path().join("snapshots/c0"), folder.path().join("blobs/b0"));
        fs::create_dir_all(folder.path().join("blobs")).unwrap();
        for kind in [io::ErrorKind::Unsupported, io::ErrorKind::PermissionDenied] {
            fs::write(&blob, "content").unwrap();
            assert!(!point_with(|_, _| Err(kind.into()), &snapshot, "a/x.json", &blob).unwrap());
            assert_eq!(fs::read(snapshot.join("a/x.json")).unwrap(), b"content");
            assert!(!blob.exists() && !snapshot.join("a/x.json").is_symlink());
        }
        let full = |_: &Path, _: &Path| Err(io::ErrorKind::StorageFull.into());
        fs::write(&blob, "content").unwrap();
        assert!(point_with(full, &snapshot, "b", &blob).is_err() && blob.exists());
    }
}
