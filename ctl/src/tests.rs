//! Commands against a real server of `proto` in this process.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

use clap::Parser;
use dsd_proto::{
    code::Code,
    quic::{AdminService, ReplySender, Server, ServerLimits, pki},
    wire::{
        admin::{
            ErrorReply, Finding, ModelEntry, ModelListReply, ModelLoadReply, ModelLoadRequest,
            ModelState, ModelStatus, ModelUnloadReply, ModelUnloadRequest, ModelVerifyReply,
            ModelVerifyRequest, Progress, StatusReply, TenantAddRequest, TenantCap, TenantClass,
            TenantEntry, TenantKeyReply, TenantListReply, TenantRefusals, TenantRemoveReply,
            TenantRemoveRequest, TenantRotateKeyRequest, TenantSetRequest, TenantShowReply,
            TenantShowRequest,
        },
        generate::{Finish, GenerateDelta, GenerateDone, GenerateRequest, Input, Role},
    },
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    cli::{Cli, Command},
    clock,
    failure::{Exit, Failure},
    generate, model,
    output::Output,
    status, tenant, usage_exit,
};

/// A node with one model called "tiny".
struct Node {
    is_ready: bool,
    requests: mpsc::Sender<GenerateRequest>,
}

fn not_found(name: &str) -> ErrorReply {
    ErrorReply::new(Code::ModelNotFound, format!("no model is called {name:?}"))
}

fn tenant_entry(name: &str) -> TenantEntry {
    TenantEntry {
        name: name.into(),
        weight: 3,
        class: TenantClass::Batch,
        n_keys: 1,
        n_running: 2,
        n_waiting: 4,
        n_requests: 50,
        n_refused: 6,
        work_share: 0.75,
    }
}

fn shown(name: &str) -> TenantShowReply {
    let cap = |max, left| TenantCap { max, left };
    TenantShowReply {
        entry: tenant_entry(name),
        models: None,
        concurrency: cap(Some(8), Some(2)),
        requests_per_minute: cap(None, None),
        tokens_per_minute: cap(Some(6000), Some(100)),
        n_prompt_tokens: 1000,
        n_cached_tokens: 300,
        n_output_tokens: 500,
        refusals: vec![TenantRefusals {
            reason: "tokens".into(),
            n: 6,
        }],
        queue_ms_p50: Some(1),
        queue_ms_p95: None,
    }
}

impl AdminService for Node {
    async fn status(&self) -> Result<StatusReply, ErrorReply> {
        let model = ModelStatus {
            name: "tiny".into(),
            architecture: "qwen2".into(),
            state: ModelState::Ready,
            context_len: 4096,
            n_running: 1,
            n_waiting: 0,
            n_blocks_used: 3,
            n_blocks: 100,
            n_steps: 10,
            n_prompt_tokens: 11,
            n_output_tokens: 12,
            n_preemptions: 0,
            last_token_age_ms: Some(15),
            bytes_mapped: 1 << 20,
            kv_bytes: 1 << 21,
            workspace_bytes: 1 << 22,
        };
        Ok(StatusReply {
            node: "node-1".into(),
            cluster: "lab".into(),
            version: "0.1.0".into(),
            uptime_s: 61,
            ready: self.is_ready,
            ready_reason: "because".into(),
            http_address: "127.0.0.1:8000".into(),
            quic_address: "127.0.0.1:7600".into(),
            models: vec![model],
        })
    }

    async fn model_list(&self) -> Result<ModelListReply, ErrorReply> {
        let entry = ModelEntry {
            name: "tiny".into(),
            path: "/models/tiny".into(),
            state: None,
            architecture: "qwen2".into(),
            format: "gguf".into(),
            bytes: 2048,
        };
        Ok(ModelListReply {
            models: vec![entry],
        })
    }

