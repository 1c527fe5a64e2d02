//! Programs that people have, unmodified, against a node: the suites of `tests/python/clients` and
//! `tests/node`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use dsd_tests::{data, node::Node, process};

/// Runs a suite against a node with `model`; afterwards nothing may be left of it.
fn check(suite: &mut Command, model: &Path, more: &[&Path]) {
    let node = Node::builder(model).start();
    suite
        .args([&format!("http://{}", node.http), &node.model])
        .args(more)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        // Nothing but the node is asked, and nobody is told of it.
        .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        .env("HF_HUB_OFFLINE", "1");
    let outcome = process::run(suite, "");
    let words = format!("{}\n{}", outcome.stdout, outcome.stderr);
    assert_eq!(outcome.code, Some(0), "{words}");
    node.wait_until_idle();
}

/// A suite in Python, with the packages of its client.
fn python(client: &str) -> Command {
    let name = format!("{}_client.py", client.replace('-', "_"));
    let mut command = Command::new("python3");
    command
        .arg(folder("python/clients").join(name))
        .env("PYTHONPATH", data::client(client));
    command
}

/// A suite for Node.js.
fn node(name: &str) -> Command {
    let mut command = Command::new("node");
    command
        .arg(folder("node").join(name))
        .env("NODE_PATH", data::client("npm").join("node_modules"));
    command
}

fn folder(name: &str) -> PathBuf {
    data::repository().join("tests").join(name)
}

/// By a checkpoint with a tokenizer that the client reads, too.
#[test]
fn lm_eval_is_served() {
    let model = data::reference("deepseek_v3");
    check(&mut python("lm-eval"), &model, &[&model]);
}

#[test]
fn litellm_is_served() {
    check(&mut python("litellm"), &data::smollm2(), &[]);
}

#[test]
fn langchain_is_served() {
    check(&mut python("langchain"), &data::smollm2(), &[]);
}

#[test]
fn instructor_is_served() {
    check(&mut python("instructor"), &data::smollm2(), &[]);
}

#[test]
fn pydantic_ai_is_served() {
    check(&mut python("pydantic-ai"), &data::smollm2(), &[]);
}

#[test]
fn llama_index_is_served() {
    check(&mut python("llama-index"), &data::smollm2(), &[]);
}

#[test]
fn the_llm_command_is_served() {
    check(&mut python("llm"), &data::smollm2(), &[]);
}

#[test]
fn openai_for_node_is_served() {
    check(&mut node("openai.cjs"), &data::smollm2(), &[]);
}

#[test]
fn ai_sdk_is_served() {
    check(&mut node("ai_sdk.cjs"), &data::smollm2(), &[]);
}
