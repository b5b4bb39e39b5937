//! Beginning, writing, going on and putting in place, together.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use gptq_runtime::layout::{StoredDtype, TensorSpec};

use super::journal::JOURNAL;
use super::{ArtifactLayout, ArtifactWriter, Begun, Fingerprint, OutMode};
use crate::Result;
use crate::record::{LayerRecord, QuantizeLog};

const TENSORS: [&str; 3] = ["model.layers.0.x", "model.layers.1.x", "model.norm.weight"];

fn layout() -> ArtifactLayout {
    let spec = |name: &str| TensorSpec::new(name, StoredDtype::F32, [4]);
    ArtifactLayout::new(TENSORS.map(spec).to_vec(), &[], Some(32))
}

fn print(bits: u32) -> Fingerprint {
    let mut print = Fingerprint::new();
    print.insert("bits", bits);
    print
}

fn try_begin(out: &Path, bits: u32, mode: OutMode) -> Result<Begun> {
    super::begin(out, layout(), &print(bits), mode)
}

fn begin(out: &Path, mode: OutMode) -> (ArtifactWriter, Vec<LayerRecord>) {
    match try_begin(out, 4, mode).unwrap() {
        Begun::Writing(writer, records) => (*writer, records),
        Begun::Finished(_) => panic!("finished"),
    }
}

fn refusal(out: &Path, bits: u32, mode: OutMode) -> String {
    try_begin(out, bits, mode).err().unwrap().to_string()
}

fn record(layer: usize) -> LayerRecord {
    LayerRecord { layer, ..LayerRecord::default() }
}

fn write_layer(writer: &mut ArtifactWriter, layer: usize) {
    writer.write_tensor(TENSORS[layer], &[layer as u8; 16]).unwrap();
    writer.layer_done(&record(layer)).unwrap();
}

/// Writes what is left, with the log that a finished artifact is known by.
fn finish(mut writer: ArtifactWriter, from: usize) -> Result<()> {
    (from..2).for_each(|layer| write_layer(&mut writer, layer));
    writer.write_tensor(TENSORS[2], &[2; 16]).unwrap();
    let log = QuantizeLog {
        settings: print(4).to_json(),
        layers: vec![record(0), record(1)],
        ..QuantizeLog::default()
    };
    writer.add_file("quantize_config.json", b"{}")?;
    writer.add_file(crate::record::LOG_FILE, &log.to_bytes())?;
    writer.finish()
}

fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    let mut files: Vec<_> =
        entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect();
    files.sort();
    files
}

#[test]
fn an_interrupted_run_goes_on_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, torn) = (dir.path().join("whole"), dir.path().join("torn"));
    finish(begin(&whole, OutMode::New).0, 0).unwrap();
    let (mut writer, _) = begin(&torn, OutMode::New);
    write_layer(&mut writer, 0);
    writer.write_tensor(TENSORS[1], &[99; 16]).unwrap();
    drop(writer);
    assert!(!torn.exists(), "nothing has the final name before the end");
    let work = dir.path().join(".torn.partial");
    OpenOptions::new().append(true).open(work.join(JOURNAL)).unwrap().write_all(b"{\"layer\":").unwrap();
    for stray in [work.join("stray"), work.join("artifact/stray")] {
        fs::write(stray, "x").unwrap();
    }
    let (writer, records) = begin(&torn, OutMode::Resume);
    assert_eq!(records, [record(0)]);
    assert_eq!(writer.read_tensor(TENSORS[0]).unwrap(), [0; 16]);
    finish(writer, 1).unwrap();
    assert_eq!(contents(&torn), contents(&whole), "without the strays");
    assert!(!work.exists());
}

#[test]
fn an_interrupted_run_is_neither_thrown_away_nor_mixed_without_being_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a");
    write_layer(&mut begin(&out, OutMode::New).0, 0);
    let message = refusal(&out, 4, OutMode::New);
    assert!(message.contains("1 of 2 layers") && message.contains("--resume"), "{message}");
    let message = refusal(&out, 8, OutMode::Resume);
    assert!(message.contains("bits 4, this one has 8"), "{message}");
    assert_eq!(begin(&out, OutMode::Resume).1.len(), 1, "it is as it was");
    assert!(begin(&out, OutMode::Force).1.is_empty());
}

#[test]
fn a_finished_output_stays_or_is_replaced_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a");
    finish(begin(&out, OutMode::New).0, 0).unwrap();
    assert!(matches!(try_begin(&out, 4, OutMode::Resume), Ok(Begun::Finished(_))));
    assert!(refusal(&out, 4, OutMode::New).contains("--resume keeps it"));
    assert!(refusal(&out, 8, OutMode::New).contains("--force replaces it"));
    assert!(refusal(&out, 8, OutMode::Resume).contains("bits 4, this one has 8"));
    fs::write(out.join("old"), "x").unwrap();
    write_layer(&mut begin(&out, OutMode::Force).0, 0);
    assert!(out.join("old").exists(), "until the new one is complete");
    let (writer, records) = begin(&out, OutMode::Resume);
    assert_eq!(records.len(), 1, "a replacement is resumed");
    finish(writer, 1).unwrap();
    assert!(!out.join("old").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn an_artifact_that_is_in_place_already_is_not_exchanged_back() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a");
    finish(begin(&out, OutMode::New).0, 0).unwrap();
    // As if the process had ended right after the exchange: the old output lies where the new one was made.
    let (mut writer, _) = begin(&out, OutMode::Force);
    (0..2).for_each(|layer| write_layer(&mut writer, layer));
    drop(writer);
    for mode in [OutMode::Resume, OutMode::New] {
        let found = try_begin(&out, 4, mode);
        assert!(!matches!(found, Ok(Begun::Writing(..))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "what was left is removed");
    }
}

#[test]
fn other_files_are_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "x").unwrap();
    for mode in [OutMode::New, OutMode::Resume, OutMode::Force, OutMode::ResumeOrForce] {
        assert!(refusal(&out, 4, mode).contains("other files"));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a refusal leaves nothing");
}

#[test]
fn a_missing_tensor_a_second_write_and_a_wrong_length_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (writer, _) = begin(&dir.path().join("a"), OutMode::New);
    writer.write_tensor(TENSORS[0], &[0; 16]).unwrap();
    assert!(writer.write_tensor(TENSORS[0], &[0; 16]).is_err());
    assert!(writer.write_tensor(TENSORS[1], &[0; 15]).is_err());
    assert!(writer.write_tensor("other", &[0; 16]).is_err());
    assert!(writer.finish().is_err());
    assert!(!dir.path().join("a").exists());
}

#[test]
fn a_last_step_that_fails_does_not_cost_the_finished_layers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a");
    let (writer, _) = begin(&out, OutMode::New);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("from elsewhere"), "x").unwrap();
    assert!(finish(writer, 0).is_err() && out.join("from elsewhere").exists());
    fs::remove_dir_all(&out).unwrap();
    assert_eq!(begin(&out, OutMode::Resume).1.len(), 2);
}

#[test]
fn a_link_to_an_empty_folder_is_written_through_and_one_to_nothing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (link, real) = (dir.path().join("link"), dir.path().join("real"));
    std::os::unix::fs::symlink(&real, &link).unwrap();
    assert!(refusal(&link, 4, OutMode::New).contains("link"));
    fs::create_dir(&real).unwrap();
    finish(begin(&link, OutMode::New).0, 0).unwrap();
    assert!(link.is_symlink() && real.join("model.safetensors.index.json").exists());
}
