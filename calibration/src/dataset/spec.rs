//! The name of a data set, as it is written on the command line.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

/// Which text to read: `PATH`, `FOLDER:split`, `wikitext2[:split]` or `wikitext2-unk[:split]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatasetSpec {
    /// A `.parquet`, `.jsonl` or `.txt` file, or a folder of such files of one kind. `split` chooses the
    /// files of a folder whose name starts with it.
    Path {
        path: PathBuf,
        split: Option<String>,
    },
    WikiText2 {
        variant: WikiText2,
        split: Split,
    },
}

/// The two public configurations of WikiText-2 (Merity et al., 2016).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WikiText2 {
    /// `wikitext2`: the text as written (`wikitext-2-raw-v1`).
    Raw,
    /// `wikitext2-unk`: rare words replaced by `<unk>` (`wikitext-2-v1`).
    Unk,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Validation,
    Test,
}

impl WikiText2 {
    const ALL: [Self; 2] = [Self::Raw, Self::Unk];

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "wikitext2",
            Self::Unk => "wikitext2-unk",
        }
    }

    /// Its folder inside the data set.
    pub(super) fn configuration(self) -> &'static str {
        match self {
            Self::Raw => "wikitext-2-raw-v1",
            Self::Unk => "wikitext-2-v1",
        }
    }
}

impl Split {
    const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

impl FromStr for DatasetSpec {
    type Err = Error;

    /// WikiText's split defaults to `train`. A path that exists is taken whole; else what follows its last
    /// `:` is the split. Whether the files exist shows when they are loaded.
    fn from_str(text: &str) -> Result<Self> {
        let (name, split) = text.split_once(':').unwrap_or((text, "train"));
        if let Some(variant) = WikiText2::ALL.into_iter().find(|variant| variant.name() == name) {
            let split = Split::ALL.into_iter().find(|known| known.name() == split);
            let split = split.ok_or_else(|| Error::Parse {
                what: "data set",
                expected: "the split train, validation or test",
                got: text.to_owned(),
            })?;
            return Ok(Self::WikiText2 { variant, split });
        }
        if text.is_empty() {
            return Err(Error::Parse {
                what: "data set",
                expected: "a file, a folder or wikitext2[:split]",
                got: text.to_owned(),
            });
        }
        let (path, split) = match text.rsplit_once(':') {
            Some((path, split)) if !Path::new(text).exists() && !path.is_empty() && is_split(split) => {
                (path, Some(split.to_owned()))
            }
            _ => (text, None),
        };
        Ok(Self::Path { path: path.into(), split })
    }
}

fn is_split(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

impl Display for DatasetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path { path, split: None } => write!(f, "{}", path.display()),
            Self::Path { path, split: Some(split) } => write!(f, "{}:{split}", path.display()),
            Self::WikiText2 { variant, split } => write!(f, "{}:{}", variant.name(), split.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> DatasetSpec {
        text.parse().unwrap()
    }

    fn path(path: &str, split: Option<&str>) -> DatasetSpec {
        DatasetSpec::Path { path: path.into(), split: split.map(str::to_owned) }
    }

    #[test]
    fn wikitext_is_known_by_name_and_defaults_to_its_train_split() {
        assert_eq!(
            parse("wikitext2"),
            DatasetSpec::WikiText2 { variant: WikiText2::Raw, split: Split::Train }
        );
        let unk = DatasetSpec::WikiText2 { variant: WikiText2::Unk, split: Split::Validation };
        assert_eq!(parse("wikitext2-unk:validation"), unk);
        let error = "wikitext2:dev".parse::<DatasetSpec>().unwrap_err().to_string();
        assert!(error.contains("train, validation or test") && error.contains("wikitext2:dev"), "{error}");
        assert!("".parse::<DatasetSpec>().is_err());
    }

    #[test]
    fn a_path_may_carry_a_split() {
        assert_eq!(parse("data/text"), path("data/text", None));
        assert_eq!(parse("data/text:train"), path("data/text", Some("train")));
        assert_eq!(parse("a:b/text.txt"), path("a:b/text.txt", None));
        assert_eq!(parse("text:"), path("text:", None));
    }

    #[test]
    fn a_path_that_exists_is_taken_whole() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("odd:name");
        std::fs::create_dir(&odd).unwrap();
        let odd = odd.display().to_string();
        assert_eq!(parse(&odd), path(&odd, None));
    }

    #[test]
    fn the_displayed_name_says_the_split_and_parses_back() {
        for (text, shown) in [
            ("wikitext2", "wikitext2:train"),
            ("wikitext2-unk:test", "wikitext2-unk:test"),
            ("data/text:test", "data/text:test"),
            ("data/text.jsonl", "data/text.jsonl"),
        ] {
            assert_eq!(parse(text).to_string(), shown);
            assert_eq!(parse(shown), parse(text));
        }
    }
}
