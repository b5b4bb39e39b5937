//! Large files: the hub says which of them the storage lacks and where they go, whole or in parts.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use ureq::http::Method;

use super::parts::Parts;
use super::{LocalFile, PushRequest, as_write};
use crate::client::{Ask, Client, Judged, Payload, Tries, header, host};
use crate::error::{Cause, Result, Subject};
use crate::progress::{Event, Watch};

pub(super) const LFS: &str = "application/vnd.git-lfs+json";

/// What the hub wants to have done with a file.
pub(super) struct Action<'a> {
    pub file: &'a LocalFile,
    href: String,
    headers: Vec<(String, String)>,
    /// None where the file goes as a whole.
    parts: Option<Parts>,
    verify: Option<(String, Vec<(String, String)>)>,
}

impl Client {
    /// Sends what the storage lacks, each content once. Returns the bytes that went.
    pub(super) fn send_large(
        &self,
        request: &PushRequest,
        subject: &Subject,
        files: &[&LocalFile],
        watch: &Watch,
    ) -> Result<u64> {
        const OBJECTS_OF_A_CALL: usize = 100;
        let mut seen = HashSet::new();
        let files: Vec<_> = files.iter().copied().filter(|file| seen.insert(&file.sha256)).collect();
        let mut sent = 0;
        for files in files.chunks(OBJECTS_OF_A_CALL) {
            let actions = self.ask_where(request, subject, files, watch)?;
            let bytes = actions.iter().map(|action| action.file.size).sum();
            if !actions.is_empty() {
                watch(Event::Plan { files: actions.len(), bytes });
            }
            for action in &actions {
                sent += self.send(request, &subject.file(&action.file.path), action, watch)?;
            }
        }
        Ok(sent)
    }

