//! Downloads: what there is to do, done by several workers, every byte verified.

mod board;
mod plan;
mod receive;
mod space;
mod store;
mod worker;

use std::path::PathBuf;

pub use self::plan::{DownloadPlan, FileState, Planned};
use self::store::Store;
use crate::error::{Cause, Result, Subject};
use crate::name::RepoId;
use crate::progress::{Event, Watch};
use crate::select::Wanted;
use crate::{Client, Snapshot};

/// Where files go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The cache, which all clients share.
    Cache,
    /// A folder of plain files.
    Folder(PathBuf),
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub repo: RepoId,
    /// A branch, a tag or a commit.
    pub revision: String,
    pub wanted: Wanted,
    pub destination: Destination,
    /// Fetch also what is there.
    pub force: bool,
    /// Read what is there, and fetch what is damaged.
    pub verify: bool,
    pub workers: usize,
}

impl Request {
    /// What a program needs to run a model, from the cache; fetched by eight workers as far as it is missing.
    pub fn model(repo: &RepoId, revision: &str) -> Self {
        Self {
            repo: repo.clone(),
            revision: revision.to_owned(),
            wanted: Wanted::Model,
            destination: Destination::Cache,
            force: false,
            verify: false,
            workers: 8,
        }
    }
}

/// What a download has brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub commit: String,
    /// The snapshot, or the folder that was asked for.
    pub folder: PathBuf,
    /// Files that arrived, and their bytes.
    pub files: usize,
    pub bytes: u64,
}

impl Client {
    /// The files of a repository, from the cache where they are complete there, else from the hub. Where the hub cannot
    /// be reached, what the cache has counts, and a note says so.
    pub fn snapshot(&self, request: &Request, watch: &Watch) -> Result<Snapshot> {
        let subject = Subject::revision(&request.repo, &request.revision);
        let cache = crate::RepoCache::new(&self.settings.cache, &request.repo);
        let local =
            cache.complete(&request.revision, &request.wanted).map_err(subject.io(&cache.folder()))?;
        if let Some(switch) = self.settings.offline {
            let dir = self.settings.cache.clone();
            return local.map_err(|missing| subject.fails(Cause::Offline { missing, dir, switch }));
        }
        let local = match local {
            Ok(whole) if crate::is_commit(&request.revision) => return Ok(whole),
            local => local.ok(),
        };
        match (self.download(request, watch), local) {
            (Ok(fetched), _) => Ok(Snapshot { commit: fetched.commit, folder: fetched.folder }),
            (Err(error), Some(local)) if is_absence(&error.cause) => {
                watch(Event::Note(&format!("{error}; taking what the cache has of it, {}", local.commit)));
                Ok(local)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Fetches what is missing. All of it is there and verified where it returns Ok.
    pub fn download(&self, request: &Request, watch: &Watch) -> Result<Fetched> {
        let plan = self.plan(request, watch)?;
        self.carry_out(&plan, request, watch)
    }

    /// Fetches what a plan says.
    pub fn carry_out(&self, plan: &DownloadPlan, request: &Request, watch: &Watch) -> Result<Fetched> {
        let subject = Subject::revision(&request.repo, &request.revision);
        let store = Store::new(self, request);
        store.prepare(plan).map_err(subject.io(store.root()))?;
        let missing = plan.missing(&store, request, watch).map_err(subject.io(store.root()))?;
        space::check(&missing, &subject, &store, self.settings.piece)?;
        let (files, bytes) = (missing.len(), missing.iter().map(|entry| entry.size).sum());
        if files > 0 {
            watch(Event::Plan { files, bytes });
        }
        board::fetch_all(self, plan, missing, &store, request, watch)?;
        store.conclude(plan).map_err(subject.io(store.root()))?;
        Ok(Fetched { commit: plan.commit.clone(), folder: store.folder(&plan.commit), files, bytes })
    }
}

/// Whether a hub was not there, rather than had something else to say.
fn is_absence(cause: &Cause) -> bool {
    matches!(
        cause,
        Cause::Unreachable { .. } | Cause::Broken { .. } | Cause::Server { .. } | Cause::RateLimited { .. }
    )
}
