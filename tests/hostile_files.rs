//! Model folders and data sets with files that no reader may wait for, believe or quote: a line of the error in time.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::{copy_folder, demo, workplace};

/// What the program says to arguments, within 10 s and 2 GB of address space.
fn refusal(args: &[&str]) -> String {
    let program = env!("CARGO_BIN_EXE_gptq");
    let started = Instant::now();
    let out = Command::new("sh")
        .args(["-c", "ulimit -v 3000000; exec timeout 20 \"$0\" \"$@\"", program])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8(out.stderr).unwrap();
    let took = started.elapsed();
    println!("{took:>8.1?} {error:.200}");
    assert_eq!(out.status.code(), Some(1), "{args:?}: {error:.500}");
    assert!(took < Duration::from_secs(10), "{args:?}: {took:?}");
    let last = error.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && last.chars().count() < 2100, "{args:?}: {last:.300}");
    last.to_owned()
}

/// A copy of the demo's model to be damaged.
fn model(name: &str) -> PathBuf {
    let folder = workplace(name).join("model");
    copy_folder(&demo(), &folder);
    folder
}

fn safetensors(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

#[test]
#[cfg(unix)]
fn nothing_waits_for_a_pipe_or_reads_a_device() {
    let names = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "quantize_config.json",
        "chat_template.jinja",
    ];
    for name in names {
        for kind in ["pipe", "device", "folder"] {
            let folder = model(&format!("hostile-{kind}"));
            let path = folder.join(name);
            let _ = fs::remove_file(&path);
            match kind {
                "pipe" => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
                "device" => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
                _ => fs::create_dir(&path).unwrap(),
            }
            let error = refusal(&[
                "generate",
                folder.to_str().unwrap(),
                "--prompt",
                "a",
                "--chat",
                "--max-new-tokens",
                "1",
            ]);
            assert!(error.contains(&format!("{name}: expected a plain file, got a {kind}")), "{error}");
        }
    }
}

