//! Data sets: rows of text from files, and the text they make when joined.

mod files;
mod readers;
mod spec;

use std::env;
use std::path::PathBuf;

use bytes::Bytes;

pub use self::spec::{DatasetSpec, Split, WikiText2};
use crate::error::{Error, Result};
use crate::hub::HubCache;

/// Rows of text, in the order of their files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// For display, e.g. `wikitext2:test`.
    pub name: String,
    pub rows: Vec<String>,
}

/// How rows become one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// Rows joined with a blank line (`"\n\n"`): the perplexity protocol of the GPTQ paper.
    Paper,
    /// Rows as they are, one after the other, an empty row becoming `" \n"`: the calibration text of
    /// published checkpoints. It relies on rows that bring their own line end, as those of WikiText and of a
    /// text file do.
    Raw,
}

/// The places where data sets known by name are looked for.
#[derive(Clone, Debug)]
pub struct DatasetRoots {
    /// Holds `wikitext/wikitext-2-raw-v1/<split>-*.parquet`; asked before the hub cache.
    pub datasets: Option<PathBuf>,
    pub hub: HubCache,
}

impl DatasetRoots {
    /// `datasets` from `GPTQ_DATASETS`, the hub cache from [`HubCache::from_env`].
    pub fn from_env() -> Result<Self> {
        let datasets = env::var_os("GPTQ_DATASETS").filter(|value| !value.is_empty()).map(PathBuf::from);
        Ok(Self { datasets, hub: HubCache::from_env()? })
    }
}

/// Reads all rows of a data set into memory.
///
/// # Errors
/// Names the file (and the line or row) that is missing, unreadable or malformed, or the splits to choose
/// from.
pub fn load(spec: &DatasetSpec, roots: &DatasetRoots) -> Result<Dataset> {
    let mut rows = Vec::new();
    for file in files::locate(spec, roots)? {
        rows.extend(readers::read_file(&file)?);
    }
    if rows.iter().all(String::is_empty) {
        return Err(Error::malformed(spec, "expected text, got none"));
    }
    Ok(Dataset { name: spec.to_string(), rows })
}

impl Dataset {
    pub fn from_rows(name: impl Into<String>, rows: Vec<String>) -> Self {
        Self { name: name.into(), rows }
    }

    /// The `text` column of a parquet file that is already in memory.
    pub fn from_parquet_bytes(name: impl Into<String>, bytes: &[u8]) -> Result<Self> {
        let name = name.into();
        let rows = readers::parquet_rows(Bytes::copy_from_slice(bytes), &name)?;
        Ok(Self { name, rows })
    }

    pub fn join(&self, join: Join) -> String {
        match join {
            Join::Paper => self.rows.join("\n\n"),
            Join::Raw => self.raw_pieces().collect(),
        }
    }

    /// FNV-1a (64 bits, 16 hexadecimal digits) of the [`Join::Raw`] text: equal for equal texts, whatever
    /// their name or file. Not meant against forgery.
    pub fn fingerprint(&self) -> String {
        const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let bytes = self.raw_pieces().flat_map(str::bytes);
        let hash = bytes.fold(OFFSET_BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
        format!("{hash:016x}")
    }

    fn raw_pieces(&self) -> impl Iterator<Item = &str> {
        self.rows.iter().map(|row| if row.is_empty() { " \n" } else { row })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(rows: &[&str]) -> Dataset {
        Dataset::from_rows("rows", rows.iter().map(|row| row.to_string()).collect())
    }

    #[test]
    fn raw_text_fills_empty_rows_and_paper_text_separates_rows() {
        let dataset = dataset(&["", " = Title = \n", "", " Text . \n"]);
        assert_eq!(dataset.join(Join::Raw), " \n = Title = \n \n Text . \n");
        assert_eq!(dataset.join(Join::Paper), "\n\n = Title = \n\n\n\n\n Text . \n");
    }

    #[test]
    fn the_fingerprint_is_that_of_the_text_not_of_the_name_or_the_rows() {
        // Published FNV-1a test vectors.
        assert_eq!(dataset(&[]).fingerprint(), "cbf29ce484222325");
        assert_eq!(dataset(&["foo", "bar"]).fingerprint(), "85944171f73967e8");
        assert_eq!(Dataset::from_rows("other", vec!["foobar".into()]).fingerprint(), "85944171f73967e8");
        assert_eq!(dataset(&["a", ""]).fingerprint(), dataset(&["a \n"]).fingerprint());
        assert_ne!(dataset(&["a"]).fingerprint(), dataset(&["b"]).fingerprint());
    }

    #[test]
    fn a_data_set_without_text_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("empty.txt");
        std::fs::write(&file, "").unwrap();
        let roots = DatasetRoots { datasets: None, hub: HubCache { root: folder.path().into() } };
        let spec = file.display().to_string().parse().unwrap();
        let error = load(&spec, &roots).unwrap_err().to_string();
        assert!(error.contains("empty.txt: expected text"), "{error}");
    }

    #[test]
    fn the_public_files_have_their_known_row_counts() {
        let Some(shared) = env::var_os("GPTQ_SHARED").map(PathBuf::from) else {
            eprintln!("skipped: GPTQ_SHARED is not set");
            return;
        };
        let roots =
            DatasetRoots { datasets: Some(shared.join("data")), hub: HubCache { root: shared.join("hub") } };
        for (name, rows) in [
            ("wikitext2:test", 4_358),
            ("wikitext2:validation", 3_760),
            ("wikitext2-unk:train", 36_718),
            ("wikitext2-unk:test", 4_358),
        ] {
            assert_eq!(load(&name.parse().unwrap(), &roots).unwrap().rows.len(), rows, "{name}");
        }
        let demo = shared.join("models/demo4m/text");
        let from_file = load(&format!("{}:test", demo.display()).parse().unwrap(), &roots).unwrap();
        let bytes = std::fs::read(demo.join("test-00000-of-00001.parquet")).unwrap();
        let embedded = Dataset::from_parquet_bytes("demo", &bytes).unwrap();
        assert_eq!(embedded.fingerprint(), from_file.fingerprint());
    }
}
