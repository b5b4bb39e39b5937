//! Models and data sets by name, from the cache or the hub: the one place where a command line's names become folders.

use std::path::PathBuf;

use anyhow::Result;
use gptq_hub::{Client, Kind, MAIN, ModelRef, RepoId, Request, Settings, Wanted, check_revision};

use crate::args::RepoTypeArg;
use crate::transfers::Transfers;

/// The folder of a model given as folder, hub id or hub-id:branch, with what is wanted of it.
pub fn model(model: &str, wanted: Wanted) -> Result<PathBuf> {
    match ModelRef::parse(model)? {
        ModelRef::Folder(folder) => Ok(folder),
        ModelRef::Hub { repo, revision } => {
            let request = Request { wanted, ..Request::model(&repo, &revision) };
            snapshot(&request).map_err(Into::into)
        }
    }
}

/// The folder of a data set's files that fit a pattern.
pub fn dataset(repo: &str, pattern: &str) -> Result<PathBuf, String> {
    let fetched = RepoId::dataset(repo).and_then(|repo| {
        let wanted = Wanted::Patterns { include: vec![pattern.to_owned()], exclude: Vec::new() };
        snapshot(&Request { wanted, ..Request::model(&repo, MAIN) })
    });
    fetched.map_err(|error| error.to_string())
}

fn snapshot(request: &Request) -> gptq_hub::Result<PathBuf> {
    let client = Client::new(Settings::from_env()?)?;
    let transfers = Transfers::arriving(request.repo.id());
    Ok(client.snapshot(request, &|event| transfers.show(event))?.folder)
}

/// The repository and the revision that `owner/name[:branch]` and `--revision` name.
pub fn named(text: &str, revision: Option<&str>, kind: RepoTypeArg) -> Result<(RepoId, String)> {
    let kind = match kind {
        RepoTypeArg::Model => Kind::Model,
        RepoTypeArg::Dataset => Kind::Dataset,
    };
    let (repo, branch) = match text.split_once(':') {
        Some((repo, branch)) => (repo, Some(branch)),
        None => (text, None),
    };
    if let (Some(branch), Some(revision)) = (branch, revision) {
        anyhow::bail!("--revision {revision}: expected no branch in the name, got {branch}");
    }
    let revision = revision.or(branch).unwrap_or(MAIN);
    check_revision(revision)?;
    Ok((RepoId::new(kind, repo)?, revision.to_owned()))
}
