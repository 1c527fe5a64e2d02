//! The way up, the way down, and models that come and go while others answer.

use std::{
    fs,
    net::TcpStream,
    os::unix::net::UnixDatagram,
    path::Path,
    time::{Duration, Instant},
};

use dsd_tests::{
    data,
    http::{self, Connection},
    node::{Node, NodeBuilder},
    process, tool, wait,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A stream of `n_tokens` whose first event has arrived.
fn stream(node: &Node, n_tokens: usize) -> Connection {
    let body = json!({
        "prompt": [1, 2, 3], "max_tokens": n_tokens, "stream": true, "ignore_eos": true,
        "stream_options": {"include_usage": true},
    });
    let mut connection = node.connect();
    connection.send(&http::post_bytes(
        "/v1/completions",
        body.to_string().as_bytes(),
    ));
    assert_eq!(connection.head().status, 200);
    assert!(connection.chunk().unwrap().is_some());
    connection
}

/// The rest of a stream as text; empty chunks of a cut connection end it, too.
fn rest(connection: &mut Connection) -> String {
    let mut text = Vec::new();
    while let Ok(Some(chunk)) = connection.chunk() {
        text.extend(chunk);
    }
    String::from_utf8(text).unwrap()
}

fn wait_for_refusal(node: &Node) {
    wait::until_true("new connections are refused", || {
        TcpStream::connect(node.http).is_err()
    });
}

#[test]
fn sigterm_lets_a_running_stream_end_and_refuses_new_connections() {
    let mut node = Node::start(&data::reference("deepseek_v3"));
    let mut running = stream(&node, 2000);
    node.terminate();
    wait_for_refusal(&node);
    let events = rest(&mut running);
    assert!(events.ends_with("data: [DONE]\n\n"), "{events:?}");
    let last = events
        .split("\n\n")
        .filter(|event| event.contains("\"usage\":{"))
        .last();
    let last: Value = serde_json::from_str(last.unwrap().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(last["usage"]["completion_tokens"], 2000);
    assert_eq!(node.exit().code(), Some(0));
    assert!(node.logged("stopping, requests may finish").is_some());
}

#[test]
fn a_second_signal_ends_the_wait() {
    let mut node = Node::builder(&data::smollm2())
        .allow("stopped at once by a second signal")
        .start();
    let running = stream(&node, 4000);
    node.terminate();
    wait::until_true("draining", || node.get("/ready").body.contains("draining"));
    let started = Instant::now();
    process::signal(node.pid(), "INT");
    assert_eq!(node.exit().code(), Some(0));
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "took {:?}",
        started.elapsed()
    );
    drop(running);
}

#[test]
fn a_signal_while_loading_ends_the_node() {
    let mut node = Node::builder(&data::smollm2()).spawn();
    assert_eq!(node.get("/health").status, 200);
    node.terminate();
    assert_eq!(node.exit().code(), Some(0));
}

/// Waits for a datagram with this line.
fn expect_notice(socket: &UnixDatagram, line: &str) {
    let mut bytes = [0; 4096];
    wait::until_true(line, || {
        let n = socket
            .recv(&mut bytes)
            .unwrap_or_else(|e| panic!("no {line}: {e}"));
        String::from_utf8_lossy(&bytes[..n])
            .lines()
            .any(|found| found == line)
    });
}

#[test]
fn systemd_is_told_of_readiness_life_and_stop() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(wait::DEADLINE)).unwrap();
    let mut node = Node::builder(&data::reference("deepseek_v3"))
        .env("NOTIFY_SOCKET", path.display())
        .env("WATCHDOG_USEC", 300_000)
        .spawn();
    expect_notice(&socket, "READY=1");
    // Ready means that a token came out.
    assert_eq!(node.get("/ready").status, 200);
    let status = node.model_status();
    assert!(status["last_token_age_ms"].is_u64(), "{status}");
    for _ in 0..3 {
        expect_notice(&socket, "WATCHDOG=1");
    }
    // A reload ends no node, one without a file to read again neither.
    process::signal(node.pid(), "HUP");
    expect_notice(&socket, "RELOADING=1");
    expect_notice(&socket, "READY=1");
    node.must_serve();
    node.terminate();
    expect_notice(&socket, "STOPPING=1");
    assert_eq!(node.exit().code(), Some(0));
}

