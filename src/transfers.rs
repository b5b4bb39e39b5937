//! Progress of transfers to and from a hub: bars on a terminal, one for all and one for each file that is under way;
//! plain lines elsewhere; both on stderr.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use gptq_hub::{Event, bytes};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Between two plain lines at least this much time passes.
const LINE_EVERY: Duration = Duration::from_secs(5);

pub struct Transfers {
    title: String,
    /// What a file is when it is done.
    done: &'static str,
    bars: Option<MultiProgress>,
    state: Mutex<State>,
}

struct State {
    started: Instant,
    last: Instant,
    files: usize,
    files_done: usize,
    /// Bytes in all, there by now, and there before.
    total: u64,
    done: u64,
    before: u64,
    all: Option<ProgressBar>,
    /// Of those under way: its bar, and the bytes that are there.
    each: HashMap<String, (Option<ProgressBar>, u64)>,
}

impl Transfers {
    /// Of files that arrive.
    pub fn arriving(title: &str) -> Self {
        Self::new(title, "verified")
    }

    /// Of files that are sent.
    pub fn leaving(title: &str) -> Self {
        Self::new(title, "sent")
    }

    fn new(title: &str, done: &'static str) -> Self {
        let now = Instant::now();
        let state = State {
            started: now,
            last: now,
            files: 0,
            files_done: 0,
            total: 0,
            done: 0,
            before: 0,
            all: None,
            each: HashMap::new(),
        };
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { title: title.to_owned(), done, bars, state: Mutex::new(state) }
    }

    pub fn show(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Plan { files, bytes: total } => {
                // Branches that are sent have a plan each.
                state.files += files;
                state.total += total;
                match (&self.bars, &state.all) {
                    (Some(_), Some(all)) => all.set_length(state.total),
                    (Some(bars), None) => state.all = Some(bars.add(bar(&self.title, total))),
                    (None, _) => note!("{}: {files} files, {}", self.title, bytes(total)),
                }
            }
            Event::Begin { file, size, done } => {
                let bar = self.bars.as_ref().filter(|_| size > 1 << 20).map(|bars| bars.add(bar(file, size)));
                if let Some(bar) = &bar {
                    bar.set_position(done);
                }
                state.each.insert(file.to_owned(), (bar, done));
                state.before += done;
                state.advance(done as i64);
            }
            Event::Bytes { file, count } => {
                if let Some((bar, there)) = state.each.get_mut(file) {
                    *there = there.saturating_add_signed(count);
                    if let Some(bar) = bar {
                        bar.set_position(*there);
                    }
                }
                state.advance(count);
                self.line(&mut state);
            }
            Event::Done { file, size } => {
                state.files_done += 1;
                if let Some((Some(bar), _)) = state.each.remove(file) {
                    bar.finish_and_clear();
                }
                if self.bars.is_none() {
                    note!("{file}: {}, {}", bytes(size), self.done);
                }
            }
            Event::Wait { pause } => {
                self.note(&format!("the hub asks to wait; going on in {:.0} s", pause.as_secs_f64().ceil()));
            }
            Event::Retry { subject, cause, attempt, of, pause } => {
                let when = match pause.is_zero() {
                    true => String::new(),
                    false => format!(" in {:.0} s", pause.as_secs_f64().ceil()),
                };
                self.note(&format!("{subject}{cause}; try {attempt} of {of}{when}"));
            }
            Event::Waiting { file } => self.note(&format!("{file}: another process is fetching it, waiting")),
            Event::Note(text) => self.note(text),
            _ => {}
        }
    }

    /// A line that stays.
    fn note(&self, text: &str) {
        match &self.bars {
            // Where it cannot be written it is lost, as every note.
            Some(bars) => drop(bars.println(text)),
            None => note!("{text}"),
        }
    }

    fn line(&self, state: &mut State) {
        if self.bars.is_some() || state.last.elapsed() < LINE_EVERY {
            return;
        }
        state.last = Instant::now();
        let rate = (state.done.saturating_sub(state.before)) as f64 / state.started.elapsed().as_secs_f64();
        let left = state.total.saturating_sub(state.done) as f64 / rate.max(1.0);
        note!(
            "{}: {}/{} files, {} of {}, {}/s, {left:.0} s left",
            self.title,
            state.files_done,
            state.files,
            bytes(state.done),
            bytes(state.total),
            bytes(rate as u64)
        );
    }
}

impl State {
    fn advance(&mut self, count: i64) {
        self.done = self.done.saturating_add_signed(count);
        if let Some(bar) = &self.all {
            bar.set_position(self.done);
        }
    }
}

impl Drop for Transfers {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let each = state.each.values().filter_map(|(bar, _)| bar.as_ref());
        each.chain(&state.all).for_each(ProgressBar::finish_and_clear);
    }
}

fn bar(title: &str, total: u64) -> ProgressBar {
    let template = "{prefix:.bold} [{bar:32}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ({eta} left)";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_prefix(title.to_owned())
}
