//! A hub, an empty cache, and what is asked for.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use gptq_hub::{Client, Error, Event, Fetched, Patience, RepoId, Request, Settings, Token, Wanted};
use gptq_hub_stand_in::Server;
use tempfile::TempDir;

pub const REPO: &str = "acme/tiny";

pub struct Place {
    pub server: Server,
    pub folder: TempDir,
    pub client: Client,
    /// What was told.
    pub told: Mutex<Vec<String>>,
}

impl Place {
    pub fn new() -> Self {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let client = Client::new(settings(&server.url(), &folder.path().join("cache"))).unwrap();
        Self { server, folder, client, told: Mutex::default() }
    }

    /// With the files of a small model, one of them in eleven pieces.
    pub fn with_model() -> (Self, Vec<(&'static str, Vec<u8>)>) {
        let place = Self::new();
        let files = model();
        let given: Vec<_> = files.iter().map(|(path, bytes)| (*path, bytes.as_slice())).collect();
        place.server.add(REPO, &given);
        (place, files)
    }

    pub fn with_token(mut self, secret: &str) -> Self {
        let token = Token { secret: secret.into(), from: "HF_TOKEN".into() };
        let settings = Settings { token: Some(token), ..self.client.settings.clone() };
        self.client = Client::new(settings).unwrap();
        self
    }

    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    pub fn repo_folder(&self) -> PathBuf {
        self.cache().join("models--acme--tiny")
    }

    pub fn fetch(&self, request: &Request) -> Result<Fetched, Error> {
        self.client.download(request, &|event| {
            if matches!(
                event,
                Event::Retry { .. } | Event::Wait { .. } | Event::Waiting { .. } | Event::Note(_)
            ) {
                self.told.lock().unwrap().push(format!("{event:?}"));
            }
        })
    }

    /// The message of a failure, which must be one line.
    pub fn refusal(&self, request: &Request) -> String {
        let message = self.fetch(request).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    pub fn told(&self) -> String {
        self.told.lock().unwrap().join("\n")
    }
}

pub fn settings(endpoint: &str, cache: &Path) -> Settings {
    let patience = Patience {
        connect: Duration::from_secs(5),
        silence: Duration::from_millis(700),
        back_off: Duration::from_millis(2),
        lock: Duration::from_millis(400),
        ..Patience::default()
    };
    Settings {
        endpoint: endpoint.to_owned(),
        cache: cache.to_owned(),
        token: None,
        offline: None,
        certificates: None,
        proxy: None,
        patience,
        piece: 64 << 10,
    }
}

pub fn model() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("config.json", b"{\"model_type\": \"llama\"}\n".to_vec()),
        ("empty.txt", Vec::new()),
        ("model.safetensors", noise(700_001, 1)),
        ("sub folder/\u{fc}.json", b"[]".to_vec()),
        ("tokenizer.json", noise(30_000, 2)),
    ]
}

/// Bytes without a pattern, the same for a seed.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

pub fn all() -> Request {
    let repo = RepoId::model(REPO).unwrap();
    Request { wanted: Wanted::all(), workers: 4, ..Request::model(&repo, "main") }
}

/// Every file below a folder, with where links lead, sorted.
pub fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.symlink_metadata().unwrap().is_dir() {
                true => folders.push(path),
                false => found.push(path.strip_prefix(folder).unwrap().display().to_string()),
            }
        }
    }
    found.sort();
    found
}

pub fn assert_holds(folder: &Path, files: &[(&str, Vec<u8>)]) {
    for (path, bytes) in files {
        let found = std::fs::read(folder.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(found == *bytes, "{path} has other bytes");
    }
}
