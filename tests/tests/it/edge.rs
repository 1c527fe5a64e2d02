//! Limits of the HTTP edge under many clients at once: memory of bodies, open files, idle time, and
//! what clients see to the very end of a drain.

use std::{
    fs,
    io::{self, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    thread,
    time::{Duration, Instant},
};

use dsd_tests::{
    data,
    http::{self, Connection, Reply},
    node::{Node, NodeBuilder},
    process, tool, wait,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MIB: u64 = 1 << 20;

/// Bodies that arrive in part, and how long each would be: together many times the budget.
const N_BODIES: usize = 200;
const BODY_LEN: usize = 600_000;
const BUDGET_LEN: u64 = 8 * MIB;
/// Beyond the budget: a task and buffers of a read for each connection. A thousand of them must fit
/// into 50 MB.
const BUFFERS_MAX: u64 = N_BODIES as u64 * 50_000;
/// What a client with something short to say waits for at most, on a machine that has other work, too.
const SHORT_MAX: Duration = Duration::from_secs(10);

/// Sends heads and most of the bodies until nothing more is taken for a while.
fn send_in_part(node: &Node, fields: &str) -> Vec<TcpStream> {
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n{fields}\
         content-length: {BODY_LEN}\r\n\r\n"
    );
    let request = [head.as_bytes(), &vec![b' '; BODY_LEN - 100]].concat();
    let open = |_| {
        let stream = TcpStream::connect(node.http).unwrap();
        stream.set_nonblocking(true).unwrap();
        (stream, 0)
    };
    let mut parts: Vec<(TcpStream, usize)> = (0..N_BODIES).map(open).collect();
    let mut taken_at = Instant::now();
    while taken_at.elapsed() < Duration::from_secs(1) {
        for (stream, n_sent) in &mut parts {
            match stream.write(&request[*n_sent..]) {
                Ok(0) => {}
                Ok(n) => {
                    *n_sent += n;
                    taken_at = Instant::now();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // Answered and closed.
                Err(_) => *n_sent = request.len(),
            }
        }
    }
    parts.into_iter().map(|(stream, _)| stream).collect()
}

/// The node's own peak of memory; ranks hold no bodies.
fn peak(node: &Node) -> u64 {
    process::memory_bytes(node.pid(), "VmHWM")
}

#[test]
fn half_sent_bodies_take_no_more_than_the_budget_and_keep_nobody_waiting() {
    let node = Node::builder(&data::reference("qwen3"))
        .env("DSD_HTTP__BODY_BUDGET_BYTES", BUDGET_LEN)
        .start();
    node.must_serve();
    let before = peak(&node);
    let mut parts = send_in_part(&node, "");
    let started = Instant::now();
    node.must_serve();
    let took = started.elapsed();
    assert!(took < SHORT_MAX, "a short request took {took:?}");
    let grown = peak(&node) - before;
    assert!(
        grown < BUDGET_LEN + BUFFERS_MAX,
        "{grown} bytes for a budget of {BUDGET_LEN}"
    );
    // Without the budget or the time limit this one would wait for ever.
    let first = parts.remove(0);
    first.set_nonblocking(false).unwrap();
    let reply = Connection::over(first).reply();
    assert!(matches!(reply.status, 408 | 503), "{reply:?}");
    drop(parts);
    // Their room is given back.
    wait::until_true("room for a long body", || {
        let reply = node.post(CHAT, &Value::String("x".repeat(BODY_LEN)));
        assert!(matches!(reply.status, 400 | 503), "{reply:?}");
        reply.status == 400
    });
}

#[test]
fn without_a_key_no_body_is_held() {
    const KEY: &str = "sk-the-only-key-of-this-node";
    let folder = TempDir::new().unwrap();
    let keys = folder.path().join("keys");
    fs::write(&keys, format!("{KEY}\n")).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    let node = Node::builder(&data::reference("qwen3"))
        .env("DSD_HTTP__API_KEYS_FILE", keys.display())
        .start();
    let ask = || {
        let body = r#"{"prompt": [1, 2, 3], "max_tokens": 2}"#;
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n\
             authorization: Bearer {KEY}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let mut connection = node.connect();
        connection.send(&[head.as_bytes(), body.as_bytes()].concat());
        connection.reply()
    };
    assert_eq!(ask().status, 200);
    let before = peak(&node);
    for fields in ["", "authorization: Bearer sk-of-nobody\r\n"] {
        let parts = send_in_part(&node, fields);
        assert_eq!(ask().status, 200);
        for stream in parts {
            stream.set_nonblocking(false).unwrap();
            Connection::over(stream)
                .reply()
                .must_be_error(401, "unauthorized", None);
        }
    }
    // The budget of 256 MiB would have had room for all of them.
    let grown = peak(&node) - before;
    assert!(grown < BUFFERS_MAX, "{grown} bytes for nobody");
}

#[test]
fn idle_connections_leave_files_for_a_rank_that_comes_back() {
    const FILES_MAX: usize = 300;
    let node = Node::builder(&data::reference("deepseek_v3"))
        .open_files_max(FILES_MAX as u32)
        .env("DSD_ENGINE__TP", 2)
        .allow("fewer connections than configured")
        .allow("group lost")
        .allow("a step failed with its group")
        .allow("the canary step failed")
        .start();
    let n_places = node.records(
        "fewer connections than configured: the limit of open files leaves no room for more",
    )[0]["connections_max"]
        .as_u64()
        .unwrap();
    assert!((16..FILES_MAX as u64).contains(&n_places), "{n_places}");
    let n_files = || {
        let folder = format!("/proc/{}/fd", node.pid());
        fs::read_dir(folder).unwrap().count()
    };
    // More than there are places and files, as long as the system's queue takes them.
    let mut idle: Vec<TcpStream> = Vec::new();
    while idle.len() < FILES_MAX {
        idle.push(TcpStream::connect(node.http).unwrap());
    }
    wait::until_true("all places taken", || n_places < n_files() as u64);
    let killed = node.pids()[1];
    process::signal(killed, "KILL");
    wait::until_true("the second group", || {
        1 < node.records("group ready").len() && node.get("/ready").status == 200
    });
    node.must_serve();
    let started = Instant::now();
    assert_eq!(node.get("/health").status, 200);
    assert!(started.elapsed() < SHORT_MAX, "{:?}", started.elapsed());
    tool::dsctl_json(&node, &["status"]);
    assert!(n_files() < FILES_MAX, "none is left");
    drop(idle);
}

#[test]
fn an_idle_connection_has_a_time_of_its_own() {
    const IDLE_S: u64 = 4;
    let node = Node::builder(&data::reference("llama"))
        .env("DSD_HTTP__HEADER_TIMEOUT_S", 1)
        .env("DSD_HTTP__IDLE_TIMEOUT_S", IDLE_S)
        .start();
    let mut connection = node.connect();
    for _ in 0..2 {
        connection.send(b"GET /health HTTP/1.1\r\nhost: node\r\n\r\n");
        assert_eq!(connection.reply().status, 200);
        // Longer than a head may take.
        thread::sleep(Duration::from_millis(1500));
    }
    let started = Instant::now();
    assert!(connection.is_closed_silently());
    let idle = Duration::from_millis(1500) + started.elapsed();
    let limit = Duration::from_secs(IDLE_S);
    assert!(limit - Duration::from_millis(100) < idle, "{idle:?}");
    assert!(idle < limit + SHORT_MAX, "{idle:?}");
}

#[test]
fn a_request_with_two_hosts_is_refused() {
    let node = Node::start(&data::reference("llama"));
    for line in [
        format!("POST {COMPLETIONS} HTTP/1.1\r\ncontent-length: 0"),
        "GET /health HTTP/1.1".to_owned(),
        "GET /nowhere HTTP/1.0".to_owned(),
    ] {
        for hosts in ["Host: a\r\nHost: b", "host: node\r\nHOST: node"] {
            let mut connection = node.connect();
            connection.send(format!("{line}\r\n{hosts}\r\n\r\n").as_bytes());
            let reply = connection.reply();
            reply.must_be_error(400, "invalid_request", None);
        }
    }
    node.must_serve();
}

/// A node whose answers are longer than its drain time, three of them at once.
fn draining_soon() -> NodeBuilder {
    Node::builder(&data::smollm2())
        .env("DSD_NODE__DRAIN_TIMEOUT_S", 3)
        .env("DSD_ENGINE__RUNNING_MAX", 3)
        // However slow the machine, one more is let in to wait.
        .env("DSD_SERVICE__TTFT_TARGET_S", 3600)
        .env("DSD_HTTP__REQUEST_TIMEOUT_S", 3600)
}

fn begin(node: &Node, path: &str, body: &Value) -> Connection {
    let mut connection = node.connect();
    connection.send(&http::post_bytes(path, body.to_string().as_bytes()));
    connection
}

/// Everything that a new connection is told; `None` when there is no node any more.
fn ask_anew(node: &Node, request: &[u8]) -> Option<Reply> {
    let stream = TcpStream::connect(node.http).ok()?;
    let mut connection = Connection::over(stream);
    connection.try_send(request).ok()?;
    connection.try_reply()
}

#[test]
fn what_still_runs_at_the_end_of_the_drain_is_ended_in_form_and_probes_are_answered_until_then() {
    let mut node = draining_soon().start();
    let long = |stream: bool| json!({"prompt": [1, 2, 3], "max_tokens": 3000, "ignore_eos": true, "stream": stream});
    let messages = json!({
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3000, "ignore_eos": true,
        "stream": true,
    });
    let mut running = [
        begin(&node, COMPLETIONS, &long(true)),
        begin(&node, CHAT, &messages),
    ];
    for stream in &mut running {
        assert_eq!(stream.head().status, 200);
        assert!(stream.chunk().unwrap().is_some());
    }
    let mut whole = begin(&node, COMPLETIONS, &long(false));
    wait::until_true("all run", || node.model_status()["n_running"] == 3);
    let mut waiting = begin(&node, COMPLETIONS, &long(true));
    assert_eq!(waiting.head().status, 200);

    node.terminate();
    wait::until_true("draining", || node.get("/ready").status == 503);
    let started = Instant::now();
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: node\r\n\r\n").into_bytes();
    let (ready, health, models) = (get("/ready"), get("/health"), get("/v1/models"));
    let mut probed_until = Duration::ZERO;
    while let Some(reply) = ask_anew(&node, &ready) {
        reply.must_be_error(503, "shutting_down", None);
        assert!(reply.body.contains("draining"), "{reply:?}");
        probed_until = started.elapsed();
        if let Some(reply) = ask_anew(&node, &health) {
            assert_eq!(reply.status, 200, "{reply:?}");
        }
        let short = json!({"prompt": [1], "max_tokens": 1}).to_string();
        for request in [&http::post_bytes(COMPLETIONS, short.as_bytes()), &models] {
            if let Some(reply) = ask_anew(&node, request) {
                reply.must_be_error(503, "shutting_down", None);
                assert!(reply.header("retry-after").is_some(), "{reply:?}");
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert!(
        Duration::from_secs(2) < probed_until,
        "no answer after {probed_until:?} of a drain of 3 s"
    );
    let [first, second] = &mut running;
    for stream in [first, second, &mut waiting] {
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.chunk().unwrap() {
            bytes.extend(chunk);
        }
        let text = String::from_utf8(bytes).unwrap();
        let mut events = text.trim_end().rsplit("\n\n");
        assert_eq!(events.next(), Some("data: [DONE]"), "{text}");
        let last: Value =
            serde_json::from_str(events.next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        let reason = &last["choices"][0]["finish_reason"];
        assert_eq!(reason, "insufficient_system_resource", "{text}");
    }
    let reply = whole.reply();
    assert_eq!(reply.status, 200, "{reply:?}");
    let answer = reply.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "insufficient_system_resource");
    assert!(!choice["text"].as_str().unwrap().is_empty(), "{answer}");
    assert!(0 < answer["usage"]["completion_tokens"].as_u64().unwrap());
    assert_eq!(node.exit().code(), Some(0));
    let took = started.elapsed();
    assert!(took < Duration::from_secs(15), "took {took:?}");
}
