//! The model that was quantized, as its own card describes it: licence, languages, and the text itself.

use std::collections::BTreeMap;

/// What is taken over from the base model's card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// `owner/name` on the hub.
    pub id: Option<String>,
    /// From the header: `license`, `license_name`, `license_link`.
    pub licence: BTreeMap<String, String>,
    pub languages: Vec<String>,
    /// The card without its header; empty where there is none.
    pub text: String,
}

const LICENCE_KEYS: [&str; 3] = ["license", "license_name", "license_link"];

impl Base {
    /// Reads a card: a header between two lines of `---`, then Markdown.
    pub fn read(id: Option<String>, card: &str) -> Self {
        let card = card.trim_start_matches('\u{feff}').replace("\r\n", "\n");
        let parts = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---"));
        let Some((header, rest)) = parts else {
            return Self { id, text: card.trim().to_owned(), ..Self::default() };
        };
        let text = rest.split_once('\n').map_or("", |(_, text)| text).trim().to_owned();
        let mut base = Self { id, text, ..Self::default() };
        for (key, values) in fields(header) {
            match key.as_str() {
                key if LICENCE_KEYS.contains(&key) => {
                    if let Some(value) = values.first() {
                        base.licence.insert(key.to_owned(), value.clone());
                    }
                }
                "language" | "languages" => base.languages = values,
                _ => {}
            }
        }
        base
    }
}

/// The header's own keys with their value, or the members of their list. What is nested deeper is left out.
fn fields(header: &str) -> Vec<(String, Vec<String>)> {
    let mut fields: Vec<(String, Vec<String>)> = Vec::new();
    for line in header.lines() {
        let member = line.trim_start().strip_prefix("- ");
        match (member, line.split_once(':')) {
            (Some(member), _) => {
                if let Some((_, values)) = fields.last_mut() {
                    values.push(unquote(member));
                }
            }
            (None, Some((key, value))) if !key.starts_with([' ', '\t', '#']) => {
                let value = value.trim();
                let inline = value.strip_prefix('[').and_then(|value| value.strip_suffix(']'));
                let values = match inline {
                    Some(list) => list.split(',').map(unquote).filter(|value| !value.is_empty()).collect(),
                    None if value.is_empty() => Vec::new(),
                    None => vec![unquote(value)],
                };
                fields.push((key.trim().to_owned(), values));
            }
            _ => {}
        }
    }
    fields
}

fn unquote(text: &str) -> String {
    let text = text.trim();
    let inner = ['"', '\''].iter().find_map(|quote| text.strip_prefix(*quote)?.strip_suffix(*quote));
    inner.unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_and_languages_are_taken_from_the_header_and_the_text_without_it() {
        let card = "---\r\nlicense: \"wtfpl\"\r\nlicense_link: https://x/y:z\r\nlanguage:\r\n- en\r\n- 'zh'\r\ndatasets:\r\n- a\r\n\
                    widget:\r\n  - text: x\r\n---\r\n# Model\r\n\r\n---\r\nText\r\n";
        let base = Base::read(Some("a/b".into()), card);
        assert_eq!(base.licence["license"], "wtfpl");
        assert_eq!(base.licence["license_link"], "https://x/y:z");
        assert_eq!(base.languages, ["en", "zh"]);
        assert_eq!(base.text, "# Model\n\n---\nText");
        let plain = Base::read(None, "# No header\n");
        assert_eq!((plain.text.as_str(), plain.licence.len()), ("# No header", 0));
        assert_eq!(Base::read(None, "---\nlanguage: [en, fr]\n---\n").languages, ["en", "fr"]);
    }
}
