//! Models and texts by their names on a hub, through the program.

use std::fs;
use std::path::Path;
use std::process::Command;

use gptq_hub_stand_in::{On, Server, What};
use serde_json::{Value, json};

use crate::program::{artifact, demo, demo_text, gptq, run, words, workplace};
use crate::support::shared;

const REPO: &str = "acme/tiny-GPTQ";

/// The program against a hub, with an empty cache.
struct Hub {
    server: Server,
    cache: std::path::PathBuf,
}

impl Hub {
    fn new(name: &str) -> Self {
        let (server, cache) = (Server::start(), workplace(name).join("cache"));
        Self { server, cache }
    }

    fn add(&self, repo: &str, folder: &Path) {
        let files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap()))
            .collect();
        let files: Vec<_> = files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
        self.server.add(repo, &files);
    }

    fn gptq(&self, verb: &str) -> Command {
        let mut command = gptq(verb);
        command.env_remove("HF_HUB_OFFLINE").env_remove("HF_TOKEN").env("HF_ENDPOINT", self.server.url());
        command.env("HF_HUB_CACHE", &self.cache).env("HF_HOME", &self.cache);
        command
    }
}

#[test]
fn download_prints_the_folder_and_every_verb_takes_the_name() {
    let hub = Hub::new("hub-verbs");
    hub.add(REPO, &artifact(""));
    let planned = run(hub.gptq("download").args([REPO, "--dry-run"])).ok();
    assert!(planned.contains("model.safetensors  (to fetch)") && !hub.cache.exists(), "{planned}");
    let folder = run(hub.gptq("download").arg(REPO)).ok();
    let folder = Path::new(folder.trim());
    for entry in fs::read_dir(artifact("")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            assert!(fs::read(folder.join(path.file_name().unwrap())).unwrap() == fs::read(&path).unwrap());
        }
    }
    let report = run(hub.gptq("download").args([REPO, "--json"])).json();
    assert!(report["files"].as_array().unwrap().iter().all(|file| file["present"] == true), "{report}");
    assert_eq!(report["folder"], folder.to_str().unwrap());
    assert!(run(hub.gptq("inspect").args([REPO, "--json"])).json()["sound"].as_bool().unwrap());
    let said = |command: &mut Command| {
        run(command.args(words("--prompt a --max-new-tokens 4 --temperature 0"))).ok()
    };
    assert_eq!(said(hub.gptq("generate").arg(REPO)), said(gptq("generate").arg(artifact(""))));
    let offline = run(hub.gptq("inspect").env("HF_HUB_OFFLINE", "1").arg(REPO)).ok();
    assert_eq!(offline, run(gptq("inspect").arg(folder)).ok());
}

#[test]
fn a_verb_fetches_what_it_needs_and_no_more() {
    let hub = Hub::new("hub-needs");
    hub.add(REPO, &artifact(""));
    hub.add("acme/tiny", &demo());
    let rows = run(hub.gptq("table").args(["acme/tiny", "--json"])).json();
    assert_eq!(rows.as_array().unwrap().len(), 6);
    let asked = |part: &str| hub.server.log().iter().filter(|asked| asked.path.contains(part)).count();
    assert_eq!((asked("/resolve/"), asked("config.json")), (1, 1));
    let measured = |model: &str, hub: &Hub| -> Value {
        let mut command = hub.gptq("eval");
        command.arg(model).args(["--dataset", &demo_text("test")]);
        run(command.args(words("--join raw --ctx 128 --max-windows 2 --json"))).json()
    };
    let by_name = measured(REPO, &hub);
    assert_eq!(by_name["perplexity"], measured(artifact("").to_str().unwrap(), &hub)["perplexity"]);
    // Again, without anything left to fetch.
    let before = asked("/resolve/");
    measured(REPO, &hub);
    assert_eq!(asked("/resolve/"), before);
}

#[test]
fn wikitext_comes_from_the_hub_where_it_is_nowhere_else() {
    let hub = Hub::new("hub-wikitext");
    let text = fs::read(demo().join("text/test-00000-of-00001.parquet")).unwrap();
    let name = "wikitext-2-raw-v1/test-00000-of-00001.parquet";
    hub.server
        .add("Salesforce/wikitext", &[(name, text.as_slice()), ("wikitext-103-v1/train.parquet", b"large")]);
    let measured = |spec: &str| {
        let mut command = hub.gptq("eval");
        command.arg(demo()).args(["--dataset", spec]);
        run(command.args(words("--join raw --ctx 128 --max-windows 2 --json"))).json()["perplexity"].clone()
    };
    assert_eq!(measured("wikitext2:test"), measured(&demo_text("test")));
    let fetched = hub.server.log().into_iter().filter(|asked| asked.path.contains("/resolve/")).count();
    assert_eq!(fetched, 1, "that split, and nothing else of the data set");
}

