//! The routes that read.

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use crate::fault::{On, What};
use crate::repo::Repo;
use crate::storage::{answer, fail};
use crate::{Shared, World, parameter};

pub fn routes(hub: Shared) -> Router {
    let api = Router::new()
        .route("/{owner}/{name}", get(info_of_main))
        .route("/{owner}/{name}/revision/{rev}", get(info))
        .route("/{owner}/{name}/tree/{rev}", get(tree))
        .route("/{owner}/{name}/commits/{rev}", get(commits))
        .route("/{owner}/{name}/refs", get(refs));
    Router::new()
        .nest("/api/models", api.clone())
        .nest("/api/datasets", api)
        .route("/api/resolve-cache/{owner}/{name}/{rev}/{*path}", get(resolve_cache))
        .route("/{owner}/{name}/resolve/{rev}/{*path}", get(resolve))
        .route("/datasets/{owner}/{name}/resolve/{rev}/{*path}", get(resolve))
        .with_state(hub)
}

/// As the hub refuses, with its code.
pub fn refuse(status: u16, code: &str, message: &str) -> Response {
    let headers = [("x-error-code", code.to_owned()), ("x-error-message", message.to_owned())];
    let body = json!({"error": message}).to_string();
    (StatusCode::from_u16(status).unwrap(), headers, body).into_response()
}

/// An answer that is no.
pub type Refusal = Box<Response>;

/// The repository, where the token may see it.
pub fn see<'a>(world: &'a World, id: &str, headers: &HeaderMap) -> Result<&'a Repo, Refusal> {
    let token = headers.get("authorization").and_then(|value| value.to_str().ok());
    let token = token.map(|value| value.trim_start_matches("Bearer "));
    if token.is_some_and(|token| !world.tokens.contains_key(token)) {
        let message = json!({"error": "Invalid credentials in Authorization header"}).to_string();
        return Err(Box::new((StatusCode::UNAUTHORIZED, message).into_response()));
    }
    match world.repos.get(id) {
        Some(repo) if repo.private && token.is_none() => {
            Err(Box::new(refuse(401, "RepoNotFound", "Repository not found")))
        }
        Some(repo) => Ok(repo),
        None if token.is_none() => Err(Box::new(refuse(401, "RepoNotFound", "Repository not found"))),
        None => Err(Box::new(refuse(404, "RepoNotFound", "Repository not found"))),
    }
}

type Id = (String, String);

async fn info_of_main(state: State<Shared>, Path((owner, name)): Path<Id>, headers: HeaderMap) -> Response {
    info(state, Path((owner, name, "main".into())), headers).await
}

