//! What a node takes up is what its plan says.

use std::thread;

use dsd_tests::{data, node::Node, tool};
use serde_json::json;

const MIB: u64 = 1 << 20;
/// Growth of the peak by prompts of any length: a few copies of the longest body (4 MiB) and one
/// stretch of 256 KiB being tokenised. Encoded whole, four such prompts took 1 GB.
const PROMPTS_MAX: u64 = 200 * MIB;
/// What of it may stay with the allocator.
const PROMPTS_KEPT_MAX: u64 = 100 * MIB;
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
    // All of the file's tensors, in panels as large as they are; not its tokenizer.
    let n_weights = bytes("bytes_mapped");
    assert!(
        n_weights <= file_len && file_len - n_weights < 4 * MIB,
        "{n_weights} bytes of weights in a file of {file_len}"
    );
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

    let rss = node.proportional_bytes();
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

#[test]
fn the_longest_prompts_take_little_more_than_their_bodies() {
    let node = Node::builder(&data::smollm2())
        .env("DSD_ENGINE__KV_TOKENS", 2048)
        .start();
    let peak = node.memory_bytes("VmHWM");
    let after_ready = node.memory_bytes("RssAnon");
    let line = "the quick brown fox jumps over the lazy dog, and 42 things (really) happened.\n";
    let prose = line.repeat((4 * MIB as usize - 64 * 1024) / line.len());
    // Short enough not to be refused by its length, and without a place to cut.
    let digits = "9".repeat(128 * 1024);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let chat = json!({"messages": [{"role": "user", "content": prose}]});
                let completion = json!({"prompt": prose});
                let whole = json!({"prompt": digits});
                for (path, body) in [
                    ("/v1/chat/completions", &chat),
                    ("/v1/completions", &completion),
                    ("/v1/completions", &whole),
                ] {
                    let reply = node.post(path, body);
                    assert_eq!(reply.status, 400, "{reply:?}");
                    assert!(reply.body.contains("context_length_exceeded"), "{reply:?}");
                }
            });
        }
    });
    let grown = node.memory_bytes("VmHWM") - peak;
    assert!(grown < PROMPTS_MAX, "the peak grew by {grown} bytes");
    let kept = node.memory_bytes("RssAnon").saturating_sub(after_ready);
    assert!(kept < PROMPTS_KEPT_MAX, "{kept} bytes stayed");
    node.must_serve();
}
