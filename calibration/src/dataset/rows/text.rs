//! A text file is one row.

use std::path::Path;
use std::str;

use super::super::open::open;
use super::{Piece, Visit};
use crate::error::{Error, Result};

/// Bytes of a piece.
const PIECE: u64 = 1 << 16;

pub(super) fn visit(path: &Path, visit: &mut Visit) -> Result<()> {
    let mut file = open(path)?;
    let (mut bytes, mut before, mut begins_row) = (Vec::new(), 0, true);
    while file.next_bytes(PIECE, &mut bytes)? {
        let whole = match str::from_utf8(&bytes) {
            Ok(_) => bytes.len(),
            // A character that goes on in the next piece.
            Err(cause) if cause.error_len().is_none() => cause.valid_up_to(),
            Err(cause) => return Err(not_utf8(path, before + cause.valid_up_to())),
        };
        // Checked above.
        let text = str::from_utf8(&bytes[..whole]).unwrap_or_default();
        if !text.is_empty() {
            visit(Piece { text, begins_row })?;
            begins_row = false;
        }
        before += whole;
        bytes.drain(..whole);
    }
    if bytes.is_empty() { Ok(()) } else { Err(not_utf8(path, before)) }
}

fn not_utf8(path: &Path, offset: usize) -> Error {
    Error::malformed(path.display(), format!("expected UTF-8 text, got another byte at offset {offset}"))
}

#[cfg(test)]
mod tests {
    use super::super::super::open::testing::gzip;
    use super::super::testing::rows;

    #[test]
    fn a_text_file_is_one_row_as_it_is() {
        let long = "é€\u{1F600}x\r\n".repeat(20_000);
        for text in ["one\n\ntwo\r\n three", "\n", "no line end", &long] {
            assert_eq!(rows("a.txt", text.as_bytes(), None).unwrap(), [text]);
            assert_eq!(rows("a.TXT", &[b"\xef\xbb\xbf", text.as_bytes()].concat(), None).unwrap(), [text]);
            assert_eq!(rows("a.txt.gz", &gzip(text.as_bytes()), None).unwrap(), [text]);
        }
        assert!(rows("a.txt", b"", None).unwrap().is_empty());
    }

    #[test]
    fn bytes_that_are_no_text_are_named_with_their_place() {
        let long = [&b"x".repeat(70_000)[..], b"\xe9 and more"].concat();
        for (bytes, offset) in [(&b"\xff"[..], "0"), (b"ab\xc3", "2"), (&long, "70000")] {
            let error = rows("a.txt", bytes, None).unwrap_err().to_string();
            assert!(error.contains("a.txt") && error.ends_with(&format!("offset {offset}")), "{error}");
        }
    }
}
