//! Results on stdout, notes on stderr. `println!` and `eprintln!` would panic where nothing can be written. A result that
//! cannot be written is an error, and `main` ends quietly on a closed pipe; a note that cannot be written is lost.

use std::fmt::Arguments;
use std::io::{Result, Write};

use serde::Serialize;

/// A line on stderr, formatted as `eprintln!` does.
macro_rules! note {
    ($($text:tt)*) => { $crate::output::note(format_args!($($text)*)) };
}

/// A line on stdout, formatted as `println!` does.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*)) };
}

/// A line on stderr. A failure to write it is ignored: the work goes on.
pub fn note(text: Arguments) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// An error and its sources, but those whose text the one before has already.
pub fn chain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in error.chain().map(ToString::to_string) {
        if !parts.last().is_some_and(|last| last.contains(&part)) {
            parts.push(part);
        }
    }
    parts.join(": ")
}

/// Text as it is.
pub fn text(text: Arguments) -> Result<()> {
    std::io::stdout().write_fmt(text)
}

/// Text and the end of the line.
pub fn line(text: Arguments) -> Result<()> {
    writeln!(std::io::stdout(), "{text}")
}

/// A value as indented JSON.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(format_args!("{}", serde_json::to_string_pretty(value)?))
}
