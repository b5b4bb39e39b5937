//! Puts the commit into `gptq --version`, where the sources come from a git checkout, and says which tests can run.

use std::process::Command;

fn main() {
    gptq_present::tell();
    println!("cargo:rustc-check-cfg=cfg(can_mount)");
    let mut in_namespace = Command::new("unshare");
    in_namespace.args(["--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/mnt"]);
    if in_namespace.output().is_ok_and(|out| out.status.success()) {
        println!("cargo:rustc-cfg=can_mount");
    }
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
