//! A large file in parts. What the storage has of it is noted beside the cache's locks, so that a push that failed or was
//! killed sends the rest:
//!
//! ```text
//! .locks/models--owner--name/<sha256>.upload    the addresses as JSON, then a line for each part there: its number, and
//!                                               its ETag as JSON, so that a line that was cut short is none
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::lfs::{Action, LFS};
use super::{LocalFile, PushRequest};
use crate::cache::RepoCache;
use crate::client::Client;
use crate::error::{Cause, Error, Result, Subject};
use crate::progress::{Event, Watch};

/// Where the parts of one upload go. The addresses are signed: knowing one is permission to send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parts {
    /// Gets a request once all parts are there.
    pub complete: String,
    /// Bytes of a part; the last one may have fewer.
    pub size: u64,
    pub addresses: Vec<String>,
}

impl Parts {
    /// The place of a part in the file.
    fn range(&self, index: usize, file: &LocalFile) -> (u64, u64) {
        let from = index as u64 * self.size;
        (from, file.size.min(from + self.size))
    }
}

/// The parts of an upload that are there, on disk as well where that is possible.
struct Journal {
    parts: Parts,
    /// ETags by part.
    there: BTreeMap<usize, String>,
    /// Whether an earlier run has begun the upload.
    is_resumed: bool,
    /// `None` where nothing can be kept, or another process sends the same file.
    file: Option<(PathBuf, File)>,
}

impl Client {
    /// Sends what the storage lacks of a file, and has it put together. Returns the bytes that were sent.
    pub(super) fn send_parts(
        &self,
        request: &PushRequest,
        subject: &Subject,
        action: &Action,
        fresh: &Parts,
        watch: &Watch,
    ) -> Result<u64> {
        let file = action.file;
        let mut journal = self.journal(request, file, fresh);
        let kept = journal.bytes(file);
        watch(Event::Bytes { file: &file.path, count: kept as i64 });
        let sent = self
            .send_missing(request, subject, file, &mut journal, watch)
            .and_then(|()| self.complete(subject, file, &journal, watch));
        let refusal = match sent {
            Ok(()) => {
                journal.forget();
                return Ok(file.size - kept);
            }
            // The next run goes on from here.
            Err(error) if !is_refusal(&error) => return Err(error),
            Err(refusal) => refusal,
        };
        journal.forget();
        // Addresses expire, and an upload may have been put together although the answer said otherwise.
        let again = self.ask_where(request, subject, &[file], watch)?;
        match again.first() {
            None => Ok(file.size - kept),
            Some(again) if journal.is_resumed => {
                watch(Event::Bytes { file: &file.path, count: -(journal.bytes(file) as i64) });
                watch(Event::Note(&format!("{subject}an earlier upload is no longer there, beginning anew")));
                drop(journal);
                self.transfer(request, subject, again, watch)
            }
            Some(_) => Err(refusal),
        }
    }

    fn note(&self, request: &PushRequest, file: &LocalFile) -> PathBuf {
        RepoCache::new(&self.settings.cache, &request.repo).upload(&file.sha256)
    }

    /// Removes the note of a file that the storage has.
    pub(super) fn forget_upload(&self, request: &PushRequest, file: &LocalFile) {
        // There is none but after a kill.
        let _ = fs::remove_file(self.note(request, file));
    }

    /// An earlier run's, where there is one for this hub, else a new one.
    fn journal(&self, request: &PushRequest, file: &LocalFile, fresh: &Parts) -> Journal {
        let path = self.note(request, file);
        let opened = open(&path).ok().flatten();
        let earlier = opened.as_ref().and_then(|_| read(&path));
        let usable = |parts: &Parts| {
            let expected = file.size.div_ceil(parts.size.max(1)).max(1);
            parts.addresses.len() as u64 == expected && self.trusts(&parts.complete)
        };
        match earlier.filter(|(parts, _)| usable(parts)) {
            Some((parts, there)) => {
                let mut journal =
                    Journal { parts, there, is_resumed: true, file: opened.map(|open| (path, open)) };
                // Ends a line that was being written when an earlier run died.
                journal.append("\n");
                journal
            }
            None => {
                let (parts, there) = (fresh.clone(), BTreeMap::new());
                let file = opened.filter(|open| open.set_len(0).is_ok()).map(|open| (path, open));
                let mut journal = Journal { parts, there, is_resumed: false, file };
                let line = serde_json::to_string(fresh).unwrap_or_default();
                journal.append(&format!("{line}\n"));
                journal
            }
        }
    }

