//! Texts that end a generation. They are looked for in all that is generated, special tokens spelled out, also where
//! those are not shown.

use std::ops::Range;

/// Lets text through up to the first stop string, and holds back what may become one.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The stop string belongs to the text that it ends.
    include: bool,
    held: String,
    /// Parts of `held` that are not shown.
    hidden: Vec<Range<usize>>,
}

impl StopStrings {
    /// Empty strings end nothing.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, ..Self::default() }
    }

    /// Whether the stop string stays in the text.
    pub fn include(mut self, include: bool) -> Self {
        self.include = include;
        self
    }

    /// The text that is safe to show, and whether a stop string has ended it; none does where they are not `armed`. A
    /// piece that is not `shown` counts for the search alone.
    pub fn push(&mut self, piece: &str, shown: bool, armed: bool) -> (String, bool) {
        if !shown && !piece.is_empty() {
            self.hidden.push(self.held.len()..self.held.len() + piece.len());
        }
        self.held.push_str(piece);
        if armed && let Some((start, stop)) = self.first() {
            let stop = if self.include { stop.to_owned() } else { String::new() };
            let text = self.release(start) + &stop;
            self.held.clear();
            self.hidden.clear();
            return (text, true);
        }
        (self.release(self.held.len() - self.unsure()), false)
    }

    /// What is still held, where nothing comes after it.
    pub fn finish(&mut self) -> String {
        self.release(self.held.len())
    }

    /// Where the first stop string begins.
    fn first(&self) -> Option<(usize, &str)> {
        let places =
            self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop.as_str())));
        places.min_by_key(|(start, _)| *start)
    }

    /// Bytes at the end that may become a stop string.
    fn unsure(&self) -> usize {
        let beginning = |stop: &String| {
            (1..stop.len()).rev().find(|n| stop.is_char_boundary(*n) && self.held.ends_with(&stop[..*n]))
        };
        self.stops.iter().filter_map(beginning).max().unwrap_or(0)
    }

    /// Takes the first bytes out, as far as they are shown.
    fn release(&mut self, end: usize) -> String {
        let (mut text, mut from) = (String::new(), 0);
        for hidden in &self.hidden {
            text += &self.held[from..hidden.start.clamp(from, end)];
            from = hidden.end.clamp(from, end);
        }
        text += &self.held[from..end];
        self.held.drain(..end);
        self.hidden.retain_mut(|hidden| {
            *hidden = hidden.start.saturating_sub(end)..hidden.end.saturating_sub(end);
            hidden.start < hidden.end
        });
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of these pieces, and after which one a stop string was found. `[x]` is not shown.
    fn fed(stops: &StopStrings, pieces: &[&str]) -> (String, Option<usize>) {
        let (mut stops, mut text) = (stops.clone(), String::new());
        for (i, piece) in pieces.iter().enumerate() {
            let hidden = piece.strip_prefix('[').and_then(|piece| piece.strip_suffix(']'));
            let (shown, stopped) = stops.push(hidden.unwrap_or(piece), hidden.is_none(), true);
            text += &shown;
            if stopped {
                return (text, Some(i));
            }
        }
        (text + &stops.finish(), None)
    }

    fn stops(stops: &[&str]) -> StopStrings {
        StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect())
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_shown_and_a_false_beginning_is() {
        assert_eq!(
            fed(&stops(&["END", "é!"]), &["abE", "x", "é", "?E", "N", "D."]),
            ("abExé?".into(), Some(5))
        );
        assert_eq!(fed(&stops(&["END"]), &["abEN"]), ("abEN".into(), None));
        assert_eq!(fed(&stops(&["c", "b"]), &["abc"]), ("a".into(), Some(0)), "the earliest counts");
        assert_eq!(fed(&stops(&["", "c"]), &["ab"]), ("ab".into(), None));
    }

    #[test]
    fn what_may_become_a_stop_string_is_held_back() {
        let mut stops = stops(&["END"]);
        let shown = ["ab", "E", "x", "EN"].map(|piece| stops.push(piece, true, true).0);
        assert_eq!(shown, ["ab", "", "Ex", ""]);
    }

    #[test]
    fn a_special_token_ends_the_text_though_it_is_not_shown() {
        assert_eq!(fed(&stops(&["<|end|>"]), &["ab", "[<|end|>]", "c"]), ("ab".into(), Some(1)));
        assert_eq!(fed(&stops(&["b<|end|>c"]), &["ab", "[<|end|>]", "c"]), ("a".into(), Some(2)));
        assert_eq!(fed(&stops(&["b<|end|>c"]), &["ab", "[<|end|>]", "d", "e"]), ("abde".into(), None));
        assert_eq!(fed(&stops(&["end"]), &["ab", "[<|end|>]"]), ("ab".into(), Some(1)), "also a part of it");
        assert_eq!(
            fed(&stops(&["|>c"]), &["a", "[<|x|>]", "[<|y|>]", "b", "[<|z|>]", "c"]),
            ("ab".into(), Some(5))
        );
    }

    #[test]
    fn a_stop_string_that_belongs_to_the_text_is_shown() {
        let include = stops(&["<|end|>", "X"]).include(true);
        assert_eq!(fed(&include, &["ab", "[<|end|>]"]), ("ab<|end|>".into(), Some(1)));
        assert_eq!(fed(&include, &["aXb"]), ("aX".into(), Some(0)));
    }

    #[test]
    fn nothing_ends_a_text_before_the_search_begins() {
        let mut stops = stops(&["END"]);
        assert_eq!(stops.push("aENDE", true, false), ("aEND".into(), false));
        assert_eq!(stops.push("ND", true, true), (String::new(), true), "one that ends later does");
    }
}
