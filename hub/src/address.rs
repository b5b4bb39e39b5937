//! Addresses: what may stand in them, where a redirect leads, and which of them get the token.

use ureq::http::Uri;

/// Everything but letters, digits and `-_.~` as `%XX`; `keep` stays too.
pub fn quote(text: &str, keep: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        match c.is_ascii_alphanumeric() || "-_.~".contains(c) || keep.contains(c) {
            true => quoted.push(c),
            false => quoted.push_str(&format!("%{byte:02X}")),
        }
    }
    quoted
}

/// Scheme, host and port, by which addresses belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

/// The hub's own names, between which a token may travel.
const HUB_HOSTS: [&str; 3] = ["huggingface.co", "www.huggingface.co", "hf.co"];

impl Origin {
    /// None for what is no address of the web.
    pub fn of(address: &str) -> Option<Self> {
        let address: Uri = address.parse().ok()?;
        let scheme = address.scheme_str()?.to_ascii_lowercase();
        let default = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = address.host()?.to_ascii_lowercase();
        Some(Self { scheme, host, port: address.port_u16().unwrap_or(default) })
    }

    /// As it may be shown.
    pub fn host(&self) -> String {
        match (self.scheme.as_str(), self.port) {
            ("https", 443) | ("http", 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    /// Whether what this one may know, the other may know too: the same origin, or both the hub itself by https.
    pub fn trusts(&self, other: &Self) -> bool {
        let is_hub = |origin: &Self| {
            origin.scheme == "https" && origin.port == 443 && HUB_HOSTS.contains(&origin.host.as_str())
        };
        self == other || (is_hub(self) && is_hub(other))
    }
}

/// Where a `Location` leads, seen from an address. None where it is no address.
pub fn follow(from: &str, location: &str) -> Option<String> {
    let (scheme, rest) = from.split_once("://")?;
    if location.starts_with("//") {
        return Some(format!("{scheme}:{location}"));
    }
    if location.starts_with('/') {
        let authority = rest.split(['/', '?']).next()?;
        return Some(format!("{scheme}://{authority}{location}"));
    }
    Origin::of(location).map(|_| location.to_owned())
}

/// The address of the next page in a `Link` header.
pub fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|part| {
        let (address, parameters) = part.trim().strip_prefix('<')?.split_once('>')?;
        parameters.split(';').any(|p| p.trim().replace('"', "") == "rel=next").then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trusts(a: &str, b: &str) -> bool {
        Origin::of(a).unwrap().trusts(&Origin::of(b).unwrap())
    }

    #[test]
    fn the_token_stays_with_the_hub_and_never_goes_to_a_cdn() {
        assert!(trusts("https://huggingface.co/a", "https://HUGGINGFACE.co:443/b?c"));
        assert!(trusts("https://huggingface.co/a", "https://hf.co/b"));
        assert!(trusts("http://127.0.0.1:8080/hub", "http://127.0.0.1:8080/x"));
        for other in [
            "https://cdn-lfs.huggingface.co/x",
            "https://huggingface.co.evil.example/x",
            "http://huggingface.co/x",
            "https://huggingface.co:8443/x",
            "https://huggingface.co@evil.example/x",
        ] {
            assert!(!trusts("https://huggingface.co/a", other), "{other}");
        }
        assert!(!trusts("http://127.0.0.1:8080", "http://127.0.0.1:8081"));
    }

    #[test]
    fn a_redirect_is_seen_from_where_it_came() {
        let from = "http://host:81/a/b?x";
        assert_eq!(follow(from, "/c?d").unwrap(), "http://host:81/c?d");
        assert_eq!(follow(from, "//cdn/c").unwrap(), "http://cdn/c");
        assert_eq!(follow(from, "https://cdn/c").unwrap(), "https://cdn/c");
        assert_eq!(follow(from, "ftp://cdn/c"), None);
        assert_eq!(follow(from, "c"), None);
    }

    #[test]
    fn names_are_quoted_and_pages_found() {
        assert_eq!(quote("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(quote("a b/ü#?.json", "/"), "a%20b/%C3%BC%23%3F.json");
        let link = r#"<http://h/first>; rel="prev", <http://h/tree?cursor=x%3D>; rel="next""#;
        assert_eq!(next_page(link), Some("http://h/tree?cursor=x%3D"));
        assert_eq!(next_page("<http://h/a>; rel=\"last\""), None);
    }
}
