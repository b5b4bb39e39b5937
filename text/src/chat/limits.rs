//! What a template may use up. A template comes with a model, and a model from anywhere: it is an untrusted program.
//! One that goes beyond these limits is an error of the prompt that was asked for, and nothing else.
//!
//! - **Size**: a source has at most [`SOURCE_BYTES`], a tag at most [`TAG_TOKENS`] (`source::check`).
//! - **Steps**: the engine's fuel, [`fuel`].
//! - **Bytes**: every operation that makes or goes through texts and lists pays for them ([`charge`]) from one account.
//!   So whatever is kept cannot be larger than what was paid for. Operators are the engine's own: `operators` writes
//!   them as calls of ours before the engine sees the source.
//! - **Depth**: each level of a value takes a step to make, and [`stack`] has room for as many levels as there are
//!   steps: values are dropped and compared level by level.
//! - **Time**: [`DEADLINE`].

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use minijinja::Error;
use minijinja::value::{Value, ValueKind};

use super::python::{failed, pairs};

/// Eight times the largest templates that models have (20 to 30 KB).
pub(super) const SOURCE_BYTES: usize = 256 << 10;

/// Names, texts and symbols between the delimiters of a tag. The longest of known templates have some two hundred.
pub(super) const TAG_TOKENS: usize = 2000;

/// Text between tags is written in pieces of so many bytes, a step each.
pub(super) const PIECE_BYTES: usize = 128;

/// A prompt takes milliseconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(5);

const OUTPUT: &str = "output";
const BYTES: &str = "bytes made and read by its operations";
const TIME: &str = "time";

/// How large the conversation is that a template is given.
#[derive(Clone, Copy, Default)]
pub(super) struct Input {
    /// Values, those inside of others included.
    pub values: usize,
    /// Bytes of the texts among them.
    pub bytes: usize,
}

impl Input {
    pub fn add(&mut self, json: &serde_json::Value) {
        use serde_json::Value::{Array, Object, String};
        self.values += 1;
        match json {
            String(text) => self.bytes += text.len(),
            Array(items) => items.iter().for_each(|item| self.add(item)),
            Object(fields) => fields.iter().for_each(|(key, field)| {
                self.bytes += key.len();
                self.add(field);
            }),
            _ => {}
        }
    }
}

/// Steps of the engine: 200,000, and 500 for every value that it is given, two million at most.
pub(super) fn fuel(input: Input) -> u64 {
    (200_000 + 500 * input.values as u64).min(2_000_000)
}

/// Bytes of the stack that a template of so many steps is rendered on. Only what is used of it takes memory.
pub(super) fn stack(fuel: u64) -> usize {
    (64 << 20) + fuel as usize * 384
}

thread_local! {
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    static END: Cell<Option<Instant>> = const { Cell::new(None) };
    static BROKEN: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Gives this thread what a template may use up: 64 MB, and 64 times what it is given.
pub(super) fn begin(input: Input) {
    LEFT.set((64 << 20) + input.bytes.saturating_mul(64));
    END.set(Some(Instant::now() + DEADLINE));
    BROKEN.set(None);
}

/// The limit that was broken on this thread, whatever became of it later.
pub(super) fn broken() -> Option<String> {
    BROKEN.get().map(|limit| format!("it goes beyond the limit on {limit}"))
}

fn refuse(limit: &'static str) -> Error {
    BROKEN.set(Some(BROKEN.get().unwrap_or(limit)));
    LEFT.set(0);
    failed(format!("it goes beyond the limit on {limit}"))
}

/// Pays for an operation, before it is done where it may be large.
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    // Whatever is done takes something.
    match LEFT.get().checked_sub(bytes.saturating_add(8)) {
        Some(_) if END.get().is_some_and(|end| Instant::now() > end) => Err(refuse(TIME)),
        Some(left) => {
            LEFT.set(left);
            Ok(())
        }
        None => Err(refuse(BYTES)),
    }
}

/// Pays for going through a value, and all that it holds as often as it does.
pub(super) fn measure(value: &Value) -> Result<(), Error> {
    const OF_A_VALUE: usize = 32;
    let mut open = vec![value.clone()];
    while let Some(value) = open.pop() {
        match value.kind() {
            ValueKind::String => charge(value.as_str().map_or(0, str::len))?,
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    charge(OF_A_VALUE)?;
                    open.push(item);
                }
            }
            ValueKind::Map => {
                let pairs = pairs(&value);
                charge(OF_A_VALUE * pairs.len())?;
                open.extend(pairs.into_iter().flat_map(|(key, item)| [key, item]));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A text that ends where its bytes are not paid for any more.
#[derive(Default)]
pub(super) struct Paid(pub String);

impl std::fmt::Write for Paid {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        charge(text.len()).map_err(|_| std::fmt::Error)?;
        self.0.push_str(text);
        Ok(())
    }
}

/// The prompt, as far as it is not too long: 4 MB, and four times what the template is given.
pub(super) struct Prompt {
    text: Vec<u8>,
    most: usize,
}

impl Prompt {
    pub fn new(input: Input) -> Self {
        Self { text: Vec::new(), most: (4 << 20) + 4 * input.bytes }
    }

    pub fn into_text(self) -> String {
        // The engine writes texts only.
        String::from_utf8(self.text).unwrap_or_default()
    }
}

impl io::Write for Prompt {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.most {
            return Err(io::Error::other(refuse(OUTPUT).to_string()));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
