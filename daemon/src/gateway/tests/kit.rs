//! A node on a loopback port, and a client that can misbehave.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time,
};

use super::super::{Gateway, GatewayConfig, Stop};
use crate::{
    catalog::{Catalog, ConfiguredModel, LoadError, MemoryFigures, Progress, ServedModel},
    config::HttpConfig,
    cost::CostModel,
    engine::{EngineConfig, VocabularySource},
    flow::Class,
    grammar::{Checker, Vocabulary},
    replica::Replica,
    runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan},
    runtime::clock,
    telemetry::{self, Metrics},
    tenants::Tenants,
    text::TextModel,
};

/// Anything in these tests that takes longer hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const CONTEXT_LEN: usize = 256;

pub(super) fn config() -> GatewayConfig {
    GatewayConfig::new(&HttpConfig::default(), Duration::from_secs(5))
}

pub(crate) fn metrics() -> Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS
        .get_or_init(|| telemetry::install_metrics().unwrap())
        .clone()
}

/// How the fake model behaves.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    /// Time of a step.
    pub(crate) step: Duration,
    pub(crate) running_max: usize,
    pub(crate) waiting_max: usize,
}

pub(crate) const QUICK: Pace = Pace {
    step: Duration::ZERO,
    running_max: 8,
    waiting_max: 64,
};

pub(crate) fn model(name: &str, pace: &Pace) -> ServedModel {
    let executor = Letters {
        step: pace.step,
        logits: Vec::new(),
    };
    model_with(name, pace, executor)
}

pub(super) fn model_with(
    name: &str,
    pace: &Pace,
    executor: impl StepExecutor + 'static,
) -> ServedModel {
    // An engine counts with what is installed when it starts.
    metrics();
    let engine = EngineConfig {
        waiting_max: pace.waiting_max,
        running_max: pace.running_max,
        cost: Some(CostModel::default()),
        vocabulary: Some(VocabularySource::new(|| Vocabulary::new(&text_model()))),
        ..EngineConfig::for_executor(name, &executor.limits())
    };
    ServedModel {
        name: name.to_owned(),
        created: 1_700_000_000,
        path: "/models/tiny".into(),
        architecture: "tiny".to_owned(),
        text: text_model(),
        grammars: Checker::default(),
        replica: Replica::start(Box::new(executor), engine).unwrap(),
        stop_token_ids: [END_TOKEN].into(),
        class: Class::Interactive,
        memory: MemoryFigures::default(),
        keeper: None,
    }
}

/// A model that writes small letters: its logits are a hash of the last token and its position.
struct Letters {
    step: Duration,
    logits: Vec<f32>,
}

impl StepExecutor for Letters {
    fn limits(&self) -> ExecutorLimits {
        ExecutorLimits {
            vocab_len: VOCAB_LEN,
            block_len: 16,
            n_blocks: 8 * CONTEXT_LEN / 16 + 1,
            step_tokens_max: 64,
            step_spans_max: 8,
            step_logits_max: 8,
            context_len_max: CONTEXT_LEN,
        }
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        std::thread::sleep(self.step);
        assert!(
            !plan.tokens.contains(&BOMB),
            "a bomb went off, as the test wants"
        );
        if plan.tokens.contains(&POISON) {
            return Err(StepError::NotFinite { row: 0 });
        }
        self.logits.clear();
        let rows = plan.spans.iter().flat_map(|span| {
            let position = |idx: usize| span.first_pos + idx - span.tokens.start + 1;
            span.logit_tokens().map(move |idx| (idx, position(idx)))
        });
        for (idx, position) in rows {
            let mut hash = u64::from(plan.tokens[idx]) << 32 | position as u64;
            for id in 0..VOCAB_LEN {
                hash = hash
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let is_letter = u8::try_from(id).is_ok_and(|byte| byte.is_ascii_lowercase());
                let noise = (hash >> 40) as f32 / (1 << 24) as f32;
                self.logits
                    .push(if is_letter { 4.0 * noise } else { -40.0 });
            }
        }
        Ok(&mut self.logits)
    }
}

/// A model that says what its prompt tells it to: the text between the last `[[` and `]]`.
#[derive(Default)]
pub(super) struct Reciter {
    /// Prompts by sequence.
    prompts: HashMap<u64, Vec<u32>>,
    /// Length of the prompt and what is to be said.
    speeches: HashMap<u64, (usize, Vec<u32>)>,
    logits: Vec<f32>,
}

fn speech_of(prompt: &[u32]) -> Vec<u32> {
    let marks = |mark: [u32; 2]| prompt.windows(2).rposition(|pair| pair == mark);
    let (open, close) = (marks([b'['.into(); 2]), marks([b']'.into(); 2]));
    match (open, close) {
        (Some(open), Some(close)) if open < close => prompt[open + 2..close].to_vec(),
        _ => Vec::new(),
    }
}

