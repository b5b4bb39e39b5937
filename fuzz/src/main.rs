//! Damages small sound files in many ways and reads them: the readers may refuse, and must not panic, hang or take
//! all memory. `cargo run --release -p gptq-fuzz -- SECONDS [SEED] [TARGET]` gives every target so many seconds.
//!
//! There is no coverage feedback: that needs a build of every dependency with other flags. Instead the mutations know
//! JSON, so that damage gets past the parser and to the readers.

#![forbid(unsafe_code)]

mod mutate;
mod targets;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::targets::{TARGETS, Target};

/// In the environment of a process that runs one target: the file for the present input, which outlives a crash.
const CURRENT: &str = "GPTQ_FUZZ_CURRENT";
/// An input that takes longer is a finding.
const SLOW: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let number = |i: usize, default: u64| args.get(i).map_or(Some(default), |arg| arg.parse().ok());
    let (Some(seconds), Some(seed)) = (number(0, 10), number(1, 0)) else {
        eprintln!("expected SECONDS [SEED] [TARGET]");
        return ExitCode::FAILURE;
    };
    let time = Duration::from_secs(seconds);
    if let Some(current) = env::var_os(CURRENT) {
        let target = TARGETS.iter().find(|target| args.get(2).is_some_and(|name| name == target.name));
        let sound = target.is_some_and(|target| run(target, time, seed, Path::new(&current)));
        return if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let chosen = |target: &&Target| args.get(2).is_none_or(|name| name == target.name);
    let all = TARGETS.iter().filter(chosen).map(|target| apart(target.name, seconds, seed));
    if all.collect::<Vec<_>>().into_iter().all(|sound| sound) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs one target in a process of its own, so that an input that ends the process is known and the other targets
/// still run. A machine ends processes too, short of memory for one: the same inputs once more tell the two apart.
fn apart(target: &str, seconds: u64, seed: u64) -> bool {
    let mut status = process_for(target, seconds, seed);
    if status.signal().is_some() {
        eprintln!("{target}: the same inputs again");
        status = process_for(target, 2 * seconds, seed);
    }
    status.success()
}

fn process_for(target: &str, seconds: u64, seed: u64) -> ExitStatus {
    let current = place().join(format!("gptq-fuzz-{}", process::id()));
    let program = env::current_exe().expect("the path of this program");
    let args = [seconds.to_string(), seed.to_string(), target.into()];
    let status =
        Command::new(program).args(args).env(CURRENT, &current).status().expect("a process for the target");
    let input = fs::read(&current);
    // Not there where the target did not begin.
    let _ = fs::remove_file(&current);
    if let Some(signal) = status.signal() {
        let input = input.unwrap_or_default();
        let length = input.first_chunk().map_or(0, |length| u64::from_le_bytes(*length) as usize);
        let input = input.get(8..).and_then(|input| input.get(..length)).unwrap_or_default();
        eprintln!(
            "{target}: ended by signal {signal}, seed {seed}; the input is {}: {}",
            keep(target, input),
            input.escape_ascii()
        );
    }
    status
}

/// Memory, where there is a folder for it, else the disk.
pub(crate) fn place() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.into() } else { env::temp_dir() }
}

/// Whether no input was a finding. One that is stays in `target/fuzz`.
fn run(target: &Target, time: Duration, seed: u64, current: &Path) -> bool {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let seeds = match read_all(&corpus) {
        Ok(seeds) if !seeds.is_empty() => seeds,
        _ => {
            eprintln!("{}: no seeds in {}", target.name, corpus.display());
            return false;
        }
    };
    let (started, mut rng) = (Instant::now(), ChaCha20Rng::seed_from_u64(seed));
    let watch = Watch::start(target.name);
    let current = File::create(current).expect("a file for the present input");
    let (mut inputs, mut accepted, mut findings) = (0, 0, 0);
    let mut check = |input: &[u8]| {
        watch.begin(input);
        let whole = [&(input.len() as u64).to_le_bytes()[..], input].concat();
        current.write_all_at(&whole, 0).expect("the present input in its file");
        let read = panic::catch_unwind(AssertUnwindSafe(|| (target.read)(input)));
        watch.end();
        inputs += 1;
        match read {
            Ok(sound) => accepted += u64::from(sound),
            Err(_) => {
                findings += 1;
                eprintln!("{}: panicked; the input is {}", target.name, keep(target.name, input));
            }
        }
        findings < 10
    };
    let all_seeds = seeds.iter().all(|seed| check(seed));
    while all_seeds && started.elapsed() < time && check(&mutate::mutated(&mut rng, &seeds)) {}
    println!(
        "{:<18} {inputs:>8} inputs, {accepted} read, the others refused, {findings} findings",
        target.name
    );
    findings == 0
}

fn read_all(folder: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut paths =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    paths.iter().map(fs::read).collect()
}

/// Writes a finding to `target/fuzz`; returns where.
fn keep(target: &str, input: &[u8]) -> String {
    let hash = input.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let folder = Path::new("target/fuzz");
    let path = folder.join(format!("{target}-{hash:016x}"));
    match fs::create_dir_all(folder).and_then(|()| fs::write(&path, input)) {
        Ok(()) => path.display().to_string(),
        Err(cause) => format!("lost ({cause})"),
    }
}

/// Ends the process where one input takes too long, and keeps it.
struct Watch {
    epoch: Instant,
    /// Milliseconds since `epoch` at which the present input began, plus 1; 0 between inputs.
    began: &'static AtomicU64,
    input: &'static std::sync::Mutex<Vec<u8>>,
}

impl Watch {
    fn start(target: &'static str) -> Self {
        let epoch = Instant::now();
        let (began, input) = (Box::leak(Box::default()), Box::leak(Box::default()));
        let watch = Self { epoch, began, input };
        let (began, input): (&AtomicU64, &std::sync::Mutex<Vec<u8>>) = (watch.began, watch.input);
        thread::spawn(move || {
            loop {
                thread::sleep(Duration::from_millis(500));
                let since = began.load(Ordering::SeqCst);
                let now = epoch.elapsed().as_millis() as u64;
                if since != 0 && now.saturating_sub(since) > SLOW.as_millis() as u64 {
                    let kept = input.lock().map(|input| keep(target, &input)).unwrap_or_default();
                    eprintln!("{target}: slower than {SLOW:?}; the input is {kept}");
                    process::exit(1);
                }
            }
        });
        watch
    }

    fn begin(&self, input: &[u8]) {
        if let Ok(mut kept) = self.input.lock() {
            kept.clear();
            kept.extend_from_slice(input);
        }
        self.began.store(self.epoch.elapsed().as_millis() as u64 + 1, Ordering::SeqCst);
    }

    fn end(&self) {
        self.began.store(0, Ordering::SeqCst);
    }
}
