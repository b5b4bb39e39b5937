//! From data sets to token sequences, for calibration and for perplexity.
//!
//! ```text
//! files    of a data set, local or from a hub         dataset::load
//! rows     read as a stream, as the files hold them   Dataset
//! text     the rows joined by one of the conventions  Join
//! tokens   of the text, or of what is needed of it    gptq_text::Tokenizer::encode
//! sequences  windows of equal length                  Dataset::sample (calibration), Dataset::windows (perplexity)
//! ```
//!
//! ```
//! use gptq_calibration::{Dataset, Join, SampleRequest, Sampling};
//! use gptq_text::Tokenizer;
//!
//! # fn main() -> gptq_calibration::Result<()> {
//! let dataset = Dataset::from_rows("example", vec!["to be or not\n".into(), "to be\n".into()]);
//! let tokenizer_json = r#"{
//!     "version": "1.0",
//!     "added_tokens": [],
//!     "pre_tokenizer": {"type": "Whitespace"},
//!     "model": {"type": "WordLevel", "vocab": {"to": 0, "be": 1, "or": 2, "not": 3}, "unk_token": "to"}
//! }"#;
//! let tokenizer = Tokenizer::from_bytes(tokenizer_json.as_bytes(), None)?;
//! assert_eq!(tokenizer.encode(&dataset.join(Join::Raw)?, false)?, [0, 1, 2, 3, 0, 1]);
//!
//! let request = SampleRequest { samples: 2, seq_len: 3, sampling: Sampling::Consecutive, seed: 0 };
//! assert_eq!(dataset.sample(&tokenizer, Join::Raw, &request)?.ids, [[0, 1, 2], [3, 0, 1]]);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod dataset;
mod error;
pub mod sampling;
mod sequences;

pub use crate::dataset::{Dataset, DatasetRoots, DatasetSpec, Join, Render, Split, WikiText2};
pub use crate::error::{Error, Result};
pub use crate::sampling::{SampleRequest, Sampling, sample, windows};
pub use crate::sequences::Sequences;
