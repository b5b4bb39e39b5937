//! One request and its answer. Redirects, statuses and tokens are the caller's to decide on.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ureq::http::{Method, Request, Response, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy, SendBody};

use crate::address::Origin;
use crate::error::{Cause, Error, Result};
use crate::part::Part;
use crate::settings::Settings;

const USER_AGENT: &str = concat!("gptq/", env!("CARGO_PKG_VERSION"));

/// A request.
#[derive(Clone)]
pub(crate) struct Ask<'a> {
    pub method: Method,
    pub url: String,
    pub headers: Vec<(String, String)>,
    /// Bytes from one place to before another.
    pub range: Option<(u64, u64)>,
    pub payload: Payload<'a>,
}

#[derive(Clone)]
pub(crate) enum Payload<'a> {
    None,
    Bytes {
        bytes: &'a [u8],
        kind: &'static str,
    },
    /// The bytes of a file from one place to before another; `sent` gets the number of bytes that are on their way.
    Part {
        file: &'a File,
        from: u64,
        to: u64,
        sent: &'a (dyn Fn(u64) + Sync),
    },
}

impl<'a> Ask<'a> {
    pub fn new(method: Method, url: &str) -> Self {
        Self { method, url: url.to_owned(), headers: Vec::new(), range: None, payload: Payload::None }
    }

    pub fn range(self, range: Option<(u64, u64)>) -> Self {
        Self { range, ..self }
    }

    pub fn payload(self, payload: Payload<'a>) -> Self {
        Self { payload, ..self }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

pub(crate) struct Http {
    agent: Agent,
    proxy: Option<Proxy>,
    /// Between two pieces of an answer.
    silence: Duration,
    /// Whether any server has ever answered.
    answered: AtomicBool,
}

impl Http {
    pub fn new(settings: &Settings) -> Result<Self> {
        let patience = &settings.patience;
        let mut tls = TlsConfig::builder();
        if let Some(path) = &settings.certificates {
            tls = tls.root_certs(RootCerts::Specific(Arc::new(certificates(path)?)));
        }
        // No Accept-Encoding: a storage that compresses ignores ranges.
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(settings.proxy.clone())
            .tls_config(tls.build())
            .user_agent(USER_AGENT)
            .timeout_connect(Some(patience.connect))
            .timeout_resolve(Some(patience.connect))
            .timeout_per_read(Some(patience.silence))
            .timeout_per_write(Some(patience.silence))
            .max_idle_connections_per_host(16)
            .build();
        Ok(Self {
            agent: config.new_agent(),
            proxy: settings.proxy.clone(),
            silence: patience.silence,
            answered: AtomicBool::new(false),
        })
    }

    pub fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Any status is an answer. A failure is [`Cause::Unreachable`] or, once a connection was there, [`Cause::Broken`].
    pub fn send(&self, ask: &Ask, token: Option<&str>) -> Result<Response<Body>, Cause> {
        let mut request = Request::builder().method(ask.method.clone()).uri(&ask.url);
        for (name, value) in &ask.headers {
            request = request.header(name, value);
        }
        if let Some((from, to)) = ask.range {
            request = request.header(header::RANGE, format!("bytes={from}-{}", to - 1));
        }
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let failed = |error| self.failure(&ask.url, error);
        let answer = match ask.payload {
            Payload::None => self.agent.run(request.body(()).map_err(|error| failed(error.into()))?),
            Payload::Bytes { bytes, kind } => {
                let request = request.header(header::CONTENT_TYPE, kind).body(bytes);
                let request = request.map_err(|error| failed(error.into()))?;
                // A commit of many files takes its time before the first byte of the answer.
                let slow = Some(self.silence * 10);
                self.agent.run(self.agent.configure_request(request).timeout_per_read(slow).build())
            }
            Payload::Part { file, from, to, sent } => {
                let mut part = Told { part: Part::new(file, from, to), sent };
                let request = request.header(header::CONTENT_LENGTH, to - from);
                let request = request.body(SendBody::from_reader(&mut part));
                self.agent.run(request.map_err(|error| failed(error.into()))?)
            }
        };
        let answer = answer.map_err(failed)?;
        self.answered.store(true, Ordering::Relaxed);
        Ok(answer)
    }

    fn failure(&self, url: &str, error: ureq::Error) -> Cause {
        let host = host(url);
        match error {
            ureq::Error::Protocol(_) | ureq::Error::Timeout(_) if self.has_answered() => {
                Cause::Broken { host, cause: error.to_string() }
            }
            ureq::Error::Io(io)
                if self.has_answered() && io.kind() != std::io::ErrorKind::ConnectionRefused =>
            {
                Cause::Broken { host, cause: io.to_string() }
            }
            error => {
                let used =
                    self.proxy.as_ref().filter(|proxy| url.parse().is_ok_and(|uri| !proxy.is_no_proxy(&uri)));
                let proxy = used.map(|proxy| format!("{}:{}", proxy.host(), proxy.port()));
                Cause::Unreachable { host, proxy, cause: error.to_string() }
            }
        }
    }
}

struct Told<'a> {
    part: Part<'a>,
    sent: &'a (dyn Fn(u64) + Sync),
}

impl Read for Told<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.part.read(buffer)?;
        (self.sent)(count as u64);
        Ok(count)
    }
}

/// The host of an address, for messages.
pub(crate) fn host(url: &str) -> String {
    Origin::of(url).map_or_else(|| url.to_owned(), |origin| origin.host())
}

fn certificates(path: &std::path::Path) -> Result<Vec<Certificate<'static>>> {
    const MOST_BYTES: u64 = 16 << 20;
    let at = |cause: std::io::Error| Error::from(Cause::Io { path: path.to_owned(), cause });
    let pem = gptq_input::read(path, MOST_BYTES).map_err(at)?;
    let items = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(error) => Some(Err(at(std::io::Error::other(error.to_string())))),
    });
    let certificates = items.collect::<Result<Vec<_>>>()?;
    match certificates.is_empty() {
        true => Err(at(std::io::Error::other("expected certificates (PEM), found none"))),
        false => Ok(certificates),
    }
}
