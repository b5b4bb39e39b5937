//! Random windows of a long text.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;

use super::char_boundary;
use crate::error::{Error, Result};
use crate::sampling::{SampleRequest, distinct_offsets, uniform_below};
use gptq_text::Tokenizer;

/// Bytes of a chunk for each token of a window: enough for a few windows of any natural language.
const BYTES_PER_TOKEN: usize = 16;

/// Random chunks of a text that arrives in parts. The text is cut at the first line end after `16 * seq_len` bytes,
/// or, where a line is longer than that, after twice as many bytes. As many chunks as there are samples are drawn,
/// each with the same chance, without knowing how many will come (Vitter's algorithm R, with the random integers
/// of [`Sampling::Random`](crate::Sampling::Random)). Each then gives a window at a random place among its tokens. Where
/// chunks are fewer than samples, or too short for a window, others give several, at distinct places, in turn.
/// No window leaves its chunk.
pub(super) struct Chunks {
    request: SampleRequest,
    rng: ChaCha20Rng,
    least: usize,
    current: String,
    seen: u64,
    drawn: Vec<String>,
}

impl Chunks {
    pub fn new(request: SampleRequest) -> Self {
        let least = request.seq_len.saturating_mul(BYTES_PER_TOKEN).min(1 << 40);
        let rng = ChaCha20Rng::seed_from_u64(request.seed);
        Self { request, rng, least, current: String::new(), seen: 0, drawn: Vec::new() }
    }

    pub fn push(&mut self, part: &str) {
        // A row of any length is taken in steps, so that cutting it costs no more than reading it.
        let mut rest = part;
        while !rest.is_empty() {
            let (step, after) = rest.split_at(char_boundary(rest, self.least));
            self.current.push_str(step);
            while let Some(end) = self.cut() {
                let after = self.current.split_off(end);
                let chunk = std::mem::replace(&mut self.current, after);
                self.offer(chunk);
            }
            rest = after;
        }
    }

    /// Where the current chunk ends; `None` while that cannot be known.
    fn cut(&self) -> Option<usize> {
        let most = self.least.saturating_mul(2);
        let bytes = self.current.as_bytes();
        let after = bytes.get(self.least - 1..)?;
        match after.iter().take(most - self.least + 1).position(|byte| *byte == b'\n') {
            Some(line_end) => Some(self.least + line_end),
            // A character ends at most three bytes later.
            None if bytes.len() > most + 3 => Some(char_boundary(&self.current, most)),
            None => None,
        }
    }

    fn offer(&mut self, chunk: String) {
        self.seen += 1;
        if self.drawn.len() < self.request.samples {
            return self.drawn.push(chunk);
        }
        let place = uniform_below(&mut self.rng, self.seen);
        if let Some(drawn) = self.drawn.get_mut(place as usize) {
            *drawn = chunk;
        }
    }

    /// # Errors
    /// [`Error::TextTooShort`] when the drawn chunks have fewer distinct windows than were asked for.
    pub fn sample(mut self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
        let rest = std::mem::take(&mut self.current);
        if !rest.is_empty() {
            self.offer(rest);
        }
        let SampleRequest { samples, seq_len, .. } = self.request;
        let encode = |chunk: String| tokenizer.encode(&chunk, false);
        let chunks =
            std::mem::take(&mut self.drawn).into_iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        let fits: Vec<usize> = chunks.iter().map(|ids| (ids.len() + 1).saturating_sub(seq_len)).collect();
        let fit = fits.iter().sum();
        if samples > fit {
            let tokens = chunks.iter().map(Vec::len).sum();
            return Err(Error::TextTooShort { asked: samples, fit, seq_len, tokens });
        }
        let mut sequences = Vec::new();
        for ((ids, fit), count) in chunks.iter().zip(&fits).zip(shares(&fits, samples)) {
            let offsets = distinct_offsets(*fit, count, &mut self.rng);
            sequences.extend(offsets.into_iter().map(|offset| ids[offset..offset + seq_len].to_vec()));
        }
        Ok(sequences)
    }
}

/// `samples` dealt out in turn, to each at most what it can take; together they can take as many.
fn shares(fits: &[usize], samples: usize) -> Vec<usize> {
    let mut shares = vec![0; fits.len()];
    let mut left = samples;
    while left > 0 {
        for (share, fit) in shares.iter_mut().zip(fits) {
            if left > 0 && *share < *fit {
                *share += 1;
                left -= 1;
            }
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Sampling;
    use gptq_text::testing;

    fn chunks(samples: usize, seq_len: usize, parts: &[&str]) -> Chunks {
        let mut chunks = Chunks::new(SampleRequest { samples, seq_len, sampling: Sampling::Random, seed: 0 });
        parts.iter().for_each(|part| chunks.push(part));
        chunks
    }

    #[test]
    fn chunks_end_with_lines_and_together_are_the_text() {
        let text: String =
            (0..400).map(|i| format!("line {}\n", i * i)).collect::<String>() + &"é".repeat(500);
        let whole = chunks(10_000, 2, &[&text]);
        assert_eq!(whole.drawn.concat() + &whole.current, text);
        let (lines, long): (Vec<_>, Vec<_>) = whole.drawn.iter().partition(|chunk| chunk.ends_with('\n'));
        assert!(lines.len() > 50 && lines.iter().all(|chunk| (32..64).contains(&chunk.len())));
        assert!(long.len() > 10 && long.iter().all(|chunk| chunk.len() == 64), "a line without an end");
        // Where the parts of the text end does not matter.
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(chunks(10_000, 2, &letters).drawn, whole.drawn);
    }

    #[test]
    fn chunks_are_drawn_evenly_and_give_a_window_each() {
        let text: String = (0..1000).map(|i| format!("{i:04} {}\n", "x".repeat(26))).collect();
        let mut halves = [0, 0];
        for seed in 0..50 {
            let mut chunks =
                Chunks::new(SampleRequest { samples: 20, seq_len: 2, sampling: Sampling::Random, seed });
            chunks.push(&text);
            assert_eq!((chunks.seen, chunks.drawn.len()), (1000, 20));
            for chunk in &chunks.drawn {
                halves[chunk[..4].parse::<usize>().unwrap() / 500] += 1;
            }
            assert_eq!(chunks.sample(&testing::bytes()).unwrap().len(), 20);
        }
        // 1000 draws: mean 500, standard deviation 16; five of them on either side.
        assert!((420..=580).contains(&halves[0]), "{halves:?}");
    }

    #[test]
    fn few_chunks_give_several_windows_at_distinct_places() {
        let text: String = ('a'..='z').chain('A'..='Z').chain('0'..='9').collect();
        let windows = chunks(60, 3, &[&text]).sample(&testing::bytes()).unwrap();
        let mut starts: Vec<u32> = windows.iter().map(|window| window[0]).collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), 60);
        let error = chunks(61, 3, &[&text]).sample(&testing::bytes()).unwrap_err().to_string();
        assert!(error.contains("61 distinct windows") && error.contains("60 fit in 62 tokens"), "{error}");
    }

    #[test]
    fn shares_go_to_chunks_that_can_take_more() {
        assert_eq!(shares(&[1, 0, 5], 4), [1, 0, 3]);
        assert_eq!(shares(&[2, 2], 4), [2, 2]);
        assert_eq!(shares(&[], 0), [0usize; 0]);
    }
}
