//! Data sets: rows of text from files, and the text they make when joined.

mod fields;
mod files;
mod joined;
mod open;
mod rows;
mod spec;

use std::cell::OnceCell;
use std::env;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use gptq_text::{ChatTemplate, Conversation};
use serde_json::Value;

pub use self::fields::Render;
pub use self::joined::Join;
pub(crate) use self::joined::Joiner;
use self::rows::Reading;
pub(crate) use self::rows::{Piece, Visit};
pub use self::spec::{DatasetSpec, Split, WikiText2};
use crate::error::{Error, Result};

/// Rows of text, in the order of their files. Files are read as a stream, again for every use.
pub struct Dataset {
    /// For display, e.g. `wikitext2:test`.
    pub name: String,
    source: Source,
    text_field: Option<String>,
    render: Box<Render>,
}

enum Source {
    /// At least one, all of one kind.
    Files(Vec<PathBuf>),
    Parquet(Bytes),
    Rows(Vec<String>),
}

/// The places where data sets known by name are looked for.
#[derive(Default)]
pub struct DatasetRoots {
    /// Holds `wikitext/wikitext-2-raw-v1/<split>-*.parquet`; asked before the hub.
    pub datasets: Option<PathBuf>,
    pub hub: Option<Box<FromHub>>,
}

/// Brings the files of a data set's repository that fit a pattern, and returns the folder they lie in, or says why not.
pub type FromHub = dyn Fn(&str, &str) -> Result<PathBuf, String>;

impl DatasetRoots {
    /// `datasets` from `GPTQ_DATASETS`, and no hub.
    pub fn from_env() -> Self {
        let datasets = env::var_os("GPTQ_DATASETS").filter(|value| !value.is_empty()).map(PathBuf::from);
        Self { datasets, hub: None }
    }

    pub fn with_hub(self, hub: impl Fn(&str, &str) -> Result<PathBuf, String> + 'static) -> Self {
        Self { hub: Some(Box::new(hub)), ..self }
    }
}

/// Finds the files of a data set. What is in them shows when they are read.
///
/// # Errors
/// Names the file that is missing or of another kind, or the splits to choose from.
pub fn load(spec: &DatasetSpec, roots: &DatasetRoots) -> Result<Dataset> {
    Ok(Dataset::new(spec.to_string(), Source::Files(files::locate(spec, roots)?)))
}

impl Dataset {
    fn new(name: String, source: Source) -> Self {
        let at = name.clone();
        let render = Box::new(move |_: &[Value]| Err(gptq_text::Error::NoChatTemplate { at: at.clone() }));
        Self { name, source, text_field: None, render }
    }

    pub fn from_rows(name: impl Into<String>, rows: Vec<String>) -> Self {
        Self::new(name.into(), Source::Rows(rows))
    }

    /// A parquet file that is already in memory.
    pub fn from_parquet_bytes(name: impl Into<String>, bytes: impl Into<Bytes>) -> Self {
        Self::new(name.into(), Source::Parquet(bytes.into()))
    }

    /// Reads this field of each row, instead of the first that is there of `text`, `messages`,
    /// `conversations`, and `instruction` with `output`.
    pub fn with_text_field(self, field: Option<&str>) -> Self {
        Self { text_field: field.map(str::to_owned), ..self }
    }

    /// How rows that are conversations become text; without this they are refused. [`gptq_text::Error::NoChatTemplate`]
    /// says that the model knows no way; `instruction` and `output` are then taken as paragraphs.
    pub fn with_render(self, render: impl Fn(&[Value]) -> gptq_text::Result<String> + 'static) -> Self {
        Self { render: Box::new(render), ..self }
    }

    /// Conversations are written by the chat template of the model in this folder, which is read where a row needs it.
    pub fn with_template_of(self, model: &Path) -> Self {
        let (model, template) = (model.to_owned(), OnceCell::new());
        self.with_render(move |messages| {
            let template = match template.get() {
                Some(template) => template,
                None => {
                    let loaded = ChatTemplate::load(&model)?;
                    template.get_or_init(|| loaded)
                }
            };
            template.render(&Conversation { add_generation_prompt: false, ..Conversation::new(messages) })
        })
    }

    /// Hands out the pieces of all rows in their order.
    ///
    /// # Errors
    /// Names the file and the line or row that is unreadable or malformed.
    pub(crate) fn visit(&self, visit: &mut Visit) -> Result<()> {
        let reading = Reading { text_field: self.text_field.as_deref(), render: &*self.render };
        match &self.source {
            Source::Files(files) => files.iter().try_for_each(|file| rows::visit_file(file, &reading, visit)),
            Source::Parquet(bytes) => rows::visit_parquet(bytes.clone(), &self.name, &reading, visit),
            Source::Rows(rows) => rows.iter().try_for_each(|row| visit(Piece::row(row))),
        }
    }

