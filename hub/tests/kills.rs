//! A download that is killed goes on where it was, and loses what was under way and nothing else.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use gptq_hub::{Client, Request};
use gptq_hub_stand_in::{On, Server, What};

use crate::support::{REPO, all, noise, settings};

const WORKERS: u64 = 3;
const PIECE: u64 = 64 << 10;

/// The process that is killed: this test, run by the other one.
#[test]
#[ignore = "run by the test of kills"]
fn child() {
    let [endpoint, cache] =
        ["KILLED_ENDPOINT", "KILLED_CACHE"].map(|name| std::env::var(name).expect("set by the other test"));
    let client = Client::new(settings(&endpoint, cache.as_ref())).unwrap();
    client.download(&Request { workers: WORKERS as usize, ..all() }, &gptq_hub::silent).unwrap();
}

#[test]
fn killed_at_a_hundred_random_points_it_resumes_to_the_right_bytes() {
    let server = Server::start();
    let weights = noise(1_500_000, 5);
    server.add(REPO, &[("config.json", b"{}"), ("model.safetensors", &weights)]);
    server.fault(On::Storage, usize::MAX, What::Slow(3));
    let delays = noise(200, 11);
    let (mut killed, mut kept) = (0, 0);
    for delay in delays.chunks(2) {
        let folder = tempfile::tempdir().unwrap();
        let start = || {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "kills::child", "--ignored"]).stdout(Stdio::null()).stderr(Stdio::null());
            child.env("KILLED_ENDPOINT", server.url()).env("KILLED_CACHE", folder.path()).spawn().unwrap()
        };
        server.world().sent = 0;
        let mut first = start();
        // Between nothing and the whole of it, which takes some 40 ms with the start.
        std::thread::sleep(Duration::from_micros(u64::from(delay[0]) * 256 + u64::from(delay[1])));
        first.kill().unwrap();
        killed += u32::from(!first.wait().unwrap().success());
        let blob = |name: &str| folder.path().join("models--acme--tiny/blobs").join(name);
        let name = gptq_hub_stand_in::sha256(&weights);
        let had = fs::read(blob(&name)).ok();
        assert!(had.is_none_or(|bytes| bytes == weights), "a killed download counts as whole");
        let pieces = pieces(folder.path());
        kept += u32::from(pieces > 0);
        let before = std::mem::take(&mut server.world().sent);
        assert!(start().wait().unwrap().success());
        assert!(fs::read(blob(&name)).unwrap() == weights);
        let again = server.world().sent;
        // What the first run had asked for and not finished is all that is asked for again.
        let twice = (before + again).saturating_sub(weights.len() as u64);
        assert!(
            twice <= WORKERS * PIECE,
            "{twice} bytes were fetched twice: {before} before, {again} after, {pieces} pieces kept"
        );
    }
    println!("{killed} of 100 were killed before the end, {kept} of them had pieces to keep");
    assert!(killed >= 50 && kept >= 20, "the delays miss the download: {killed} killed, {kept} with pieces");
}

/// Pieces that are marked as whole in what was left behind.
fn pieces(cache: &std::path::Path) -> usize {
    let blobs = cache.join("models--acme--tiny/blobs");
    let lists = fs::read_dir(blobs).into_iter().flatten().flatten().map(|entry| entry.path());
    let lists = lists.filter(|path| path.to_string_lossy().ends_with(".pieces"));
    lists.map(|list| fs::read_to_string(list).unwrap_or_default().lines().count().saturating_sub(1)).sum()
}