async fn info(
    State(hub): State<Shared>,
    Path((owner, name, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let mut world = hub.lock();
    if let Some(what) = world.strike(On::Api) {
        return fail(&what);
    }
    let id = format!("{owner}/{name}");
    if let Some(to) = world.repos.get(&id).and_then(|repo| repo.moved_to.clone()) {
        let location = format!("/api/models/{to}/revision/{revision}");
        return (StatusCode::TEMPORARY_REDIRECT, [("location", location)]).into_response();
    }
    match see(&world, &id, &headers) {
        Err(refusal) => *refusal,
        Ok(repo) => match repo.find(&revision) {
            None => refuse(404, "RevisionNotFound", "Invalid rev id"),
            Some(commit) => {
                let files = &repo.commits[commit];
                let siblings: Vec<_> = files.keys().map(|path| json!({"rfilename": path})).collect();
                let value = json!({"id": id, "modelId": id, "sha": commit, "private": repo.private, "gated": false,
                    "tags": [], "siblings": siblings, "disabled": false, "downloads": 0, "likes": 0});
                axum::Json(value).into_response()
            }
        },
    }
}

async fn tree(
    State(hub): State<Shared>,
    Path((owner, name, revision)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let mut world = hub.lock();
    if let Some(what) = world.strike(On::Api) {
        return fail(&what);
    }
    let repo = match see(&world, &format!("{owner}/{name}"), &headers) {
        Err(refusal) => return *refusal,
        Ok(repo) => repo,
    };
    let Some(commit) = repo.find(&revision) else { return refuse(404, "RevisionNotFound", "Invalid rev id") };
    let from = parameter(&query, "cursor").and_then(|cursor| cursor.parse().ok()).unwrap_or(0);
    let mut folders: Vec<&str> = Vec::new();
    for path in repo.commits[commit].keys() {
        folders.extend(path.match_indices('/').map(|(at, _)| &path[..at]));
    }
    folders.dedup();
    let folders = folders
        .iter()
        .map(|path| json!({"type": "directory", "path": path, "oid": "0".repeat(40), "size": 0}));
    let files = repo.commits[commit].iter().map(|(path, file)| {
        let size = file.bytes.len();
        match file.large {
            false => json!({"type": "file", "path": path, "size": size, "oid": file.oid}),
            true => {
                json!({"type": "file", "path": path, "size": size, "oid": crate::git_oid(file.oid.as_bytes()),
                "lfs": {"oid": file.oid, "size": size, "pointerSize": 134}})
            }
        }
    });
    let all: Vec<Value> = folders.chain(files).collect();
    let page: Vec<_> = all.iter().skip(from).take(world.page).cloned().collect();
    let next = from + page.len();
    let answer = axum::Json(page).into_response();
    if next >= all.len() {
        return answer;
    }
    let link = format!(
        "<http://{}/api/models/{owner}/{name}/tree/{revision}?recursive=true&expand=false&cursor={next}>; rel=\"next\"",
        hub.hub
    );
    ([("link", link)], answer).into_response()
}

async fn refs(State(hub): State<Shared>, Path((owner, name)): Path<Id>, headers: HeaderMap) -> Response {
    let world = hub.lock();
    match see(&world, &format!("{owner}/{name}"), &headers) {
        Err(refusal) => *refusal,
        Ok(repo) => {
            let branch = |(name, commit): (&String, &String)| json!({"name": name, "ref": format!("refs/heads/{name}"), "targetCommit": commit});
            let branches: Vec<_> = repo.branches.iter().map(branch).collect();
            axum::Json(json!({"branches": branches, "converts": [], "tags": []})).into_response()
        }
    }
}

fn quote(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    path.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// The branch's commits, the newest first.
async fn commits(
    State(hub): State<Shared>,
    Path((owner, name, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let world = hub.lock();
    let repo = match see(&world, &format!("{owner}/{name}"), &headers) {
        Err(refusal) => return *refusal,
        Ok(repo) => repo,
    };
    let mut next = repo.find(&revision).map(str::to_owned);
    let mut list = Vec::new();
    while let Some(commit) = next {
        list.push(json!({"id": commit, "title": "a change", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}));
        next = repo.parents.get(&commit).cloned();
    }
    axum::Json(list).into_response()
}

type FilePath = (String, String, String, String);

async fn resolve(State(hub): State<Shared>, Path(at): Path<FilePath>, headers: HeaderMap) -> Response {
    let what = hub.lock().strike(On::Resolve);
    send(&hub, at, &headers, what, true)
}

async fn resolve_cache(State(hub): State<Shared>, Path(at): Path<FilePath>, headers: HeaderMap) -> Response {
    send(&hub, at, &headers, None, false)
}

fn send(
    hub: &Shared,
    (owner, name, revision, path): FilePath,
    headers: &HeaderMap,
    what: Option<What>,
    first: bool,
) -> Response {
    let world = hub.lock();
    let id = format!("{owner}/{name}");
    if let Some(to) = world.repos.get(&id).and_then(|repo| repo.moved_to.clone()) {
        return (StatusCode::TEMPORARY_REDIRECT, [("location", format!("/{to}/resolve/{revision}/{path}"))])
            .into_response();
    }
    let repo = match see(&world, &id, headers) {
        Err(refusal) => return *refusal,
        Ok(repo) => repo,
    };
    if repo.gated && headers.get("authorization").is_none() {
        return refuse(401, "GatedRepo", "Access to this model is restricted");
    }
    let Some(commit) = repo.find(&revision) else { return refuse(404, "RevisionNotFound", "Invalid rev id") };
    let Some(file) = repo.commits[commit].get(&path) else {
        return refuse(404, "EntryNotFound", "Entry not found");
    };
    let mut known = HeaderMap::new();
    let mut add = |name: &'static str, value: String| {
        known.insert(name, value.parse().unwrap());
    };
    if what != Some(What::NoCommitHeader) {
        add("x-repo-commit", commit.to_owned());
    }
    add("etag", format!("\"{}\"", file.oid));
    add("accept-ranges", "bytes".into());
    if file.large {
        if what != Some(What::NoLinkedEtag) {
            add("x-linked-etag", format!("\"{}\"", file.oid));
        }
        add("x-linked-size", file.bytes.len().to_string());
        if what == Some(What::Relative) {
            add("location", format!("/api/resolve-cache/{id}/{commit}/{}", quote(&path)));
            return (StatusCode::TEMPORARY_REDIRECT, known).into_response();
        }
        if let Some(what) =
            what.as_ref().filter(|what| matches!(what, What::Status(_) | What::TooMany(_) | What::Page))
        {
            return fail(what);
        }
        add("location", format!("http://{}/objects/{}?signature={}", hub.storage, file.oid, world.log.len()));
        return (StatusCode::FOUND, known, Body::from("Found. Redirecting")).into_response();
    }
    if first && what == Some(What::Relative) {
        add("location", format!("/api/resolve-cache/{id}/{commit}/{}", quote(&path)));
        return (StatusCode::TEMPORARY_REDIRECT, known).into_response();
    }
    let mut sent = answer(&file.bytes, headers, what);
    known.remove("accept-ranges");
    sent.headers_mut().extend(known);
    sent
}
