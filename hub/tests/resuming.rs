//! A large file that goes in parts, and does not arrive at the first attempt.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use gptq_hub::{Client, Error, LocalFile, PushBranch, PushRequest, Pushed, RepoId, Settings, Token};
use gptq_hub_stand_in::{Fault, On, Server, What};

use crate::support::{REPO, files_below, noise, settings};

const PART: usize = 64 << 10;
const PARTS: usize = 12;
const WORKERS: usize = 3;

struct Sender {
    client: Client,
    request: PushRequest,
}

/// One file of twelve parts, the last of them short, in a folder that also holds the cache.
fn sender(endpoint: &str, folder: &Path) -> Sender {
    let source = folder.join("model.safetensors");
    if !source.exists() {
        fs::write(&source, weights()).unwrap();
    }
    let token = Token { secret: "hf_write".into(), from: "HF_TOKEN".into() };
    let settings = Settings { token: Some(token), ..settings(endpoint, &folder.join("cache")) };
    let file = LocalFile::read(&source, "model.safetensors").unwrap();
    let request = PushRequest {
        repo: RepoId::model(REPO).unwrap(),
        branches: vec![PushBranch { name: "main".into(), files: vec![file] }],
        private: false,
        create_pr: false,
        summary: "Tiny".into(),
        workers: WORKERS,
    };
    Sender { client: Client::new(settings).unwrap(), request }
}

impl Sender {
    fn push(&self) -> Result<Pushed, Error> {
        let plan = self.client.push_plan(&self.request, &gptq_hub::silent)?;
        self.client.push(&self.request, &plan, &gptq_hub::silent)
    }
}

fn weights() -> Vec<u8> {
    noise(PART * PARTS - 1000, 3)
}

fn server() -> Server {
    let server = Server::start();
    server.world().part_size = PART;
    server
}

fn assert_there(server: &Server) {
    let world = server.world();
    let repo = &world.repos[REPO];
    assert!(repo.commits[&repo.branches["main"]]["model.safetensors"].bytes == weights());
}

/// Notes of uploads that are left in the cache.
fn notes(folder: &Path) -> Vec<String> {
    files_below(&folder.join("cache")).into_iter().filter(|file| file.ends_with(".upload")).collect()
}

/// The storage fails for good after so many parts.
fn break_off(server: &Server, after: usize) {
    let what = What::Status(503);
    server.world().faults.push(Fault { on: On::Upload, skip: after, times: usize::MAX, what });
}

#[test]
fn a_push_that_failed_between_parts_sends_the_missing_ones_alone() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let sender = sender(&server.url(), folder.path());
    break_off(&server, 5);
    let error = sender.push().unwrap_err().to_string();
    assert!(error.starts_with("acme/tiny: model.safetensors: the server fails with 503"), "{error}");
    assert_eq!((server.world().parts, notes(folder.path()).len()), (5, 1));
    server.world().faults.clear();
    let pushed = sender.push().unwrap();
    assert_eq!(server.world().parts, PARTS, "no part was sent twice");
    assert_eq!(pushed.sent as usize, weights().len() - 5 * PART);
    assert_eq!(notes(folder.path()), [""; 0]);
    assert_there(&server);
}

#[test]
fn an_upload_that_the_storage_no_longer_knows_begins_anew() {
    for forget in [true, false] {
        let (server, folder) = (server(), tempfile::tempdir().unwrap());
        let sender = sender(&server.url(), folder.path());
        break_off(&server, 5);
        sender.push().unwrap_err();
        server.world().faults.clear();
        match forget {
            true => server.world().uploads.clear(),
            // An address that has expired.
            false => server.fault(On::Upload, 1, What::Status(403)),
        }
        assert_eq!(sender.push().unwrap().sent as usize, weights().len(), "{forget}");
        assert_eq!(notes(folder.path()), [""; 0]);
        assert_there(&server);
    }
}

#[test]
fn a_storage_that_refuses_a_new_upload_is_one_line_and_ends_it() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let sender = sender(&server.url(), folder.path());
    server.fault(On::Upload, usize::MAX, What::Status(403));
    let line = sender.push().unwrap_err().to_string();
    assert!(line.contains("acme/tiny: model.safetensors: storage at 127.0.0.1"), "{line}");
    assert!(line.ends_with("refused it: error fails with 403"), "{line}");
    assert_eq!(notes(folder.path()), [""; 0]);
}

#[test]
fn a_file_that_was_put_together_although_the_answer_failed_is_not_sent_again() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let sender = sender(&server.url(), folder.path());
    server.fault(On::Complete, 1, What::DoneThenFail);
    sender.push().unwrap();
    assert_eq!(server.world().parts, PARTS);
    assert_there(&server);
}

#[test]
fn a_note_of_another_hub_is_not_followed() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let sender = sender(&server.url(), folder.path());
    break_off(&server, 5);
    sender.push().unwrap_err();
    let note = folder.path().join("cache").join(&notes(folder.path())[0]);
    let other = fs::read_to_string(&note).unwrap().replacen(&server.url(), "https://elsewhere.example", 1);
    fs::write(&note, other).unwrap();
    server.world().faults.clear();
    assert_eq!(sender.push().unwrap().sent as usize, weights().len());
    assert_there(&server);
}

/// The process that is killed: this test, run by the other one.
#[test]
#[ignore = "run by the test of kills"]
fn child() {
    let [endpoint, folder] =
        ["KILLED_ENDPOINT", "KILLED_FOLDER"].map(|name| std::env::var(name).expect("set by the other test"));
    sender(&endpoint, folder.as_ref()).push().unwrap();
}

#[test]
fn killed_at_random_points_a_push_sends_again_what_was_under_way_and_nothing_else() {
    let delays = noise(60, 13);
    let (mut killed, mut kept) = (0, 0);
    for delay in delays.chunks(2) {
        let (server, folder) = (server(), tempfile::tempdir().unwrap());
        server.fault(On::Upload, usize::MAX, What::Slow(5));
        // Before there is a process that could be killed while it writes.
        fs::write(folder.path().join("model.safetensors"), weights()).unwrap();
        let start = || {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "resuming::child", "--ignored"]);
            child.stdout(Stdio::null()).stderr(Stdio::null());
            child.env("KILLED_ENDPOINT", server.url()).env("KILLED_FOLDER", folder.path()).spawn().unwrap()
        };
        let mut first = start();
        std::thread::sleep(Duration::from_micros(u64::from(delay[0]) * 256 + u64::from(delay[1])));
        first.kill().unwrap();
        killed += u32::from(!first.wait().unwrap().success());
        // What was on its way may still arrive.
        std::thread::sleep(Duration::from_millis(10));
        let before = server.world().parts;
        kept += u32::from(before > WORKERS);
        assert!(start().wait().unwrap().success());
        assert_there(&server);
        let twice = server.world().parts - PARTS;
        assert!(twice <= WORKERS, "{twice} parts were sent twice, {before} were there before");
        assert_eq!(notes(folder.path()), [""; 0]);
    }
    println!("{killed} of 30 were killed before the end, {kept} of them had parts to keep");
    assert!(killed >= 10 && kept >= 5, "the delays miss the push: {killed} killed, {kept} with parts");
}
