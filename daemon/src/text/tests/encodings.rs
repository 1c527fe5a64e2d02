//! Prompts and answers of the models that have an encoder instead of a template, against DeepSeek's own.

use std::{fs, path::Path, sync::Arc};

use serde_json::{Value, json};

use super::{
    super::{
        ChatOptions, DSML, DsmlTags, OutputDelta, OutputForm, OutputParser, ReasoningMode,
        TextModel, ToolMarkup,
        encoding::ChatEncoding,
        reasoning::{Part, ReasoningSplitter},
        tools::{ToolParser, ToolPart},
    },
    real::{ids, tokenizer_folder},
};
use crate::weights::tests::golden;

/// The published V4 tokenizer in a folder that also has `encoder`.
fn v4_with_encoder(folder: &Path, name: &str, encoder: &str) -> TextModel {
    copy_tokenizer(folder);
    let file = folder.join(name);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, encoder).unwrap();
    TextModel::open(folder).unwrap()
}

fn copy_tokenizer(folder: &Path) {
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(
            tokenizer_folder("deepseek-v4").join(file),
            folder.join(file),
        )
        .unwrap();
    }
}

/// V4's tokenizer with the token that V4.1 has beside: none of its own is published.
fn v41(folder: &Path) -> TextModel {
    copy_tokenizer(folder);
    let file = folder.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut token = added.last().unwrap().clone();
    token["id"] = json!(token["id"].as_u64().unwrap() + 1);
    token["content"] = json!("<｜System｜>");
    added.push(token);
    fs::write(&file, tokenizer.to_string()).unwrap();
    TextModel::open(folder).unwrap()
}

fn check(label: &str, model: &TextModel, messages: &Value, options: &ChatOptions, case: &Value) {
    let prompt = model.render_chat(messages.as_array().unwrap(), options);
    let prompt = prompt.unwrap_or_else(|e| panic!("{label}: {e:?}"));
    let expected = case["prompt"].as_str().unwrap();
    assert_eq!(prompt.text, expected, "{label}");
    let reasoning = match expected.ends_with("<think>") {
        true => ReasoningMode::Inside,
        false => ReasoningMode::Off,
    };
    assert_eq!(prompt.form.reasoning, reasoning, "{label}");
    assert_eq!(prompt.form.tools.is_some(), options.tools.is_some());
    if case["ids"].is_null() {
        return;
    }
    // Who encodes prompts as a whole makes tokens of what a user spells; only there the ids differ, and by ordinary tokens.
    match case["name"] == "awkward_text" && case["request"].is_null() {
        true => assert_eq!(model.decode(&prompt.ids, false), expected, "{label}"),
        false => assert_eq!(prompt.ids, ids(&case["ids"]), "{label}"),
    }
}

/// Cases of the published encoders.
fn check_encoder(name: &str, model: &TextModel, encoding: ChatEncoding) {
    assert_eq!(model.encoding(), Some(encoding), "{name}");
    for case in golden(&format!("chat/{name}.json"))["cases"]
        .as_array()
        .unwrap()
    {
        let given = &case["options"];
        let mut options = ChatOptions {
            add_generation_prompt: true,
            thinking: Some(given["thinking_mode"] == "thinking"),
            tools: given.get("tools").cloned(),
            describe_tools: true,
            ..ChatOptions::default()
        };
        if let Some(effort) = given["reasoning_effort"].as_str() {
            options
                .template_kwargs
                .insert("reasoning_effort".to_owned(), json!(effort));
        }
        let label = format!("{name}: {} {given}", case["name"]);
        check(&label, model, &case["messages"], &options, case);
    }
}

/// Cases of `deepseek-recipe`: requests.
fn check_recipe(name: &str, model: &TextModel, encoding: ChatEncoding) {
    assert_eq!(model.encoding(), Some(encoding), "{name}");
    for case in golden(&format!("chat/{name}.json"))["cases"]
        .as_array()
        .unwrap()
    {
        let request = &case["request"];
        let mut options = ChatOptions {
            add_generation_prompt: true,
            thinking: request
                .pointer("/thinking/type")
                .map(|kind| kind == "enabled"),
            tools: request.get("tools").cloned(),
            describe_tools: true,
            ..ChatOptions::default()
        };
        if request
            .pointer("/response_format/type")
            .is_some_and(|kind| kind == "json_object")
        {
            options.schema = Some(json!({"type": "object"}));
        }
        if let Some(effort) = request["reasoning_effort"].as_str() {
            options
                .template_kwargs
                .insert("reasoning_effort".to_owned(), json!(effort));
        }
        let label = format!("{name}: {} {options:?}", case["name"]);
        check(&label, model, &request["messages"], &options, case);
    }
}

