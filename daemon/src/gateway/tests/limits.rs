//! Slow clients, gone clients, full queues, deadlines, shutdown.

use std::time::Duration;

use tokio::time;

use super::kit::{BOMB, Client, Node, Pace, QUICK, config, model};
use crate::gateway::GatewayConfig;

const SLOW: Pace = Pace {
    step: Duration::from_millis(20),
    ..QUICK
};
const POST: &str =
    "POST /v1/completions HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n";

/// A request on a connection of its own, of which nothing is read yet.
async fn send(node: &Node, body: &str) -> Client {
    let mut client = Client::connect(node.addr).await;
    client
        .send(
            format!(
                "{POST}content-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
        .await;
    client
}

#[tokio::test]
async fn a_head_that_does_not_arrive_is_answered_with_408_and_silence_with_nothing() {
    let node = Node::start(
        GatewayConfig {
            header_timeout: Duration::from_millis(100),
            idle_timeout: Duration::from_millis(100),
            ..config()
        },
        vec![model("tiny", &QUICK)],
    )
    .await;
    let mut silent = Client::connect(node.addr).await;
    assert_eq!(silent.read_to_end().await, b"");
    let mut idle = Client::connect(node.addr).await;
    idle.send(b"GET /health HTTP/1.1\r\nhost: node\r\n\r\n")
        .await;
    idle.read_until("alive").await;
    assert_eq!(idle.read_to_end().await, b"");
    for start in [&b"P"[..], b"POST /v1/completions HTTP/1.1\r\nhost: no"] {
        let mut client = Client::connect(node.addr).await;
        client.send(start).await;
        let expected = (408, "request_timeout".into(), None);
        assert_eq!(client.reply().await.error(), expected);
    }
    node.must_serve().await;
}

/// Heads and idle connections used to share one limit, shorter than what proxies keep connections
/// for.
#[tokio::test]
async fn an_idle_connection_outlives_a_slow_head() {
    let limits = GatewayConfig {
        header_timeout: Duration::from_millis(150),
        idle_timeout: Duration::from_millis(900),
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &SLOW)]).await;
    let request = b"GET /health HTTP/1.1\r\nhost: node\r\n\r\n";
    let mut idle = Client::connect(node.addr).await;
    for _ in 0..3 {
        // Longer than a head may take, also before the first request.
        time::sleep(Duration::from_millis(300)).await;
        idle.send(request).await;
        idle.read_until("alive").await;
    }
    let start = time::Instant::now();
    assert_eq!(idle.read_to_end().await, b"");
    assert!(
        Duration::from_millis(700) < start.elapsed(),
        "{:?}",
        start.elapsed()
    );
    // Late in its idle time a head still has all of its own.
    let mut late = Client::connect(node.addr).await;
    time::sleep(Duration::from_millis(800)).await;
    late.send(&request[..10]).await;
    let start = time::Instant::now();
    let expected = (408, "request_timeout".into(), None);
    assert_eq!(late.reply().await.error(), expected);
    assert!(
        Duration::from_millis(140) < start.elapsed(),
        "{:?}",
        start.elapsed()
    );
    // An answer takes as long as it takes.
    let body = r#"{"prompt": "a", "max_tokens": 100, "stream": true, "ignore_eos": true}"#;
    send(&node, body).await.read_until("[DONE]").await;
}

/// The first `n_sent` bytes of bodies of `len` bytes, each on a connection of its own.
async fn part_bodies<const N: usize>(node: &Node, len: usize, n_sent: usize) -> [Client; N] {
    let mut clients = Vec::new();
    for _ in 0..N {
        let mut client = Client::connect(node.addr).await;
        let head = format!("{POST}content-length: {len}\r\n\r\n");
        client.send(head.as_bytes()).await;
        client.send(&vec![b' '; n_sent]).await;
        clients.push(client);
    }
    let Ok(clients) = clients.try_into() else {
        panic!("as many as were asked for");
    };
    clients
}

#[tokio::test]
async fn bodies_that_stand_still_make_room_for_others_and_short_ones_always_pass() {
    const LEN: usize = 100 * 1024;
    let limits = GatewayConfig {
        body_len_max: 128 * 1024,
        body_budget_len: 200 * 1024,
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &QUICK)]).await;
    let [mut first, mut second, mut third] = part_bodies(&node, LEN, LEN - 1).await;
    // The third one waits behind the first two; short requests do not.
    let start = time::Instant::now();
    node.must_serve().await;
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let reply = first.reply().await;
    assert_eq!(reply.error(), (408, "request_timeout".into(), None));
    assert!(reply.body.contains("while others waited"), "{reply:?}");
    // Nobody waits any more, so the others may take their time.
    time::sleep(Duration::from_millis(2500)).await;
    for client in [&mut second, &mut third] {
        client.send(b"x").await;
        let answer = client.read_until("invalid_json").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
}

