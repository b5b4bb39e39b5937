//! The routes that write.

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::fault::{On, What};
use crate::read::{Refusal, refuse, see};
use crate::repo::{File, Files, Repo};
use crate::storage::fail;
use crate::{Rights, Shared, World, parameter};

pub fn routes(hub: Shared) -> Router {
    Router::new()
        .route("/api/whoami-v2", get(whoami))
        .route("/api/repos/create", post(create))
        .route("/api/models/{owner}/{name}/branch/{branch}", post(branch))
        .route("/api/models/{owner}/{name}/preupload/{rev}", post(preupload))
        .route("/api/models/{owner}/{name}/commit/{rev}", post(commit))
        .route("/{owner}/{name}/info/lfs/objects/batch", post(batch))
        .route("/lfs/verify", post(verify))
        .route("/lfs/complete/{oid}", post(complete))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .with_state(hub)
}

/// # Errors
/// The refusal of a token that may not write.
fn may_write(world: &World, headers: &HeaderMap) -> Result<(), Refusal> {
    let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    match world.tokens.get(token.trim_start_matches("Bearer ")) {
        Some(Rights::Write) => Ok(()),
        Some(Rights::Read) => {
            let message = "you must use a write token to write to this repository";
            Err(Box::new((StatusCode::FORBIDDEN, json!({"error": message}).to_string()).into_response()))
        }
        None => {
            let message = "Invalid credentials in Authorization header";
            Err(Box::new((StatusCode::UNAUTHORIZED, json!({"error": message}).to_string()).into_response()))
        }
    }
}

async fn whoami(State(hub): State<Shared>, headers: HeaderMap) -> Response {
    let world = hub.lock();
    let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    match world.tokens.get(token.trim_start_matches("Bearer ")) {
        None => (StatusCode::UNAUTHORIZED, json!({"error": "Invalid username or password."}).to_string())
            .into_response(),
        Some(rights) => {
            let role = if *rights == Rights::Write { "write" } else { "read" };
            axum::Json(json!({"type": "user", "name": "acme", "orgs": [],
                "auth": {"accessToken": {"displayName": "t", "role": role}}}))
            .into_response()
        }
    }
}