    pub(super) fn ask_where<'a>(
        &self,
        request: &PushRequest,
        subject: &Subject,
        files: &[&'a LocalFile],
        watch: &Watch,
    ) -> Result<Vec<Action<'a>>> {
        let objects: Vec<_> =
            files.iter().map(|file| json!({"oid": file.sha256.as_str(), "size": file.size})).collect();
        let body = json!({"operation": "upload", "transfers": ["basic", "multipart"], "objects": objects, "hash_algo": "sha256"});
        let url = self.url(&format!("{}.git/info/lfs/objects/batch", request.repo.path()));
        let answer = self.post_to(&url, &body, &[("accept", LFS)], subject, watch)?;
        let mut actions = Vec::new();
        for file in files {
            let of = |value: &&Value| value["oid"] == file.sha256.as_str();
            let object = answer["objects"].as_array().into_iter().flatten().find(of);
            let subject = subject.file(&file.path);
            let Some(object) = object else {
                return Err(subject.fails(self.malformed("expected where to send the file".into())));
            };
            if let Some(message) = object["error"]["message"].as_str() {
                return Err(subject.fails(Cause::MayNotWrite { message: message.to_owned() }));
            }
            match object["actions"].get("upload") {
                Some(upload) => {
                    let action = self.read_action(file, upload, object["actions"].get("verify"));
                    actions.push(action.map_err(|problem| subject.fails(self.malformed(problem)))?);
                }
                // It is there; an earlier run may have been killed before it knew.
                None => self.forget_upload(request, file),
            }
        }
        Ok(actions)
    }

    fn read_action<'a>(
        &self,
        file: &'a LocalFile,
        upload: &Value,
        verify: Option<&Value>,
    ) -> Result<Action<'a>, String> {
        let href =
            |value: &Value| value["href"].as_str().map(str::to_owned).ok_or("expected an address".to_owned());
        let headers = |value: &Value| -> Vec<(String, String)> {
            let fields = value["header"].as_object().into_iter().flatten();
            fields.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
        };
        let all = headers(upload);
        let size = match &upload["header"]["chunk_size"] {
            Value::Null => None,
            Value::String(text) => Some(text.parse::<u64>().ok()),
            number => Some(number.as_u64()),
        };
        let parts = match size {
            None => None,
            Some(Some(size)) if size > 0 => {
                let mut parts: Vec<(u64, String)> = all
                    .iter()
                    .filter_map(|(name, value)| Some((name.parse().ok()?, value.clone())))
                    .collect();
                parts.sort();
                let expected = file.size.div_ceil(size).max(1);
                if parts.len() as u64 != expected {
                    return Err(format!("expected {expected} parts of {size} bytes, got {}", parts.len()));
                }
                let addresses = parts.into_iter().map(|(_, address)| address).collect();
                Some(Parts { complete: href(upload)?, size, addresses })
            }
            Some(_) => return Err("expected the size of a part".into()),
        };
        let verify = verify.map(|verify| Ok::<_, String>((href(verify)?, headers(verify)))).transpose()?;
        Ok(Action {
            file,
            href: href(upload)?,
            headers: if parts.is_some() { Vec::new() } else { all },
            parts,
            verify,
        })
    }

    fn send(&self, request: &PushRequest, subject: &Subject, action: &Action, watch: &Watch) -> Result<u64> {
        let file = action.file;
        watch(Event::Begin { file: &file.path, size: file.size, done: 0 });
        let sent = self.transfer(request, subject, action, watch)?;
        if let Some((url, headers)) = &action.verify {
            let headers: Vec<_> =
                headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let body = json!({"oid": file.sha256.as_str(), "size": file.size});
            self.post_to(url, &body, &headers, subject, watch)?;
        }
        watch(Event::Done { file: &file.path, size: file.size });
        Ok(sent)
    }

    /// Brings the bytes there, as a whole or in parts. Returns how many went.
    pub(super) fn transfer(
        &self,
        request: &PushRequest,
        subject: &Subject,
        action: &Action,
        watch: &Watch,
    ) -> Result<u64> {
        let file = action.file;
        match &action.parts {
            Some(parts) => self.send_parts(request, subject, action, parts, watch),
            None => {
                self.put(subject, file, &action.href, &action.headers, (0, file.size), watch)?;
                Ok(file.size)
            }
        }
    }

    /// Sends a file or a part of it to the storage, without the token. Returns the answer's ETag.
    pub(super) fn put(
        &self,
        subject: &Subject,
        file: &LocalFile,
        url: &str,
        headers: &[(String, String)],
        (from, to): (u64, u64),
        watch: &Watch,
    ) -> Result<Option<String>> {
        let open = file.open().map_err(subject.io(&file.source))?;
        if !open.metadata().is_ok_and(|found| found.len() == file.size) {
            return Err(subject.fails(Cause::ChangedHere));
        }
        let mut tries = Tries::new(&self.settings.patience);
        loop {
            let told = AtomicU64::new(0);
            let sent = |count: u64| {
                told.fetch_add(count, Ordering::Relaxed);
                watch(Event::Bytes { file: &file.path, count: count as i64 });
            };
            let mut ask =
                Ask::new(Method::PUT, url).payload(Payload::Part { file: &open, from, to, sent: &sent });
            for (name, value) in headers {
                ask = ask.header(name, value);
            }
            self.pace.wait();
            let answer = self.http.send(&ask, None).map_err(|cause| subject.fails(cause));
            let failed = match answer {
                Err(error) => error,
                // None of the hub's own statuses: the storage knows no repositories.
                Ok(mut answer)
                    if answer.status().is_client_error()
                        && !matches!(answer.status().as_u16(), 408 | 429) =>
                {
                    let message = crate::client::first_line(answer.body_mut());
                    return Err(subject.fails(Cause::StorageRefused { host: host(url), message }));
                }
                Ok(answer) => match self.judge(answer, subject).map_err(as_write)? {
                    Judged::Good(answer) => return Ok(header(answer.headers(), "etag").map(str::to_owned)),
                    Judged::Again(error) => error,
                    Judged::Wait(pause) => {
                        self.pause(pause, &mut tries, subject, watch)?;
                        continue;
                    }
                },
            };
            watch(Event::Bytes { file: &file.path, count: -(told.into_inner() as i64) });
            self.back_off(failed, &mut tries, subject, watch)?;
        }
    }
}
