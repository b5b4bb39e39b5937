//! A server that behaves as a model hub does, for tests: repositories in memory, their files on a second port that plays
//! the storage, faults on demand, and a record of all requests.
//!
//! It is made from the hub's published interface, and the real Python client works with it.

#![forbid(unsafe_code)]

mod fault;
mod read;
mod repo;
mod storage;
mod write;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

pub use crate::fault::{Fault, On, What};
pub use crate::repo::{File, Repo, git_oid, sha256};

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub storage: bool,
    pub method: String,
    /// Path and query.
    pub path: String,
    pub token: Option<String>,
    pub range: Option<String>,
    pub accept_encoding: Option<String>,
}

/// Everything that the server knows.
pub struct World {
    pub repos: HashMap<String, Repo>,
    /// Tokens, by what they may do.
    pub tokens: HashMap<String, Rights>,
    pub faults: Vec<Fault>,
    pub log: Vec<Asked>,
    /// Contents of large files that were sent to the storage, by sha256.
    pub objects: HashMap<String, bytes::Bytes>,
    /// Parts of large files, by upload and number. An upload that is not there is refused.
    pub uploads: HashMap<u64, HashMap<usize, bytes::Bytes>>,
    /// Uploads so far.
    pub begun: u64,
    /// Parts that have arrived.
    pub parts: usize,
    /// Files of at least this size go to the storage in parts of it.
    pub part_size: usize,
    /// Files of at least this size are large ones.
    pub large: usize,
    /// Entries of a page of a tree.
    pub page: usize,
    /// Bytes that the storage has sent.
    pub sent: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    Read,
    Write,
}

pub(crate) type Shared = Arc<Hub>;

pub(crate) struct Hub {
    pub world: Mutex<World>,
    pub hub: SocketAddr,
    pub storage: SocketAddr,
}

impl Hub {
    pub fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running hub. It ends when it is dropped.
pub struct Server {
    hub: Shared,
    _runtime: Runtime,
}

impl Server {
    /// Starts on two free ports of this machine.
    ///
    /// # Panics
    /// Where it cannot: a test without its server has nothing to say.
    pub fn start() -> Self {
        Self::start_at(0)
    }

    /// Starts with the hub on this port.
    pub fn start_at(port: u16) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let bind = |port| runtime.block_on(TcpListener::bind(("127.0.0.1", port))).unwrap();
        let (listener, storage_listener) = (bind(port), bind(0));
        let world = World {
            repos: HashMap::new(),
            tokens: HashMap::from([("hf_write".into(), Rights::Write), ("hf_read".into(), Rights::Read)]),
            faults: Vec::new(),
            log: Vec::new(),
            objects: HashMap::new(),
            uploads: HashMap::new(),
            begun: 0,
            parts: 0,
            part_size: 5 << 20,
            large: 10 << 10,
            page: 1000,
            sent: 0,
        };
        let hub = Arc::new(Hub {
            world: Mutex::new(world),
            hub: listener.local_addr().unwrap(),
            storage: storage_listener.local_addr().unwrap(),
        });
        let with_log =
            |router: Router, storage: bool| router.layer(from_fn_with_state((hub.clone(), storage), log));
        let routes = with_log(read::routes(hub.clone()).merge(write::routes(hub.clone())), false);
        let storage = with_log(storage::routes(hub.clone()), true);
        runtime.spawn(async move { axum::serve(listener, routes).await });
        runtime.spawn(async move { axum::serve(storage_listener, storage).await });
        Self { hub, _runtime: runtime }
    }

    /// The endpoint.
    pub fn url(&self) -> String {
        format!("http://{}", self.hub.hub)
    }

    /// Looks into the server, or changes what it knows.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.hub.lock()
    }

    /// Adds a public repository with one commit on `main`. Files of 10 KiB and more are large ones.
    pub fn add(&self, id: &str, files: &[(&str, &[u8])]) -> String {
        let mut world = self.hub.lock();
        let large = world.large;
        let repo = world.repos.entry(id.to_owned()).or_default();
        let files = files.iter().map(|(path, bytes)| {
            (path.to_string(), File::new(bytes::Bytes::copy_from_slice(bytes), bytes.len() >= large))
        });
        repo.commit("main", files.collect())
    }

    /// Adds a fault.
    pub fn fault(&self, on: On, times: usize, what: What) {
        self.hub.lock().faults.push(Fault { on, skip: 0, times, what });
    }

    /// What was asked for until now.
    pub fn log(&self) -> Vec<Asked> {
        self.hub.lock().log.clone()
    }
}

async fn log(State((hub, storage)): State<(Shared, bool)>, request: Request, next: Next) -> Response {
    let asked = asked(&request, storage);
    hub.lock().log.push(asked);
    next.run(request).await
}

fn asked(request: &Request, storage: bool) -> Asked {
    let header =
        |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    Asked {
        storage,
        method: request.method().to_string(),
        path: request.uri().path_and_query().map_or(String::new(), ToString::to_string),
        token: header("authorization").map(|value| value.trim_start_matches("Bearer ").to_owned()),
        range: header("range"),
        accept_encoding: header("accept-encoding"),
    }
}

/// A parameter of an address's query.
pub(crate) fn parameter<'a>(query: &'a Option<String>, name: &str) -> Option<&'a str> {
    let pairs = query.as_deref()?.split('&').filter_map(|pair| pair.split_once('=').or(Some((pair, ""))));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}
