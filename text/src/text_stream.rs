//! Text of a token sequence that is still growing.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Stands for bytes that are no UTF-8, among them a character's first bytes.
const REPLACEMENT: char = '\u{FFFD}';

/// Turns ids into pieces of text, one id at a time. Only whole characters are given out: an id that ends
/// inside a character waits for the next one. The pieces together are [`Tokenizer::decode`] of all ids.
///
/// What an id adds to the text can depend on its neighbour (the space in front of a word), so each piece is
/// the difference between two decodings that begin at the same id: with and without the new ids.
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The ids of the last piece, then those that wait.
    ids: Vec<u32>,
    /// How many of `ids` made the last piece.
    given_ids: usize,
    /// The text of those.
    given_text: String,
}

impl TextStream {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), given_ids: 0, given_text: String::new() }
    }

    /// Takes the next id; `None` when it completes no text.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        // Decoding would leave it out. Kept here it could become the only neighbour of the next id.
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(None);
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        if text.ends_with(REPLACEMENT) {
            return Ok(None);
        }
        self.give(text)
    }

    /// The text that still waits: an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        self.give(text)
    }

    /// `text` is the decoding of `ids`.
    fn give(&mut self, text: String) -> Result<Option<String>> {
        let piece = match text.strip_prefix(&self.given_text) {
            Some(piece) => piece.to_owned(),
            // A stray byte can spoil the run of bytes it ends, also those that made a good character and are
            // out.
            None => self.tokenizer.decode(&self.ids[self.given_ids..], self.skip_special)?,
        };
        if piece.is_empty() {
            return Ok(None);
        }
        self.ids.drain(..self.given_ids);
        self.given_ids = self.ids.len();
        self.given_text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(Some(piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    /// The pieces of all pushes, then that of `finish`.
    fn pieces(tokenizer: &Tokenizer, skip_special: bool, ids: &[u32]) -> Vec<Option<String>> {
        let mut stream = tokenizer.stream(skip_special);
        let mut pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    fn joined(pieces: &[Option<String>]) -> String {
        pieces.iter().flatten().map(String::as_str).collect()
    }

    #[test]
    fn a_character_is_held_back_until_its_last_byte() {
        let tokenizer = testing::bytes();
        let ids = tokenizer.encode("a€b", false).unwrap();
        let expected =
            [Some("a"), None, None, Some("€"), Some("b"), None].map(|piece| piece.map(str::to_owned));
        assert_eq!(pieces(&tokenizer, false, &ids), expected);
    }

    #[test]
    fn the_pieces_are_the_whole_text() {
        let tokenizer = testing::bytes();
        let mut ids = tokenizer.encode("é \n \u{1F600}<|end|>x\u{FFFD}y\u{FFFD}", false).unwrap();
        for end in 0..=ids.len() {
            for skip_special in [false, true] {
                let whole = tokenizer.decode(&ids[..end], skip_special).unwrap();
                assert_eq!(joined(&pieces(&tokenizer, skip_special, &ids[..end])), whole);
            }
        }
        // Every byte in turn: most are no UTF-8.
        ids = (0..256).collect();
        let whole = tokenizer.decode(&ids, false).unwrap();
        assert_eq!(joined(&pieces(&tokenizer, false, &ids)), whole);
    }

    #[test]
    fn spaces_between_words_are_kept_and_the_leading_one_is_stripped_once() {
        let tokenizer = testing::byte_fallback();
        // `<s>` in the middle is skipped and must not make the next word a first word.
        for ids in [&[1, 3, 4, 1, 3, 1, 1, 2, 2, 3][..], &[2, 2, 3, 5], &[2], &[]] {
            for skip_special in [false, true] {
                let whole = tokenizer.decode(ids, skip_special).unwrap();
                assert_eq!(joined(&pieces(&tokenizer, skip_special, ids)), whole, "{ids:?}");
            }
        }
        assert_eq!(joined(&pieces(&tokenizer, true, &[1, 3, 4, 1, 3])), "a b a");
    }

    #[test]
    fn fallback_bytes_become_characters() {
        let tokenizer = testing::byte_fallback();
        let ids: Vec<u32> = "é€x".bytes().map(|byte| 6 + u32::from(byte)).collect();
        let expected =
            [None, Some("é"), None, None, Some("€"), Some("x"), None].map(|piece| piece.map(str::to_owned));
        assert_eq!(pieces(&tokenizer, false, &ids), expected);
    }

    #[test]
    fn a_stray_byte_after_a_character_does_not_end_the_stream() {
        let tokenizer = testing::byte_fallback();
        let ids = [6 + 0xc3, 6 + 0xa9, 6 + 0xff, 3];
        assert_eq!(joined(&pieces(&tokenizer, false, &ids)), "é\u{FFFD} a");
    }
}