/// Each would wait for the room that the other one holds.
#[tokio::test]
async fn of_bodies_that_all_wait_for_room_the_youngest_is_sent_away() {
    const LEN: usize = 128 * 1024;
    const HALF: usize = 64 * 1024;
    let limits = GatewayConfig {
        body_len_max: LEN,
        body_budget_len: LEN,
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &QUICK)]).await;
    // They take the whole budget.
    let [mut older, mut younger] = part_bodies(&node, LEN, HALF).await;
    time::sleep(Duration::from_millis(300)).await;
    for client in [&mut younger, &mut older] {
        client.send(&[b' '; LEN - HALF]).await;
    }
    let reply = younger.reply().await;
    assert_eq!(reply.error(), (503, "body_budget_full".into(), None));
    assert_eq!(reply.header("retry-after"), Some("5"));
    let answer = older.read_until("invalid_json").await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    node.must_serve().await;
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_answered_with_408() {
    let node = Node::start(
        GatewayConfig {
            body_timeout: Duration::from_millis(100),
            ..config()
        },
        vec![model("tiny", &QUICK)],
    )
    .await;
    let mut client = Client::connect(node.addr).await;
    client
        .send(format!("{POST}content-length: 100\r\n\r\n{{\"prompt").as_bytes())
        .await;
    assert_eq!(
        client.reply().await.error(),
        (408, "request_timeout".into(), None)
    );
    // A byte now and then does not buy time.
    let mut client = Client::connect(node.addr).await;
    client
        .send(format!("{POST}content-length: 100\r\n\r\n").as_bytes())
        .await;
    for _ in 0..10 {
        client.try_send(b" ").await;
        time::sleep(Duration::from_millis(20)).await;
    }
    client.read_until("408").await;
    node.must_serve().await;
}

#[tokio::test]
async fn slow_clients_do_not_keep_others_out() {
    let limits = GatewayConfig {
        connections_max: 4,
        header_timeout: Duration::from_millis(200),
        idle_timeout: Duration::from_millis(200),
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &QUICK)]).await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        idle.push(Client::connect(node.addr).await);
    }
    // Waits in the backlog until the idle ones are thrown out.
    node.must_serve().await;
}

#[tokio::test]
async fn one_client_cannot_hold_every_place() {
    let limits = GatewayConfig {
        connections_max: 4,
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &QUICK)]).await;
    let mut idle = Vec::new();
    // All regular places, and more than the hurried ones.
    for _ in 0..4 + 20 {
        idle.push(Client::connect(node.addr).await);
    }
    let start = time::Instant::now();
    let reply = node.get("/health").await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(reply.header("connection"), Some("close"), "{reply:?}");
    node.must_serve().await;
    drop(idle);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_sequence() {
    let node = Node::start(config(), vec![model("tiny", &SLOW)]).await;
    for stream in ["true", "false"] {
        let body = format!(r#"{{"prompt": "a", "max_tokens": 200, "n": 2, "stream": {stream}}}"#);
        let mut client = send(&node, &body).await;
        node.wait_for_sequences(2).await;
        if stream == "true" {
            client.read_until("data: ").await;
        }
        drop(client);
        // Well before the 4 s that 200 steps would take.
        let start = time::Instant::now();
        node.wait_for_sequences(0).await;
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "stream {stream}: {:?}",
            start.elapsed()
        );
    }
    node.must_serve().await;
}