impl StepExecutor for Reciter {
    fn limits(&self) -> ExecutorLimits {
        ExecutorLimits {
            vocab_len: VOCAB_LEN,
            block_len: 16,
            n_blocks: 4096,
            step_tokens_max: 512,
            step_spans_max: 8,
            step_logits_max: 8,
            context_len_max: 4096,
        }
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        self.logits.clear();
        for span in &plan.spans {
            let tokens = &plan.tokens[span.tokens.clone()];
            let end = span.first_pos + tokens.len();
            if span.first_pos == 0 {
                // The canary's runs share a name.
                self.speeches.remove(&span.seq);
            }
            let prompt = self.prompts.entry(span.seq).or_default();
            prompt.truncate(span.first_pos);
            prompt.extend_from_slice(tokens);
            if span.logits != LogitRows::Last {
                continue;
            }
            let of_prompt = || (end, speech_of(prompt));
            let (n_prompt, speech) = self.speeches.entry(span.seq).or_insert_with(of_prompt);
            let next = speech.get(end - *n_prompt).copied().unwrap_or(END_TOKEN);
            let logit = |id| if id == next as usize { 0.0 } else { -40.0 };
            self.logits.extend((0..VOCAB_LEN).map(logit));
        }
        Ok(&mut self.logits)
    }
}

const VOCAB_LEN: usize = 259;
/// A prompt token on which the model fails.
pub(crate) const POISON: u32 = 7;
/// A prompt token on which the engine panics.
pub(crate) const BOMB: u32 = 8;
const END_TOKEN: u32 = 256;

/// A tokenizer of single bytes with a template in the manner of real ones.
pub(super) fn text_model() -> Arc<TextModel> {
    static TEXT: OnceLock<Arc<TextModel>> = OnceLock::new();
    let text = TEXT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let added = [(END_TOKEN, "<|end|>", true), (257, "<think>", false), (258, "</think>", false)];
        let added: Vec<Value> = added
            .iter()
            .map(|(id, content, special)| json!({"id": id, "content": content, "special": special}))
            .collect();
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": null,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": byte_vocab(), "merges": []},
        });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = json!({"eos_token": "<|end|>", "chat_template": TEMPLATE});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Arc::new(TextModel::open(dir.path()).unwrap())
    });
    Arc::clone(text)
}

const TEMPLATE: &str = "{%- for m in messages -%}{{ m.role }}: {{ m.content }}<|end|>{%- endfor -%}\
    {%- if messages[0].role == 'assistant' -%}{{ raise_exception('the first turn is not the user') }}{%- endif -%}\
    assistant:{%- if enable_thinking -%}<think>{%- endif -%}";

/// Byte-level BPE writes every byte as a visible character: printable Latin-1 ones as themselves, the
/// others, in order, from U+0100 on. Ids are the bytes.
fn byte_vocab() -> Value {
    let mut n_moved = 0;
    let entries = (0..=255_u8).map(|byte| {
        let visible = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if visible {
            u32::from(byte)
        } else {
            n_moved += 1;
            0xff + n_moved
        };
        (char::from_u32(code).unwrap().to_string(), Value::from(byte))
    });
    Value::Object(entries.collect())
}

/// A serving node; dropped at the end of a test.
pub(super) struct Node {
    pub(super) addr: SocketAddr,
    pub(super) catalog: Arc<Catalog>,
    pub(super) stop: Stop,
    pub(super) tasks: JoinSet<()>,
}

impl Node {
    pub(super) async fn start(config: GatewayConfig, models: Vec<ServedModel>) -> Self {
        Self::start_with_tenants(config, Tenants::open(clock::now()), models).await
    }

    pub(super) async fn start_with_tenants(
        config: GatewayConfig,
        tenants: Tenants,
        models: Vec<ServedModel>,
    ) -> Self {
        Self::start_with(config, tenants, models, Vec::new()).await
    }

    /// A node whose configuration names these models.
    pub(super) async fn start_configured(
        models: Vec<ServedModel>,
        configured: Vec<ConfiguredModel>,
    ) -> Self {
        let tenants = Tenants::open(clock::now());
        Self::start_with(config(), tenants, models, configured).await
    }

