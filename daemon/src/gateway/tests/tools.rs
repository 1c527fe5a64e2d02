//! Tools: what a model is told of them, and calls in its answers.

use serde_json::{Value, json};

use super::kit::{Node, Reply};

async fn node() -> Node {
    Node::reciting().await
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
    // Only whole messages have it.
    let refusal = message.as_object_mut().and_then(|m| m.remove("refusal"));
    assert!(refusal.is_none_or(|refusal| refusal.is_null()));
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

/// The model would rather say something else.
async fn content_of(fields: Value) -> (String, Value) {
    let node = node().await;
    let body = ask(&node, "I would rather not.", fields).await.json();
    let choice = &body["choices"][0];
    let content = choice["message"]["content"].as_str().unwrap_or_default();
    (content.to_owned(), choice["finish_reason"].clone())
}

#[tokio::test]
async fn answers_have_the_shape_that_is_asked_for() {
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Rome", "Bonn"]}, "n": {"type": "integer", "minimum": 3, "maximum": 3}},
        "required": ["city", "n"], "additionalProperties": false});
    let schema = |schema: &Value| json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    for fields in [
        json!({"response_format": schema(&city), "tools": []}),
        json!({"guided_json": city, "tools": []}),
        json!({"guided_json": city.to_string(), "tools": []}),
        json!({"structured_outputs": {"json": city}, "tools": []}),
        json!({"response_format": schema(&city), "tools": [], "enable_thinking": true, "logit_bias": {"258": 100}}),
    ] {
        let (content, reason) = content_of(fields.clone()).await;
        let value: Value =
            serde_json::from_str(&content).unwrap_or_else(|e| panic!("{fields}: {e}: {content}"));
        assert!(
            ["Rome", "Bonn"].contains(&value["city"].as_str().unwrap()),
            "{content}"
        );
        assert_eq!(
            (&value["n"], reason),
            (&json!(3), json!("stop")),
            "{fields}: {content}"
        );
    }
    for (fields, expected) in [
        (json!({"guided_choice": ["yes", "no"]}), &["yes", "no"][..]),
        (json!({"guided_regex": "[xy]/z"}), &["x/z", "y/z"]),
        (
            json!({"structured_outputs": {"grammar": "start: \"a\" B\nB: /[b]{2}/"}}),
            &["abb"],
        ),
    ] {
        let mut fields = fields;
        fields["tools"] = json!([]);
        let (content, reason) = content_of(fields.clone()).await;
        assert!(expected.contains(&content.as_str()), "{fields}: {content}");
        assert_eq!(reason, "stop");
    }
}

#[tokio::test]
async fn calls_that_are_required_come_and_follow_their_schema() {
    let node = node().await;
    let city = json!({"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"], "additionalProperties": false}}});
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for choice in [json!("required"), named] {
        for stream in [false, true] {
            let fields = json!({"tools": [city], "tool_choice": choice, "stream": stream, "parallel_tool_calls": false});
            let reply = ask(&node, "I would rather not.", fields).await;
            let (message, reason) = match stream {
                true => assembled(&reply),
                false => {
                    let choice = reply.json()["choices"][0].clone();
                    (choice["message"].clone(), choice["finish_reason"].clone())
                }
            };
            let calls = json!([{"type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}]);
            assert_eq!(without_ids(message)["tool_calls"], calls);
            assert_eq!(reason, "tool_calls");
        }
    }
}

/// The model would rather write other arguments, or another function's, or no call at all.
#[tokio::test]
async fn strict_functions_are_followed_where_the_model_decides_to_call_them() {
    let strict = json!({"type": "function", "function": {"name": "get_weather", "strict": true, "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"], "additionalProperties": false}}});
    let any = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["b"]}}});
    let offered = json!({"tools": [strict, any], "parallel_tool_calls": false});
    let add = ("add", r#"{"a": 1}"#);
    check(ADD, offered.clone(), Value::Null, &[add], "tool_calls").await;
    let forced = ("get_weather", r#"{"city": "Rome"}"#);
    let says = format!("I look.\n{WEATHER}");
    check(
        &says,
        offered.clone(),
        json!("I look."),
        &[forced],
        "tool_calls",
    )
    .await;
    check(
        "I would rather not.",
        offered,
        json!("I would rather not."),
        &[],
        "stop",
    )
    .await;
}

#[tokio::test]
async fn shapes_that_cannot_be_followed_are_refused_by_their_field() {
    let node = node().await;
    let long = "a".repeat(300_000);
    let many_long_tools: Vec<Value> = (0..11)
        .map(|i| json!({"type": "function", "function": {"name": format!("f{i}"), "description": "a".repeat(100_000)}}))
        .collect();
    for (fields, param) in [
        (
            json!({"response_format": {"type": "json_schema"}}),
            "response_format.json_schema.schema",
        ),
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format.type",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}),
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/x"}}}}),
            "response_format",
        ),
        (json!({"guided_json": 5}), "guided_json"),
        (json!({"guided_regex": "("}), "guided_regex"),
        (json!({"guided_regex": long}), "guided_regex"),
        (json!({"guided_grammar": "start: x"}), "guided_grammar"),
        (json!({"guided_choice": []}), "guided_choice"),
        (json!({"guided_choice": ["a", ""]}), "guided_choice[1]"),
        (
            json!({"guided_choice": ["a"], "guided_regex": "a"}),
            "guided_choice",
        ),
        (
            json!({"guided_choice": ["a"], "ignore_eos": true}),
            "ignore_eos",
        ),
        (json!({"tools": many_long_tools}), "tools"),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5});
        for (key, value) in fields.as_object().unwrap() {
            body[key] = value.clone();
        }
        let reply = node.post("/v1/chat/completions", &body.to_string()).await;
        let (status, _, found) = reply.error();
        assert_eq!(
            (status, found.as_deref()),
            (400, Some(param)),
            "{fields}: {}",
            reply.body
        );
    }
    node.must_serve().await;
}
