//! What a download brings and leaves.

use std::fs;

use gptq_hub::{Destination, FileState, Request, Settings, Wanted};
use gptq_hub_stand_in::{git_oid, sha256};

use crate::support::{Place, REPO, all, assert_holds, files_below, noise};

#[test]
fn the_cache_is_laid_out_as_python_does_and_the_ref_comes_with_it() {
    let (place, files) = Place::with_model();
    let fetched = place.fetch(&all()).unwrap();
    assert_holds(&fetched.folder, &files);
    assert_eq!(fetched.files, 5);
    let commit = place.server.world().repos[REPO].branches["main"].clone();
    let repo = place.repo_folder();
    assert_eq!(fetched.folder, repo.join("snapshots").join(&commit));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), commit);
    let mut blobs: Vec<_> = files
        .iter()
        .map(|(_, bytes)| match bytes.len() >= 10 << 10 {
            true => format!("blobs/{}", sha256(bytes)),
            false => format!("blobs/{}", git_oid(bytes)),
        })
        .collect();
    blobs.sort();
    let found = files_below(&repo);
    let found_blobs: Vec<_> = found.iter().filter(|name| name.starts_with("blobs/")).collect();
    assert_eq!(found_blobs.len(), 5);
    assert!(blobs.iter().all(|blob| found_blobs.contains(&blob)), "{found_blobs:?}");
    assert!(found.contains(&format!("trees/{commit}.json")));
    let link = fs::read_link(fetched.folder.join("sub folder/\u{fc}.json")).unwrap();
    assert_eq!(link.to_str().unwrap(), format!("../../../blobs/{}", git_oid(b"[]")));
    assert_eq!(files_below(&place.cache().join(".locks/models--acme--tiny")).len(), 5);
}

#[test]
fn what_is_there_is_not_fetched_again_and_an_old_commit_needs_no_hub() {
    let (place, files) = Place::with_model();
    let first = place.fetch(&all()).unwrap();
    let before = place.server.log().len();
    let second = place.fetch(&all()).unwrap();
    assert_eq!((second.files, &second.folder), (0, &first.folder));
    assert_eq!(place.server.log().len(), before + 1, "the commit that main names, and nothing else");
    // A full commit needs no request.
    let by_commit = Request { revision: first.commit.clone(), ..all() };
    assert_eq!(place.client.snapshot(&by_commit, &gptq_hub::silent).unwrap().folder, first.folder);
    assert_eq!(place.server.log().len(), before + 1);
    // A new commit brings what has changed.
    let mut changed = files.clone();
    changed[0].1 = b"{}".to_vec();
    let given: Vec<_> = changed.iter().map(|(path, bytes)| (*path, bytes.as_slice())).collect();
    place.server.add(REPO, &given);
    let third = place.fetch(&all()).unwrap();
    assert_eq!(third.files, 1);
    assert_holds(&third.folder, &changed);
    assert_holds(&first.folder, &files);
}

#[test]
fn large_files_come_in_ranges_and_with_one_look_up() {
    let (place, _) = Place::with_model();
    place.fetch(&all()).unwrap();
    let log = place.server.log();
    let weights = sha256(&noise(700_001, 1));
    let ranges: Vec<_> = log.iter().filter(|asked| asked.storage && asked.path.contains(&weights)).collect();
    assert_eq!(ranges.len(), 11);
    assert!(ranges.iter().all(|asked| asked.range.is_some()));
    let resolved = log
        .iter()
        .filter(|asked| asked.path.contains("/resolve/") && asked.path.contains("model.safetensors"));
    assert_eq!(resolved.count(), 1);
}

#[test]
fn trees_of_several_pages_and_files_by_name_and_pattern() {
    let (place, _) = Place::with_model();
    place.server.world().page = 2;
    let paths = |wanted: Wanted| {
        let plan = place.client.plan(&Request { wanted, ..all() }, &gptq_hub::silent).unwrap();
        plan.files.into_iter().map(|file| file.entry.path).collect::<Vec<_>>()
    };
    assert_eq!(paths(Wanted::all()).len(), 5);
    assert_eq!(paths(Wanted::Files(vec!["config.json".into()])), ["config.json"]);
    let json = Wanted::Patterns { include: vec!["*.json".into()], exclude: vec!["sub*".into()] };
    assert_eq!(paths(json), ["config.json", "tokenizer.json"]);
    assert_eq!(paths(Wanted::Model), ["config.json", "empty.txt", "model.safetensors", "tokenizer.json"]);
    assert_eq!(files_below(place.folder.path()), [""; 0], "a plan writes nothing");
    let nothing = Request { wanted: Wanted::Files(vec!["x.json".into()]), ..all() };
    let line = place.refusal(&nothing);
    assert!(
        line.starts_with(
            "acme/tiny: x.json: no such file in the repository; the files there: config.json, empty.txt"
        ),
        "{line}"
    );
}

