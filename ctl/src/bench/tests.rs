//! The whole bench against a server of its own that answers like a node.

use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    bench,
    cli::Cli,
    failure::{Exit, Failure},
    output::Output,
};

/// What the server remembers.
#[derive(Default)]
struct Node {
    n_requests: AtomicUsize,
    /// Held to add a writer only.
    writers: Mutex<JoinSet<()>>,
}

/// Every fourth request is refused, every fifth breaks off, the others stream three pieces.
async fn answer(State(node): State<Arc<Node>>, Json(body): Json<Value>) -> Response {
    assert_eq!(body["stream"], true);
    assert_eq!(body["ignore_eos"], true);
    assert_eq!(body["max_tokens"], 3);
    let idx = node.n_requests.fetch_add(1, Ordering::Relaxed);
    if idx % 4 == 3 {
        let error = json!({"error": {"message": "full", "code": "queue_full", "type": "x"}});
        return (StatusCode::TOO_MANY_REQUESTS, Json(error)).into_response();
    }
    let mut events: Vec<String> = (0..3)
        .map(|i| json!({"choices": [{"text": format!(" {i}")}]}).to_string())
        .collect();
    if idx % 5 != 4 {
        let usage = json!({"prompt_tokens": 7, "completion_tokens": 3});
        events.push(json!({"choices": [], "usage": usage}).to_string());
        events.push("[DONE]".to_owned());
    }
    let (tx, rx) = tokio::sync::mpsc::channel::<Bytes>(1);
    node.writers.lock().unwrap().spawn(async move {
        for event in events {
            let _gone = tx
                .send(Bytes::from(format!(": comment\n\ndata: {event}\n\n")))
                .await;
        }
    });
    let stream = body_of(rx);
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(stream)
        .unwrap()
}

fn body_of(rx: tokio::sync::mpsc::Receiver<Bytes>) -> Body {
    struct Frames(tokio::sync::mpsc::Receiver<Bytes>);
    impl hyper::body::Body for Frames {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
            self.0
                .poll_recv(cx)
                .map(|bytes| bytes.map(|b| Ok(hyper::body::Frame::data(b))))
        }
    }
    Body::new(Frames(rx))
}

/// A node that knows one key.
async fn serve_with_key(tasks: &mut JoinSet<()>) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let list = |headers: HeaderMap| async move {
        match headers.get("authorization").map(HeaderValue::as_bytes) {
            Some(b"Bearer right") => Json(json!({"data": [{"id": "tiny"}]})).into_response(),
            _ => {
                let error = json!({"error": {"message": "who are you?", "code": "unauthorized"}});
                (StatusCode::UNAUTHORIZED, Json(error)).into_response()
            }
        }
    };
    let app = Router::new()
        .route("/v1/models", get(list))
        .route("/v1/completions", post(answer))
        .with_state(Arc::new(Node::default()));
    tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
    format!("http://{address}")
}

async fn serve(tasks: &mut JoinSet<()>) -> String {
    serve_counting(tasks, Arc::default()).await
}

/// Counts the connections made.
async fn serve_counting(tasks: &mut JoinSet<()>, n_connections: Arc<AtomicUsize>) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let models = json!({"object": "list", "data": [{"id": "tiny"}]});
    let app = Router::new()
        .route("/v1/models", get(|| async { Json(models) }))
        .route("/v1/completions", post(answer))
        .with_state(Arc::new(Node::default()));
    let listener = listener.tap_io(move |_| {
        n_connections.fetch_add(1, Ordering::Relaxed);
    });
    tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
    format!("http://{address}")
}

async fn bench_json(line: &str) -> (Exit, Value) {
    use clap::Parser;
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let crate::cli::Command::Bench(args) = cli.command else {
        panic!("{line}")
    };
    let mut bytes = Vec::new();
    let mut out = Output::new(Box::new(&mut bytes), true, false);
    let exit = bench::run(&args, &mut out).await.unwrap();
    drop(out);
    (exit, serde_json::from_slice(&bytes).unwrap())
}

