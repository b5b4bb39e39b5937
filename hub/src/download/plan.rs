//! What a download has to do.

use std::io;

use super::Request;
use super::store::{Present, Store};
use crate::client::Client;
use crate::error::{Result, Subject};
use crate::name::is_commit;
use crate::progress::{Event, Watch};
use crate::tree::{Entry, Tree};

/// The files that are wanted of a commit, and what is there of them.
#[derive(Clone, Debug)]
pub struct DownloadPlan {
    pub commit: String,
    pub files: Vec<Planned>,
    pub(super) revision: String,
    pub(super) tree: Tree,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Planned {
    pub entry: Entry,
    pub state: FileState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    Present,
    /// So many bytes of it are there from an interrupted run.
    Missing {
        kept: u64,
    },
}

impl Client {
    /// Asks the hub which files there are, and looks which of them are here. Writes nothing.
    pub fn plan(&self, request: &Request, watch: &Watch) -> Result<DownloadPlan> {
        let subject = Subject::revision(&request.repo, &request.revision);
        let commit = match is_commit(&request.revision) {
            true => request.revision.clone(),
            false => self.commit(&request.repo, &request.revision, watch)?,
        };
        let store = Store::new(self, request);
        let tree = match store.tree(&commit) {
            Some(tree) => tree,
            None => self.tree(&request.repo, &commit, watch)?,
        };
        let state = |entry: &Entry| match request.force {
            false if store.is_present(entry, &commit) != Present::No => FileState::Present,
            _ => FileState::Missing { kept: store.kept(entry, self.settings.piece) },
        };
        let wanted = request.wanted.of(&tree);
        let wanted = wanted.map_err(|(file, cause)| match file {
            Some(file) => subject.file(&file).fails(cause),
            None => subject.fails(cause),
        })?;
        let files =
            wanted.into_iter().map(|entry| Planned { state: state(entry), entry: entry.clone() }).collect();
        Ok(DownloadPlan { commit, files, revision: request.revision.clone(), tree })
    }
}

impl DownloadPlan {
    /// The files to fetch. What is there is read where the request wants it verified, or its hash is not known.
    pub(super) fn missing(&self, store: &Store, request: &Request, watch: &Watch) -> io::Result<Vec<Entry>> {
        let mut missing = Vec::new();
        for Planned { entry, .. } in &self.files {
            let present = match request.force {
                true => Present::No,
                false => store.is_present(entry, &self.commit),
            };
            let sound = match present {
                Present::No => false,
                Present::Known if !request.verify => true,
                Present::Known | Present::Unknown => {
                    let sound = store.is_sound(entry, &self.commit)?;
                    if !sound {
                        watch(Event::Note(&format!("{} is damaged here, fetching it again", entry.path)));
                    }
                    sound
                }
            };
            match sound {
                true => store.settle(entry, &self.commit)?,
                false => missing.push(entry.clone()),
            }
        }
        Ok(missing)
    }
}
