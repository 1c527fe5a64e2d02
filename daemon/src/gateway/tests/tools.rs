//! Tools: what a model is told of them, and calls in its answers.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::kit::{END_TOKEN, Node, QUICK, Reply, VOCAB_LEN, config, model_with};
use crate::runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan};

/// A model that says what its prompt tells it to: the text between the last `[[` and `]]`.
#[derive(Default)]
struct Reciter {
    /// Prompts by sequence.
    prompts: HashMap<u64, Vec<u32>>,
    /// Length of the prompt and what is to be said.
    speeches: HashMap<u64, (usize, Vec<u32>)>,
    logits: Vec<f32>,
}

fn speech_of(prompt: &[u32]) -> Vec<u32> {
    let marks = |mark: [u32; 2]| prompt.windows(2).rposition(|pair| pair == mark);
    let (open, close) = (marks([b'['.into(); 2]), marks([b']'.into(); 2]));
    match (open, close) {
        (Some(open), Some(close)) if open < close => prompt[open + 2..close].to_vec(),
        _ => Vec::new(),
    }
}

impl StepExecutor for Reciter {
    fn limits(&self) -> ExecutorLimits {
        ExecutorLimits {
            vocab_len: VOCAB_LEN,
            block_len: 16,
            n_blocks: 4096,
            step_tokens_max: 512,
            step_spans_max: 8,
            step_logits_max: 8,
            context_len_max: 4096,
        }
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        self.logits.clear();
        for span in &plan.spans {
            let tokens = &plan.tokens[span.tokens.clone()];
            let end = span.first_pos + tokens.len();
            if span.first_pos == 0 {
                // The canary's runs share a name.
                self.speeches.remove(&span.seq);
            }
            let prompt = self.prompts.entry(span.seq).or_default();
            prompt.truncate(span.first_pos);
            prompt.extend_from_slice(tokens);
            if span.logits != LogitRows::Last {
                continue;
            }
            let of_prompt = || (end, speech_of(prompt));
            let (n_prompt, speech) = self.speeches.entry(span.seq).or_insert_with(of_prompt);
            let next = speech.get(end - *n_prompt).copied().unwrap_or(END_TOKEN);
            let logit = |id| if id == next as usize { 0.0 } else { -40.0 };
            self.logits.extend((0..VOCAB_LEN).map(logit));
        }
        Ok(&mut self.logits)
    }
}

async fn node() -> Node {
    Node::start(
        config(),
        vec![model_with("tiny", &QUICK, Reciter::default())],
    )
    .await
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    ])
}

async fn ask(node: &Node, says: &str, fields: Value) -> Reply {
    let mut body = json!({
        "messages": [{"role": "user", "content": format!("say [[{says}]]")}],
        "tools": tools(), "temperature": 0, "max_tokens": 1000,
        // The executor has to see all of each prompt.
        "user_id": format!("{}", says.len() + fields.to_string().len() * 1000),
    });
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    let reply = node.post("/v1/chat/completions", &body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply
}

/// The message that a stream's chunks make, as official clients put it together.
fn assembled(reply: &Reply) -> (Value, Value) {
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<Value>::new(), Value::Null);
    for event in reply.events() {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        content += delta["content"].as_str().unwrap_or("");
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            let arguments = call["function"]["arguments"].as_str().unwrap();
            if calls.len() == index {
                assert_eq!(arguments, "");
                let mut call = call.clone();
                call.as_object_mut().unwrap().remove("index");
                calls.push(call);
                continue;
            }
            assert_eq!((calls.len(), call.get("id")), (index + 1, None));
            let before = calls[index]["function"]["arguments"].as_str().unwrap();
            calls[index]["function"]["arguments"] = json!(format!("{before}{arguments}"));
        }
        reason = choice["finish_reason"].clone();
    }
    let mut message = json!({"role": "assistant", "content": content});
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
        if content.is_empty() {
            message["content"] = Value::Null;
        }
    }
    (message, reason)
}

/// The message without ids, which differ from answer to answer.
fn without_ids(mut message: Value) -> Value {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let id = call.as_object_mut().unwrap().remove("id").unwrap();
        assert!(id.as_str().unwrap().starts_with("call_"), "{id}");
    }
    message
}

async fn check(says: &str, fields: Value, content: Value, calls: &[(&str, &str)], reason: &str) {
    let node = node().await;
    let mut expected = json!({"role": "assistant", "content": content});
    if !calls.is_empty() {
        let call = |(name, arguments): &(&str, &str)| json!({"type": "function", "function": {"name": name, "arguments": arguments}});
        expected["tool_calls"] = calls.iter().map(call).collect();
    }
    let whole = ask(&node, says, fields.clone()).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(without_ids(choice["message"].clone()), expected, "{says}");
    assert_eq!(choice["finish_reason"], reason, "{says}");
    let mut streaming = fields;
    streaming["stream"] = json!(true);
    let (message, streamed_reason) = assembled(&ask(&node, says, streaming).await);
    assert_eq!(without_ids(message), expected, "{says}, streamed");
    assert_eq!(streamed_reason, reason, "{says}, streamed");
}

const WEATHER: &str = r#"<tool_call>
{"name": "get_weather", "arguments": {"city": "杭州"}}
</tool_call>"#;
const ADD: &str = r#"<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>"#;

#[tokio::test]
async fn calls_come_apart_from_content_whole_and_streamed() {
    let weather = ("get_weather", r#"{"city": "杭州"}"#);
    let add = ("add", r#"{"a": 1}"#);
    let none = || json!({});
    check(WEATHER, none(), Value::Null, &[weather], "tool_calls").await;
    let two = format!("Let me look.\n{WEATHER}\n{ADD}");
    let content = json!("Let me look.");
    check(&two, none(), content.clone(), &[weather, add], "tool_calls").await;
    let one_only = json!({"parallel_tool_calls": false});
    check(&two, one_only, content.clone(), &[weather], "tool_calls").await;
    // Nobody asked for calls.
    check(
        &two,
        json!({"tool_choice": "none"}),
        json!(two),
        &[],
        "stop",
    )
    .await;
    check(&two, json!({"tools": []}), json!(two), &[], "stop").await;
    // What is no call after all.
    let broken = "<tool_call>\nget_weather(city)</tool_call>";
    check(broken, none(), json!(broken), &[], "stop").await;
    // Stop strings are not looked for in arguments.
    check(
        &two,
        json!({"stop": ["a"]}),
        json!("Let me look.").clone(),
        &[weather, add],
        "tool_calls",
    )
    .await;
    check(
        "no call. more",
        json!({"stop": ["call"]}),
        json!("no "),
        &[],
        "stop",
    )
    .await;
}

#[tokio::test]
async fn answers_cut_short_keep_what_they_have_of_a_call() {
    let n = WEATHER.find("city").unwrap();
    let arguments = "{\"";
    let fields = json!({"max_tokens": n});
    check(
        WEATHER,
        fields,
        Value::Null,
        &[("get_weather", arguments)],
        "length",
    )
    .await;
}

#[tokio::test]
async fn the_model_is_told_of_tools_calls_and_results() {
    let node = node().await;
    let body = json!({
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}},
                {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "21 [[ok]]"},
            {"role": "tool", "tool_call_id": "c2", "content": "22"},
        ],
        "tools": tools(), "temperature": 0,
    });
    let reply = node.post("/v1/chat/completions", &body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "ok");
}
