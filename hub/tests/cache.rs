//! Several processes at one cache.

use std::fs;
use std::fs::File;
use std::time::{Duration, Instant};

use gptq_hub::Client;
use gptq_hub_stand_in::{On, What, sha256};

use crate::support::{Place, all, assert_holds, files_below, settings};

#[test]
fn two_clients_at_one_cache_fetch_every_byte_once() {
    let (place, files) = Place::with_model();
    place.server.fault(On::Storage, usize::MAX, What::Slow(1));
    let other = Client::new(settings(&place.server.url(), &place.cache())).unwrap();
    let folders = std::thread::scope(|scope| {
        let second = scope.spawn(|| other.download(&all(), &gptq_hub::silent).unwrap().folder);
        [place.fetch(&all()).unwrap().folder, second.join().unwrap()]
    });
    assert_eq!(folders[0], folders[1]);
    assert_holds(&folders[0], &files);
    assert_eq!(place.server.world().sent, 730_001, "both large files, once");
}

#[test]
fn a_lock_whose_holder_makes_no_progress_is_passed_by_in_the_end() {
    let (place, files) = Place::with_model();
    let locks = place.cache().join(".locks/models--acme--tiny");
    fs::create_dir_all(&locks).unwrap();
    let lock = File::create(locks.join(format!("{}.lock", sha256(&files[2].1)))).unwrap();
    lock.lock().unwrap();
    let start = Instant::now();
    assert_holds(&place.fetch(&all()).unwrap().folder, &files);
    assert!(start.elapsed() >= Duration::from_millis(400), "its holder had its chance");
    assert!(place.told().contains("Waiting"), "{}", place.told());
    drop(lock);
}

#[test]
fn who_waits_for_a_lock_takes_what_its_holder_has_brought() {
    let (place, files) = Place::with_model();
    let name = sha256(&files[2].1);
    let locks = place.cache().join(".locks/models--acme--tiny");
    fs::create_dir_all(&locks).unwrap();
    let lock = File::create(locks.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let blobs = place.repo_folder().join("blobs");
    std::thread::scope(|scope| {
        let ours = scope.spawn(|| place.fetch(&all()).unwrap().folder);
        std::thread::sleep(Duration::from_millis(100));
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(&name), &files[2].1).unwrap();
        drop(lock);
        assert_holds(&ours.join().unwrap(), &files);
    });
    assert!(place.server.log().iter().all(|asked| !asked.path.contains(&name)));
}

#[test]
fn what_older_clients_have_left_half_done_is_left_alone() {
    let (place, files) = Place::with_model();
    let blobs = place.repo_folder().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let theirs = blobs.join(format!("{}.incomplete", sha256(&files[2].1)));
    fs::write(&theirs, "theirs").unwrap();
    assert_holds(&place.fetch(&all()).unwrap().folder, &files);
    assert_eq!(fs::read_to_string(theirs).unwrap(), "theirs");
    assert_eq!(files_below(&blobs).len(), 6);
}
