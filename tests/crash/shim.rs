//! Running the program with `shim.c` between it and the C library.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What happens at the chosen operation; `shim.c` says what each does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Kill,
    Torn,
    Eio,
    Enospc,
    Short,
}

impl How {
    pub const ALL: [Self; 5] = [Self::Kill, Self::Torn, Self::Eio, Self::Enospc, Self::Short];

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Torn => "torn",
            Self::Eio => "EIO",
            Self::Enospc => "ENOSPC",
            Self::Short => "short",
        }
    }
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    Well,
    Killed,
    /// With one line about it.
    Refused(String),
}

pub struct Shim(PathBuf);

impl Shim {
    pub fn build(dir: &Path) -> Self {
        let library = dir.join("shim.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crash/shim.c");
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]);
        let built = cc.arg(&library).arg(source).arg("-ldl").status();
        assert!(built.expect("the crash tests need a C compiler, cc").success());
        Self(library)
    }

    /// Operations that the command does below `under`.
    pub fn count(&self, mut command: Command, under: &Path) -> usize {
        let counted = under.with_extension("count");
        self.attach(&mut command, under).env("CRASH_COUNT", &counted);
        assert_eq!(ended(&command.output().unwrap()).unwrap(), Ended::Well);
        fs::read_to_string(counted).unwrap().parse().unwrap()
    }

    /// Runs the command; `how` happens at operation `at` below `under`.
    pub fn run(&self, mut command: Command, under: &Path, at: usize, how: How) -> Result<Ended, String> {
        self.attach(&mut command, under).env("CRASH_AT", at.to_string()).env("CRASH_HOW", how.name());
        ended(&command.output().unwrap())
    }

    fn attach<'a>(&self, command: &'a mut Command, under: &Path) -> &'a mut Command {
        command.env("LD_PRELOAD", &self.0).env("CRASH_UNDER", under)
    }
}

/// Runs the command as it is.
pub fn run(mut command: Command) -> Result<Ended, String> {
    ended(&command.output().unwrap())
}

fn ended(output: &Output) -> Result<Ended, String> {
    const SIGKILL: i32 = 9;
    let text = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<_> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    match (output.status.code(), output.status.signal(), &errors[..]) {
        (Some(0), ..) => Ok(Ended::Well),
        (_, Some(SIGKILL), _) => Ok(Ended::Killed),
        (Some(1), _, [error]) if text.lines().next_back() == Some(error) => {
            Ok(Ended::Refused(error.to_string()))
        }
        _ => Err(format!("{}: {text}", output.status)),
    }
}
