//! What lies in a folder, and whether its artifacts are whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// Every file below a folder by its path, hidden ones too, and `path/` for a folder without any. Seconds, which differ from
/// run to run, are left out of logs and cards.
pub type Contents = BTreeMap<String, Vec<u8>>;

pub fn contents(dir: &Path) -> Contents {
    let mut found = Contents::new();
    collect(dir, "", &mut found);
    found
}

fn collect(dir: &Path, prefix: &str, found: &mut Contents) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut empty = true;
    for entry in entries.map(Result::unwrap) {
        empty = false;
        let (path, name) = (entry.path(), format!("{prefix}{}", entry.file_name().to_str().unwrap()));
        match path.is_dir() {
            true => collect(&path, &format!("{name}/"), found),
            false => {
                found.insert(name, without_seconds(&path));
            }
        }
    }
    if empty && !prefix.is_empty() {
        found.insert(prefix.into(), Vec::new());
    }
}

fn without_seconds(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap();
    match path.file_name().unwrap().to_str().unwrap() {
        "quantize_log.json" => match serde_json::from_slice(&bytes) {
            Ok(mut log) => {
                remove_seconds(&mut log);
                log.to_string().into_bytes()
            }
            Err(_) => bytes,
        },
        "README.md" => {
            let text = String::from_utf8(bytes).unwrap();
            let lines = text.lines().map(|line| match line.split_once(", in ") {
                Some((before, after)) if before.starts_with("Calibrated on") => {
                    format!("{before}, in {}", after.split_once(" s ").map_or("", |(_, rest)| rest))
                }
                _ => line.into(),
            });
            lines.collect::<Vec<_>>().join("\n").into_bytes()
        }
        _ => bytes,
    }
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

/// The part of the contents in a subfolder.
fn part(contents: &Contents, folder: &str) -> Contents {
    let prefix = format!("{folder}/");
    let inside = contents.iter().filter_map(|(name, bytes)| Some((name.strip_prefix(&prefix)?, bytes)));
    inside.filter(|(name, _)| !name.is_empty()).map(|(name, bytes)| (name.into(), bytes.clone())).collect()
}

/// What may lie under the final name of each artifact.
pub struct Whole<'a> {
    pub old: &'a Contents,
    pub new: &'a Contents,
}

impl Whole<'_> {
    /// Every artifact in `now` is not there, the old one or the new one. Its card, or both card and log, may lack the
    /// measurement.
    pub fn check(&self, now: &Contents, artifacts: &[&str]) -> Result<(), String> {
        for artifact in artifacts {
            let [now, old, new] = [now, self.old, self.new].map(|contents| part(contents, artifact));
            if !now.is_empty() && now != old && !is_new(&now, &new) {
                return Err(format!("{artifact} is half there: {:?}", now.keys()));
            }
        }
        Ok(())
    }
}

fn is_new(now: &Contents, new: &Contents) -> bool {
    let written_again = |name: &str| ["README.md", "quantize_log.json"].contains(&name);
    now.keys().eq(new.keys())
        && now.iter().all(|(name, bytes)| match written_again(name) {
            false => *bytes == new[name],
            true if name == "README.md" => unmeasured_card(bytes) == unmeasured_card(&new[name]),
            true => unmeasured_log(bytes).is_some_and(|log| Some(log) == unmeasured_log(&new[name])),
        })
}

/// The card without what was measured.
fn unmeasured_card(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    match text.split_once("## Measured") {
        Some((before, rest)) => {
            before.to_string() + rest.find("## Loads in").map_or("", |start| &rest[start..])
        }
        None => text.into_owned(),
    }
}

fn unmeasured_log(bytes: &[u8]) -> Option<Value> {
    let mut log: Value = serde_json::from_slice(bytes).ok()?;
    log.as_object_mut()?.remove("evaluation");
    Some(log)
}