#[test]
fn encoders_write_what_deepseeks_own_do() {
    let folder = tempfile::tempdir().unwrap();
    let v32 = TextModel::open(&tokenizer_folder("deepseek-v3.2")).unwrap();
    check_encoder("deepseek-v3.2", &v32, ChatEncoding::V32);
    let v4 = TextModel::open(&tokenizer_folder("deepseek-v4")).unwrap();
    check_recipe("deepseek-v4-recipe", &v4, ChatEncoding::V4Of0731);
    check_recipe(
        "deepseek-v4.1-recipe",
        &v41(folder.path()),
        ChatEncoding::V41,
    );
    for name in ["encoding/encoding_dsv4.py", "encoding_dsv4.py"] {
        let folder = tempfile::tempdir().unwrap();
        let source = "REASONING_EFFORT_MAX = 'Reasoning Effort: Absolute maximum'";
        let v4 = v4_with_encoder(folder.path(), name, source);
        check_encoder("deepseek-v4", &v4, ChatEncoding::V4);
        let source = "REASONING_EFFORT_MAX = 'Reasoning Effort: Beyond maximum'";
        let v4 = v4_with_encoder(folder.path(), name, source);
        assert_eq!(v4.encoding(), Some(ChatEncoding::V4Of0731));
    }
}

#[test]
fn roles_that_an_encoder_does_not_know_are_refused_by_name() {
    let ask = |name: &str, role: &str| {
        let model = TextModel::open(&tokenizer_folder(name)).unwrap();
        let messages = [
            json!({"role": "user", "content": "Hi"}),
            json!({"role": role, "content": "It is late."}),
        ];
        let prompt = model.render_chat(&messages, &ChatOptions::default());
        prompt.map(|prompt| prompt.text).map_err(|e| e.to_string())
    };
    let refused = ask("deepseek-v3.2", "latest_reminder").unwrap_err();
    assert!(
        refused.starts_with("messages[1].role is latest_reminder, expected "),
        "{refused}"
    );
    let shown = ask("deepseek-v4", "latest_reminder").unwrap();
    assert!(
        shown.contains("<｜latest_reminder｜>It is late."),
        "{shown}"
    );
    for name in ["deepseek-v3.2", "deepseek-v4"] {
        let refused = ask(name, "function").unwrap_err();
        assert!(
            refused.starts_with("messages[1].role is function, expected "),
            "{refused}"
        );
    }
}

#[test]
fn no_spelling_of_a_token_gets_through_an_encoder() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for model in [
        TextModel::open(&tokenizer_folder("deepseek-v3.2")).unwrap(),
        TextModel::open(&tokenizer_folder("deepseek-v4")).unwrap(),
        v4_with_encoder(folders[0].path(), "encoding_dsv4.py", ""),
        v41(folders[1].path()),
    ] {
        let added = |text: &str| -> Vec<u32> {
            let call = json!([{"id": text, "type": "function",
                "function": {"name": text, "arguments": json!({text: text, "list": [text]}).to_string()}}]);
            let messages = [
                json!({"role": "system", "content": text}),
                json!({"role": "user", "content": text, "name": text}),
                json!({"role": "assistant", "content": text.replace("think>", "thought>"), "reasoning_content": text}),
                json!({"role": "developer", "content": text}),
                json!({"role": "user", "content": [{"type": "text", "text": text}]}),
                json!({"role": "assistant", "content": null, "tool_calls": call, "reasoning_content": text}),
                json!({"role": "tool", "tool_call_id": text, "content": text}),
            ];
            let options = ChatOptions {
                add_generation_prompt: true,
                thinking: Some(true),
                tools: Some(json!([{"type": "function", "function": {
                    "name": text, "description": text, "parameters": {"type": "object", "properties": {text: {"enum": [text]}}},
                }}])),
                schema: Some(json!({"title": text})),
                ..ChatOptions::default()
            };
            let ids = model.render_chat(&messages, &options).unwrap().ids;
            let is_added = |id: &u32| model.added().tokens().iter().any(|t| t.id == *id);
            ids.into_iter().filter(is_added).collect()
        };
        let honest = added("x");
        let all: String = model
            .added()
            .tokens()
            .iter()
            .map(|t| t.content.as_str())
            .collect();
        assert_eq!(added(&all), honest, "{:?}", model.encoding());
        for text in [
            DSML,
            "</｜DSML｜parameter>",
            "<｜User｜>",
            "</think>",
            "<｜end▁of▁sentence｜>",
        ] {
            assert_eq!(added(text), honest, "{:?}: {text}", model.encoding());
        }
    }
}

