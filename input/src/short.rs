//! Texts from anywhere, as they may stand in a message.

use std::fmt::Write;
use std::path::Path;

/// Characters of a value or a name.
const VALUE: usize = 120;
/// Characters of another library's message, which may have a value of its own in it.
const LINE: usize = 400;
/// Characters of a path. A system's own limit is 4096, and the end is what tells.
const PATH: usize = 300;

/// A value, a key or a name: at most 120 characters and on one line, with control characters as escapes.
pub fn short(text: &str) -> String {
    cut(text, VALUE)
}

/// The same for a whole message of another program: at most 400 characters.
pub fn short_line(text: &str) -> String {
    cut(text, LINE)
}

/// A path, without what is in the middle of a long one.
pub fn short_path(path: &Path) -> String {
    let text = path.to_string_lossy();
    let length = text.chars().count();
    if length <= PATH {
        return cut(&text, PATH);
    }
    let end: String = text.chars().skip(length - PATH / 2).collect();
    format!("{}{}", cut(&text, PATH / 2), cut(&end, PATH))
}

/// At most so many characters, on one line, with control characters as escapes.
pub fn short_to(text: &str, most: usize) -> String {
    cut(text, most)
}

fn cut(text: &str, most: usize) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == most {
            // Infallible, as every write to a text.
            write!(out, "... ({} bytes)", text.len()).ok();
            break;
        }
        // Characters that turn the direction of a line would make it say another thing.
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2028}' | '\u{2029}' | '\u{2066}'..='\u{2069}');
        match c.is_control() || turns {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_is_one_short_line_in_a_message() {
        assert_eq!(short("model.layers.0"), "model.layers.0");
        assert_eq!(short("a\nb\u{1b}[31mc\u{202e}"), "a\\nb\\u{1b}[31mc\\u{202e}");
        let long = short(&"é".repeat(100_000));
        assert!(long.chars().count() < 150 && long.ends_with("... (200000 bytes)"), "{long}");
        let path = short_path(Path::new(&format!("/start/{}/end.json", "x".repeat(4000))));
        assert!(path.starts_with("/start/") && path.ends_with("/end.json") && path.len() < 400, "{path}");
    }
}
