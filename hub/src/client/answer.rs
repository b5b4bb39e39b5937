//! What a status and the headers beside it mean: the hub's own error code first, then the status.

use std::io::Read;
use std::time::Duration;

use ureq::Body;
use ureq::http::HeaderMap;

use super::Client;
use crate::error::{Cause, Subject};

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    /// All workers wait; None where the server does not say how long.
    Wait(Option<Duration>),
    Again,
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Repo,
    Revision,
    File,
    Gated,
    /// 401: the request had no token, or one that the server does not know.
    Unknown,
    Forbidden,
    ParentMoved,
    Busy,
    Other(u16),
}

/// Redirects are not judged here.
pub(crate) fn judge(status: u16, headers: &HeaderMap) -> Verdict {
    if (200..300).contains(&status) {
        return Verdict::Good;
    }
    let refusal = match (header(headers, "x-error-code"), status) {
        (Some("RepoNotFound"), _) => Refusal::Repo,
        (Some("RevisionNotFound"), _) => Refusal::Revision,
        (Some("EntryNotFound"), _) => Refusal::File,
        (Some("GatedRepo"), _) => Refusal::Gated,
        (_, 429) => return Verdict::Wait(wait(headers)),
        (_, 408 | 500..=599) => return Verdict::Again,
        (_, 401) => Refusal::Unknown,
        (_, 403) => Refusal::Forbidden,
        (_, 404) => Refusal::Repo,
        (_, 409) => Refusal::Busy,
        (_, 412) => Refusal::ParentMoved,
        (_, other) => Refusal::Other(other),
    };
    Verdict::Refused(refusal)
}

impl Refusal {
    /// `line`: what the server says, with the header's message before the body's.
    pub fn cause(self, client: &Client, subject: &Subject, line: String) -> Cause {
        let settings = &client.settings;
        match (self, &settings.token) {
            (Self::Repo | Self::Unknown, None) => Cause::NotFoundWithoutToken,
            (Self::Unknown, Some(token)) => {
                Cause::TokenRefused { endpoint: settings.endpoint.clone(), from: token.from.clone() }
            }
            // The hub answers so too where it does not know the token.
            (Self::Repo, Some(token)) if line.contains("Invalid credentials") => {
                Cause::TokenRefused { endpoint: settings.endpoint.clone(), from: token.from.clone() }
            }
            (Self::Repo, Some(_)) => Cause::NoRepo,
            (Self::Revision, _) => Cause::NoRevision { branches: Vec::new() },
            (Self::File, _) => Cause::NoFile { files: Vec::new() },
            (Self::Gated, _) => {
                let path = subject.repo.as_ref().map_or(String::new(), |repo| repo.path());
                Cause::Gated { page: client.url(&path) }
            }
            (Self::Forbidden, _) => Cause::Forbidden { message: line },
            (Self::ParentMoved, _) => Cause::ParentMoved,
            (Self::Busy, _) => Cause::Busy { message: line },
            (Self::Other(status), _) => Cause::Unexpected { status, message: line },
        }
    }
}

/// A header's text.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Seconds that the server asks for: `RateLimit: "api";r=0;t=55`, or `Retry-After: 55`; the longer of them.
fn wait(headers: &HeaderMap) -> Option<Duration> {
    let rates = headers.get_all("ratelimit").iter().filter_map(|value| value.to_str().ok());
    let seconds = rates.flat_map(|value| value.split(',')).filter_map(|policy| {
        let field = |name: &str| {
            let fields = policy.split(';').filter_map(|field| field.trim().split_once('='));
            fields.clone().find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<u64>().ok())
        };
        field("t").filter(|_| field("r").is_none_or(|left| left == 0))
    });
    let after = header(headers, "retry-after").and_then(|value| value.trim().parse().ok());
    seconds.chain(after).max().map(Duration::from_secs)
}

/// The first line of a refusal's body, without a page's tags.
pub(crate) fn first_line(body: &mut Body) -> String {
    let mut bytes = Vec::new();
    // What has arrived until it broke tells enough.
    let _ = body.as_reader().take(4096).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    if let Ok(value) = serde_json::from_str::<serde_json::Value>(&text)
        && let Some(message) =
            value.get("error").or_else(|| value.get("message")).and_then(|value| value.as_str())
    {
        return message.lines().next().unwrap_or_default().to_owned();
    }
    let mut plain = String::new();
    let mut in_tag = false;
    for c in text.chars() {
        match c {
            '<' => in_tag = true,
            '>' => {
                in_tag = false;
                plain.push(' ');
            }
            c if !in_tag => plain.push(c),
            _ => {}
        }
    }
    let mut lines = plain.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    lines.find(|line| !line.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use ureq::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn the_hubs_own_code_counts_before_the_status() {
        for (code, status, refusal) in [
            ("RepoNotFound", 401, Refusal::Repo),
            ("RevisionNotFound", 404, Refusal::Revision),
            ("EntryNotFound", 404, Refusal::File),
            ("GatedRepo", 403, Refusal::Gated),
            ("Other", 404, Refusal::Repo),
            ("Other", 401, Refusal::Unknown),
            ("Other", 403, Refusal::Forbidden),
            ("Other", 412, Refusal::ParentMoved),
            ("Other", 409, Refusal::Busy),
            ("Other", 418, Refusal::Other(418)),
        ] {
            assert_eq!(
                judge(status, &headers(&[("x-error-code", code)])),
                Verdict::Refused(refusal),
                "{code} {status}"
            );
        }
        for status in [408, 500, 502, 503, 504] {
            assert_eq!(judge(status, &HeaderMap::new()), Verdict::Again);
        }
        assert_eq!(judge(206, &HeaderMap::new()), Verdict::Good);
    }

    #[test]
    fn a_wait_is_as_long_as_the_server_asks_for() {
        let seconds = |pairs: &[(&'static str, &'static str)]| match judge(429, &headers(pairs)) {
            Verdict::Wait(pause) => pause.map(|pause| pause.as_secs()),
            other => panic!("{other:?}"),
        };
        assert_eq!(seconds(&[("ratelimit", "\"api\";r=0;t=55")]), Some(55));
        assert_eq!(seconds(&[("ratelimit", "\"api\";r=0;t=55"), ("retry-after", "60")]), Some(60));
        assert_eq!(seconds(&[("ratelimit", "\"api\";r=7;t=200, \"resolvers\";r=0;t=9")]), Some(9));
        assert_eq!(seconds(&[("retry-after", "soon")]), None);
        assert_eq!(seconds(&[]), None);
    }
}
