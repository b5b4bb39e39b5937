//! Commits: one JSON object a line. An answer that fails may have committed all the same.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use ureq::http::Method;

use super::{LocalFile, PushBranch, PushRequest, as_write};
use crate::address::quote;
use crate::client::{Ask, Client, Judged, Payload, Tries};
use crate::error::{Cause, Error, Result, Subject};
use crate::progress::Watch;

pub(super) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The lines of a commit.
pub(super) fn body(
    request: &PushRequest,
    subject: &Subject,
    parent: &str,
    small: &[&LocalFile],
    large: &[&LocalFile],
    delete: &[String],
) -> Result<Vec<u8>> {
    let header = json!({"summary": request.summary, "description": "", "parentCommit": parent});
    let mut lines = vec![json!({"key": "header", "value": header})];
    for file in small {
        let content = base64(&file.bytes(subject)?);
        lines.push(
            json!({"key": "file", "value": {"path": file.path, "content": content, "encoding": "base64"}}),
        );
    }
    for file in large {
        let value =
            json!({"path": file.path, "algo": "sha256", "oid": file.sha256.as_str(), "size": file.size});
        lines.push(json!({"key": "lfsFile", "value": value}));
    }
    for path in delete {
        lines.push(json!({"key": "deletedFile", "value": {"path": path}}));
    }
    Ok(lines.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect())
}

impl Client {
    /// Makes a commit on a branch whose head was `parent`. Returns the commit, or the address of the proposal.
    ///
    /// # Errors
    /// [`Cause::ParentMoved`] where the head is another one, and not by our own doing.
    pub(super) fn commit_to(
        &self,
        request: &PushRequest,
        branch: &PushBranch,
        parent: &str,
        body: &[u8],
        watch: &Watch,
    ) -> Result<String> {
        let subject = Subject::revision(&request.repo, &branch.name);
        let proposal = if request.create_pr { "?create_pr=1" } else { "" };
        let url = format!("{}/commit/{}{proposal}", request.repo.api(), quote(&branch.name, ""));
        let payload = Payload::Bytes { bytes: body, kind: "application/x-ndjson" };
        let ask = Ask::new(Method::POST, &self.url(&url)).payload(payload);
        let mut tries = Tries::new(&self.settings.patience);
        loop {
            let answer = self.once(&ask, &subject).and_then(|answer| self.judge(answer, &subject));
            let failed: Error = match answer.map_err(as_write) {
                Ok(Judged::Good(mut answer)) => {
                    let text = answer.body_mut().read_to_string().unwrap_or_default();
                    let value: Value = serde_json::from_str(&text).unwrap_or_default();
                    let key = if request.create_pr { "pullRequestUrl" } else { "commitOid" };
                    match value[key].as_str() {
                        Some(made) => return Ok(made.to_owned()),
                        None => subject.fails(self.malformed(format!("expected {key}"))),
                    }
                }
                Ok(Judged::Wait(pause)) => {
                    self.pause(pause, &mut tries, &subject, watch)?;
                    continue;
                }
                Ok(Judged::Again(error)) => error,
                Err(error) => match &*error.cause {
                    Cause::Broken { .. } | Cause::Busy { .. } => error,
                    _ => return Err(error),
                },
            };
            // It may have been made all the same, also by a request that is still at work there. Of proposals there would
            // be two.
            if request.create_pr {
                return Err(failed);
            }
            let head = self.commit(&request.repo, &branch.name, watch)?;
            if head != parent {
                let is_ours = self.read_back(&request.repo, branch, &head, watch).is_ok();
                return if is_ours { Ok(head) } else { Err(subject.fails(Cause::ParentMoved)) };
            }
            self.back_off(failed, &mut tries, &subject, watch)?;
        }
    }
}
