//! What each worker fetches: the files that wait, those that are open, and the first failure, shared by all workers.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::store::{Place, Store};
use super::worker::{Fetch, OpenFile};
use super::{DownloadPlan, Request};
use crate::cache::lock::{self, Asked};
use crate::client::Client;
use crate::error::{Cause, Error, Result, Subject};
use crate::progress::{Event, Watch};
use crate::transfer::{Work, partial};
use crate::tree::Entry;

/// A file to fetch, and all names that it has in the snapshot.
pub(super) struct Job {
    pub entries: Vec<Entry>,
    pub place: Place,
    waiting: Option<Waiting>,
}

/// The process that is waited for: since when the other process's part of the file has not changed.
struct Waiting {
    since: Instant,
    seen: Option<(SystemTime, u64)>,
    asked: Instant,
}

#[derive(Default)]
struct Board {
    jobs: VecDeque<Job>,
    /// Jobs that a worker is opening.
    opening: usize,
    open: Vec<Arc<OpenFile>>,
    failure: Option<Error>,
}

/// What a worker does next.
enum Turn {
    Fetch(Arc<OpenFile>, Work),
    Open(Job),
    Wait,
    End,
}

pub(super) struct Shared<'a> {
    pub client: &'a Client,
    pub plan: &'a DownloadPlan,
    pub store: &'a Store,
    pub request: &'a Request,
    pub watch: &'a Watch<'a>,
    board: Mutex<Board>,
    changed: Condvar,
    stop: AtomicBool,
}

/// How long a worker without anything to do sleeps, where nothing wakes it.
const NAP: Duration = Duration::from_millis(100);

