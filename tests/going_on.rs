//! What a run that goes on may not mix, what it may not forget, and how a run is asked to end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::interruption::{OPTIONS, assert_same, journal, journal_lines, signal, started};
use crate::program::{alone, artifact, copy_folder, demo, demo_text, gptq, quantize, run, words, workplace};

/// Replaces one text by another in a file.
fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {}", path.display());
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn another_model_device_or_version_cannot_resume_a_run() {
    let work = workplace("other-models");
    let (model, out) = (work.join("model"), work.join("q4"));
    copy_folder(&demo(), &model);
    let mut child = {
        let _cores = alone();
        let mut command = quantize(&model, &out, OPTIONS);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while journal_lines(&out).len() < 2 {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child
    };
    child.wait().unwrap();
    let refused = |named: &str| {
        let line = run(&mut quantize(&model, &out, &format!("{OPTIONS} --resume"))).refusal();
        assert!(line.contains("cannot resume") && line.contains(named), "{named} is not in: {line}");
    };
    for (key, other) in [("rms_norm_eps", "1.5e-3"), ("rope_theta", "12345.0")] {
        let path = model.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = serde_json::from_str(other).unwrap();
        fs::write(&path, config.to_string()).unwrap();
        refused(&format!("config.json {key}"));
        fs::copy(demo().join("config.json"), &path).unwrap();
    }
    // One bit of one value in the middle of the weights.
    let path = model.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    refused("weights");
    fs::copy(demo().join("model.safetensors"), &path).unwrap();
    edit(&model.join("tokenizer_config.json"), "8192", "4096");
    refused("tokenizer_config.json");
    fs::copy(demo().join("tokenizer_config.json"), model.join("tokenizer_config.json")).unwrap();
    for (mine, other, named) in [
        ("\"arithmetic\":\"CPU, f32\"", "\"arithmetic\":\"nvidia h200, bf16\"", "arithmetic"),
        ("\"numerics\":", "\"numerics\":99", "numerics"),
    ] {
        let before = fs::read(journal(&out)).unwrap();
        edit(&journal(&out), mine, other);
        refused(named);
        fs::write(journal(&out), before).unwrap();
    }
    run(&mut quantize(&model, &out, &format!("{OPTIONS} --resume"))).ok();
    assert_eq!(fs::read_dir(&work).unwrap().count(), 2, "the model and the artifact");
}

fn log(artifact: &Path) -> Value {
    serde_json::from_slice(&fs::read(artifact.join("quantize_log.json")).unwrap()).unwrap()
}

#[test]
fn a_measurement_that_was_interrupted_is_made_by_resume() {
    let work = workplace("measuring");
    let (out, plan) = (work.join("out"), work.join("plan.toml"));
    fs::write(&plan, "[[branch]]\nname = \"main\"\nbits = 4\n[[branch]]\nname = \"q8\"\nbits = 8\n").unwrap();
    let branches = |options: &str| {
        let mut command = gptq("branches");
        command
            .arg(demo())
            .arg("--out")
            .arg(&out)
            .arg("--plan")
            .arg(&plan)
            .args(["--dataset", &demo_text("train")]);
        command.args(words("--samples 4 --seq-len 128")).args(["--eval-dataset", &demo_text("test")]);
        command.args(words(options));
        command
    };
    for branch in ["main", "q8"] {
        let _cores = alone();
        let options = if branch == "main" { "" } else { "--resume" };
        let mut child = branches(options).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !out.join(branch).exists() {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(log(&out.join(branch))["evaluation"].is_null(), "killed before it was measured");
    }
    let rows = run(&mut branches("--resume --json")).json();
    for row in rows.as_array().unwrap() {
        assert!(row["perplexity"].as_f64().is_some() && row["kl_divergence"].as_f64().is_some(), "{row}");
    }
    let before = [log(&out.join("main")), log(&out.join("q8"))];
    let rerun = run(&mut branches("--resume"));
    assert!(!rerun.stderr.contains(", measuring"), "nothing is measured twice: {}", rerun.stderr);
    rerun.ok();
    assert_eq!([log(&out.join("main")), log(&out.join("q8"))], before);
}

#[test]
fn a_measurement_on_another_text_is_another_measurement() {
    let out = workplace("measured").join("q4");
    let measured = |split: &str, options: &str| {
        let mut command = quantize(&demo(), &out, options);
        run(command.args(["--eval-dataset", &demo_text(split)])).ok();
        log(&out)
    };
    let test = measured("test", OPTIONS);
    let train = measured("train", &format!("{OPTIONS} --resume"));
    assert_ne!(test["evaluation"]["perplexity"], train["evaluation"]["perplexity"]);
    assert_eq!(test["layers"], train["layers"], "only measured again");
    assert!(fs::read_to_string(out.join("README.md")).unwrap().contains(":train, rows joined"));
    let bytes = fs::read(out.join("quantize_log.json")).unwrap();
    measured("train", &format!("{OPTIONS} --resume"));
    assert!(fs::read(out.join("quantize_log.json")).unwrap() == bytes, "the very bytes");
}

#[test]
fn a_signal_ends_a_run_at_a_safe_point_and_it_says_how_to_go_on() {
    for (name, status) in [("-INT", 130), ("-TERM", 143)] {
        let out: PathBuf = workplace(&format!("signal{name}")).join("q4");
        let (mut child, ended) = {
            let _cores = alone();
            let mut command = quantize(&demo(), &out, OPTIONS);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            while journal_lines(&out).len() < 2 {
                assert!(child.try_wait().unwrap().is_none());
                std::thread::sleep(Duration::from_millis(1));
            }
            signal(&child, name);
            let ended = child.wait().unwrap();
            (child, ended)
        };
        assert_eq!(ended.code(), Some(status));
        let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        let line = said.lines().next_back().unwrap();
        assert!(line.contains("--resume goes on") && line.contains(" of 4 layers are done"), "{said}");
        assert!(journal_lines(&out).len() >= 2 && !out.exists());
        run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume"))).ok();
        assert_same(&out, &artifact(OPTIONS));
    }
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let out = workplace("second-signal").join("q4");
    let status = {
        let _cores = alone();
        let mut child = started(&out, OPTIONS, 1);
        // Stopped, it finds both when it goes on.
        signal(&child, "-STOP");
        signal(&child, "-TERM");
        signal(&child, "-CONT");
        std::thread::sleep(Duration::from_millis(5));
        signal(&child, "-TERM");
        child.wait().unwrap()
    };
    assert_ne!(status.code(), Some(0), "{status}");
    run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume"))).ok();
    assert_same(&out, &artifact(OPTIONS));
}
