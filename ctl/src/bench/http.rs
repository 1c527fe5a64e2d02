//! One streamed completion over HTTP/1.1, measured.
//!
//! Connections are kept and used again, as client libraries do, unless the plan says otherwise.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

use crate::{
    bench::{load::Plan, schedule, sse::SseReader},
    clock,
    failure::{Exit, Failure},
};

/// Error bodies and model lists; more is not read.
const BODY_LEN_MAX: usize = 1 << 20;

/// Where requests go.
#[derive(Debug)]
pub(super) struct Target {
    authority: String,
    host: String,
    base_path: String,
    api_key: Option<String>,
    /// Guards idle connections only; held to push or pop.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    /// Guards the tasks that drive connections; held to add one or reap ended ones.
    drivers: Mutex<JoinSet<()>>,
}

/// What came of one request. Times count from the moment it was sent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Outcome {
    /// Word for what went wrong; `None` when the answer is complete.
    pub(super) error: Option<String>,
    /// To the first text.
    pub(super) ttft: Option<Duration>,
    /// Between pieces of text.
    pub(super) gaps: Vec<Duration>,
    /// To the end.
    pub(super) e2e: Duration,
    /// Prompt tokens, as the node counts.
    pub(super) n_prompt_tokens: u64,
    /// Tokens generated, as the node counts.
    pub(super) n_completion_tokens: u64,
}

impl Outcome {
    /// A request that was never sent or got no answer.
    pub(super) fn failed(error: impl Into<String>) -> Self {
        Self {
            error: Some(error.into()),
            ..Self::default()
        }
    }
}

impl Target {
    /// Reads the base URL.
    pub(super) fn new(url: &str, api_key: Option<String>) -> Result<Self, Failure> {
        let refused = |why: &str| {
            Failure::new(Exit::Refused, "usage", format!("--http {url}: {why}"))
                .hint("expected a URL such as http://127.0.0.1:8000")
        };
        let uri: Uri = url.parse().map_err(|_| refused("not a URL"))?;
        if uri.scheme_str() != Some("http") {
            return Err(refused("only http:// is spoken"));
        }
        let authority = uri.authority().ok_or_else(|| refused("no host"))?;
        let port = authority.port_u16().unwrap_or(80);
        if api_key
            .as_deref()
            .is_some_and(|key| !key.bytes().all(|b| (0x21..0x7f).contains(&b)))
        {
            let message = "the API key holds characters that no header may";
            return Err(Failure::new(Exit::Refused, "usage", message));
        }
        Ok(Self {
            authority: format!("{}:{port}", authority.host()),
            host: authority.as_str().to_owned(),
            base_path: uri.path().trim_end_matches('/').to_owned(),
            api_key,
            idle: Mutex::new(Vec::new()),
            drivers: Mutex::new(JoinSet::new()),
        })
    }

    /// The models that the node lists; none where it has no such list, as some servers.
    ///
    /// # Errors
    /// When the node cannot be reached, does not answer within `limit`, or wants another API key.
    pub(super) async fn models(
        &self,
        limit: Duration,
        reconnect: bool,
    ) -> Result<Vec<String>, Failure> {
        let unreachable = |why: &str| {
            let message = format!("cannot reach http://{}: {why}", self.host);
            Failure::new(Exit::Unreachable, "unreachable", message)
                .hint("is dsd running? start one with `dsd dev`, or name another node with --http")
        };
        let exchange = async {
            let mut sender = self.connection().await.map_err(unreachable)?;
            let request = self
                .request(Method::GET, "/v1/models", Bytes::new())
                .map_err(|e| unreachable(&e.to_string()))?;
            let response = sender
                .send_request(request)
                .await
                .map_err(|e| unreachable(&e.to_string()))?;
            let status = response.status();
            let body = body_start(response).await;
            if !reconnect {
                self.keep(sender);
            }
            Ok((status, body))
        };
        let (status, body) = timeout(limit, exchange)
            .await
            .map_err(|_| Failure::new(Exit::TimedOut, "timeout", "no model list in time"))??;
        let message = || {
            let value: Value = serde_json::from_slice(&body).unwrap_or_default();
            let said = value.pointer("/error/message").and_then(Value::as_str);
            said.map_or_else(|| error_code(status, &body), str::to_owned)
        };
        match status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(self.bad_key(&message()));
            }
            // Not of every server that can be measured.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => return Ok(Vec::new()),
            _ => {
                let message = format!("http://{} gives no model list: {}", self.host, message());
                return Err(Failure::new(Exit::Unhealthy, "no_model_list", message)
                    .hint("see the node's log, or `dsctl status`"));
            }
        }
        let list: Value = serde_json::from_slice(&body).unwrap_or_default();
        let entries = list.get("data").and_then(Value::as_array);
        let id = |entry: &Value| entry.get("id").and_then(Value::as_str).map(str::to_owned);
        Ok(entries.into_iter().flatten().filter_map(id).collect())
    }

    fn bad_key(&self, said: &str) -> Failure {
        let (kind, what, hint) = match self.api_key {
            None => (
                "missing_api_key",
                "wants an API key",
                "give one with --api-key or in DSD_API_KEY",
            ),
            Some(_) => (
                "wrong_api_key",
                "refuses the API key",
                "is the key in --api-key or DSD_API_KEY one of this node's? `dsctl tenant list` shows its tenants",
            ),
        };
        let message = format!("http://{} {what}: {said}", self.host);
        Failure::new(Exit::Refused, kind, message).hint(hint)
    }

    /// Sends request number `idx` of the plan and reads its answer to the end.
    pub(super) async fn complete(&self, plan: &Plan, idx: u64) -> Outcome {
        let sent = clock::now();
        let mut outcome = Outcome::default();
        let exchange = self.exchange(plan, idx, sent, &mut outcome);
        outcome.error = match timeout(plan.request_timeout, exchange).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => Some("client_timeout".to_owned()),
        };
        outcome.e2e = clock::now() - sent;
        outcome
    }

    async fn exchange(
        &self,
        plan: &Plan,
        idx: u64,
        sent: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let mut sender = self.connection().await?;
        let path = if plan.is_chat {
            "/v1/chat/completions"
        } else {
            "/v1/completions"
        };
        let body = Bytes::from(body(plan, idx).to_string());
        let request = self
            .request(Method::POST, path, body)
            .map_err(|_| "bad_request_line")?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|_| "connection_lost")?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(error_code(status, &body_start(response).await));
        }
        let mut answer = Answer::default();
        let mut reader = SseReader::default();
        let mut frames = response.into_body();
        while let Some(frame) = frames.frame().await {
            let frame = frame.map_err(|_| "connection_lost")?;
            let Some(bytes) = frame.data_ref() else {
                continue;
            };
            let at = clock::now() - sent;
            reader
                .push(bytes, |event| answer.take(event, at, outcome))
                .map_err(|_| "bad_stream")?;
        }
        if let Some(error) = answer.error {
            return Err(error);
        }
        if !answer.is_done {
            return Err("broken_stream".to_owned());
        }
        if !plan.reconnect {
            self.keep(sender);
        }
        Ok(())
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base_path))
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            builder = builder.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        builder.body(Full::new(body))
    }

    /// An idle connection that is still good, or a new one.
    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, &'static str> {
        loop {
            let idle = self
                .idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop();
            let Some(mut sender) = idle else { break };
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let socket = TcpStream::connect(&self.authority)
            .await
            .map_err(|_| "connect_failed")?;
        // Small writes must not wait for acknowledgements when latency is measured.
        socket.set_nodelay(true).map_err(|_| "connect_failed")?;
        let (sender, connection) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(|_| "connect_failed")?;
        let mut drivers = self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
        while drivers.try_join_next().is_some() {}
        drivers.spawn(async move {
            // Its error reaches the request that was under way.
            let _reported_there = connection.await;
        });
        Ok(sender)
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(sender);
    }
}

