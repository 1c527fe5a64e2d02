//! `dsctl` against a real node: what people and programs read, and exit codes.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

use dsd_tests::{data, node::Node, process, tool};
use serde_json::{Value, json};

#[test]
fn status_tells_programs_and_people_the_same() {
    let node = Node::start(&data::reference("deepseek_v3"));
    node.must_serve();
    let status = tool::dsctl_json(&node, &["status"]);
    assert_eq!(status["ready"], true);
    assert_eq!(status["http_address"], node.http.to_string());
    assert_eq!(status["quic_address"], node.quic.to_string());
    let model = &status["models"][0];
    assert_eq!(
        (&model["name"], &model["state"]),
        (&json!("deepseek_v3"), &json!("ready"))
    );
    assert_eq!(model["architecture"], "deepseek_v3");
    assert!(2 <= model["n_output_tokens"].as_u64().unwrap());
    for key in [
        "context_len",
        "n_blocks",
        "n_steps",
        "bytes_mapped",
        "kv_bytes",
        "workspace_bytes",
    ] {
        assert!(0 < model[key].as_u64().unwrap(), "{key}");
    }
    let text = tool::dsctl(&node, &["status"]);
    assert_eq!(text.code, Some(0), "{text:?}");
    for part in ["ready", "deepseek_v3", &node.http.to_string()] {
        assert!(text.stdout.contains(part), "no {part} in {}", text.stdout);
    }
    // From the environment, as a shell session has it.
    let mut command = tool::command("dsctl");
    command
        .arg("status")
        .env("DSD_NODE", node.quic.to_string())
        .env("DSD_STATE", node.state());
    assert_eq!(process::run(&mut command, "").code, Some(0));
}

