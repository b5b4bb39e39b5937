//! Files as text: decompressed, in UTF-8, without a byte-order mark.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use crate::error::{Error, Result};

const BUFFER: usize = 1 << 16;

/// Bytes of a row at most: a book has some MB.
pub(super) const MOST_ROW_BYTES: usize = 16 << 20;

/// How many times its size a file may come to, beyond the first 64 MB. Texts come to 3 to 20 times.
const MOST_GROWTH: u64 = 100;

/// Bytes that a file of this size may come to.
pub(super) fn most_bytes(size: u64) -> u64 {
    (64 << 20) + size.saturating_mul(MOST_GROWTH)
}

/// What is said of a file that comes to more.
pub(super) fn too_much(size: u64) -> String {
    format!("expected at most {} bytes of text from {size} compressed ones, got more", most_bytes(size))
}

/// What a file holds, by the end of its name in any case: `a.JSONL`, `a.txt`, `a.json.gz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Parquet,
    Json,
    JsonLines,
    Text,
}

impl Kind {
    pub(super) const EXPECTED: &str =
        "a .parquet, .jsonl or .txt file (or .json; these three also as .gz or .zst)";

    /// `None` for every other file.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let (plain, packed) = match name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")) {
            Some(plain) => (plain, true),
            None => (name.as_str(), false),
        };
        match Path::new(plain).extension()?.to_str()? {
            "parquet" if !packed => Some(Self::Parquet),
            "json" => Some(Self::Json),
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "txt" => Some(Self::Text),
            _ => None,
        }
    }
}

/// A file that is being read.
pub(super) struct Opened {
    pub reader: Box<dyn BufRead>,
    path: PathBuf,
    compression: Option<&'static str>,
}

/// Opens a file at the first byte of its text. Whether it is compressed is seen from its content.
///
/// # Errors
/// Names the file that cannot be read, and one in UTF-16.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let failed = |cause| Error::io(path)(cause);
    let file = gptq_input::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut file = BufReader::with_capacity(BUFFER, file);
    let start = peek(&mut file).map_err(failed)?;
    let (mut reader, compression): (Box<dyn BufRead>, _) = match start {
        [0x1f, 0x8b, ..] => {
            let decoder = Growing::new(MultiGzDecoder::new(file), size);
            (Box::new(BufReader::with_capacity(BUFFER, decoder)), Some("gzip"))
        }
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(file).map_err(failed)?;
            (Box::new(BufReader::with_capacity(BUFFER, Growing::new(decoder, size))), Some("zstd"))
        }
        _ => (Box::new(file), None),
    };
    let opened = |reader| Opened { reader, path: path.to_owned(), compression };
    match peek(&mut reader) {
        Err(cause) => Err(opened(reader).error(cause)),
        Ok([0xef, 0xbb, 0xbf, _]) => {
            reader.consume(3);
            Ok(opened(reader))
        }
        Ok(start) if is_utf16(start) && !is_shorter(&mut reader) => {
            Err(Error::malformed(path.display(), "this text is in UTF-16: convert it to UTF-8"))
        }
        Ok(_) => Ok(opened(reader)),
    }
}

/// What is decompressed, up to the bytes that a file of its size may come to.
struct Growing<R> {
    reader: R,
    size: u64,
    left: u64,
}

impl<R> Growing<R> {
    fn new(reader: R, size: u64) -> Self {
        Self { reader, size, left: most_bytes(size) }
    }
}

impl<R: Read> Read for Growing<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(bytes)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| too_large(too_much(self.size)))?;
        Ok(read)
    }
}

fn too_large(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, problem)
}

/// Fails behind the bytes that a row may have.
pub(super) struct Row<R> {
    pub reader: R,
    pub left: std::rc::Rc<std::cell::Cell<usize>>,
}

impl<R: Read> Read for Row<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(bytes)?;
        match self.left.get().checked_sub(read) {
            Some(left) => self.left.set(left),
            None => return Err(too_large(row_too_large())),
        }
        Ok(read)
    }
}

pub(super) fn row_too_large() -> String {
    format!("expected a row of at most {MOST_ROW_BYTES} bytes, got a longer one")
}

/// By its byte-order mark, or by the zero byte that a Latin letter has there.
fn is_utf16([first, second, ..]: [u8; 4]) -> bool {
    matches!((first, second), (0xff, 0xfe) | (0xfe, 0xff)) || (first == 0) != (second == 0)
}

