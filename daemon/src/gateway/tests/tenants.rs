//! Keys, caps, allowed models, users and deadlines at the HTTP edge.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use tokio::time;

use super::kit::{Client, Node, Pace, QUICK, Reply, config, model};
use crate::{
    gateway::GatewayConfig,
    runtime::clock,
    tenants::{KeyDigest, Now, Source, Tenants},
};

const SLOW: Pace = Pace {
    step: Duration::from_millis(20),
    ..QUICK
};
const ASK: &str =
    r#"{"model": "tiny", "prompt": "ab", "max_tokens": 4, "temperature": 0, "ignore_eos": true}"#;

/// Tenants `a` and so on, each with these further lines; its key is `sk-key-of-tenant-a`.
fn tenants(lines: &[(&str, &str)]) -> Tenants {
    let mut text = String::from("version = 1\n");
    for (name, lines) in lines {
        let digest = KeyDigest::of(&key(name));
        text += &format!("[[tenants]]\nname = {name:?}\nkey_digests = [\"{digest}\"]\n{lines}\n");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
    Tenants::read(Source::File(file.path().to_owned()), Now::read()).unwrap()
}

fn key(name: &str) -> String {
    format!("sk-key-of-tenant-{name}")
}

fn headers(name: &str) -> String {
    format!(
        "content-type: application/json\r\nauthorization: Bearer {}\r\n",
        key(name)
    )
}

async fn ask(node: &Node, name: &str, body: &str) -> Reply {
    node.post_with("/v1/completions", &headers(name), body.as_bytes())
        .await
}

/// Sends a request and reads nothing yet.
async fn send(node: &Node, name: &str, body: &str) -> Client {
    let mut client = Client::connect(node.addr).await;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: node\r\n{}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        headers(name),
        body.len()
    );
    client.send(head.as_bytes()).await;
    client
}

