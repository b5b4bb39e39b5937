//! Publishing: what differs is found first and shown; then the repository and its branches are made, large files sent to
//! the storage, one commit made on each branch, `main` last, and everything read back and compared.

mod commit;
mod lfs;
mod local;
mod parts;
mod plan;

use std::collections::HashMap;

use serde_json::{Value, json};
use ureq::http::Method;

pub use self::local::LocalFile;
pub use self::plan::{BranchPlan, PushPlan};
use crate::address::quote;
use crate::client::{Ask, Client, Payload};
use crate::error::{Cause, Error, Result, Subject};
use crate::name::{MAIN, RepoId};
use crate::progress::{Event, Watch};

/// What is to be published.
#[derive(Clone, Debug)]
pub struct PushRequest {
    pub repo: RepoId,
    pub branches: Vec<PushBranch>,
    /// Of a repository that has to be made.
    pub private: bool,
    /// Propose the change instead of making it.
    pub create_pr: bool,
    /// The commits' first line.
    pub summary: String,
    pub workers: usize,
}

/// A branch and the files that it is to hold.
#[derive(Clone, Debug)]
pub struct PushBranch {
    pub name: String,
    pub files: Vec<LocalFile>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Branches and their heads, or addresses of proposals.
    pub commits: Vec<(String, String)>,
    /// Bytes of large files that were sent.
    pub sent: u64,
}

pub(super) const JSON: &str = "application/json";

impl Client {
    /// Carries out what a plan says. Where a branch has changed since, it is compared again; what is there already is not
    /// sent again, so that the same call goes on after an interruption.
    pub fn push(&self, request: &PushRequest, plan: &PushPlan, watch: &Watch) -> Result<Pushed> {
        let subject = Subject::repo(&request.repo);
        if plan.creates {
            self.create(request, &subject, watch)?;
        }
        let start = match plan.branches.iter().any(|branch| branch.creates) {
            true => Some(self.first_commit(&request.repo, watch)?),
            false => None,
        };
        // Before main has files: a branch that is made later would have them too.
        for branch in plan.branches.iter().filter(|branch| branch.creates) {
            self.create_branch(&request.repo, &branch.name, start.as_deref().unwrap_or(MAIN), watch)?;
        }
        let mut last: Vec<_> = request.branches.iter().collect();
        last.sort_by_key(|branch| branch.name == MAIN);
        let mut pushed = Pushed { commits: Vec::new(), sent: 0 };
        for branch in last {
            let (commit, sent) = self.push_branch(request, branch, watch)?;
            pushed.commits.push((branch.name.clone(), commit));
            pushed.sent += sent;
        }
        Ok(pushed)
    }

    fn push_branch(
        &self,
        request: &PushRequest,
        branch: &PushBranch,
        watch: &Watch,
    ) -> Result<(String, u64)> {
        const MOST_TIMES: usize = 3;
        let subject = Subject::revision(&request.repo, &branch.name);
        let mut sent = 0;
        for _ in 0..MOST_TIMES {
            let (head, changes) = self.compare(&request.repo, branch, watch)?;
            if changes.is_empty() {
                return Ok((head, sent));
            }
            let modes = self.modes(&request.repo, branch, &changes.send, watch)?;
            let is_large = |file: &&LocalFile| modes.get(file.path.as_str()).copied().unwrap_or(false);
            let (large, small): (Vec<_>, Vec<_>) = changes.send.iter().copied().partition(is_large);
            sent += self.send_large(request, &subject, &large, watch)?;
            let body = commit::body(request, &subject, &head, &small, &large, &changes.delete)?;
            match self.commit_to(request, branch, &head, &body, watch) {
                Ok(commit) if request.create_pr => return Ok((commit, sent)),
                Ok(commit) => {
                    self.read_back(&request.repo, branch, &commit, watch)?;
                    return Ok((commit, sent));
                }
                Err(error) if matches!(*error.cause, Cause::ParentMoved) => {
                    watch(Event::Note(&format!(
                        "{subject}the branch has changed meanwhile, comparing again"
                    )));
                }
                Err(error) => return Err(error),
            }
        }
        Err(subject.fails(Cause::ParentMoved))
    }

    /// # Errors
    /// Where a file there is not the one here.
    fn read_back(&self, repo: &RepoId, branch: &PushBranch, commit: &str, watch: &Watch) -> Result<()> {
        let tree = self.tree(repo, commit, watch)?;
        let differs = |file: &&LocalFile| !tree.get(&file.path).is_some_and(|there| file.is(there));
        match branch.files.iter().find(differs) {
            None => Ok(()),
            Some(file) => {
                let what = file.path.clone();
                Err(Subject::revision(repo, &branch.name).fails(Cause::Differs { what }))
            }
        }
    }

