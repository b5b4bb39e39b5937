//! From a data set to windows of tokens, in memory that does not follow the text's length.
//!
//! A text of up to [`WHOLE`] bytes, as WikiText is, is encoded in one call, and windows are cut from its tokens
//! ([`sample`], [`windows`]). Of a longer one only what the windows need is encoded:
//!
//! - windows that follow one another from the start need its beginning, encoded in pieces that overlap
//!   ([`Beginning`]);
//! - random windows are cut from chunks of the text, and these are drawn before anything is encoded ([`Chunks`]).

mod beginning;
mod chunks;

use self::beginning::Beginning;
use self::chunks::Chunks;
use crate::dataset::{Dataset, Join};
use crate::error::Result;
use crate::sampling::{SampleRequest, Sampling, check_not_zero, sample, windows};
use gptq_text::Tokenizer;

/// Bytes of a text that is encoded in one call.
const WHOLE: usize = 16 << 20;

/// Windows of a data set, and what its text was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    pub ids: Vec<Vec<u32>>,
    /// Hash of the rows, to tell that two texts are the same whatever their name.
    pub fingerprint: String,
    /// How rows were joined: [`Join::Raw`] also where [`Join::Lines`] had nothing to add.
    pub join: Join,
}

impl Dataset {
    /// Windows for calibration, of the rows joined, with what the tokenizer puts around a text.
    ///
    /// # Errors
    /// As reading the files, encoding, and [`sample`] do.
    pub fn sample(&self, tokenizer: &Tokenizer, join: Join, request: &SampleRequest) -> Result<Sequences> {
        check_not_zero("the number of samples", request.samples)?;
        check_not_zero("the sequence length", request.seq_len)?;
        self.sequences(tokenizer, join, Want::Sample(*request), WHOLE)
    }

    /// Consecutive windows of `ctx` tokens from the start, at most `max` of them.
    ///
    /// # Errors
    /// As reading the files, encoding, and [`windows`] do.
    pub fn windows(
        &self,
        tokenizer: &Tokenizer,
        join: Join,
        ctx: usize,
        max: Option<usize>,
    ) -> Result<Sequences> {
        check_not_zero("the context length", ctx)?;
        check_not_zero("the number of windows", max.unwrap_or(usize::MAX))?;
        self.sequences(tokenizer, join, Want::Windows { ctx, max }, WHOLE)
    }

    /// The text is read once, to its end, for its fingerprint and for malformed rows.
    fn sequences(&self, tokenizer: &Tokenizer, join: Join, want: Want, whole: usize) -> Result<Sequences> {
        let mut text = Text::Whole(String::new());
        let joined = self.visit_text(join, &mut |part| {
            if let Text::Whole(so_far) = &mut text {
                if so_far.len() + part.len() <= whole {
                    so_far.push_str(part);
                    return Ok(());
                }
                let so_far = std::mem::take(so_far);
                text = want.long_text(tokenizer)?;
                text.push(&so_far)?;
            }
            text.push(part)
        })?;
        let ids = match text {
            Text::Whole(text) => want.cut(&tokenizer.encode(&text, true)?),
            Text::Beginning(beginning) => want.cut(&beginning.finish()?),
            Text::Chunks(chunks) => chunks.sample(tokenizer),
        }?;
        Ok(Sequences { ids, fingerprint: joined.fingerprint(), join: joined.join() })
    }
}

#[derive(Clone, Copy)]
enum Want {
    Sample(SampleRequest),
    Windows { ctx: usize, max: Option<usize> },
}

impl Want {
    fn long_text(self, tokenizer: &Tokenizer) -> Result<Text<'_>> {
        let tokens = match self {
            Self::Sample(request) if request.sampling == Sampling::Random => {
                return Ok(Text::Chunks(Box::new(Chunks::new(request))));
            }
            Self::Sample(request) => request.samples.saturating_mul(request.seq_len),
            Self::Windows { ctx, max } => max.map_or(usize::MAX, |max| max.saturating_mul(ctx)),
        };
        Ok(Text::Beginning(Beginning::new(tokenizer, tokens)?))
    }

    fn cut(self, tokens: &[u32]) -> Result<Vec<Vec<u32>>> {
        match self {
            Self::Sample(request) => sample(tokens, &request),
            Self::Windows { ctx, max } => {
                Ok(windows(tokens, ctx, max)?.into_iter().map(<[u32]>::to_vec).collect())
            }
        }
    }
}

