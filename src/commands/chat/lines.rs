//! The user's lines: from a terminal with editing and history, from anything else as they are.

use std::io::{BufRead, IsTerminal, stdin};

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Where the lines come from.
pub enum Lines {
    /// The history ends with the program: conversations are private.
    Terminal(Box<DefaultEditor>),
    Pipe,
}

/// What was read.
pub enum Line {
    Text(String),
    /// Ctrl-C where a line was awaited.
    Interrupted,
    End,
}

impl Lines {
    pub fn open() -> Result<Self> {
        match stdin().is_terminal() {
            true => Ok(Self::Terminal(Box::new(DefaultEditor::new().context("the terminal")?))),
            false => Ok(Self::Pipe),
        }
    }

    pub fn next(&mut self) -> Result<Line> {
        match self {
            Self::Terminal(editor) => edited(editor),
            Self::Pipe => piped(),
        }
    }
}

fn edited(editor: &mut DefaultEditor) -> Result<Line> {
    match editor.readline("> ") {
        Ok(line) => {
            if !line.trim().is_empty() {
                editor.add_history_entry(&line).context("the terminal")?;
            }
            Ok(Line::Text(line))
        }
        Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
        Err(ReadlineError::Eof) => Ok(Line::End),
        Err(error) => Err(error).context("the terminal"),
    }
}

fn piped() -> Result<Line> {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if stdin().lock().read_until(b'\n', &mut bytes).context("standard input")? == 0 {
            return Ok(Line::End);
        }
        match std::str::from_utf8(&bytes) {
            Ok(line) => return Ok(Line::Text(line.to_owned())),
            Err(_) => note!("the line is not UTF-8: it is left out"),
        }
    }
}
