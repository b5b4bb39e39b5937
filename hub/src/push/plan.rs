//! What differs between here and there.

use serde_json::Value;

use super::{LocalFile, PushBranch, PushRequest, as_write};
use crate::client::Client;
use crate::error::{Cause, Result, Subject};
use crate::name::RepoId;
use crate::progress::Watch;
use crate::tree::Tree;

/// All that publishing would change, found without changing anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushPlan {
    /// The account that the token belongs to.
    pub account: String,
    /// Whether the repository has to be made.
    pub creates: bool,
    pub branches: Vec<BranchPlan>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchPlan {
    pub name: String,
    /// Whether the branch has to be made.
    pub creates: bool,
    /// Files to send, with their sizes.
    pub send: Vec<(String, u64)>,
    pub unchanged: Vec<String>,
    /// Weights of another artifact, which would be read along with the new ones.
    pub delete: Vec<String>,
}

/// The differences of one branch.
pub(super) struct Changes<'a> {
    pub send: Vec<&'a LocalFile>,
    pub unchanged: Vec<&'a LocalFile>,
    pub delete: Vec<String>,
}

impl Changes<'_> {
    pub fn is_empty(&self) -> bool {
        self.send.is_empty() && self.delete.is_empty()
    }
}

impl Client {
    /// Asks for the owner of the token and what is there. Nothing is written, here or there.
    pub fn push_plan(&self, request: &PushRequest, watch: &Watch) -> Result<PushPlan> {
        let subject = Subject::repo(&request.repo);
        if self.settings.token.is_none() {
            return Err(subject.fails(Cause::NoToken));
        }
        let (who, _) =
            self.get::<Value>(&self.url("api/whoami-v2"), &Subject::default(), watch).map_err(as_write)?;
        let account = who["name"].as_str().unwrap_or("unknown").to_owned();
        let there = match self.branches(&request.repo, watch) {
            Ok(branches) => Some(branches),
            Err(error) if matches!(*error.cause, Cause::NoRepo) => None,
            Err(error) => return Err(error),
        };
        let creates = there.is_none();
        let there = there.unwrap_or_default();
        let mut branches = Vec::new();
        for branch in &request.branches {
            // A new repository comes with main.
            let creates_branch = match creates {
                true => branch.name != crate::MAIN,
                false => !there.iter().any(|there| there.name == branch.name),
            };
            let changes = match creates || creates_branch {
                true => changes(branch, &Tree::default()),
                false => self.compare(&request.repo, branch, watch)?.1,
            };
            branches.push(BranchPlan {
                name: branch.name.clone(),
                creates: creates_branch,
                send: changes.send.iter().map(|file| (file.path.clone(), file.size)).collect(),
                unchanged: changes.unchanged.iter().map(|file| file.path.clone()).collect(),
                delete: changes.delete,
            });
        }
        Ok(PushPlan { account, creates, branches })
    }

    /// The branch's head, and what differs there.
    pub(super) fn compare<'a>(
        &self,
        repo: &RepoId,
        branch: &'a PushBranch,
        watch: &Watch,
    ) -> Result<(String, Changes<'a>)> {
        let head = self.commit(repo, &branch.name, watch)?;
        let tree = self.tree(repo, &head, watch)?;
        Ok((head, changes(branch, &tree)))
    }
}

fn changes<'a>(branch: &'a PushBranch, tree: &Tree) -> Changes<'a> {
    let same = |file: &&LocalFile| tree.get(&file.path).is_some_and(|there| file.is(there));
    let (unchanged, send) = branch.files.iter().partition(same);
    let is_here = |path: &str| branch.files.iter().any(|file| file.path == path);
    let weights = |path: &str| path.ends_with(".safetensors") || path.ends_with(".safetensors.index.json");
    let old = tree.iter().filter(|there| weights(&there.path) && !is_here(&there.path));
    let delete = match branch.files.iter().any(|file| weights(&file.path)) {
        true => old.map(|there| there.path.clone()).collect(),
        // Texts alone are published: the weights there stay.
        false => Vec::new(),
    };
    Changes { send, unchanged, delete }
}
