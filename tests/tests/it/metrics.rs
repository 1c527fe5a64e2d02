//! `/metrics` of a real node: what is there from the start, what it is called, and whether it is true.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
};

use dsd_tests::{data, node::Node, tool, wait};
use serde_json::json;
use tempfile::TempDir;

/// Every series with its value.
fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.rsplit_once(' '));
    pairs
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

/// Names of metrics of a type.
fn of_type(text: &str, kind: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let named = types.filter_map(|line| line.split_once(' '));
    named
        .filter(|(_, found)| *found == kind)
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// A rate over a counter that appears with its first event misses that event.
#[test]
fn counters_are_there_from_the_start() {
    let folder = TempDir::new().unwrap();
    let keys = folder.path().join("keys");
    fs::write(&keys, "sk-0123456789abcdef\n").unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    let model = data::reference("llama");
    let text = format!(
        "version = 1\n[http]\napi_keys_file = {keys:?}\n\
         [[models]]\nname = \"llama\"\npath = {model:?}\n\
         [[models]]\nname = \"absent\"\npath = \"/nonexistent\"\nrequired = false\n"
    );
    let node = Node::builder(&model)
        .configuration(&text)
        .allow("model not loaded")
        .spawn();
    let first = node.get("/metrics").body;
    let before = series(&first);
    for expected in [
        "dsd_refusals_total{model=\"absent\",reason=\"too_late\"}",
        "dsd_requests_finished_total{model=\"llama\",reason=\"stop\"}",
        "dsd_tenant_tokens_total{tenant=\"default\",kind=\"output\"}",
        "dsd_tenant_refusals_total{tenant=\"default\",reason=\"busy\"}",
        "dsd_tenant_reloads_total{result=\"failed\"}",
        "dsd_http_bodies_refused_total{cause=\"stalled\"}",
        "dsd_time_to_first_token_seconds_count{model=\"llama\"}",
        "vllm:request_success_total{model_name=\"llama\",engine=\"0\",finished_reason=\"abort\"}",
    ] {
        assert_eq!(before.get(expected), Some(&0.0), "{expected}\n{first}");
    }
    wait::until_true("/ready", || node.get("/ready").status == 200);
    let mut connection = node.connect();
    let body = json!({"model": "llama", "prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": true});
    let body = body.to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n\
         authorization: Bearer sk-0123456789abcdef\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.send(request.as_bytes());
    assert_eq!(connection.reply().status, 200);
    wait::until_true("all counts", || {
        let now = series(&node.get("/metrics").body);
        now["dsd_tokens_generated_total{model=\"llama\"}"] == 3.0
            && now["dsd_tenant_requests_total{tenant=\"default\"}"] == 1.0
    });
    let last = node.get("/metrics").body;
    let counters = of_type(&last, "counter");
    let missed: Vec<String> = series(&last)
        .into_keys()
        .filter(|name| counters.contains(name.split('{').next().unwrap()))
        // Statuses are an open set.
        .filter(|name| !name.starts_with("dsd_http_requests_total"))
        .filter(|name| !before.contains_key(name))
        .collect();
    assert!(missed.is_empty(), "{missed:?}");
}

/// What vLLM's own board asks for, under its names and labels, is there and agrees with the node's.
#[test]
fn a_board_for_vllm_shows_this_node() {
    let node = Node::start(&data::reference("llama"));
    for n in [1, 2] {
        let body = json!({"prompt": [1, 2, 3, 4], "max_tokens": 5, "ignore_eos": true, "n": n});
        assert_eq!(node.post("/v1/completions", &body).status, 200);
    }
    let labels = format!("model_name=\"{}\",engine=\"0\"", node.model);
    let mut text = String::new();
    wait::until_true("all counts", || {
        text = node.get("/metrics").body;
        series(&text)[&format!("vllm:request_generation_tokens_count{{{labels}}}")] == 3.0
    });
    let found = series(&text);
    let value = |name: &str, more: &str| {
        let name = format!("{name}{{{labels}{more}}}");
        *found
            .get(&name)
            .unwrap_or_else(|| panic!("no {name}\n{text}"))
    };
    for (name, more, expected) in [
        ("vllm:num_requests_running", "", 0.0),
        ("vllm:num_requests_waiting", "", 0.0),
        ("vllm:kv_cache_usage_perc", "", 0.0),
        ("vllm:num_preemptions_total", "", 0.0),
        ("vllm:generation_tokens_total", "", 15.0),
        (
            "vllm:request_success_total",
            ",finished_reason=\"length\"",
            3.0,
        ),
        (
            "vllm:request_success_total",
            ",finished_reason=\"abort\"",
            0.0,
        ),
        ("vllm:request_prompt_tokens_sum", "", 12.0),
        ("vllm:request_prompt_tokens_bucket", ",le=\"2.0\"", 0.0),
        ("vllm:request_prompt_tokens_bucket", ",le=\"5.0\"", 3.0),
        ("vllm:request_generation_tokens_sum", "", 15.0),
        ("vllm:request_max_num_generation_tokens_sum", "", 10.0),
        ("vllm:request_params_n_sum", "", 3.0),
        ("vllm:request_params_max_tokens_bucket", ",le=\"+Inf\"", 2.0),
        ("vllm:time_to_first_token_seconds_count", "", 3.0),
        (
            "vllm:time_to_first_token_seconds_bucket",
            ",le=\"2560.0\"",
            3.0,
        ),
        ("vllm:inter_token_latency_seconds_count", "", 12.0),
        ("vllm:time_per_output_token_seconds_count", "", 12.0),
        ("vllm:request_time_per_output_token_seconds_count", "", 3.0),
        ("vllm:e2e_request_latency_seconds_count", "", 3.0),
        ("vllm:request_queue_time_seconds_count", "", 3.0),
        ("vllm:request_prefill_time_seconds_count", "", 3.0),
        ("vllm:request_decode_time_seconds_count", "", 3.0),
        (
            "vllm:request_inference_time_seconds_bucket",
            ",le=\"7680.0\"",
            3.0,
        ),
    ] {
        assert_eq!(value(name, more), expected, "{name}{more}\n{text}");
    }
    // Phases add up, and lie within the whole.
    let sum = |name: &str| value(&format!("vllm:{name}_seconds_sum"), "");
    let phases = sum("request_prefill_time") + sum("request_decode_time");
    let inference = sum("request_inference_time");
    assert!((phases - inference).abs() < 1e-6, "{phases} {inference}");
    let outside = sum("request_queue_time") + inference;
    assert!(outside <= sum("e2e_request_latency"), "{text}");
    assert!(0.0 < value("vllm:iteration_tokens_total_count", ""));
    for (name, kind) in [
        ("vllm:prompt_tokens_total", "counter"),
        ("vllm:kv_cache_usage_perc", "gauge"),
        ("vllm:iteration_tokens_total", "histogram"),
    ] {
        assert!(of_type(&text, kind).contains(name), "{name}");
    }
}

/// Its report follows the first step, which used to count as a wait for it.
#[test]
fn the_queue_ends_where_the_first_step_begins() {
    let node = Node::start(&data::smollm2());
    let words = "word ".repeat(400);
    let args = ["generate", &words, "--max-tokens", "1"];
    let done = tool::dsctl_json(&node, &args)["done"].take();
    let ms = |key: &str| done[key].as_u64().unwrap();
    let (queued, first) = (ms("queue_ms"), ms("ttft_ms"));
    // The one step of an idle node takes all the time there is but for the tokenizer's.
    assert!(4 * queued < first, "{done}");
}
