//! Requests that cannot be answered: each has its code, and the node goes on.

use super::kit::{Client, Node, QUICK, config, model};
use crate::{
    gateway::GatewayConfig,
    tenants::{Now, Source, Tenants},
};

async fn check(node: &Node, path: &str, body: &str, status: u16, code: &str, param: Option<&str>) {
    let reply = node.post(path, body).await;
    assert_eq!(
        reply.error(),
        (status, code.to_owned(), param.map(str::to_owned)),
        "{body}: {}",
        reply.body
    );
    assert_eq!(reply.header("content-type"), Some("application/json"));
}

#[tokio::test]
async fn wrong_bodies_are_refused_with_code_and_field() {
    let node = Node::quick().await;
    let chat = "/v1/chat/completions";
    let user = r#""messages": [{"role": "user", "content": "hi"}]"#;
    check(&node, chat, "", 400, "invalid_json", None).await;
    check(&node, chat, "{", 400, "invalid_json", None).await;
    check(&node, chat, "not json", 400, "invalid_json", None).await;
    check(&node, chat, "[]", 400, "invalid_json", None).await;
    check(&node, chat, "{}", 400, "invalid_request", Some("messages")).await;
    check(
        &node,
        chat,
        r#"{"messages": []}"#,
        400,
        "invalid_request",
        Some("messages"),
    )
    .await;
    check(
        &node,
        chat,
        r#"{"messages": "hi"}"#,
        400,
        "invalid_request",
        Some("messages"),
    )
    .await;
    let wrong_type = format!(r#"{{{user}, "temperature": "hot"}}"#);
    check(
        &node,
        chat,
        &wrong_type,
        400,
        "invalid_request",
        Some("temperature"),
    )
    .await;
    let out_of_range = format!(r#"{{{user}, "top_p": 3}}"#);
    check(
        &node,
        chat,
        &out_of_range,
        400,
        "invalid_request",
        Some("top_p"),
    )
    .await;
    let tools = format!(r#"{{{user}, "tools": [{{"type": "function"}}]}}"#);
    let param = Some("tools[0].function");
    check(&node, chat, &tools, 400, "invalid_request", param).await;
    let bias = format!(r#"{{{user}, "logit_bias": {{"999999": 1}}}}"#);
    check(
        &node,
        chat,
        &bias,
        400,
        "invalid_request",
        Some("logit_bias.999999"),
    )
    .await;
    let unknown = format!(r#"{{{user}, "model": "other"}}"#);
    check(&node, chat, &unknown, 404, "model_not_found", Some("model")).await;
    let hole = r#"{"prompt": "a", "suffix": "b"}"#;
    check(
        &node,
        "/beta/completions",
        hole,
        400,
        "unsupported",
        Some("suffix"),
    )
    .await;
    let scores = r#"{"prompt": "a", "prompt_logprobs": 1}"#;
    check(
        &node,
        "/v1/completions",
        scores,
        400,
        "unsupported",
        Some("prompt_logprobs"),
    )
    .await;
    let token = r#"{"prompt": [1, 999999]}"#;
    check(
        &node,
        "/v1/completions",
        token,
        400,
        "invalid_request",
        Some("prompt"),
    )
    .await;
    check(
        &node,
        "/v1/completions",
        r#"{"prompt": [[]]}"#,
        400,
        "invalid_request",
        Some("prompt"),
    )
    .await;
    node.must_serve().await;
}

#[tokio::test]
async fn a_body_that_is_no_utf8_is_refused() {
    let node = Node::quick().await;
    let body = b"{\"prompt\": \"\xff\xfe\"}";
    let reply = node
        .post_with(
            "/v1/completions",
            "content-type: application/json\r\n",
            body,
        )
        .await;
    assert_eq!(reply.error(), (400, "invalid_json".into(), None));
    node.must_serve().await;
}

#[tokio::test]
async fn prompts_beyond_the_context_are_refused_with_numbers() {
    let node = Node::quick().await;
    let long = "x".repeat(1000);
    let chat = format!(r#"{{"messages": [{{"role": "user", "content": "{long}"}}]}}"#);
    check(
        &node,
        "/v1/chat/completions",
        &chat,
        400,
        "context_length_exceeded",
        Some("messages"),
    )
    .await;
    let reply = node
        .post("/v1/completions", &format!(r#"{{"prompt": "{long}"}}"#))
        .await;
    assert_eq!(
        reply.error(),
        (400, "context_length_exceeded".into(), Some("prompt".into()))
    );
    let message = reply.json()["error"]["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        message.contains("1000") || message.contains("1001"),
        "{message}"
    );
    assert!(message.contains("256"), "{message}");
    node.must_serve().await;
}

#[tokio::test]
async fn unknown_routes_and_methods_are_refused_in_the_same_shape() {
    let node = Node::quick().await;
    check(
        &node,
        "/v1/images/generations",
        "{}",
        404,
        "not_found",
        None,
    )
    .await;
    check(&node, "/v1/models", "{}", 405, "method_not_allowed", None).await;
    let reply = node.get("/v1/chat/completions").await;
    assert_eq!(
        (reply.error().0, reply.header("allow")),
        (405, Some("POST"))
    );
    node.must_serve().await;
}

#[tokio::test]
async fn other_content_types_are_refused() {
    let node = Node::quick().await;
    for headers in [
        "",
        "content-type: text/plain\r\n",
        "content-type: application/x-www-form-urlencoded\r\n",
    ] {
        let reply = node
            .post_with("/v1/completions", headers, br#"{"prompt": "a"}"#)
            .await;
        assert_eq!(
            reply.error(),
            (415, "unsupported_media_type".into(), None),
            "{headers}"
        );
    }
    let headers = "content-type: application/json\r\ncontent-encoding: gzip\r\n";
    let reply = node
        .post_with("/v1/completions", headers, b"\x1f\x8b")
        .await;
    assert_eq!(reply.error(), (415, "unsupported_media_type".into(), None));
    let headers = "Content-Type: Application/JSON; charset=utf-8\r\nContent-Encoding: identity\r\n";
    assert_eq!(
        node.post_with("/v1/completions", headers, br#"{"prompt": "a"}"#)
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn keys_are_asked_for_where_users_call() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "sk-0123456789abcdef\n").unwrap();
    let source = Source::Keys(file.path().to_owned());
    let tenants = Tenants::read(source, Now::read()).unwrap();
    let node = Node::start_with_tenants(config(), tenants, vec![model("tiny", &QUICK)]).await;
    for path in ["/v1/models", "/v1/nothing"] {
        let reply = node.get(path).await;
        assert_eq!(reply.error(), (401, "unauthorized".into(), None));
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    }
    check(
        &node,
        "/v1/completions",
        r#"{"prompt": "a"}"#,
        401,
        "unauthorized",
        None,
    )
    .await;
    for path in ["/health", "/metrics"] {
        assert_eq!(node.get(path).await.status, 200);
    }
    let headers = "content-type: application/json\r\nauthorization: Bearer sk-0123456789abcdef\r\n";
    assert_eq!(
        node.post_with("/v1/completions", headers, br#"{"prompt": "a"}"#)
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn bodies_above_the_limit_are_refused_whether_announced_or_not() {
    let node = Node::start(
        GatewayConfig {
            body_len_max: 2048,
            ..config()
        },
        vec![model("tiny", &QUICK)],
    )
    .await;
    // Announced: 100 MB, all of them sent before anything is read.
    let mut client = Client::connect(node.addr).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n";
    client
        .send(format!("{head}content-length: 100000000\r\n\r\n").as_bytes())
        .await;
    let piece = vec![b'x'; 1_000_000];
    for _ in 0..100 {
        assert!(
            client.try_send(&piece).await,
            "the node cut the connection before the client had its answer"
        );
    }
    assert_eq!(
        client.reply().await.error(),
        (413, "payload_too_large".into(), None)
    );
    // Not announced.
    let mut client = Client::connect(node.addr).await;
    client
        .send(format!("{head}transfer-encoding: chunked\r\nconnection: close\r\n\r\n").as_bytes())
        .await;
    for _ in 0..100 {
        client
            .send(format!("400\r\n{}\r\n", "x".repeat(1024)).as_bytes())
            .await;
    }
    client.send(b"0\r\n\r\n").await;
    assert_eq!(
        client.reply().await.error(),
        (413, "payload_too_large".into(), None)
    );
    // A chunked body within the limit is fine.
    let mut client = Client::connect(node.addr).await;
    client
        .send(format!("{head}transfer-encoding: chunked\r\nconnection: close\r\n\r\n").as_bytes())
        .await;
    client
        .send(b"8\r\n{\"prompt\r\n6\r\n\":\"a\"}\r\n0\r\n\r\n")
        .await;
    assert_eq!(client.reply().await.status, 200);
    node.must_serve().await;
}

/// The HTTP reader's own answers had an empty body, or there was none at all.
#[tokio::test]
async fn heads_that_are_no_http_are_refused_in_the_shape_of_all_errors() {
    let node = Node::quick().await;
    let fields = |n: usize| "a: b\r\n".repeat(n);
    let long = "y".repeat(1 << 20);
    let bad = (400, "invalid_request".to_owned(), None);
    let large = (431, "head_too_large".to_owned(), None);
    for (head, expected) in [
        ("\x16\x03\x01\x02\r\n\r\n".to_owned(), &bad),
        ("GET\r\n\r\n".to_owned(), &bad),
        ("\0\0\0\0\0\0\r\n\r\n".to_owned(), &bad),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), &bad),
        ("GET /health HTTP/1.1\r\na b: c\r\n\r\n".to_owned(), &bad),
        (
            "POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n".to_owned(),
            &bad,
        ),
        (format!("GET / HTTP/1.1\r\n{}\r\n", fields(101)), &large),
        (format!("GET / HTTP/1.1\r\nx: {long}\r\n\r\n"), &large),
        (format!("GET /{long} HTTP/1.1\r\n\r\n"), &large),
    ] {
        let mut client = Client::connect(node.addr).await;
        client.send(head.as_bytes()).await;
        let reply = client.reply().await;
        assert_eq!(&reply.error(), expected, "{head:.40}");
        // The same after an answered request.
        let mut client = Client::connect(node.addr).await;
        client
            .send(b"GET /health HTTP/1.1\r\nhost: node\r\n\r\n")
            .await;
        client.read_until("alive").await;
        client.send(head.as_bytes()).await;
        assert_eq!(&client.reply().await.error(), expected, "{head:.40}");
    }
    node.must_serve().await;
}

/// Two readers on the way could take such a request for one to either host.
#[tokio::test]
async fn a_request_names_one_host() {
    let node = Node::quick().await;
    let bad = (400, "invalid_request".to_owned(), None);
    let body = "{\"prompt\": \"a\", \"max_tokens\": 1}";
    for (version, hosts, is_good) in [
        ("1.1", "host: node\r\n", true),
        ("1.1", "host: my_node.example:8000\r\n", true),
        ("1.1", "host: [::1]:8000\r\n", true),
        ("1.1", "host:\r\n", true),
        ("1.0", "", true),
        ("1.1", "", false),
        ("1.1", "host: node\r\nhost: node\r\n", false),
        ("1.1", "Host: node\r\nHOST: other\r\n", false),
        ("1.0", "host: node\r\nhost: node\r\n", false),
        ("1.1", "host: a b\r\n", false),
        ("1.1", "host: user@node\r\n", false),
        ("1.1", "host: node/path\r\n", false),
    ] {
        let rest = format!(
            "HTTP/{version}\r\n{hosts}connection: close\r\ncontent-type: application/json\r\n"
        );
        for request in [
            format!("GET /health {rest}\r\n"),
            format!(
                "POST /v1/completions {rest}content-length: {}\r\n\r\n{body}",
                body.len()
            ),
        ] {
            let mut client = Client::connect(node.addr).await;
            client.send(request.as_bytes()).await;
            let reply = client.reply().await;
            if is_good {
                assert_eq!(reply.status, 200, "{request:?}: {}", reply.body);
            } else {
                assert_eq!(reply.error(), bad, "{request:?}");
            }
        }
    }
}
