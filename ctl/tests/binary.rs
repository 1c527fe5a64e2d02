//! The `dsctl` binary itself against a real server of `proto`: exit codes, streams, Ctrl-C.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests fail by panicking, and a server needs a thread"
)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dsd_proto::{
    code::Code,
    quic::{AdminService, Identity, ReplySender, Server, ServerLimits, pki},
    wire::{
        admin::{
            ErrorReply, ModelListReply, ModelLoadReply, ModelLoadRequest, ModelUnloadReply,
            ModelUnloadRequest, ModelVerifyReply, ModelVerifyRequest, Progress, StatusReply,
            TenantAddRequest, TenantKeyReply, TenantListReply, TenantRemoveReply,
            TenantRemoveRequest, TenantRotateKeyRequest, TenantSetRequest, TenantShowReply,
            TenantShowRequest,
        },
        generate::{Finish, GenerateDelta, GenerateDone, GenerateRequest, Input},
    },
};
use tempfile::TempDir;
use tokio::sync::oneshot;

const DEADLINE: Duration = Duration::from_secs(20);
/// Below the idle timeout of 10 s, after which a node notices any client that is gone.
const CANCEL_DEADLINE: Duration = Duration::from_secs(5);

/// Echoes the last turn of a conversation with the number of turns; "endless" never ends.
struct Echo {
    cancelled: SyncSender<()>,
}

struct Dropped(SyncSender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _told_already = self.0.try_send(());
    }
}

fn absent<T>() -> Result<T, ErrorReply> {
    Err(ErrorReply::new(Code::Unsupported, "this node only echoes"))
}

impl AdminService for Echo {
    async fn status(&self) -> Result<StatusReply, ErrorReply> {
        absent()
    }

    async fn model_list(&self) -> Result<ModelListReply, ErrorReply> {
        Ok(ModelListReply { models: vec![] })
    }

    async fn model_load(
        &self,
        _: ModelLoadRequest,
        _: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelLoadReply, ErrorReply> {
        absent()
    }

    async fn model_unload(&self, _: ModelUnloadRequest) -> Result<ModelUnloadReply, ErrorReply> {
        absent()
    }

    async fn model_verify(
        &self,
        _: ModelVerifyRequest,
        _: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelVerifyReply, ErrorReply> {
        absent()
    }

    async fn tenant_list(&self) -> Result<TenantListReply, ErrorReply> {
        absent()
    }

    async fn tenant_show(&self, _: TenantShowRequest) -> Result<TenantShowReply, ErrorReply> {
        absent()
    }

    async fn tenant_add(&self, _: TenantAddRequest) -> Result<TenantKeyReply, ErrorReply> {
        absent()
    }

    async fn tenant_set(&self, _: TenantSetRequest) -> Result<TenantShowReply, ErrorReply> {
        absent()
    }

    async fn tenant_rotate_key(
        &self,
        _: TenantRotateKeyRequest,
    ) -> Result<TenantKeyReply, ErrorReply> {
        absent()
    }

    async fn tenant_remove(&self, _: TenantRemoveRequest) -> Result<TenantRemoveReply, ErrorReply> {
        absent()
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        deltas: &mut ReplySender<'_, GenerateDelta>,
    ) -> Result<GenerateDone, ErrorReply> {
        let (n, text) = match request.input {
            Input::Chat(turns) => (turns.len(), turns.last().unwrap().content.clone()),
            Input::Prompt(text) => (0, text),
            Input::Tokens(_) => return absent(),
        };
        let content = format!("{n}:{text}");
        deltas
            .send(&GenerateDelta {
                content,
                reasoning: String::new(),
                n_tokens: 1,
            })
            .await?;
        if text == "endless" {
            let _dropped = Dropped(self.cancelled.clone());
            std::future::pending::<()>().await;
        }
        Ok(GenerateDone {
            finish_reason: Finish::Stop,
            n_prompt_tokens: 1,
            n_completion_tokens: 1,
            queue_ms: 0,
            ttft_ms: 0,
        })
    }
}

/// A node on a thread of its own.
struct Rig {
    state: TempDir,
    address: SocketAddr,
    cancelled: Receiver<()>,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let state = tempfile::tempdir().unwrap();
        let (cluster, name) = ("lab".parse().unwrap(), "node-1".parse().unwrap());
        #[expect(
            clippy::disallowed_methods,
            reason = "certificates are for the real present"
        )]
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let identity = pki::ensure(&state.path().join("pki"), &cluster, &name, now).unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let (cancelled_tx, cancelled) = sync_channel(4);
        let (shutdown, stop) = oneshot::channel();
        let serve = move || {
            serve(
                socket,
                &identity,
                Echo {
                    cancelled: cancelled_tx,
                },
                stop,
            )
        };
        let thread = thread::Builder::new()
            .name("node".into())
            .spawn(serve)
            .unwrap();
        Self {
            state,
            address,
            cancelled,
            shutdown: Some(shutdown),
            thread: Some(thread),
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = dsctl(words);
        command
            .env("DSD_STATE", self.state.path())
            .env("DSD_NODE", self.address.to_string());
        command
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        self.thread.take().map(thread::JoinHandle::join);
    }
}

