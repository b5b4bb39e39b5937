//! Text to token ids and back, by the model's own tokenizer.json.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gptq_input::guard::{apart, quietly};
use gptq_input::short_line;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::text_stream::TextStream;
use crate::tokenizer_config::{self, TokenizerConfig};

/// A normalizer may shorten a text, and an unknown token may stand for a whole word.
const LEAST_LONGEST: usize = 64;

/// Bytes of a tokenizer.json at most. The largest of known models have 35 MB.
pub(crate) const MOST_BYTES: u64 = 96 << 20;

/// The library recurses over what a file nests.
const STACK: usize = 64 << 20;

/// The largest files take some seconds.
const DEADLINE: Duration = Duration::from_secs(120);

/// A tokenizer; a clone shares its tables.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    longest_token: usize,
    special: HashSet<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl Shared {
    fn new(json: &[u8], config: &TokenizerConfig) -> Result<Self, String> {
        growth(json)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(one_line)?;
        // Settings left from training would cut or pad the text without a word.
        inner.with_truncation(None).map_err(one_line)?;
        inner.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        let vocab = inner.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |id| *id as usize + 1);
        let longest_token = vocab.keys().map(String::len).max().unwrap_or(0).max(LEAST_LONGEST);
        let (bos_token, eos_token) =
            (config.bos_token().map(str::to_owned), config.eos_token().map(str::to_owned));
        Ok(Self { inner, vocab_size, longest_token, special, bos_token, eos_token })
    }
}

impl Tokenizer {
    /// Reads tokenizer.json, and tokenizer_config.json where there is one, from a model's folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let json = match gptq_input::read(&path, MOST_BYTES) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Err(missing(folder, cause)),
            read => read.map_err(Error::io(&path))?,
        };
        Self::new(json, &path.display().to_string(), TokenizerConfig::load(folder)?)
    }

    /// The same from the files' contents.
    pub fn from_bytes(tokenizer_json: &[u8], tokenizer_config_json: Option<&[u8]>) -> Result<Self> {
        let config = match tokenizer_config_json {
            Some(json) => TokenizerConfig::parse(json, tokenizer_config::FILE_NAME)?,
            None => TokenizerConfig::default(),
        };
        Self::new(tokenizer_json.to_vec(), "tokenizer.json", config)
    }

    /// Reads the file apart: the library panics on some that are damaged.
    fn new(json: Vec<u8>, at: &str, config: TokenizerConfig) -> Result<Self> {
        let shared = apart(STACK, DEADLINE, move || Shared::new(&json, &config)).and_then(|shared| shared);
        shared
            .map(|shared| Self { shared: Arc::new(shared) })
            .map_err(|problem| Error::malformed(at, problem))
    }

    /// Encodes the whole text in one call. `add_special` adds what the model expects around a text (such as
    /// `<s>` in front); a rendered chat template has brought these itself. Special tokens spelled out in the
    /// text become their ids either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded("encode the text", || self.shared.inner.encode_fast(text, add_special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of the whole text and the characters that each covers; `add_special` as for [`Self::encode`].
    pub fn encode_with_ranges(&self, text: &str, add_special: bool) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding =
            guarded("encode the text", || self.shared.inner.encode_char_offsets(text, add_special))?;
        let ranges = encoding.get_offsets().iter().map(|(start, end)| *start..*end).collect();
        Ok((encoding.get_ids().to_vec(), ranges))
    }

    /// Ids of a text without what belongs around one, and the byte at which each begins, in rising order.
    pub fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = guarded("encode the text", || self.shared.inner.encode(text, false))?;
        Ok(encoding
            .get_ids()
            .iter()
            .copied()
            .zip(encoding.get_offsets().iter().map(|(start, _)| *start))
            .collect())
    }

    /// The ids that the model expects before and after a text.
    pub fn frame(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let (bare, framed) = (self.encode("a", false)?, self.encode("a", true)?);
        let text = framed.windows(bare.len().max(1)).position(|ids| ids == bare).unwrap_or_default();
        let after = framed.get(text + bare.len()..).unwrap_or_default();
        Ok((framed[..text].to_vec(), after.to_vec()))
    }

    /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary have no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded("decode the ids", || self.shared.inner.decode(ids, skip_special))
    }

    /// An incremental decoder for generated ids.
    pub fn stream(&self, skip_special: bool) -> TextStream {
        TextStream::new(self.clone(), skip_special)
    }

    /// The highest id plus one, added tokens included: an embedding needs at least this many rows.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// Bytes of text that the longest token covers, or somewhat more: a byte may be spelled as two.
    pub fn longest_token(&self) -> usize {
        self.shared.longest_token
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// Whether `skip_special` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.contains(&id)
    }

    /// The id of tokenizer_config.json's `bos_token`.
    pub fn bos_id(&self) -> Option<u32> {
        self.token_id(self.shared.bos_token.as_deref()?)
    }

    /// The id of tokenizer_config.json's `eos_token`.
    pub fn eos_id(&self) -> Option<u32> {
        self.token_id(self.shared.eos_token.as_deref()?)
    }
}

