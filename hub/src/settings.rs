//! Where the hub is, which token it gets, and where files go: read from the environment once, and passed on from there.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Cause, Error, Result};

const PIECE: u64 = 16 << 20;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Everything that this crate would otherwise take from its surroundings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// With scheme, perhaps with a path, without a slash at the end.
    pub endpoint: String,
    /// The cache's folder. It need not exist yet.
    pub cache: PathBuf,
    pub token: Option<Token>,
    /// The variable that forbids to ask the hub.
    pub offline: Option<&'static str>,
    /// A file of certificates (PEM) to trust instead of the built-in ones.
    pub certificates: Option<PathBuf>,
    pub proxy: Option<ureq::Proxy>,
    pub patience: Patience,
    /// Bytes of a range: what is lost at most, times the workers, where a download is killed.
    pub piece: u64,
}

/// How long is waited for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub connect: Duration,
    /// Between two pieces of an answer.
    pub silence: Duration,
    /// Before the second try; doubled before each further one.
    pub back_off: Duration,
    /// Tries without a byte of progress.
    pub tries: u32,
    /// How long a file that another process is fetching may not grow before we go on without its lock.
    pub lock: Duration,
    /// The longest wait that a server may ask for.
    pub longest_wait: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            back_off: Duration::from_secs(1),
            tries: 5,
            lock: Duration::from_secs(300),
            longest_wait: Duration::from_secs(600),
        }
    }
}

/// A secret, and where it came from.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub secret: String,
    pub from: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(from {})", self.from)
    }
}

impl Settings {
    /// What `huggingface_hub` would take from this environment.
    ///
    /// # Errors
    /// Where there is no place for the cache, or HF_ENDPOINT is no address.
    pub fn from_env() -> Result<Self> {
        let proxy = ureq::Proxy::try_from_env();
        Ok(Self { proxy, ..Self::from_vars(|name| env::var_os(name))? })
    }

    /// The same from other variables, without a proxy. An empty variable counts as unset.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let home = var("HOME").map(PathBuf::from);
        let folder = |name: &str| var(name).map(|value| expand(Path::new(&value), home.as_deref()));
        let hf_home = folder("HF_HOME")
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(home.as_ref()?.join(".cache/huggingface")));
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(hf_home.as_ref()?.join("hub")))
            .ok_or(Cause::NoHome)?;
        let endpoint = var("HF_ENDPOINT")
            .map_or(Ok(DEFAULT_ENDPOINT.to_owned()), |value| endpoint(&value.to_string_lossy()))?;
        let named = |name: &str| {
            let secret = clean(&var(name)?.to_string_lossy())?;
            Some(Token { secret, from: name.to_owned() })
        };
        let file = folder("HF_TOKEN_PATH").or_else(|| Some(hf_home.as_ref()?.join("token")));
        let token =
            named("HF_TOKEN").or_else(|| named("HUGGING_FACE_HUB_TOKEN")).or_else(|| read_token(&file?));
        let is_true = |name: &str| {
            var(name).is_some_and(|value| {
                ["1", "ON", "YES", "TRUE"].contains(&value.to_string_lossy().to_uppercase().as_str())
            })
        };
        // The second counts only where the first says nothing.
        let offline = match var("HF_HUB_OFFLINE") {
            Some(_) => is_true("HF_HUB_OFFLINE").then_some("HF_HUB_OFFLINE"),
            None => is_true("TRANSFORMERS_OFFLINE").then_some("TRANSFORMERS_OFFLINE"),
        };
        let certificates = folder("SSL_CERT_FILE");
        let patience = Patience::default();
        Ok(Self { endpoint, cache, token, offline, certificates, proxy: None, patience, piece: PIECE })
    }

    /// Takes this token instead of the environment's.
    ///
    /// # Errors
    /// Where it is blank.
    pub fn with_token(self, secret: &str) -> Result<Self> {
        let secret = clean(secret).ok_or(Cause::Setting {
            name: "--token",
            expected: "a token",
            got: String::new(),
        })?;
        Ok(Self { token: Some(Token { secret, from: "--token".into() }), ..self })
    }
}

