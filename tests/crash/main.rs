//! The program is killed, or refused a file operation, at each of its file operations in turn. Whatever happens, nothing
//! half-written has a final name, going on ends in the bytes of an undisturbed run, and no litter is left.
//!
//! `CRASH_STRIDE=1` takes every operation, 3 every third from `CRASH_OFFSET` on; without it only some are taken, another share in every scene.

mod folder;
mod shim;
mod tiny;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use folder::{Contents, Whole, contents};
use rand::{Rng, SeedableRng};
use rayon::iter::Either;
use rayon::prelude::*;
use shim::{Ended, How, Shim};
use tiny::Tiny;

/// A command, what lies there before it, and how one goes on after it has failed.
struct Scene {
    name: &'static str,
    verb: &'static str,
    /// Makes what lies there before.
    before: fn(&Workshop, &Path),
    options: &'static [&'static str],
    recovery: &'static [&'static str],
    artifacts: &'static [&'static str],
    /// Folders cannot be exchanged in one step, as on some file systems.
    plain: bool,
    /// So long that an operation is met by a kill and one other fault, in turn, and not by all.
    long: bool,
}

impl Scene {
    /// What happens at operation `at`.
    fn faults(&self, at: usize) -> impl Iterator<Item = How> {
        let long = self.long;
        let others = How::ALL.len() - 1;
        How::ALL
            .into_iter()
            .enumerate()
            .filter(move |(i, _)| !long || *i == 0 || i - 1 == at % others)
            .map(|(_, how)| how)
    }
}

const QUANTIZE: Scene = Scene {
    name: "quantize",
    verb: "quantize",
    before: |_, _| {},
    options: &[],
    recovery: &["--resume"],
    artifacts: &["out"],
    plain: false,
    long: false,
};

const BRANCHES: Scene = Scene {
    name: "branches",
    verb: "branches",
    artifacts: &["out/main", "out/gptq-8bit--1g-actorder_True"],
    long: true,
    ..QUANTIZE
};

/// What all scenes share.
struct Workshop {
    dir: PathBuf,
    tiny: Tiny,
    shim: Shim,
}

impl Workshop {
    fn open(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{name}"));
        let _ = fs::remove_dir_all(&dir);
        let tiny = Tiny::make(&dir);
        Self { shim: Shim::build(&dir), dir, tiny }
    }

    /// An empty folder.
    fn fresh(&self, name: &str) -> PathBuf {
        let dir = self.dir.join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        dir
    }

    /// Runs the scene once undisturbed, then once for each operation and each way of failing.
    fn play(&self, scene: &Scene) {
        let started = Instant::now();
        let template = self.fresh(&format!("{}-before", scene.name));
        (scene.before)(self, &template);
        let stage =
            Stage { workshop: self, scene, old: contents(&template), new: self.expected(scene), template };
        let root = self.fresh(&format!("{}-undisturbed", scene.name));
        copy(&stage.template, &root);
        let operations = self.shim.count(self.command(scene, &root, scene.options), &root);
        stage.is_complete(&root).unwrap();
        assert!(operations > 50, "{}: the shim saw only {operations} operations", scene.name);
        let cases = (1 + number("CRASH_OFFSET", 0)..=operations)
            .step_by(number("CRASH_STRIDE", 23))
            .flat_map(|at| scene.faults(at).map(move |how| (at, how)));
        let cases: Vec<_> = cases.collect();
        let play = |(at, how): &(usize, How)| {
            stage
                .case(*at, *how)
                .map_err(|problem| format!("{how:?} at operation {at} of {operations}: {problem}"))
        };
        let (ended, failures): (Vec<_>, Vec<_>) =
            cases.par_iter().map(play).partition_map(|result| match result {
                Ok(ended) => Either::Left(ended),
                Err(problem) => Either::Right(problem),
            });
        let count = |kind: fn(&Ended) -> bool| ended.iter().filter(|ended| kind(ended)).count();
        let (killed, refused) =
            (count(|ended| *ended == Ended::Killed), count(|ended| matches!(ended, Ended::Refused(_))));
        println!(
            "{}: {operations} operations, {} cases: {killed} killed, {refused} refused, {} completed all the same, {} wrong; {:.0} s",
            scene.name,
            cases.len(),
            ended.len() - killed - refused,
            failures.len(),
            started.elapsed().as_secs_f64()
        );
        assert!(failures.is_empty(), "{}: {} failures\n{}", scene.name, failures.len(), failures.join("\n"));
        assert!(
            killed > cases.len() / 5 && refused > 0,
            "{}: the shim did not reach the program",
            scene.name
        );
    }

    /// What the scene's command leaves where nothing was before and nothing disturbs it.
    fn expected(&self, scene: &Scene) -> Contents {
        let root = self.fresh(&format!("{}-expected", scene.name));
        assert_eq!(shim::run(self.command(scene, &root, &[])), Ok(Ended::Well));
        contents(&root)
    }

    fn command(&self, scene: &Scene, root: &Path, options: &[&str]) -> Command {
        let mut command = self.tiny.command(scene.verb, &root.join("out"), options);
        if scene.plain {
            command.env("CRASH_PLAIN", "1");
        }
        command
    }
}