fn retry_after(reply: &Reply) -> u64 {
    reply.header("retry-after").unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_minutes_requests_are_let_in_and_the_next_one_is_told_when() {
    let caps = "caps = { requests_per_minute = 2 }";
    let tenants = tenants(&[("a", caps), ("b", "")]);
    let node = Node::start_with_tenants(config(), tenants, vec![model("tiny", &QUICK)]).await;
    for _ in 0..2 {
        assert_eq!(ask(&node, "a", ASK).await.status, 200);
    }
    let refused = ask(&node, "a", ASK).await;
    assert_eq!(refused.error(), (429, "rate_limited".into(), None));
    assert!((28..=30).contains(&retry_after(&refused)), "{refused:?}");
    // Later than the one before: both cannot have the same place.
    let refused = ask(&node, "a", ASK).await;
    assert!((58..=60).contains(&retry_after(&refused)), "{refused:?}");
    assert_eq!(ask(&node, "b", ASK).await.status, 200);
    let metrics = node.get("/metrics").await.body;
    let counted = r#"dsd_tenant_refusals_total{tenant="a",reason="requests"} "#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn the_balance_is_what_is_left_of_the_cap_on_tokens() {
    let tenants = tenants(&[("a", "caps = { tokens_per_minute = 40 }"), ("b", "")]);
    let node = Node::start_with_tenants(config(), tenants, vec![model("tiny", &QUICK)]).await;
    let balance = async |name: &str| {
        let mut client = Client::connect(node.addr).await;
        let head = format!(
            "GET /user/balance HTTP/1.1\r\nhost: node\r\n{}connection: close\r\n\r\n",
            headers(name)
        );
        client.send(head.as_bytes()).await;
        client.reply().await.json()
    };
    let tokens = |n: &str| serde_json::json!([{"currency": "TOKENS", "total_balance": n, "granted_balance": n, "topped_up_balance": "0"}]);
    let full = serde_json::json!({"is_available": true, "balance_infos": tokens("40")});
    assert_eq!(balance("a").await, full);
    let uncapped = serde_json::json!({"is_available": true, "balance_infos": []});
    assert_eq!(balance("b").await, uncapped);
    let long = r#"{"prompt": "ab", "max_tokens": 38, "ignore_eos": true}"#;
    assert_eq!(ask(&node, "a", long).await.status, 200);
    let found = balance("a").await;
    // Time gives some of it back.
    let left = found["balance_infos"][0]["total_balance"].as_str().unwrap();
    let left: u64 = left.parse().unwrap();
    assert!(left < 30, "{found}");
    assert_eq!(found["is_available"], 0 < left, "{found}");
    assert_eq!(node.get("/user/balance").await.status, 401);
}

#[tokio::test]
async fn every_choice_counts_against_the_concurrency_and_leaves_with_its_end() {
    let tenants = tenants(&[("a", "caps = { concurrency = 2 }")]);
    let node = Node::start_with_tenants(config(), tenants, vec![model("tiny", &SLOW)]).await;
    let long = r#"{"prompt": "ab", "max_tokens": 200, "n": 2, "ignore_eos": true, "stream": true}"#;
    let mut client = send(&node, "a", long).await;
    client.read_until("data: ").await;
    let refused = ask(&node, "a", ASK).await;
    assert_eq!(refused.error(), (429, "rate_limited".into(), None));
    assert!(1 <= retry_after(&refused), "{refused:?}");
    // A client that leaves frees its places.
    drop(client);
    let freed = async {
        while ask(&node, "a", ASK).await.status != 200 {
            time::sleep(Duration::from_millis(10)).await;
        }
    };
    time::timeout(Duration::from_secs(10), freed).await.unwrap();
    // One after the other, each as soon as the last answer is there.
    for _ in 0..5 {
        assert_eq!(ask(&node, "a", ASK).await.status, 200);
        let stream = r#"{"prompt": "ab", "max_tokens": 2, "n": 2, "stream": true}"#;
        assert_eq!(ask(&node, "a", stream).await.status, 200);
    }
    let never = r#"{"prompt": "ab", "max_tokens": 2, "n": 3}"#;
    let refused = ask(&node, "a", never).await;
    assert_eq!(
        refused.error(),
        (400, "invalid_request".into(), Some("n".into()))
    );
    assert_eq!(refused.header("x-should-retry"), Some("false"));
}

#[tokio::test]
async fn tokens_are_held_for_what_may_come_and_given_back() {
    let tenants = tenants(&[("a", "caps = { tokens_per_minute = 40 }")]);
    let node = Node::start_with_tenants(config(), tenants, vec![model("tiny", &QUICK)]).await;
    // Counts against nothing: the model has no such token.
    let refused = r#"{"prompt": [7777], "max_tokens": 30}"#;
    assert_eq!(ask(&node, "a", refused).await.status, 400);
    // 2 and 30 tokens are expected and 2 and 1 used, as every letter ends the answer.
    let letters: Vec<u8> = (b'a'..=b'z').collect();
    let short = format!(r#"{{"prompt": "ab", "max_tokens": 30, "stop_token_ids": {letters:?}}}"#);
    for _ in 0..2 {
        let reply = ask(&node, "a", &short).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert_eq!(reply.json()["usage"]["total_tokens"], 3);
    }
    let long = r#"{"prompt": "ab", "max_tokens": 38, "ignore_eos": true}"#;
    let refused = ask(&node, "a", long).await;
    assert_eq!(refused.error(), (429, "rate_limited".into(), None));
    assert!((1..=9).contains(&retry_after(&refused)), "{refused:?}");
    let usage = node.get("/metrics").await.body;
    assert!(usage.contains(r#"dsd_tenant_tokens_total{tenant="a",kind="output"} "#));
}

#[tokio::test]
async fn models_of_others_are_not_there() {
    let tenants = tenants(&[
        ("a", "models = [\"tiny\"]"),
        ("b", "models = [\"gone\"]"),
        ("c", ""),
    ]);
    let models = vec![model("tiny", &QUICK), model("other", &QUICK)];
    let node = Node::start_with_tenants(config(), tenants, models).await;
    let get = async |name: &str, path: &str| {
        let mut client = Client::connect(node.addr).await;
        let (head, key) = ("HTTP/1.1\r\nhost: node\r\nconnection: close", key(name));
        let request = format!("GET {path} {head}\r\nauthorization: Bearer {key}\r\n\r\n");
        client.send(request.as_bytes()).await;
        client.reply().await
    };
    let names = |reply: Reply| {
        let list = reply.json();
        let models = list["data"].as_array().unwrap().clone();
        models
            .iter()
            .map(|model| model["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(get("a", "/v1/models").await), ["tiny"]);
    assert!(names(get("b", "/v1/models").await).is_empty());
    assert_eq!(names(get("c", "/v1/models").await), ["other", "tiny"]);
    assert_eq!(get("a", "/v1/models/tiny").await.status, 200);
    let other = r#"{"model": "other", "prompt": "ab", "max_tokens": 1}"#;
    let nowhere = r#"{"model": "nowhere", "prompt": "ab", "max_tokens": 1}"#;
    for refused in [
        get("a", "/v1/models/other").await,
        ask(&node, "a", other).await,
        ask(&node, "a", nowhere).await,
    ] {
        let expected = (404, "model_not_found".into(), Some("model".into()));
        assert_eq!(refused.error(), expected);
        assert!(refused.body.ends_with(r#"served are: tiny","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#), "{}", refused.body);
    }
    // The only one that it may use needs no name.
    let unnamed = r#"{"prompt": "ab", "max_tokens": 1}"#;
    assert_eq!(ask(&node, "a", unnamed).await.status, 200);
    assert_eq!(ask(&node, "c", unnamed).await.status, 400);
    assert_eq!(ask(&node, "c", other).await.status, 200);
    assert_eq!(ask(&node, "b", ASK).await.status, 404);
}

#[tokio::test]
async fn deadlines_of_the_client_end_its_requests_and_senseless_ones_are_refused() {
    let node = Node::start(config(), vec![model("tiny", &SLOW)]).await;
    let with_header = async |value: &str, body: &str| {
        let headers =
            format!("content-type: application/json\r\nx-request-deadline-s: {value}\r\n");
        node.post_with("/v1/completions", &headers, body.as_bytes())
            .await
    };
    let long = r#"{"prompt": "ab", "max_tokens": 200, "ignore_eos": true}"#;
    let ended = r#""finish_reason":"deadline_exceeded""#;
    let start = clock::now();
    let reply = with_header("0.3", long).await;
    assert_eq!(reply.status, 200);
    assert!(reply.body.contains(ended), "{}", reply.body);
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    // The field counts before the header.
    let field = r#"{"prompt": "ab", "max_tokens": 200, "ignore_eos": true, "deadline_s": 0.3}"#;
    assert!(with_header("100", field).await.body.contains(ended));
    let past = r#"{"prompt": "ab", "max_tokens": 2, "deadline_s": 1e-9}"#;
    let reply = node.post("/v1/completions", past).await;
    assert_eq!(reply.error(), (504, "deadline_exceeded".into(), None));
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    let param = Some("x-request-deadline-s".to_owned());
    for bad in ["0", "-1", "NaN", "inf", "-inf", "soon", "", "1 s"] {
        let expected = (400, "invalid_request".into(), param.clone());
        assert_eq!(with_header(bad, ASK).await.error(), expected, "{bad}");
    }
    let twice = with_header("1\r\nx-request-deadline-s: 2", ASK).await;
    assert_eq!(twice.error(), (400, "invalid_request".into(), param));
    // Beyond the node's own limit it is the node's.
    for absurd in ["1e300", "1e9"] {
        assert_eq!(with_header(absurd, ASK).await.status, 200, "{absurd}");
    }
    node.wait_for_sequences(0).await;
}

#[tokio::test]
async fn a_deadline_beyond_the_nodes_own_is_the_nodes_own() {
    let limits = GatewayConfig {
        request_timeout: Duration::from_millis(300),
        ..config()
    };
    let node = Node::start(limits, vec![model("tiny", &SLOW)]).await;
    let long = r#"{"prompt": "ab", "max_tokens": 200, "ignore_eos": true, "deadline_s": 1e6}"#;
    let reply = node.post("/v1/completions", long).await;
    let ended = r#""finish_reason":"deadline_exceeded""#;
    assert!(reply.body.contains(ended), "{}", reply.body);
}

#[tokio::test]
async fn a_busy_node_holds_nothing_against_the_caps_of_those_it_refuses() {
    let tiny = Pace {
        running_max: 1,
        waiting_max: 1,
        ..SLOW
    };
    let caps = "caps = { requests_per_minute = 3 }";
    let tenants = tenants(&[("a", caps), ("b", ""), ("c", "")]);
    let node = Node::start_with_tenants(config(), tenants, vec![model("tiny", &tiny)]).await;
    let long = r#"{"prompt": "ab", "max_tokens": 200, "ignore_eos": true}"#;
    let mut held = Vec::new();
    // One runs; the others have the places of the waiting line that one account may have, and that
    // all may have.
    for (n, who) in [(1, "b"), (2, "b"), (3, "c")] {
        held.push(send(&node, who, long).await);
        node.wait_for_sequences(n).await;
    }
    for _ in 0..5 {
        assert_eq!(ask(&node, "a", ASK).await.error().1, "queue_full");
    }
    drop(held);
    node.wait_for_sequences(0).await;
    for _ in 0..3 {
        assert_eq!(ask(&node, "a", ASK).await.status, 200);
    }
    assert_eq!(ask(&node, "a", ASK).await.error().1, "rate_limited");
}
