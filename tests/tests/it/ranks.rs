//! Groups of rank processes: what they compute, and what happens when one is lost.

use std::{fs, path::PathBuf};

use dsd_tests::{
    data,
    http::{Connection, post_bytes},
    node::{Node, NodeBuilder},
    process, tool, wait,
};
use serde_json::{Value, json};

/// Long enough that a rank is lost in the middle of it.
const N_TOKENS: usize = 3000;

fn node(n_ranks: usize) -> NodeBuilder {
    Node::builder(&data::reference("deepseek_v3"))
        .env("DSD_ENGINE__TP", n_ranks)
        .env("DSD_ENGINE__STEP_TIMEOUT_S", 2)
}

/// Processes of the group of this epoch.
fn pids(node: &Node, epoch: u64) -> Vec<u32> {
    let forming = wait::until("a group", || {
        let forming = node.records("group forming");
        forming.into_iter().find(|record| record["epoch"] == epoch)
    });
    let pids = forming["pids"].as_str().unwrap();
    serde_json::from_str(pids).unwrap()
}

fn request() -> Value {
    json!({
        "prompt": [5, 6, 7, 8], "max_tokens": N_TOKENS, "ignore_eos": true, "temperature": 0.9,
        "seed": 11, "stream": true, "frequency_penalty": 0.1,
    })
}

/// A stream whose first bytes have arrived, and those.
fn begin(node: &Node) -> (Connection, Vec<u8>) {
    let mut stream = node.connect();
    let body = serde_json::to_vec(&request()).unwrap();
    stream.send(&post_bytes("/v1/completions", &body));
    assert_eq!(stream.head().status, 200);
    let first = stream.chunk().unwrap().unwrap();
    (stream, first)
}

