//! What is sent, in which order, and what is there afterwards.

use std::fs;
use std::path::PathBuf;

use gptq_hub::{Client, LocalFile, PushBranch, PushRequest, Pushed, RepoId};
use gptq_hub_stand_in::{On, What};

use crate::support::{Place, REPO, assert_holds, noise};

/// Two branches that share one large file; the other one of `main` has three parts.
fn files() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    vec![
        ("main", "README.md", b"# tiny\n".to_vec()),
        ("main", "model.safetensors", noise(250_000, 1)),
        ("main", "shared.safetensors", noise(40_000, 2)),
        ("other", "README.md", b"# tiny, other\n".to_vec()),
        ("other", "shared.safetensors", noise(40_000, 2)),
    ]
}

fn request(place: &Place, files: &[(&str, &str, Vec<u8>)]) -> PushRequest {
    let mut branches: Vec<PushBranch> = Vec::new();
    for (branch, path, bytes) in files {
        let source: PathBuf = place.folder.path().join(branch).join(path);
        fs::create_dir_all(source.parent().unwrap()).unwrap();
        fs::write(&source, bytes).unwrap();
        let file = LocalFile::read(&source, path).unwrap();
        match branches.iter_mut().find(|known| known.name == *branch) {
            Some(known) => known.files.push(file),
            None => branches.push(PushBranch { name: branch.to_string(), files: vec![file] }),
        }
    }
    let repo = RepoId::model(REPO).unwrap();
    PushRequest { repo, branches, private: true, create_pr: false, summary: "Tiny".into(), workers: 3 }
}

fn place() -> Place {
    let place = Place::new().with_token("hf_write");
    place.server.world().part_size = 100_000;
    place
}

fn push(client: &Client, request: &PushRequest) -> Result<Pushed, gptq_hub::Error> {
    let plan = client.push_plan(request, &gptq_hub::silent)?;
    client.push(request, &plan, &gptq_hub::silent)
}

/// What a branch holds, but for its attributes.
fn held(place: &Place, branch: &str) -> Vec<(String, Vec<u8>)> {
    let world = place.server.world();
    let repo = &world.repos[REPO];
    let files = &repo.commits[&repo.branches[branch]];
    files
        .iter()
        .filter(|(path, _)| *path != ".gitattributes")
        .map(|(path, file)| (path.clone(), file.bytes.to_vec()))
        .collect()
}

fn expected(files: &[(&str, &str, Vec<u8>)], branch: &str) -> Vec<(String, Vec<u8>)> {
    files.iter().filter(|file| file.0 == branch).map(|file| (file.1.to_owned(), file.2.clone())).collect()
}

fn assert_there(place: &Place, files: &[(&str, &str, Vec<u8>)]) {
    for branch in ["main", "other"] {
        assert!(held(place, branch) == expected(files, branch), "{branch}");
    }
}

#[test]
fn a_plan_names_everything_and_writes_nothing() {
    let place = place();
    let request = request(&place, &files());
    let plan = place.client.push_plan(&request, &gptq_hub::silent).unwrap();
    assert!(plan.creates && plan.account == "acme");
    let shown: Vec<_> =
        plan.branches.iter().map(|b| (b.name.as_str(), b.creates, b.send.len(), b.unchanged.len())).collect();
    assert_eq!(shown, [("main", false, 3, 0), ("other", true, 2, 0)]);
    assert!(place.server.log().iter().all(|asked| asked.method == "GET"), "{:?}", place.server.log());
    assert!(place.server.world().repos.is_empty());
}

#[test]
fn branches_are_made_before_main_has_files_and_main_comes_last() {
    let place = place();
    let pushed = push(&place.client, &request(&place, &files())).unwrap();
    assert_there(&place, &files());
    assert!(place.server.world().repos[REPO].private);
    assert_eq!(
        pushed.commits.iter().map(|(branch, _)| branch.as_str()).collect::<Vec<_>>(),
        ["other", "main"]
    );
    assert_eq!(pushed.sent, 290_000, "what both branches have was sent once");
    let log = place.server.log();
    let at = |method: &str, part: &str| {
        log.iter().position(|asked| asked.method == method && asked.path.contains(part))
    };
    let order = [
        at("GET", "whoami"),
        at("POST", "repos/create"),
        at("POST", "/branch/other"),
        at("POST", "/commit/other"),
        at("POST", "/commit/main"),
    ];
    assert!(order.is_sorted() && order.iter().all(Option::is_some), "{order:?}");
    let parts = log.iter().filter(|asked| asked.method == "PUT" && asked.path.contains("part=")).count();
    assert_eq!(parts, 3);
    assert!(log.iter().filter(|asked| asked.storage).all(|asked| asked.token.is_none()));
    // And back.
    let folder = place.fetch(&crate::support::all()).unwrap().folder;
    let main: Vec<_> =
        files().into_iter().filter(|file| file.0 == "main").map(|file| (file.1, file.2)).collect();
    assert_holds(&folder, &main);
}

