//! SIGINT and SIGTERM while artifacts are made: the work ends at the next safe point, and a second signal ends it at once.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Once};

use anyhow::{Context, Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// From now on signals only set what is returned. To be called where there is something to lose.
pub fn on_signals() -> Result<&'static AtomicBool> {
    static REGISTER: Once = Once::new();
    let mut registered = Ok(());
    REGISTER.call_once(|| registered = register());
    registered.context("signals")?;
    Ok(&ASKED)
}

fn register() -> std::io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // In this order the first signal does not find its own mark.
        flag::register_conditional_default(signal, ASKED.clone())?;
        flag::register_usize(signal, SIGNAL.clone(), signal as usize)?;
        flag::register(signal, ASKED.clone())?;
    }
    Ok(())
}

/// Whether a signal has come.
pub fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Work that ended because of a signal.
#[derive(Debug)]
pub struct Stopped(usize);

impl Stopped {
    /// As a shell counts a process that a signal has ended.
    pub fn exit_status(&self) -> u8 {
        u8::try_from(128 + self.0).unwrap_or(u8::MAX)
    }
}

impl Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = if self.0 == SIGTERM as usize { "SIGTERM" } else { "SIGINT" };
        write!(f, "stopped by {name}; the same command with --resume goes on")
    }
}

/// Says of work that was stopped how to go on.
pub fn advise(error: Error) -> Error {
    let stopped = error.chain().any(|cause| {
        use gptq_quantizer::Error as Quantizer;
        let quantizer = cause.downcast_ref();
        matches!(
            quantizer,
            Some(Quantizer::Stopped { .. } | Quantizer::Runtime(gptq_runtime::Error::Stopped))
        ) || matches!(cause.downcast_ref(), Some(gptq_runtime::Error::Stopped))
    });
    match stopped {
        true => error.context(Stopped(SIGNAL.load(Ordering::Relaxed))),
        false => error,
    }
}
