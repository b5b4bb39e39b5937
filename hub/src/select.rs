//! Which files of a repository are wanted.

use crate::error::Cause;
use crate::pattern::fits;
use crate::tree::{Entry, Tree};

/// A choice of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// What the program reads of a model, and the texts that go with it; no weights in other formats.
    Model,
    /// Exactly these.
    Files(Vec<String>),
    /// All that fit one of `include` (or all, where there is none) and none of `exclude`.
    Patterns { include: Vec<String>, exclude: Vec<String> },
}

impl Wanted {
    pub fn all() -> Self {
        Self::Patterns { include: Vec::new(), exclude: Vec::new() }
    }

    /// The wanted files.
    ///
    /// # Errors
    /// The named file that is not there, with those that are; nothing at all is an error, too.
    pub fn of<'a>(&self, tree: &'a Tree) -> Result<Vec<&'a Entry>, (Option<String>, Cause)> {
        let chosen: Vec<&Entry> = match self {
            Self::Files(names) => {
                let mut chosen = Vec::new();
                for name in names {
                    let found = tree.get(name);
                    chosen.push(
                        found.ok_or_else(|| (Some(name.clone()), Cause::NoFile { files: tree.paths() }))?,
                    );
                }
                chosen
            }
            Self::Patterns { include, exclude } => {
                let any = |patterns: &[String], path: &str| patterns.iter().any(|p| fits(&folder(p), path));
                let wanted = |entry: &&Entry| {
                    (include.is_empty() || any(include, &entry.path)) && !any(exclude, &entry.path)
                };
                tree.iter().filter(wanted).collect()
            }
            Self::Model => tree.iter().filter(|entry| is_of_model(&entry.path, tree)).collect(),
        };
        match chosen.is_empty() {
            true => Err((None, Cause::NothingSelected { files: tree.paths() })),
            false => Ok(chosen),
        }
    }
}

/// A pattern that ends in `/` means all that is below, as it does to Python.
fn folder(pattern: &str) -> String {
    if pattern.ends_with('/') { format!("{pattern}*") } else { pattern.to_owned() }
}

/// Names that licences and the like have, whatever follows.
const TEXTS: [&str; 5] = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "README"];
/// What models say of themselves, their tokenizers and templates.
const KINDS: [&str; 6] = [".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors"];

fn is_of_model(path: &str, tree: &Tree) -> bool {
    let Some((folder, name)) = path.rsplit_once('/') else {
        let text = |start: &&str| path.to_uppercase().starts_with(*start);
        // Mistral's repositories hold all weights once more under this name.
        let twice = path.starts_with("consolidated")
            && (tree.get("model.safetensors").is_some()
                || tree.get("model.safetensors.index.json").is_some());
        return !twice && (KINDS.iter().any(|kind| path.ends_with(kind)) || TEXTS.iter().any(text));
    };
    folder == "additional_chat_templates" && name.ends_with(".jinja")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(names: &[&str]) -> Tree {
        let file = |name: &&str| format!(r#""{name}": {{"size": 1, "blob_id": "{}"}}"#, "0".repeat(40));
        let files: Vec<_> = names.iter().map(file).collect();
        Tree::from_kept(format!(r#"{{"format_version": 1, "files": {{{}}}}}"#, files.join(",")).as_bytes())
            .unwrap()
    }

    fn paths(wanted: &Wanted, tree: &Tree) -> Vec<String> {
        wanted.of(tree).unwrap().into_iter().map(|entry| entry.path.clone()).collect()
    }

    #[test]
    fn of_a_model_no_weights_are_fetched_twice() {
        let wanted = [
            "LICENSE.txt",
            "README.md",
            "USE_POLICY.md",
            "additional_chat_templates/tool.jinja",
            "chat_template.jinja",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.model",
        ];
        let not = [
            ".gitattributes",
            "consolidated.safetensors",
            "flax_model.msgpack",
            "onnx/config.json",
            "original/x.pth",
            "pytorch_model-00001-of-00002.bin",
            "q4.gguf",
            "picture.png",
        ];
        let all = tree(&[&wanted[..], &not[..]].concat());
        assert_eq!(paths(&Wanted::Model, &all), wanted);
    }

    #[test]
    fn names_and_patterns_choose_and_nothing_is_an_error() {
        let tree = tree(&["a.json", "b.json", "x/c.bin"]);
        let patterns = |include: &[&str], exclude: &[&str]| Wanted::Patterns {
            include: include.iter().map(|p| p.to_string()).collect(),
            exclude: exclude.iter().map(|p| p.to_string()).collect(),
        };
        assert_eq!(paths(&patterns(&["*.json"], &["b*"]), &tree), ["a.json"]);
        assert_eq!(paths(&patterns(&["x/"], &[]), &tree), ["x/c.bin"]);
        assert_eq!(paths(&Wanted::all(), &tree).len(), 3);
        let (file, cause) = Wanted::Files(vec!["a.json".into(), "d.json".into()]).of(&tree).unwrap_err();
        assert_eq!(file.as_deref(), Some("d.json"));
        assert!(cause.to_string().contains("the files there: a.json, b.json, x/c.bin"), "{cause}");
        assert!(patterns(&["*.pt"], &[]).of(&tree).is_err());
    }
}
