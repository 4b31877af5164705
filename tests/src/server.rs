//! Runs `stb-run serve` and talks to it over plain sockets, as no well-behaved client would.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use crate::programs::command;

/// The longest wait for anything. A test that hangs fails instead.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
    log: Receiver<String>,
}

/// A response.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The head as sent.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is something else.
    #[must_use]
    pub fn json(&self) -> Json {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The body of a response with status 200 as JSON.
    ///
    /// # Panics
    /// If the status is another one.
    #[must_use]
    pub fn success(&self) -> Json {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The value of `error` of a response with this status.
    ///
    /// # Panics
    /// If it is not OpenAI's format of an error.
    #[must_use]
    pub fn error(&self, status: u16) -> Json {
        assert_eq!(self.status, status, "{}", self.body);
        let error = self.json()["error"].clone();
        assert!(error["message"].is_string() && error["type"].is_string(), "{}", self.body);
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{}", self.body);
        error
    }

    /// The data of the server-sent events.
    #[must_use]
    pub fn events(&self) -> Vec<String> {
        self.body.lines().filter_map(|l| l.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

impl Server {
    /// Starts a server with these arguments, on any free port without `--port`, and waits until its models are ready.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(args: &[&str]) -> Self {
        Self::launch(args).when_ready()
    }

    /// Like [`Server::start`], for a user whose folders, also those for temporary files, are all `home`.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start_at_home(home: &Path, args: &[&str]) -> Self {
        Self::launch_with(args, |command| {
            command.current_dir(home);
            for variable in ["HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"]
            {
                command.env(variable, home);
            }
        })
        .when_ready()
    }

    fn when_ready(self) -> Self {
        let started = Instant::now();
        while self.get("/health").status != 200 {
            assert!(started.elapsed() < PATIENCE, "the model is not ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        self
    }

    /// Starts a server and waits until it listens.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn launch(args: &[&str]) -> Self {
        Self::launch_with(args, |_| {})
    }

    fn launch_with(args: &[&str], change: impl Fn(&mut Command)) -> Self {
        let mut all = vec!["serve"];
        if !args.contains(&"--port") {
            all.extend(["--port", "0"]);
        }
        all.extend(args);
        let mut command = command("stb-run", &all);
        change(&mut command);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let log = lines(child.stderr.take().expect("a pipe"));
        let address = loop {
            let line = log.recv_timeout(PATIENCE).expect("the server prints its address");
            if let Some((_, address)) = line.split_once("address=http://") {
                break address.trim().to_owned();
            }
        };
        Self { child, address, log }
    }

    /// A connection.
    ///
    /// # Panics
    /// If the server does not listen.
    #[must_use]
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream
    }

    /// Sends the bytes of a request and reads the response to its end.
    ///
    /// # Panics
    /// If the server does not answer.
    #[must_use]
    pub fn send(&self, request: &[u8]) -> Reply {
        let mut stream = self.connect();
        // The server may refuse the request before it has read all of it.
        let _ = stream.write_all(request);
        read_reply(stream)
    }

    /// Sends a request with headers, `Name: value\r\n` each.
    ///
    /// # Panics
    /// If the server does not answer.
    #[must_use]
    pub fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        self.send(&request(&self.address, method, path, headers, body))
    }

    /// `GET`.
    ///
    /// # Panics
    /// If the server does not answer.
    #[must_use]
    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, "", b"")
    }

    /// `POST` with JSON.
    ///
    /// # Panics
    /// If the server does not answer.
    #[must_use]
    pub fn post(&self, path: &str, body: &Json) -> Reply {
        self.request("POST", path, "", body.to_string().as_bytes())
    }

    /// Sends a request and returns the connection without reading the response.
    ///
    /// # Panics
    /// If the server does not listen.
    #[must_use]
    pub fn begin(&self, path: &str, body: &Json) -> TcpStream {
        let mut stream = self.connect();
        let request = request(&self.address, "POST", path, "", body.to_string().as_bytes());
        stream.write_all(&request).expect("the request is taken");
        stream
    }

    /// A figure of `/metrics`, summed over its labels.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let is_metric = |line: &&str| line.split(['{', ' ']).next() == Some(name);
        let values: Vec<f64> = text
            .lines()
            .filter(is_metric)
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        assert!(!values.is_empty(), "no metric {name}: {text}");
        values.iter().sum()
    }

    /// Waits until `name` has a value for which `fits` holds.
    ///
    /// # Panics
    /// If it never has.
    pub fn wait_for(&self, name: &str, fits: impl Fn(f64) -> bool) {
        let started = Instant::now();
        while !fits(self.metric(name)) {
            assert!(started.elapsed() < PATIENCE, "{name} stays {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal by its name, such as `TERM`.
    ///
    /// # Panics
    /// If that fails.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.expect("kill").success());
    }

    /// Waits until the program ends. Returns its exit code and the rest of its log.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn wait(mut self) -> (Option<i32>, String) {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        let lines: Vec<String> = self.log.iter().collect();
        (status.code(), lines.join("\n"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bytes of a request that closes the connection afterwards.
#[must_use]
pub fn request(host: &str, method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// Reads a response to the end of the connection.
///
/// # Panics
/// If it is no response.
#[must_use]
pub fn read_reply(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A connection that is reset after the response was sent has given all of it.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).expect("responses are UTF-8");
    let (head, body) =
        text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no response: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_owned() };
    Reply { status, head: head.to_owned(), body }
}

/// The content of a chunked body.
fn unchunked(mut body: &str) -> String {
    let mut content = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("the size of a chunk");
        content.push_str(&rest[..size.min(rest.len())]);
        body = rest.get(size + 2..).unwrap_or_default();
    }
    content
}

/// The lines of the log. A thread reads them, so that the server never waits for its log.
fn lines(stderr: ChildStderr) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}