/// How often a lock that another process holds is asked for.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Fetches the entries with as many workers as the request says.
pub(super) fn fetch_all(
    client: &Client,
    plan: &DownloadPlan,
    missing: Vec<Entry>,
    store: &Store,
    request: &Request,
    watch: &Watch,
) -> Result<()> {
    let mut jobs: VecDeque<Job> = VecDeque::new();
    for entry in missing {
        let place = store.place(&entry);
        match jobs.iter_mut().find(|job| job.place.target == place.target) {
            Some(job) => job.entries.push(entry),
            None => jobs.push_back(Job { entries: vec![entry], place, waiting: None }),
        }
    }
    let workers = request.workers.max(1);
    let board = Mutex::new(Board { jobs, ..Board::default() });
    let shared =
        Shared { client, plan, store, request, watch, board, changed: Condvar::new(), stop: false.into() };
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| shared.work());
        }
    });
    match shared.board.into_inner().unwrap_or_else(PoisonError::into_inner).failure {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Shared<'_> {
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub fn subject(&self, entry: &Entry) -> Subject {
        Subject::revision(&self.request.repo, &self.request.revision).file(&entry.path)
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        loop {
            let done = match self.turn() {
                Turn::End => return,
                Turn::Wait => {
                    let board = self.lock();
                    // A wake-up that is missed costs a nap.
                    drop(self.changed.wait_timeout(board, NAP));
                    continue;
                }
                Turn::Fetch(file, work) => Fetch { shared: self, file: &file }.run(work),
                Turn::Open(job) => self.open(job),
            };
            if let Err(error) = done {
                self.fail(error);
            }
            self.changed.notify_all();
        }
    }

    fn fail(&self, error: Error) {
        let mut board = self.lock();
        let told = board.failure.as_ref().is_some_and(|failure| !matches!(*failure.cause, Cause::GivenUp));
        if !told {
            board.failure = Some(error);
        }
        self.stop.store(true, Ordering::Relaxed);
    }

    fn turn(&self) -> Turn {
        let mut board = self.lock();
        if self.is_stopped() {
            return Turn::End;
        }
        board.open.retain(|file| !file.is_finished());
        for file in &board.open {
            if let Some(work) = file.next() {
                return Turn::Fetch(file.clone(), work);
            }
        }
        let fresh = board.jobs.iter().position(|job| job.waiting.is_none());
        let due = fresh.or_else(|| board.jobs.iter().position(Job::is_due));
        match due.and_then(|index| board.jobs.remove(index)) {
            Some(job) => {
                board.opening += 1;
                Turn::Open(job)
            }
            None if board.jobs.is_empty() && board.open.is_empty() && board.opening == 0 => Turn::End,
            None => Turn::Wait,
        }
    }

    /// Takes a file's lock and begins it, or puts it back where another process has the lock.
    fn open(&self, job: Job) -> Result<()> {
        let result = self.try_open(job);
        let mut board = self.lock();
        board.opening -= 1;
        match result? {
            Opened::File(file) => board.open.push(file),
            Opened::Done => {}
            Opened::Later(job) => board.jobs.push_back(job),
        }
        Ok(())
    }

    fn try_open(&self, mut job: Job) -> Result<Opened> {
        let entry = job.entries[0].clone();
        let subject = self.subject(&entry);
        let at = |path: &PathBuf| subject.io(path);
        let lock = match lock::ask(&job.place.lock).map_err(at(&job.place.lock))? {
            Asked::Mine(lock) => Some(lock),
            Asked::Unknown => None,
            Asked::Held => {
                let has_grown = job.look();
                if has_grown {
                    (self.watch)(Event::Waiting { file: &entry.path });
                }
                match job.waiting.as_ref().map(|waiting| waiting.since.elapsed()) {
                    // No process works on it: a lock that outlived its holder, as network drives have them.
                    Some(still) if still >= self.client.settings.patience.lock => None,
                    _ => return Ok(Opened::Later(job)),
                }
            }
        };
        // Before the lock was ours, another process may have brought the file.
        if !self.request.force && self.is_brought(&job, &entry).map_err(at(&job.place.target))? {
            (self.watch)(Event::Begin { file: &entry.path, size: entry.size, done: entry.size });
            (self.watch)(Event::Done { file: &entry.path, size: entry.size });
            return Ok(Opened::Done);
        }
        let (folder, name) = (&job.place.partial_folder, &job.place.partial_name);
        let opened =
            partial::Partial::open(folder, name, entry.size, self.client.settings.piece, lock.is_some())
                .map_err(at(folder))?;
        let (partial, transfer) = opened;
        (self.watch)(Event::Begin { file: &entry.path, size: entry.size, done: transfer.done() });
        let file = Arc::new(OpenFile::new(job, lock, partial, transfer));
        // Nothing is left to fetch of an empty file, or of one whose last piece came just before a kill.
        Fetch { shared: self, file: &file }.conclude()?;
        Ok(Opened::File(file))
    }

    /// Whether another process has finished the file, and finished it well.
    fn is_brought(&self, job: &Job, entry: &Entry) -> std::io::Result<bool> {
        use super::store::Present;
        let there = self.store.is_present(entry, &self.plan.commit) != Present::No;
        if !there || !self.store.is_sound(entry, &self.plan.commit)? {
            return Ok(false);
        }
        job.entries.iter().try_for_each(|entry| self.store.settle(entry, &self.plan.commit))?;
        Ok(true)
    }
}

enum Opened {
    File(Arc<OpenFile>),
    Done,
    Later(Job),
}

impl Job {
    fn is_due(&self) -> bool {
        self.waiting.as_ref().is_none_or(|waiting| waiting.asked.elapsed() >= ASK_EVERY)
    }

    /// Looks whether the other process makes progress. True the first time.
    fn look(&mut self) -> bool {
        let start = format!("{}.", self.place.partial_name);
        let parts = std::fs::read_dir(&self.place.partial_folder).into_iter().flatten().flatten();
        let parts = parts.filter(|part| part.file_name().to_string_lossy().starts_with(&start));
        let seen = parts
            .filter_map(|part| part.metadata().ok())
            .filter_map(|m| Some((m.modified().ok()?, m.len())))
            .max();
        let first = self.waiting.is_none();
        match &mut self.waiting {
            Some(waiting) if waiting.seen == seen => waiting.asked = Instant::now(),
            waiting => *waiting = Some(Waiting { since: Instant::now(), seen, asked: Instant::now() }),
        }
        first
    }
}
