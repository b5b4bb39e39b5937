//! Fetching a part of a file: from the hub, or from the storage that it names, which never sees the token.

use std::io::{self, Read};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ureq::Body;
use ureq::http::{Method, Response};

use super::board::{Job, Shared};
use crate::address::{follow, quote};
use crate::cache::lock::Lock;
use crate::client::{Ask, Judged, Tries, first_line, header, host};
use crate::error::{Cause, Result, Subject};
use crate::oid::Hasher;
use crate::progress::Event;
use crate::transfer::partial::{Partial, discard};
use crate::transfer::{Step, Transfer, Work, step};
use crate::tree::Entry;

/// A file that is being fetched.
pub(super) struct OpenFile {
    job: Job,
    /// Held until the file is finished.
    _lock: Option<Lock>,
    partial: Partial,
    transfer: Mutex<Transfer>,
    hashing: Mutex<Hashing>,
    /// The storage's address, once the hub has named one.
    storage: Mutex<Option<String>>,
}

/// The hash of what is there without a gap.
struct Hashing {
    hasher: Hasher,
    upto: u64,
    finished: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

    fn entry(&self) -> &Entry {
        &self.job.entries[0]
    }
}

/// A worker at a file.
pub(super) struct Fetch<'a> {
    pub shared: &'a Shared<'a>,
    pub file: &'a OpenFile,
}

/// What a body came to.
enum Taken {
    All,
    /// It ended or broke before; with whether anything arrived.
    Part(Cause, bool),
    /// The file was begun anew by others.
    Superseded,
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

    fn subject(&self) -> Subject {
        self.shared.subject(self.file.entry())
    }

    fn fetch(&self, work: &mut Work) -> Result<()> {
        let client = self.shared.client;
        let (subject, watch) = (self.subject(), self.shared.watch);
        let size = self.file.entry().size;
        let mut tries = Tries::new(&client.settings.patience);
        let (mut changes, mut resolved_again) = (0, false);
        while !work.is_empty() {
            if self.shared.is_stopped() {
                return Err(subject.fails(Cause::GivenUp));
            }
            let asked = (work.from != 0 || work.to != size).then_some((work.from, work.to));
            let (url, mut answer) = match self.ask(asked) {
                Ok(answer) => answer,
                Err(error) => {
                    client.back_off(error, &mut tries, &subject, watch)?;
                    continue;
                }
            };
            let content_range = header(answer.headers(), "content-range").map(str::to_owned);
            let length = answer.body().content_length();
            let mut skip = 0;
            let failed = match step(asked, size, answer.status().as_u16(), content_range.as_deref(), length) {
                Step::Take => None,
                Step::Whole => match lock(&self.file.transfer).ignored(work) {
                    Some(stream) => {
                        skip = stream.from;
                        *work = stream;
                        None
                    }
                    None => return Ok(()),
                },
                Step::Changed => {
                    changes += 1;
                    self.forget(&url);
                    let error = subject.fails(Cause::Changed { expected: size });
                    if changes > 2 {
                        return Err(error);
                    }
                    Some(Cause::Broken { host: host(&url), cause: error.cause.to_string() })
                }
                Step::Misplaced => Some(Cause::Broken {
                    host: host(&url),
                    cause: "it sent another range than was asked for".into(),
                }),
                Step::Refused if !client.trusts(&url) && answer.status().as_u16() == 403 => {
                    let message = first_line(answer.body_mut());
                    if std::mem::replace(&mut resolved_again, true) {
                        return Err(subject.fails(Cause::StorageRefused { host: host(&url), message }));
                    }
                    // Its address is good for an hour or so; the hub gives another one.
                    self.forget(&url);
                    continue;
                }
                Step::Refused => match client.judge(answer, &subject)? {
                    Judged::Wait(pause) => {
                        client.pause(pause, &mut tries, &subject, watch)?;
                        continue;
                    }
                    Judged::Again(error) => {
                        client.back_off(error, &mut tries, &subject, watch)?;
                        continue;
                    }
                    Judged::Good(answer) => {
                        let status = answer.status().as_u16();
                        return Err(subject.fails(Cause::Unexpected { status, message: String::new() }));
                    }
                },
            };
            if let Some(cause) = failed {
                client.back_off(subject.fails(cause), &mut tries, &subject, watch)?;
                continue;
            }
            match self.take(answer.body_mut(), work, skip, &host(&url))? {
                Taken::All => {}
                Taken::Superseded => return Ok(()),
                Taken::Part(cause, progress) => {
                    if progress {
                        tries.progress();
                        (changes, resolved_again) = (0, false);
                    }
                    client.back_off(subject.fails(cause), &mut tries, &subject, watch)?;
                }
            }
        }
        Ok(())
    }