/// Without a file of keys it used to end the process, and with it every stream.
#[test]
fn sighup_ends_no_node_and_no_stream() {
    let node = Node::start(&data::reference("deepseek_v3"));
    let mut running = stream(&node, 500);
    for n in 1..=3 {
        process::signal(node.pid(), "HUP");
        wait::until_true("the log's word", || {
            let words = "everybody may call, so there are no tenants to read again";
            node.records(words).len() == n
        });
    }
    let events = rest(&mut running);
    assert!(events.ends_with("data: [DONE]\n\n"), "{events:?}");
    node.must_serve();
}

#[test]
fn sighup_names_what_waits_for_a_restart() {
    let model = data::reference("llama");
    let words = "the configuration changed; these wait for a restart";
    let wrong = "the configuration is wrong now; a restart would fail";
    let text = format!("version = 1\n[[models]]\nname = \"llama\"\npath = {model:?}\n");
    let node = Node::builder(&model)
        .configuration(&text)
        .allow(words)
        .allow(wrong)
        .start();
    let reload = |text: &str, message: &str| {
        fs::write(node.state().join("dsd.toml"), text).unwrap();
        process::signal(node.pid(), "HUP");
        wait::until_true("the log's word", || !node.records(message).is_empty());
        node.records(message).remove(0)
    };
    let record = reload(&format!("{text}tp = 2\n[http]\nkeep_alive_s = 3\n"), words);
    assert_eq!(record["keys"], "http.keep_alive_s, models.llama");
    let record = reload(&format!("{text}tpp = 2\n"), wrong);
    let error = record["error"].as_str().unwrap();
    assert!(error.contains("dsd.toml:5: unknown key `tpp`"), "{error}");
    node.must_serve();
}

#[test]
fn a_killed_node_comes_back_with_its_certificates() {
    let state = TempDir::new().unwrap();
    let model = data::reference("llama");
    let mut node = Node::builder(&model).state(state.path()).start();
    let certificate = fs::read(state.path().join("pki/node.pem")).unwrap();
    let running = stream(&node, 1000);
    process::signal(node.pid(), "KILL");
    assert_eq!(node.exit().code(), None);
    drop(running);
    let node = Node::builder(&model).state(state.path()).start();
    node.must_serve();
    tool::dsctl_json(&node, &["status"]);
    assert_eq!(
        fs::read(state.path().join("pki/node.pem")).unwrap(),
        certificate
    );
}