/// # Errors
/// Where it is no address of the web.
fn endpoint(text: &str) -> Result<String> {
    let refused = || {
        let expected = "an address that begins with https:// or http://";
        Error::from(Cause::Setting { name: "HF_ENDPOINT", expected, got: text.to_owned() })
    };
    let address: ureq::http::Uri = text.trim().parse().map_err(|_| refused())?;
    match (address.scheme_str(), address.authority(), address.query()) {
        (Some("http" | "https"), Some(_), None) => Ok(text.trim().trim_end_matches('/').to_owned()),
        _ => Err(refused()),
    }
}

/// `~` at the start is the home folder.
fn expand(path: &Path, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

/// Without the blanks and line ends that editors leave.
fn clean(secret: &str) -> Option<String> {
    let secret: String = secret.chars().filter(|c| !c.is_control()).collect();
    Some(secret.trim().to_owned()).filter(|secret| !secret.is_empty())
}

fn read_token(path: &Path) -> Option<Token> {
    let secret = gptq_input::read(path, 4096).ok()?;
    Some(Token { secret: clean(&String::from_utf8_lossy(&secret))?, from: path.display().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_vars(|name| Some(vars.iter().find(|var| var.0 == name).map_or("", |var| var.1).into()))
    }

    #[test]
    fn the_cache_follows_the_variables_of_the_python_library_in_their_order() {
        let vars = [
            ("HF_HUB_CACHE", "/a"),
            ("HUGGINGFACE_HUB_CACHE", "/b"),
            ("HF_HOME", "~/c"),
            ("XDG_CACHE_HOME", "/d"),
            ("HOME", "/e"),
        ];
        let expected = ["/a", "/b", "/e/c/hub", "/d/huggingface/hub", "/e/.cache/huggingface/hub"];
        for (first, expected) in expected.iter().enumerate() {
            assert_eq!(settings(&vars[first..]).unwrap().cache, Path::new(expected));
        }
        assert!(settings(&[]).unwrap_err().to_string().starts_with("HOME is not set"));
    }

    #[test]
    fn the_token_comes_from_variables_or_the_file_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        std::fs::write(folder.path().join("token"), " hf_file\r\n").unwrap();
        let secret = |vars: &[(&str, &str)]| settings(vars).unwrap().token.map(|token| token.secret);
        let all =
            [("HF_TOKEN", " hf_a\n"), ("HUGGING_FACE_HUB_TOKEN", "hf_b"), ("HF_HOME", home), ("HOME", "/h")];
        assert_eq!(secret(&all).as_deref(), Some("hf_a"));
        assert_eq!(secret(&all[1..]).as_deref(), Some("hf_b"));
        assert_eq!(secret(&all[2..]).as_deref(), Some("hf_file"));
        assert_eq!(secret(&[("HF_TOKEN_PATH", "/nowhere"), all[2]]), None);
        let shown = format!("{:?}", settings(&all).unwrap());
        assert!(!shown.contains("hf_a") && shown.contains("HF_TOKEN"), "{shown}");
    }

    #[test]
    fn offline_and_endpoint_are_read_as_python_does() {
        let offline = |vars: &[(&str, &str)]| {
            let home = [("HOME", "/h")];
            settings(&[vars, &home[..]].concat()).unwrap().offline
        };
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "yes")]), Some("HF_HUB_OFFLINE"));
        assert_eq!(offline(&[("TRANSFORMERS_OFFLINE", "On")]), Some("TRANSFORMERS_OFFLINE"));
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]), None);
        let endpoint = |text| settings(&[("HOME", "/h"), ("HF_ENDPOINT", text)]).map(|s| s.endpoint);
        assert_eq!(endpoint("https://mirror.example/hub/").unwrap(), "https://mirror.example/hub");
        assert_eq!(endpoint("").unwrap(), DEFAULT_ENDPOINT);
        assert!(endpoint("mirror.example").is_err() && endpoint("ftp://x").is_err());
    }
}
