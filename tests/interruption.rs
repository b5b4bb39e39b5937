//! Runs that end too early: nothing half-written, and a resumed run ends in the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::program::{alone, artifact, demo, quantize, run, workplace};

/// Long enough layers that a run can be stopped inside each of them.
pub const OPTIONS: &str = "--samples 8 --seq-len 256";

/// Where the run of `out` keeps its journal: a line of settings, then a line for every finished layer.
pub fn journal(out: &Path) -> PathBuf {
    let name = format!(".{}.partial", out.file_name().unwrap().to_str().unwrap());
    out.with_file_name(name).join("journal.jsonl")
}

/// Whole lines of the journal, none where there is no journal.
pub fn journal_lines(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(journal(out)).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Starts a run and returns when its journal has a line of settings and `layers` more.
pub fn started(out: &Path, options: &str, layers: usize) -> Child {
    let mut child =
        quantize(&demo(), out, options).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while journal_lines(out).len() <= layers {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "the run ended before layer {layers}: {ended:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// Kills a run, as `kill -9` does, as soon as `layers` layers are done.
pub fn killed(out: &Path, options: &str, layers: usize) {
    let _cores = alone();
    let mut child = started(out, options, layers);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().code(), None, "killed, not ended");
}

/// Every file of a folder; seconds, which differ from run to run, are left out of the log and the card.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let without_seconds = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        match path.file_name().unwrap().to_str().unwrap() {
            "quantize_log.json" => {
                let mut log: Value = serde_json::from_slice(&bytes).unwrap();
                remove_seconds(&mut log);
                log.to_string().into_bytes()
            }
            "README.md" => {
                let text = String::from_utf8(bytes).unwrap();
                let (before, after) = text.split_once(" s on ").unwrap();
                let (before, _seconds) = before.rsplit_once(' ').unwrap();
                [before, after].concat().into_bytes()
            }
            _ => bytes,
        }
    };
    paths.map(|path| (path.file_name().unwrap().to_str().unwrap().into(), without_seconds(&path))).collect()
}

/// The records of a finished artifact's layers.
fn logged_layers(out: &Path) -> Vec<Value> {
    let log: Value = serde_json::from_slice(&fs::read(out.join("quantize_log.json")).unwrap()).unwrap();
    log["layers"].as_array().unwrap().clone()
}

fn remove_seconds(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !key.ends_with("seconds"));
            map.values_mut().for_each(remove_seconds);
        }
        Value::Array(values) => values.iter_mut().for_each(remove_seconds),
        _ => {}
    }
}

pub fn assert_same(got: &Path, expected: &Path) {
    let (got, expected) = (contents(got), contents(expected));
    assert!(got.keys().eq(expected.keys()), "{:?}", got.keys());
    for (name, bytes) in &expected {
        assert!(got[name] == *bytes, "{name} differs");
    }
}

#[test]
fn a_killed_run_leaves_no_output_and_resumes_to_the_same_bytes() {
    let work = workplace("killed");
    for layers in 0..4 {
        let out = work.join(format!("after-{layers}"));
        killed(&out, OPTIONS, layers);
        assert!(!out.exists(), "nothing has the final name");
        let done = journal_lines(&out).split_off(1);
        assert!(done.len() >= layers);
        for stray in ["stray.txt", "artifact/stray.txt"] {
            fs::write(journal(&out).with_file_name(stray), "x").unwrap();
        }
        run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume"))).ok();
        assert_same(&out, &artifact(OPTIONS));
        assert_eq!(logged_layers(&out)[..done.len()], done, "finished layers are not solved again");
        assert!(!journal(&out).parent().unwrap().exists(), "no leftovers");
    }
}

#[test]
fn a_run_that_is_killed_twice_resumes_too() {
    let out = workplace("killed-twice").join("q4");
    killed(&out, OPTIONS, 1);
    killed(&out, &format!("{OPTIONS} --resume"), 3);
    run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume"))).ok();
    assert_same(&out, &artifact(OPTIONS));
}

#[test]
fn a_torn_journal_and_a_lost_layer_do_not_end_in_other_bytes() {
    let out = workplace("torn").join("q4");
    killed(&out, OPTIONS, 2);
    let text = fs::read_to_string(journal(&out)).unwrap();
    let second = text.match_indices('\n').nth(1).unwrap().0;
    fs::write(journal(&out), &text[..second + 20]).unwrap();
    run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume"))).ok();
    assert_same(&out, &artifact(OPTIONS));
}

#[test]
fn another_setting_or_text_cannot_resume_a_run_and_does_not_harm_it() {
    let out = workplace("other-settings").join("q4");
    killed(&out, OPTIONS, 1);
    for (options, named) in [
        (format!("{OPTIONS} --bits 8"), "quantization"),
        (format!("{OPTIONS} --damp-percent 0.2"), "quantization"),
        (format!("{OPTIONS} --mse"), "mse"),
        (format!("{OPTIONS} --no-bias"), "zero_bias"),
        (format!("{OPTIONS} --seed 1"), "calibration tokens"),
        (format!("{OPTIONS} --max-shard-size 1MB"), "max_shard_size"),
    ] {
        let line = run(&mut quantize(&demo(), &out, &format!("{options} --resume"))).refusal();
        assert!(line.contains("cannot resume") && line.contains(named), "{line}");
        assert!(!out.exists());
    }
    run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume"))).ok();
    assert_same(&out, &artifact(OPTIONS));
}

