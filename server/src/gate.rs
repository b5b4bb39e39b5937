//! Access: the key, the names that the server goes by, and the sites whose pages may use it.
//!
//! A page of any site can let its visitor's browser send requests to 127.0.0.1. Without a preflight it can do so with a
//! form's content types only; under a name of its own that points to 127.0.0.1 it could read the answers as well.

use std::net::IpAddr;

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};

use super::error::ApiError;

/// What a request must bring.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// Sent as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// Routes that need no key.
    pub open: Vec<OpenRoute>,
    /// Names that the server answers to beside those of this machine; `None` for all.
    pub hosts: Option<Vec<String>>,
    /// Sites beside the server's own whose pages may use it.
    pub origins: Origins,
}

/// A route that computes nothing and can be open without the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenRoute {
    Health,
    /// The chat page.
    Page,
    /// The description of the routes.
    Docs,
    Info,
    Models,
    Metrics,
}

/// Sites as browsers send them in `Origin`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origins {
    #[default]
    None,
    Any,
    Listed(Vec<HeaderValue>),
}

impl Gate {
    /// Whether the request may come in at all, whatever it asks.
    pub fn admit(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let named = headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or_default());
        if let Some(host) =
            uri.authority().map(Authority::as_str).into_iter().chain(named).find(|it| !self.knows(it))
        {
            let message =
                format!("expected a Host of this machine or of --allowed-hosts, got {}", host.escape_debug());
            return Err(ApiError::forbidden(message));
        }
        if method != Method::POST {
            return Ok(());
        }
        if let Some(origin) = headers.get(header::ORIGIN).filter(|origin| !self.lets_in(origin, headers)) {
            let message =
                format!("expected a page of this server or of --cors-allow-origin, got one of {origin:?}");
            return Err(ApiError::forbidden(message));
        }
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        if kind.is_some_and(is_json) { Ok(()) } else { Err(ApiError::content_type(kind.unwrap_or("none"))) }
    }

    /// The key, where there is one and the route is not open. The time a comparison takes says nothing about it.
    pub fn authorize(&self, route: Option<OpenRoute>, headers: &HeaderMap) -> Result<(), ApiError> {
        let open = route.is_some_and(|route| self.open.contains(&route));
        let Some(key) = self.api_key.as_deref().filter(|_| !open) else { return Ok(()) };
        let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let Some(given) = given.and_then(|given| given.strip_prefix(b"Bearer ")) else {
            return Err(ApiError::unauthorized());
        };
        let different = (0..key.len().max(given.len())).fold(key.len() ^ given.len(), |different, i| {
            let of = |bytes: &[u8]| usize::from(bytes.get(i).copied().unwrap_or(0));
            different | (of(key.as_bytes()) ^ of(given))
        });
        if std::hint::black_box(different) == 0 { Ok(()) } else { Err(ApiError::unauthorized()) }
    }

    /// Whether the server goes by this `host:port`.
    fn knows(&self, host: &str) -> bool {
        let Some(hosts) = &self.hosts else { return true };
        let Ok(authority) = host.parse::<Authority>() else { return false };
        let name = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let own = name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        own || hosts
            .iter()
            .any(|host| host.eq_ignore_ascii_case(&name) || host.eq_ignore_ascii_case(authority.as_str()))
    }

    /// Whether pages of this site may ask: the server's own, whichever scheme a proxy before it speaks, or a listed one.
    fn lets_in(&self, origin: &HeaderValue, headers: &HeaderMap) -> bool {
        let listed = match &self.origins {
            Origins::None => false,
            Origins::Any => true,
            Origins::Listed(list) => list.contains(origin),
        };
        let site =
            origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, site)| site.as_bytes());
        listed
            || site.is_some_and(|site| headers.get(header::HOST).is_some_and(|host| host.as_bytes() == site))
    }
}

/// `application/json`, and kinds of it, with or without parameters.
fn is_json(kind: &str) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    /// The status of a POST with these headers; 200 where it is let in.
    fn post(gate: &Gate, pairs: &[(&'static str, &str)]) -> u16 {
        let admitted = gate.admit(&Method::POST, &Uri::from_static("/generate"), &headers(pairs));
        admitted.map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn only_the_whole_key_opens() {
        let gate = Gate { api_key: Some("secret".into()), open: vec![OpenRoute::Health], ..Gate::default() };
        let open = |value: &str| gate.authorize(None, &headers(&[("authorization", value)])).is_ok();
        assert!(open("Bearer secret"));
        assert!(!open("Bearer secre") && !open("Bearer secrets") && !open("secret") && !open("Bearer "));
        assert!(gate.authorize(None, &HeaderMap::new()).is_err());
        assert!(gate.authorize(Some(OpenRoute::Metrics), &HeaderMap::new()).is_err());
        assert!(gate.authorize(Some(OpenRoute::Health), &HeaderMap::new()).is_ok());
        assert!(Gate::default().authorize(None, &HeaderMap::new()).is_ok());
    }

    #[test]
    fn names_that_point_here_from_elsewhere_are_not_answered() {
        let local = Gate { hosts: Some(vec!["gptq.example".into()]), ..Gate::default() };
        let with =
            |gate: &Gate, host: &str| post(gate, &[("host", host), ("content-type", "application/json")]);
        for own in
            ["127.0.0.1:3000", "localhost", "LOCALHOST:80", "[::1]:3000", "127.9.9.9", "gptq.example:443"]
        {
            assert_eq!(with(&local, own), 200, "{own}");
        }
        for foreign in [
            "evil.example:3000",
            "localhost.evil.example",
            "0.0.0.0:3000",
            "192.168.0.7",
            "",
            "a b",
            "127.0.0.1@evil.example",
        ] {
            assert_eq!(with(&local, foreign), 403, "{foreign}");
        }
        let all = Gate { hosts: None, ..Gate::default() };
        assert_eq!(with(&all, "evil.example"), 200);
        let absolute =
            local.admit(&Method::GET, &Uri::from_static("http://evil.example/info"), &HeaderMap::new());
        assert!(absolute.is_err());
    }

    #[test]
    fn pages_of_other_sites_ask_in_vain() {
        let local = Gate { hosts: Some(Vec::new()), ..Gate::default() };
        let from = |gate: &Gate, origin: &str| {
            post(
                gate,
                &[("host", "localhost:3000"), ("origin", origin), ("content-type", "application/json")],
            )
        };
        assert_eq!(from(&local, "http://localhost:3000"), 200);
        for foreign in
            ["http://localhost:8080", "https://evil.example", "null", "http://localhost:3000.evil.example"]
        {
            assert_eq!(from(&local, foreign), 403, "{foreign}");
        }
        let site = HeaderValue::from_static("https://app.example");
        let listed = Gate { origins: Origins::Listed(vec![site]), ..local.clone() };
        assert_eq!((from(&listed, "https://app.example"), from(&listed, "https://evil.example")), (200, 403));
        assert_eq!(from(&Gate { origins: Origins::Any, ..local }, "null"), 200);
    }

    #[test]
    fn what_a_form_can_send_is_no_request() {
        let gate = Gate::default();
        for kind in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert_eq!(post(&gate, &[("content-type", kind)]), 200, "{kind}");
        }
        let forms = [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=a",
            "text/json",
        ];
        for kind in forms {
            assert_eq!(post(&gate, &[("content-type", kind)]), 415, "{kind}");
        }
        assert_eq!(post(&gate, &[]), 415);
    }
}
