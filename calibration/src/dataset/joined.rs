//! Rows made into one text, piece by piece.

use super::rows::Piece;

/// How rows become one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// Rows joined with a blank line (`"\n\n"`): the perplexity protocol of the GPTQ paper.
    Paper,
    /// Rows as they are, one after the other, an empty row becoming `" \n"`: the calibration text of
    /// published checkpoints. It relies on rows that bring their own line end, as those of WikiText do.
    Raw,
    /// As [`Join::Raw`], with a line end between a row that brings none and the next one.
    Lines,
}

impl Join {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper",
            Self::Raw => "raw",
            Self::Lines => "lines",
        }
    }
}

/// What an empty row becomes, except in [`Join::Paper`].
const EMPTY_ROW: &str = " \n";

/// Joins the rows that it gets.
pub(crate) struct Joiner {
    join: Join,
    begun: bool,
    ends_line: bool,
    line_ends_added: bool,
    any_text: bool,
    fingerprint: u64,
}

impl Joiner {
    pub fn new(join: Join) -> Self {
        const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        let (begun, ends_line, line_ends_added, any_text) = (false, false, false, false);
        Self { join, begun, ends_line, line_ends_added, any_text, fingerprint: OFFSET_BASIS }
    }

    /// What the piece adds to the text: a separator and a text, both perhaps empty.
    pub fn push<'a>(&mut self, piece: Piece<'a>) -> [&'a str; 2] {
        let between = self.begun && piece.begins_row;
        let is_empty_row = piece.begins_row && piece.text.is_empty();
        let raw = if is_empty_row { EMPTY_ROW } else { piece.text };
        let added = match self.join {
            Join::Paper => [if between { "\n\n" } else { "" }, piece.text],
            Join::Raw => ["", raw],
            Join::Lines if between && !self.ends_line => {
                self.line_ends_added = true;
                ["\n", raw]
            }
            Join::Lines => ["", raw],
        };
        self.hash(raw);
        self.begun = true;
        self.any_text |= !piece.text.is_empty();
        self.ends_line = raw.ends_with('\n');
        added
    }

    fn hash(&mut self, raw: &str) {
        const PRIME: u64 = 0x0100_0000_01b3;
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(PRIME);
        self.fingerprint = raw.bytes().fold(self.fingerprint, step);
    }

    /// Whether any row had text.
    pub fn has_text(&self) -> bool {
        self.any_text
    }

    /// FNV-1a (64 bits, 16 hexadecimal digits) of the [`Join::Raw`] text so far: equal for equal texts,
    /// whatever their name, file or join. Not meant against forgery.
    pub fn fingerprint(&self) -> String {
        format!("{:016x}", self.fingerprint)
    }

    /// What the join came to: [`Join::Lines`] is [`Join::Raw`] where every row brought its own line end.
    pub fn join(&self) -> Join {
        match self.join {
            Join::Lines if !self.line_ends_added => Join::Raw,
            join => join,
        }
    }
}