fn serve(socket: UdpSocket, identity: &Identity, echo: Echo, stop: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let limits = ServerLimits {
            drain_timeout: Duration::from_millis(100),
            ..ServerLimits::default()
        };
        let server = Server::new(socket, identity, echo, limits).unwrap();
        server
            .run(async {
                let _dropped_is_the_signal = stop.await;
            })
            .await;
    });
}

fn dsctl(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsctl"));
    command
        .args(words)
        .env_remove("DSD_NODE")
        .env_remove("DSD_STATE")
        .env_remove("XDG_STATE_HOME");
    command
}

fn check(command: &mut Command, code: i32, stdout: &str, stderr: &str) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        output.status.code(),
        Some(code),
        "{command:?}\n{out}\n{err}"
    );
    assert!(out.contains(stdout), "{command:?}\n{out}");
    assert!(err.contains(stderr), "{command:?}\n{err}");
}

fn wait(child: &mut Child) -> i32 {
    let mut waited = Duration::ZERO;
    while waited < DEADLINE {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().expect("it ends by itself, not by a signal");
        }
        thread::sleep(Duration::from_millis(10));
        waited += Duration::from_millis(10);
    }
    child.kill().unwrap();
    panic!("dsctl did not end in time");
}

#[test]
fn exit_codes_tell_what_happened() {
    let rig = Rig::new();
    check(&mut dsctl(&["--help"]), 0, "Operates dsd nodes", "");
    check(&mut dsctl(&["nonsense"]), 1, "", "unrecognized subcommand");
    check(
        &mut rig.command(&["model", "list"]),
        0,
        "the model store is empty",
        "",
    );
    check(
        &mut rig.command(&["model", "list", "--json"]),
        0,
        "{\"models\":[]}\n",
        "",
    );
    check(
        &mut rig.command(&["status"]),
        1,
        "",
        "dsctl: this node only echoes",
    );
    check(
        &mut rig.command(&["status", "--json"]),
        1,
        "",
        "{\"error\":{\"kind\":\"unsupported\"",
    );
    check(&mut rig.command(&["generate", "hello"]), 0, "0:hello\n", "");
    let words = ["generate", "endless", "--timeout", "300ms"];
    check(
        &mut rig.command(&words),
        4,
        "0:endless",
        "no reply within 300 ms",
    );
    rig.cancelled
        .recv_timeout(CANCEL_DEADLINE)
        .expect("the node stopped when dsctl did");
    let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let nobody = nobody.local_addr().unwrap().to_string();
    let words = ["status", "--node", &nobody, "--timeout", "200ms"];
    check(
        &mut rig.command(&words),
        3,
        "",
        "is dsd running? start one with `dsd dev`",
    );
    let empty = tempfile::tempdir().unwrap();
    let mut without = dsctl(&["status"]);
    check(
        without.env("HOME", empty.path()),
        1,
        "",
        ".local/state/dsd/pki/ca.pem` does not exist",
    );
}

#[test]
fn ctrl_c_cancels_the_generation_on_the_node() {
    let rig = Rig::new();
    let mut command = rig.command(&["generate", "endless", "--json"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.starts_with("{\"delta\":"), "{line}");
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    rig.cancelled.recv_timeout(CANCEL_DEADLINE).unwrap();
    assert_eq!(wait(&mut child), 130);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let rig = Rig::new();
    let mut command = rig.command(&["generate", "hello"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    assert_eq!((wait(&mut child), stderr.as_str()), (0, ""));
}

#[test]
fn a_conversation_grows_until_it_is_reset() {
    let rig = Rig::new();
    let mut command = rig.command(&["chat", "--system", "S"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all(b"one\ntwo\n/what\n/reset\nthree\n/quit\nfour\n")
        .unwrap();
    drop(stdin);
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(wait(&mut child), 0);
    assert_eq!(
        text,
        "2:one\n4:two\n/what is not a command; see /help\n2:three\n"
    );
}

/// A server with one model whose answers are one word, each after a moment; it lasts as long as the test.
fn slow_http() -> SocketAddr {
    use axum::{Router, routing::get, routing::post};
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let answer = || async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let chunk = "{\"choices\":[{\"text\":\"a\"}]}";
        format!("data: {chunk}\n\ndata: [DONE]\n\n")
    };
    let list = "{\"data\":[{\"id\":\"tiny\"}]}";
    let app = Router::new()
        .route("/v1/models", get(move || async move { list }))
        .route("/v1/completions", post(answer));
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(listener, app).await.unwrap();
        });
    });
    address
}

#[test]
fn a_bench_that_a_person_watches_shows_how_far_it_is() {
    let address = slow_http();
    let words = format!("bench --http http://{address} --concurrency 1 --requests 40");
    let dsctl = env!("CARGO_BIN_EXE_dsctl");
    // Both streams of `script` are a terminal.
    let run = |words: &str| {
        let mut command = Command::new("script");
        command.args(["-qec", &format!("{dsctl} {words}"), "/dev/null"]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let seen = run(&words);
    let states = (1..40).filter(|n| seen.contains(&format!(" {n}/40 ")));
    assert!(3 <= states.count() && seen.contains("requests ["), "{seen}");
    let seen = run(&format!("{words} --json"));
    assert!(!seen.contains("/40"), "{seen}");
}
