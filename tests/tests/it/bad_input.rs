//! Hostile and broken clients over HTTP: each gets a named error or a closed connection, and the
//! node goes on serving.

use std::time::{Duration, Instant};

use dsd_tests::{
    data,
    http::{self, Reply},
    node::Node,
    wait,
};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MIB: u64 = 1 << 20;

fn node() -> Node {
    Node::start(&data::reference("qwen3"))
}

fn post(node: &Node, path: &str, body: &[u8]) -> Reply {
    let mut connection = node.connect();
    connection.send(&http::post_bytes(path, body));
    connection.reply()
}

#[test]
fn bodies_that_are_no_requests_are_refused_with_code_and_field() {
    let node = node();
    let check = |path: &str, body: &str, code: &str, param: Option<&str>| {
        let status = if code == "model_not_found" { 404 } else { 400 };
        post(&node, path, body.as_bytes()).must_be_error(status, code, param);
        node.must_serve();
    };
    for body in [
        "",
        "{",
        "[]",
        "nonsense",
        "{\"messages\": [}",
        "\"\"",
        "{\"messages\"",
        "1",
    ] {
        check(CHAT, body, "invalid_json", None);
    }
    // Deep nesting must not exhaust the stack.
    check(CHAT, &"[".repeat(100_000), "invalid_json", None);
    let hi = r#""messages": [{"role": "user", "content": "hi"}]"#;
    let with = |field: &str| format!("{{{hi}, {field}}}");
    check(CHAT, "{}", "invalid_request", Some("messages"));
    check(
        CHAT,
        r#"{"messages": []}"#,
        "invalid_request",
        Some("messages"),
    );
    check(
        CHAT,
        r#"{"messages": "hi"}"#,
        "invalid_request",
        Some("messages"),
    );
    check(
        CHAT,
        r#"{"messages": [{"role": "user"}]}"#,
        "invalid_request",
        Some("messages[0].content"),
    );
    check(
        CHAT,
        r#"{"messages": [{"content": "x"}]}"#,
        "invalid_request",
        Some("messages[0].role"),
    );
    check(
        CHAT,
        r#"{"messages": [7]}"#,
        "invalid_request",
        Some("messages[0]"),
    );
    check(
        CHAT,
        &with(r#""model": "gpt-4o""#),
        "model_not_found",
        Some("model"),
    );
    check(
        CHAT,
        &with(r#""model": 7"#),
        "invalid_request",
        Some("model"),
    );
    for (param, value) in [
        ("temperature", "\"hot\""),
        ("temperature", "-1"),
        ("top_p", "1.5"),
        ("max_tokens", "0"),
        ("max_tokens", "-5"),
        ("max_tokens", "1.5"),
        ("n", "0"),
        ("n", "1000000000"),
        ("stream", "\"yes\""),
        ("stop", "7"),
        ("seed", "\"seven\""),
        ("top_logprobs", "2000"),
        ("logit_bias", "[]"),
        ("presence_penalty", "3"),
    ] {
        let body = with(&format!("\"{param}\": {value}"));
        let reply = post(&node, CHAT, body.as_bytes());
        reply.must_be_error(400, "invalid_request", Some(param));
    }
    check(COMPLETIONS, "{}", "invalid_request", Some("prompt"));
    check(
        COMPLETIONS,
        r#"{"prompt": 7}"#,
        "invalid_request",
        Some("prompt"),
    );
    check(
        COMPLETIONS,
        r#"{"prompt": []}"#,
        "invalid_request",
        Some("prompt"),
    );
    check(
        COMPLETIONS,
        r#"{"prompt": [4000000000]}"#,
        "invalid_request",
        Some("prompt"),
    );
    check(
        COMPLETIONS,
        r#"{"prompt": [-1]}"#,
        "invalid_request",
        Some("prompt[0]"),
    );
}

#[test]
fn text_that_is_no_utf8_is_refused() {
    let node = node();
    for text in [&b"\xff\xfe"[..], b"\xc3", b"\xed\xa0\x80"] {
        let body = [
            br#"{"messages": [{"role": "user", "content": ""#,
            text,
            br#""}]}"#,
        ]
        .concat();
        post(&node, CHAT, &body).must_be_error(400, "invalid_json", None);
    }
    let lone_surrogate = br#"{"messages": [{"role": "user", "content": "\ud800"}]}"#;
    post(&node, CHAT, lone_surrogate).must_be_error(400, "invalid_json", None);
    node.must_serve();
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_the_numbers() {
    let node = node();
    let context_len = node.model_status()["context_len"].as_u64().unwrap();
    let ids = vec![5; usize::try_from(context_len).unwrap() + 1];
    let reply = node.post(COMPLETIONS, &json!({"prompt": ids, "max_tokens": 1}));
    reply.must_be_error(400, "context_length_exceeded", Some("prompt"));
    assert!(reply.body.contains(&ids.len().to_string()), "{reply:?}");
    let long = "word ".repeat(20_000);
    let reply = node.post(
        CHAT,
        &json!({"messages": [{"role": "user", "content": long}]}),
    );
    reply.must_be_error(400, "context_length_exceeded", Some("messages"));
    node.must_serve();
}

/// Sends a body of `len` bytes in pieces until it is answered; returns the answer and the bytes sent.
fn flood(node: &Node, head: &str, wrap: impl Fn(&[u8]) -> Vec<u8>, len: usize) -> (Reply, usize) {
    let mut connection = node.connect();
    connection.send(head.as_bytes());
    let piece = wrap(&vec![b' '; 64 * 1024]);
    let mut n_sent = 0;
    while n_sent < len && connection.try_send(&piece).is_ok() {
        n_sent += 64 * 1024;
    }
    (connection.reply(), n_sent)
}

#[test]
fn bodies_of_100_megabytes_are_refused_without_being_kept() {
    const LEN: usize = 100 << 20;
    let node = node();
    node.must_serve();
    let before = node.memory_bytes("VmHWM");
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n");
    let announced = format!("{head}content-length: {LEN}\r\n\r\n");

    // The answer comes before the body does.
    let mut connection = node.connect();
    connection.send(announced.as_bytes());
    let head_of_answer = connection.head();
    assert_eq!(head_of_answer.status, 413);
    assert_eq!(head_of_answer.header("connection"), Some("close"));
    drop(connection);

    let (reply, _) = flood(&node, &announced, <[u8]>::to_vec, LEN);
    reply.must_be_error(413, "payload_too_large", None);
    let chunk =
        |piece: &[u8]| [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n");
    let (reply, _) = flood(&node, &chunked, chunk, LEN);
    reply.must_be_error(413, "payload_too_large", None);

    let grown = node.memory_bytes("VmHWM").saturating_sub(before);
    assert!(
        grown < 24 * MIB,
        "grew by {grown} bytes, the limit of a body is 4 MiB"
    );
    node.must_serve();
}

#[test]
fn slow_clients_are_cut_off_and_keep_nobody_out() {
    let node = Node::builder(&data::reference("qwen3"))
        .env("DSD_HTTP__HEADER_TIMEOUT_S", 1)
        .env("DSD_HTTP__BODY_TIMEOUT_S", 1)
        .env("DSD_HTTP__IDLE_TIMEOUT_S", 1)
        .start();
    let started = Instant::now();
    let mut silent: Vec<_> = (0..20).map(|_| node.connect()).collect();
    let mut half_heads: Vec<_> = (0..20).map(|_| node.connect()).collect();
    for connection in &mut half_heads {
        connection.send(b"POST /v1/completions HTTP/1.1\r\nhost: ");
    }
    let mut half_bodies: Vec<_> = (0..20).map(|_| node.connect()).collect();
    for connection in &mut half_bodies {
        let request = http::post_bytes(COMPLETIONS, br#"{"prompt": [1, 2]}"#);
        connection.send(&request[..request.len() - 3]);
    }
    node.must_serve();
    // One byte at a time does not win more time.
    let mut trickle = node.connect();
    let mut n_sent = 0;
    let cut = wait::until_or(Duration::from_secs(20), || {
        n_sent += 1;
        trickle.try_send(b"G").is_err().then_some(())
    });
    assert!(
        cut.is_some(),
        "a head of single bytes is still being read after {n_sent} of them"
    );
    for connection in &mut silent {
        assert!(connection.is_closed_silently());
    }
    for connection in half_heads.iter_mut().chain(&mut half_bodies) {
        connection
            .reply()
            .must_be_error(408, "request_timeout", None);
    }
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "limits of 1 s took {:?}",
        started.elapsed()
    );
    node.must_serve();
}

#[test]
fn truncated_requests_and_garbage_do_no_harm() {
    let node = node();
    let request = http::post_bytes(COMPLETIONS, br#"{"prompt": [1, 2], "max_tokens": 1}"#);
    for len in (0..request.len()).step_by(7) {
        let mut connection = node.connect();
        connection.send(&request[..len]);
        connection.finish_sending();
        if let Some(head) = connection.try_head() {
            assert!((400..500).contains(&head.status), "cut at {len}: {head:?}");
        }
    }
    node.must_serve();
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
    ] {
        let mut connection = node.connect();
        connection.send(garbage);
        connection.finish_sending();
        if let Some(head) = connection.try_head() {
            assert!((400..600).contains(&head.status), "{garbage:?}: {head:?}");
        }
    }
    node.must_serve();
    let mut connection = node.connect();
    let chunked = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n"
    );
    connection.send(chunked.as_bytes());
    connection
        .reply()
        .must_be_error(400, "invalid_request", None);
    node.must_serve();
}

#[test]
fn garbage_behind_a_good_request_does_not_spoil_its_answer() {
    let node = node();
    let request = http::post_bytes(
        COMPLETIONS,
        br#"{"prompt": [1, 2], "max_tokens": 2, "ignore_eos": true}"#,
    );
    let mut connection = node.connect();
    connection.send(&[&request[..], &request[..], b"\x00\x01garbage\r\n\r\n"].concat());
    for _ in 0..2 {
        let reply = connection.reply();
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.json()["usage"]["completion_tokens"], 2);
    }
    if let Some(head) = connection.try_head() {
        assert_eq!(head.status, 400);
    }
    node.must_serve();
}

#[test]
fn unknown_routes_and_methods_and_huge_heads_are_refused() {
    let node = node();
    node.get("/v2/nothing")
        .must_be_error(404, "not_found", None);
    node.get("/v1/models/absent")
        .must_be_error(404, "model_not_found", Some("model"));
    node.get("/%ff%fe").must_be_error(404, "not_found", None);
    node.get("/v1/models/%ff")
        .must_be_error(404, "model_not_found", None);
    let reply = node.get(CHAT);
    reply.must_be_error(405, "method_not_allowed", None);
    assert_eq!(reply.header("allow"), Some("POST"));
    let mut connection = node.connect();
    connection.send(b"BREW /v1/models HTTP/1.1\r\nhost: node\r\n\r\n");
    connection
        .reply()
        .must_be_error(405, "method_not_allowed", None);
    let mut connection = node.connect();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: node\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{{}}"
    );
    connection.send(head.as_bytes());
    connection
        .reply()
        .must_be_error(415, "unsupported_media_type", None);
    for head in [
        format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)),
        format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(1 << 20)),
        format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(10_000)),
    ] {
        let mut connection = node.connect();
        // The node may close while the rest is on its way.
        let _ = connection.try_send(head.as_bytes());
        if let Some(head) = connection.try_head() {
            assert!(matches!(head.status, 414 | 431), "{head:?}");
        }
    }
    node.must_serve();
}