#[test]
fn models_come_and_go_while_others_answer() {
    let node = Node::builder(&data::reference("deepseek_v3"))
        .allow("a model called `qwen3` is served already")
        .start();
    let mut running = stream(&node, 1500);
    let qwen3 = data::reference("qwen3");
    let loaded = tool::dsctl_json(&node, &["model", "load", qwen3.to_str().unwrap()]);
    assert_eq!(loaded["loaded"]["name"], "qwen3", "{loaded}");
    assert_eq!(loaded["loaded"]["architecture"], "qwen3");

    let twice = tool::dsctl(&node, &["--json", "model", "load", qwen3.to_str().unwrap()]);
    assert_eq!(twice.code, Some(1), "{twice:?}");
    assert!(twice.stdout.contains("model_exists") || twice.stderr.contains("model_exists"));
    let list = tool::dsctl_json(&node, &["model", "list"]);
    let names: Vec<&str> = list["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["deepseek_v3", "qwen3"]);
    let ask = |model: &str| {
        let body = json!({"model": model, "prompt": [1, 2], "max_tokens": 2, "ignore_eos": true});
        node.post("/v1/completions", &body)
    };
    for model in ["deepseek_v3", "qwen3"] {
        let reply = ask(model);
        assert_eq!(
            (reply.status, reply.json()["model"].as_str()),
            (200, Some(model))
        );
    }
    // With two models, which one is meant must be said.
    let unnamed = node.post("/v1/completions", &json!({"prompt": [1]}));
    unnamed.must_be_error(400, "invalid_request", Some("model"));

    let unloaded = tool::dsctl_json(&node, &["model", "unload", "qwen3"]);
    assert_eq!(
        (&unloaded["name"], &unloaded["n_requests_ended"]),
        (&json!("qwen3"), &json!(0))
    );
    ask("qwen3").must_be_error(404, "model_not_found", Some("model"));
    let again = tool::dsctl(&node, &["model", "unload", "qwen3"]);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(
        rest(&mut running).ends_with("data: [DONE]\n\n"),
        "the other model's stream was cut"
    );

    tool::dsctl_json(&node, &["model", "unload", "deepseek_v3"]);
    node.get("/ready").must_be_error(503, "not_ready", None);
    assert_eq!(node.get("/health").status, 200);
    assert_eq!(tool::dsctl(&node, &["status"]).code, Some(2));
    ask("deepseek_v3").must_be_error(404, "model_not_found", Some("model"));
    tool::dsctl_json(&node, &["model", "load", qwen3.to_str().unwrap()]);
    assert_eq!(ask("qwen3").status, 200);
    // The model that the node was started for is still missing. It needs no path.
    let reply = node.get("/ready");
    reply.must_be_error(503, "not_ready", None);
    assert!(reply.body.contains("deepseek_v3"), "{}", reply.body);
    tool::dsctl_json(&node, &["model", "load", "deepseek_v3"]);
    wait::until_true("/ready", || node.get("/ready").status == 200);
    assert_eq!(ask("deepseek_v3").status, 200);
}

#[test]
fn a_model_that_cannot_be_loaded_does_not_touch_the_one_that_answers() {
    let node = Node::builder(&data::reference("llama"))
        .allow("a model was not loaded")
        .start();
    let folder = TempDir::new().unwrap();
    let copy = data::copy_of(&data::reference("qwen3"), folder.path());
    let weights = copy.join("model.safetensors");
    let len = fs::metadata(&weights).unwrap().len();
    fs::OpenOptions::new()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_len(len - 1)
        .unwrap();
    let refused = tool::dsctl(&node, &["--json", "model", "load", copy.to_str().unwrap()]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let said = refused.stdout + &refused.stderr;
    assert!(
        said.contains("weights_invalid") && said.contains("model.safetensors"),
        "{said}"
    );
    node.must_serve();
    assert_eq!(node.get("/ready").status, 200);
    for absent in ["absent", "/nonexistent", "../llama", ""] {
        let refused = tool::dsctl(&node, &["model", "load", absent]);
        assert_eq!(refused.code, Some(1), "{absent}: {refused:?}");
    }
    node.must_serve();
}

fn flip(file: &Path, at: usize, to: [u8; 2]) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at..at + 2].copy_from_slice(&to);
    fs::write(file, bytes).unwrap();
}