/// What the events of one answer add up to.
#[derive(Debug, Default)]
struct Answer {
    last_text: Option<Duration>,
    is_done: bool,
    error: Option<String>,
}

impl Answer {
    /// Takes the data of one event that came `at` after the request was sent.
    fn take(&mut self, event: &str, at: Duration, outcome: &mut Outcome) {
        if event == "[DONE]" {
            self.is_done = true;
            return;
        }
        let Ok(chunk) = serde_json::from_str::<Value>(event) else {
            self.error = Some("bad_stream".to_owned());
            return;
        };
        if let Some(error) = chunk.get("error") {
            self.error = Some(code_of(error).unwrap_or_else(|| "stream_error".to_owned()));
            return;
        }
        if let Some(usage) = chunk.get("usage") {
            let count = |key| usage.get(key).and_then(Value::as_u64);
            outcome.n_prompt_tokens = count("prompt_tokens").unwrap_or(outcome.n_prompt_tokens);
            outcome.n_completion_tokens =
                count("completion_tokens").unwrap_or(outcome.n_completion_tokens);
        }
        let texts = [
            "/choices/0/text",
            "/choices/0/delta/content",
            "/choices/0/delta/reasoning_content",
        ];
        let has_text = |path: &&str| {
            chunk
                .pointer(path)
                .and_then(Value::as_str)
                .is_some_and(|text| !text.is_empty())
        };
        if texts.iter().any(has_text) {
            match self.last_text.replace(at) {
                None => outcome.ttft = Some(at),
                Some(before) => outcome.gaps.push(at.saturating_sub(before)),
            }
        }
    }
}

fn body(plan: &Plan, idx: u64) -> Value {
    let prompt = schedule::prompt(plan.prompt_len, plan.seed, idx);
    let mut body = json!({
        "model": plan.model,
        "max_tokens": plan.output_len,
        "stream": true,
        "stream_options": {"include_usage": true},
        "seed": plan.seed.wrapping_add(idx) & 0x7fff_ffff,
    });
    if plan.is_chat {
        body["messages"] = json!([{"role": "user", "content": prompt}]);
    } else {
        body["prompt"] = Value::String(prompt);
    }
    if plan.ignore_eos {
        body["ignore_eos"] = Value::Bool(true);
    }
    body
}

/// As much of a body as is worth reading; what cannot be read counts as absent.
async fn body_start(response: Response<Incoming>) -> Bytes {
    let limited = http_body_util::Limited::new(response.into_body(), BODY_LEN_MAX);
    limited
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default()
}

/// The code of an error body, else its status.
fn error_code(status: StatusCode, body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let code = value.get("error").and_then(code_of);
    code.unwrap_or_else(|| format!("http_{}", status.as_u16()))
}

fn code_of(error: &Value) -> Option<String> {
    ["code", "type"]
        .iter()
        .find_map(|key| error.get(key)?.as_str())
        .map(str::to_owned)
}
