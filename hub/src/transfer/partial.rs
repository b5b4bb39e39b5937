//! The file beside a blob's place that its pieces are written to, and the list of those that are whole, so that a process
//! that was killed loses what was under way and nothing else.
//!
//! ```text
//! <name>.<8 hex>.gptq.incomplete         the pieces, each at its place
//! <name>.<8 hex>.gptq.incomplete.pieces  a line with size and piece, then a line for every piece that is whole
//! ```
//!
//! The name is one that no other client adopts: older ones append to `<name>.incomplete`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::Transfer;
use crate::cache::eight_hex;
use crate::part::Part;

const SUFFIX: &str = ".gptq.incomplete";
const LIST: &str = ".pieces";

#[derive(Debug)]
pub(crate) struct Partial {
    pub path: PathBuf,
    pub file: File,
    list: File,
}

impl Partial {
    /// Goes on with what an earlier process has left in the folder, where `adopt` allows it, or begins. The caller
    /// must hold the file's lock. Returns the state, with the pieces that are there.
    pub fn open(
        folder: &Path,
        name: &str,
        size: u64,
        piece: u64,
        adopt: bool,
    ) -> io::Result<(Self, Transfer)> {
        fs::create_dir_all(folder)?;
        if adopt {
            for path in left_behind(folder, name)? {
                if let Some(found) = Self::adopt(&path, size, piece)? {
                    return Ok(found);
                }
                discard(&path);
            }
        }
        let path = folder.join(format!("{name}.{}{SUFFIX}", eight_hex()));
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path)?;
        // Holes cost nothing until they are written to.
        file.set_len(size)?;
        let mut list = OpenOptions::new().create(true).append(true).open(list_of(&path))?;
        list.write_all(header(size, piece).as_bytes())?;
        Ok((Self { path, file, list }, Transfer::new(size, piece)))
    }

    /// None where the list is of another file, or damaged.
    fn adopt(path: &Path, size: u64, piece: u64) -> io::Result<Option<(Self, Transfer)>> {
        let Some(transfer) = state(path, size, piece) else { return Ok(None) };
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut list = OpenOptions::new().append(true).open(list_of(path))?;
        // Ends a line that was being written when the process died, so that it is none.
        list.write_all(b"x\n")?;
        Ok(Some((Self { path: path.to_owned(), file, list }, transfer)))
    }

    /// This piece is whole, and survives a kill.
    pub fn mark(&self, index: usize) -> io::Result<()> {
        (&self.list).write_all(format!("{index}\n").as_bytes())
    }

    /// Forgets all pieces.
    pub fn begin_anew(&self, size: u64, piece: u64) -> io::Result<()> {
        self.list.set_len(0)?;
        (&self.list).write_all(header(size, piece).as_bytes())
    }

    /// Writes at a place, while other threads write at others.
    pub fn write_at(&self, bytes: &[u8], place: u64) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::write_all_at(&self.file, bytes, place);
        #[cfg(windows)]
        {
            let (mut bytes, mut place) = (bytes, place);
            while !bytes.is_empty() {
                let count = std::os::windows::fs::FileExt::seek_write(&self.file, bytes, place)?;
                (bytes, place) = (&bytes[count..], place + count as u64);
            }
            Ok(())
        }
    }

    /// The bytes from one place to before another.
    pub fn read(&self, from: u64, to: u64) -> impl Read + '_ {
        Part::new(&self.file, from, to)
    }

    /// Takes its final name, over whatever is there; a link there is replaced, not followed.
    pub fn finish(&self, target: &Path) -> io::Result<()> {
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::rename(&self.path, target)?;
        let _ = fs::remove_file(list_of(&self.path));
        Ok(())
    }
}

/// What earlier processes have left of a file.
pub(crate) fn left_behind(folder: &Path, name: &str) -> io::Result<Vec<PathBuf>> {
    let start = format!("{name}.");
    let mut found = Vec::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let middle = file_name.strip_prefix(&start).and_then(|rest| rest.strip_suffix(SUFFIX));
        if middle.is_some_and(|middle| middle.len() == 8) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Removes a file that cannot be gone on with.
pub(crate) fn discard(path: &Path) {
    let _ = fs::remove_file(list_of(path));
    let _ = fs::remove_file(path);
}

/// Bytes that are whole in what was left behind of a file of this size.
pub(crate) fn kept(folder: &Path, name: &str, size: u64, piece: u64) -> u64 {
    let found = left_behind(folder, name).unwrap_or_default();
    found.iter().find_map(|path| state(path, size, piece)).map_or(0, |transfer| transfer.done())
}

/// What the list beside a partial file says. None where it is of another file, or damaged.
fn state(path: &Path, size: u64, piece: u64) -> Option<Transfer> {
    const MOST_BYTES: u64 = 64 << 20;
    let list = gptq_input::read(&list_of(path), MOST_BYTES).ok()?;
    let list = String::from_utf8_lossy(&list);
    let lines = list.strip_prefix(&header(size, piece))?;
    fs::metadata(path).ok().filter(|found| found.len() == size)?;
    let mut transfer = Transfer::new(size, piece);
    // A line without an end was being written when the process died.
    for line in lines.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        if let Ok(index) = line.parse() {
            transfer.keep(index);
        }
    }
    Some(transfer)
}

fn list_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(LIST);
    name.into()
}

fn header(size: u64, piece: u64) -> String {
    format!("gptq pieces 1: {size} bytes, {piece} each\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_whole_survives_a_kill_and_what_is_not_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let open = |size, adopt| Partial::open(folder.path(), "abc", size, 10, adopt).unwrap();
        let (partial, _) = open(25, true);
        partial.write_at(b"0123456789", 10).unwrap();
        partial.mark(1).unwrap();
        // The process dies while it writes a line: `12` might have become `1`.
        (&partial.list).write_all(b"2").unwrap();
        let path = partial.path.clone();
        drop(partial);

        assert_eq!(kept(folder.path(), "abc", 25, 10), 10);
        let (again, mut transfer) = open(25, true);
        assert_eq!((&again.path, transfer.done()), (&path, 10));
        let mut text = String::new();
        again.read(10, 20).read_to_string(&mut text).unwrap();
        assert_eq!(text, "0123456789");
        assert_eq!(transfer.next().map(|work| (work.from, work.to)), Some((0, 10)));
        again.mark(0).unwrap();
        drop(again);
        assert_eq!(open(25, true).1.done(), 20, "the broken line does not swallow the next one");

        // Without the lock nothing is taken over, and a file of another size is another file.
        assert_ne!(open(25, false).0.path, path);
        let (other, transfer) = open(30, true);
        assert!(other.path != path && transfer.done() == 0 && !path.exists());
        other.finish(&folder.path().join("abc")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
