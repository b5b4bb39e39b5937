//! Fetching a part of a file: from the hub, or from the storage that it names, which never sees the token.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ureq::Body;
use ureq::http::{Method, Response};

use super::board::{Job, Shared};
use super::receive::Taken;
use crate::address::{follow, quote};
use crate::cache::lock::Lock;
use crate::client::{Ask, Judged, Tries, first_line, header, host};
use crate::error::{Cause, Result, Subject};
use crate::oid::Hasher;
use crate::transfer::partial::Partial;
use crate::transfer::{Step, Transfer, Work, step};
use crate::tree::Entry;

/// A file that is being fetched.
pub(super) struct OpenFile {
    pub(super) job: Job,
    /// Held until the file is finished.
    _lock: Option<Lock>,
    pub(super) partial: Partial,
    pub(super) transfer: Mutex<Transfer>,
    pub(super) hashing: Mutex<Hashing>,
    /// The storage's address, once the hub has named one.
    pub(super) storage: Mutex<Option<String>>,
}

/// The hash of what is there without a gap.
pub(super) struct Hashing {
    pub hasher: Hasher,
    pub upto: u64,
    pub finished: bool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OpenFile {
    pub fn new(job: Job, lock: Option<Lock>, partial: Partial, transfer: Transfer) -> Self {
        let entry = &job.entries[0];
        let hashing = Hashing { hasher: entry.oid.hasher(entry.size), upto: 0, finished: false };
        Self {
            _lock: lock,
            partial,
            transfer: Mutex::new(transfer),
            hashing: Mutex::new(hashing),
            storage: Mutex::new(None),
            job,
        }
    }

    pub fn next(&self) -> Option<Work> {
        lock(&self.transfer).next()
    }

    pub fn is_finished(&self) -> bool {
        lock(&self.hashing).finished
    }

    pub fn entry(&self) -> &Entry {
        &self.job.entries[0]
    }
}

/// A worker at a file.
pub(super) struct Fetch<'a> {
    pub shared: &'a Shared<'a>,
    pub file: &'a OpenFile,
}

/// What was borne since the last byte.
#[derive(Default)]
struct Luck {
    changes: u32,
    resolved_again: bool,
}

/// How often the server may have another size of a file.
const MOST_CHANGES: u32 = 2;

/// What follows an answer.
enum Next {
    Take {
        url: String,
        answer: Response<Body>,
        skip: u64,
    },
    /// Ask the hub for another address.
    Resolve,
    Wait(Option<std::time::Duration>),
    Again(crate::Error),
    /// Another worker does it.
    Leave,
}