/// What is kept of a text while it is read.
enum Text<'a> {
    Whole(String),
    Beginning(Beginning<'a>),
    Chunks(Box<Chunks>),
}

impl Text<'_> {
    fn push(&mut self, part: &str) -> Result<()> {
        match self {
            Self::Whole(text) => text.push_str(part),
            Self::Beginning(beginning) => beginning.push(part)?,
            Self::Chunks(chunks) => chunks.push(part),
        }
        Ok(())
    }
}

/// The first place at or after `at` where a character begins or the text ends.
fn char_boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_text::testing;

    fn dataset() -> Dataset {
        Dataset::from_rows("rows", (0..5000).map(|i| format!("Row {i} is é {}.", i * 7919)).collect())
    }

    fn request(sampling: Sampling) -> SampleRequest {
        SampleRequest { samples: 40, seq_len: 50, sampling, seed: 3 }
    }

    #[test]
    fn windows_of_a_short_text_are_cut_from_its_tokens_encoded_in_one_call() {
        let (dataset, tokenizer) = (dataset(), testing::byte_fallback());
        let tokens = tokenizer.encode(&dataset.join(Join::Lines).unwrap(), true).unwrap();
        for sampling in [Sampling::Consecutive, Sampling::Random] {
            let sampled = dataset.sample(&tokenizer, Join::Lines, &request(sampling)).unwrap();
            assert_eq!(sampled.ids, sample(&tokens, &request(sampling)).unwrap());
            assert_eq!(sampled.join, Join::Lines);
        }
        let evaluated = dataset.windows(&tokenizer, Join::Lines, 64, None).unwrap();
        assert_eq!(evaluated.ids, windows(&tokens, 64, None).unwrap());
    }

    #[test]
    fn consecutive_windows_of_a_long_text_are_those_of_the_whole() {
        let (dataset, tokenizer) = (dataset(), testing::byte_fallback());
        let want = Want::Sample(request(Sampling::Consecutive));
        let short = dataset.sequences(&tokenizer, Join::Paper, want, WHOLE).unwrap();
        for whole in [0, 1, 1000, 100_000] {
            assert_eq!(dataset.sequences(&tokenizer, Join::Paper, want, whole).unwrap(), short);
        }
        let want = Want::Windows { ctx: 64, max: None };
        let all = dataset.sequences(&tokenizer, Join::Paper, want, WHOLE).unwrap();
        assert_eq!(dataset.sequences(&tokenizer, Join::Paper, want, 1).unwrap(), all);
    }

    #[test]
    fn random_windows_of_a_long_text_are_pieces_of_it_and_the_same_for_a_seed() {
        let (dataset, tokenizer) = (dataset(), testing::bytes());
        let text = dataset.join(Join::Lines).unwrap();
        let drawn = |seed| {
            let want = Want::Sample(SampleRequest { seed, ..request(Sampling::Random) });
            dataset.sequences(&tokenizer, Join::Lines, want, 1000).unwrap()
        };
        let first = drawn(0);
        assert_eq!((first.ids.len(), first.ids[0].len()), (40, 50));
        let as_tokens = tokenizer.encode(&text, false).unwrap();
        for window in &first.ids {
            assert!(as_tokens.windows(50).any(|at| at == window));
        }
        assert_eq!(first, drawn(0));
        assert_ne!(first.ids, drawn(1).ids);
    }

    #[test]
    #[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
    fn a_real_tokenizer_encodes_a_real_text_in_one_call() {
        let shared = std::env::var_os("GPTQ_SHARED").expect("GPTQ_SHARED is not set");
        let shared = std::path::Path::new(&shared);
        let roots =
            crate::DatasetRoots { datasets: Some(shared.join("data")), ..crate::DatasetRoots::default() };
        let text = crate::dataset::load(&"wikitext2:validation".parse().unwrap(), &roots)
            .unwrap()
            .join(Join::Raw)
            .unwrap();
        let tokenizer = Tokenizer::load(&shared.join("models/wiki20m")).unwrap();
        let start = std::time::Instant::now();
        let ids = tokenizer.encode(&text, false).unwrap();
        eprintln!("{} bytes, {} tokens in {:.2?}", text.len(), ids.len(), start.elapsed());
        assert!(ids.len() >= 64 * 1024);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
}
