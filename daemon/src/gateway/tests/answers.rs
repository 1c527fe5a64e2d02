//! What good requests get.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::kit::{Node, Pace, QUICK, Reply, config, model};
use crate::{catalog::ConfiguredModel, gateway::GatewayConfig};

const MESSAGES: &str = r#""messages": [{"role": "user", "content": "hi"}]"#;

async fn chat(node: &Node, fields: &str) -> Reply {
    let reply = node
        .post("/v1/chat/completions", &format!("{{{MESSAGES}, {fields}}}"))
        .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply
}

async fn completion(node: &Node, fields: &str) -> Reply {
    let reply = node
        .post(
            "/v1/completions",
            &format!(r#"{{"prompt": "hi", {fields}}}"#),
        )
        .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply
}

/// Text of each choice of a stream, put together.
fn streamed(reply: &Reply, field: impl Fn(&Value) -> Value) -> Vec<String> {
    let mut texts = Vec::new();
    for event in reply.events() {
        for choice in event["choices"].as_array().unwrap() {
            let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
            texts.resize(texts.len().max(index + 1), String::new());
            texts[index].push_str(field(choice).as_str().unwrap_or(""));
        }
    }
    texts
}

#[tokio::test]
async fn a_chat_is_answered_with_text_reason_and_counts() {
    let node = Node::quick().await;
    let reply = chat(
        &node,
        r#""model": "tiny", "max_tokens": 5, "temperature": 0"#,
    )
    .await;
    let body = reply.json();
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert!(reply.header("x-request-id").unwrap().starts_with("req-"));
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(
        (&body["object"], &body["model"]),
        (&json!("chat.completion"), &json!("tiny"))
    );
    let choice = &body["choices"][0];
    assert_eq!(
        (&choice["index"], &choice["finish_reason"]),
        (&json!(0), &json!("length"))
    );
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"].as_str().unwrap().len(), 5);
    assert!(choice["message"].get("reasoning_content").is_none());
    let usage = &body["usage"];
    let n_prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert!(2 <= n_prompt);
    assert_eq!(usage["completion_tokens"], 5);
    assert_eq!(usage["total_tokens"], n_prompt + 5);
}

#[tokio::test]
async fn streamed_and_whole_answers_are_the_same_text() {
    let node = Node::quick().await;
    for fields in [
        r#""max_tokens": 40, "temperature": 0"#,
        r#""max_tokens": 40, "seed": 7, "n": 3"#,
    ] {
        let whole = chat(&node, fields).await.json();
        let stream = chat(&node, &format!(r#"{fields}, "stream": true"#)).await;
        assert_eq!(
            stream.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        let texts: Vec<_> = whole["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["message"]["content"].as_str().unwrap())
            .collect();
        assert_eq!(
            streamed(&stream, |choice| choice["delta"]["content"].clone()),
            texts
        );

        let whole = completion(&node, fields).await.json();
        let stream = completion(&node, &format!(r#"{fields}, "stream": true"#)).await;
        let texts: Vec<_> = whole["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["text"].as_str().unwrap())
            .collect();
        assert_eq!(streamed(&stream, |choice| choice["text"].clone()), texts);
    }
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_reason_and_counts() {
    let node = Node::quick().await;
    let fields = r#""max_tokens": 3, "temperature": 0, "stream": true, "stream_options": {"include_usage": true}"#;
    let events = chat(&node, fields).await.events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let (last, rest) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 3);
    assert!(
        rest.iter()
            .all(|event| event["usage"].is_null() && event.get("usage").is_some())
    );
    let end = &rest.last().unwrap()["choices"][0];
    assert_eq!(
        (&end["finish_reason"], &end["delta"]),
        (&json!("length"), &json!({}))
    );
    assert!(
        events
            .iter()
            .all(|event| event["id"] == events[0]["id"]
                && event["object"] == "chat.completion.chunk")
    );
    let without = chat(&node, r#""max_tokens": 3, "stream": true"#)
        .await
        .events();
    assert!(without.iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn a_stop_string_cuts_the_text_and_frees_the_sequence() {
    let node = Node::start(
        config(),
        vec![model(
            "tiny",
            &Pace {
                step: Duration::from_millis(1),
                ..QUICK
            },
        )],
    )
    .await;
    let text = completion(&node, r#""max_tokens": 60, "temperature": 0"#)
        .await
        .json()["choices"][0]["text"]
        .clone();
    let text = text.as_str().unwrap();
    let stop = &text[20..24];
    let expected = &text[..text.find(stop).unwrap()];
    let fields = format!(r#""max_tokens": 200, "temperature": 0, "stop": ["{stop}", "never"]"#);
    let body = completion(&node, &fields).await.json();
    assert_eq!(body["choices"][0]["text"], expected);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert!(body["usage"]["completion_tokens"].as_u64().unwrap() <= 30);
    node.wait_for_sequences(0).await;
    let stream = completion(&node, &format!(r#"{fields}, "stream": true"#)).await;
    assert_eq!(
        streamed(&stream, |choice| choice["text"].clone()),
        [expected]
    );
}

#[tokio::test]
async fn a_stop_token_ends_the_answer_and_is_no_text() {
    let node = Node::quick().await;
    let text = completion(&node, r#""max_tokens": 10, "temperature": 0"#)
        .await
        .json()["choices"][0]["text"]
        .clone();
    let text = text.as_str().unwrap();
    let stop = text.as_bytes()[5];
    let n_before = text.bytes().position(|b| b == stop).unwrap();
    let body = completion(
        &node,
        &format!(r#""max_tokens": 10, "temperature": 0, "stop_token_ids": [{stop}]"#),
    )
    .await
    .json();
    assert_eq!(body["choices"][0]["text"], &text[..n_before]);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["completion_tokens"], n_before + 1);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_text_and_choices_differ() {
    let node = Node::quick().await;
    let fields = r#""max_tokens": 20, "seed": 42, "n": 2"#;
    let (a, b) = (
        chat(&node, fields).await.json(),
        chat(&node, fields).await.json(),
    );
    assert_eq!(a["choices"], b["choices"]);
    assert_ne!(a["choices"][0]["message"], a["choices"][1]["message"]);
    let other = chat(&node, r#""max_tokens": 20, "seed": 43, "n": 2"#)
        .await
        .json();
    assert_ne!(a["choices"], other["choices"]);
    // Choice i has seed + i, so the second choice of 42 is the first of 43.
    assert_eq!(a["choices"][1]["message"], other["choices"][0]["message"]);
    let (c, d) = (
        chat(&node, r#""max_tokens": 20"#).await.json(),
        chat(&node, r#""max_tokens": 20"#).await.json(),
    );
    assert_ne!(c["choices"][0]["message"], d["choices"][0]["message"]);
    assert_eq!(
        chat(&node, r#""max_tokens": 2, "n": 2"#).await.json()["usage"]["completion_tokens"],
        4
    );
}

#[tokio::test]
async fn several_prompts_give_choices_in_their_order() {
    let node = Node::quick().await;
    let fields = r#""max_tokens": 4, "temperature": 0, "n": 2"#;
    let reply = node
        .post(
            "/v1/completions",
            &format!(r#"{{"prompt": [[97], [98, 99]], {fields}}}"#),
        )
        .await;
    let body = reply.json();
    let indices: Vec<_> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(body["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn log_probabilities_come_in_the_shape_of_each_route() {
    let node = Node::quick().await;
    let fields = r#""max_tokens": 4, "temperature": 0, "logprobs": true, "top_logprobs": 2"#;
    let body = chat(&node, fields).await.json();
    let content = body["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(content.len(), 4);
    let joined: String = content
        .iter()
        .map(|entry| entry["token"].as_str().unwrap())
        .collect();
    assert_eq!(body["choices"][0]["message"]["content"], joined);
    for entry in &content {
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(
            entry["bytes"],
            json!(entry["token"].as_str().unwrap().as_bytes())
        );
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
    }
    let mut streamed = Vec::new();
    for event in chat(&node, &format!(r#"{fields}, "stream": true"#))
        .await
        .events()
    {
        let entries = event["choices"][0]["logprobs"]["content"]
            .as_array()
            .cloned();
        streamed.extend(entries.unwrap_or_default());
    }
    assert_eq!(streamed, content);

    let body = completion(&node, r#""max_tokens": 4, "temperature": 0, "logprobs": 2"#)
        .await
        .json();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));
    for list in ["tokens", "token_logprobs", "top_logprobs"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), 4, "{list}");
    }
    assert_eq!(
        chat(&node, r#""max_tokens": 1"#).await.json()["choices"][0]["logprobs"],
        Value::Null
    );
}

#[tokio::test]
async fn models_are_listed_and_shown() {
    let node = Node::start(config(), vec![model("a", &QUICK), model("org/b", &QUICK)]).await;
    let list = node.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][1]["id"], "org/b");
    assert_eq!(node.get("/v1/models/org/b").await.json(), list["data"][1]);
    assert_eq!(
        node.get("/v1/models/c").await.error(),
        (404, "model_not_found".into(), Some("model".into()))
    );
    assert_eq!(node.get("/v1/models/%ff").await.status, 404);
    // Two models, so a request has to say which.
    let reply = node.post("/v1/completions", r#"{"prompt": "a"}"#).await;
    assert_eq!(
        reply.error(),
        (400, "invalid_request".into(), Some("model".into()))
    );
}

fn configured(name: &str, aliases: &[&str], required: bool) -> ConfiguredModel {
    ConfiguredModel {
        name: name.to_owned(),
        path: format!("/models/{name}").into(),
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        thinking_aliases: Vec::new(),
        required,
    }
}

#[tokio::test]
async fn requests_by_a_thinking_alias_think_unless_they_say_otherwise() {
    let reasoner = ConfiguredModel {
        thinking_aliases: vec!["deepseek-reasoner".to_owned()],
        ..configured("tiny", &["deepseek-chat", "deepseek-reasoner"], true)
    };
    let node = Node::start_configured(vec![model("tiny", &QUICK)], vec![reasoner]).await;
    for (name, fields, thinks) in [
        ("deepseek-reasoner", json!({}), true),
        (
            "deepseek-reasoner",
            json!({"thinking": {"type": "disabled"}}),
            false,
        ),
        ("deepseek-chat", json!({}), false),
        (
            "deepseek-chat",
            json!({"thinking": {"type": "enabled"}}),
            true,
        ),
        ("tiny", json!({}), false),
    ] {
        let mut body = fields;
        body["model"] = json!(name);
        body["messages"] = json!([{"role": "user", "content": "hi"}]);
        let reply = node.post("/tokenize", &body.to_string()).await.json();
        let last = reply["tokens"].as_array().unwrap().last().unwrap().clone();
        // `<think>` is the template's last token then.
        assert_eq!(last == 257, thinks, "{body}");
    }
}

#[tokio::test]
async fn an_alias_leads_to_its_model_and_is_what_answers_say() {
    let models = vec![model("r1", &QUICK), model("other", &QUICK)];
    let of_configuration = vec![configured("r1", &["deepseek-chat", "org/chat"], true)];
    let node = Node::start_configured(models, of_configuration).await;
    let list = node.get("/v1/models").await.json();
    let ids: Vec<&Value> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["id"])
        .collect();
    assert_eq!(ids, ["other", "r1", "deepseek-chat", "org/chat"]);
    assert_eq!(
        node.get("/v1/models/org/chat").await.json(),
        list["data"][3]
    );
    for name in ["deepseek-chat", "r1"] {
        let body = format!(r#"{{"model": "{name}", "prompt": "a", "max_tokens": 2}}"#);
        let reply = node.post("/v1/completions", &body).await;
        assert_eq!(
            (reply.status, &reply.json()["model"]),
            (200, &json!(name)),
            "{}",
            reply.body
        );
        let messages = r#"[{"role": "user", "content": "a"}]"#;
        let body = format!(r#"{{"model": "{name}", "messages": {messages}, "max_tokens": 2}}"#);
        let reply = node.post("/v1/chat/completions", &body).await;
        assert_eq!(reply.json()["model"], name);
        let body = format!(
            r#"{{"model": "{name}", "messages": {messages}, "max_tokens": 2, "stream": true}}"#
        );
        let reply = node.post("/v1/chat/completions", &body).await;
        assert!(
            reply.body.contains(&format!(r#""model":"{name}""#)),
            "{}",
            reply.body
        );
    }
    let reply = node
        .post("/v1/completions", r#"{"model": "deepseek", "prompt": "a"}"#)
        .await;
    assert!(
        reply
            .body
            .contains("served are: other, r1, deepseek-chat, org/chat"),
        "{}",
        reply.body
    );
    // Metrics know the model by its own name only.
    let metrics = node.get("/metrics").await.body;
    assert!(metrics.contains(r#"model="r1""#) && !metrics.contains("deepseek-chat"));
    // The name is taken, and what is unloaded by it is the model.
    let load = node
        .catalog
        .load("deepseek-chat", "/x".as_ref(), &mut |_| {});
    assert_eq!(
        load.unwrap_err().to_string(),
        "`deepseek-chat` is an alias of the model `r1`"
    );
    let catalog = Arc::clone(&node.catalog);
    let unload = move || catalog.unload("deepseek-chat", Duration::ZERO);
    tokio::task::spawn_blocking(unload).await.unwrap().unwrap();
    assert!(!node.catalog.entries().contains_key("r1"));
}

/// A node was ready without the model that its configuration is for.
#[tokio::test]
async fn the_node_is_not_ready_without_a_model_that_the_configuration_requires() {
    let check = async |node: &Node, status: u16, what: &str| {
        let reply = node.get("/ready").await;
        assert_eq!(reply.status, status, "{}", reply.body);
        assert!(reply.body.contains(what), "{}", reply.body);
    };
    let serve = async |node: &Node| {
        let body = r#"{"model": "tiny", "prompt": "a", "max_tokens": 1}"#;
        assert_eq!(node.post("/v1/completions", body).await.status, 200);
    };
    let configuration = || {
        vec![
            configured("tiny", &[], true),
            configured("big", &[], true),
            configured("spare", &[], false),
        ]
    };
    let node = Node::start_configured(vec![model("tiny", &QUICK)], configuration()).await;
    serve(&node).await;
    check(
        &node,
        503,
        "`big`, which the configuration requires, is not loaded",
    )
    .await;
    node.catalog
        .load("big", "/x".as_ref(), &mut |_| {})
        .unwrap_err();
    check(
        &node,
        503,
        "`big`, which the configuration requires, is failed",
    )
    .await;
    // One that need not be there is left out in whatever state: this one never produced a token.
    node.catalog
        .load("spare", "/x".as_ref(), &mut |_| {})
        .unwrap_err();
    let mut configuration = configuration();
    configuration[1].required = false;
    let models = vec![model("tiny", &QUICK), model("spare", &QUICK)];
    let node = Node::start_configured(models, configuration).await;
    serve(&node).await;
    check(&node, 200, "ready").await;
    // Unloaded by hand.
    let catalog = Arc::clone(&node.catalog);
    let unload = move || catalog.unload("tiny", Duration::ZERO);
    tokio::task::spawn_blocking(unload).await.unwrap().unwrap();
    check(
        &node,
        503,
        "`tiny`, which the configuration requires, is not loaded",
    )
    .await;
}

#[tokio::test]
async fn health_readiness_and_metrics_answer_without_a_model() {
    let node = Node::start(config(), vec![]).await;
    assert_eq!(node.get("/health").await.status, 200);
    assert_eq!(
        node.get("/ready").await.error(),
        (503, "not_ready".into(), None)
    );
    let reply = node.post("/v1/completions", r#"{"prompt": "a"}"#).await;
    assert_eq!(reply.error().1, "not_ready");
    let metrics = node.get("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(
        metrics.body.contains("# HELP dsd_http_requests_total"),
        "{}",
        metrics.body
    );
    assert!(
        metrics
            .body
            .contains(r#"dsd_http_requests_total{route="/ready",status="503"}"#),
        "{}",
        metrics.body
    );
}

#[tokio::test]
async fn a_model_that_produced_a_token_makes_the_node_ready() {
    let node = Node::quick().await;
    node.must_serve().await;
    let reply = node.get("/ready").await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let metrics = node.get("/metrics").await.body;
    for name in [
        "dsd_sequences_running{",
        "dsd_time_to_first_token_seconds_bucket{",
        "dsd_engine_step_tokens_count{",
    ] {
        assert!(metrics.contains(name), "{name} is missing in {metrics}");
    }
    let token_age_max = Duration::from_millis(500);
    let strict = GatewayConfig {
        token_age_max,
        ..config()
    };
    let node = Node::start(strict, vec![model("tiny", &QUICK)]).await;
    node.must_serve().await;
    tokio::time::sleep(token_age_max + Duration::from_millis(50)).await;
    assert_eq!(
        node.get("/ready").await.error(),
        (503, "not_ready".into(), None)
    );
}

#[tokio::test]
async fn the_client_s_request_id_comes_back() {
    let node = Node::quick().await;
    let headers = "content-type: application/json\r\nx-request-id: abc-1\r\n";
    let reply = node
        .post_with("/v1/completions", headers, br#"{"prompt": "a"}"#)
        .await;
    assert_eq!(reply.header("x-request-id"), Some("abc-1"));
}

#[tokio::test]
async fn thoughts_are_told_from_content_and_counted() {
    let node = Node::quick().await;
    // The fake model never closes its thoughts, so all of it is one.
    let fields = r#""max_tokens": 6, "temperature": 0, "thinking": {"type": "enabled"}"#;
    let body = chat(&node, fields).await.json();
    let message = &body["choices"][0]["message"];
    assert_eq!(
        (
            message["reasoning_content"].as_str().unwrap().len(),
            &message["content"]
        ),
        (6, &json!(""))
    );
    assert_eq!(
        body["usage"]["completion_tokens_details"]["reasoning_tokens"],
        6
    );
    let stream = chat(&node, &format!(r#"{fields}, "stream": true"#)).await;
    let thoughts = streamed(&stream, |choice| {
        choice["delta"]["reasoning_content"].clone()
    });
    assert_eq!(thoughts, [message["reasoning_content"].as_str().unwrap()]);
    // A biased token closes them at once: 258 is `</think>`.
    let closing = r#""max_tokens": 6, "temperature": 0, "chat_template_kwargs": {"enable_thinking": true},
        "logit_bias": {"258": 100}, "presence_penalty": 2, "repetition_penalty": 10"#;
    let body = chat(&node, closing).await.json();
    assert!(
        body["choices"][0]["message"]
            .get("reasoning_content")
            .is_none(),
        "{body}"
    );
    assert_eq!(
        body["usage"]["completion_tokens_details"]["reasoning_tokens"],
        1
    );
}

#[tokio::test]
async fn a_template_that_refuses_a_conversation_is_quoted() {
    let node = Node::quick().await;
    let body = r#"{"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hi"}]}"#;
    let reply = node.post("/v1/chat/completions", body).await;
    assert_eq!(
        reply.error(),
        (400, "invalid_request".into(), Some("messages".into()))
    );
    assert!(
        reply.body.contains("the first turn is not the user"),
        "{}",
        reply.body
    );
}

#[tokio::test]
async fn special_tokens_in_a_user_s_text_stay_text() {
    let node = Node::quick().await;
    let prompt_tokens = async |content: &str| {
        let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1});
        let reply = node.post("/v1/chat/completions", &body.to_string()).await;
        reply.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    // One token per byte of the text, however special it looks.
    let empty = prompt_tokens("").await;
    for text in ["<|end|>", "<think>", "a<|end|>b", "<|en"] {
        assert_eq!(
            prompt_tokens(text).await,
            empty + text.len() as u64,
            "{text}"
        );
    }
}

/// A model that takes its time, and a node that says so soon.
async fn slow_node() -> Node {
    let config = GatewayConfig {
        keep_alive: Duration::from_millis(20),
        ..config()
    };
    let pace = Pace {
        step: Duration::from_millis(50),
        ..QUICK
    };
    Node::start(config, vec![model("tiny", &pace)]).await
}

#[tokio::test]
async fn whoever_waits_is_told_that_the_answer_is_still_made() {
    let node = slow_node().await;
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let body = format!(r#"{{{MESSAGES}, "prompt": "hi", "max_tokens": 4, "temperature": 0}}"#);
        let whole = node.post(path, &body).await;
        assert_eq!(whole.status, 200);
        assert!(whole.body.starts_with("\n\n"), "{path}: {:?}", whole.body);
        assert_eq!(whole.header("content-type"), Some("application/json"));
        assert_eq!(whole.json()["usage"]["completion_tokens"], 4, "{path}");
        let streamed = node
            .post(
                path,
                &body.replace("\"max_tokens\"", "\"stream\": true, \"max_tokens\""),
            )
            .await;
        assert!(
            streamed.body.contains(": keep-alive\n\n"),
            "{path}: {}",
            streamed.body
        );
    }
    let body = format!(r#"{{{MESSAGES}, "max_tokens": 4, "stream": true}}"#);
    let events = node.post("/v1/messages", &body).await;
    assert!(events.body.contains("event: ping\n"), "{}", events.body);
}

#[tokio::test]
async fn members_that_nothing_reads_are_named() {
    let node = Node::quick().await;
    let reply = chat(
        &node,
        r#""max_tokens": 1, "best": 1, "store": true, "bad\r\nname": 2"#,
    )
    .await;
    assert_eq!(reply.header("x-dsd-ignored-fields"), Some("best, store"));
    let reply = completion(&node, r#""max_tokens": 1, "stream": true, "x": 1"#).await;
    assert_eq!(reply.header("x-dsd-ignored-fields"), Some("x"));
    let reply = chat(&node, r#""max_tokens": 1"#).await;
    assert_eq!(reply.header("x-dsd-ignored-fields"), None);
}

#[tokio::test]
async fn raw_prompts_may_spell_special_tokens() {
    let node = Node::quick().await;
    let n_prompt = async |fields: &str| {
        let body = format!(r#"{{"prompt": "a<|end|>b", "max_tokens": 1, {fields}}}"#);
        let reply = node.post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(n_prompt(r#""n": 1"#).await, 3);
    assert_eq!(n_prompt(r#""parse_special": false"#).await, 9);
}

#[tokio::test]
async fn log_probabilities_of_thoughts_stand_apart() {
    let node = Node::quick().await;
    let fields = r#""max_tokens": 6, "temperature": 0, "logprobs": true, "enable_thinking": true,
        "logit_bias": {"258": 3.9}, "presence_penalty": 2"#;
    let body = chat(&node, fields).await.json();
    let choice = &body["choices"][0];
    let n = |name: &str| choice["logprobs"][name].as_array().map_or(0, Vec::len) as u64;
    let n_thoughts = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
        .as_u64()
        .unwrap();
    assert_eq!(n("reasoning_content"), n_thoughts, "{body}");
    assert_eq!(n("content") + n_thoughts, 6, "{body}");
}

/// The lists of a choice's log-probabilities: texts, numbers, offsets.
fn lists(choice: &Value) -> (Vec<&str>, Vec<Option<f64>>, Vec<usize>) {
    let list = |name: &str| choice["logprobs"][name].as_array().unwrap().iter();
    (
        list("tokens").map(|t| t.as_str().unwrap()).collect(),
        list("token_logprobs").map(Value::as_f64).collect(),
        list("text_offset")
            .map(|o| usize::try_from(o.as_u64().unwrap()).unwrap())
            .collect(),
    )
}

#[tokio::test]
async fn an_echo_is_the_prompt_with_what_follows_and_its_numbers() {
    let node = Node::quick().await;
    let prompt = "the prompt is longer than a step has rows";
    let ask = async |fields: &str| {
        let body = format!(r#"{{"prompt": "{prompt}", "temperature": 0, {fields}}}"#);
        let reply = node.post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply
    };
    let plain = ask(r#""max_tokens": 4, "logprobs": 1"#).await.json();
    let (_, follow, _) = lists(&plain["choices"][0]);
    let answer = ask(r#""max_tokens": 4, "logprobs": 1, "echo": true"#)
        .await
        .json();
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().unwrap();
    assert_eq!(
        text,
        format!("{prompt}{}", plain["choices"][0]["text"].as_str().unwrap())
    );
    let (tokens, logprobs, offsets) = lists(choice);
    let n_prompt = tokens.len() - 4;
    assert_eq!(answer["usage"]["prompt_tokens"], n_prompt);
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    assert_eq!(
        (logprobs[0], &choice["logprobs"]["top_logprobs"][0]),
        (None, &Value::Null)
    );
    assert!(
        logprobs[1..].iter().all(|l| l.is_some_and(|l| l < 0.0)),
        "{logprobs:?}"
    );
    assert_eq!(logprobs[n_prompt..], follow, "the output's are its own");
    for (offset, token) in offsets
        .iter()
        .zip(&tokens)
        .filter(|(_, token)| token.len() == 1)
    {
        assert_eq!(text[*offset..][..1], **token, "{tokens:?} {offsets:?}");
    }
    // The same as the output's where the same tokens are one.
    let longer = format!(r#"{{"prompt": "{text}", "max_tokens": 0, "logprobs": 1, "echo": true}}"#);
    let longer = node.post("/v1/completions", &longer).await.json();
    assert_eq!(longer["choices"][0]["text"], text);
    assert_eq!(longer["choices"][0]["finish_reason"], "length");
    assert_eq!(longer["usage"]["completion_tokens"], 0);
    assert_eq!(lists(&longer["choices"][0]).1, logprobs);
    // Whole and streamed, alone and with others; without numbers, too.
    for fields in [
        r#""max_tokens": 4, "n": 3, "logprobs": 1, "echo": true"#,
        r#""max_tokens": 4, "echo": true"#,
        r#""max_tokens": 0, "n": 2, "echo": true"#,
    ] {
        let whole = ask(fields).await.json();
        let stream = ask(&format!(r#"{fields}, "stream": true"#)).await;
        let texts = streamed(&stream, |choice| choice["text"].clone());
        for (choice, streamed) in whole["choices"].as_array().unwrap().iter().zip(&texts) {
            assert_eq!(choice["text"].as_str(), Some(&**streamed));
            assert!(streamed.starts_with(prompt));
            if fields.contains("logprobs") {
                assert_eq!(lists(choice).1, logprobs, "greedy choices are all the same");
            }
        }
        assert_eq!(whole["choices"].as_array().unwrap().len(), texts.len());
    }
}

#[tokio::test]
async fn an_echo_of_tokens_is_their_text_and_too_many_numbers_are_refused() {
    let node = Node::quick().await;
    let body = r#"{"prompt": [[104, 105], [111]], "max_tokens": 0, "logprobs": 0, "echo": true}"#;
    let answer = node.post("/v1/completions", body).await.json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(
        (&choices[0]["text"], &choices[1]["text"]),
        (&json!("hi"), &json!("o"))
    );
    assert_eq!(lists(&choices[1]).1, [None]);
    let ids = vec!["104"; 200].join(",");
    let body =
        format!(r#"{{"prompt": [{ids}], "n": 64, "max_tokens": 1, "logprobs": 20, "echo": true}}"#);
    let refused = node.post("/v1/completions", &body).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("logprobs"))
    );
}

#[tokio::test]
async fn the_best_of_several_are_the_likeliest_in_their_order() {
    let node = Node::quick().await;
    let fields = r#""max_tokens": 6, "seed": 5, "temperature": 1.5"#;
    let all = completion(&node, &format!(r#"{fields}, "n": 6, "logprobs": 0"#))
        .await
        .json();
    let mut ranked: Vec<(f64, &str)> = all["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| {
            let logprobs = lists(choice).1;
            let sum: f64 = logprobs.iter().flatten().sum();
            (
                sum / logprobs.len() as f64,
                choice["text"].as_str().unwrap(),
            )
        })
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let best = completion(&node, &format!(r#"{fields}, "n": 2, "best_of": 6"#))
        .await
        .json();
    let texts: Vec<_> = best["choices"].as_array().unwrap().iter().collect();
    assert_eq!(texts.len(), 2);
    for (idx, choice) in texts.iter().enumerate() {
        assert_eq!(
            (&choice["index"], &choice["text"]),
            (&json!(idx), &json!(ranked[idx].1))
        );
        assert_eq!(choice["logprobs"], Value::Null);
    }
    assert_eq!(
        best["usage"]["completion_tokens"], 36,
        "all that were made count"
    );
}
