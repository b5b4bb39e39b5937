//! The artifact on disk: safetensors laid out before any work, written layer by layer, put in place when complete.

mod begin;
mod fingerprint;
mod folder;
mod journal;
mod layout;
mod side_files;
#[cfg(test)]
mod tests;
mod update;
mod writer;

pub use begin::{Begun, OutMode, begin};
pub use fingerprint::{Fingerprint, Hash, hash_tokens};
pub use layout::{ArtifactLayout, metadata};
pub use side_files::{is_licence, side_files};
pub use update::replace_files;
pub use writer::ArtifactWriter;