#[test]
fn an_interrupted_run_is_only_thrown_away_by_force() {
    let out = workplace("over").join("q4");
    killed(&out, &format!("{OPTIONS} --bits 8"), 2);
    for options in [OPTIONS.to_string(), format!("{OPTIONS} --bits 8")] {
        let line = run(&mut quantize(&demo(), &out, &options)).refusal();
        for said in [" of 4 layers", "--resume goes on", "--force begins anew"] {
            assert!(line.contains(said), "{line}");
        }
        assert!(journal_lines(&out).len() > 2, "it is as it was");
    }
    run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --force"))).ok();
    assert_same(&out, &artifact(OPTIONS));
}

#[test]
fn a_finished_output_is_kept_until_force_has_its_replacement() {
    let out = workplace("force").join("q4");
    run(&mut quantize(&demo(), &out, OPTIONS)).ok();
    let line = run(&mut quantize(&demo(), &out, "--bits 8")).refusal();
    assert!(line.contains("--force"), "{line}");
    let line = run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --bits 8 --resume"))).refusal();
    assert!(line.contains("finished output") && line.contains("quantization"), "{line}");
    let again = run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --resume")));
    assert!(again.stderr.contains("is there already"), "{}", again.stderr);
    again.ok();
    for going_on in ["--resume", "--force --resume"] {
        killed(&out, &format!("{OPTIONS} --bits 8 --force"), 2);
        let records = journal_lines(&out).split_off(1);
        assert_same(&out, &artifact(OPTIONS));
        run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --bits 8 {going_on}"))).ok();
        assert_same(&out, &artifact(&format!("{OPTIONS} --bits 8")));
        assert_eq!(
            logged_layers(&out)[..records.len()],
            records,
            "{going_on} solves no finished layer again"
        );
        run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --force"))).ok();
        assert_same(&out, &artifact(OPTIONS));
    }
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn what_a_crash_while_replacing_left_does_not_stop_the_next_run() {
    let work = workplace("replacing");
    let (out, left) = (work.join("q4"), work.join(".q4.replaced"));
    run(&mut quantize(&demo(), &out, OPTIONS)).ok();
    fs::create_dir(&left).unwrap();
    fs::write(left.join("config.json"), "{}").unwrap();
    run(&mut quantize(&demo(), &out, &format!("{OPTIONS} --bits 8 --force"))).ok();
    assert_same(&out, &artifact(&format!("{OPTIONS} --bits 8")));
    assert!(!left.exists(), "no leftovers");
}

#[test]
fn two_processes_cannot_write_one_output() {
    let out = workplace("two").join("q4");
    let mut first = {
        let _cores = alone();
        started(&out, OPTIONS, 0)
    };
    for options in [OPTIONS.to_string(), format!("{OPTIONS} --resume"), format!("{OPTIONS} --force")] {
        // Stopped, the first cannot end before the second has tried.
        signal(&first, "-STOP");
        let second = run(&mut quantize(&demo(), &out, &options));
        signal(&first, "-CONT");
        let line = second.refusal();
        assert!(line.contains("another process"), "{line}");
    }
    assert!(first.wait().unwrap().success());
    assert_same(&out, &artifact(OPTIONS));
}

pub fn signal(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

#[test]
fn a_write_that_fails_halfway_leaves_no_output() {
    let out = workplace("file-limit").join("out");
    let mut limited = Command::new("sh");
    // A limit of 500 kB on every file, reported as an error because the signal is ignored.
    let script = "trap '' XFSZ; ulimit -f 1000; exec \"$@\"";
    limited
        .args(["-c", script, "sh"])
        .arg(env!("CARGO_BIN_EXE_gptq"))
        .args(quantize(&demo(), &out, "").get_args());
    let line = run(&mut limited).refusal();
    assert!(line.contains("File too large"), "{line}");
    assert!(!out.exists());
}

#[test]
#[cfg_attr(not(can_mount), ignore = "needs the right to mount a small file system")]
fn a_full_disk_is_named_and_leaves_no_output() {
    let work = workplace("full-disk");
    let disk = work.join("disk");
    fs::create_dir(&disk).unwrap();
    // The small file system exists in the mount namespace of this one process alone.
    let in_namespace = |script: &str, arguments: &[PathBuf]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c"]);
        command.arg(format!("mount -t tmpfs -o size=1m none \"$0\" && {script}")).arg(&disk).args(arguments);
        command
    };
    let script = "\"$@\"; code=$?; ls -A \"$0\"; exit $code";
    let program = PathBuf::from(env!("CARGO_BIN_EXE_gptq"));
    let arguments: Vec<_> = quantize(&demo(), &disk.join("out"), "").get_args().map(PathBuf::from).collect();
    let ended = run(&mut in_namespace(script, &[vec![program], arguments].concat()));
    let left = ended.stdout.clone();
    let line = ended.refusal();
    assert!(line.contains("disk is full"), "{line}");
    assert!(!left.lines().any(|name| name == "out"), "{left}");
}
