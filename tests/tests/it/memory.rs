//! What a node takes up is what its plan says.

use dsd_tests::{data, node::Node, tool};
use serde_json::json;

const MIB: u64 = 1 << 20;
/// Programs, tokenizer, threads, connections: everything that is no weight, KV or workspace.
const REST_MAX: u64 = 150 * MIB;

#[test]
fn a_real_model_takes_its_file_its_kv_cache_and_little_more() {
    let node = Node::builder(&data::smollm2())
        .env("DSD_ENGINE__KV_TOKENS", 2048)
        .start();
    let file_len = std::fs::metadata(data::smollm2()).unwrap().len();
    let model = tool::dsctl_json(&node, &["status"])["models"][0].take();
    let bytes = |key: &str| model[key].as_u64().unwrap();
    assert_eq!(bytes("bytes_mapped"), file_len);
    assert!(
        0 < bytes("workspace_bytes") && bytes("workspace_bytes") < 64 * MIB,
        "{model}"
    );
    let after_ready = node.memory_bytes("RssAnon");

    // A prompt that fills most of the cache, so that its pages are there.
    let n_prompt = bytes("context_len") - 16;
    let prompt: Vec<u64> = (0..n_prompt).map(|i| 1000 + i % 500).collect();
    let body = json!({"prompt": prompt, "max_tokens": 8, "ignore_eos": true});
    let reply = node.post("/v1/completions", &body);
    assert_eq!(reply.status, 200, "{reply:?}");

    let rss = node.memory_bytes("VmRSS");
    let plan = file_len + bytes("kv_bytes");
    assert!(
        rss <= plan + REST_MAX,
        "{rss} bytes resident, {plan} planned for weights and KV"
    );
    // KV and workspace were taken before READY.
    let grown = node.memory_bytes("RssAnon").saturating_sub(after_ready);
    assert!(
        grown < bytes("kv_bytes") + bytes("workspace_bytes") + 32 * MIB,
        "grew by {grown}"
    );
}