#[test]
fn what_is_unchanged_is_not_sent_and_weights_of_another_artifact_go() {
    let place = place();
    let mut all = files();
    push(&place.client, &request(&place, &all)).unwrap();
    let before = place.server.log().len();
    let again = push(&place.client, &request(&place, &all)).unwrap();
    assert_eq!(again.sent, 0);
    assert!(place.server.log()[before..].iter().all(|asked| asked.method == "GET"));
    all[0].2 = b"# changed\n".to_vec();
    all.retain(|file| (file.0, file.1) != ("main", "shared.safetensors"));
    let request = request(&place, &all);
    let plan = place.client.push_plan(&request, &gptq_hub::silent).unwrap();
    let main = &plan.branches[0];
    assert_eq!(main.send.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), ["README.md"]);
    assert_eq!(
        (main.unchanged.as_slice(), main.delete.as_slice()),
        (&["model.safetensors".to_owned()][..], &["shared.safetensors".to_owned()][..])
    );
    assert_eq!(push(&place.client, &request).unwrap().sent, 0);
    assert_there(&place, &all);
}

#[test]
fn what_goes_wrong_on_the_way_is_tried_again_and_nothing_is_committed_twice() {
    for (name, on, times, what) in [
        ("storage busy", On::Upload, 3, What::Status(503)),
        ("asked to wait", On::Upload, 1, What::TooMany(0)),
        ("commit fails", On::Commit, 2, What::Status(500)),
        ("made, and 500 all the same", On::Commit, 2, What::DoneThenFail),
        ("in progress", On::Commit, 1, What::Status(409)),
    ] {
        let place = place();
        place.server.fault(on, times, what);
        push(&place.client, &request(&place, &files())).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_there(&place, &files());
        // The first one, and one for each branch.
        assert_eq!(place.server.world().repos[REPO].commits.len(), 3, "{name}");
    }
}

#[test]
fn a_branch_that_somebody_else_has_changed_is_compared_again() {
    let place = place();
    place.server.fault(On::Commit, 1, What::Status(412));
    push(&place.client, &request(&place, &files())).unwrap();
    assert_there(&place, &files());
    let place = self::place();
    place.server.fault(On::Commit, usize::MAX, What::Status(412));
    let line = push(&place.client, &request(&place, &files())).unwrap_err().to_string();
    assert_eq!(line, "acme/tiny:other: the branch has changed meanwhile");
}

#[test]
fn nothing_is_sent_into_a_repository_that_is_public_where_a_private_one_was_asked_for() {
    let place = place();
    let request = request(&place, &files());
    let plan = place.client.push_plan(&request, &gptq_hub::silent).unwrap();
    // Another client makes it between plan and push.
    place.server.world().repos.insert(REPO.into(), gptq_hub_stand_in::Repo::new());
    let error = place.client.push(&request, &plan, &gptq_hub::silent).unwrap_err().to_string();
    assert!(error.starts_with("acme/tiny: the repository is public, although"), "{error}");
    assert!(place.server.log().iter().all(|asked| !asked.path.contains("commit") && asked.method != "PUT"));
}

#[test]
fn an_interrupted_push_sends_the_rest() {
    let place = place();
    // The last commit never succeeds: all large files are there by then.
    place.server.world().faults.push(gptq_hub_stand_in::Fault {
        on: On::Commit,
        skip: 1,
        times: 9,
        what: What::Status(500),
    });
    assert!(push(&place.client, &request(&place, &files())).is_err());
    place.server.world().faults.clear();
    let pushed = push(&place.client, &request(&place, &files())).unwrap();
    assert_eq!(pushed.sent, 0, "nothing large is sent again");
    assert_there(&place, &files());
}

#[test]
fn who_may_not_write_is_told_so_and_proposals_leave_the_branch_alone() {
    let place = place();
    push(&place.client, &request(&place, &files())).unwrap();
    let mut changed = files();
    changed[0].2 = b"# proposed\n".to_vec();
    let proposal = PushRequest { create_pr: true, ..request(&place, &changed) };
    let pushed = push(&place.client, &proposal).unwrap();
    assert!(pushed.commits.iter().any(|(_, made)| made.ends_with("/acme/tiny/discussions/1")), "{pushed:?}");
    assert_there(&place, &files());

    let refused = |place: &Place| push(&place.client, &request(place, &changed)).unwrap_err().to_string();
    let place = place.with_token("hf_read");
    let line = refused(&place);
    assert!(line.contains("this token may not write here: you must use a write token"), "{line}");
    let place = place.with_token("hf_wrong");
    assert!(refused(&place).contains("refused the token from HF_TOKEN"));
    let anonymous = Place::new();
    assert_eq!(refused(&anonymous), "acme/tiny: publishing needs a token that may write: set HF_TOKEN");
}

#[test]
fn a_file_that_changes_while_it_is_sent_is_an_error() {
    let place = place();
    let request = request(&place, &files());
    fs::write(place.folder.path().join("main/README.md"), "# changed meanwhile\n").unwrap();
    let line = push(&place.client, &request).unwrap_err().to_string();
    assert_eq!(line, "acme/tiny: README.md: the file has changed while it was being sent");
}
