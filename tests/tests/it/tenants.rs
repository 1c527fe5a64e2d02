//! Tenants of a real node: their file, SIGHUP, `dsctl tenant`, keys that come and go.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use dsd_tests::{
    data,
    http::{self, Connection, Reply},
    node::Node,
    process, tool, wait,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const KEY: &str = "sk-first-key-of-team-a";
/// `printf %s KEY | b3sum`.
const DIGEST: &str = "blake3:8cfe24d926ec9196f04a7a0aa47cc2fd582f47fe9fd3d05e5c6a64dee7359eb7";

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn file(folder: &TempDir, settings: &str) -> PathBuf {
    let path = folder.path().join("tenants.toml");
    let text = format!(
        "version = 1\n# our first customer\n[[tenants]]\nname = \"team-a\"\nkey_digests = [\"{DIGEST}\"]\n{settings}\n"
    );
    write(&path, &text);
    path
}

/// A short completion with a key.
fn ask(node: &Node, key: &str) -> Reply {
    ask_with(
        node,
        key,
        &json!({"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": true}),
    )
}

fn ask_with(node: &Node, key: &str, body: &Value) -> Reply {
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut connection = Connection::open(node.http);
    connection.send(&[head.as_bytes(), body.as_bytes()].concat());
    connection.reply()
}

fn key_of(node: &Node, args: &[&str]) -> String {
    let reply = tool::dsctl_json(node, args);
    reply["key"].as_str().unwrap().to_owned()
}

#[test]
fn tenants_come_and_go_while_the_node_serves() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "");
    let node = Node::builder(&data::reference("llama"))
        .env("DSD_SERVICE__TENANTS_FILE", path.display())
        .allow("tenants not read again")
        .start();
    assert_eq!(ask(&node, KEY).status, 200);
    assert_eq!(ask(&node, "sk-a-key-of-nobody-at-all").status, 401);
    assert_eq!(http::get(node.http, "/v1/models").status, 401);

    // Added by an operator: the key works at once, and is in no file.
    let second = key_of(
        &node,
        &[
            "tenant",
            "add",
            "team-b",
            "--weight",
            "3",
            "--concurrency",
            "4",
        ],
    );
    assert_eq!(ask(&node, &second).status, 200);
    assert!(!fs::read_to_string(&path).unwrap().contains(&second));
    let shown = tool::dsctl_json(&node, &["tenant", "show", "team-b"]);
    assert_eq!(shown["entry"]["n_requests"], 1, "{shown}");
    assert_eq!(shown["n_output_tokens"], 2, "{shown}");
    assert_eq!(shown["concurrency"], json!({"max": 4, "left": 4}));
    assert!(shown["queue_ms_p50"].is_u64(), "{shown}");
    let list = tool::dsctl(&node, &["tenant", "list"]);
    assert_eq!(list.code, Some(0), "{list:?}");
    for part in ["team-a", "team-b", "interactive"] {
        assert!(list.stdout.contains(part), "no {part} in {}", list.stdout);
    }

    // A replaced key is refused at once, or after its grace.
    let third = key_of(&node, &["tenant", "rotate-key", "team-b"]);
    assert_eq!(
        (ask(&node, &second).status, ask(&node, &third).status),
        (401, 200)
    );
    let fourth = key_of(&node, &["tenant", "rotate-key", "team-b", "--grace", "2"]);
    assert_eq!(
        (ask(&node, &third).status, ask(&node, &fourth).status),
        (200, 200)
    );
    wait::until_true("the end of the grace", || ask(&node, &third).status == 401);
    assert_eq!(ask(&node, &fourth).status, 200);

    // Removed while a request of its runs: that one finishes.
    let long = json!({"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true});
    let answer = std::thread::scope(|scope| {
        let running = scope.spawn(|| ask_with(&node, &fourth, &long));
        wait::until_true("a running request", || {
            node.model_status()["n_running"] != 0 || running.is_finished()
        });
        let removed = tool::dsctl_json(&node, &["tenant", "remove", "team-b"]);
        assert_eq!(removed["name"], "team-b");
        assert_eq!(ask(&node, &fourth).status, 401);
        running.join().unwrap()
    });
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["usage"]["completion_tokens"], 400);

    // Changed by hand: SIGHUP makes it so.
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("# our first customer"), "{text}");
    write(
        &path,
        &format!("{text}caps = {{ requests_per_minute = 1 }}\n"),
    );
    process::signal(node.pid(), "HUP");
    wait::until_true("a reload", || {
        !node.records("tenants read again").is_empty()
    });
    assert_eq!(ask(&node, KEY).status, 200);
    let refused = ask(&node, KEY);
    assert_eq!(refused.status, 429, "{refused:?}");
    assert_eq!(refused.json()["error"]["code"], "rate_limited");

    // Broken by hand: nothing changes but the log, and dsctl says why it cannot go on.
    write(&path, &format!("{text}weight = 0\n"));
    process::signal(node.pid(), "HUP");
    wait::until_true("a refused reload", || {
        !node
            .records("tenants not read again, the old ones stay")
            .is_empty()
    });
    assert_eq!(ask(&node, KEY).status, 429);
    let outcome = tool::dsctl(&node, &["tenant", "set", "team-a", "--weight", "2"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("`weight` is 0"), "{outcome:?}");
    write(&path, &text);
    let lifted = tool::dsctl_json(&node, &["tenant", "set", "team-a", "--weight", "2"]);
    assert_eq!(lifted["entry"]["weight"], 2);
    assert_eq!(ask(&node, KEY).status, 200);
    let last = tool::dsctl(&node, &["tenant", "remove", "team-a"]);
    assert_eq!(last.code, Some(1), "{last:?}");
    assert_eq!(ask(&node, KEY).status, 200);
    let metrics = node.get("/metrics").body;
    assert!(
        metrics.contains("dsd_tenant_requests_total{tenant=\"team-a\"}"),
        "{metrics}"
    );
}

