//! What a long transfer tells while it runs.

use std::time::Duration;

use crate::error::{Cause, Subject};

/// Receives the events. Called by all workers.
pub type Watch<'a> = dyn Fn(Event) + Sync + 'a;

#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Before the first byte: how much there is to do.
    Plan { files: usize, bytes: u64 },
    /// A file is begun; `done` bytes of it are there already.
    Begin { file: &'a str, size: u64, done: u64 },
    /// So many more bytes of it have arrived, or less than nothing where it begins anew.
    Bytes { file: &'a str, count: i64 },
    /// All of it is there and verified.
    Done { file: &'a str, size: u64 },
    /// All workers wait.
    Wait { pause: Duration },
    /// Something failed and is tried again.
    Retry { subject: &'a Subject, cause: &'a Cause, attempt: u32, of: u32, pause: Duration },
    /// Another process is at the same file.
    Waiting { file: &'a str },
    /// A line for the user.
    Note(&'a str),
}

/// Discards all events.
pub fn silent(_: Event) {}