/// The text of a stream that ended as it should.
fn text_of((mut stream, mut bytes): (Connection, Vec<u8>)) -> String {
    while let Some(chunk) = stream.chunk().unwrap() {
        bytes.extend(chunk);
    }
    let lines = String::from_utf8(bytes).unwrap();
    let events = lines.lines().filter_map(|line| line.strip_prefix("data: "));
    let (mut text, mut finish, mut is_done) = (String::new(), Value::Null, false);
    for event in events {
        if event == "[DONE]" {
            is_done = true;
            continue;
        }
        let choice = serde_json::from_str::<Value>(event).unwrap()["choices"][0].take();
        text.push_str(choice["text"].as_str().unwrap_or_default());
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    assert!(is_done && finish == "length", "{finish}");
    text
}

/// One stream with nothing in its way, and one whose group loses a rank by `signal`.
fn check_loss(rank: usize, signal: &str, blame: &str) {
    let node = node(2)
        .allow("group lost")
        .allow("a step failed with its group")
        .allow("the canary step failed")
        .start();
    let undisturbed = text_of(begin(&node));
    let stream = begin(&node);
    process::signal(pids(&node, 1)[rank], signal);
    assert_eq!(text_of(stream), undisturbed, "the same bytes");
    let lost = node.logged("group lost").unwrap();
    assert_eq!(lost["rank"], rank, "{lost}");
    let what = lost["what"].as_str().unwrap();
    assert!(what.contains(blame), "{what}");
    assert_eq!(lost["n_kept"], 1, "{lost}");
    assert_eq!(node.get("/ready").status, 200);
    node.must_serve();
    node.wait_until_idle();
    let metrics = node.get("/metrics").body;
    let losses = format!("dsd_group_losses_total{{model=\"{}\"}} 1", node.model);
    assert!(metrics.lines().any(|line| line == losses), "{metrics}");
}

#[test]
fn a_killed_follower_is_a_pause_and_the_stream_goes_on_with_the_same_bytes() {
    check_loss(1, "KILL", "rank 1 was killed by signal 9 at ");
}

#[test]
fn a_killed_first_rank_is_a_pause_and_the_stream_goes_on_with_the_same_bytes() {
    check_loss(0, "KILL", "rank 0 was killed by signal 9");
}

#[test]
fn a_frozen_follower_is_noticed_by_the_step_deadline_and_named() {
    check_loss(1, "STOP", "rank 1 did not arrive within 2.");
}

#[test]
fn a_frozen_first_rank_is_noticed() {
    check_loss(0, "STOP", "rank 0 ");
}

#[test]
fn a_request_that_ran_in_two_lost_groups_is_given_up_and_others_are_not() {
    let node = node(1)
        .allow("group lost")
        .allow("a generation failed")
        .start();
    let (mut stream, _) = begin(&node);
    process::signal(pids(&node, 1)[0], "KILL");
    // It runs in the second group before that is lost as well.
    wait::until_true("the stream to go on", || {
        !node.records("group ready").iter().all(|r| r["epoch"] == 1)
            && stream.chunk().unwrap().is_some()
    });
    process::signal(pids(&node, 2)[0], "KILL");
    let mut rest = Vec::new();
    while let Ok(Some(chunk)) = stream.chunk() {
        rest.extend(chunk);
    }
    let rest = String::from_utf8(rest).unwrap();
    assert!(
        rest.contains("the model failed while it was answering"),
        "{rest}"
    );
    wait::until_true("the loss in the log", || {
        let lost = node.records("group lost");
        lost.iter().any(|record| record["n_given_up"] == 1)
    });
    pids(&node, 3);
    wait::until_true("the third group", || node.get("/ready").status == 200);
    node.must_serve();
}

#[test]
fn two_ranks_answer_as_one_does() {
    let one = Node::start(&data::reference("qwen3_moe"));
    let two = Node::builder(&data::reference("qwen3_moe"))
        .env("DSD_ENGINE__TP", 2)
        .start();
    let body = json!({"prompt": [1, 2, 3], "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let text =
        |node: &Node| node.post("/v1/completions", &body).json()["choices"][0]["text"].take();
    assert_eq!(text(&one), text(&two));
}

#[test]
fn tokens_of_two_and_four_ranks_are_those_of_one() {
    for model in [
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v2_lite",
        "deepseek_v3",
        "deepseek_v3_fp8",
    ] {
        let folder = data::reference(model);
        let tokens = |n_ranks: &str| {
            let outcome = tool::dsd(&[
                "eval",
                "greedy",
                "--model",
                folder.to_str().unwrap(),
                "--tokens",
                "9,8,7,6,5",
                "--max-new",
                "12",
                "--threads",
                "1",
                "--tp",
                n_ranks,
            ]);
            assert_eq!(outcome.code, Some(0), "{model}: {outcome:?}");
            outcome.json_lines().remove(0)
        };
        let one = tokens("1");
        assert_eq!(tokens("2"), one, "{model}");
        assert_eq!(tokens("4"), one, "{model}");
    }
}

#[test]
fn more_ranks_than_heads_are_refused_with_the_numbers() {
    let folder = data::reference("llama");
    let outcome = tool::dsd(&[
        "eval",
        "greedy",
        "--model",
        folder.to_str().unwrap(),
        "--tokens",
        "1",
        "--max-new",
        "1",
        "--tp",
        "33",
    ]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let expected = "33 ranks cannot share";
    assert!(outcome.stderr.contains(expected), "{outcome:?}");
}

#[test]
fn a_reader_that_leaves_frees_its_blocks_on_every_group() {
    let node = node(2).start();
    for _ in 0..3 {
        let (stream, _) = begin(&node);
        drop(stream);
    }
    node.wait_until_idle();
}

#[test]
fn ranks_end_with_their_agent() {
    let mut node = node(2).start();
    let pids = pids(&node, 1);
    process::signal(node.pid(), "KILL");
    node.exit();
    for pid in pids {
        let stat = PathBuf::from(format!("/proc/{pid}/stat"));
        wait::until_true("a rank to end", || {
            // A zombie waits for whoever inherited it.
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
    }
}
