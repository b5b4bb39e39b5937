//! `gptq download`

use std::path::PathBuf;

use anyhow::Result;
use gptq_hub::{Client, Destination, DownloadPlan, FileState, RepoCache, Request, Settings, Wanted, bytes};
use serde::Serialize;

use super::fetch;
use crate::args::DownloadArgs;
use crate::output;
use crate::transfers::Transfers;

pub fn run(args: &DownloadArgs) -> Result<()> {
    let (repo, revision) = fetch::named(&args.repo, args.revision.as_deref(), args.repo_type)?;
    let mut settings = Settings::from_env()?;
    if let Some(token) = &args.token.token {
        settings = settings.with_token(token)?;
    }
    if let Some(cache) = &args.cache_dir {
        settings.cache.clone_from(cache);
    }
    let request = Request {
        repo,
        revision,
        wanted: wanted(args),
        destination: args.local_dir.clone().map_or(Destination::Cache, Destination::Folder),
        force: args.force_download,
        verify: true,
        workers: args.max_workers.into(),
    };
    let client = Client::new(settings)?;
    let report = fetch(&client, &request, args.dry_run)?;
    match (args.json, &report.folder) {
        (true, _) => output::json(&report)?,
        (false, Some(folder)) => say!("{}", folder.display())?,
        (false, None) => print_plan(&report)?,
    }
    Ok(())
}

fn wanted(args: &DownloadArgs) -> Wanted {
    match args.files.is_empty() {
        true => Wanted::Patterns { include: args.include.clone(), exclude: args.exclude.clone() },
        false => Wanted::Files(args.files.clone()),
    }
}

/// The files of a download, and where they are.
#[derive(Serialize)]
struct Report {
    repo: String,
    revision: String,
    commit: String,
    /// None where nothing was to be written.
    folder: Option<PathBuf>,
    files: Vec<FileReport>,
}

#[derive(Serialize)]
struct FileReport {
    path: String,
    size: u64,
    /// sha256 of a large file, git's sha1 of another.
    oid: String,
    present: bool,
    /// Bytes that an interrupted run has left.
    kept: u64,
}

fn fetch(client: &Client, request: &Request, dry_run: bool) -> Result<Report> {
    let transfers = Transfers::arriving(request.repo.id());
    let watch = |event: gptq_hub::Event| transfers.show(event);
    // Offline, the cache alone counts; its error names what is missing.
    if let Some(switch) = client.settings.offline {
        if let Destination::Folder(folder) = &request.destination {
            anyhow::bail!("{}: nothing is fetched into {}: {switch} is set", request.repo, folder.display());
        }
        let snapshot = client.snapshot(request, &watch)?;
        let tree = RepoCache::new(&client.settings.cache, &request.repo).tree(&snapshot.commit);
        let tree = tree.unwrap_or_default();
        let entries = request.wanted.of(&tree).unwrap_or_default();
        let files = entries.into_iter().map(|entry| FileReport::new(entry, FileState::Present)).collect();
        return Ok(Report::new(request, snapshot.commit, Some(snapshot.folder), files));
    }
    let plan = client.plan(request, &watch)?;
    let files = |plan: &DownloadPlan| {
        plan.files.iter().map(|file| FileReport::new(&file.entry, file.state)).collect()
    };
    if dry_run {
        return Ok(Report::new(request, plan.commit.clone(), None, files(&plan)));
    }
    let fetched = client.carry_out(&plan, request, &watch)?;
    Ok(Report::new(request, fetched.commit, Some(fetched.folder), files(&plan)))
}

impl Report {
    fn new(request: &Request, commit: String, folder: Option<PathBuf>, files: Vec<FileReport>) -> Self {
        Self { repo: request.repo.id().to_owned(), revision: request.revision.clone(), commit, folder, files }
    }
}

impl FileReport {
    fn new(entry: &gptq_hub::Entry, state: FileState) -> Self {
        let (present, kept) = match state {
            FileState::Present => (true, entry.size),
            FileState::Missing { kept } => (false, kept),
        };
        Self { path: entry.path.clone(), size: entry.size, oid: entry.oid.to_string(), present, kept }
    }
}

fn print_plan(report: &Report) -> Result<()> {
    let missing: Vec<_> = report.files.iter().filter(|file| !file.present).collect();
    for file in &report.files {
        let state = match (file.present, file.kept) {
            (true, _) => "present".to_owned(),
            (false, 0) => "to fetch".to_owned(),
            (false, kept) => format!("to fetch, {} already fetched", bytes(kept)),
        };
        say!("{:>10}  {}  ({state})", bytes(file.size), file.path)?;
    }
    let total = missing.iter().map(|file| file.size - file.kept).sum();
    say!("{} of {} files to fetch, {}", missing.len(), report.files.len(), bytes(total))?;
    Ok(())
}