#[tokio::test]
async fn silence_is_filled_with_comments_from_the_first_moment() {
    let pace = Pace {
        step: Duration::from_millis(300),
        ..SLOW
    };
    let node = Node::start(
        GatewayConfig {
            keep_alive: Duration::from_millis(50),
            ..config()
        },
        vec![model("tiny", &pace)],
    )
    .await;
    let mut client = send(&node, r#"{"prompt": "a", "max_tokens": 2, "stream": true}"#).await;
    let text = client.read_until("[DONE]").await;
    let (before, after) = text.split_once("data: ").unwrap();
    assert!(before.starts_with("HTTP/1.1 200"), "{text}");
    assert!(2 <= before.matches(": keep-alive\n\n").count(), "{text}");
    assert!(2 <= after.matches(": keep-alive\n\n").count(), "{text}");
}

#[tokio::test]
async fn a_full_queue_is_answered_with_429_and_when_to_come_back() {
    let pace = Pace {
        running_max: 2,
        waiting_max: 1,
        ..SLOW
    };
    let node = Node::start(config(), vec![model("tiny", &pace)]).await;
    // More requests than can run and wait at once.
    let body = r#"{"prompt": "a", "max_tokens": 100}"#;
    let mut clients = Vec::new();
    for _ in 0..12 {
        clients.push(send(&node, body).await);
    }
    let mut n_refused = 0;
    let mut refused_whole = false;
    for mut client in clients {
        if let Ok(reply) = time::timeout(Duration::from_millis(300), client.reply()).await {
            assert_eq!(reply.error(), (429, "queue_full".into(), None));
            let retry_after: u64 = reply.header("retry-after").unwrap().parse().unwrap();
            assert!(1 <= retry_after);
            n_refused += 1;
            refused_whole = true;
        }
    }
    assert!(refused_whole && 1 <= n_refused);
    node.wait_for_sequences(0).await;
    node.must_serve().await;
}

#[tokio::test]
async fn a_deadline_ends_an_answer_with_what_it_has() {
    let limits = GatewayConfig {
        request_timeout: Duration::from_millis(150),
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &SLOW)]).await;
    let reply = node
        .post("/v1/completions", r#"{"prompt": "a", "max_tokens": 200}"#)
        .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(
        reply
            .body
            .contains(r#""finish_reason":"deadline_exceeded""#)
    );
    let stream = r#"{"prompt": "a", "max_tokens": 200, "stream": true}"#;
    let reply = node.post("/v1/completions", stream).await;
    assert_eq!(reply.status, 200);
    let ends_well = reply.body.trim_end().ends_with("data: [DONE]");
    assert!(
        ends_well
            && reply
                .body
                .contains(r#""finish_reason":"deadline_exceeded""#),
        "{}",
        reply.body
    );
    node.wait_for_sequences(0).await;
}

#[tokio::test]
async fn a_draining_node_says_so_refuses_generations_and_lets_answers_finish() {
    let mut node = Node::start(config(), vec![model("tiny", &SLOW)]).await;
    let mut idle = Client::connect(node.addr).await;
    let mut uploading = Client::connect(node.addr).await;
    uploading
        .send(format!("{POST}content-length: 100\r\n\r\n{{").as_bytes())
        .await;
    let body = r#"{"prompt": "a", "max_tokens": 100, "stream": true, "ignore_eos": true}"#;
    let mut client = send(&node, body).await;
    client.read_until("data: ").await;
    node.stop.draining.cancel();
    let refused = (503, "shutting_down".into(), None);
    let reply = node.get("/ready").await;
    assert_eq!(reply.error(), refused);
    assert!(reply.body.contains("draining"), "{}", reply.body);
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/models"] {
        let reply = node.post(path, r#"{"prompt": "a"}"#).await;
        assert_eq!(reply.error(), refused);
        assert_eq!(reply.header("retry-after"), Some("5"));
        assert_eq!(reply.header("connection"), Some("close"));
    }
    // One whose body was on its way, and a connection that was open already.
    assert_eq!(uploading.reply().await.error(), refused);
    idle.send(b"GET /health HTTP/1.1\r\nhost: node\r\n\r\n")
        .await;
    let reply = idle.reply().await;
    assert_eq!(
        (reply.status, reply.header("connection")),
        (200, Some("close"))
    );
    // Nothing of this has touched what runs.
    client.read_until("[DONE]").await;
    let mut late = Client::connect(node.addr).await;
    node.stop.closing.cancel();
    assert!(late.is_closed().await);
    time::timeout(super::kit::PATIENCE, node.tasks.join_next())
        .await
        .expect("serving goes on")
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn closing_cuts_off_what_does_not_end() {
    let limits = GatewayConfig {
        flush_timeout: Duration::from_millis(800),
        ..config()
    };
    let mut node = Node::start(limits, vec![model("tiny", &SLOW)]).await;
    let mut client = send(
        &node,
        r#"{"prompt": "a", "max_tokens": 200, "stream": true}"#,
    )
    .await;
    client.read_until("data: ").await;
    node.stop.draining.cancel();
    node.stop.closing.cancel();
    // While the rest is sent, a load balancer must not find a closed port.
    time::sleep(Duration::from_millis(50)).await;
    assert_eq!(node.get("/health").await.status, 200);
    let reply = node.get("/ready").await;
    assert!(reply.body.contains("draining"), "{}", reply.body);
    time::timeout(super::kit::PATIENCE, node.tasks.join_next())
        .await
        .expect("serving goes on")
        .unwrap()
        .unwrap();
    node.wait_for_sequences(0).await;
}

#[tokio::test]
async fn a_failing_model_is_500_before_and_an_error_event_after_the_first_byte() {
    let node = Node::quick().await;
    let poison = super::kit::POISON;
    let reply = node
        .post(
            "/v1/completions",
            &format!(r#"{{"prompt": [97, {poison}]}}"#),
        )
        .await;
    assert_eq!(reply.error(), (500, "internal".into(), None));
    let reply = node
        .post(
            "/v1/completions",
            &format!(r#"{{"prompt": [97, {poison}], "stream": true}}"#),
        )
        .await;
    assert_eq!(reply.status, 200);
    assert!(
        reply.body.contains("\"code\":\"internal\"") && !reply.body.contains("[DONE]"),
        "{}",
        reply.body
    );
    node.must_serve().await;
}

#[tokio::test]
async fn an_unloaded_model_ends_streams_honestly_and_is_unknown_after() {
    let node = Node::start(config(), vec![model("tiny", &SLOW)]).await;
    let mut client = send(
        &node,
        r#"{"prompt": "a", "max_tokens": 200, "stream": true}"#,
    )
    .await;
    client.read_until("data: ").await;
    let whole = send(&node, r#"{"prompt": "a", "max_tokens": 200}"#).await;
    node.wait_for_sequences(2).await;
    let catalog = std::sync::Arc::clone(&node.catalog);
    let unload =
        tokio::task::spawn_blocking(move || catalog.unload("tiny", Duration::from_millis(50)));
    let text = client.read_until("[DONE]").await;
    assert!(
        text.contains(r#""finish_reason":"insufficient_system_resource""#),
        "{text}"
    );
    let mut whole = whole;
    let reply = whole.reply().await;
    assert_eq!(reply.status, 200, "what it has is an answer");
    assert!(
        reply
            .body
            .contains(r#""finish_reason":"insufficient_system_resource""#)
    );
    assert_eq!(unload.await.unwrap().unwrap(), 2);
    let reply = node
        .post("/v1/completions", r#"{"prompt": "a", "model": "tiny"}"#)
        .await;
    assert_eq!(
        reply.error(),
        (404, "model_not_found".into(), Some("model".into()))
    );
}

#[tokio::test]
async fn choices_that_do_not_all_fit_are_refused_together() {
    let pace = Pace {
        running_max: 1,
        waiting_max: 2,
        ..QUICK
    };
    let node = Node::start(config(), vec![model("tiny", &pace)]).await;
    // An idle node takes as many choices as a request may have.
    let many = r#"{"prompt": "a", "max_tokens": 20, "n": 50}"#;
    assert_eq!(node.post("/v1/completions", many).await.status, 200);
    let pace = Pace {
        running_max: 1,
        waiting_max: 2,
        ..SLOW
    };
    let node = Node::start(config(), vec![model("tiny", &pace)]).await;
    let body = r#"{"prompt": "a", "max_tokens": 200, "ignore_eos": true}"#;
    let others = [send(&node, body).await, send(&node, body).await];
    node.wait_for_sequences(2).await;
    let reply = node.post("/v1/completions", many).await;
    assert_eq!(reply.error(), (429, "queue_full".into(), None));
    drop(others);
    node.wait_for_sequences(0).await;
}

/// An engine's thread that panicked used to leave a node that took requests and said little: 503 and
/// the reason are due at once, on every route that depends on the engine.
#[tokio::test]
async fn a_broken_engine_is_503_at_once_and_readiness_says_why() {
    let node = Node::quick().await;
    // Some wait in the engine when it breaks: their places must not make it look merely full.
    let mut clients = Vec::new();
    for _ in 0..20 {
        let body = r#"{"prompt": "a", "max_tokens": 200, "ignore_eos": true}"#;
        clients.push(send(&node, body).await);
    }
    let reply = node
        .post("/v1/completions", &format!(r#"{{"prompt": [{BOMB}]}}"#))
        .await;
    assert_eq!(reply.error(), (500, "internal".into(), None));
    for stream in [false, true] {
        let body = format!(r#"{{"prompt": "a", "stream": {stream}}}"#);
        let reply = node.post("/v1/completions", &body).await;
        assert_eq!(reply.error(), (503, "not_ready".into(), None));
        assert_eq!(reply.header("retry-after"), Some("5"));
    }
    let reply = node.get("/ready").await;
    assert_eq!(reply.error(), (503, "not_ready".into(), None));
    assert!(
        reply.body.contains("`tiny` has broken down"),
        "{}",
        reply.body
    );
    assert_eq!(node.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_model_that_is_silent_for_long_takes_no_requests() {
    let config = GatewayConfig {
        token_age_max: Duration::from_millis(5),
        ..config()
    };
    let node = Node::start(config, vec![model("tiny", &QUICK)]).await;
    // The canary comes after three seconds of silence only, so this one is silent for long.
    time::sleep(Duration::from_millis(100)).await;
    let reply = node.post("/v1/completions", r#"{"prompt": "a"}"#).await;
    assert_eq!(reply.error(), (503, "not_ready".into(), None));
    assert_eq!(reply.header("retry-after"), Some("5"));
}
