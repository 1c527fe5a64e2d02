//! The official `openai` and `anthropic` Python packages, unmodified, against a node.

use std::process::Command;

use dsd_tests::{
    data,
    node::{Node, NodeBuilder},
    process,
};

/// Runs a group of `tests/python/client.py`; afterwards nothing may be left of it.
fn check(node: NodeBuilder, group: &str) {
    let node = node.start();
    let mut command = Command::new("python3");
    command
        .arg(data::repository().join("tests/python/client.py"))
        .args([&format!("http://{}/v1", node.http), &node.model, group])
        .env("PYTHONPATH", data::python_path())
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let outcome = process::run(&mut command, "");
    assert_eq!(
        outcome.code,
        Some(0),
        "{}\n{}",
        outcome.stdout,
        outcome.stderr
    );
    node.wait_until_idle();
}

fn tiny() -> NodeBuilder {
    Node::builder(&data::reference("deepseek_v3"))
}

#[test]
fn the_official_client_gets_answers() {
    check(tiny(), "Answers");
}

#[test]
fn the_official_client_gets_thoughts_apart_from_content() {
    check(tiny(), "Thoughts");
}

#[test]
fn the_official_client_gets_answers_of_real_weights() {
    check(Node::builder(&data::smollm2()), "Knowledge");
}

#[test]
fn the_official_client_calls_tools_and_parses_answers() {
    check(Node::builder(&data::smollm2()), "Tools");
}

#[test]
fn the_official_client_gets_responses() {
    check(Node::builder(&data::smollm2()), "Responses");
}

#[test]
fn the_official_client_gets_errors_as_its_own_classes() {
    let queue = tiny()
        .env("DSD_ENGINE__RUNNING_MAX", 1)
        .env("DSD_ENGINE__WAITING_MAX", 1)
        // The count refuses, not the prediction.
        .env("DSD_SERVICE__TTFT_TARGET_S", 3600);
    check(queue, "Errors");
}

#[test]
fn closing_a_stream_of_the_official_client_frees_its_sequence() {
    check(tiny(), "Cancels");
}

#[test]
fn sixteen_clients_at_once_get_what_each_gets_alone() {
    check(tiny(), "Crowd");
}

/// Anthropic's client, unmodified, at its own door.
#[test]
fn anthropics_client_gets_answers_calls_and_errors() {
    let node = Node::builder(&data::smollm2()).start();
    let mut command = Command::new("python3");
    command
        .arg(data::repository().join("tests/python/anthropic_client.py"))
        .args([&format!("http://{}/anthropic", node.http), &node.model])
        .env("PYTHONPATH", data::anthropic_path())
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let outcome = process::run(&mut command, "");
    let words = format!("{}\n{}", outcome.stdout, outcome.stderr);
    assert_eq!(outcome.code, Some(0), "{words}");
    node.wait_until_idle();
}