#[test]
fn a_download_that_cannot_be_is_one_line_and_an_exit_status() {
    let hub = Hub::new("hub-refusals");
    hub.add(REPO, &artifact(""));
    let refusal = |arguments: &[&str]| run(hub.gptq("download").args(arguments)).refusal();
    assert!(refusal(&["acme/none"]).contains("acme/none: not found, or private: HF_TOKEN is not set"));
    assert!(refusal(&["acme/tiny-GPTQ:dev"]).contains("no such revision; the branches there: main"));
    assert!(refusal(&[REPO, "x.json"]).contains("x.json: no such file in the repository; the files there: "));
    assert!(
        refusal(&["acme/tiny-GPTQ:dev", "--revision", "main"])
            .contains("expected no branch in the name, got dev")
    );
    assert!(refusal(&["../etc"]).contains("expected `owner/name`"));
    hub.server.fault(On::Storage, usize::MAX, What::WrongBytes);
    assert!(refusal(&[REPO]).contains("arrived damaged 3 times"));
}

#[test]
fn what_is_pushed_comes_back_by_its_branch_and_measures_the_same() {
    let hub = Hub::new("hub-push");
    let run_dir = workplace("hub-push-run");
    for (branch, options) in [("main", ""), ("gptq-8bit", "--bits 8")] {
        let made = artifact(options);
        fs::create_dir_all(run_dir.join(branch)).unwrap();
        for entry in fs::read_dir(made).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, run_dir.join(branch).join(path.file_name().unwrap())).unwrap();
        }
    }
    let push = |options: &str| {
        let mut command = hub.gptq("push");
        command.env("HF_TOKEN", "hf_write").arg(&run_dir).arg(REPO).args(words(options));
        command
    };
    let plan = run(&mut push("--dry-run")).ok();
    assert!(
        plan.contains("acme/tiny-GPTQ: new, public (as acme)") && plan.contains("gptq-8bit (new)"),
        "{plan}"
    );
    assert!(run(&mut push("")).refusal().contains("expected --yes"));
    assert!(hub.server.log().iter().all(|asked| asked.method == "GET"), "nothing is sent unasked");
    let done = run(&mut push("--yes")).ok();
    assert_eq!(done.matches("read back and compared").count(), 2, "{done}");
    let again = run(&mut push("--yes --json")).json();
    let unchanged = again["branches"].as_array().unwrap().iter().all(|branch| branch["send"] == json!([]));
    assert!(unchanged, "{again}");
    let measured = |model: &str| {
        let mut command = hub.gptq("eval");
        command.arg(model).args(["--dataset", &demo_text("test")]);
        run(command.args(words("--join raw --ctx 128 --max-windows 4 --json"))).json()["perplexity"].clone()
    };
    let here = run_dir.join("gptq-8bit");
    assert_eq!(measured("acme/tiny-GPTQ:gptq-8bit"), measured(here.to_str().unwrap()));
    let read_only = run(push("--yes").env("HF_TOKEN", "hf_read").arg("--create-pr"));
    assert_eq!(read_only.code, Some(0), "nothing has changed, so nothing is asked for: {}", read_only.stderr);
    assert!(
        run(hub.gptq("push").arg(run_dir.join("main/config.json")).arg(REPO).arg("--dry-run"))
            .refusal()
            .contains("config.json")
    );
}