#[test]
fn headers_and_indices_are_read_in_memory_near_their_size() {
    let entries = |bytes: usize| {
        let mut header = String::from("{");
        while header.len() < bytes {
            let n = header.len();
            header += &format!(r#""t{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#);
        }
        header.pop();
        header + "}"
    };
    let zeros =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{}0],"data_offsets":[0,0]}}}}"#, "0,".repeat(15 << 20));
    for (header, expected) in [
        (entries(100_000_000), "expected at most 33554432 bytes"),
        (zeros, "a: shape: expected a list of sizes"),
        (entries(33_000_000), ""),
    ] {
        let folder = model("hostile-headers");
        fs::write(folder.join("model.safetensors"), safetensors(&header)).unwrap();
        let error = refusal(&["generate", folder.to_str().unwrap(), "--prompt", "a"]);
        assert!(error.contains(expected), "{error}");
    }
    for (bytes, expected) in [(200 << 20, "expected at most 33554432 bytes"), (32 << 20, "x.safetensors: ")] {
        let folder = model("hostile-indices");
        fs::remove_file(folder.join("model.safetensors")).unwrap();
        let mut index = fs::File::create(folder.join("model.safetensors.index.json")).unwrap();
        let mut written = index.write(br#"{"weight_map":{"#).unwrap();
        for n in 0.. {
            if written + 100 > bytes {
                break;
            }
            written += index.write(format!(r#""{n}":"x.safetensors","#).as_bytes()).unwrap();
        }
        index.write_all(br#""a":"x.safetensors"}}"#).unwrap();
        let error = refusal(&["generate", folder.to_str().unwrap(), "--prompt", "a"]);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_files_say_is_quoted_shortly_and_two_values_of_a_key_are_refused() {
    let long = "x\\u001b[31m".repeat(100_000);
    let config = fs::read_to_string(demo().join("config.json")).unwrap();
    let with = |text: &str| config.replacen('{', &format!("{{{text},"), 1);
    for (name, text, expected) in [
        ("config.json", with(r#""hidden_size": 64"#), "hidden_size: expected once, got it twice"),
        ("config.json", format!(r#"{{"model_type": "{long}"}}"#), "is not supported"),
        ("config.json", format!(r#"{{"{long}": 1, "{long}": 2}}"#), "expected once"),
        ("config.json", format!(r#"{{"model_type": "llama", "hidden_size": "{long}"}}"#), "hidden_size: "),
        ("config.json", format!("{} ", " ".repeat(5 << 20)), "expected at most 4194304 bytes"),
        ("quantize_config.json", format!(r#"{{"bits": "{long}", "group_size": 128}}"#), "bits: "),
        (
            "model.safetensors.index.json",
            format!(r#"{{"weight_map": {{"{long}": "{long}"}}}}"#),
            "weight_map: ",
        ),
        (
            "tokenizer.json",
            format!(r#"{{"version": "1.0", "added_tokens": [], "model": {{"type": "{long}"}}}}"#),
            "tokenizer.json: ",
        ),
        ("tokenizer_config.json", format!(r#"{{"{long}_token": {{}}}}"#), "expected a string or an object"),
        ("chat_template.jinja", format!("{{{{ x | {} }}}}", "y".repeat(200_000)), "chat template: "),
        (
            "chat_template.jinja",
            format!("{{{{ raise_exception('{}') }}}}", "y".repeat(200_000)),
            "chat template: ",
        ),
        ("generation_config.json", format!(r#"{{"temperature": "{long}"}}"#), "temperature: "),
    ] {
        let folder = model("hostile-files");
        if name.ends_with("index.json") {
            fs::remove_file(folder.join("model.safetensors")).unwrap();
        }
        fs::write(folder.join(name), text).unwrap();
        let error = refusal(&[
            "generate",
            folder.to_str().unwrap(),
            "--prompt",
            "a",
            "--chat",
            "--max-new-tokens",
            "1",
        ]);
        assert!(error.contains(expected) && !error.contains('\u{1b}'), "{name}: {error}");
    }
}

#[test]
fn data_sets_that_expand_without_an_end_are_refused() {
    let folder = workplace("hostile-texts");
    let at = |name: &str| folder.join(name).display().to_string();
    let model = demo().display().to_string();
    let eval =
        |file: &str| refusal(&["eval", &model, "--dataset", file, "--ctx", "64", "--max-windows", "1"]);
    let pack = |name: &str, command: &str| {
        let made = Command::new("sh").args(["-c", &format!("{command} > '{}'", at(name))]).status().unwrap();
        assert!(made.success());
    };
    pack("bomb.txt.gz", "head -c 400000000 /dev/zero | tr '\\0' 'a' | gzip -1");
    pack(
        "bomb.jsonl.gz",
        "(printf '{\"text\": \"'; head -c 100000000 /dev/zero | tr '\\0' 'a'; echo '\"}') | gzip -1",
    );
    pack("blank.jsonl.gz", "head -c 400000000 /dev/zero | tr '\\0' '\\n' | gzip -1");
    pack(
        "row.json.gz",
        "(printf '[{\"text\": \"'; head -c 100000000 /dev/zero | tr '\\0' 'a'; echo '\"}]') | gzip -1",
    );
    for (name, expected) in [
        ("bomb.txt.gz", "compressed ones, got more"),
        ("bomb.jsonl.gz", "expected a row of at most 16777216 bytes"),
        ("blank.jsonl.gz", "compressed ones, got more"),
        ("row.json.gz", "expected a row of at most 16777216 bytes"),
    ] {
        assert!(eval(&at(name)).contains(expected), "{name}");
    }
    assert!(Command::new("mkfifo").arg(at("pipe.txt")).status().unwrap().success());
    // No file that could be one is found.
    assert!(eval(&at("pipe.txt")).contains("not found"));
}