/// The first four bytes; 0 for those that are not there.
fn peek(reader: &mut impl BufRead) -> io::Result<[u8; 4]> {
    let mut start = [0; 4];
    let bytes = reader.fill_buf()?;
    let length = bytes.len().min(start.len());
    start[..length].copy_from_slice(&bytes[..length]);
    Ok(start)
}

/// Whether there is no second byte.
fn is_shorter(reader: &mut impl BufRead) -> bool {
    reader.fill_buf().is_ok_and(|bytes| bytes.len() < 2)
}

impl Opened {
    /// What went wrong while reading, and that it may be the compression's fault.
    pub(super) fn error(&self, cause: io::Error) -> Error {
        match self.compression {
            _ if cause.kind() == io::ErrorKind::FileTooLarge => Error::malformed(self.path.display(), cause),
            Some(name) => {
                Error::malformed(self.path.display(), format!("damaged or truncated {name} data ({cause})"))
            }
            None => Error::io(&self.path)(cause),
        }
    }

    /// The next line with its line end, into `line`; false at the end of the file.
    pub(super) fn next_line(&mut self, line: &mut Vec<u8>) -> Result<bool> {
        line.clear();
        match (&mut self.reader).take(MOST_ROW_BYTES as u64 + 1).read_until(b'\n', line) {
            Ok(read) if read > MOST_ROW_BYTES => Err(self.error(too_large(row_too_large()))),
            Ok(read) => Ok(read > 0),
            Err(cause) => Err(self.error(cause)),
        }
    }

    /// Appends the next bytes, at most `count` of them; false at the end of the file.
    pub(super) fn next_bytes(&mut self, count: u64, bytes: &mut Vec<u8>) -> Result<bool> {
        match (&mut self.reader).take(count).read_to_end(bytes) {
            Ok(read) => Ok(read > 0),
            Err(cause) => Err(self.error(cause)),
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    pub fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        let (mut opened, mut text) = (open(&path)?, Vec::new());
        while opened.next_bytes(3, &mut text)? {}
        Ok(text)
    }

    #[test]
    fn names_are_known_in_any_case_and_with_a_compression() {
        for (name, kind) in [
            ("a.JSONL", Some(Kind::JsonLines)),
            ("a.Json.GZ", Some(Kind::Json)),
            ("a.b.Txt.zst", Some(Kind::Text)),
            ("a.PARQUET", Some(Kind::Parquet)),
            ("a.parquet.gz", None),
            ("txt", None),
            ("a.gz", None),
        ] {
            assert_eq!(Kind::of(Path::new(name)), kind, "{name}");
        }
    }

    #[test]
    fn marks_and_compressions_are_no_part_of_the_text() {
        for plain in [&b"text"[..], b"", b"a", b"\xef\xbb"] {
            for marked in [plain.to_vec(), [b"\xef\xbb\xbf", plain].concat()] {
                assert_eq!(text(&testing::gzip(&marked)).unwrap(), plain);
                assert_eq!(text(&zstd::encode_all(&marked[..], 1).unwrap()).unwrap(), plain);
                assert_eq!(text(&marked).unwrap(), plain);
            }
        }
        let members = [testing::gzip(b"one\n"), testing::gzip(b"two\n")].concat();
        assert_eq!(text(&members).unwrap(), b"one\ntwo\n", "gzip files may be appended to one another");
    }

    #[test]
    fn utf_16_is_named() {
        for bytes in [&b"\xff\xfea\0"[..], b"\xfe\xff\0a", b"{\0\"\0", b"\0{\0\""] {
            let error = text(bytes).unwrap_err().to_string();
            assert!(error.contains("UTF-16"), "{error}");
        }
    }

    #[test]
    fn a_truncated_archive_is_an_error() {
        let long: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).map(|byte| byte % 64 + 32).collect();
        for (name, packed) in
            [("gzip", testing::gzip(&long)), ("zstd", zstd::encode_all(&long[..], 1).unwrap())]
        {
            for length in [5, 30, packed.len() / 2, packed.len() - 1] {
                let error = text(&packed[..length]).unwrap_err().to_string();
                assert!(error.contains(&format!("truncated {name}")), "{length}: {error}");
            }
        }
    }
}