    fn create(&self, request: &PushRequest, subject: &Subject, watch: &Watch) -> Result<()> {
        let (owner, name) = request.repo.id().split_once('/').unwrap_or_default();
        let body = json!({"type": "model", "name": name, "organization": owner, "private": request.private,
            "visibility": if request.private { "private" } else { "public" }});
        self.post("api/repos/create", &body, subject, watch).map(|_| ()).or_else(there_already)?;
        if !request.private {
            return Ok(());
        }
        // What is published cannot be taken back.
        let (info, _) = self.get::<Value>(&self.url(&request.repo.api()), subject, watch)?;
        match info["private"].as_bool() {
            Some(true) => Ok(()),
            _ => Err(subject.fails(Cause::NotPrivate)),
        }
    }

    fn create_branch(&self, repo: &RepoId, branch: &str, start: &str, watch: &Watch) -> Result<()> {
        let path = format!("{}/branch/{}", repo.api(), quote(branch, ""));
        let subject = Subject::revision(repo, branch);
        self.post(&path, &json!({"startingPoint": start}), &subject, watch).map(|_| ()).or_else(there_already)
    }

    /// The commit that everything began with, which holds nothing but attributes.
    fn first_commit(&self, repo: &RepoId, watch: &Watch) -> Result<String> {
        let subject = Subject::repo(repo);
        let mut url = self.url(&format!("{}/commits/{MAIN}", repo.api()));
        let mut first = None;
        for _ in 0..1000 {
            let (page, headers) = self.get::<Vec<Value>>(&url, &subject, watch)?;
            let last = page.last().and_then(|commit| commit["id"].as_str());
            first = last.map(str::to_owned).or(first);
            let next = crate::client::header(&headers, "link").and_then(crate::address::next_page);
            match next.and_then(|next| crate::address::follow(&url, next)).filter(|next| self.trusts(next)) {
                Some(next) => url = next,
                None => break,
            }
        }
        first.ok_or_else(|| subject.fails(self.malformed("expected commits, got none".into())))
    }

    /// Whether each file is a large one, by its path.
    fn modes<'a>(
        &self,
        repo: &RepoId,
        branch: &PushBranch,
        files: &[&'a LocalFile],
        watch: &Watch,
    ) -> Result<HashMap<&'a str, bool>> {
        const FILES_OF_A_CALL: usize = 256;
        const SAMPLE: u64 = 512;
        let subject = Subject::revision(repo, &branch.name);
        let path = format!("{}/preupload/{}", repo.api(), quote(&branch.name, ""));
        let mut modes = HashMap::new();
        for files in files.chunks(FILES_OF_A_CALL) {
            let mut described = Vec::new();
            for file in files {
                let at = subject.io(&file.source);
                let mut sample = Vec::new();
                let open = file.open().map_err(&at)?;
                std::io::Read::read_to_end(&mut std::io::Read::take(open, SAMPLE), &mut sample)
                    .map_err(&at)?;
                described
                    .push(json!({"path": file.path, "size": file.size, "sample": commit::base64(&sample)}));
            }
            let answer = self.post(&path, &json!({"files": described}), &subject, watch)?;
            for file in files {
                let of = |value: &&Value| value["path"] == file.path.as_str();
                let found = answer["files"].as_array().into_iter().flatten().find(of);
                match found.and_then(|value| value["uploadMode"].as_str()) {
                    Some(mode @ ("lfs" | "regular")) => modes.insert(file.path.as_str(), mode == "lfs"),
                    _ => {
                        let problem = "expected how to send the file, lfs or regular".into();
                        return Err(subject.file(&file.path).fails(self.malformed(problem)));
                    }
                };
            }
        }
        Ok(modes)
    }

    pub(super) fn post(&self, path: &str, body: &Value, subject: &Subject, watch: &Watch) -> Result<Value> {
        self.post_to(&self.url(path), body, &[], subject, watch)
    }

    pub(super) fn post_to(
        &self,
        url: &str,
        body: &Value,
        headers: &[(&str, &str)],
        subject: &Subject,
        watch: &Watch,
    ) -> Result<Value> {
        let bytes = body.to_string();
        let mut ask =
            Ask::new(Method::POST, url).payload(Payload::Bytes { bytes: bytes.as_bytes(), kind: JSON });
        for (name, value) in headers {
            ask = ask.header(name, value);
        }
        let mut answer = self.call(&ask, subject, watch).map_err(as_write)?;
        // Some answers have no body.
        let text = answer.body_mut().read_to_string().unwrap_or_default();
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }
}

/// A refusal, where the request wanted to write.
pub(super) fn as_write(mut error: Error) -> Error {
    if let Cause::Forbidden { message } = &mut *error.cause {
        let message = std::mem::take(message);
        *error.cause = Cause::MayNotWrite { message };
    }
    error
}

/// 409: it exists already.
fn there_already(error: Error) -> Result<()> {
    match &*error.cause {
        Cause::Busy { .. } => Ok(()),
        _ => Err(error),
    }
}
