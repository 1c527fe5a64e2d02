//! Tools and answers of a given shape, by a real model that knows neither.

use dsd_tests::{
    data,
    http::post_bytes,
    node::{Node, NodeBuilder},
    process, wait,
};
use serde_json::{Value, json};

fn node() -> NodeBuilder {
    Node::builder(&data::smollm2())
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": {
        "type": "object", "additionalProperties": false, "required": ["city", "unit"],
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["c", "f"]}},
    }}})
}

/// Chunks of a streamed chat.
fn events(node: &Node, body: &Value, meanwhile: impl FnOnce()) -> Vec<Value> {
    let mut stream = node.connect();
    let body = serde_json::to_vec(body).unwrap();
    stream.send(&post_bytes("/v1/chat/completions", &body));
    assert_eq!(stream.head().status, 200);
    let mut bytes = stream.chunk().unwrap().unwrap();
    meanwhile();
    while let Some(chunk) = stream.chunk().unwrap() {
        bytes.extend(chunk);
    }
    let text = String::from_utf8(bytes).unwrap();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let mut data: Vec<&str> = data.collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

#[test]
fn a_model_without_tools_makes_a_call_that_is_required() {
    let node = node().start();
    for temperature in [0.0, 1.0] {
        let mut body = json!({
            "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
            "tools": [weather()], "tool_choice": "required", "parallel_tool_calls": false,
            "temperature": temperature, "seed": 7, "max_tokens": 200,
        });
        let reply = node.post("/v1/chat/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let choice = reply.json()["choices"][0].take();
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let call = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(call["name"], "get_weather");
        let whole = call["arguments"].as_str().unwrap();
        let arguments: Value = serde_json::from_str(whole).unwrap();
        assert!(
            arguments["city"].as_str().unwrap().chars().count() <= 20,
            "{whole}"
        );
        assert!(
            ["c", "f"].contains(&arguments["unit"].as_str().unwrap()),
            "{whole}"
        );
        assert_eq!(arguments.as_object().unwrap().len(), 2, "{whole}");
        body["stream"] = json!(true);
        let events = events(&node, &body, || {});
        let pieces = events.iter().filter_map(|event| {
            event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str()
        });
        assert_eq!(pieces.collect::<String>(), whole, "streamed");
    }
    // What came of it is read by the model as text.
    let body = json!({
        "messages": [
            {"role": "user", "content": "What is the weather in Rome?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\", \"unit\": \"c\"}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "21 C and sunny"}],
        "tools": [weather()], "temperature": 0, "max_tokens": 20,
    });
    let reply = node.post("/v1/chat/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
}

/// The state of a grammar follows from the tokens that came.
#[test]
fn an_answer_of_a_given_shape_survives_its_rank_with_the_same_bytes() {
    let node = node().allow("group lost").start();
    let body = json!({
        "messages": [{"role": "user", "content": "Count."}], "temperature": 1.0, "seed": 3, "max_tokens": 2000, "stream": true,
        "guided_json": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 120, "maxItems": 120},
    });
    let text = |events: Vec<Value>| -> String {
        let deltas = events
            .iter()
            .map(|event| &event["choices"][0]["delta"]["content"]);
        deltas.filter_map(Value::as_str).collect()
    };
    let undisturbed = text(events(&node, &body, || {}));
    let numbers: Vec<u32> = serde_json::from_str(&undisturbed).unwrap();
    assert_eq!(numbers.len(), 120);
    let disturbed = text(events(&node, &body, || {
        let forming = wait::until("a group", || node.logged("group forming"));
        let pids: Vec<u32> = serde_json::from_str(forming["pids"].as_str().unwrap()).unwrap();
        process::signal(pids[0], "KILL");
    }));
    assert_eq!(disturbed, undisturbed);
    assert!(node.logged("group lost").is_some(), "it was lost");
}