#[test]
fn users_of_a_node_without_keys_are_told_apart_and_tenants_cannot_be_added() {
    let node = Node::start(&data::reference("llama"));
    let ask = |user: &str| {
        let body = json!({
            "prompt": [1, 2, 3], "max_tokens": 2, "user_id": user, "service_tier": "flex", "deadline_s": 20.5,
        });
        node.post("/v1/completions", &body)
    };
    assert_eq!((ask("a").status, ask("b-2_C").status), (200, 200));
    assert_eq!(ask("not a name").status, 400);
    let list = tool::dsctl_json(&node, &["tenant", "list"]);
    assert_eq!(list["tenants"][0]["name"], "anonymous", "{list}");
    assert_eq!(list["tenants"][0]["n_requests"], 2, "{list}");
    let outcome = tool::dsctl(&node, &["tenant", "add", "a"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(
        outcome.stderr.contains("service.tenants_file"),
        "{outcome:?}"
    );
}

#[test]
fn a_node_does_not_start_with_a_file_that_is_wrong() {
    let folder = TempDir::new().unwrap();
    let start = |path: &Path| {
        let mut command = tool::command("dsd");
        command
            .args([
                "dev",
                "--http",
                "127.0.0.1:0",
                "--quic",
                "127.0.0.1:0",
                "--model",
            ])
            .arg(data::reference("llama"))
            .arg("--state")
            .arg(folder.path().join("state"))
            .env("DSD_SERVICE__TENANTS_FILE", path);
        process::run(&mut command, "")
    };
    let check = |path: &Path, expected: &str| {
        let outcome = start(path);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(
            outcome.stderr.contains(expected),
            "no {expected} in {outcome:?}"
        );
    };
    check(&folder.path().join("absent"), "cannot read");
    check(folder.path(), "is no regular file");
    check(Path::new("/dev/zero"), "is no regular file");
    let path = file(&folder, "wieght = 2");
    check(
        &path,
        "tenants.toml:6: unknown key `wieght`; did you mean `weight`?",
    );
    let path = file(&folder, "");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    check(&path, "run `chmod 600 ");
    // Two ways to say who may call.
    write(&path, "version = 1\n");
    let outcome = process::run(
        tool::command("dsd")
            .args(["dev", "--model", "/nonexistent"])
            .env("DSD_SERVICE__TENANTS_FILE", &path)
            .env("DSD_HTTP__API_KEYS_FILE", &path),
        "",
    );
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("keep one"), "{outcome:?}");
}