#[test]
fn a_card_and_a_report_say_what_the_artifacts_are() {
    let work = workplace("hub-card");
    let (dir, base) = (work.join("run"), work.join("base"));
    fs::create_dir_all(&base).unwrap();
    fs::write(base.join("README.md"), "---\nlicense: llama2\n---\n# The original\n").unwrap();
    for (branch, options) in [("main", ""), ("gptq-8bit", "--bits 8")] {
        fs::create_dir_all(dir.join(branch)).unwrap();
        for entry in fs::read_dir(artifact(options)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.join(branch).join(path.file_name().unwrap())).unwrap();
        }
        fs::write(dir.join(branch).join("LICENSE-llama2.txt"), "terms").unwrap();
        fs::write(
            dir.join(branch).join("chat_template.jinja"),
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        )
        .unwrap();
    }
    let written = run(gptq("report").arg(&dir)).ok();
    assert!(written.contains("report.html") && written.contains("seconds.svg"), "{written}");
    let page = fs::read_to_string(dir.join("report.html")).unwrap();
    assert!(page.contains("gptq-8bit") && page.contains("Loss of every linear, main"));
    let card = |branch: &str| {
        let mut command = gptq("card");
        command.arg(&dir).args(["--repo", "acme/tiny-GPTQ", "--base-model"]).arg(&base);
        run(&mut command).ok();
        fs::read_to_string(dir.join(branch).join("README.md")).unwrap()
    };
    let main = card("main");
    for part in [
        "license: llama2\n",
        "| gptq-8bit | 8 | 128 |",
        "<system>{system_message}<user>{prompt}",
        "[LICENSE-llama2.txt](LICENSE-llama2.txt)",
        "# The original",
        "gptq download acme/tiny-GPTQ:gptq-8bit",
    ] {
        assert!(main.contains(part), "{part} is missing in\n{main}");
    }
    assert_eq!(card("main"), main, "a second time it is the same");
    assert!(card("gptq-8bit").contains("branch `gptq-8bit`"));
    assert!(run(gptq("card").arg(&work).args(["--repo", "a/b"])).refusal().contains("expected an artifact"));
}

#[test]
fn branches_that_could_not_be_sent_in_the_end_are_not_begun() {
    let hub = Hub::new("hub-branches");
    let out = workplace("hub-branches-out").join("out");
    let refusal = |options: &str| {
        let mut command = hub.gptq("branches");
        run(command.arg(demo()).arg("--out").arg(&out).args(words(options))).refusal()
    };
    assert!(refusal("--push acme/tiny-GPTQ").contains("expected --yes, or a terminal"));
    assert!(refusal("--push tiny --yes").contains("expected `owner/name`"));
    assert!(refusal("--private").contains("expected --push REPO beside them"));
    assert!(!out.exists() && hub.server.log().is_empty());
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
fn six_branches_of_a_trained_model_go_to_the_hub_and_one_comes_back_the_same() {
    let hub = Hub::new("hub-six");
    hub.add("acme/wiki20m", &shared("models/wiki20m"));
    let out = workplace("hub-six-out").join("branches");
    let with_texts = |verb: &str| {
        let mut command = hub.gptq(verb);
        command.env("GPTQ_DATASETS", shared("data"));
        command
    };
    let mut branches = with_texts("branches");
    branches.args(["acme/wiki20m", "--push", "acme/wiki20m-GPTQ", "--yes", "--out"]).arg(&out);
    branches.args(words("--preset fast --dataset wikitext2:validation --samples 2 --seq-len 128"));
    let pushed = run(branches.env("HF_TOKEN", "hf_write")).ok();
    assert_eq!(pushed.matches("read back and compared").count(), 6, "{pushed}");
    let branch = "gptq-4bit-32g-actorder_True";
    {
        let world = hub.server.world();
        let repo = &world.repos["acme/wiki20m-GPTQ"];
        assert_eq!(repo.branches.len(), 6);
        // The repository's own first commit, and one for each branch.
        assert_eq!(repo.commits.len(), 7);
        let card = &repo.commits[&repo.branches["main"]]["README.md"].bytes;
        assert!(String::from_utf8_lossy(card).contains("gptq download acme/wiki20m-GPTQ:gptq-4bit-64g"));
    }
    // Another machine: nothing of the model is there.
    let empty = workplace("hub-six-empty");
    let measured = |model: &str| {
        let mut command = with_texts("eval");
        command.env("HF_HUB_CACHE", &empty).env("HF_HOME", &empty);
        command.args([model, "--dataset", "wikitext2:test"]);
        run(command.args(words("--ctx 256 --max-windows 4 --json"))).json()["perplexity"].clone()
    };
    let there = measured(&format!("acme/wiki20m-GPTQ:{branch}"));
    assert_eq!(there, measured(out.join(branch).to_str().unwrap()));
    let cached = fs::read_dir(empty.join("models--acme--wiki20m-GPTQ/refs")).unwrap();
    assert_eq!(cached.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), [branch]);
    println!("{branch}: perplexity {there}");
}
