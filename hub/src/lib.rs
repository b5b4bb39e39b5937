//! Models and data sets from a hub and back: names, the cache that all clients of a machine share, downloads that are
//! verified to the last byte, and publishing. The one crate that opens sockets outward.
//!
//! ```text
//! name      `owner/name:branch`, checked           name
//! where     endpoint, token, cache                 settings, once from the environment
//! asking    requests, refusals, waits              client
//! what      commits, branches, files               tree, select
//! here      the cache as Python's, both ways       cache
//! fetching  pieces of a file, without sockets      transfer
//! all of it workers, verification, links           download
//! back      branches, large files, commits         push
//! ```

#![forbid(unsafe_code)]

mod address;
mod cache;
mod client;
mod download;
mod error;
mod name;
mod oid;
mod part;
mod pattern;
mod progress;
mod push;
mod select;
mod settings;
mod transfer;
mod tree;

pub use crate::cache::{RepoCache, Snapshot};
pub use crate::client::Client;
pub use crate::download::{Destination, DownloadPlan, Fetched, FileState, Planned, Request};
pub use crate::error::{Cause, Error, Result, Subject, bytes};
pub use crate::name::{Kind, MAIN, ModelRef, RepoId, check_revision, is_commit};
pub use crate::oid::{Hasher, Oid};
pub use crate::progress::{Event, Watch, silent};
pub use crate::push::{BranchPlan, LocalFile, PushBranch, PushPlan, PushRequest, Pushed};
pub use crate::select::Wanted;
pub use crate::settings::{Patience, Settings, Token};
pub use crate::tree::{Branch, Entry, Tree};
