//! Results on stdout. `println!` would panic where the reader is gone; these return the error, and `main` ends
//! quietly on a closed pipe.

use std::fmt::Arguments;
use std::io::{Result, Write};

use serde::Serialize;

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
