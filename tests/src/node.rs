//! A running node: started on free ports with a state folder of its own, its log kept and judged.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    http::{self, Connection},
    process, tool, wait,
};

/// What a node gets to end by itself when a test is over.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Log lines shown when a test fails.
const LOG_LINES_SHOWN: usize = 40;

/// Settings of a node that is not started yet.
#[derive(Debug)]
pub struct NodeBuilder {
    model: PathBuf,
    env: Vec<(String, String)>,
    allowed: Vec<String>,
    state: Option<PathBuf>,
    configuration: Option<String>,
    open_files_max: Option<u32>,
}

impl NodeBuilder {
    /// The hard limit of open files; the soft one is half of it.
    #[must_use]
    pub fn open_files_max(mut self, max: u32) -> Self {
        self.open_files_max = Some(max);
        self
    }

    /// Serves what this configuration file says (`dsd serve`); the model given is the one that
    /// [`Node::must_serve`] asks.
    #[must_use]
    pub fn configuration(mut self, text: &str) -> Self {
        self.configuration = Some(text.to_owned());
        self
    }

    /// Sets an environment variable, such as `DSD_ENGINE__KV_TOKENS`.
    #[must_use]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "numbers and names read best as they are"
    )]
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// Lets warnings and errors with this text pass.
    #[must_use]
    pub fn allow(mut self, text: &str) -> Self {
        self.allowed.push(text.to_owned());
        self
    }

    /// Uses this state folder instead of a fresh one.
    #[must_use]
    pub fn state(mut self, state: &Path) -> Self {
        self.state = Some(state.to_owned());
        self
    }

    /// Starts the process and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn spawn(self) -> Node {
        let own_state = self.state.is_none().then(|| TempDir::new().unwrap());
        let own_path = own_state.as_ref().map(|folder| folder.path().to_owned());
        let state = self.state.or(own_path).unwrap();
        let mut command = match self.open_files_max {
            None => tool::command("dsd"),
            Some(max) => tool::command_with_open_files("dsd", max),
        };
        match &self.configuration {
            None => {
                let (http, quic) = (["--http", "127.0.0.1:0"], ["--quic", "127.0.0.1:0"]);
                command.arg("dev").args(http).args(quic);
                command.arg("--model").arg(&self.model);
                command.arg("--state").arg(&state);
            }
            Some(text) => {
                let path = state.join("dsd.toml");
                fs::write(&path, text).unwrap();
                command
                    .args(["serve", "--config"])
                    .arg(path)
                    .env("DSD_HTTP__LISTEN", "127.0.0.1:0")
                    .env("DSD_QUIC__LISTEN", "127.0.0.1:0")
                    .env("DSD_NODE__STATE_DIR", &state);
            }
        }
        command
            // Tests run side by side; a thread per core for each of them would only contend.
            .env("DSD_ENGINE__THREADS", "1")
            // Some tiny models have the context of the real ones.
            .env("DSD_ENGINE__KV_TOKENS", "4096")
            .env("DSD_LOG__FORMAT", "json")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = Log::default();
        let lines = BufReader::new(child.stderr.take().unwrap());
        let sink = log.clone();
        thread::spawn(move || {
            for line in lines.lines() {
                sink.push(line.unwrap());
            }
        });
        let found = wait::until_or(wait::DEADLINE, || {
            let listening = log.find("listening");
            if listening.is_none() && child.try_wait().unwrap().is_some() {
                panic!("the node ended before it listened:\n{}", log.tail());
            }
            listening
        });
        let Some(listening) = found else {
            child.kill().unwrap();
            panic!("the node does not listen:\n{}", log.tail());
        };
        let address = |key: &str| {
            listening[key]
                .as_str()
                .unwrap()
                .parse::<SocketAddr>()
                .unwrap()
        };
        let name = match self.model.extension() {
            Some(ext) if ext == "gguf" => self.model.file_stem(),
            _ => self.model.file_name(),
        };
        Node {
            http: address("http"),
            quic: address("quic"),
            model: name.unwrap().to_str().unwrap().to_owned(),
            child,
            status: None,
            log,
            allowed: self.allowed,
            state,
            _own_state: own_state,
        }
    }

    /// Starts the process and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start(self) -> Node {
        let mut node = self.spawn();
        wait::until_true("/ready", || {
            assert!(
                node.child.try_wait().unwrap().is_none(),
                "the node ended while loading"
            );
            http::get(node.http, "/ready").status == 200
        });
        node
    }
}

/// A running node. Dropped, it is stopped and its log must be clean.
#[derive(Debug)]
pub struct Node {
    /// Where HTTP is answered.
    pub http: SocketAddr,
    /// Where QUIC is answered.
    pub quic: SocketAddr,
    /// Name of the model it was started with.
    pub model: String,
    child: Child,
    status: Option<ExitStatus>,
    log: Log,
    allowed: Vec<String>,
    state: PathBuf,
    /// Deleted with the node.
    _own_state: Option<TempDir>,
}

impl Node {
    /// A node that will serve the checkpoint at `model`.
    pub fn builder(model: &Path) -> NodeBuilder {
        NodeBuilder {
            model: model.to_owned(),
            env: Vec::new(),
            allowed: Vec::new(),
            state: None,
            configuration: None,
            open_files_max: None,
        }
    }

