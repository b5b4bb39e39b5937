//! Threads that stand ready for short work.
//!
//! A product of one token takes less time than waking a sleeping thread. The team's threads therefore look for the next
//! piece of work for a while before they go to sleep, and the caller begins at once, with those that come: a
//! thread that was put aside by the system delays no other.
//!
//! Every thread has a share of the pieces, one after the other, and helps with other shares when it is through: memory
//! that is read in long stretches comes half as fast again as in short ones that threads take in turns.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work before it sleeps: longer than what lies between two products of a token.
const WATCH: Duration = Duration::from_micros(100);

/// Looks at the work between two looks at the clock.
const LOOKS: usize = 64;

/// Of [`Team::state`]: the number of the piece of work, whether threads may join it, how many are at it.
const NUMBER: u64 = 1 << 32;
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;

/// `work(i)` for every `i` below `count`, on as many threads as the machine has. In which order is not known.
pub(crate) fn for_each(count: usize, work: impl Fn(usize) + Sync) {
    static TEAM: OnceLock<&'static Team> = OnceLock::new();
    match count {
        0 => {}
        1 => work(0),
        _ => TEAM.get_or_init(|| Team::start(rayon::current_num_threads() - 1)).run(count, &work),
    }
}

struct Team {
    state: AtomicU64,
    work: UnsafeCell<Option<Work>>,
    /// Of every thread's share, the next `i` that is not taken yet; the caller's comes first.
    next: Vec<AtomicUsize>,
    failed: AtomicBool,
    /// The team is taken by a caller.
    taken: AtomicBool,
    asleep: AtomicU32,
    members: OnceLock<Vec<Thread>>,
}

#[derive(Clone, Copy)]
struct Work {
    /// Lives for as long as threads can join, and those that have joined are at it.
    each: &'static (dyn Fn(usize) + Sync),
    count: usize,
}

// SAFETY: `work` is written only while no thread can join, by the one who has `taken` the team.
unsafe impl Sync for Team {}

impl Team {
    fn start(others: usize) -> &'static Self {
        let team: &'static Self = Box::leak(Box::new(Self {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            next: (0..=others).map(|_| AtomicUsize::new(0)).collect(),
            failed: AtomicBool::new(false),
            taken: AtomicBool::new(false),
            asleep: AtomicU32::new(0),
            members: OnceLock::new(),
        }));
        let member = |i| {
            let member = thread::Builder::new().name(format!("gptq-team-{i}"));
            // A thread that the system does not give is one less.
            member.spawn(move || team.serve(i + 1)).ok().map(|handle| handle.thread().clone())
        };
        team.members.get_or_init(|| (0..others).filter_map(member).collect());
        team
    }

    /// A caller that finds the team busy, or is part of it, works alone.
    fn run(&self, count: usize, each: &(dyn Fn(usize) + Sync)) {
        if self.taken.swap(true, Acquire) {
            return (0..count).for_each(each);
        }
        // SAFETY: only the lifetime changes, and no thread runs `each` when this function ends.
        let work =
            Work { each: unsafe { std::mem::transmute::<&_, &'static (dyn Fn(usize) + Sync)>(each) }, count };
        // SAFETY: the team is taken, and closed.
        unsafe { *self.work.get() = Some(work) };
        self.next.iter().enumerate().for_each(|(i, next)| next.store(self.share(i, count).start, Relaxed));
        self.failed.store(false, Relaxed);
        self.state.store((self.state.load(Relaxed) & !(NUMBER - 1)).wrapping_add(NUMBER) | OPEN, SeqCst);
        if self.asleep.load(SeqCst) > 0 {
            self.members.get().into_iter().flatten().for_each(Thread::unpark);
        }
        self.take_part(work, 0);
        self.state.fetch_and(!OPEN, AcqRel);
        let mut looks = 0;
        while self.state.load(Acquire) & JOINED > 0 {
            looks += 1;
            if looks % LOOKS == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let failed = self.failed.load(Relaxed);
        self.taken.store(false, Release);
        assert!(!failed, "a thread of the team panicked");
    }

    /// What thread `i` of the team begins with.
    fn share(&self, i: usize, count: usize) -> Range<usize> {
        i * count / self.next.len()..(i + 1) * count / self.next.len()
    }

    /// Takes one piece after the other: of the thread's own share, then of those that are left of others. A panic is kept
    /// until all threads have left.
    fn take_part(&self, Work { each, count }: Work, own: usize) {
        let pieces = || {
            for share in (own..self.next.len()).chain(0..own) {
                let (next, end) = (&self.next[share], self.share(share, count).end);
                while next.load(Relaxed) < end {
                    let i = next.fetch_add(1, Relaxed);
                    if i < end {
                        each(i);
                    }
                }
            }
        };
        if catch_unwind(AssertUnwindSafe(pieces)).is_err() {
            self.next.iter().for_each(|next| next.store(count, Relaxed));
            self.failed.store(true, Relaxed);
        }
    }

    /// What a member does all its life.
    fn serve(&self, own: usize) {
        let mut last = 0;
        loop {
            let state = self.wait_for_work(last);
            if self.state.compare_exchange(state, state + 1, AcqRel, Relaxed).is_err() {
                continue;
            }
            last = state / NUMBER;
            // SAFETY: the work cannot be exchanged while a thread has joined it.
            if let Some(work) = unsafe { *self.work.get() } {
                self.take_part(work, own);
            }
            self.state.fetch_sub(1, AcqRel);
        }
    }

    /// The state of work that is open, other than number `last`.
    fn wait_for_work(&self, last: u64) -> u64 {
        let open = || Some(self.state.load(SeqCst)).filter(|s| s & OPEN > 0 && s / NUMBER != last);
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if let Some(state) = open() {
                    return state;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > WATCH {
                self.asleep.fetch_add(1, SeqCst);
                let state = open();
                if state.is_none() {
                    thread::park();
                }
                self.asleep.fetch_sub(1, SeqCst);
                if let Some(state) = state.or_else(open) {
                    return state;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_piece_is_done_once(count: usize) {
        let done: Vec<_> = (0..count).map(|_| AtomicU32::new(0)).collect();
        for_each(count, |i| {
            done[i].fetch_add(1, Relaxed);
        });
        assert!(done.iter().all(|done| done.load(Relaxed) == 1), "{count} pieces");
    }

    #[test]
    fn every_piece_is_done_once_whatever_their_number() {
        for round in 0..2000 {
            every_piece_is_done_once(round % 70);
        }
        thread::sleep(2 * WATCH);
        every_piece_is_done_once(9);
    }

    #[test]
    fn work_within_work_and_beside_it_is_done() {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| for_each(5, |_| every_piece_is_done_once(7))));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        for _ in 0..20 {
            let failed = catch_unwind(|| for_each(50, |i| assert!(i != 20, "on purpose")));
            assert!(failed.is_err());
            every_piece_is_done_once(50);
        }
    }
}