/// What a folder without tokenizer.json has instead, and how to make one of it.
fn missing(folder: &Path, cause: io::Error) -> Error {
    let path = folder.join("tokenizer.json");
    let others = ["tokenizer.model", "spiece.model", "vocab.json"];
    match others.into_iter().find(|name| folder.join(name).exists()) {
        Some(name) => Error::malformed(
            path.display(),
            format!(
                "expected the file, got {name} only, which this program does not read; convert it once: \
                 AutoTokenizer.from_pretrained(folder).save_pretrained(folder) in transformers writes tokenizer.json"
            ),
        ),
        None => Error::io(&path)(cause),
    }
}

/// What the library does, where a panic of its own is an error too.
fn guarded<T>(action: &'static str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let result = quietly(work).and_then(|result| result.map_err(one_line));
    result.map_err(|cause| Error::Tokenizer { action, cause })
}

fn one_line(cause: impl Display) -> String {
    short_line(&cause.to_string())
}

/// Refuses what makes more of a text than any tokenizer needs to: replacements, one behind the other, and tokens
/// around it.
fn growth(json: &[u8]) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Parts {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        pre_tokenizer: Value,
        #[serde(default)]
        decoder: Value,
        #[serde(default)]
        post_processor: Value,
    }

    const MOST_GROWTH: usize = 4096;
    const MOST_VALUES: usize = 4096;
    // What is no JSON is the library's to name.
    let Ok(parts) = serde_json::from_slice::<Parts>(json) else { return Ok(()) };
    for (name, part) in [
        ("normalizer", &parts.normalizer),
        ("pre_tokenizer", &parts.pre_tokenizer),
        ("decoder", &parts.decoder),
        ("post_processor", &parts.post_processor),
    ] {
        let (mut values, mut growth) = (0usize, 1usize);
        let mut open = vec![part];
        while let Some(value) = open.pop() {
            values += 1;
            match value {
                Value::Array(items) => open.extend(items),
                Value::Object(fields) => {
                    open.extend(fields.values());
                    let texts = ["content", "prepend"].map(|key| fields.get(key).and_then(Value::as_str));
                    let longest = texts.iter().flatten().map(|text| text.len()).max().unwrap_or(1);
                    growth = growth.saturating_mul(longest.max(1));
                }
                _ => {}
            }
        }
        if values > MOST_VALUES {
            return Err(format!("{name}: expected at most {MOST_VALUES} values, got {values}"));
        }
        if growth > MOST_GROWTH {
            return Err(format!(
                "{name}: expected a text to grow {MOST_GROWTH} times at most, got {growth} times"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing;

    #[test]
    fn text_survives_the_round_trip_and_special_tokens_are_recognised() {
        let tokenizer = testing::bytes();
        let text = "a \n\t€ \u{1F600}<|end|>é";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids.len(), text.len() - "<|end|>".len() + 1, "one id a byte");
        assert_eq!(ids[0], 64);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text.replace("<|end|>", ""));
    }

    #[test]
    fn the_vocabulary_is_known_with_its_special_tokens() {
        let tokenizer = testing::bytes();
        assert_eq!(tokenizer.vocab_size(), 257);
        assert_eq!(tokenizer.token_id("<|end|>"), Some(256));
        assert_eq!(tokenizer.token_id("ab"), None);
        assert!(tokenizer.is_special(256) && !tokenizer.is_special(64) && !tokenizer.is_special(9999));
        assert_eq!((tokenizer.eos_id(), tokenizer.bos_id()), (Some(256), None));
        assert_eq!(testing::byte_fallback().bos_id(), Some(1));
    }

    #[test]
    fn truncation_and_padding_left_in_the_file_are_ignored() {
        let tokenizer = testing::byte_fallback();
        assert_eq!(tokenizer.encode("b", false).unwrap(), [4]);
        assert_eq!(tokenizer.encode("bbbbbbbbbb", false).unwrap(), [4, 5, 5, 5, 5, 5, 5, 5, 5, 5]);
    }

    #[test]
    fn the_texts_frame_is_added_on_request_only() {
        let tokenizer = testing::byte_fallback();
        assert_eq!(tokenizer.encode("b", true).unwrap(), [1, 4]);
        assert_eq!(tokenizer.encode("b", false).unwrap(), [4]);
        assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
        assert_eq!(tokenizer.frame().unwrap(), (vec![1], vec![]));
        assert_eq!(testing::bytes().frame().unwrap(), (vec![], vec![]));
    }

    #[test]
    fn ids_out_of_the_vocabulary_have_no_text() {
        assert_eq!(testing::bytes().decode(&[64, 9999, 65], false).unwrap(), "ab");
    }

    #[test]
    fn files_that_break_the_library_are_refused_and_nothing_is_printed() {
        let with = |part: &str, value: &str| {
            format!(
                r#"{{"version":"1.0","added_tokens":[],"{part}":{value},
                "model":{{"type":"WordLevel","vocab":{{"a":0}},"unk_token":"a"}}}}"#
            )
        };
        let replace = r#"{"type":"Replace","pattern":{"String":"a"},"content":"aaaaaaaa"}"#;
        let many = format!(r#"{{"type":"Sequence","normalizers":[{}]}}"#, [replace; 20].join(","));
        let around = format!(
            r#"{{"type":"TemplateProcessing","single":[{}],"pair":[],"special_tokens":{{"a":{{"id":"a","ids":[0],"tokens":["a"]}}}}}}"#,
            vec![r#"{"SpecialToken":{"id":"a","type_id":0}}"#; 100_000].join(",")
        );
        let deep =
            format!("{}null{}", r#"{"type":"Sequence","normalizers":["#.repeat(50_000), "]}".repeat(50_000));
        for json in [
            with("normalizer", &many),
            with("post_processor", &around),
            with("normalizer", &deep),
            with("normalizer", r#"{"type":"Precompiled","precompiled_charsmap":"AAAA"}"#),
            with("decoder", r#"{"type":"Strip","content":"ab","start":0,"stop":0}"#),
            "[".repeat(200_000),
        ] {
            let Err(error) = Tokenizer::from_bytes(json.as_bytes(), None) else { panic!("{json:.300}") };
            let error = error.to_string();
            assert!(error.starts_with("tokenizer.json: ") && error.len() < 500, "{error}");
        }
    }

    #[test]
    fn malformed_files_are_named() {
        let message = |result: Result<Tokenizer>| result.err().unwrap().to_string();
        assert!(message(Tokenizer::from_bytes(b"{}", None)).starts_with("tokenizer.json: "));
        let folder = tempfile::tempdir().unwrap();
        assert!(message(Tokenizer::load(folder.path())).contains("tokenizer.json: No such file"));
        fs::write(folder.path().join("tokenizer.model"), "").unwrap();
        let sentence_piece = message(Tokenizer::load(folder.path()));
        assert!(
            sentence_piece.contains("tokenizer.model only") && sentence_piece.contains("save_pretrained")
        );
        fs::write(folder.path().join("tokenizer.json"), "[").unwrap();
        assert!(message(Tokenizer::load(folder.path())).contains("/tokenizer.json: "));
    }
}
