//! Calls of libraries that may panic, recurse deeply or take long on untrusted input, on a thread of their own: its stack
//! has a known size, a panic becomes an error, and the caller waits up to a deadline.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::short;

/// Threads that may go on after their caller's deadline; beyond these nothing new is begun.
const MOST_LEFT_BEHIND: usize = 16;

static LEFT_BEHIND: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread with a stack of `stack` bytes and waits for `deadline` at most. The thread of work that is
/// late goes on until it ends by itself: it has to have bounds of its own.
///
/// # Errors
/// One line: the panic's message, the deadline, or why no thread was started.
pub fn apart<T: Send + 'static>(
    stack: usize,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let left_behind = LEFT_BEHIND.load(Ordering::Relaxed);
    if left_behind >= MOST_LEFT_BEHIND {
        return Err(format!("{left_behind} others have passed their deadline and still run"));
    }
    let (done, result) = mpsc::channel();
    let late = std::sync::Arc::new(AtomicUsize::new(0));
    let is_late = late.clone();
    let run = move || {
        let value = quietly(work);
        // Both sides set `late`: the second one sees that the first was there.
        if is_late.swap(1, Ordering::AcqRel) == 1 {
            LEFT_BEHIND.fetch_sub(1, Ordering::Relaxed);
        }
        done.send(value).ok();
    };
    let spawned = thread::Builder::new().name("apart".into()).stack_size(stack).spawn(run);
    spawned.map_err(|cause| format!("no thread for it: {cause}"))?;
    match result.recv_timeout(deadline) {
        Ok(value) => value,
        Err(RecvTimeoutError::Disconnected) => Err("its thread ended without a result".into()),
        Err(RecvTimeoutError::Timeout) => {
            LEFT_BEHIND.fetch_add(1, Ordering::Relaxed);
            if late.swap(1, Ordering::AcqRel) == 1 {
                LEFT_BEHIND.fetch_sub(1, Ordering::Relaxed);
            }
            Err(format!("not done after {} s", deadline.as_secs()))
        }
    }
}

/// Runs `work` here; a panic is returned, and nothing is printed of it.
pub fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                others(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    result.map_err(|panic| format!("panicked: {}", message(&*panic)))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    short(text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_panic_and_a_deadline_are_errors_of_the_caller() {
        assert_eq!(apart(1 << 20, SECOND, || 7), Ok(7));
        let panicked = apart(1 << 20, SECOND, || -> () { panic!("index {}\nis bad", 3) });
        assert_eq!(panicked.unwrap_err(), "panicked: index 3\\nis bad");
        let late = apart(1 << 20, Duration::from_millis(10), || thread::sleep(Duration::from_millis(200)));
        assert!(late.unwrap_err().starts_with("not done after"));
        thread::sleep(Duration::from_millis(400));
        assert_eq!(LEFT_BEHIND.load(Ordering::Relaxed), 0);
    }
}
