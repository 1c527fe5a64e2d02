//! What browsers, probes and clients of other servers ask around the answers themselves.

use serde_json::{Value, json};

use super::kit::{self, Client, Node, QUICK, Reply};
use crate::{config::HttpConfig, gateway::GatewayConfig};

async fn ask(node: &Node, method: &str, path: &str, headers: &str) -> Reply {
    let mut client = Client::connect(node.addr).await;
    let head =
        format!("{method} {path} HTTP/1.1\r\nhost: node\r\n{headers}connection: close\r\n\r\n");
    client.send(head.as_bytes()).await;
    client.reply().await
}

/// A node with keys, which pages of one origin may ask.
async fn node() -> Node {
    let http = HttpConfig {
        cors_origins: vec!["https://chat.example.com".to_owned()],
        ..HttpConfig::default()
    };
    let config = GatewayConfig::new(&http, std::time::Duration::from_secs(5));
    Node::start(config, vec![kit::model("tiny", &QUICK)]).await
}

#[tokio::test]
async fn pages_of_listed_origins_may_ask_and_others_may_not() {
    let node = node().await;
    let preflight = |origin: &str| {
        format!(
            "origin: {origin}\r\naccess-control-request-method: POST\r\n\
             access-control-request-headers: authorization,content-type,x-stainless-os\r\n"
        )
    };
    let path = "/v1/chat/completions";
    let listed = "https://chat.example.com";
    let reply = ask(&node, "OPTIONS", path, &preflight(listed)).await;
    assert_eq!(reply.status, 200, "{}", reply.head);
    let allowed = |name: &str| reply.header(name).unwrap_or_default().to_owned();
    assert_eq!(allowed("access-control-allow-origin"), listed);
    let headers = "authorization,content-type,x-stainless-os";
    assert_eq!(allowed("access-control-allow-headers"), headers);
    assert!(allowed("access-control-allow-methods").contains("POST"));
    for other in [
        "https://evil.example.com",
        "null",
        "https://chat.example.com.evil.org",
    ] {
        let reply = ask(&node, "OPTIONS", path, &preflight(other)).await;
        assert_eq!(reply.header("access-control-allow-origin"), None, "{other}");
    }
    let origin = format!("origin: {listed}\r\n");
    for path in ["/v1/models", "/nowhere"] {
        let reply = ask(&node, "GET", path, &origin).await;
        assert_eq!(
            reply.header("access-control-allow-origin"),
            Some(listed),
            "{path}"
        );
        let exposed = reply.header("access-control-expose-headers").unwrap();
        assert!(exposed.contains("retry-after"), "{exposed}");
    }
    // Without a list nobody is told anything.
    let plain = Node::quick().await;
    let reply = ask(&plain, "OPTIONS", path, &preflight(listed)).await;
    assert_eq!(
        (reply.status, reply.header("access-control-allow-origin")),
        (405, None)
    );
}

#[tokio::test]
async fn head_is_get_without_a_body_and_other_methods_are_told_what_is() {
    let node = node().await;
    for path in [
        "/health",
        "/ready",
        "/metrics",
        "/version",
        "/v1/models",
        "/v1/models/tiny",
        "/user/balance",
    ] {
        let reply = ask(&node, "HEAD", path, "").await;
        assert_eq!((reply.status, &reply.body[..]), (200, ""), "{path}");
        let reply = ask(&node, "DELETE", path, "").await;
        assert_eq!(
            (reply.status, reply.header("allow")),
            (405, Some("GET, HEAD")),
            "{path}"
        );
    }
    for path in [
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/beta/completions",
        "/tokenize",
    ] {
        let reply = ask(&node, "GET", path, "").await;
        assert_eq!(
            (reply.status, reply.header("allow")),
            (405, Some("POST")),
            "{path}"
        );
    }
}

/// A route that is described is there, by each of its names.
#[tokio::test]
async fn what_is_described_is_there() {
    let node = node().await;
    let described = node.get("/openapi.json").await.json();
    assert_eq!(described["openapi"], "3.1.0");
    for (path, operations) in described["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "tiny").replace("{id}", "resp-1");
        let (verb, operation) = operations.as_object().unwrap().iter().next().unwrap();
        let reply = match &verb[..] {
            "post" => node.post(&path, "{}").await,
            _ => node.get(&path).await,
        };
        let is_absent = operation["summary"]
            .as_str()
            .unwrap()
            .starts_with("Always 404");
        assert_eq!(reply.status == 404, is_absent, "{path}: {}", reply.body);
        let wrong = if verb == "post" { "GET" } else { "PUT" };
        if !is_absent {
            assert_eq!(ask(&node, wrong, &path, "").await.status, 405, "{path}");
        }
    }
}

#[tokio::test]
async fn embeddings_are_refused_and_tokenizers_described() {
    let node = Node::quick().await;
    let reply = node
        .post("/v1/embeddings", r#"{"input": "a", "model": "tiny"}"#)
        .await;
    assert_eq!(reply.error(), (400, "unsupported".to_owned(), None));
    let described = node.get("/tokenizer_info?model=tiny").await.json();
    assert_eq!(
        (&described["eos_token"], &described["bos_token"]),
        (&json!("<|end|>"), &Value::Null)
    );
    assert!(
        described["chat_template"]
            .as_str()
            .unwrap()
            .contains("m.role"),
        "{described}"
    );
    assert_eq!(
        (&described["vocab_size"], &described["add_bos_token"]),
        (&json!(259), &json!(false))
    );
    let (status, code, _) = node.get("/tokenizer_info?model=other").await.error();
    assert_eq!((status, &code[..]), (404, "model_not_found"));
}
