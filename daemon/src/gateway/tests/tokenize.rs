//! Texts to tokens and back.

use serde_json::json;

use super::kit::Node;

async fn post(node: &Node, path: &str, body: serde_json::Value) -> serde_json::Value {
    let reply = node.post(path, &body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.json()
}

#[tokio::test]
async fn texts_become_tokens_and_texts_again() {
    let node = Node::quick().await;
    let found = post(
        &node,
        "/tokenize",
        json!({"prompt": "hi<|end|>", "return_token_strs": true}),
    )
    .await;
    let expected = json!({"count": 3, "max_model_len": 256, "tokens": [104, 105, 256], "token_strs": ["h", "i", "<|end|>"]});
    assert_eq!(found, expected);
    let plain = post(
        &node,
        "/tokenize",
        json!({"content": "<|", "parse_special": false}),
    )
    .await;
    assert_eq!(plain["tokens"], json!([60, 124]));
    let chat = post(
        &node,
        "/tokenize",
        json!({"messages": [{"role": "user", "content": "<|end|>"}]}),
    )
    .await;
    let back = post(&node, "/detokenize", json!({"tokens": chat["tokens"]})).await;
    assert_eq!(back, json!({"prompt": "user: <|end|><|end|>assistant:"}));
    assert_eq!(
        chat["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|id| **id == 256)
            .count(),
        1
    );
    assert_eq!(
        node.get("/version").await.json()["version"],
        env!("CARGO_PKG_VERSION")
    );
}

#[tokio::test]
async fn what_is_no_text_or_token_is_refused_by_its_field() {
    let node = Node::quick().await;
    for (path, body, param) in [
        ("/tokenize", "{}", "prompt"),
        ("/tokenize", r#"{"messages": []}"#, "messages"),
        ("/detokenize", "{}", "tokens"),
        ("/detokenize", r#"{"tokens": [104, 9999]}"#, "tokens[1]"),
    ] {
        let (status, _, found) = node.post(path, body).await.error();
        assert_eq!(
            (status, found.as_deref()),
            (400, Some(param)),
            "{path} {body}"
        );
    }
}