    /// A node with default settings, ready.
    pub fn start(model: &Path) -> Self {
        Self::builder(model).start()
    }

    /// Sends SIGTERM and does not wait.
    pub fn terminate(&self) {
        process::signal(self.child.id(), "TERM");
    }

    /// Waits for the end of the process.
    pub fn exit(&mut self) -> ExitStatus {
        let status = process::exit_of(&mut self.child, "the node");
        self.status = Some(status);
        status
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its state folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Bytes of a field of the statuses of its processes, such as `RssAnon`, ranks included.
    pub fn memory_bytes(&self, field: &str) -> u64 {
        let of = |pid| process::memory_bytes(pid, field);
        self.pids().into_iter().map(of).sum()
    }

    /// Bytes that its processes, ranks included, take of the machine's memory.
    pub fn proportional_bytes(&self) -> u64 {
        let of = process::proportional_bytes;
        self.pids().into_iter().map(of).sum()
    }

    /// The agent and the ranks of its model's last group.
    pub fn pids(&self) -> Vec<u32> {
        let forming = self.records("group forming").pop();
        let ranks = forming.and_then(|record| serde_json::from_str(record["pids"].as_str()?).ok());
        let mut pids: Vec<u32> = ranks.unwrap_or_default();
        pids.push(self.pid());
        pids
    }

    /// A new connection to its HTTP edge.
    pub fn connect(&self) -> Connection {
        Connection::open(self.http)
    }

    /// `GET` over a connection of its own.
    pub fn get(&self, path: &str) -> http::Reply {
        http::get(self.http, path)
    }

    /// `POST` of JSON over a connection of its own.
    pub fn post(&self, path: &str, body: &Value) -> http::Reply {
        http::post(self.http, path, body)
    }

    /// The first log record with this message.
    pub fn logged(&self, message: &str) -> Option<Value> {
        self.log.find(message)
    }

    /// All log records with this message, so far.
    pub fn records(&self, message: &str) -> Vec<Value> {
        self.log.all(message)
    }

    /// Its only model as `dsctl status --json` shows it.
    ///
    /// # Panics
    /// When the node does not say.
    pub fn model_status(&self) -> Value {
        let outcome = tool::dsctl(self, &["--json", "status"]);
        let mut lines = outcome.json_lines();
        assert_eq!(lines.len(), 1, "{outcome:?}");
        lines.remove(0)["models"][0].take()
    }

    /// Waits until nothing runs, nothing waits and no KV block is in use.
    pub fn wait_until_idle(&self) {
        let mut last = Value::Null;
        let idle = wait::until_or(wait::DEADLINE, || {
            last = self.model_status();
            let is_zero = |key: &&str| last[*key] == 0;
            ["n_running", "n_waiting", "n_blocks_used"]
                .iter()
                .all(is_zero)
                .then_some(())
        });
        assert!(idle.is_some(), "requests left something behind: {last}");
    }

    /// The node answers a good request.
    ///
    /// # Panics
    /// When it does not.
    pub fn must_serve(&self) {
        let body = serde_json::json!({
            "model": self.model, "prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": true,
        });
        let reply = self.post("/v1/completions", &body);
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.json()["usage"]["completion_tokens"], 2, "{reply:?}");
    }

    /// Fails on any warning or error of the log that holds none of the `allowed` texts.
    ///
    /// # Panics
    /// When there is one.
    pub fn assert_clean_log(&self, allowed: &[String]) {
        let odd = self.log.warnings(allowed);
        assert!(odd.is_empty(), "the node logged:\n{}", odd.join("\n"));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.status.is_none() && self.child.try_wait().unwrap().is_none() {
            self.terminate();
            let ended = wait::until_or(STOP_TIMEOUT, || self.child.try_wait().unwrap());
            if ended.is_none() {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
            }
        }
        if thread::panicking() {
            self.log.show();
        } else {
            self.assert_clean_log(&self.allowed);
        }
    }
}

/// Lines that the node wrote so far.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn push(&self, line: String) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }

    fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn tail(&self) -> String {
        let lines = self.lines();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }

    fn show(&self) {
        // Captured by the test harness, unlike a write to standard error.
        #[expect(clippy::print_stderr, reason = "shown with the failed test")]
        {
            eprintln!("log of the node:\n{}", self.tail());
        }
    }

    fn find(&self, message: &str) -> Option<Value> {
        self.all(message).into_iter().next()
    }

    fn all(&self, message: &str) -> Vec<Value> {
        self.lines()
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|record| record["message"] == message)
            .collect()
    }

    /// Warnings and errors, and lines that are no log records, such as a panic's.
    fn warnings(&self, allowed: &[String]) -> Vec<String> {
        let is_odd = |line: &String| match serde_json::from_str::<Value>(line) {
            Ok(record) => matches!(record["level"].as_str(), Some("WARN" | "ERROR")),
            Err(_) => true,
        };
        let is_allowed = |line: &String| allowed.iter().any(|text| line.contains(text));
        self.lines()
            .into_iter()
            .filter(|line| is_odd(line) && !is_allowed(line))
            .collect()
    }
}