impl Fetch<'_> {
    /// Fetches a piece, however many answers it takes, and whatever of the file is finished by that.
    pub fn run(&self, mut work: Work) -> Result<()> {
        let fetched = self.fetch(&mut work);
        lock(&self.file.transfer).give_back(&work);
        fetched?;
        if let Ok(mut hashing) = self.file.hashing.try_lock() {
            self.hash(&mut hashing).map_err(self.subject().io(&self.file.partial.path))?;
        }
        self.conclude()
    }

    pub fn subject(&self) -> Subject {
        self.shared.subject(self.file.entry())
    }

    fn fetch(&self, work: &mut Work) -> Result<()> {
        let client = self.shared.client;
        let (subject, watch) = (self.subject(), self.shared.watch);
        let mut tries = Tries::new(&client.settings.patience);
        let mut luck = Luck::default();
        while !work.is_empty() {
            if self.shared.is_stopped() {
                return Err(subject.fails(Cause::GivenUp));
            }
            let size = self.file.entry().size;
            let asked = (work.from != 0 || work.to != size).then_some((work.from, work.to));
            let next = match self.ask(asked) {
                Ok((url, answer)) => self.look(&url, answer, asked, work, &mut luck)?,
                Err(error) => Next::Again(error),
            };
            let (url, mut answer, skip) = match next {
                Next::Take { url, answer, skip } => (url, answer, skip),
                Next::Resolve => continue,
                Next::Leave => return Ok(()),
                Next::Wait(pause) => {
                    client.pause(pause, &mut tries, &subject, watch)?;
                    continue;
                }
                Next::Again(error) => {
                    client.back_off(error, &mut tries, &subject, watch)?;
                    continue;
                }
            };
            match self.take(answer.body_mut(), work, skip, &host(&url))? {
                Taken::All => {}
                Taken::Superseded => return Ok(()),
                Taken::Part(cause, progress) => {
                    if progress {
                        tries.progress();
                        luck = Luck::default();
                    }
                    client.back_off(subject.fails(cause), &mut tries, &subject, watch)?;
                }
            }
        }
        Ok(())
    }

    /// What an answer is good for.
    fn look(
        &self,
        url: &str,
        mut answer: Response<Body>,
        asked: Option<(u64, u64)>,
        work: &mut Work,
        luck: &mut Luck,
    ) -> Result<Next> {
        let (client, subject) = (self.shared.client, self.subject());
        let (status, size) = (answer.status().as_u16(), self.file.entry().size);
        let broken = |cause: &str| {
            Next::Again(subject.fails(Cause::Broken { host: host(url), cause: cause.to_owned() }))
        };
        let range = header(answer.headers(), "content-range");
        let url = url.to_owned();
        Ok(match step(asked, size, status, range, answer.body().content_length()) {
            Step::Take => Next::Take { url, answer, skip: 0 },
            Step::Whole => match lock(&self.file.transfer).ignored(work) {
                Some(stream) => {
                    *work = stream;
                    Next::Take { url, answer, skip: work.from }
                }
                None => Next::Leave,
            },
            Step::Misplaced => broken("it sent another range than was asked for"),
            Step::Changed => {
                luck.changes += 1;
                self.forget(&url);
                let error = subject.fails(Cause::Changed { expected: size });
                match luck.changes > MOST_CHANGES {
                    true => return Err(error),
                    false => Next::Again(error),
                }
            }
            Step::Refused if status == 403 && !client.trusts(&url) => {
                let message = first_line(answer.body_mut());
                if std::mem::replace(&mut luck.resolved_again, true) {
                    return Err(subject.fails(Cause::StorageRefused { host: host(&url), message }));
                }
                // Its address is good for an hour or so; the hub gives another one.
                self.forget(&url);
                Next::Resolve
            }
            Step::Refused => match client.judge(answer, &subject)? {
                Judged::Wait(pause) => Next::Wait(pause),
                Judged::Again(error) => Next::Again(error),
                Judged::Good(_) => {
                    return Err(subject.fails(Cause::Unexpected { status, message: String::new() }));
                }
            },
        })
    }

    /// Asks the storage where it is known, else the hub, which sends the file or says where it lies. Returns who
    /// answered.
    fn ask(&self, range: Option<(u64, u64)>) -> Result<(String, Response<Body>)> {
        let client = self.shared.client;
        let (subject, entry) = (self.subject(), self.file.entry());
        // The second worker waits for the address that the first one gets.
        let mut storage = lock(&self.file.storage);
        let mut url = match &*storage {
            Some(url) => url.clone(),
            None => {
                let (repo, commit) = (self.shared.request.repo.path(), &self.shared.plan.commit);
                client.url(&format!("{repo}/resolve/{commit}/{}", quote(&entry.path, "/")))
            }
        };
        if storage.is_some() {
            drop(storage);
            let answer = client.once(&Ask::new(Method::GET, &url).range(range), &subject)?;
            return Ok((url, answer));
        }
        let mut is_hub = false;
        let no_commit =
            || subject.fails(client.no_hub("it does not say which commit it sends (X-Repo-Commit)"));
        for _ in 0..5 {
            let answer = client.once(&Ask::new(Method::GET, &url).range(range), &subject)?;
            let commit = header(answer.headers(), "x-repo-commit");
            is_hub |= commit == Some(&self.shared.plan.commit);
            if !answer.status().is_redirection() {
                let sends = matches!(answer.status().as_u16(), 200 | 206);
                return if sends && !is_hub { Err(no_commit()) } else { Ok((url, answer)) };
            }
            let to = header(answer.headers(), "location").and_then(|to| follow(&url, to));
            let to = to.ok_or_else(|| subject.fails(client.no_hub("it redirects to no address")))?;
            if client.trusts(&to) {
                url = to;
                continue;
            }
            if !is_hub {
                return Err(no_commit());
            }
            let etag = header(answer.headers(), "x-linked-etag").unwrap_or_default();
            if etag.trim().trim_start_matches("W/").trim_matches('"') != entry.oid.as_str() {
                return Err(subject.fails(Cause::BlindRedirect { host: host(&to) }));
            }
            *storage = Some(to.clone());
            drop(storage);
            let answer = client.once(&Ask::new(Method::GET, &to).range(range), &subject)?;
            return Ok((to, answer));
        }
        Err(subject.fails(client.no_hub("it redirects in circles")))
    }

    /// The storage's address is used no longer, unless another worker has got a new one meanwhile.
    fn forget(&self, url: &str) {
        let mut storage = lock(&self.file.storage);
        if storage.as_deref() == Some(url) {
            *storage = None;
        }
    }
}
