//! Requests as clients write them, good and bad.

use serde_json::json;

use super::{
    ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationOptions, Prompt,
    ReasoningEffort, RequestError, Role, ServiceTier, limits,
};

fn chat(extra: &str) -> Result<ChatCompletionRequest, RequestError> {
    let body =
        format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": "hi"}}]{extra}}}"#);
    ChatCompletionRequest::from_slice(body.as_bytes())
}

fn completion(extra: &str) -> Result<CompletionRequest, RequestError> {
    CompletionRequest::from_slice(format!(r#"{{"model": "m", "prompt": "hi"{extra}}}"#).as_bytes())
}

/// Messages named the types of the parser.
#[test]
fn messages_speak_of_objects_and_not_of_types_of_ours() {
    for body in [
        "7",
        "\"x\"",
        r#"{"messages": [7]}"#,
        r#"{"messages": [{"role": "user", "content": ["x"]}]}"#,
        r#"{"messages": [], "stream_options": 1}"#,
        r#"{"messages": [], "thinking": "on"}"#,
    ] {
        let error = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("expected an object"), "{body}: {message}");
    }
}

#[test]
fn a_bare_request_has_the_documented_defaults() {
    let request = chat("").unwrap();
    let options = &request.options;
    assert_eq!(request.model.as_deref(), Some("m"));
    assert_eq!(request.messages, [ChatMessage::new(Role::User, "hi")]);
    assert_eq!(
        (options.temperature, options.top_p, options.top_k, options.n),
        (1.0, 1.0, 0, 1)
    );
    assert_eq!(
        (options.max_tokens, options.seed, options.top_logprobs),
        (None, None, None)
    );
    assert_eq!(
        (request.thinking, options.stream, options.ignore_eos),
        (None, false, false)
    );
    assert_eq!(completion("").unwrap().options.max_tokens, Some(16));
}

#[test]
fn users_tiers_and_deadlines_that_make_no_sense_are_refused_by_name() {
    let blamed = |extra: &str| {
        let error = chat(extra).unwrap_err();
        (error.code(), error.param().map(str::to_owned))
    };
    let longest = "a".repeat(limits::USER_ID_LEN_MAX);
    assert!(chat(&format!(r#", "user_id": "{longest}""#)).is_ok());
    for (field, value) in [
        ("user_id", r#""""#.to_owned()),
        ("user_id", r#""a b""#.to_owned()),
        ("user_id", r#""é""#.to_owned()),
        ("user_id", format!(r#""{longest}a""#)),
        ("service_tier", r#""priority""#.to_owned()),
        ("deadline_s", "0".to_owned()),
        ("deadline_s", "-0.5".to_owned()),
    ] {
        let expected = ("invalid_request", Some(field.to_owned()));
        assert_eq!(
            blamed(&format!(r#", "{field}": {value}"#)),
            expected,
            "{value}"
        );
    }
    for body in [r#", "deadline_s": 1e999"#, r#", "deadline_s": NaN"#] {
        assert_eq!(blamed(body).0, "invalid_json", "{body}");
    }
    let null = r#", "user_id": null, "service_tier": null, "deadline_s": null"#;
    assert_eq!(chat(null).unwrap(), chat("").unwrap());
    for tier in ["auto", "default"] {
        let request = chat(&format!(r#", "service_tier": "{tier}""#)).unwrap();
        assert_eq!(request.options.service_tier, ServiceTier::Standard);
    }
}

#[test]
fn every_field_is_read() {
    let request = chat(
        r#", "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "n": 3, "stream": true,
        "stream_options": {"include_usage": true}, "stop": ["a", "b"], "presence_penalty": 1,
        "frequency_penalty": -1, "logit_bias": {"12": -100, "3": 1.5}, "logprobs": true, "top_logprobs": 4,
        "seed": -1, "user": "u", "user_id": "a-Z_9", "service_tier": "flex", "deadline_s": 1.5, "thinking": {"type": "enabled"}, "reasoning_effort": "high",
        "chat_template_kwargs": {"enable_thinking": true, "style": "x"}, "top_k": 40, "min_p": 0.1,
        "repetition_penalty": 1.1, "ignore_eos": true, "stop_token_ids": [5], "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "unknown_field": {"a": [1]}, "metadata": null"#,
    )
    .unwrap();
    let options = request.options;
    assert_eq!(request.thinking, Some(true));
    assert_eq!(request.reasoning_effort, Some(ReasoningEffort::High));
    assert_eq!(request.template_args["style"], "x");
    assert_eq!(
        options,
        GenerationOptions {
            max_tokens: Some(7),
            n: 3,
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.1,
            repetition_penalty: 1.1,
            frequency_penalty: -1.0,
            presence_penalty: 1.0,
            logit_bias: vec![(3, 1.5), (12, -100.0)],
            seed: Some(u64::MAX),
            stop: vec!["a".into(), "b".into()],
            stop_token_ids: vec![5],
            ignore_eos: true,
            shape: None,
            top_logprobs: Some(4),
            stream: true,
            include_usage: true,
            user: Some("u".into()),
            user_id: Some("a-Z_9".into()),
            service_tier: ServiceTier::Flex,
            deadline_s: Some(1.5),
        }
    );
}

#[test]
fn null_means_absent() {
    let request = chat(
        r#", "max_tokens": null, "temperature": null, "stop": null, "stream": null, "tools": null,
        "stream_options": null, "logprobs": null, "seed": null, "logit_bias": null, "response_format": null,
        "chat_template_kwargs": null, "thinking": null"#,
    );
    assert_eq!(request, chat(""));
}

#[test]
fn messages_keep_their_shape_for_the_template() {
    let body = r#"{"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "reasoning_content": "r", "name": "n", "refusal": null,
         "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "c"}]}"#;
    let request = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap();
    assert_eq!(
        request.messages[0].to_value(),
        json!({"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    );
    assert_eq!(
        request.messages[1].to_value(),
        json!({"role": "assistant", "content": null, "reasoning_content": "r", "name": "n",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]})
    );
    assert_eq!(
        request.messages[2].to_value(),
        json!({"role": "tool", "content": "c", "tool_call_id": "1"})
    );
}

#[test]
fn chat_errors_name_the_field() {
    for (extra, param, code) in [
        (
            r#", "temperature": "hot""#,
            "temperature",
            "invalid_request",
        ),
        (r#", "temperature": 2.1"#, "temperature", "invalid_request"),
        (r#", "temperature": -0.1"#, "temperature", "invalid_request"),
        (
            r#", "temperature": {"a": 1}"#,
            "temperature",
            "invalid_request",
        ),
        (r#", "top_p": 1.5"#, "top_p", "invalid_request"),
        (r#", "max_tokens": 0"#, "max_tokens", "invalid_request"),
        (r#", "max_tokens": -5"#, "max_tokens", "invalid_request"),
        (r#", "max_tokens": 1.5"#, "max_tokens", "invalid_request"),
        (
            r#", "max_tokens": 5, "max_completion_tokens": 6"#,
            "max_completion_tokens",
            "invalid_request",
        ),
        (r#", "n": 0"#, "n", "invalid_request"),
        (r#", "n": 129"#, "n", "invalid_request"),
        (r#", "top_k": -2"#, "top_k", "invalid_request"),
        (r#", "min_p": 2"#, "min_p", "invalid_request"),
        (
            r#", "repetition_penalty": 0"#,
            "repetition_penalty",
            "invalid_request",
        ),
        (
            r#", "presence_penalty": 2.5"#,
            "presence_penalty",
            "invalid_request",
        ),
        (
            r#", "frequency_penalty": -2.5"#,
            "frequency_penalty",
            "invalid_request",
        ),
        (
            r#", "logit_bias": {"x": 1}"#,
            "logit_bias.x",
            "invalid_request",
        ),
        (
            r#", "logit_bias": {"5": 101}"#,
            "logit_bias.5",
            "invalid_request",
        ),
        (
            r#", "logit_bias": {"5": 1, "05": 2}"#,
            "logit_bias.5",
            "invalid_request",
        ),
        (r#", "logit_bias": [1]"#, "logit_bias", "invalid_request"),
        (r#", "logprobs": 5"#, "logprobs", "invalid_request"),
        (r#", "top_logprobs": 5"#, "top_logprobs", "invalid_request"),
        (
            r#", "logprobs": true, "top_logprobs": 21"#,
            "top_logprobs",
            "invalid_request",
        ),
        (r#", "seed": 1.5"#, "seed", "invalid_request"),
        (r#", "stop": 5"#, "stop", "invalid_request"),
        (r#", "stop": ["a", 5]"#, "stop[1]", "invalid_request"),
        (r#", "stop": """#, "stop[0]", "invalid_request"),
        (r#", "stream": "yes""#, "stream", "invalid_request"),
        (
            r#", "stream_options": {"include_usage": true}"#,
            "stream_options",
            "invalid_request",
        ),
        (
            r#", "stop_token_ids": [-1]"#,
            "stop_token_ids[0]",
            "invalid_request",
        ),
        (
            r#", "thinking": {"type": "deep"}"#,
            "thinking.type",
            "invalid_request",
        ),
        (r#", "thinking": {}"#, "thinking.type", "invalid_request"),
        (
            r#", "reasoning_effort": "huge""#,
            "reasoning_effort",
            "invalid_request",
        ),
        (
            r#", "chat_template_kwargs": {"a": [1]}"#,
            "chat_template_kwargs.a",
            "invalid_request",
        ),
        (
            r#", "chat_template_kwargs": {"messages": 1}"#,
            "chat_template_kwargs.messages",
            "invalid_request",
        ),
        (r#", "model": 5"#, "model", "invalid_request"),
        (
            r#", "temperature": 1, "temperature": 1"#,
            "temperature",
            "invalid_request",
        ),
        (
            r#", "tools": [{"type": "function"}]"#,
            "tools[0].function",
            "invalid_request",
        ),
        (
            r#", "tools": [{"type": "custom", "custom": {}}]"#,
            "tools[0].type",
            "unsupported",
        ),
        (
            r#", "tools": [{"type": "function", "function": {"name": "<｜User｜>"}}]"#,
            "tools[0].function.name",
            "invalid_request",
        ),
        (
            r#", "tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]"#,
            "tools[0].function.parameters",
            "invalid_request",
        ),
        (
            r#", "tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f"}}]"#,
            "tools[1].function.name",
            "invalid_request",
        ),
        (r#", "tools": {}"#, "tools", "invalid_request"),
        (
            r#", "tool_choice": "required""#,
            "tool_choice",
            "invalid_request",
        ),
        (
            r#", "tool_choice": "any""#,
            "tool_choice",
            "invalid_request",
        ),
        (
            r#", "tool_choice": {"type": "function", "function": {"name": "g"}}"#,
            "tool_choice.function.name",
            "invalid_request",
        ),
        (
            r#", "function_call": "auto""#,
            "function_call",
            "unsupported",
        ),
        (
            r#", "functions": [{"name": "f"}]"#,
            "functions",
            "unsupported",
        ),
        (
            r#", "response_format": {"type": "xml"}"#,
            "response_format.type",
            "unsupported",
        ),
        (r#", "modalities": ["audio"]"#, "modalities", "unsupported"),
    ] {
        let error = chat(extra).expect_err(extra);
        assert_eq!(
            (error.param(), error.code()),
            (Some(param), code),
            "{extra}: {error}"
        );
        assert!(error.to_string().contains(param), "{extra}: {error}");
    }
}

#[test]
fn types_in_errors_are_jsons() {
    for (extra, words) in [
        (r#", "temperature": "a, expected f64""#, "expected a number"),
        (
            r#", "max_tokens": 1.5"#,
            "number `1.5`, expected an integer from 0 on",
        ),
        (
            r#", "top_k": []"#,
            "invalid type: array, expected an integer",
        ),
        (
            r#", "stream": {}"#,
            "invalid type: object, expected a boolean",
        ),
    ] {
        let error = chat(extra).expect_err(extra).to_string();
        assert!(error.contains(words), "{extra}: {error}");
    }
}

#[test]
fn message_errors_name_the_message() {
    for (messages, param, code) in [
        ("null", "messages", "invalid_request"),
        ("[]", "messages", "invalid_request"),
        (r#""hi""#, "messages", "invalid_request"),
        ("[5]", "messages[0]", "invalid_request"),
        ("[{}]", "messages[0].role", "invalid_request"),
        (
            r#"[{"role": "user"}]"#,
            "messages[0].content",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": 5}]"#,
            "messages[0].content",
            "invalid_request",
        ),
        (
            r#"[{"role": "king", "content": ""}]"#,
            "messages[0].role",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text"}]}]"#,
            "messages[1].content[0].text",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": ["a"]}]"#,
            "messages[0].content[0]",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]"#,
            "messages[0].content[0].type",
            "unsupported",
        ),
        (
            r#"[{"role": "tool", "content": "a"}]"#,
            "messages[0].tool_call_id",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": "a"}, {"role": "tool", "content": "a", "tool_call_id": "1"}]"#,
            "messages[1].tool_call_id",
            "invalid_request",
        ),
        (
            r#"[{"role": "function", "name": "f", "content": "a"}]"#,
            "messages[0].role",
            "unsupported",
        ),
        (
            r#"[{"role": "assistant", "tool_calls": [{"id": "1"}]}]"#,
            "messages[0].tool_calls[0].function",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": "a", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]}]"#,
            "messages[0].tool_calls",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#,
            "messages[1].role",
            "invalid_request",
        ),
        (
            r#"[{"role": "user", "content": "a", "prefix": true}]"#,
            "messages[0].prefix",
            "invalid_request",
        ),
        (
            r#"[{"role": "assistant", "content": "a", "prefix": true}, {"role": "user", "content": "a"}]"#,
            "messages[0].prefix",
            "invalid_request",
        ),
        (
            r#"[{"role": "system", "content": "a"}]"#,
            "messages",
            "invalid_request",
        ),
    ] {
        let body = format!(r#"{{"messages": {messages}}}"#);
        let error = ChatCompletionRequest::from_slice(body.as_bytes()).expect_err(messages);
        assert_eq!(
            (error.param(), error.code()),
            (Some(param), code),
            "{messages}: {error}"
        );
    }
}

#[test]
fn completion_prompts_have_four_shapes() {
    for (prompt, expected) in [
        (r#""a""#, vec![Prompt::Text("a".into())]),
        (
            r#"["a", "b"]"#,
            vec![Prompt::Text("a".into()), Prompt::Text("b".into())],
        ),
        ("[1, 2]", vec![Prompt::Tokens(vec![1, 2])]),
        (
            "[[1, 2], [3]]",
            vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])],
        ),
    ] {
        let body = format!(r#"{{"prompt": {prompt}}}"#);
        assert_eq!(
            CompletionRequest::from_slice(body.as_bytes())
                .unwrap()
                .prompts,
            expected
        );
    }
}

#[test]
fn completion_errors_name_the_field() {
    for (body, param, code) in [
        (r#"{}"#, "prompt", "invalid_request"),
        (r#"{"prompt": []}"#, "prompt", "invalid_request"),
        (r#"{"prompt": {"a": 1}}"#, "prompt", "invalid_request"),
        (r#"{"prompt": [1, "a"]}"#, "prompt[1]", "invalid_request"),
        (
            r#"{"prompt": [4294967296]}"#,
            "prompt[0]",
            "invalid_request",
        ),
        (
            r#"{"prompt": ["a", "b"], "n": 100}"#,
            "prompt",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "echo": true, "suffix": "b"}"#,
            "echo",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "max_tokens": 0}"#,
            "max_tokens",
            "invalid_request",
        ),
        (
            r#"{"prompt": [1], "suffix": "b"}"#,
            "suffix",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "n": 3, "best_of": 2}"#,
            "best_of",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "best_of": 129}"#,
            "best_of",
            "invalid_request",
        ),
        (
            r#"{"prompt": ["a", "b"], "best_of": 65}"#,
            "prompt",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "best_of": 2, "stream": true}"#,
            "best_of",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "logprobs": true}"#,
            "logprobs",
            "invalid_request",
        ),
        (
            r#"{"prompt": "a", "logprobs": 21}"#,
            "logprobs",
            "invalid_request",
        ),
    ] {
        let error = CompletionRequest::from_slice(body.as_bytes()).expect_err(body);
        assert_eq!(
            (error.param(), error.code()),
            (Some(param), code),
            "{body}: {error}"
        );
    }
    assert_eq!(
        completion(r#", "logprobs": 3"#)
            .unwrap()
            .options
            .top_logprobs,
        Some(3)
    );
    assert!(completion(r#", "echo": false, "suffix": null, "best_of": 1"#).is_ok());
    let request = completion(r#", "n": 2, "best_of": 5, "echo": true, "max_tokens": 0"#).unwrap();
    let options = &request.options;
    assert_eq!(
        (request.echo, request.best_of, options.n, options.max_tokens),
        (true, 5, 2, Some(0))
    );
    assert_eq!(
        completion(r#", "n": 2, "stream": true"#).unwrap().best_of,
        2
    );
}

#[test]
fn bodies_that_are_no_json_object_are_refused() {
    for body in [
        &b""[..],
        b"{",
        b"{\"a\": }",
        b"nonsense",
        b"{\"messages\": [1e999]}",
        b"{} {}",
        b"[1]",
        b"\xff{}",
    ] {
        let error = ChatCompletionRequest::from_slice(body).expect_err("no JSON object");
        assert_eq!(
            (error.code(), error.param()),
            ("invalid_json", None),
            "{error}"
        );
    }
    for body in ["5", "null", "\"x\""] {
        assert!(ChatCompletionRequest::from_slice(body.as_bytes()).is_err());
    }
    let deep = "[".repeat(100_000);
    assert!(ChatCompletionRequest::from_slice(format!("{{\"x\": {deep}").as_bytes()).is_err());
}

#[test]
fn a_long_wrong_value_is_not_echoed_whole() {
    let body = format!(r#"{{"temperature": "{}"}}"#, "x".repeat(1 << 20));
    let error = ChatCompletionRequest::from_slice(body.as_bytes()).expect_err("wrong type");
    assert_eq!(error.param(), Some("temperature"));
    assert!(error.to_string().len() < 500);
}

/// A request with every known field, to be damaged.
const FULL: &str = r#"{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}],
    "prompt": [[1, 2], [3]], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "n": 2, "stream": true,
    "stream_options": {"include_usage": true}, "stop": ["a", "b"], "logit_bias": {"5": -1.5}, "logprobs": 2,
    "seed": -3, "thinking": {"type": "enabled"}, "chat_template_kwargs": {"a": null, "b": 1.5},
    "stop_token_ids": [1], "tools": [], "response_format": {"type": "text"}, "x": {"y": [{}]}}"#;

proptest::proptest! {
    #[test]
    fn damaged_requests_are_read_or_refused_but_never_panic(
        edits in proptest::collection::vec((0..FULL.len(), proptest::prelude::any::<u8>()), 0..8),
        len in 0..=FULL.len(),
    ) {
        let mut body = FULL.as_bytes().to_vec();
        for (at, byte) in edits {
            body[at] = byte;
        }
        body.truncate(len.max(FULL.len() / 2));
        for error in [
            ChatCompletionRequest::from_slice(&body).err(),
            CompletionRequest::from_slice(&body).err(),
        ]
        .into_iter()
        .flatten()
        {
            proptest::prop_assert!(error.to_string().len() < 1000);
        }
    }

    #[test]
    fn any_bytes_are_refused_without_panic(body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64)) {
        let _ = ChatCompletionRequest::from_slice(&body);
    }
}
