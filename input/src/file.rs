//! Plain files. Reading a pipe without a writer would wait for ever, and a device has no end.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

/// Opens a plain file for reading, through links. It never waits.
///
/// # Errors
/// Those of the system, and `InvalidInput` for what is not a plain file, with its kind.
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    // A socket cannot even be opened.
    let refused = |kind: FileType| io::Error::new(io::ErrorKind::InvalidInput, not_plain(kind));
    let file = match options.open(path) {
        Ok(file) => file,
        Err(cause) => {
            return Err(match std::fs::metadata(path) {
                Ok(metadata) if !metadata.is_file() => refused(metadata.file_type()),
                _ => cause,
            });
        }
    };
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok(file),
        false => Err(refused(metadata.file_type())),
    }
}

fn not_plain(kind: FileType) -> String {
    #[cfg(unix)]
    let special = {
        use std::os::unix::fs::FileTypeExt;
        match kind {
            kind if kind.is_fifo() => Some("a pipe"),
            kind if kind.is_socket() => Some("a socket"),
            kind if kind.is_char_device() || kind.is_block_device() => Some("a device"),
            _ => None,
        }
    };
    #[cfg(not(unix))]
    let special = None;
    let kind = special.unwrap_or(if kind.is_dir() { "a folder" } else { "something else" });
    format!("expected a plain file, got {kind}")
}

/// The bytes of a plain file of at most `most` bytes.
///
/// # Errors
/// As [`open`], and `FileTooLarge` with both sizes.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let size = file.metadata()?.len();
    let too_large = |size: u64| {
        let problem = format!("expected at most {most} bytes, got {size}");
        io::Error::new(io::ErrorKind::FileTooLarge, problem)
    };
    if size > most {
        return Err(too_large(size));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // It may have grown since, or be one of those that have no size, as in /proc.
    file.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 {
        size if size > most => Err(too_large(size)),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &Path) -> String {
        read(path, 4).unwrap_err().to_string()
    }

    #[test]
    #[cfg(unix)]
    fn nothing_but_a_plain_file_of_its_size_is_read_and_nothing_waits() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("four"), "1234").unwrap();
        std::fs::write(at("five"), "12345").unwrap();
        std::os::unix::fs::symlink(at("four"), at("link")).unwrap();
        assert_eq!(read(&at("link"), 4).unwrap(), b"1234");
        assert_eq!(refusal(&at("five")), "expected at most 4 bytes, got 5");
        assert_eq!(refusal(folder.path()), "expected a plain file, got a folder");
        assert_eq!(refusal(Path::new("/dev/zero")), "expected a plain file, got a device");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        assert_eq!(refusal(&at("socket")), "expected a plain file, got a socket");
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        assert_eq!(refusal(&at("pipe")), "expected a plain file, got a pipe");
        assert_eq!(read(&at("none"), 4).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