async fn create(State(hub): State<Shared>, headers: HeaderMap, body: Bytes) -> Response {
    let mut world = hub.lock();
    if let Err(refusal) = may_write(&world, &headers) {
        return *refusal;
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let owner = asked["organization"].as_str().unwrap_or("acme");
    let id = format!("{owner}/{}", asked["name"].as_str().unwrap_or_default());
    let url = format!("http://{}/{id}", hub.hub);
    if world.repos.contains_key(&id) {
        return (
            StatusCode::CONFLICT,
            json!({"error": "You already created this model repo", "url": url}).to_string(),
        )
            .into_response();
    }
    let repo = Repo { private: asked["visibility"] == "private", ..Repo::new() };
    world.repos.insert(id.clone(), repo);
    axum::Json(json!({"url": url, "name": id, "id": "0"})).into_response()
}

type At = (String, String, String);

async fn branch(
    State(hub): State<Shared>,
    Path((owner, name, branch)): Path<At>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut world = hub.lock();
    if let Err(refusal) = may_write(&world, &headers) {
        return *refusal;
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let Some(repo) = world.repos.get_mut(&format!("{owner}/{name}")) else {
        return refuse(404, "RepoNotFound", "Repository not found");
    };
    if repo.branches.contains_key(&branch) {
        return (StatusCode::CONFLICT, json!({"error": "Reference already exists"}).to_string())
            .into_response();
    }
    let start = asked["startingPoint"].as_str().unwrap_or("main").to_owned();
    match repo.find(&start).map(str::to_owned) {
        None => refuse(404, "RevisionNotFound", "Invalid rev id"),
        Some(commit) => {
            repo.branches.insert(branch, commit);
            axum::Json(json!({})).into_response()
        }
    }
}

async fn preupload(
    State(hub): State<Shared>,
    Path((owner, name, _)): Path<At>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let world = hub.lock();
    if let Err(refusal) = may_write(&world, &headers)
        .and_then(|()| see(&world, &format!("{owner}/{name}"), &headers).map(|_| ()))
    {
        return *refusal;
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let files = asked["files"].as_array().cloned().unwrap_or_default();
    if files.len() > 256 {
        return (StatusCode::BAD_REQUEST, "too many files").into_response();
    }
    let answer: Vec<_> = files
        .iter()
        .map(|file| {
            let path = file["path"].as_str().unwrap_or_default();
            let large =
                file["size"].as_u64().unwrap_or(0) >= world.large as u64 || path.ends_with(".safetensors");
            json!({"path": path, "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": false})
        })
        .collect();
    axum::Json(json!({"files": answer})).into_response()
}

async fn batch(State(hub): State<Shared>, headers: HeaderMap, body: Bytes) -> Response {
    let mut world = hub.lock();
    if let Err(refusal) = may_write(&world, &headers) {
        return *refusal;
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let multipart = asked["transfers"].as_array().is_some_and(|all| all.iter().any(|t| t == "multipart"));
    let objects = asked["objects"].as_array().cloned().unwrap_or_default();
    let mut parts = false;
    let answer: Vec<_> = objects
        .iter()
        .map(|object| {
            let (oid, size) =
                (object["oid"].as_str().unwrap_or_default(), object["size"].as_u64().unwrap_or(0));
            let known =
                world.repos.values().flat_map(|repo| repo.commits.values()).flat_map(|files| files.values());
            if world.objects.contains_key(oid) || known.into_iter().any(|file| file.oid == oid) {
                return json!({"oid": oid, "size": size});
            }
            let href = format!("http://{}/objects/{oid}?signature=1", hub.storage);
            let verify = json!({"href": format!("http://{}/lfs/verify", hub.hub)});
            if !multipart || (size as usize) < world.part_size {
                let actions = json!({"upload": {"href": href, "header": {}}, "verify": verify});
                return json!({"oid": oid, "size": size, "authenticated": true, "actions": actions});
            }
            parts = true;
            // Each answer begins an upload of its own, as S3 does.
            world.begun += 1;
            let upload = world.begun;
            world.uploads.insert(upload, Default::default());
            let mut header = serde_json::Map::from_iter([("chunk_size".to_owned(), json!(world.part_size))]);
            for part in 1..=(size as usize).div_ceil(world.part_size) {
                header.insert(format!("{part:05}"), json!(format!("{href}&upload={upload}&part={part}")));
            }
            let complete = format!("http://{}/lfs/complete/{oid}?upload={upload}", hub.hub);
            let actions = json!({"upload": {"href": complete, "header": header}, "verify": verify});
            json!({"oid": oid, "size": size, "authenticated": true, "actions": actions})
        })
        .collect();
    axum::Json(json!({"transfer": if parts { "multipart" } else { "basic" }, "objects": answer}))
        .into_response()
}

async fn complete(
    State(hub): State<Shared>,
    Path(oid): Path<String>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Response {
    let mut world = hub.lock();
    let what = world.strike(On::Complete);
    if let Some(what) = what.as_ref().filter(|what| **what != What::DoneThenFail) {
        return fail(what);
    }
    let upload = parameter(&query, "upload").and_then(|upload| upload.parse().ok());
    let Some(parts) = upload.and_then(|upload: u64| world.uploads.get(&upload)) else {
        return (StatusCode::NOT_FOUND, json!({"error": "NoSuchUpload"}).to_string()).into_response();
    };
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut whole = Vec::new();
    for part in asked["parts"].as_array().into_iter().flatten() {
        let number = part["partNumber"].as_u64().unwrap_or(0) as usize;
        match parts.get(&number) {
            Some(bytes)
                if part["etag"]
                    .as_str()
                    .is_some_and(|tag| tag.trim_matches('"') == crate::git_oid(bytes)) =>
            {
                whole.extend_from_slice(bytes);
            }
            _ => return (StatusCode::BAD_REQUEST, "InvalidPart").into_response(),
        }
    }
    if crate::sha256(&whole) != oid {
        return (StatusCode::BAD_REQUEST, "BadDigest").into_response();
    }
    world.objects.insert(oid, whole.into());
    world.uploads.retain(|known, _| Some(*known) != upload);
    match what {
        Some(_) => fail(&What::Status(500)),
        None => axum::Json(json!({})).into_response(),
    }
}

async fn verify(State(hub): State<Shared>, headers: HeaderMap, body: Bytes) -> Response {
    let world = hub.lock();
    if let Err(refusal) = may_write(&world, &headers) {
        return *refusal;
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let object = world.objects.get(asked["oid"].as_str().unwrap_or_default());
    match object.is_some_and(|bytes| asked["size"] == bytes.len()) {
        true => axum::Json(json!({})).into_response(),
        false => (StatusCode::NOT_FOUND, json!({"error": "no such object"}).to_string()).into_response(),
    }
}

async fn commit(
    State(hub): State<Shared>,
    Path((owner, name, branch)): Path<At>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut world = hub.lock();
    if let Err(refusal) = may_write(&world, &headers) {
        return *refusal;
    }
    let what = world.strike(On::Commit);
    if let Some(what) = what.as_ref().filter(|what| **what != What::DoneThenFail) {
        return fail(what);
    }
    let objects = world.objects.clone();
    // The storage is one for all repositories.
    let commits = world.repos.values().flat_map(|repo| repo.commits.values());
    let known: Vec<File> = commits.flat_map(|files| files.values().cloned()).collect();
    let id = format!("{owner}/{name}");
    let Some(repo) = world.repos.get_mut(&id) else {
        return refuse(404, "RepoNotFound", "Repository not found");
    };
    let Some(head) = repo.branches.get(&branch).cloned() else {
        return refuse(404, "RevisionNotFound", "Invalid rev id");
    };
    let files = match apply(repo.commits[&head].clone(), &body, &head, |oid| {
        let in_repos = known.iter().find(|file| file.oid == oid).map(|file| file.bytes.clone());
        objects.get(oid).cloned().or(in_repos)
    }) {
        Ok(files) => files,
        Err((status, message)) => return (status, json!({"error": message}).to_string()).into_response(),
    };
    let request = parameter(&query, "create_pr").is_some();
    let target = if request { format!("refs/pr/{}", repo.branches.len()) } else { branch };
    let commit = repo.commit(&target, files);
    if what == Some(What::DoneThenFail) {
        return fail(&What::Status(500));
    }
    let url = format!("http://{}/{id}", hub.hub);
    let mut answer =
        json!({"success": true, "commitOid": commit, "commitUrl": format!("{url}/commit/{commit}")});
    if request {
        answer["pullRequestUrl"] = json!(format!("{url}/discussions/1"));
    }
    axum::Json(answer).into_response()
}

/// The files after the operations of a commit, one JSON object a line.
fn apply(
    mut files: Files,
    body: &[u8],
    head: &str,
    object: impl Fn(&str) -> Option<Bytes>,
) -> Result<Files, (StatusCode, String)> {
    let bad = |message: String| (StatusCode::BAD_REQUEST, message);
    for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).map_err(|error| bad(error.to_string()))?;
        let (key, value) = (line["key"].as_str().unwrap_or_default(), &line["value"]);
        let path = value["path"].as_str().unwrap_or_default().to_owned();
        match key {
            "header" => {
                if value["parentCommit"].as_str().is_some_and(|parent| parent != head) {
                    return Err((
                        StatusCode::PRECONDITION_FAILED,
                        "the parent commit is not the head".into(),
                    ));
                }
            }
            "file" => {
                let bytes = unbase64(value["content"].as_str().unwrap_or_default())
                    .ok_or_else(|| bad("base64".into()))?;
                files.insert(path, File::new(bytes.into(), false));
            }
            "lfsFile" => {
                let oid = value["oid"].as_str().unwrap_or_default();
                let bytes = object(oid).ok_or_else(|| bad(format!("{path}: its content was never sent")))?;
                if value["size"] != bytes.len() {
                    return Err(bad(format!("{path}: another size")));
                }
                files.insert(path, File::new(bytes, true));
            }
            "deletedFile" => {
                files.remove(&path);
            }
            other => return Err(bad(format!("unknown key {other}"))),
        }
    }
    Ok(files)
}

fn unbase64(text: &str) -> Option<Vec<u8>> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
    for byte in text.trim_end_matches('=').bytes() {
        bits = bits << 6 | u32::from(value(byte)?);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}