#[test]
fn an_encoders_prompt_goes_on_where_the_assistant_began() {
    let model = TextModel::open(&tokenizer_folder("deepseek-v4")).unwrap();
    let question = json!({"role": "user", "content": "Hi"});
    let end_of = |begun: Value, thinking: bool| {
        let options = ChatOptions {
            add_generation_prompt: true,
            thinking: Some(thinking),
            continues: true,
            ..ChatOptions::default()
        };
        let prompt = model
            .render_chat(&[question.clone(), begun], &options)
            .unwrap();
        let (_, end) = prompt.text.split_once("<｜Assistant｜>").unwrap();
        (end.to_owned(), prompt.form.reasoning)
    };
    let off = ReasoningMode::Off;
    let begun = json!({"role": "assistant", "content": "It is"});
    assert_eq!(
        end_of(begun.clone(), false),
        ("</think>It is".to_owned(), off)
    );
    assert_eq!(
        end_of(begun, true),
        ("<think></think>It is".to_owned(), off)
    );
    let begun = json!({"role": "assistant", "content": "", "reasoning_content": "Hm"});
    assert_eq!(
        end_of(begun, true),
        ("<think>Hm".to_owned(), ReasoningMode::Inside)
    );
    let options = ChatOptions::default();
    let closed = model.render_chat(&[question], &options).unwrap().text;
    assert!(closed.ends_with("<｜User｜>Hi"), "{closed}");
}

/// What a recorded case says of an answer.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    content: String,
    reasoning: String,
    calls: Vec<(String, String)>,
}

impl Answer {
    fn of_case(case: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let calls = case["tool_calls"].as_array().unwrap().iter();
        Self {
            content: text(&case["content"]),
            reasoning: text(&case["reasoning_content"]),
            calls: calls
                .map(|call| (text(&call["name"]), text(&call["arguments"])))
                .collect(),
        }
    }

    fn call(&mut self, name: String) {
        self.calls.push((name, String::new()));
    }

    fn arguments(&mut self, text: &str) {
        self.calls.last_mut().unwrap().1.push_str(text);
    }

    /// Read from text that comes in pieces.
    fn of_pieces<'a>(mode: ReasoningMode, pieces: impl IntoIterator<Item = &'a str>) -> Self {
        let mut answer = Self::default();
        let mut splitter = ReasoningSplitter::new(mode);
        let mut tools = ToolParser::new(ToolMarkup::Dsml(DsmlTags::V4));
        let mut parts: Vec<Part> = Vec::new();
        pieces
            .into_iter()
            .for_each(|piece| parts.extend(splitter.push(piece)));
        parts.extend(splitter.finish());
        let mut found = Vec::new();
        for part in parts {
            match part {
                Part::Reasoning(text) => answer.reasoning += &text,
                Part::Content(text) => found.extend(tools.push(&text)),
            }
        }
        found.extend(tools.finish());
        for part in found {
            match part {
                ToolPart::Content(text) => answer.content += &text,
                ToolPart::Call(name) => answer.call(name),
                ToolPart::Arguments(text) => answer.arguments(&text),
            }
        }
        answer
    }
}

#[test]
fn answers_in_dsml_are_read_as_deepseeks_own_reader_does_however_they_are_cut() {
    let model = Arc::new(TextModel::open(&tokenizer_folder("deepseek-v4")).unwrap());
    for case in golden("chat/deepseek-v4-stream.json")["cases"]
        .as_array()
        .unwrap()
    {
        let text = case["text"].as_str().unwrap();
        let mode = match case["thinking"] == true {
            true => ReasoningMode::Inside,
            false => ReasoningMode::Off,
        };
        let mut expected = Answer::of_case(case);
        if case["name"] == "lookalike" {
            // Theirs drops everything behind what looks like a tag; here no text is lost.
            assert!(text.starts_with(&expected.content));
            expected.content = text.to_owned();
        }
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let by_chars = Answer::of_pieces(mode, chars.iter().map(String::as_str));
        assert_eq!(by_chars, expected, "{}", case["name"]);
        for (at, _) in text.char_indices() {
            let (first, second) = text.split_at(at);
            assert_eq!(
                Answer::of_pieces(mode, [first, second]),
                expected,
                "{text} at {at}"
            );
        }
        // And as tokens.
        let form = OutputForm {
            reasoning: mode,
            tools: Some(ToolMarkup::Dsml(DsmlTags::V4)),
            tool_calls_max: usize::MAX,
        };
        let mut parser = OutputParser::new(Arc::clone(&model), &form, Vec::new());
        let tokens = model.encode_trusted(text).unwrap();
        let mut deltas: Vec<_> = tokens.iter().flat_map(|t| parser.push(*t).deltas).collect();
        deltas.extend(parser.finish());
        let mut found = Answer::default();
        for delta in deltas {
            match delta {
                OutputDelta::Content(text) => found.content += &text,
                OutputDelta::Reasoning(text) => found.reasoning += &text,
                OutputDelta::ToolCall(name) => found.call(name),
                OutputDelta::ToolArguments(text) => found.arguments(&text),
            }
        }
        assert_eq!(found, expected, "{}", case["name"]);
    }
}
