//! One prompt, one answer: offline, served, streamed, in a crowd and after preemptions.

use std::{path::Path, thread};

use dsd::{
    text::{PromptForm, TextModel},
    weights::Checkpoint,
};
use dsd_tests::{
    data,
    http::{self, Connection},
    node::Node,
    tool, wait,
};
use serde_json::{Value, json};

const N_OTHERS: usize = 12;

/// A prompt and its greedy continuation by `dsd eval greedy`.
struct Case {
    prompt: Vec<u32>,
    text: String,
    token_names: Vec<String>,
}

impl Case {
    fn new(model: &Path, text_model: &TextModel, prompt: Vec<u32>, n_tokens: usize) -> Self {
        let ids = prompt
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let model = model.to_str().unwrap();
        let n = n_tokens.to_string();
        let outcome = tool::dsd(&[
            "eval",
            "greedy",
            "--model",
            model,
            "--tokens",
            &ids,
            "--max-new",
            &n,
            "--threads",
            "2",
        ]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let tokens: Vec<u32> =
            serde_json::from_value(outcome.json_lines()[0]["tokens"].clone()).unwrap();
        assert_eq!(tokens.len(), n_tokens);
        let name = |id: &u32| {
            let bytes = text_model.token_bytes(*id).unwrap_or_default();
            let escaped = || {
                bytes
                    .iter()
                    .map(|byte| format!("\\x{byte:02x}"))
                    .collect::<String>()
            };
            str::from_utf8(bytes).map_or_else(|_| format!("bytes:{}", escaped()), str::to_owned)
        };
        Self {
            prompt,
            text: text_model.decode(&tokens, true),
            token_names: tokens.iter().map(name).collect(),
        }
    }

    fn request(&self, is_stream: bool) -> Value {
        json!({
            "prompt": self.prompt, "max_tokens": self.token_names.len(), "temperature": 0,
            "ignore_eos": true, "logprobs": 1, "stream": is_stream,
        })
    }

    /// Asks the node, streamed or not, and returns the log-probabilities as they were written.
    fn ask(&self, node: &Node, is_stream: bool) -> Vec<String> {
        let reply = node.post("/v1/completions", &self.request(is_stream));
        assert_eq!(reply.status, 200, "{reply:?}");
        let answers = if is_stream {
            reply.events()
        } else {
            vec![reply.json()]
        };
        let mut text = String::new();
        let (mut names, mut logprobs) = (Vec::new(), Vec::new());
        for choice in answers.iter().map(|answer| &answer["choices"][0]) {
            text.push_str(choice["text"].as_str().unwrap());
            let list = |key: &str| {
                choice["logprobs"][key]
                    .as_array()
                    .cloned()
                    .unwrap_or_default()
            };
            names.extend(
                list("tokens")
                    .iter()
                    .map(|name| name.as_str().unwrap().to_owned()),
            );
            logprobs.extend(list("token_logprobs").iter().map(Value::to_string));
        }
        assert_eq!(
            names, self.token_names,
            "stream {is_stream}, prompt {:?}",
            self.prompt
        );
        assert_eq!(
            text, self.text,
            "stream {is_stream}, prompt {:?}",
            self.prompt
        );
        assert_eq!(logprobs.len(), names.len());
        logprobs
    }
}

fn text_model(model: &Path) -> TextModel {
    TextModel::from_checkpoint(&Checkpoint::open(model).unwrap()).unwrap()
}

/// The prompts that the tiny checkpoint's goldens were made with.
fn golden_cases(model: &Path, n_tokens: usize) -> Vec<Case> {
    let golden = std::fs::read_to_string(model.join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let text_model = text_model(model);
    let prompts = golden["prompts"].as_array().unwrap();
    let ids = prompts
        .iter()
        .map(|p| serde_json::from_value(p["ids"].clone()).unwrap());
    ids.map(|ids| Case::new(model, &text_model, ids, n_tokens))
        .collect()
}

/// Streams that go on while the returned connections live.
fn crowd(node: &Node, n_tokens: usize) -> Vec<Connection> {
    let crowd = (0..N_OTHERS).map(|i| {
        let prompt: Vec<usize> = (0..1 + 9 * i).map(|j| (7 * i + j) % 90).collect();
        let body = json!({
            "prompt": prompt, "max_tokens": n_tokens, "stream": true, "ignore_eos": true,
            "temperature": 1.0, "seed": i,
        });
        let mut connection = node.connect();
        connection.send(&http::post_bytes(
            "/v1/completions",
            body.to_string().as_bytes(),
        ));
        connection
    });
    let crowd: Vec<_> = crowd.collect();
    wait::until_true("the crowd runs", || {
        node.model_status()["n_running"] == N_OTHERS
    });
    crowd
}

fn check_alone_and_in_a_crowd(model: &Path, cases: &[Case], n_tokens_of_others: usize) {
    // Room for the whole crowd: nobody is preempted here.
    let kv_tokens = (N_OTHERS + 1) * (n_tokens_of_others + 256);
    let node = Node::builder(model)
        .env("DSD_ENGINE__KV_TOKENS", kv_tokens)
        .start();
    let alone: Vec<_> = cases.iter().map(|case| case.ask(&node, false)).collect();
    for (case, alone) in cases.iter().zip(&alone) {
        assert_eq!(&case.ask(&node, true), alone, "log-probabilities, streamed");
    }
    let crowd = crowd(&node, n_tokens_of_others);
    for (i, (case, alone)) in cases.iter().zip(&alone).enumerate() {
        assert_eq!(
            &case.ask(&node, i % 2 == 0),
            alone,
            "log-probabilities, in a crowd"
        );
    }
    // The count of the last case's end may lag behind its answer.
    wait::until_true("the crowd still runs", || {
        node.model_status()["n_running"] == N_OTHERS
    });
    drop(crowd);
    node.wait_until_idle();
}

/// All cases several times at once in a KV cache that holds only few of them.
fn check_preempted(model: &Path, cases: &[Case]) {
    let node = Node::builder(model)
        .env("DSD_ENGINE__KV_TOKENS", 384)
        .start();
    let alone: Vec<_> = cases.iter().map(|case| case.ask(&node, false)).collect();
    thread::scope(|scope| {
        for i in 0..12 {
            let (node, alone) = (&node, &alone);
            scope.spawn(move || {
                let idx = i % cases.len();
                assert_eq!(
                    cases[idx].ask(node, i % 2 == 0),
                    alone[idx],
                    "after preemptions"
                );
            });
        }
    });
    let status = node.model_status();
    assert!(0 < status["n_preemptions"].as_u64().unwrap(), "{status}");
    node.wait_until_idle();
}

#[test]
fn deepseek_v3_answers_the_same_offline_and_served() {
    let model = data::reference("deepseek_v3");
    let cases = golden_cases(&model, 32);
    check_alone_and_in_a_crowd(&model, &cases, 1500);
    check_preempted(&model, &cases);
}

#[test]
fn qwen3_moe_answers_the_same_offline_and_served() {
    let model = data::reference("qwen3_moe");
    let cases = golden_cases(&model, 32);
    check_alone_and_in_a_crowd(&model, &cases, 1500);
    check_preempted(&model, &cases);
}

#[test]
fn smollm2_answers_the_same_offline_and_served() {
    let model = data::smollm2();
    let text_model = text_model(&model);
    let cases: Vec<_> = ["The capital of France is", "def fibonacci(n):\n"]
        .iter()
        .map(|text| {
            Case::new(
                &model,
                &text_model,
                text_model
                    .encode_prompt(text, PromptForm::default(), usize::MAX)
                    .unwrap(),
                12,
            )
        })
        .collect();
    check_alone_and_in_a_crowd(&model, &cases, 200);
}
