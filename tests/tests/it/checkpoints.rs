//! Checkpoints with something amiss that costs less than the model.

use std::fs;

use dsd_tests::{data, node::Node};
use serde_json::json;
use tempfile::TempDir;

/// The whole model was refused.
#[test]
fn a_template_that_does_not_compile_costs_chat_alone() {
    let folder = TempDir::new().unwrap();
    let model = data::copy_of(&data::reference("qwen3"), folder.path());
    fs::write(model.join("chat_template.jinja"), "{% for %}").unwrap();
    let node = Node::builder(&model)
        .allow("the chat template does not compile")
        .start();
    assert!(
        node.logged("the chat template does not compile: no chat, completions alone")
            .is_some()
    );
    assert_eq!(node.get("/ready").status, 200);
    let body = json!({"prompt": "Hello", "max_tokens": 2});
    let reply = node.post("/v1/completions", &body);
    assert_eq!(reply.status, 200, "{reply:?}");
    let body = json!({"messages": [{"role": "user", "content": "Hello"}]});
    let reply = node.post("/v1/chat/completions", &body);
    reply.must_be_error(400, "invalid_request", Some("messages"));
    let message = reply.json()["error"]["message"].to_string();
    for part in [
        "chat template does not compile",
        "syntax error",
        "completions",
    ] {
        assert!(message.contains(part), "{message}");
    }
    node.must_serve();
}
