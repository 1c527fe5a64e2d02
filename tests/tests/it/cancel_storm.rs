//! Clients that leave at every moment there is: nothing of them stays behind.

use std::thread;

use dsd_tests::{data, http, node::Node, tool};
use serde_json::json;

const N_REQUESTS: u64 = 1000;
const N_CLIENTS: u64 = 20;
const MIB: u64 = 1 << 20;
/// Growth between the first and the second half that counts as none: histogram samples and pages
/// that the allocator keeps.
const GROWTH_MAX: u64 = 6 * MIB;

/// A number below `n` that follows from `seed` (splitmix64).
fn draw(seed: u64, n: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) % n
}

/// One request, left at a moment that follows from its number.
fn leave(node: &Node, request: u64) {
    let draw = |salt: u64, n: u64| draw(request * 8 + salt, n);
    let is_chat = draw(0, 2) == 0;
    let is_stream = draw(1, 3) != 0;
    let (path, prompt) = if is_chat {
        (
            "/v1/chat/completions",
            json!([{"role": "user", "content": "tell me more ".repeat(4)}]),
        )
    } else {
        (
            "/v1/completions",
            json!((0..1 + draw(2, 200)).map(|i| i % 100).collect::<Vec<_>>()),
        )
    };
    let field = if is_chat { "messages" } else { "prompt" };
    let body = json!({
        "model": node.model, field: prompt, "stream": is_stream, "max_tokens": 1 + draw(3, 400),
        "n": 1 + draw(4, 2), "ignore_eos": true, "seed": request,
    });
    let bytes = http::post_bytes(path, body.to_string().as_bytes());
    let mut connection = node.connect();
    match draw(5, 5) {
        // In the middle of the request.
        0 => {
            let n_sent = draw(6, bytes.len() as u64) as usize;
            connection.send(&bytes[..n_sent]);
        }
        // Before the answer.
        1 => connection.send(&bytes),
        // Half of the connection only, then the rest.
        2 => {
            connection.send(&bytes);
            connection.finish_sending();
        }
        // After some of the answer; a whole answer comes at its end.
        3 | 4 if is_stream => {
            connection.send(&bytes);
            let head = connection.head();
            assert!(matches!(head.status, 200 | 429), "{head:?}");
            for _ in 0..draw(7, 30) {
                if !matches!(connection.chunk(), Ok(Some(_))) {
                    break;
                }
            }
        }
        _ => {
            connection.send(&bytes);
            if draw(6, 3) == 0 {
                let reply = connection.reply();
                assert!(matches!(reply.status, 200 | 429), "{reply:?}");
            }
        }
    }
}

fn storm(node: &Node, requests: std::ops::Range<u64>) {
    thread::scope(|scope| {
        for client in 0..N_CLIENTS {
            let requests = requests.clone();
            scope.spawn(move || {
                for request in requests.filter(|request| request % N_CLIENTS == client) {
                    leave(node, request);
                }
            });
        }
    });
    node.wait_until_idle();
}

#[test]
fn a_thousand_clients_that_leave_take_everything_with_them() {
    // Small enough for preemptions to be part of it.
    let node = Node::builder(&data::reference("deepseek_v3"))
        .env("DSD_ENGINE__KV_TOKENS", 2048)
        .start();
    storm(&node, 0..N_REQUESTS / 2);
    let half = node.memory_bytes("RssAnon");
    storm(&node, N_REQUESTS / 2..N_REQUESTS);
    let whole = node.memory_bytes("RssAnon");
    assert!(
        whole < half + GROWTH_MAX,
        "RssAnon went from {half} to {whole} bytes"
    );

    node.must_serve();
    let status = tool::dsctl_json(&node, &["status"]);
    let model = &status["models"][0];
    for key in ["n_running", "n_waiting", "n_blocks_used"] {
        assert_eq!(model[key], 0, "{status}");
    }
    assert!(0 < model["n_preemptions"].as_u64().unwrap(), "{status}");
    // The node saw them leave, and sends nothing to anybody.
    let metrics = node.get("/metrics").body;
    assert!(
        metrics.lines().any(|line| line == "dsd_http_streams 0"),
        "{metrics}"
    );
    let cancelled = metrics.lines().find(|line| {
        line.starts_with("dsd_generations_total") && line.contains("end=\"cancelled\"")
    });
    let n_cancelled: u64 = cancelled
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(N_REQUESTS / 4 < n_cancelled, "{n_cancelled} were cancelled");
}
