//! OpenAI's Responses.

use serde_json::{Value, json};

use super::kit::{Node, Reply};

fn body(says: &str, fields: &Value) -> Value {
    let mut body = json!({"model": "tiny", "temperature": 0, "input": format!("say [[{says}]]")});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn ask(node: &Node, body: &Value) -> Reply {
    node.post("/v1/responses", &body.to_string()).await
}

/// Events by name, whose data has the name as its type and its place as its number.
fn events(reply: &Reply) -> Vec<Value> {
    let blocks = reply.body.split("\n\n").filter(|block| !block.is_empty());
    let event = |(idx, block): (usize, &str)| {
        let (name, data) = block.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(
            name.strip_prefix("event: "),
            data["type"].as_str(),
            "{block}"
        );
        assert_eq!(data["sequence_number"], idx, "{block}");
        data
    };
    blocks.enumerate().map(event).collect()
}

/// The output that a stream's events make, as official clients put it together; every `done` event has
/// to say the same as what came before it.
fn assembled(events: &[Value]) -> Value {
    let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..2], ["response.created", "response.in_progress"]);
    assert_eq!(events[0]["response"]["output"], json!([]));
    let mut output: Vec<Value> = Vec::new();
    let last = events.len() - 1;
    for event in &events[2..last] {
        let kind = event["type"].as_str().unwrap();
        let idx = event["output_index"].as_u64().unwrap() as usize;
        if kind == "response.output_item.added" {
            assert_eq!(idx, output.len(), "{event}");
            assert_eq!(event["item"]["status"], "in_progress", "{event}");
            output.push(event["item"].clone());
            continue;
        }
        assert_eq!(idx + 1, output.len(), "{event}");
        let item = &mut output[idx];
        if kind == "response.output_item.done" {
            item["status"] = event["item"]["status"].clone();
            assert_eq!(*item, event["item"]);
            continue;
        }
        assert_eq!(event["item_id"], item["id"], "{event}");
        let more = |old: &Value, new: &Value| {
            json!(old.as_str().unwrap().to_owned() + new.as_str().unwrap())
        };
        match kind {
            "response.content_part.added" => {
                item["content"]
                    .as_array_mut()
                    .unwrap()
                    .push(event["part"].clone());
            }
            "response.output_text.delta" | "response.reasoning_text.delta" => {
                let part = &mut item["content"][0];
                part["text"] = more(&part["text"], &event["delta"]);
                for entry in event["logprobs"].as_array().into_iter().flatten() {
                    part["logprobs"].as_array_mut().unwrap().push(entry.clone());
                }
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(event["text"], item["content"][0]["text"]);
            }
            "response.content_part.done" => assert_eq!(event["part"], item["content"][0]),
            "response.function_call_arguments.delta" => {
                item["arguments"] = more(&item["arguments"], &event["delta"]);
            }
            "response.function_call_arguments.done" => {
                assert_eq!(
                    (&event["arguments"], &event["name"]),
                    (&item["arguments"], &item["name"])
                );
            }
            other => panic!("{other}"),
        }
    }
    let response = &events[last]["response"];
    assert_eq!(response["output"], json!(output));
    let status = response["status"].as_str().unwrap();
    assert_eq!(events[last]["type"], format!("response.{status}"));
    response.clone()
}

/// What differs from answer to answer is checked and taken out.
fn comparable(mut response: Value) -> Value {
    assert!(response["id"].as_str().unwrap().starts_with("resp-"));
    for item in response["output"].as_array_mut().unwrap() {
        let item = item.as_object_mut().unwrap();
        let id = item.remove("id").unwrap();
        let prefix = match item["type"].as_str().unwrap() {
            "message" => "msg_",
            "reasoning" => "rs_",
            _ => "fc_",
        };
        assert!(id.as_str().unwrap().starts_with(prefix), "{id}");
        if let Some(id) = item.remove("call_id") {
            assert!(id.as_str().unwrap().starts_with("call_"), "{id}");
        }
    }
    json!([
        response["status"],
        response["incomplete_details"],
        response["output"]
    ])
}

async fn check(says: &str, fields: Value, output: Value, reason: Value) {
    let node = Node::reciting().await;
    let mut body = body(says, &fields);
    let whole = ask(&node, &body).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    let (status, details) = match &reason {
        Value::Null => ("completed", Value::Null),
        reason => ("incomplete", json!({"reason": reason})),
    };
    let expected = json!([status, details, output]);
    let total = whole["usage"]["total_tokens"].clone();
    assert_eq!(comparable(whole), expected, "{says}");
    body["stream"] = json!(true);
    // The executor has to see all of each prompt.
    body["input"] = json!(format!("pay [[{says}]]"));
    let streamed = assembled(&events(&ask(&node, &body).await));
    assert_eq!(streamed["usage"]["total_tokens"], total, "{says}, streamed");
    assert_eq!(comparable(streamed), expected, "{says}, streamed");
}

