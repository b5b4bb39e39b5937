//! The artifact on disk: safetensors laid out before any work, written layer by layer, renamed when complete.

mod fingerprint;
mod folder;
mod journal;
mod layout;
mod side_files;
mod writer;

pub use fingerprint::{Fingerprint, hash};
pub use layout::{ArtifactLayout, metadata};
pub use side_files::side_files;
pub use writer::{ArtifactWriter, OutMode};
