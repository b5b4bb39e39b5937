//! Running the real binary, one process at a time, and the artifacts that several tests share.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

/// Held while the program runs: tests run in parallel, and its processes use every core.
static CORES: Mutex<()> = Mutex::new(());

/// Calibration that takes a fraction of a second; tests of quality ask for more.
const SMALL: &str = "--samples 4 --seq-len 128";

pub fn alone() -> MutexGuard<'static, ()> {
    CORES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The small Llama that ships with the project.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo4m")
}

/// `train` or `test` text of the small Llama, as `--dataset` wants it.
pub fn demo_text(split: &str) -> String {
    format!("{}:{split}", demo().join("text").display())
}

/// A verb of the program, cut off from data sets and models of this machine.
pub fn gptq(verb: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gptq"));
    command
        .env_remove("RUST_LOG")
        .env_remove("GPTQ_DATASETS")
        .env("HF_HUB_CACHE", "/no-hub-cache")
        .env("HF_HUB_OFFLINE", "1")
        .arg(verb);
    command
}

/// Options as one types them.
pub fn words(options: &str) -> impl Iterator<Item = &str> {
    options.split_whitespace()
}

/// `gptq quantize` on the demo's train text, with a small calibration unless `options` ask for more.
pub fn quantize(model: &Path, out: &Path, options: &str) -> Command {
    let mut command = gptq("quantize");
    command.arg(model).arg("--out").arg(out).args(["--dataset", &demo_text("train")]).args(words(options));
    if !options.contains("--samples") {
        command.args(words(SMALL));
    }
    command
}

/// `gptq eval --json` on windows of the demo's test text.
pub fn perplexity(model: &Path) -> f64 {
    let mut command = gptq("eval");
    command.arg(model).args(["--dataset", &demo_text("test")]);
    run(command.args(words("--join raw --ctx 256 --max-windows 16 --json"))).json()["perplexity"]
        .as_f64()
        .unwrap()
}

/// What a process left.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

pub fn run(command: &mut Command) -> Run {
    let _cores = alone();
    command.output().unwrap().into()
}

/// The same, and the most memory in bytes that the process had at a time, looked at every few milliseconds. Addresses that it
/// never touched do not count: products set aside as many as the caches are large.
pub fn run_watched(command: &mut Command) -> (Run, usize) {
    let _cores = alone();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let kilobytes =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = kilobytes.map_or(peak, |kilobytes| peak.max(1024 * kilobytes.parse::<usize>().unwrap()));
        std::thread::sleep(Duration::from_millis(3));
    }
    (child.wait_with_output().unwrap().into(), peak)
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Run {
    /// Standard output of a success.
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    pub fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// The one error line. Nothing comes after it, but for the usage after a mistake in the options.
    pub fn refusal(self) -> String {
        assert!(matches!(self.code, Some(1 | 2)), "exit status {:?}: {}", self.code, self.stderr);
        let mut lines = self.stderr.lines();
        let errors: Vec<_> = lines.clone().filter(|line| line.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && !self.stderr.contains("panicked"), "{}", self.stderr);
        assert!(self.code == Some(2) || lines.next_back() == Some(errors[0]), "{}", self.stderr);
        errors[0].into()
    }
}

/// An empty folder of this name for one test.
pub fn workplace(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The demo quantized with these options, made once for all tests. Not to be changed by any of them.
pub fn artifact(options: &str) -> PathBuf {
    static MADE: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(dir) = made.get(options) {
        return dir.clone();
    }
    let name: String = options.split(|c: char| !c.is_ascii_alphanumeric()).collect::<Vec<_>>().join("_");
    let dir = workplace(&format!("artifact{name}")).join("model");
    run(&mut quantize(&demo(), &dir, options)).ok();
    made.insert(options.into(), dir.clone());
    dir
}

/// Copies the files of a folder into another one, which is made.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}