/// A scene that is played.
struct Stage<'a> {
    workshop: &'a Workshop,
    scene: &'a Scene,
    template: PathBuf,
    old: Contents,
    new: Contents,
}

impl Stage<'_> {
    /// One fault, and going on after it. Says how the run with the fault ended.
    fn case(&self, at: usize, how: How) -> Result<Ended, String> {
        let Self { workshop, scene, .. } = self;
        let root = workshop.fresh(&format!("{}-{at}-{how:?}", scene.name));
        copy(&self.template, &root);
        let command = workshop.command(scene, &root, scene.options);
        let ended = workshop.shim.run(command, &root, at, how)?;
        match (&ended, how) {
            (Ended::Well, _) => self.is_complete(&root)?,
            (Ended::Killed, How::Kill | How::Torn) => {}
            (Ended::Refused(line), How::Eio | How::Enospc) if line.contains(root.to_str().unwrap()) => {}
            _ => return Err(format!("it ended with {ended:?}")),
        }
        Whole { old: &self.old, new: &self.new }.check(&contents(&root), scene.artifacts)?;
        match shim::run(workshop.command(scene, &root, scene.recovery))? {
            Ended::Well => self.is_complete(&root).map_err(|problem| format!("after going on: {problem}"))?,
            ended => return Err(format!("going on ended with {ended:?}")),
        }
        fs::remove_dir_all(root).unwrap();
        Ok(ended)
    }

    fn is_complete(&self, root: &Path) -> Result<(), String> {
        let now = contents(root);
        let differs = |name: &&String| now.get(*name) != self.new.get(*name);
        match now.keys().chain(self.new.keys()).find(differs) {
            Some(name) => Err(format!("{name} is not as an undisturbed run leaves it")),
            None => Ok(()),
        }
    }
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |number| number.parse().unwrap())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// A finished artifact of other settings.
fn finished(workshop: &Workshop, root: &Path) {
    let command = workshop.tiny.command("quantize", &root.join("out"), &["--bits", "8"]);
    assert_eq!(shim::run(command), Ok(Ended::Well));
}

/// A run that was killed while it solved its second layer.
fn interrupted(workshop: &Workshop, root: &Path) {
    let journal = root.join(".out.partial/journal.jsonl");
    let lines = || fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    for at in 60.. {
        let _ = fs::remove_dir_all(root);
        fs::create_dir(root).unwrap();
        let command = workshop.tiny.command("quantize", &root.join("out"), &[]);
        assert_eq!(workshop.shim.run(command, root, at, How::Kill), Ok(Ended::Killed));
        if lines() == 2 {
            return;
        }
    }
}

/// Finished branches of other settings.
fn finished_branches(workshop: &Workshop, root: &Path) {
    let options = ["--join", "raw", "--seed", "1"];
    assert_eq!(shim::run(workshop.tiny.command("branches", &root.join("out"), &options)), Ok(Ended::Well));
}

#[test]
fn a_new_artifact() {
    Workshop::open("new").play(&QUANTIZE);
}

#[test]
fn an_artifact_that_goes_on() {
    let scene = Scene { name: "resume", before: interrupted, options: &["--resume"], ..QUANTIZE };
    Workshop::open("resume").play(&scene);
}

#[test]
fn an_artifact_that_replaces_another() {
    let recovery = &["--force", "--resume"];
    let scene = Scene { name: "force", before: finished, options: &["--force"], recovery, ..QUANTIZE };
    let workshop = Workshop::open("force");
    workshop.play(&scene);
    workshop.play(&Scene { name: "force-plain", plain: true, ..scene });
}

#[test]
fn branches_and_their_measurements() {
    Workshop::open("branches").play(&BRANCHES);
}

#[test]
fn branches_that_replace_others() {
    let recovery = &["--force", "--resume"];
    let before = finished_branches;
    let scene = Scene { name: "branches-force", before, options: &["--force"], recovery, ..BRANCHES };
    Workshop::open("branches-force").play(&scene);
}

/// `CRASH_SEED` makes the same choices again.
#[test]
#[ignore = "two hundred runs: some minutes"]
fn kills_at_random_times() {
    let workshop = Workshop::open("random");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("CRASH_SEED").map_or(now, |seed| seed.parse().unwrap());
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let (mut equal, mut kills) = (0, 0);
    for scene in [&QUANTIZE, &BRANCHES] {
        let started = Instant::now();
        let (expected, longest) = (workshop.expected(scene), started.elapsed());
        for _ in 0..100 {
            let root = workshop.fresh(scene.name);
            let mut options: &[&str] = &[];
            loop {
                let mut command = workshop.command(scene, &root, options);
                let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                std::thread::sleep(Duration::from_secs_f64(
                    longest.as_secs_f64() * random.random_range(0.0..1.2),
                ));
                child.kill().unwrap();
                options = &["--resume"];
                if child.wait().unwrap().success() {
                    break;
                }
                kills += 1;
            }
            assert_eq!(shim::run(workshop.command(scene, &root, options)), Ok(Ended::Well));
            assert!(contents(&root) == expected, "{}, seed {seed}", scene.name);
            equal += 1;
        }
    }
    println!("{equal} of 200 runs ended in the same bytes after {kills} kills, seed {seed}");
}
