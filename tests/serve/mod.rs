//! The server as its clients meet it: the real program on a free port with the demo model.

mod answers;
mod bounds;
mod ending;
mod fields;
mod guarded;
mod hostile;
mod load;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{alone, demo, gptq, words};

struct Server {
    child: Child,
    address: String,
    _cores: MutexGuard<'static, ()>,
}

impl Server {
    /// Returns once the model is loaded.
    fn start(options: &str) -> Self {
        Self::of(&demo(), options)
    }

    fn of(model: &Path, options: &str) -> Self {
        Self::spawn(model, options, Stdio::null())
    }

    fn logging(options: &str, log: Stdio) -> Self {
        Self::spawn(&demo(), options, log)
    }

    fn spawn(model: &Path, options: &str, log: Stdio) -> Self {
        let cores = alone();
        let mut command = gptq("serve");
        command.args(["--model-id", model.to_str().unwrap()]);
        command.args(words("--port 0 --device cpu --max-total-tokens 256")).args(words(options));
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().to_owned();
        let server = Self { child, address, _cores: cores };
        while server.get("/health").status == 503 {
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    /// The request as it goes over the wire, in a connection of its own.
    fn send(&self, head: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let kind = if head.contains("content-type:") { "" } else { "content-type: application/json\r\n" };
        let host = if head.contains("host:") { String::new() } else { format!("host: {}\r\n", self.address) };
        let length = body.len();
        let head = format!("{head}\r\n{host}{kind}connection: close\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses early may close before it has read everything.
        let _ = stream.write_all(body);
        stream
    }

    fn get(&self, path: &str) -> Answer {
        Answer::read(self.send(&format!("GET {path} HTTP/1.1"), b""))
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.raw(path, body.to_string().as_bytes())
    }

    fn raw(&self, path: &str, body: &[u8]) -> Answer {
        Answer::read(self.send(&format!("POST {path} HTTP/1.1"), body))
    }

    fn generate(&self, inputs: &str, parameters: Value) -> Value {
        let answer = self.post("/generate", &json!({"inputs": inputs, "parameters": parameters}));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// The last token of an answer is sent before the step that made it gives its blocks back and says so: a leak stays.
    fn frees_all_blocks(&self) {
        let waiting = Instant::now();
        loop {
            let metrics = self.get("/metrics").body;
            if metrics.contains("gptq_kv_cache_blocks_used 0\n") {
                return;
            }
            assert!(waiting.elapsed() < Duration::from_secs(10), "blocks leaked: {metrics}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn terminate(&self) {
        self.signal("TERM");
    }

    /// Through the shell's own `kill`.
    fn signal(&self, name: &str) {
        let kill = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.child.id())]).status();
        assert!(kill.unwrap().success());
    }

    fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let head = head.to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.contains("transfer-encoding: chunked");
        let body = if chunked { dechunked(body) } else { body.to_owned() };
        Self { status, head, body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Contents of the events of a stream.
    fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }
}

fn dechunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
    whole
}
