//! A client over one HTTP connection, opened again where the server or the client itself closed it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use axum::http::{Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::load::{Ask, Client, Outcome, Times};
use crate::args::ServeBenchArgs;
use crate::output;

/// A server that is silent for so long has lost the request; keep-alive comments count.
const SILENCE: Duration = Duration::from_secs(120);

/// Where to connect and what to send there.
#[derive(Clone)]
pub struct Server {
    /// `host:port`
    pub address: String,
    pub api_key: Option<String>,
}

impl Server {
    /// The one that the command line names.
    pub fn new(args: &ServeBenchArgs) -> Result<Self> {
        let uri: Uri = args.url.parse().with_context(|| format!("--url {}", args.url))?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http"));
        let host = host.with_context(|| format!("--url: expected http://HOST:PORT, got {}", args.url))?;
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Self { address, api_key: args.api_key.clone() })
    }
}

pub struct Http {
    server: Server,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client for Http {
    /// By the server's own tokenizer.
    async fn length(&mut self, text: &str) -> Result<usize> {
        let answer = self.post("/tokenize", &json!({"inputs": text})).await?;
        let tokens = answer.as_array().map(Vec::len).filter(|n| *n > 0);
        tokens.with_context(|| format!("/tokenize: expected a list of tokens, got {answer}"))
    }

    async fn stream(&mut self, ask: &Ask) -> Outcome {
        let Ask { text, tokens, temperature, seed, leaves } = ask;
        let parameters =
            json!({"max_new_tokens": tokens, "details": true, "temperature": temperature, "seed": seed});
        self.taken(&json!({"inputs": text, "parameters": parameters}), *leaves).await
    }
}

impl Http {
    pub fn new(server: Server) -> Self {
        Self { server, connection: None }
    }

    /// A request with a JSON answer.
    async fn post(&mut self, path: &str, body: &Value) -> Result<Value> {
        let response = self.send(path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        ensure!(
            status.is_success(),
            "{path}: expected 200, got {status}: {}",
            String::from_utf8_lossy(&bytes)
        );
        serde_json::from_slice(&bytes).with_context(|| format!("{path}: expected JSON"))
    }

    /// A stream of tokens; `leaves`: the number of tokens after which the client goes away.
    async fn taken(&mut self, body: &Value, leaves: Option<usize>) -> Outcome {
        let start = Instant::now();
        let mut response = match self.send("/generate_stream", body).await {
            Ok(response) => response,
            Err(_) => {
                self.connection = None;
                return Outcome::Unreachable;
            }
        };
        if !response.status().is_success() {
            let status = response.status().as_u16();
            // Read to its end, so that the connection can be used again.
            if response.into_body().collect().await.is_err() {
                self.connection = None;
            }
            return Outcome::Status(status);
        }
        let outcome = match read(response.body_mut(), start, leaves).await {
            Ok(Some(times)) => return Outcome::Whole(times),
            Ok(None) => Outcome::Left,
            Err(problem) => Outcome::Broken(output::chain(&problem)),
        };
        self.connection = None;
        outcome
    }

    /// The connection of the request before, if it can take another one.
    async fn open(&mut self) -> Option<SendRequest<Full<Bytes>>> {
        let mut connection = self.connection.take()?;
        connection.ready().await.ok()?;
        Some(connection)
    }

    async fn send(&mut self, path: &str, body: &Value) -> Result<Response<Incoming>> {
        let mut request = Request::post(path)
            .header(header::HOST, &self.server.address)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.server.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body.to_string())))?;
        let mut connection = match self.open().await {
            Some(connection) => connection,
            None => connect(&self.server.address).await.with_context(|| self.server.address.clone())?,
        };
        let response = tokio::time::timeout(SILENCE, connection.send_request(request)).await??;
        self.connection = Some(connection);
        Ok(response)
    }
}

async fn connect(address: &str) -> Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // What goes wrong on it is reported to the waiting request.
    tokio::spawn(connection);
    Ok(sender)
}

/// Reads a stream to its end and checks it; `None` where the client left before.
async fn read(body: &mut Incoming, start: Instant, leaves: Option<usize>) -> Result<Option<Times>> {
    let (mut stream, mut buffer) = (Stream::default(), Vec::new());
    let mut last = start;
    loop {
        if leaves.is_some_and(|tokens| stream.tokens >= tokens) {
            return Ok(None);
        }
        let Some(frame) = tokio::time::timeout(SILENCE, body.frame()).await.context("no event")? else {
            break;
        };
        let Ok(data) = frame?.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<_> = buffer.drain(..=end).collect();
            let Some(event) = line.strip_prefix(b"data:") else { continue };
            stream.event(&serde_json::from_slice(event).context("an event that is not JSON")?)?;
            let now = Instant::now();
            match stream.tokens {
                1 => stream.times.first_token = (now - start).as_secs_f64(),
                _ => stream.times.between.push((now - last).as_secs_f64()),
            }
            last = now;
        }
    }
    ensure!(stream.ended, "the stream ended after {} tokens without a last event", stream.tokens);
    Ok(Some(stream.times))
}

/// What was seen of a stream.
#[derive(Default)]
struct Stream {
    tokens: usize,
    text: String,
    ended: bool,
    times: Times,
}

impl Stream {
    fn event(&mut self, event: &Value) -> Result<()> {
        if let Some(error) = event["error"].as_str() {
            bail!("after {} tokens: {error}", self.tokens);
        }
        ensure!(!self.ended, "an event after the last one: {event}");
        self.tokens += 1;
        ensure!(event["index"] == self.tokens, "expected token {}, got event {event}", self.tokens);
        self.text += event["token"]["text"].as_str().with_context(|| format!("no text in {event}"))?;
        if let Some(whole) = event["generated_text"].as_str() {
            self.ended = true;
            ensure!(whole == self.text, "expected the text {whole:?}, got the pieces {:?}", self.text);
            let details = &event["details"];
            ensure!(
                details["generated_tokens"] == self.tokens && details["finish_reason"].is_string(),
                "expected {} tokens and a reason, got {details}",
                self.tokens
            );
        }
        Ok(())
    }
}
