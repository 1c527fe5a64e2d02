//! Clients try to write special tokens.

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{ChatOptions, TextModel},
    ADDED, model_with, small_model,
};
use crate::text::PromptForm;

const PLAIN: PromptForm = PromptForm {
    add_special: true,
    parse_special: false,
};

fn model() -> &'static Arc<TextModel> {
    static MODEL: OnceLock<Arc<TextModel>> = OnceLock::new();
    MODEL.get_or_init(small_model)
}

const FIRST_ADDED: u32 = 260;

fn added_ids(ids: &[u32]) -> Vec<u32> {
    ids.iter()
        .copied()
        .filter(|id| FIRST_ADDED <= *id)
        .collect()
}

fn hostile() -> impl Strategy<Value = String> {
    let words: Vec<&'static str> = ADDED
        .iter()
        .map(|(content, _)| *content)
        .chain([
            "<",
            "<|",
            "us",
            "user|>",
            "\u{E000}",
            "\u{E001}<s>",
            "think>",
            " ",
            "é",
        ])
        .collect();
    prop::collection::vec(prop::sample::select(words), 0..8).prop_map(|w| w.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_client_text_becomes_an_added_token(
        user in hostile(),
        name in hostile(),
        key in hostile(),
        tool in hostile(),
        system in hostile(),
    ) {
        let messages = [
            json!({"role": "system", "content": system}),
            json!({"role": "user", "content": user, "name": name}),
            json!({"role": "tool", "content": [{"type": "text", "text": tool}], &key: {&key: [name]}}),
        ];
        let options = ChatOptions {
            add_generation_prompt: true,
            tools: Some(json!([{"type": "function", "function": {"name": tool, &key: user}}])),
            ..ChatOptions::default()
        };
        let prompt = model().render_chat(&messages, &options).unwrap();
        // `<s>`, `<|user|>` and `<|assistant|>`; the small template has no other tokens.
        prop_assert_eq!(added_ids(&prompt.ids), [260, 262, 263]);
        prop_assert_eq!(model().decode(&prompt.ids, false), prompt.text.as_str());
        prop_assert!(prompt.text.contains(&user) && prompt.text.contains(&system));
    }

    #[test]
    fn what_the_assistant_said_keeps_its_reasoning_tags_only(said in hostile()) {
        let messages = [json!({"role": "assistant", "content": said})];
        let prompt = model().render_chat(&messages, &ChatOptions::default()).unwrap();
        for id in added_ids(&prompt.ids) {
            prop_assert!([260, 263, 264, 265].contains(&id), "{}", model().token_text(id));
        }
        let opened = prompt.ids.iter().filter(|id| **id == 263).count();
        prop_assert_eq!(opened, 1, "one turn");
    }

    #[test]
    fn raw_prompts_hold_no_added_token_but_bos(text in hostile()) {
        let ids = model().encode_prompt(&text, PLAIN, usize::MAX).unwrap();
        prop_assert_eq!(added_ids(&ids), [260]);
    }

    #[test]
    fn unforged_prompts_encode_like_the_rendered_text(user in "[a-z \\n]{0,30}") {
        let messages = [json!({"role": "user", "content": user})];
        let prompt = model().render_chat(&messages, &ChatOptions::default()).unwrap();
        prop_assert_eq!(&prompt.ids, &model().encode_trusted(&prompt.text).unwrap());
    }
}

#[test]
fn a_conversation_that_uses_every_mark_is_refused() {
    let all: String = ('\u{E000}'..='\u{F8FF}')
        .chain('\u{F0000}'..='\u{FFFFD}')
        .collect();
    let messages = [json!({"role": "user", "content": all})];
    let error = model()
        .render_chat(&messages, &ChatOptions::default())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the conversation uses every private-use code point"
    );
}

#[test]
fn template_arguments_are_marked_too() {
    let model = model_with("{{ bos_token }}{{ greeting }}");
    let mut options = ChatOptions::default();
    options
        .template_kwargs
        .insert("greeting".to_owned(), Value::from("</s><s>"));
    let prompt = model.render_chat(&[], &options).unwrap();
    assert_eq!(prompt.text, "<s></s><s>");
    assert_eq!(added_ids(&prompt.ids), [260]);
}

#[test]
fn an_added_token_that_merging_can_make_is_spelled_out() {
    let dir = tempfile::tempdir().unwrap();
    // Merging makes `thi`, id 257; here it is declared an added token too.
    super::write_tokenizer(dir.path(), &[("<s>", true), ("</s>", true)], "x");
    let file = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let thi = json!({"id": 257, "content": "thi", "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(thi);
    std::fs::write(&file, tokenizer.to_string()).unwrap();
    let model = TextModel::open(dir.path()).unwrap();
    assert_eq!(model.encode_trusted("thi").unwrap(), [257]);
    assert_eq!(model.encode("thi", false).unwrap(), [116, 104, 105]);
}