    async fn start_with(
        config: GatewayConfig,
        tenants: Tenants,
        models: Vec<ServedModel>,
        configured: Vec<ConfiguredModel>,
    ) -> Self {
        let loader = Box::new(|_: &str, path: &Path, _: &mut dyn FnMut(Progress)| {
            Err(LoadError::Checkpoint {
                path: path.to_owned(),
                source: "no loader in this test".into(),
            })
        });
        let catalog = Arc::new(Catalog::of_configuration(loader, configured));
        for model in models {
            catalog.insert(model);
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let stop = Stop::default();
        let tenants = Arc::new(tenants);
        let gateway = Gateway::new(
            config,
            tenants,
            Arc::clone(&catalog),
            metrics(),
            stop.clone(),
        );
        let mut tasks = JoinSet::new();
        tasks.spawn(gateway.serve(listener));
        Self {
            addr,
            catalog,
            stop,
            tasks,
        }
    }

    /// A node with one quick model called `tiny`.
    pub(super) async fn quick() -> Self {
        Self::start(config(), vec![model("tiny", &QUICK)]).await
    }

    /// A node with one model that says what it is told to.
    pub(super) async fn reciting() -> Self {
        Self::start(
            config(),
            vec![model_with("tiny", &QUICK, Reciter::default())],
        )
        .await
    }

    pub(super) async fn post(&self, path: &str, body: &str) -> Reply {
        self.post_with(path, "content-type: application/json\r\n", body.as_bytes())
            .await
    }

    pub(super) async fn post_with(&self, path: &str, headers: &str, body: &[u8]) -> Reply {
        let mut client = Client::connect(self.addr).await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: node\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        client.send(head.as_bytes()).await;
        client.send(body).await;
        client.reply().await
    }

    pub(super) async fn get(&self, path: &str) -> Reply {
        let mut client = Client::connect(self.addr).await;
        client
            .send(
                format!("GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n")
                    .as_bytes(),
            )
            .await;
        client.reply().await
    }

    /// Sequences in the engine of the only model, waiting ones too.
    pub(super) fn n_sequences(&self) -> usize {
        let load = self.catalog.lookup(None).unwrap().replica.load();
        load.n_running + load.n_waiting
    }

    pub(super) async fn wait_for_sequences(&self, n: usize) {
        let start = clock::now();
        while self.n_sequences() != n {
            assert!(
                start.elapsed() < PATIENCE,
                "{} sequences, expected {n}",
                self.n_sequences()
            );
            time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The node must answer after whatever a test did to it.
    pub(super) async fn must_serve(&self) {
        let reply = self
            .post(
                "/v1/completions",
                r#"{"prompt": "ok", "max_tokens": 2, "temperature": 0}"#,
            )
            .await;
        assert_eq!(reply.status, 200, "{}", reply.body);
    }
}

/// One connection, byte by byte.
pub(super) struct Client(TcpStream);

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Client {
    pub(super) async fn connect(addr: SocketAddr) -> Self {
        Self(TcpStream::connect(addr).await.unwrap())
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Sends as much as the other side takes.
    pub(super) async fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).await.is_ok()
    }

    /// Reads until the text contains `marker`.
    pub(super) async fn read_until(&mut self, marker: &str) -> String {
        let mut bytes = Vec::new();
        let mut buf = [0; 4096];
        while !String::from_utf8_lossy(&bytes).contains(marker) {
            let n = time::timeout(PATIENCE, self.0.read(&mut buf))
                .await
                .expect("the node is silent")
                .unwrap();
            assert_ne!(
                n,
                0,
                "closed before {marker:?}: {}",
                String::from_utf8_lossy(&bytes)
            );
            bytes.extend_from_slice(&buf[..n]);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for the end without an answer: closed, or reset where nobody had accepted it yet.
    pub(super) async fn is_closed(&mut self) -> bool {
        let read = time::timeout(PATIENCE, self.0.read(&mut [0; 1])).await;
        match read.expect("the node is silent") {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Reads until the connection is closed.
    pub(super) async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        time::timeout(PATIENCE, self.0.read_to_end(&mut bytes))
            .await
            .expect("the node is silent")
            .unwrap();
        bytes
    }

    /// Reads one answer on a connection that closes after it.
    pub(super) async fn reply(&mut self) -> Reply {
        Reply::parse(&self.read_to_end().await)
    }
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, rest) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let lower = |line: &str| match line.split_once(": ") {
            Some((name, value)) => format!("{}: {value}\n", name.to_lowercase()),
            None => format!("{line}\n"),
        };
        let head: String = head.lines().map(lower).collect();
        let body = if head.contains("transfer-encoding: chunked") {
            dechunk(rest)
        } else {
            rest.to_owned()
        };
        Self { status, head, body }
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// Status, code and field of an error.
    pub(super) fn error(&self) -> (u16, String, Option<String>) {
        let error = &self.json()["error"];
        assert!(
            error["message"].is_string() && error["type"].is_string(),
            "{}",
            self.body
        );
        let param = error["param"].as_str().map(str::to_owned);
        (
            self.status,
            error["code"].as_str().unwrap().to_owned(),
            param,
        )
    }

    /// Data of all events; the last must be `[DONE]`.
    pub(super) fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

fn dechunk(mut rest: &str) -> String {
    let mut body = String::new();
    loop {
        let (size, after) = rest
            .split_once("\r\n")
            .unwrap_or_else(|| panic!("no chunk size in {rest:?}"));
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return body;
        }
        body.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
}
