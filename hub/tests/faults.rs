//! What goes wrong on the way: either the file is there in the end, or one line says why it is not.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gptq_hub::{Client, Event, RepoId, Request, Settings};
use gptq_hub_stand_in::{Fault, On, What};

use crate::support::{Place, REPO, all, assert_holds, files_below, noise, settings};

#[test]
fn a_file_arrives_whatever_happens_on_the_way() {
    let faults = [
        ("connections that drop", On::Storage, 9, What::Cut(10_000)),
        ("a connection that drops at once", On::Storage, 4, What::Cut(0)),
        ("ranges ignored", On::Storage, usize::MAX, What::IgnoreRange),
        ("ranges ignored by some", On::Storage, 3, What::IgnoreRange),
        ("another range than was asked for", On::Storage, 3, What::WrongRange),
        ("storage busy", On::Storage, 4, What::Status(503)),
        ("storage slow to answer", On::Storage, 4, What::Status(408)),
        ("an address that has expired", On::Storage, 1, What::Status(403)),
        ("hub failing", On::Resolve, 4, What::Status(500)),
        ("hub failing before", On::Api, 4, What::Status(502)),
        ("bodies that are too short", On::Storage, 5, What::Short(1000)),
        ("a range that is none any more", On::Storage, 1, What::Status(416)),
        ("damaged once", On::Storage, 1, What::WrongBytes),
    ];
    for (name, on, times, what) in faults {
        let (place, files) = Place::with_model();
        place.server.fault(on, times, what);
        let fetched = place.fetch(&all()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_holds(&fetched.folder, &files);
        let left = files_below(&place.repo_folder()).into_iter().filter(|file| file.contains("incomplete"));
        assert_eq!(left.collect::<Vec<_>>(), [""; 0], "{name}");
        assert_eq!(place.server.world().repos[REPO].branches["main"], fetched.commit);
    }
}

#[test]
fn connections_that_drop_at_random_offsets_cost_what_they_lost() {
    let (place, files) = Place::with_model();
    {
        let mut world = place.server.world();
        // Each answer ends somewhere else, for as long as it takes.
        let offsets = noise(400, 7);
        let cuts = offsets.chunks(2).map(|pair| 1 + usize::from(pair[0]) * 256 + usize::from(pair[1]));
        world.faults.extend(cuts.map(|after| Fault {
            on: On::Storage,
            skip: 0,
            times: 1,
            what: What::Cut(after),
        }));
    }
    let bytes = AtomicU64::new(0);
    let watch = |event: Event| {
        if let Event::Bytes { file: "model.safetensors", count } = event {
            bytes.fetch_add(u64::try_from(count).unwrap(), Ordering::Relaxed);
        }
    };
    let fetched = place.client.download(&all(), &watch).unwrap();
    assert_holds(&fetched.folder, &files);
    assert_eq!(bytes.into_inner(), 700_001, "nothing was fetched twice");
}

#[test]
fn a_silent_connection_is_given_up_and_another_goes_on() {
    let (place, files) = Place::with_model();
    // Longer than anybody waits.
    place.server.fault(On::Storage, 1, What::Slow(60_000));
    let start = Instant::now();
    assert_holds(&place.fetch(&all()).unwrap().folder, &files);
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn failures_that_last_are_one_line_each_and_leave_no_file() {
    let cases: [(&str, On, What, &str); 10] = [
        ("500", On::Api, What::Status(500), "acme/tiny: the server fails with 500: error"),
        ("page", On::Api, What::Page, "is not a model hub: its answer is no JSON"),
        ("page as a file", On::Resolve, What::Page, "is not a model hub: it does not say which commit"),
        ("teapot", On::Api, What::Status(418), "acme/tiny: unexpected answer 418"),
        ("storage", On::Storage, What::Status(403), "refused it: error"),
        ("storage fails", On::Storage, What::Status(500), "the server fails with 500"),
        ("damaged", On::Storage, What::WrongBytes, "arrived damaged 3 times: expected "),
        ("other size", On::Storage, What::Status(416), "the size has changed: expected "),
        ("no hub", On::Resolve, What::NoCommitHeader, "is not a model hub: it does not say which commit"),
        ("too many", On::Api, What::TooMany(3600), "too many requests: the server asks to wait 3600 s"),
    ];
    for (name, on, what, expected) in cases {
        let (place, _) = Place::with_model();
        place.server.fault(on, usize::MAX, what);
        let line = place.refusal(&all());
        assert!(line.starts_with("acme/tiny: ") && line.contains(expected), "{name}: {line}");
        assert!(!place.repo_folder().join("refs/main").exists(), "{name}");
        let weights = gptq_hub_stand_in::sha256(&noise(700_001, 1));
        assert!(!place.repo_folder().join("blobs").join(weights).exists(), "{name}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let (place, _) = Place::with_model();
    {
        let mut world = place.server.world();
        world
            .repos
            .insert("acme/secret".into(), gptq_hub_stand_in::Repo { private: true, ..Default::default() });
        world
            .repos
            .insert("acme/gated".into(), gptq_hub_stand_in::Repo { gated: true, ..Default::default() });
    }
    let request = |id: &str, revision: &str| Request {
        repo: RepoId::model(id).unwrap(),
        revision: revision.into(),
        ..all()
    };
    let url = place.server.url();
    assert_eq!(
        place.refusal(&request("acme/none", "main")),
        "acme/none: not found, or private: HF_TOKEN is not set"
    );
    assert_eq!(
        place.refusal(&request("acme/secret", "main")),
        "acme/secret: not found, or private: HF_TOKEN is not set"
    );
    assert_eq!(
        place.refusal(&request(REPO, "dev")),
        "acme/tiny:dev: no such revision; the branches there: main"
    );
    let gated = place.refusal(&request("acme/gated", "main"));
    assert_eq!(gated, format!("acme/gated: .gitattributes: gated: ask for access at {url}/acme/gated"));
    let place = place.with_token("hf_read");
    assert_eq!(
        place.refusal(&request("acme/none", "main")),
        "acme/none: no such repository, or this token may not see it"
    );
    let place = place.with_token("hf_wrong");
    assert_eq!(place.refusal(&all()), format!("acme/tiny: {url} refused the token from HF_TOKEN"));
}

#[test]
fn one_demand_to_wait_stops_all_workers_for_that_long() {
    let (place, files) = Place::with_model();
    place.server.fault(On::Storage, 2, What::TooMany(1));
    let start = Instant::now();
    assert_holds(&place.fetch(&all()).unwrap().folder, &files);
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert!(place.told().contains("Wait"), "{}", place.told());
    // No request while the gate was closed: two refusals at most, of workers that were on their way.
    let refused = place.server.log().iter().filter(|asked| asked.storage).count() - 12;
    assert!(refused <= 4, "{refused}");
}

#[test]
fn a_hub_that_is_not_there_is_told_at_once_and_the_cache_counts() {
    let (place, _) = Place::with_model();
    let folder = place.fetch(&all()).unwrap().folder;
    // A port without a listener.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = Client::new(settings(&format!("http://{free}"), &place.cache())).unwrap();
    let start = Instant::now();
    let told = std::sync::Mutex::new(String::new());
    let watch = |event: Event| {
        if let Event::Note(text) = event {
            told.lock().unwrap().push_str(text);
        }
    };
    assert_eq!(unreachable.snapshot(&all(), &watch).unwrap().folder, folder);
    assert!(told.into_inner().unwrap().starts_with(&format!("acme/tiny: cannot reach {free}: ")));
    let other = Request { revision: "other".into(), ..all() };
    let line = unreachable.snapshot(&other, &gptq_hub::silent).unwrap_err().to_string();
    assert!(line.starts_with(&format!("acme/tiny:other: cannot reach {free}: ")), "{line}");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_proxy_is_used_and_named_where_it_cannot_be_reached() {
    let (place, _) = Place::with_model();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = Some(ureq::Proxy::new(&format!("http://{free}")).unwrap());
    let client = Client::new(Settings { proxy, ..place.client.settings.clone() }).unwrap();
    let line = client.download(&all(), &gptq_hub::silent).unwrap_err().to_string();
    assert!(line.contains(&format!("(proxy {free})")), "{line}");
}

#[test]
fn a_name_that_leaves_the_folder_is_refused_before_anything_is_written() {
    for name in ["../../../evil.txt", "/tmp/evil.txt", "a/..\\..\\evil.txt", "C:evil.txt"] {
        let place = Place::new();
        place.server.add(REPO, &[("config.json", b"{}"), (name, b"no")]);
        let line = place.refusal(&all());
        assert!(line.contains("a file name that leaves the folder"), "{line}");
        assert_eq!(files_below(place.folder.path()), [""; 0]);
    }
}

#[test]
fn a_disk_that_is_too_small_is_told_before_the_first_byte() {
    let (place, _) = Place::with_model();
    // A tree that says more than any disk has, as the cache keeps it.
    let commit = place.server.world().repos[REPO].branches["main"].clone();
    let sha = "0".repeat(64);
    let tree = format!(
        r#"{{"format_version": 1, "files": {{"big.bin": {{"size": 1152921504606846976, "blob_id": "{}", "lfs_sha256": "{sha}", "lfs_size": 1152921504606846976}}}}}}"#,
        "0".repeat(40)
    );
    fs::create_dir_all(place.repo_folder().join("trees")).unwrap();
    fs::write(place.repo_folder().join(format!("trees/{commit}.json")), tree).unwrap();
    let line = place.refusal(&all());
    assert!(line.starts_with("acme/tiny: big.bin: needs 1152921504.61 GB, "), "{line}");
    assert!(place.server.log().iter().all(|asked| !asked.path.contains("resolve")));
}