#[test]
fn a_folder_gets_plain_files_with_pythons_notes() {
    let (place, files) = Place::with_model();
    let folder = place.folder.path().join("plain");
    let request = Request { destination: Destination::Folder(folder.clone()), ..all() };
    place.fetch(&request).unwrap();
    assert_holds(&folder, &files);
    assert!(!folder.join("config.json").is_symlink() && !place.cache().exists());
    let notes = folder.join(".cache/huggingface");
    assert_eq!(fs::read_to_string(notes.join(".gitignore")).unwrap(), "*");
    let note = fs::read_to_string(notes.join("download/model.safetensors.metadata")).unwrap();
    let lines: Vec<_> = note.lines().collect();
    let commit = place.server.world().repos[REPO].branches["main"].clone();
    assert_eq!(lines[..2], [commit, sha256(&files[2].1)]);
    assert!(lines[2].parse::<f64>().unwrap() > 1.7e9 && lines.len() == 3);
    assert!(notes.join("download/sub folder/\u{fc}.json.lock").exists());
    assert_eq!(place.fetch(&request).unwrap().files, 0);
    // A file that another program has changed is fetched again, one that only lost its note is not.
    fs::write(folder.join("tokenizer.json"), noise(30_000, 9)).unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    fs::File::options().write(true).open(folder.join("tokenizer.json")).unwrap().set_modified(later).unwrap();
    fs::remove_file(notes.join("download/model.safetensors.metadata")).unwrap();
    assert_eq!(place.fetch(&request).unwrap().files, 1);
    assert_holds(&folder, &files);
}

#[test]
fn a_plan_says_what_is_there_and_force_fetches_it_all_the_same() {
    let (place, files) = Place::with_model();
    let states = || {
        let plan = place.client.plan(&all(), &gptq_hub::silent).unwrap();
        plan.files.into_iter().filter(|file| file.state == FileState::Present).count()
    };
    assert_eq!(states(), 0);
    place.fetch(&all()).unwrap();
    assert_eq!(states(), 5);
    let forced = Request { force: true, ..all() };
    assert_eq!(place.fetch(&forced).unwrap().files, 5);
    assert_holds(&place.fetch(&all()).unwrap().folder, &files);
}

#[test]
fn a_damaged_blob_is_found_and_fetched_again_where_that_is_asked_for() {
    let (place, files) = Place::with_model();
    let folder = place.fetch(&all()).unwrap().folder;
    let path = folder.join("model.safetensors");
    let mut bytes = files[2].1.clone();
    bytes[500_000] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert_eq!(place.fetch(&all()).unwrap().files, 0);
    assert_eq!(place.fetch(&Request { verify: true, ..all() }).unwrap().files, 1);
    assert_holds(&folder, &files);
    assert!(place.told().contains("model.safetensors is damaged here"), "{}", place.told());
}

#[cfg(unix)]
#[test]
fn a_blob_that_is_a_link_into_a_shared_cache_is_replaced_and_not_written_through() {
    let (place, files) = Place::with_model();
    let folder = place.fetch(&all()).unwrap().folder;
    let shared = place.folder.path().join("shared");
    fs::write(&shared, "somebody else's").unwrap();
    let blob = place.repo_folder().join("blobs").join(sha256(&files[2].1));
    fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink(&shared, &blob).unwrap();
    assert_eq!(place.fetch(&all()).unwrap().files, 1);
    assert_holds(&folder, &files);
    assert_eq!(fs::read_to_string(&shared).unwrap(), "somebody else's");
}

#[test]
fn offline_takes_what_is_whole_and_names_what_is_missing() {
    let (place, files) = Place::with_model();
    let offline = Settings { offline: Some("HF_HUB_OFFLINE"), ..place.client.settings.clone() };
    let offline = gptq_hub::Client::new(offline).unwrap();
    let model = Request { wanted: Wanted::Model, ..all() };
    let line = offline.snapshot(&model, &gptq_hub::silent).unwrap_err().to_string();
    assert!(
        line.starts_with("acme/tiny: revision main is not in ") && line.contains("(HF_HUB_OFFLINE)"),
        "{line}"
    );
    let folder = place.fetch(&all()).unwrap().folder;
    let asked = place.server.log().len();
    assert_eq!(offline.snapshot(&model, &gptq_hub::silent).unwrap().folder, folder);
    fs::remove_file(place.repo_folder().join("blobs").join(sha256(&files[2].1))).unwrap();
    let line = offline.snapshot(&model, &gptq_hub::silent).unwrap_err().to_string();
    assert!(line.starts_with("acme/tiny: model.safetensors is not in "), "{line}");
    assert_eq!(place.server.log().len(), asked, "no request was sent");
}