#[test]
fn models_in_the_store_are_listed_and_loaded_by_name() {
    let node = Node::start(&data::reference("llama"));
    let store = node.state().join("models");
    std::fs::create_dir(&store).unwrap();
    data::copy_of(&data::reference("qwen2"), &store);
    let list = tool::dsctl_json(&node, &["model", "list"]);
    let entry = |name: &str| {
        let models = list["models"].as_array().unwrap();
        models
            .iter()
            .find(|model| model["name"] == name)
            .cloned()
            .unwrap()
    };
    assert_eq!(entry("llama")["state"], "ready");
    let stored = entry("qwen2");
    assert_eq!(stored["state"], Value::Null);
    assert_eq!(
        (&stored["architecture"], &stored["format"]),
        (&json!("qwen2"), &json!("safetensors"))
    );
    let outcome = tool::dsctl(&node, &["--json", "model", "load", "qwen2"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let lines = outcome.json_lines();
    assert!(
        lines[..lines.len() - 1]
            .iter()
            .all(|line| line.get("progress").is_some()),
        "{lines:?}"
    );
    assert_eq!(lines.last().unwrap()["loaded"]["name"], "qwen2");
    let text = tool::dsctl(&node, &["model", "list"]);
    assert!(text.stdout.contains("qwen2"), "{text:?}");
}

#[test]
fn generate_gives_the_text_that_http_gives() {
    let node = Node::start(&data::smollm2());
    let prompt = "The capital of France is";
    let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0});
    let expected = node.post("/v1/completions", &body).json()["choices"][0]["text"].take();
    let expected = expected.as_str().unwrap();
    let sampling = ["--max-tokens", "8", "--temperature", "0"];
    let with = |args: &[&'static str]| [args, &sampling].concat();

    let plain = tool::dsctl(&node, &with(&["generate", "The capital of France is"]));
    assert_eq!(
        (plain.code, plain.stdout.trim_end()),
        (Some(0), expected.trim_end()),
        "{plain:?}"
    );
    let piped = process::run(
        &mut tool::dsctl_command(&node, &with(&["generate", "-"])),
        prompt,
    );
    assert_eq!(piped.stdout, plain.stdout);

    let lines = tool::dsctl(
        &node,
        &with(&["--json", "generate", "The capital of France is"]),
    )
    .json_lines();
    let (done, deltas) = lines.split_last().unwrap();
    let text: String = deltas
        .iter()
        .map(|line| line["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(text, expected);
    let n_tokens: u64 = deltas
        .iter()
        .map(|line| line["delta"]["n_tokens"].as_u64().unwrap())
        .sum();
    assert!(n_tokens <= 8);
    assert_eq!(done["done"]["n_completion_tokens"], 8);
    assert_eq!(done["done"]["finish_reason"], "length");

    let ids = tool::dsctl(
        &node,
        &with(&["generate", "--tokens", "504,3575,282,4649,314"]),
    );
    assert_eq!(ids.stdout, plain.stdout, "the same prompt as token ids");
    let chat = tool::dsctl(
        &node,
        &with(&["generate", "--chat", "What is the capital of France?"]),
    );
    assert!(chat.stdout.contains("Paris"), "{chat:?}");
    let stopped = tool::dsctl(
        &node,
        &[
            &with(&["generate", "The capital of France is"])[..],
            &["--stop", "Paris"],
        ]
        .concat(),
    );
    assert!(!stopped.stdout.contains("Paris"), "{stopped:?}");
}

#[test]
fn a_conversation_can_be_piped_in() {
    let node = Node::start(&data::smollm2());
    let mut command =
        tool::dsctl_command(&node, &["chat", "--max-tokens", "8", "--temperature", "0"]);
    let outcome = process::run(
        &mut command,
        "What is the capital of France?\n/what\n/reset\nWhat is the capital of France?\n/quit\n",
    );
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.stdout.matches("Paris").count(), 2, "{outcome:?}");
    assert!(
        outcome.stdout.contains("/what is not a command"),
        "{outcome:?}"
    );
    node.wait_until_idle();
}

#[test]
fn bench_reports_a_closed_loop_and_poisson_arrivals() {
    let node = Node::start(&data::reference("deepseek_v3"));
    let http = format!("http://{}", node.http);
    let bench = |args: &[&str]| {
        let common = [
            "bench",
            "--http",
            &http,
            "--prompt-len",
            "8",
            "--output-len",
            "12",
            "--ignore-eos",
        ];
        tool::dsctl_json(&node, &[&common, args].concat())
    };
    let check = |report: &Value, mode: &str| {
        assert_eq!(report["mode"], mode);
        assert_eq!(report["n_failed"], 0, "{report}");
        assert_eq!(report["errors"], json!({}));
        let n_ok = report["n_ok"].as_u64().unwrap();
        assert_eq!(
            report["completion_tokens"].as_u64().unwrap(),
            12 * n_ok,
            "{report}"
        );
        for key in ["ttft_ms", "itl_ms", "e2e_ms"] {
            let number = |name: &str| report[key][name].as_f64().unwrap();
            assert!(0.0 < number("p50"), "{report}");
            assert!(
                number("p50") <= number("p99") && number("p99") <= number("max"),
                "{report}"
            );
        }
        n_ok
    };
    let closed = bench(&["--requests", "24", "--concurrency", "6"]);
    assert_eq!(check(&closed, "closed"), 24);
    let chat = bench(&["--requests", "6", "--concurrency", "2", "--chat"]);
    assert_eq!(check(&chat, "closed"), 6);
    let open = bench(&["--rate", "20", "--duration", "2s", "--seed", "3"]);
    let n_ok = check(&open, "open");
    assert!((15..=80).contains(&n_ok), "{n_ok} arrivals of 40 expected");
    node.wait_until_idle();
    // A model that is not there fails every request, by code.
    let outcome = tool::dsctl(
        &node,
        &[
            "--json",
            "bench",
            "--http",
            &http,
            "--model",
            "absent",
            "--requests",
            "3",
        ],
    );
    let report = outcome.json_lines().pop().unwrap();
    assert_eq!(
        (&report["n_ok"], &report["errors"]["model_not_found"]),
        (&json!(0), &json!(3)),
        "{report}"
    );
    assert_ne!(outcome.code, Some(0));
}

#[test]
fn ctrl_c_ends_a_generation_on_the_node() {
    let node = Node::start(&data::smollm2());
    let mut child = tool::dsctl_command(
        &node,
        &["--json", "generate", "Once", "--max-tokens", "3000"],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::null())
    .spawn()
    .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("delta"), "{line}");
    process::signal(child.id(), "INT");
    assert_eq!(process::exit_of(&mut child, "dsctl").code(), Some(130));
    node.wait_until_idle();
    node.must_serve();
}

#[test]
fn completions_are_printed_for_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let mut command = tool::command("dsctl");
        let outcome = process::run(command.args(["completions", shell]), "");
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.stdout.contains("dsctl") && outcome.stdout.contains("unload"));
    }
}

#[test]
fn wrong_names_and_wrong_usage_are_refused() {
    let node = Node::start(&data::reference("llama"));
    let check = |args: &[&str], code: i32, text: &str| {
        let outcome = tool::dsctl(&node, args);
        assert_eq!(outcome.code, Some(code), "{args:?}: {outcome:?}");
        assert!(
            outcome.stderr.contains(text),
            "{args:?}: no {text:?} in {outcome:?}"
        );
    };
    check(&["generate", "-m", "absent", "x"], 1, "`absent`");
    check(
        &["generate", "--tokens", "1,two"],
        1,
        "\"two\" is not a token id",
    );
    check(&["generate", "--tokens", "99999999"], 1, "99999999");
    check(&["generate", "--temperature", "99", "x"], 1, "temperature");
    check(&["model", "unload", "absent"], 1, "`absent`");
    check(&["model", "verify", "absent"], 1, "absent");
    check(&["modle"], 1, "unrecognized subcommand");
    check(&["bench", "--http", "https://127.0.0.1:1"], 1, "http");
    let long = "1,".repeat(100_000) + "1";
    let outcome = process::run(
        &mut tool::dsctl_command(&node, &["generate", "--tokens", "-"]),
        &long,
    );
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("100001"), "{outcome:?}");
    node.must_serve();
}
