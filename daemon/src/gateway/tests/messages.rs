//! Anthropic's door.

use serde_json::{Value, json};

use super::kit::{Node, Reply};

fn body(says: &str, fields: &Value) -> Value {
    let mut body = json!({
        "model": "tiny", "max_tokens": 500, "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": format!("say [[{says}]]")}]}],
    });
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn ask(node: &Node, body: &Value) -> Reply {
    node.post("/v1/messages", &body.to_string()).await
}

/// Events by name, whose data has the name as its type.
fn events(reply: &Reply) -> Vec<Value> {
    let blocks = reply.body.split("\n\n").filter(|block| !block.is_empty());
    let event = |block: &str| {
        let (name, data) = block.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(
            name.strip_prefix("event: "),
            data["type"].as_str(),
            "{block}"
        );
        data
    };
    blocks.map(event).collect()
}

/// The message that a stream's events make, as official clients put it together.
fn assembled(events: &[Value]) -> Value {
    assert_eq!(events[0]["type"], "message_start", "{events:?}");
    assert_eq!(events.last().unwrap()["type"], "message_stop", "{events:?}");
    let mut message = events[0]["message"].clone();
    let mut json_of = Vec::<String>::new();
    let mut open = None;
    for event in &events[1..] {
        let index = event["index"].as_u64().map(|index| index as usize);
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!((open, index), (None, Some(json_of.len())), "{events:?}");
                open = index;
                json_of.push(String::new());
                message["content"]
                    .as_array_mut()
                    .unwrap()
                    .push(event["content_block"].clone());
            }
            "content_block_delta" => {
                assert_eq!(open, index, "{events:?}");
                let index = index.unwrap();
                let block = &mut message["content"][index];
                let delta = &event["delta"];
                let field = match delta["type"].as_str().unwrap() {
                    "text_delta" => "text",
                    "thinking_delta" => "thinking",
                    "input_json_delta" => {
                        json_of[index] += delta["partial_json"].as_str().unwrap();
                        continue;
                    }
                    other => panic!("{other}"),
                };
                let text = format!(
                    "{}{}",
                    block[field].as_str().unwrap(),
                    delta[field].as_str().unwrap()
                );
                block[field] = json!(text);
            }
            "content_block_stop" => assert_eq!(open.take(), index, "{events:?}"),
            "message_delta" => {
                for (key, value) in event["delta"].as_object().unwrap() {
                    message[key] = value.clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "message_stop" | "ping" => {}
            other => panic!("{other}"),
        }
    }
    for (block, json) in message["content"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .zip(json_of)
    {
        if block["type"] == "tool_use" {
            block["input"] = serde_json::from_str(&json).unwrap_or_else(|_| json!(json));
        }
    }
    message
}

/// Without what differs from answer to answer.
fn comparable(mut message: Value) -> Value {
    assert!(message["id"].as_str().unwrap().starts_with("msg-"));
    message["id"] = Value::Null;
    message["usage"] = Value::Null;
    for block in message["content"].as_array_mut().unwrap() {
        if let Some(id) = block.get_mut("id") {
            assert!(id.as_str().unwrap().starts_with("toolu_"));
            *id = Value::Null;
        }
    }
    message
}

async fn check(says: &str, fields: Value, content: Value, reason: &str, sequence: Value) {
    let node = Node::reciting().await;
    let mut body = body(says, &fields);
    let whole = ask(&node, &body).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = comparable(whole.json());
    let expected = json!({
        "id": null, "type": "message", "role": "assistant", "model": "tiny", "content": content,
        "stop_reason": reason, "stop_sequence": sequence, "usage": null,
    });
    assert_eq!(whole, expected, "{says}");
    body["stream"] = json!(true);
    // The executor has to see all of each prompt.
    body["messages"][0]["content"][0]["text"] = json!(format!("please say [[{says}]]"));
    let streamed = assembled(&events(&ask(&node, &body).await));
    assert_eq!(comparable(streamed), expected, "{says}, streamed");
}

#[tokio::test]
async fn answers_have_text_thoughts_and_calls_whole_and_streamed() {
    let text = |text: &str| json!({"type": "text", "text": text});
    check(
        "hello",
        json!({}),
        json!([text("hello")]),
        "end_turn",
        Value::Null,
    )
    .await;
    let stop = json!({"stop_sequences": ["lo", "x"]});
    check(
        "hello",
        stop,
        json!([text("hel")]),
        "stop_sequence",
        json!("lo"),
    )
    .await;
    check(
        "hello",
        json!({"max_tokens": 2}),
        json!([text("he")]),
        "max_tokens",
        Value::Null,
    )
    .await;
    let thinking = json!({"thinking": {"type": "enabled", "budget_tokens": 1024}});
    let thoughts = json!({"type": "thinking", "thinking": "hm", "signature": ""});
    check(
        "hm</think>ok",
        thinking,
        json!([thoughts, text("ok")]),
        "end_turn",
        Value::Null,
    )
    .await;
    let tools = json!({"tools": [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]});
    let call =
        |input: Value| json!({"type": "tool_use", "id": null, "name": "add", "input": input});
    let says = "I add.\n<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>\n<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    let content = json!([text("I add."), call(json!({"a": 1})), call(json!({}))]);
    check(says, tools, content, "tool_use", Value::Null).await;
}

#[tokio::test]
async fn tokens_are_counted_as_the_request_makes_them() {
    let node = Node::reciting().await;
    let mut body = body("x", &json!({}));
    let used = ask(&node, &body).await.json()["usage"].clone();
    let n_prompt =
        used["input_tokens"].as_u64().unwrap() + used["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(used["output_tokens"], 2, "{used}");
    body.as_object_mut().unwrap().remove("max_tokens");
    let counted = node
        .post("/anthropic/v1/messages/count_tokens", &body.to_string())
        .await;
    assert_eq!(counted.json(), json!({"input_tokens": n_prompt}));
}

#[tokio::test]
async fn errors_are_anthropics() {
    let node = Node::reciting().await;
    for (body, status, kind) in [
        ("{", 400, "invalid_request_error"),
        (r#"{"messages": []}"#, 400, "invalid_request_error"),
        (
            r#"{"model": "other", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}"#,
            404,
            "not_found_error",
        ),
    ] {
        let reply = node.post("/anthropic/v1/messages", body).await;
        let error = reply.json();
        assert_eq!(
            (reply.status, &error["type"]),
            (status, &json!("error")),
            "{error}"
        );
        assert_eq!(error["error"]["type"], kind, "{error}");
        assert!(error["error"]["message"].is_string(), "{error}");
    }
    let json = "content-type: application/json\r\n";
    let of = |reply: Reply| {
        let error = reply.json();
        assert_eq!(error["type"], "error", "{error}");
        let kind = error["error"]["type"].as_str().unwrap().to_owned();
        (reply.status, kind)
    };
    let long = vec![b' '; super::kit::config().body_len_max + 1];
    let too_long = node.post_with("/v1/messages", json, &long).await;
    assert_eq!(of(too_long), (413, "request_too_large".to_owned()));
    let no_json = node.post_with("/v1/messages", "", b"{}").await;
    assert_eq!(of(no_json), (415, "invalid_request_error".to_owned()));
    let get = node.get("/v1/messages").await;
    assert_eq!(get.header("allow"), Some("POST"));
    assert_eq!(of(get), (405, "invalid_request_error".to_owned()));
    for path in ["/v1/messages/batches", "/anthropic/v1/other"] {
        let unknown = node.post(path, "{}").await;
        assert_eq!(of(unknown), (404, "not_found_error".to_owned()), "{path}");
    }
    node.must_serve().await;
}