    fn send_missing(
        &self,
        request: &PushRequest,
        subject: &Subject,
        file: &LocalFile,
        journal: &mut Journal,
        watch: &Watch,
    ) -> Result<()> {
        let parts = journal.parts.clone();
        let missing: Vec<usize> =
            (0..parts.addresses.len()).filter(|index| !journal.there.contains_key(index)).collect();
        let next = AtomicUsize::new(0);
        let (journal, failed) = (Mutex::new(journal), Mutex::new(None));
        let take = || loop {
            let Some(index) = missing.get(next.fetch_add(1, Ordering::Relaxed)).copied() else { return };
            let put = self.put(subject, file, &parts.addresses[index], &[], parts.range(index, file), watch);
            let etag = put.and_then(|etag| {
                etag.ok_or_else(|| subject.fails(self.malformed("expected an ETag of the part".into())))
            });
            match etag {
                Ok(etag) => locked(&journal).mark(index, etag),
                Err(error) => {
                    // The others end what they have begun.
                    next.store(missing.len(), Ordering::Relaxed);
                    locked(&failed).get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..request.workers.max(1).min(missing.len()) {
                scope.spawn(take);
            }
        });
        let failed = failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        failed.map_or(Ok(()), Err)
    }

    fn complete(&self, subject: &Subject, file: &LocalFile, journal: &Journal, watch: &Watch) -> Result<()> {
        let parts: Vec<_> = journal
            .there
            .iter()
            .map(|(index, etag)| json!({"partNumber": index + 1, "etag": etag}))
            .collect();
        let body = json!({"oid": file.sha256.as_str(), "parts": parts});
        self.post_to(&journal.parts.complete, &body, &[("accept", LFS)], subject, watch).map(|_| ())
    }
}

impl Journal {
    /// Of the parts that are there.
    fn bytes(&self, file: &LocalFile) -> u64 {
        let size = |index: &usize| {
            let (from, to) = self.parts.range(*index, file);
            to - from
        };
        self.there.keys().map(size).sum()
    }

    fn mark(&mut self, index: usize, etag: String) {
        self.append(&format!("{index} {}\n", json!(etag)));
        self.there.insert(index, etag);
    }

    /// A note that cannot be written costs a part that is sent again, and nothing else.
    fn append(&mut self, text: &str) {
        if let Some((_, file)) = &mut self.file {
            let _ = file.write_all(text.as_bytes());
        }
    }

    fn forget(&mut self) {
        if let Some((path, _)) = self.file.take() {
            let _ = fs::remove_file(path);
        }
    }
}

/// The journal's file, for this process alone; `None` where another one has it.
fn open(path: &Path) -> io::Result<Option<File>> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut options = OpenOptions::new();
    options.create(true).append(true).read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path)?;
    Ok(file.try_lock().is_ok().then_some(file))
}

/// `None` where nothing was noted, or what was noted cannot be read.
fn read(path: &Path) -> Option<(Parts, BTreeMap<usize, String>)> {
    const MOST_BYTES: u64 = 64 << 20;
    let text = String::from_utf8(gptq_input::read(path, MOST_BYTES).ok()?).ok()?;
    let (first, rest) = text.split_once('\n')?;
    let parts: Parts = serde_json::from_str(first).ok()?;
    let there = rest.lines().filter_map(|line| {
        let (index, etag) = line.split_once(' ')?;
        let index = index.parse().ok().filter(|index| *index < parts.addresses.len())?;
        Some((index, serde_json::from_str(etag).ok()?))
    });
    let there = there.collect();
    Some((parts, there))
}

/// Whether the storage, or the hub, does not know the upload, rather than something on the way there.
fn is_refusal(error: &Error) -> bool {
    matches!(
        *error.cause,
        Cause::StorageRefused { .. }
            | Cause::Unexpected { .. }
            | Cause::NoRepo
            | Cause::NoFile { .. }
            | Cause::MayNotWrite { .. }
    )
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_that_was_cut_short_keeps_what_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("locks/a.upload");
        let parts = Parts { complete: "http://h/c".into(), size: 5, addresses: vec!["a".into(), "b".into()] };
        let first = serde_json::to_string(&parts).unwrap();
        for (text, expected) in [
            (String::new(), None),
            ("{\"complete\": \"ht".to_owned(), None),
            (first.clone(), None),
            (format!("{first}\n"), Some(vec![])),
            (format!("{first}\n1 \"x\"\n0 \"y"), Some(vec![(1, "x".to_owned())])),
            (format!("{first}\n0 \"y\n1 \"x\"\n"), Some(vec![(1, "x".to_owned())])),
            (format!("{first}\n7 \"x\"\n\n"), Some(vec![])),
        ] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
            let found = read(&path).map(|(_, there)| there.into_iter().collect::<Vec<_>>());
            assert_eq!(found, expected, "{text}");
        }
        let first = open(&path).unwrap();
        assert!(first.is_some() && open(&path).unwrap().is_none(), "two processes at one note");
    }
}
