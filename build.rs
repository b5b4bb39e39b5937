//! Puts the commit into `gptq --version`, where the sources come from a git checkout.

use std::process::Command;

fn main() {
    let commit = Command::new("git").args(["rev-parse", "--short=9", "HEAD"]).output().ok();
    let commit = commit.filter(|out| out.status.success()).and_then(|out| String::from_utf8(out.stdout).ok());
    let version = env!("CARGO_PKG_VERSION");
    match commit {
        Some(commit) => println!("cargo:rustc-env=GPTQ_VERSION={version} ({})", commit.trim()),
        None => println!("cargo:rustc-env=GPTQ_VERSION={version}"),
    }
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/refs/heads");
}