#[tokio::test]
async fn a_closed_loop_counts_answers_and_errors_by_code() {
    let mut tasks = JoinSet::new();
    let url = serve(&mut tasks).await;
    let line = format!(
        "dsctl bench --http {url} --concurrency 4 --requests 20 --output-len 3 --ignore-eos"
    );
    let (exit, report) = bench_json(&line).await;
    assert_eq!(exit, Exit::Done);
    assert_eq!(report["model"], "tiny");
    assert_eq!(report["n_requests"], 20);
    // Of 0..20: 3, 7, 11, 15, 19 are refused; 4, 9, 14 break off (19 is refused already).
    assert_eq!(
        report["errors"],
        json!({"broken_stream": 3, "queue_full": 5})
    );
    assert_eq!(report["n_ok"], 12);
    assert_eq!(report["completion_tokens"], 36);
    assert_eq!(report["prompt_tokens"], 84);
    assert_eq!(report["ttft_ms"]["n"], 12);
    assert_eq!(report["itl_ms"]["n"], 24);
    let total = |key: &str, n: f64| report[key]["mean"].as_f64().unwrap() * n;
    assert!(total("ttft_ms", 12.0) + total("itl_ms", 24.0) <= total("e2e_ms", 12.0));
    assert!(report["ttft_ms"]["max"].as_f64() <= report["e2e_ms"]["max"].as_f64());
}

#[tokio::test]
async fn connections_are_kept_unless_told_otherwise() {
    // The first one asks for the model list.
    for (flag, expected) in [("", 1), ("--reconnect", 4)] {
        let mut tasks = JoinSet::new();
        let n_connections = Arc::new(AtomicUsize::new(0));
        let url = serve_counting(&mut tasks, Arc::clone(&n_connections)).await;
        let line = format!(
            "dsctl bench --http {url} --model tiny --concurrency 1 --requests 3 --output-len 3 --ignore-eos {flag}"
        );
        let (_, report) = bench_json(&line).await;
        assert_eq!(report["n_ok"], 3);
        assert_eq!(n_connections.load(Ordering::Relaxed), expected, "{flag}");
    }
}

#[tokio::test]
async fn an_open_loop_sends_as_many_as_arrive() {
    let mut tasks = JoinSet::new();
    let url = serve(&mut tasks).await;
    let line = format!(
        "dsctl bench --http {url} --rate 200 --duration 500ms --seed 5 --output-len 3 --ignore-eos"
    );
    let (_, report) = bench_json(&line).await;
    let arrivals = super::schedule::Arrivals::new(200.0, Duration::from_millis(500), 5).count();
    assert_eq!(report["n_requests"], arrivals);
    assert_eq!(report["mode"], "open");
}

async fn failure_of(line: &str) -> Failure {
    use clap::Parser;
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let crate::cli::Command::Bench(args) = cli.command else {
        panic!("{line}")
    };
    let mut out = Output::new(Box::new(Vec::new()), true, false);
    bench::run(&args, &mut out).await.unwrap_err()
}

/// Both used to be as many failed requests, or an unreachable node.
#[tokio::test]
async fn a_missing_and_a_wrong_key_are_told_from_a_node_that_is_not_there() {
    let mut tasks = JoinSet::new();
    let url = serve_with_key(&mut tasks).await;
    for (flags, kind) in [
        ("", "missing_api_key"),
        ("--model tiny", "missing_api_key"),
        ("--api-key wrong", "wrong_api_key"),
        ("--api-key wrong --model tiny", "wrong_api_key"),
    ] {
        let failure = failure_of(&format!("dsctl bench --http {url} {flags}")).await;
        assert_eq!(
            (failure.exit, failure.kind.as_str()),
            (Exit::Refused, kind),
            "{flags}"
        );
        let text = failure.to_string();
        assert!(
            text.contains("who are you?") && text.contains("DSD_API_KEY"),
            "{text}"
        );
    }
    let flags = "--api-key right --concurrency 1 --requests 1 --output-len 3 --ignore-eos";
    let (exit, _) = bench_json(&format!("dsctl bench --http {url} {flags}")).await;
    assert_eq!(exit, Exit::Done);
}

#[tokio::test]
async fn a_node_that_is_not_there_is_unreachable() {
    // Bound and dropped: nobody listens there now.
    let address = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr();
    let url = format!("http://{}", address.unwrap());
    for flags in ["", "--model tiny"] {
        let failure = failure_of(&format!("dsctl bench --http {url} {flags}")).await;
        assert_eq!(failure.exit, Exit::Unreachable, "{flags}");
    }
    for bad in [
        "https://127.0.0.1",
        "127.0.0.1:8000",
        "http://",
        "not a url",
    ] {
        let failure = super::http::Target::new(bad, None).unwrap_err();
        assert_eq!(failure.exit, Exit::Refused, "{bad}");
    }
}
