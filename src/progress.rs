//! Progress of long work: a bar on a terminal, plain lines elsewhere, both on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two plain lines at least this much time passes.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// One piece of long work with a known number of steps.
pub struct Progress {
    shown: Shown,
    title: String,
    started: Instant,
    total: u64,
    done: u64,
}

enum Shown {
    Bar(ProgressBar),
    Lines { last: Instant, message: String },
}

impl Progress {
    pub fn start(title: &str, total: u64) -> Self {
        let shown = match std::io::stderr().is_terminal() {
            true => Shown::Bar(bar(title, total)),
            false => {
                note!("{title} ...");
                Shown::Lines { last: Instant::now(), message: String::new() }
            }
        };
        Self { shown, title: title.into(), started: Instant::now(), total, done: 0 }
    }

    /// What is being done right now.
    pub fn message(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Bar(bar) => bar.set_message(text.to_string()),
            Shown::Lines { message, .. } => *message = text.to_string(),
        }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.println(text),
            Shown::Lines { .. } => note!("{text}"),
        }
    }

    pub fn advance(&mut self, steps: u64) {
        self.done += steps;
        match &mut self.shown {
            Shown::Bar(bar) => bar.inc(steps),
            Shown::Lines { last, message } if last.elapsed() >= LINE_EVERY => {
                *last = Instant::now();
                let each = self.started.elapsed().as_secs_f64() / self.done.max(1) as f64;
                let left = each * self.total.saturating_sub(self.done) as f64;
                note!("{} {}/{} {message}, {left:.0} s left", self.title, self.done, self.total);
            }
            Shown::Lines { .. } => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn bar(title: &str, total: u64) -> ProgressBar {
    let template = "{prefix} [{bar:32}] {pos}/{len} {msg} ({elapsed}, {eta} left)";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_prefix(title.to_string());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