    async fn model_load(
        &self,
        request: ModelLoadRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelLoadReply, ErrorReply> {
        if request.path_or_name != "tiny" {
            return Err(ErrorReply::new(
                Code::WeightsInvalid,
                "tensor `a`: expected 1, found 2",
            ));
        }
        progress
            .send(&Progress {
                phase: "mapping".into(),
                done: 1,
                total: 2,
            })
            .await?;
        Ok(ModelLoadReply {
            name: request.path_or_name,
            architecture: "qwen2".into(),
            context_len: 4096,
            n_blocks: 100,
            bytes_mapped: 1,
            kv_bytes: 2,
            workspace_bytes: 3,
            load_ms: 1500,
        })
    }

    async fn model_unload(
        &self,
        request: ModelUnloadRequest,
    ) -> Result<ModelUnloadReply, ErrorReply> {
        match request.name.as_str() {
            "tiny" => Ok(ModelUnloadReply {
                name: request.name,
                n_requests_ended: 1,
            }),
            "slow" => {
                tokio::time::sleep(Duration::from_secs(60)).await;
                Err(not_found("slow"))
            }
            name => Err(not_found(name)),
        }
    }

    async fn model_verify(
        &self,
        request: ModelVerifyRequest,
        _progress: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelVerifyReply, ErrorReply> {
        let finding = Finding {
            file: "a.gguf".into(),
            tensor: "b".into(),
            expected: "[1]".into(),
            found: "[2]".into(),
        };
        let is_damaged = request.name == "damaged";
        Ok(ModelVerifyReply {
            name: request.name,
            n_files: 1,
            n_tensors: 2,
            bytes: 3,
            digest: "ab".into(),
            findings: is_damaged.then_some(finding).into_iter().collect(),
        })
    }

    async fn tenant_list(&self) -> Result<TenantListReply, ErrorReply> {
        Ok(TenantListReply {
            tenants: vec![tenant_entry("team-a")],
        })
    }

    async fn tenant_show(&self, request: TenantShowRequest) -> Result<TenantShowReply, ErrorReply> {
        if request.name != "team-a" {
            return Err(not_found(&request.name));
        }
        Ok(shown(&request.name))
    }

    async fn tenant_add(&self, request: TenantAddRequest) -> Result<TenantKeyReply, ErrorReply> {
        // The patch comes back, so that a test sees what flags mean.
        Ok(TenantKeyReply {
            name: request.name,
            key: format!("{:?}", request.patch),
        })
    }

    async fn tenant_set(&self, request: TenantSetRequest) -> Result<TenantShowReply, ErrorReply> {
        Ok(shown(&request.name))
    }

    async fn tenant_rotate_key(
        &self,
        request: TenantRotateKeyRequest,
    ) -> Result<TenantKeyReply, ErrorReply> {
        Ok(TenantKeyReply {
            name: request.name,
            key: format!("sk-{}", request.grace_s),
        })
    }

    async fn tenant_remove(
        &self,
        request: TenantRemoveRequest,
    ) -> Result<TenantRemoveReply, ErrorReply> {
        Ok(TenantRemoveReply {
            name: request.name,
            n_open: 2,
        })
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        deltas: &mut ReplySender<'_, GenerateDelta>,
    ) -> Result<GenerateDone, ErrorReply> {
        self.requests.send(request).await.unwrap();
        for content in ["Hel", "lo\x1b[2J"] {
            let delta = GenerateDelta {
                content: content.into(),
                reasoning: "hm".into(),
                n_tokens: 1,
            };
            deltas.send(&delta).await?;
        }
        Ok(GenerateDone {
            finish_reason: Finish::Stop,
            n_prompt_tokens: 4,
            n_completion_tokens: 2,
            queue_ms: 0,
            ttft_ms: 5,
        })
    }
}

struct Rig {
    state: TempDir,
    address: SocketAddr,
    requests: mpsc::Receiver<GenerateRequest>,
    _tasks: JoinSet<()>,
}

impl Rig {
    fn new(is_ready: bool) -> Self {
        let state = tempfile::tempdir().unwrap();
        let (cluster, name) = ("lab".parse().unwrap(), "node-1".parse().unwrap());
        let folder = state.path().join("pki");
        let identity = pki::ensure(&folder, &cluster, &name, clock::unix_seconds()).unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (tx, requests) = mpsc::channel(4);
        let node = Node {
            is_ready,
            requests: tx,
        };
        let server = Server::new(socket, &identity, node, ServerLimits::default()).unwrap();
        let address = server.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(server.run(std::future::pending()));
        Self {
            state,
            address,
            requests,
            _tasks: tasks,
        }
    }

    async fn run(&self, words: &[&str]) -> (Result<Exit, Failure>, String) {
        dsctl(&self.address.to_string(), self.state.path(), words).await
    }
}

/// Runs a command line and returns what it came to and printed.
async fn dsctl(node: &str, state: &Path, words: &[&str]) -> (Result<Exit, Failure>, String) {
    let state = state.to_str().unwrap();
    let line = ["dsctl", "--node", node, "--state", state]
        .into_iter()
        .chain(words.iter().copied());
    let Cli { global, command } = Cli::try_parse_from(line).unwrap();
    let mut bytes = Vec::new();
    let mut out = Output::new(Box::new(&mut bytes), global.json, false);
    let exit = match command {
        Command::Status => status::run(&global, &mut out).await,
        Command::Model(verb) => model::run(&global, verb, &mut out).await,
        Command::Tenant(verb) => tenant::run(&global, verb, &mut out).await,
        Command::Generate(args) => generate::run(&global, args, &mut out).await,
        other => panic!("not a command of this test: {other:?}"),
    };
    drop(out);
    (exit, String::from_utf8(bytes).unwrap())
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn status_shows_the_models_and_tells_health_by_its_code() {
    let (exit, text) = Rig::new(true).run(&["status"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    for part in [
        "node-1 of cluster lab",
        "ready: because",
        "1m 1s",
        "tiny",
        "3/100",
        "15 ms ago",
    ] {
        assert!(text.contains(part), "{part} in:\n{text}");
    }
    let (exit, text) = Rig::new(false).run(&["status", "--json"]).await;
    assert_eq!(exit.unwrap(), Exit::Unhealthy);
    let [reply] = lines(&text).try_into().unwrap();
    assert_eq!(reply["ready"], false);
    assert_eq!(reply["models"][0]["state"], "ready");
    assert_eq!(reply["models"][0]["n_blocks"], 100);
}

#[tokio::test]
async fn models_are_listed_loaded_and_unloaded() {
    let rig = Rig::new(true);
    let (exit, text) = rig.run(&["model", "list"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    assert!(
        text.contains("tiny   -      qwen2         gguf    2.0 KiB  /models/tiny"),
        "{text}"
    );
    let (exit, text) = rig.run(&["model", "load", "tiny", "--json"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    let [progress, loaded] = lines(&text).try_into().unwrap();
    assert_eq!(
        progress["progress"],
        json!({"phase": "mapping", "done": 1, "total": 2})
    );
    assert_eq!(loaded["loaded"]["load_ms"], 1500);
    let (exit, text) = rig.run(&["model", "unload", "tiny"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    assert_eq!(text, "unloaded tiny, 1 requests ended\n");
}

#[tokio::test]
async fn tenants_are_listed_shown_and_changed() {
    let rig = Rig::new(true);
    let (exit, text) = rig.run(&["tenant", "list"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    let row = "team-a  3       batch  1     2        4        50        6        75.0 %";
    assert!(text.contains(row), "{text}");
    let (exit, text) = rig.run(&["tenant", "show", "team-a"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    for part in [
        "concurrency                 8, 2 left",
        "requests a minute           none",
        "tokens out                  500",
        "refused                     tokens 6",
        "queue time p50              1 ms",
        "queue time p95              -",
    ] {
        assert!(text.contains(part), "{part} in:\n{text}");
    }
    let failure = rig.run(&["tenant", "show", "b"]).await.0.unwrap_err();
    assert_eq!(failure.exit, Exit::Refused);
    let (exit, text) = rig.run(&["tenant", "set", "team-a", "--json"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    assert_eq!(lines(&text)[0]["entry"]["class"], "batch");
    let words = ["tenant", "rotate-key", "team-a", "--grace", "60"];
    let (exit, text) = rig.run(&words).await;
    assert_eq!((exit.unwrap(), text.as_str()), (Exit::Done, "sk-60\n"));
    let (exit, text) = rig.run(&["tenant", "remove", "team-a"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    assert_eq!(text, "removed team-a, 2 of its requests were open\n");
}

#[tokio::test]
async fn settings_of_a_tenant_are_sent_as_given() {
    let rig = Rig::new(true);
    let flags = [
        "tenant",
        "add",
        "x",
        "--weight",
        "3",
        "--class",
        "batch",
        "--concurrency",
        "8",
        "--tokens-per-minute",
        "none",
        "--model",
        "a",
        "--model",
        "b",
    ];
    let (exit, text) = rig.run(&flags).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    let expected = "TenantPatch { weight: Some(3), class: Some(Batch), concurrency: To(8), \
        requests_per_minute: Keep, tokens_per_minute: Clear, models: To([\"a\", \"b\"]) }\n";
    assert_eq!(text, expected);
    let (_, text) = rig.run(&["tenant", "add", "x", "--model", "all"]).await;
    assert!(
        text.contains("weight: None, class: None, concurrency: Keep"),
        "{text}"
    );
    assert!(text.contains("models: All"), "{text}");
}

#[tokio::test]
async fn what_the_node_refuses_is_said_with_its_code() {
    let rig = Rig::new(true);
    let failure = rig.run(&["model", "unload", "other"]).await.0.unwrap_err();
    assert_eq!(
        (failure.exit, failure.kind.as_str()),
        (Exit::Refused, "model_not_found")
    );
    assert_eq!(
        failure.to_string(),
        "dsctl: no model is called \"other\"\n  `dsctl model list` shows what there is\n"
    );
    let failure = rig.run(&["model", "load", "bad"]).await.0.unwrap_err();
    assert_eq!(
        (failure.exit, failure.kind.as_str()),
        (Exit::Refused, "weights_invalid")
    );
}

#[tokio::test]
async fn a_damaged_model_is_reported_and_unhealthy() {
    let rig = Rig::new(true);
    let (exit, text) = rig.run(&["model", "verify", "damaged"]).await;
    assert_eq!(exit.unwrap(), Exit::Unhealthy);
    assert!(text.contains("a.gguf  b       [1]       [2]"), "{text}");
    let (exit, text) = rig.run(&["model", "verify", "tiny"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    assert!(text.contains("nothing wrong was found"), "{text}");
}

#[tokio::test]
async fn generate_sends_its_flags_and_prints_the_answer() {
    let mut rig = Rig::new(true);
    let words = [
        "generate",
        "--chat",
        "--system",
        "S",
        "hi",
        "--temperature",
        "0.5",
        "--seed",
        "7",
    ];
    let (exit, text) = rig.run(&words).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    // Bytes as they are, since no terminal reads them; no reasoning either.
    assert_eq!(text, "Hello\x1b[2J\n");
    let request = rig.requests.recv().await.unwrap();
    let Input::Chat(turns) = request.input else {
        panic!("{request:?}")
    };
    let turns: Vec<_> = turns
        .into_iter()
        .map(|turn| (turn.role, turn.content))
        .collect();
    assert_eq!(
        turns,
        [
            (Role::System, "S".to_owned()),
            (Role::User, "hi".to_owned())
        ]
    );
    assert_eq!(
        (request.sampling.temperature, request.sampling.seed),
        (Some(0.5), Some(7))
    );

    let (exit, text) = rig.run(&["generate", "--tokens", "1,2,3", "--json"]).await;
    assert_eq!(exit.unwrap(), Exit::Done);
    let [first, _, done] = lines(&text).try_into().unwrap();
    assert_eq!(
        first["delta"],
        json!({"content": "Hel", "reasoning": "hm", "n_tokens": 1})
    );
    assert_eq!(done["done"]["finish_reason"], "stop");
    assert_eq!(
        rig.requests.recv().await.unwrap().input,
        Input::Tokens(vec![1, 2, 3])
    );
}

#[tokio::test]
async fn a_slow_node_is_a_timeout() {
    let rig = Rig::new(true);
    let failure = rig
        .run(&["--timeout", "200ms", "model", "unload", "slow"])
        .await
        .0
        .unwrap_err();
    assert_eq!(failure.exit, Exit::TimedOut);
}

#[tokio::test]
async fn an_absent_node_is_unreachable_and_says_what_to_do() {
    let rig = Rig::new(true);
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let words = ["--timeout", "100ms", "status"];
    let failure = dsctl(&address, rig.state.path(), &words)
        .await
        .0
        .unwrap_err();
    assert_eq!(failure.exit, Exit::Unreachable);
    let expected = format!("dsctl: no node answers at {address}\n  is dsd running?");
    assert!(failure.to_string().starts_with(&expected), "{failure}");
}

#[tokio::test]
async fn a_name_with_several_addresses_finds_the_one_that_answers() {
    let rig = Rig::new(true);
    let node = format!("localhost:{}", rig.address.port());
    let words = ["--timeout", "1s", "status"];
    let exit = dsctl(&node, rig.state.path(), &words).await.0;
    assert_eq!(exit.unwrap(), Exit::Done);
}

#[tokio::test]
async fn certificates_that_are_missing_or_of_another_cluster_are_told_apart() {
    let rig = Rig::new(true);
    let empty = tempfile::tempdir().unwrap();
    let address = rig.address.to_string();
    let failure = dsctl(&address, empty.path(), &["status"])
        .await
        .0
        .unwrap_err();
    assert_eq!(
        (failure.exit, failure.kind.as_str()),
        (Exit::Refused, "certificates")
    );
    assert!(failure.to_string().contains("`dsd dev`"), "{failure}");
    let other = Rig::new(true);
    let failure = dsctl(&address, other.state.path(), &["status"])
        .await
        .0
        .unwrap_err();
    assert_eq!(
        (failure.exit, failure.kind.as_str()),
        (Exit::Unreachable, "untrusted")
    );
    let failure = dsctl("nowhere", rig.state.path(), &["status"])
        .await
        .0
        .unwrap_err();
    assert_eq!(
        (failure.exit, failure.kind.as_str()),
        (Exit::Refused, "usage")
    );
}

#[test]
fn usage_errors_are_1_and_help_is_0() {
    let check = |line: &str, expected| {
        let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err();
        assert_eq!(usage_exit(&error), expected, "{line}");
    };
    check("dsctl --help", Exit::Done);
    check("dsctl model load --help", Exit::Done);
    check("dsctl help", Exit::Done);
    check("dsctl help bench", Exit::Done);
    check("dsctl help model load", Exit::Done);
    check("dsctl help nonsense", Exit::Refused);
    check("dsctl --version", Exit::Done);
    check("dsctl", Exit::Refused);
    check("dsctl nonsense", Exit::Refused);
    check("dsctl model", Exit::Refused);
    check("dsctl status --timeout never", Exit::Refused);
    check("dsctl generate x --tokens --chat", Exit::Refused);
    check("dsctl generate x --max-tokens 0", Exit::Refused);
    check("dsctl completions klingon", Exit::Refused);
}

#[test]
fn every_shell_gets_a_script() {
    for shell in ["bash", "zsh", "fish"] {
        let cli = Cli::try_parse_from(["dsctl", "completions", shell]).unwrap();
        let Command::Completions { shell } = cli.command else {
            panic!()
        };
        let mut bytes = Vec::new();
        let mut out = Output::new(Box::new(&mut bytes), false, false);
        crate::completions::run(shell, &mut out).unwrap();
        drop(out);
        assert!(
            String::from_utf8(bytes).unwrap().contains("dsctl"),
            "{shell}"
        );
    }
}