fn message(text: &str) -> Value {
    let part = json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []});
    json!({"type": "message", "status": "completed", "role": "assistant", "content": [part]})
}

#[tokio::test]
async fn answers_have_text_thoughts_and_calls_whole_and_streamed() {
    let none = || json!({});
    check("hello", none(), json!([message("hello")]), Value::Null).await;
    let mut cut = message("he");
    cut["status"] = json!("incomplete");
    let most = json!({"max_output_tokens": 2});
    check("hello", most, json!([cut]), json!("max_output_tokens")).await;
    let thoughts = json!({"type": "reasoning", "status": "completed", "summary": [], "encrypted_content": null,
        "content": [{"type": "reasoning_text", "text": "hm"}]});
    let thinking = json!({"thinking": {"type": "enabled"}});
    check(
        "hm</think>ok",
        thinking,
        json!([thoughts, message("ok")]),
        Value::Null,
    )
    .await;
    let tools = json!({"tools": [{"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}}]});
    let call = |arguments: &str| json!({"type": "function_call", "status": "completed", "name": "add", "arguments": arguments});
    let says = "I add.\n<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>\n<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    let output = json!([message("I add."), call("{\"a\": 1}"), call("{}")]);
    check(says, tools, output, Value::Null).await;
}

#[tokio::test]
async fn answers_say_what_was_asked() {
    let node = Node::reciting().await;
    let tool = json!({"type": "function", "name": "add", "parameters": {"type": "object"}});
    let fields = json!({
        "instructions": "Be brief.", "metadata": {"k": "v"}, "tools": [tool], "tool_choice": "none", "max_output_tokens": 9,
        "store": true, "truncation": "auto", "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"],
        "top_logprobs": 2, "something": 1, "user": "u",
    });
    let reply = ask(&node, &body("hi", &fields)).await;
    assert_eq!(reply.header("x-dsd-ignored-fields"), Some("something"));
    let found = reply.json();
    for (name, expected) in [
        ("object", json!("response")),
        ("instructions", json!("Be brief.")),
        ("metadata", json!({"k": "v"})),
        ("tools", json!([tool])),
        ("tool_choice", json!("none")),
        ("max_output_tokens", json!(9)),
        ("store", json!(false)),
        ("truncation", json!("disabled")),
        ("reasoning", json!({"effort": "low", "summary": null})),
        ("text", json!({"format": {"type": "text"}})),
        ("parallel_tool_calls", json!(true)),
        ("temperature", json!(0.0)),
        ("top_p", json!(1.0)),
        ("top_logprobs", json!(2)),
        ("previous_response_id", Value::Null),
        ("user", json!("u")),
        ("error", Value::Null),
    ] {
        assert_eq!(found[name], expected, "{name}");
    }
    let logprobs = &found["output"][0]["content"][0]["logprobs"];
    assert_eq!(
        (&logprobs[0]["token"], logprobs.as_array().unwrap().len()),
        (&json!("h"), 2)
    );
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_conversation_goes_on_where_its_items_are_sent_again() {
    let node = Node::reciting().await;
    let mut body = body(
        "x",
        &json!({"tools": [{"type": "function", "name": "add", "parameters": {}}]}),
    );
    body["input"] = json!([
        {"role": "user", "content": "add"},
        {"type": "reasoning", "id": "rs_0", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "id": "fc_0", "call_id": "c", "name": "add", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": "21 [[ok]]"},
    ]);
    let answer = ask(&node, &body).await.json();
    assert_eq!(answer["output"][0]["content"][0]["text"], "ok");
    let counted = node
        .post("/v1/responses/input_tokens", &body.to_string())
        .await;
    let expected =
        json!({"object": "response.input_tokens", "input_tokens": answer["usage"]["input_tokens"]});
    assert_eq!(counted.json(), expected);
}

#[tokio::test]
async fn what_needs_a_memory_is_refused_by_its_name() {
    let node = Node::reciting().await;
    for (fields, code, param) in [
        (
            json!({"previous_response_id": "resp-1"}),
            "unsupported",
            "previous_response_id",
        ),
        (json!({"conversation": "c"}), "unsupported", "conversation"),
        (json!({"background": true}), "unsupported", "background"),
        (
            json!({"tools": [{"type": "web_search"}]}),
            "unsupported",
            "tools[0].type",
        ),
        (json!({"input": []}), "invalid_request", "input"),
        (
            json!({"input": "a".repeat(10_000)}),
            "context_length_exceeded",
            "input",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}}),
            "invalid_request",
            "text.format",
        ),
    ] {
        let (status, found_code, found) = ask(&node, &body("x", &fields)).await.error();
        assert_eq!(
            (status, &found_code[..], found.as_deref()),
            (400, code, Some(param)),
            "{param}"
        );
    }
    let (status, code, _) = node.get("/v1/responses/resp-1").await.error();
    assert_eq!((status, &code[..]), (404, "not_found"));
    node.must_serve().await;
}
