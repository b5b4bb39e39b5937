//! What a run does about what is there already: an interrupted run, a finished output, other files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::fingerprint::Fingerprint;
use super::folder::{self, WorkFolder, is_vacant, problem};
use super::journal::Journal;
use super::layout::ArtifactLayout;
use super::writer::ArtifactWriter;
use crate::record::{LayerRecord, QuantizeLog};
use crate::{Error, Result};

/// What to do with what is already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutMode {
    /// Nothing may be there but an empty folder.
    New,
    /// An interrupted run of the same settings goes on, and may replace what it was allowed to replace. A finished
    /// output of the same settings stays.
    Resume,
    /// An interrupted run is thrown away; a finished output is replaced when the new one is complete.
    Force,
    /// What has the same settings goes on or stays, anything else is thrown away or replaced.
    ResumeOrForce,
}

impl OutMode {
    fn resumes(self) -> bool {
        matches!(self, Self::Resume | Self::ResumeOrForce)
    }

    fn forces(self) -> bool {
        matches!(self, Self::Force | Self::ResumeOrForce)
    }
}

/// How an artifact is begun.
pub enum Begun {
    /// To be written. The records are of the layers that an interrupted run has finished, in order.
    Writing(Box<ArtifactWriter>, Vec<LayerRecord>),
    /// It is there already, with the same settings.
    Finished(Box<QuantizeLog>),
}

/// Starts the artifact `out`, goes on with it, or finds it finished. What an interrupted run left of no use is removed.
///
/// # Errors
/// What is there and may not be replaced, with what would go on; settings that differ, by name.
pub fn begin(out: &Path, layout: ArtifactLayout, fingerprint: &Fingerprint, mode: OutMode) -> Result<Begun> {
    let out = folder::resolve(out)?;
    folder::check_replaceable(&out)?;
    let work = WorkFolder::hold(&out)?;
    let plan = match plan(&work, fingerprint, mode) {
        Ok(plan) => plan,
        Err(error) => {
            work.give_up();
            return Err(error);
        }
    };
    match plan {
        Outcome::Nothing(log) => work.remove().map(|()| Begun::Finished(log)),
        Outcome::GoOn(journal) => {
            journal.repair(&work.path)?;
            let Journal { run, records, .. } = journal;
            let writer = ArtifactWriter::open(work, layout, records.len(), run.replaces)?;
            Ok(Begun::Writing(writer.into(), records))
        }
        Outcome::Start { replaces } => match start(&work, &layout, fingerprint, replaces) {
            Ok(()) => {
                let writer = ArtifactWriter::open(work, layout, 0, replaces)?;
                Ok(Begun::Writing(writer.into(), Vec::new()))
            }
            Err(error) => {
                work.give_up();
                Err(error)
            }
        },
    }
}

enum Outcome {
    Nothing(Box<QuantizeLog>),
    GoOn(Journal),
    Start { replaces: bool },
}

fn plan(work: &WorkFolder, fingerprint: &Fingerprint, mode: OutMode) -> Result<Outcome> {
    work.recover()?;
    let out = &work.out;
    let interrupted = match Journal::read(&work.path) {
        Err(Error::Output { .. }) if mode == OutMode::Force => None,
        journal => journal?,
    };
    let interrupted = match interrupted {
        Some(journal) if journal.is_placed(out)? => None,
        interrupted => interrupted,
    };
    if interrupted.is_none() {
        work.clear()?;
    }
    let vacant = is_vacant(out)?;
    if !vacant && !out.join("quantize_config.json").is_file() {
        let (expected, hint) = match mode {
            OutMode::New => ("a new or empty folder", " (--force replaces artifacts alone)"),
            _ => ("an artifact to replace", ""),
        };
        return Err(problem(out, &format!("expected {expected}, got a folder of other files{hint}")));
    }
    match interrupted {
        None if vacant => Ok(Outcome::Start { replaces: mode.forces() }),
        None => beside_finished(out, fingerprint, mode),
        Some(journal) => beside_interrupted(work, journal, vacant, fingerprint, mode),
    }
}

fn beside_interrupted(
    work: &WorkFolder,
    mut journal: Journal,
    vacant: bool,
    fingerprint: &Fingerprint,
    mode: OutMode,
) -> Result<Outcome> {
    journal.run.replaces |= mode.forces();
    let refused = |problem: String| Err(Error::Output { path: work.path.clone(), problem });
    match fingerprint.difference(&journal.run.settings) {
        _ if mode == OutMode::New => {
            refused(format!("{}: --resume goes on, --force begins anew", journal.describe()))
        }
        Some(difference) if mode == OutMode::Resume => {
            refused(format!("cannot resume, the interrupted run had {difference} (--force begins anew)"))
        }
        None if mode.resumes() && (vacant || journal.run.replaces) => Ok(Outcome::GoOn(journal)),
        None if mode.resumes() => Err(problem(
            &work.out,
            "expected what the interrupted run found, nothing, got an artifact (--force --resume replaces it)",
        )),
        _ => {
            work.clear()?;
            Ok(Outcome::Start { replaces: true })
        }
    }
}

fn beside_finished(out: &Path, fingerprint: &Fingerprint, mode: OutMode) -> Result<Outcome> {
    let log = QuantizeLog::read_if_ours(out)?;
    let difference = match &log {
        Some(log) if log.settings.is_object() => fingerprint.difference(&log.settings),
        _ => Some("no log of its settings".into()),
    };
    match (mode, difference, log) {
        (OutMode::Resume | OutMode::ResumeOrForce, None, Some(log)) => Ok(Outcome::Nothing(Box::new(log))),
        (OutMode::Force | OutMode::ResumeOrForce, ..) => Ok(Outcome::Start { replaces: true }),
        (OutMode::Resume, difference, _) => {
            let had = difference.unwrap_or_default();
            let problem =
                format!("cannot resume, the finished output has {had} (--force --resume replaces it)");
            Err(Error::Output { path: out.into(), problem })
        }
        (OutMode::New, None, _) => Err(problem(
            out,
            "expected a new or empty folder, got the finished output of these settings (--resume keeps it, --force makes \
             it anew)",
        )),
        (OutMode::New, ..) => {
            Err(problem(out, "expected a new or empty folder, got a finished output (--force replaces it)"))
        }
    }
}

/// Lays out files and journal in an empty work folder.
fn start(
    work: &WorkFolder,
    layout: &ArtifactLayout,
    fingerprint: &Fingerprint,
    replaces: bool,
) -> Result<()> {
    let artifact = work.artifact();
    fs::create_dir(&artifact).map_err(Error::io(&artifact))?;
    for planned in &layout.files {
        let path = artifact.join(&planned.name);
        let file = File::create_new(&path).map_err(Error::io(&path))?;
        file.write_all_at(&planned.header, 0).map_err(Error::io(&path))?;
        file.set_len(planned.length).map_err(Error::io(&path))?;
        file.sync_all().map_err(Error::io(&path))?;
    }
    folder::sync(&artifact)?;
    // The journal comes last and at once: where it exists, the files have their headers and lengths.
    Journal::create(&work.path, fingerprint, layout.layers(), replaces)
}