    /// Hands out the text, part by part.
    ///
    /// # Errors
    /// As reading the files does; also when no row has text.
    pub(crate) fn visit_text(&self, join: Join, visit: &mut dyn FnMut(&str) -> Result<()>) -> Result<Joiner> {
        let mut joiner = Joiner::new(join);
        self.visit(&mut |piece| {
            joiner.push(piece).into_iter().filter(|part| !part.is_empty()).try_for_each(&mut *visit)
        })?;
        match joiner.has_text() {
            true => Ok(joiner),
            false => Err(Error::malformed(&self.name, "expected text, got none")),
        }
    }

    /// The whole text, in memory.
    ///
    /// # Errors
    /// As reading the files does; also when no row has text.
    pub fn join(&self, join: Join) -> Result<String> {
        let mut text = String::new();
        self.visit_text(join, &mut |part| {
            text.push_str(part);
            Ok(())
        })?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(rows: &[&str]) -> Dataset {
        Dataset::from_rows("rows", rows.iter().map(|row| row.to_string()).collect())
    }

    fn fingerprint(dataset: &Dataset) -> String {
        dataset.visit_text(Join::Paper, &mut |_| Ok(())).unwrap().fingerprint()
    }

    fn no_roots() -> DatasetRoots {
        DatasetRoots::default()
    }

    #[test]
    fn raw_text_fills_empty_rows_and_paper_text_separates_rows() {
        let dataset = dataset(&["", " = Title = \n", "", " Text . \n"]);
        let raw = " \n = Title = \n \n Text . \n";
        assert_eq!(dataset.join(Join::Raw).unwrap(), raw);
        assert_eq!(dataset.join(Join::Lines).unwrap(), raw);
        assert_eq!(dataset.join(Join::Paper).unwrap(), "\n\n = Title = \n\n\n\n\n Text . \n");
    }

    #[test]
    fn lines_are_parted_where_a_row_brings_no_line_end() {
        let dataset = dataset(&["one", "two\n", "", "three", "four"]);
        assert_eq!(dataset.join(Join::Lines).unwrap(), "one\ntwo\n \nthree\nfour");
        assert_eq!(dataset.join(Join::Raw).unwrap(), "onetwo\n \nthreefour");
        assert_eq!(dataset.visit_text(Join::Lines, &mut |_| Ok(())).unwrap().join(), Join::Lines);
        let with_line_ends = self::dataset(&["one\n", "two"]);
        assert_eq!(with_line_ends.visit_text(Join::Lines, &mut |_| Ok(())).unwrap().join(), Join::Raw);
    }

    #[test]
    fn a_text_file_is_one_text_however_rows_are_joined() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.txt");
        let text = "one\r\n\n two\nlast é\n".repeat(20_000);
        std::fs::write(&file, &text).unwrap();
        let dataset = load(&file.display().to_string().parse().unwrap(), &no_roots()).unwrap();
        for join in [Join::Paper, Join::Raw, Join::Lines] {
            assert!(dataset.join(join).unwrap() == text, "{join:?}");
        }
    }

    #[test]
    fn the_fingerprint_is_that_of_the_text_not_of_the_name_or_the_rows() {
        // A published FNV-1a test vector.
        assert_eq!(fingerprint(&dataset(&["foo", "bar"])), "85944171f73967e8");
        assert_eq!(fingerprint(&Dataset::from_rows("other", vec!["foobar".into()])), "85944171f73967e8");
        assert_eq!(fingerprint(&dataset(&["a", ""])), fingerprint(&dataset(&["a \n"])));
        assert_ne!(fingerprint(&dataset(&["a"])), fingerprint(&dataset(&["b"])));
    }

    #[test]
    fn a_data_set_without_text_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("empty.txt");
        std::fs::write(&file, "").unwrap();
        let dataset = load(&file.display().to_string().parse().unwrap(), &no_roots()).unwrap();
        let error = dataset.join(Join::Raw).unwrap_err().to_string();
        assert!(error.contains("empty.txt: expected text"), "{error}");
    }

    #[test]
    #[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
    fn the_public_files_have_their_known_row_counts() {
        let shared = std::env::var_os("GPTQ_SHARED").map(PathBuf::from).expect("GPTQ_SHARED is not set");
        let roots = DatasetRoots { datasets: Some(shared.join("data")), ..DatasetRoots::default() };
        for (name, rows) in [
            ("wikitext2:test", 4_358),
            ("wikitext2:validation", 3_760),
            ("wikitext2-unk:train", 36_718),
            ("wikitext2-unk:test", 4_358),
        ] {
            let mut counted = 0;
            let dataset = load(&name.parse().unwrap(), &roots).unwrap();
            dataset
                .visit(&mut |_| {
                    counted += 1;
                    Ok(())
                })
                .unwrap();
            assert_eq!(counted, rows, "{name}");
        }
        let demo = shared.join("models/demo4m/text");
        let from_file = load(&format!("{}:test", demo.display()).parse().unwrap(), &roots).unwrap();
        let bytes = std::fs::read(demo.join("test-00000-of-00001.parquet")).unwrap();
        let embedded = Dataset::from_parquet_bytes("demo", bytes);
        assert_eq!(fingerprint(&embedded), fingerprint(&from_file));
    }
}
