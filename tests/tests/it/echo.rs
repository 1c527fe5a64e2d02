//! Log-probabilities of prompts, as harnesses ask for them: those that `dsd eval` finds, however they come
//! to be computed.

use std::{fs, thread};

use dsd_tests::{
    data,
    node::{Node, NodeBuilder},
    process, tool, wait,
};
use serde_json::{Value, json};

const TEXT: &str = "The capital of France is Paris. It lies on the Seine, and has been the seat of kings, \
     of emperors and of presidents. Whoever walks along the river sees most of what they built.";

fn node(n_ranks: usize) -> NodeBuilder {
    Node::builder(&data::smollm2())
        .env("DSD_ENGINE__TP", n_ranks)
        // Beside other tests a prompt takes its time.
        .env("DSD_SERVICE__TTFT_TARGET_S", 3600)
}

fn request(prompt: &Value) -> Value {
    json!({"prompt": prompt, "echo": true, "max_tokens": 0, "logprobs": 2})
}

/// Log-probabilities of a prompt as they were written; none of its first token.
fn scores(reply: &dsd_tests::http::Reply) -> Vec<String> {
    assert_eq!(reply.status, 200, "{reply:?}");
    let logprobs = &reply.json()["choices"][0]["logprobs"];
    let list = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(list[0], Value::Null);
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), list.len());
    list[1..].iter().map(Value::to_string).collect()
}

fn ask(node: &Node, prompt: &Value) -> Vec<String> {
    scores(&node.post("/v1/completions", &request(prompt)))
}

#[test]
fn an_echo_has_the_numbers_of_eval_on_one_rank_and_on_two() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text");
    fs::write(&file, TEXT).unwrap();
    let model = data::smollm2();
    let outcome = tool::dsd(&[
        "eval",
        "perplexity",
        "--model",
        model.to_str().unwrap(),
        "--text",
        file.to_str().unwrap(),
    ]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let eval = outcome.json_lines().remove(0);
    let mut of_ranks = Vec::new();
    for n_ranks in [1, 2] {
        let node = node(n_ranks).start();
        let alone = ask(&node, &json!(TEXT));
        let numbers: Vec<f64> = alone.iter().map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers.len(), eval["scored"]);
        let mean = -numbers.iter().sum::<f64>() / numbers.len() as f64;
        let expected = eval["mean_nll"].as_f64().unwrap();
        assert!((mean - expected).abs() < 1e-5, "{mean}, eval {expected}");
        assert_eq!(
            ask(&node, &json!(TEXT)),
            alone,
            "with what the cache has of it"
        );
        // Beside others, with which it shares steps of other sizes.
        thread::scope(|scope| {
            let crowd: Vec<_> = (0..6)
                .map(|n| {
                    let prompt = json!(format!("{}{TEXT}", "Well. ".repeat(n)));
                    let node = &node;
                    scope.spawn(move || ask(node, &prompt))
                })
                .collect();
            let crowd: Vec<_> = crowd.into_iter().map(|one| one.join().unwrap()).collect();
            assert_eq!(crowd[0], alone);
        });
        node.wait_until_idle();
        of_ranks.push(numbers);
    }
    // Sums are cut in another way, which shows in their last bits.
    for (one, two) in of_ranks[0].iter().zip(&of_ranks[1]) {
        assert!((one - two).abs() < 1e-3, "{one} on one rank, {two} on two");
    }
}

#[test]
fn an_echo_survives_its_rank_with_the_same_numbers() {
    let node = node(1).allow("group lost").start();
    // Long enough to be under way when its rank goes.
    let prompt = json!(TEXT.repeat(12));
    let undisturbed = ask(&node, &prompt);
    let disturbed = thread::scope(|scope| {
        let asked = scope.spawn(|| ask(&node, &prompt));
        wait::until_true("it runs", || node.model_status()["n_running"] == 1);
        let forming = wait::until("a group", || node.logged("group forming"));
        let pids: Vec<u32> = serde_json::from_str(forming["pids"].as_str().unwrap()).unwrap();
        process::signal(pids[0], "KILL");
        asked.join().unwrap()
    });
    let lost = wait::until("the loss", || node.logged("group lost"));
    assert_eq!(lost["n_kept"], 1, "{lost}");
    assert_eq!(disturbed.len(), undisturbed.len());
    assert_eq!(disturbed, undisturbed);
    node.wait_until_idle();
}
