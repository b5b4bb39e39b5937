//! For the build scripts of crates whose tests need what not every machine has. A test that lacks it is ignored, with the
//! reason, and not counted as passed; `--include-ignored` runs it all the same, and then it fails.

#![forbid(unsafe_code)]

use std::env;
use std::path::Path;

/// Sets `has_cuda`, `has_nvrtc` and `has_shared` for the crate that is built.
pub fn tell() {
    let is_set = |name: &str| {
        println!("cargo:rerun-if-env-changed={name}");
        env::var_os(name).is_some_and(|value| !value.is_empty())
    };
    let cuda = is_set("REQUIRE_CUDA") || Path::new("/dev/nvidiactl").exists();
    let found = [
        ("has_cuda", cuda),
        ("has_nvrtc", is_set("REQUIRE_NVRTC") || cuda),
        ("has_shared", is_set("GPTQ_SHARED")),
    ];
    for (name, found) in found {
        println!("cargo:rustc-check-cfg=cfg({name})");
        if found {
            println!("cargo:rustc-cfg={name}");
        }
    }
}
