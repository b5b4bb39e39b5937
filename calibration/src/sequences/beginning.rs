//! The first tokens of a long text, encoded in pieces.

use super::char_boundary;
use crate::error::Result;
use gptq_text::Tokenizer;

/// Bytes encoded at a time.
const PIECE: usize = 1 << 18;

/// Bytes that two pieces share. How a text is cut into tokens does not depend on what is farther away.
const OVERLAP: usize = 1 << 12;

/// Tokens of the beginning of a text that arrives in parts. Pieces overlap, and one takes over from the one before
/// where a token of both begins, in the middle of what they share: far from where either was cut, so that the ids
/// are those of the whole text.
pub(super) struct Beginning<'a> {
    tokenizer: &'a Tokenizer,
    needed: usize,
    ids: Vec<u32>,
    /// What the tokenizer puts behind a text.
    after: Vec<u32>,
    /// The text from where the pending tokens begin.
    text: String,
    /// Tokens of the last piece that lie in what it shares with the next, and where in `text` they begin.
    pending: Vec<(u32, usize)>,
    piece: usize,
    overlap: usize,
}

impl<'a> Beginning<'a> {
    pub fn new(tokenizer: &'a Tokenizer, needed: usize) -> Result<Self> {
        Self::with_pieces(tokenizer, needed, PIECE, OVERLAP)
    }

    fn with_pieces(tokenizer: &'a Tokenizer, needed: usize, piece: usize, overlap: usize) -> Result<Self> {
        let (ids, after) = tokenizer.frame()?;
        Ok(Self { tokenizer, needed, ids, after, text: String::new(), pending: Vec::new(), piece, overlap })
    }

    pub fn push(&mut self, mut part: &str) -> Result<()> {
        while self.ids.len() < self.needed && !part.is_empty() {
            let room = char_boundary(part, self.piece.saturating_sub(self.text.len()).max(1));
            self.text.push_str(&part[..room]);
            part = &part[room..];
            if self.text.len() >= self.piece {
                self.encode(false)?;
            }
        }
        Ok(())
    }

    /// At least as many tokens as were needed, or all.
    pub fn finish(mut self) -> Result<Vec<u32>> {
        if self.ids.len() < self.needed {
            self.encode(true)?;
            self.ids.append(&mut self.after);
        }
        Ok(self.ids)
    }

    /// Takes the tokens of `text`, except those that the next piece sees too.
    fn encode(&mut self, last: bool) -> Result<()> {
        let mut tokens = self.tokenizer.encode_with_starts(&self.text)?;
        let pending = std::mem::take(&mut self.pending);
        let (kept, from) = meeting(&pending, &tokens, self.overlap / 2);
        self.ids.extend(pending[..kept].iter().map(|(id, _)| id));
        tokens.drain(..from);
        let shared = match last {
            true => self.text.len(),
            false => char_boundary(&self.text, self.text.len() - self.overlap),
        };
        let taken = if last { tokens.len() } else { tokens.partition_point(|(_, start)| *start < shared) };
        self.ids.extend(tokens[..taken].iter().map(|(id, _)| id));
        self.pending = tokens[taken..].iter().map(|(id, start)| (*id, start - shared)).collect();
        self.text.drain(..shared);
        Ok(())
    }
}

/// How many of the pending tokens come before the place nearest to `middle` where a token of both lists begins,
/// and how many of the new ones. All of the pending ones and nothing of the text they cover, where none does.
fn meeting(pending: &[(u32, usize)], tokens: &[(u32, usize)], middle: usize) -> (usize, usize) {
    let begins = |tokens: &[(u32, usize)], i: usize| i == 0 || tokens[i - 1].1 < tokens[i].1;
    let mut nearest: Option<(usize, usize, usize)> = None;
    for (i, (_, start)) in pending.iter().enumerate().filter(|(i, _)| begins(pending, *i)) {
        let j = tokens.partition_point(|(_, other)| other < start);
        let distance = start.abs_diff(middle);
        let is_nearer = nearest.is_none_or(|(nearest, ..)| distance < nearest);
        if tokens.get(j).is_some_and(|(_, other)| other == start) && is_nearer {
            nearest = Some((distance, i, j));
        }
    }
    match (nearest, pending.last()) {
        (Some((_, kept, from)), _) => (kept, from),
        (None, Some((_, end))) => (pending.len(), tokens.partition_point(|(_, start)| start <= end)),
        (None, None) => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_text::testing;

    /// Tokens of the text, given in parts and encoded in small pieces.
    fn in_pieces(tokenizer: &Tokenizer, text: &str, part: usize, piece: usize) -> Vec<u32> {
        let mut beginning = Beginning::with_pieces(tokenizer, usize::MAX, piece, piece / 4).unwrap();
        let mut rest = text;
        while !rest.is_empty() {
            let (next, after) = rest.split_at(char_boundary(rest, part));
            beginning.push(next).unwrap();
            rest = after;
        }
        beginning.finish().unwrap()
    }

    #[test]
    fn pieces_give_the_tokens_of_the_whole_text() {
        let text = "a b bbb é€ b\n a\u{1F600}   b<|end|>a ".repeat(300);
        for tokenizer in [testing::bytes(), testing::byte_fallback()] {
            let whole = tokenizer.encode(&text, true).unwrap();
            for (part, piece) in [(1, 64), (7, 200), (1000, 64), (100_000, 4096), (3, 100_000)] {
                assert!(in_pieces(&tokenizer, &text, part, piece) == whole, "{part}, {piece}");
            }
        }
    }

    #[test]
    fn no_more_is_encoded_than_needed() {
        let tokenizer = testing::bytes();
        let mut beginning = Beginning::with_pieces(&tokenizer, 100, 64, 16).unwrap();
        (0..1000).for_each(|_| beginning.push("a text of ten words that says nothing at all\n").unwrap());
        let ids = beginning.finish().unwrap();
        assert!((100..200).contains(&ids.len()), "{}", ids.len());
    }

    #[test]
    #[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
    fn real_tokenizers_give_the_tokens_of_the_whole_text_too() {
        let shared =
            std::env::var_os("GPTQ_SHARED").map(std::path::PathBuf::from).expect("GPTQ_SHARED is not set");
        let data = crate::DatasetRoots { datasets: Some(shared.join("data")), ..Default::default() };
        let text = crate::dataset::load(&"wikitext2:test".parse().unwrap(), &data).unwrap();
        let text = text.join(crate::Join::Raw).unwrap();
        let text = &text[..char_boundary(&text, 400_000)];
        for model in ["models/wiki20m", "models/demo4m"] {
            let tokenizer = Tokenizer::load(&shared.join(model)).unwrap();
            let whole = tokenizer.encode(text, true).unwrap();
            assert!(in_pieces(&tokenizer, text, 1000, 20_000) == whole, "{model}");
        }
    }
}