#[test]
fn verify_notices_bytes_that_changed_on_disk() {
    let folder = TempDir::new().unwrap();
    let copy = data::copy_of(&data::reference("llama"), folder.path());
    let weights = copy.join("model.safetensors");
    let node = Node::start(&copy);
    let good = tool::dsctl_json(&node, &["model", "verify", "llama"]);
    assert_eq!(good["verified"]["findings"], json!([]), "{good}");
    assert_eq!(good["verified"]["n_files"], 1);

    let len = fs::metadata(&weights).unwrap().len() as usize;
    flip(&weights, len - 2, [0x12, 0x34]);
    let other = tool::dsctl(&node, &["--json", "model", "verify", "llama"]).json_lines();
    let other = other.last().unwrap();
    assert_ne!(
        other["verified"]["digest"], good["verified"]["digest"],
        "{other}"
    );

    // A NaN in bf16.
    flip(&weights, len - 2, [0xc0, 0x7f]);
    let outcome = tool::dsctl(&node, &["--json", "model", "verify", "llama"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    let lines = outcome.json_lines();
    let finding = &lines.last().unwrap()["verified"]["findings"][0];
    assert!(
        finding["file"]
            .as_str()
            .unwrap()
            .ends_with("model.safetensors"),
        "{finding}"
    );
    for key in ["tensor", "expected", "found"] {
        assert!(
            finding[key].as_str().is_some_and(|text| !text.is_empty()),
            "{finding}"
        );
    }
    let absent = tool::dsctl(&node, &["model", "verify", "absent"]);
    assert_eq!(absent.code, Some(1), "{absent:?}");
}

/// Two models: `llama` with settings of its own, and `spare`, which is not there.
fn two_models(spare_required: bool) -> NodeBuilder {
    let llama = data::reference("llama");
    let text = format!(
        "version = 1\n[[models]]\nname = \"llama\"\npath = {llama:?}\naliases = [\"deepseek-chat\"]\n\
         kv_tokens = 512\nrunning_max = 2\n\
         [[models]]\nname = \"spare\"\npath = \"/nonexistent\"\nrequired = {spare_required}\n"
    );
    Node::builder(&llama)
        .configuration(&text)
        .allow("model not loaded")
}

#[test]
fn a_model_of_the_configuration_has_its_settings_and_aliases_also_when_loaded_by_hand() {
    let node = two_models(false).start();
    let n_blocks = || {
        let status = tool::dsctl_json(&node, &["status"]);
        let models = status["models"].as_array().unwrap();
        let llama = models
            .iter()
            .find(|model| model["name"] == "llama")
            .unwrap();
        llama["n_blocks"].as_u64().unwrap()
    };
    // 512 positions in blocks of 32.
    let n_blocks_before = n_blocks();
    assert!((16..=17).contains(&n_blocks_before), "{n_blocks_before}");
    let ask = || {
        let body = json!({"model": "deepseek-chat", "prompt": [1, 2], "max_tokens": 2});
        node.post("/v1/completions", &body)
    };
    let reply = ask();
    assert_eq!(
        (reply.status, &reply.json()["model"]),
        (200, &json!("deepseek-chat"))
    );
    let unload = tool::dsctl(&node, &["model", "unload", "deepseek-chat"]);
    assert_eq!(unload.code, Some(0), "{unload:?}");
    let reply = node.get("/ready");
    reply.must_be_error(503, "not_ready", None);
    assert!(reply.body.contains("`llama`"), "{}", reply.body);
    ask().must_be_error(404, "model_not_found", Some("model"));
    let loaded = tool::dsctl_json(&node, &["model", "load", "deepseek-chat"]);
    assert_eq!(loaded["loaded"]["name"], "llama", "{loaded}");
    wait::until_true("/ready", || node.get("/ready").status == 200);
    assert_eq!((ask().status, n_blocks()), (200, n_blocks_before));
}

/// Such a node was ready, and a load balancer sent it requests for the model it did not have.
#[test]
fn a_node_without_a_required_model_answers_for_the_others_and_is_not_ready() {
    let node = two_models(true).spawn();
    wait::until_true("the other model", || {
        node.get("/v1/models/llama").status == 200
    });
    wait::until_true("the failure", || {
        let reply = node.get("/ready");
        assert_eq!(reply.status, 503, "{reply:?}");
        reply
            .body
            .contains("`spare`, which the configuration requires, is failed")
    });
    node.must_serve();
}

#[test]
fn a_node_that_may_be_without_all_its_models_stays_up_without_them() {
    let llama = data::reference("llama");
    let text =
        "version = 1\n[[models]]\nname = \"spare\"\npath = \"/nonexistent\"\nrequired = false\n";
    let node = Node::builder(&llama)
        .configuration(text)
        .allow("model not loaded")
        .spawn();
    wait::until_true("the failure", || {
        let status = tool::dsctl(&node, &["--json", "status"]);
        assert_eq!(status.code, Some(2), "{status:?}");
        status.stdout.contains("failed")
    });
    node.get("/ready").must_be_error(503, "not_ready", None);
    tool::dsctl_json(&node, &["model", "load", llama.to_str().unwrap()]);
    wait::until_true("/ready", || node.get("/ready").status == 200);
    node.must_serve();
}