    /// Asks the storage where it is known, else the hub, which sends the file or says where it lies. Returns who
    /// answered.
    fn ask(&self, range: Option<(u64, u64)>) -> Result<(String, Response<Body>)> {
        let client = self.shared.client;
        let (subject, entry) = (self.subject(), self.file.entry());
        // Whoever comes second waits for the address that the first one gets.
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
        for _ in 0..5 {
            let answer = client.once(&Ask::new(Method::GET, &url).range(range), &subject)?;
            let commit = header(answer.headers(), "x-repo-commit");
            is_hub |= commit == Some(&self.shared.plan.commit);
            if !answer.status().is_redirection() {
                let sends = matches!(answer.status().as_u16(), 200 | 206);
                if sends && !is_hub {
                    return Err(
                        subject.fails(client.no_hub("it does not say which commit it sends (X-Repo-Commit)"))
                    );
                }
                return Ok((url, answer));
            }
            let to = header(answer.headers(), "location").and_then(|to| follow(&url, to));
            let to = to.ok_or_else(|| subject.fails(client.no_hub("it redirects to no address")))?;
            if client.trusts(&to) {
                url = to;
                continue;
            }
            let etag = header(answer.headers(), "x-linked-etag").unwrap_or_default();
            let etag = etag.trim().trim_start_matches("W/").trim_matches('"');
            if !is_hub || etag != entry.oid.as_str() {
                return Err(subject.fails(Cause::BlindRedirect { host: host(&to) }));
            }
            *storage = Some(to.clone());
            drop(storage);
            let answer = client.once(&Ask::new(Method::GET, &to).range(range), &subject)?;
            return Ok((to, answer));
        }
        Err(subject.fails(client.no_hub("it redirects in circles")))
    }

    /// The storage's address is used no longer, unless somebody has got another one meanwhile.
    fn forget(&self, url: &str) {
        let mut storage = lock(&self.file.storage);
        if storage.as_deref() == Some(url) {
            *storage = None;
        }
    }

    /// Writes a body to its place. `skip` bytes of it are there already.
    fn take(&self, body: &mut Body, work: &mut Work, mut skip: u64, host: &str) -> Result<Taken> {
        let broken = |cause: String| Cause::Broken { host: host.to_owned(), cause };
        let (file, entry) = (self.file, self.file.entry());
        let at = self.subject().io(&file.partial.path);
        let mut reader = body.as_reader();
        let mut buffer = vec![0; 256 << 10];
        let mut progress = false;
        loop {
            if self.shared.is_stopped() {
                return Err(self.subject().fails(Cause::GivenUp));
            }
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(Taken::Part(broken("it ended early".into()), progress)),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Taken::Part(broken(error.to_string()), progress)),
            };
            let skipped = skip.min(count as u64);
            skip -= skipped;
            let bytes = &buffer[skipped as usize..count];
            let most = bytes.len().min(usize::try_from(work.to - work.from).unwrap_or(usize::MAX));
            if most == 0 {
                continue;
            }
            file.partial.write_at(&bytes[..most], work.from).map_err(&at)?;
            {
                let mut transfer = lock(&file.transfer);
                let Some(whole) = transfer.arrived(work, most as u64) else { return Ok(Taken::Superseded) };
                whole.into_iter().try_for_each(|index| file.partial.mark(index)).map_err(&at)?;
            }
            progress = true;
            (self.shared.watch)(Event::Bytes { file: &entry.path, count: most as i64 });
            if work.is_empty() {
                // The end of a body that was read to it leaves the connection for the next piece.
                let _ = reader.read(&mut buffer[..1]);
                return Ok(Taken::All);
            }
        }
    }

    /// Takes the hash as far as there is no gap.
    fn hash(&self, hashing: &mut Hashing) -> io::Result<()> {
        loop {
            let upto = lock(&self.file.transfer).contiguous();
            if hashing.finished || upto <= hashing.upto {
                return Ok(());
            }
            let read = hashing.hasher.update_from(self.file.partial.read(hashing.upto, upto))?;
            if read != upto - hashing.upto {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            hashing.upto = upto;
        }
    }

    /// Where all of the file is there: verifies it and gives it its name, or begins it anew.
    pub fn conclude(&self) -> Result<()> {
        let (file, entry, subject) = (self.file, self.file.entry(), self.subject());
        if !lock(&file.transfer).is_complete() {
            return Ok(());
        }
        let mut hashing = lock(&file.hashing);
        // Another worker may have seen it first, and may have begun it anew.
        if hashing.finished || !lock(&file.transfer).is_complete() {
            return Ok(());
        }
        self.hash(&mut hashing).map_err(subject.io(&file.partial.path))?;
        let got = hashing.hasher.clone().finish();
        if got != entry.oid {
            return self.begin_anew(&mut hashing, got.to_string());
        }
        let settle = |entry: &Entry| self.shared.store.settle(entry, &self.shared.plan.commit);
        let finished = file.partial.finish(&file.job.place.target);
        finished
            .and_then(|()| file.job.entries.iter().try_for_each(settle))
            .map_err(subject.io(&file.job.place.target))?;
        hashing.finished = true;
        (self.shared.watch)(Event::Done { file: &entry.path, size: entry.size });
        Ok(())
    }

    fn begin_anew(&self, hashing: &mut Hashing, got: String) -> Result<()> {
        let (file, entry, subject) = (self.file, self.file.entry(), self.subject());
        let mut transfer = lock(&file.transfer);
        let again = transfer.begin_anew();
        let cause = Cause::Damaged { times: transfer.times_damaged(), expected: entry.oid.to_string(), got };
        if !again {
            discard(&file.partial.path);
            hashing.finished = true;
            return Err(subject.fails(cause));
        }
        file.partial
            .begin_anew(entry.size, self.shared.client.settings.piece)
            .map_err(subject.io(&file.partial.path))?;
        (hashing.hasher, hashing.upto) = (entry.oid.hasher(entry.size), 0);
        // The next address may lead to a sound copy.
        *lock(&file.storage) = None;
        let (attempt, pause) = (transfer.times_damaged() + 1, std::time::Duration::ZERO);
        (self.shared.watch)(Event::Retry { subject: &subject, cause: &cause, attempt, of: 3, pause });
        (self.shared.watch)(Event::Bytes { file: &entry.path, count: -(entry.size as i64) });
        Ok(())
    }
}
