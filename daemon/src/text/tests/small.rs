//! The small model: encoding, rendering, output.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{
        ChatOptions, OutputDecoder, OutputDelta, OutputForm, OutputParser, ReasoningMode,
        TextError, TextModel,
    },
    model_with, small_model, write_tokenizer,
};
use crate::text::PromptForm;

fn options(thinking: Option<bool>) -> ChatOptions {
    ChatOptions {
        add_generation_prompt: true,
        thinking,
        ..ChatOptions::default()
    }
}

#[test]
fn only_trusted_text_becomes_special_tokens() {
    let model = small_model();
    assert_eq!(model.bos_id(), Some(260));
    assert_eq!(model.eos_id(), Some(261));
    assert_eq!(model.vocab_len(), 268);
    assert_eq!(model.encode_trusted("<s>thi").unwrap(), [260, 257]);
    assert_eq!(
        model
            .encode_prompt("thi", PromptForm::default(), usize::MAX)
            .unwrap(),
        [260, 257]
    );
    assert_eq!(model.encode("<s>", false).unwrap(), [60, 115, 62]);
    assert_eq!(model.encode("", true).unwrap(), [260]);
    assert_eq!(model.token_bytes(259), Some(&b" a"[..]));
    assert_eq!(model.token_text(264), "<think>");
    assert_eq!(model.token_bytes(9999), None);
    assert_eq!(model.decode(&[260, 257, 261], true), "thi");
    assert_eq!(model.decode(&[260, 257, 261], false), "<s>thi</s>");
}

#[test]
fn prompts_say_where_the_answer_starts() {
    let model = small_model();
    let messages = [json!({"role": "user", "content": "hi"})];
    let plain = model.render_chat(&messages, &options(Some(false))).unwrap();
    assert_eq!(plain.text, "<s><|user|>hi<|assistant|>");
    assert_eq!(plain.ids, [260, 262, 104, 105, 263]);
    assert_eq!(
        (plain.starts_in_reasoning, plain.form.reasoning),
        (false, ReasoningMode::Off)
    );
    let thinking = model.render_chat(&messages, &options(Some(true))).unwrap();
    assert_eq!(thinking.ids, [260, 262, 104, 105, 263, 264, 10]);
    assert_eq!(
        (thinking.starts_in_reasoning, thinking.form.reasoning),
        (true, ReasoningMode::Inside)
    );
    let default = model.render_chat(&messages, &options(None)).unwrap();
    assert_eq!(default.form.reasoning, ReasoningMode::MayOpen);
}

#[test]
fn content_may_come_in_parts_or_not_at_all() {
    let model =
        model_with("{% for m in messages %}{{ m.content is none }}:{{ m.content }};{% endfor %}");
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let messages = [
        json!({"role": "user", "content": parts}),
        json!({"role": "assistant"}),
    ];
    let text = model.render_chat(&messages, &options(None)).unwrap().text;
    assert_eq!(text, "False:ab;True:None;");
    // A template that cannot join null gets an empty string.
    let model = model_with("{% for m in messages %}{{ m.content.strip() + '.' }}{% endfor %}");
    let messages = [
        json!({"role": "user", "content": " a "}),
        json!({"role": "assistant"}),
    ];
    assert_eq!(
        model.render_chat(&messages, &options(None)).unwrap().text,
        "a.."
    );
}

#[test]
fn messages_that_are_none_are_refused_by_name() {
    let model = small_model();
    let check = |message: Value, expected: &str| {
        let good = json!({"role": "user", "content": "x"});
        let error = model
            .render_chat(&[good, message], &options(None))
            .unwrap_err();
        assert!(error.is_request_fault());
        assert_eq!(error.to_string(), expected);
    };
    check(json!("x"), "messages[1].(all) is \"x\", expected an object");
    check(
        json!({"content": "x"}),
        "messages[1].role is null, expected system, developer, user, assistant or tool",
    );
    check(
        json!({"role": "<s>", "content": "x"}),
        "messages[1].role is \"<s>\", expected system, developer, user, assistant or tool",
    );
    check(
        json!({"role": "user", "content": 7}),
        "messages[1].content is 7, expected a string, null or a list of text parts",
    );
    check(
        json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        "messages[1].content is {\"type\":\"image_url\",\"image_url\":{}}, expected a list of text parts",
    );
}

#[test]
fn template_faults_have_names() {
    let user = [json!({"role": "user", "content": "x"})];
    let error = |template: &str| {
        model_with(template)
            .render_chat(&user, &options(None))
            .unwrap_err()
    };
    assert!(matches!(
        error("{{ raise_exception('roles must alternate') }}"),
        TextError::Refused { message } if message == "roles must alternate"
    ));
    let endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = j %}{% endfor %}{% endfor %}";
    assert!(matches!(error(endless), TextError::Render { .. }));
    assert!(matches!(error("{{ 1 + {} }}"), TextError::Render { .. }));
}

/// The whole model was refused.
#[test]
fn a_template_that_does_not_compile_costs_chat_alone() {
    let user = [json!({"role": "user", "content": "x"})];
    let model = model_with("{% for %}");
    let error = model.render_chat(&user, &options(None)).unwrap_err();
    assert!(error.is_request_fault());
    let shown = error.to_string();
    let expected = "the model's chat template does not compile, so that it has no chat; use \
                    completions (syntax error: ";
    assert!(shown.starts_with(expected), "{shown}");
    let ids = model.encode_prompt("thi", PromptForm::default(), usize::MAX);
    assert_eq!(ids.unwrap(), [260, 257]);
}

/// Without a default the first of the list was taken, whatever it was for.
#[test]
fn named_templates_are_for_what_they_are_called() {
    let user = [json!({"role": "user", "content": "x"})];
    let with = |templates: Value, tools: bool| {
        let model = edited(|_, config| config["chat_template"] = templates.clone()).unwrap();
        let options = ChatOptions {
            tools: tools.then(|| json!([{"type": "function", "function": {"name": "f"}}])),
            ..options(None)
        };
        let prompt = model.render_chat(&user, &options);
        prompt.map(|p| p.text).map_err(|e| e.to_string())
    };
    let named = |name: &str, template: &str| json!({"name": name, "template": template});
    let default = named("default", "d");
    let tool_use = named("tool_use", "t");
    let rag = named("rag", "r");
    let broken = named("tool_use", "{% for %}");
    let all = json!([rag, tool_use, default]);
    assert_eq!(with(all.clone(), false).as_deref(), Ok("d"));
    assert_eq!(with(all, true).as_deref(), Ok("t"));
    let without = json!([rag, tool_use]);
    assert_eq!(with(without.clone(), true).as_deref(), Ok("t"));
    assert_eq!(
        with(without, false).unwrap_err(),
        "the model has chat templates for special purposes alone (rag, tool_use), none of them \
         called `default`; use completions"
    );
    assert_eq!(with(json!([default, broken]), false).as_deref(), Ok("d"));
    let error = with(json!([default, broken]), true).unwrap_err();
    assert!(error.contains("does not compile"), "{error}");
}

#[test]
fn the_tags_that_mark_what_the_assistant_said_change_nothing() {
    let user = [json!({"role": "assistant", "content": "x"})];
    let marked = "{% set a = 1 %}{% for m in messages %}\n    {%- generation %}{% set a = 2 %}\
                  {{ m.content }}{{ loop.index }}{{ a }}{%- endgeneration -%}\n {% endfor %}{{ a }}";
    let model = model_with(marked);
    // As Jinja2 renders it with transformers' extension: the block has a scope of its own.
    assert_eq!(
        model.render_chat(&user, &options(None)).unwrap().text,
        "x121"
    );
}

/// The small model's files after an edit.
fn edited(edit: impl Fn(&mut Value, &mut Value)) -> Result<TextModel, String> {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path(), &super::ADDED, "x");
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
    };
    let (mut tokenizer, mut config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    edit(&mut tokenizer, &mut config);
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    // Older tools' place, kept within the configuration here.
    if let Some(legacy) = config.get("added_tokens.json") {
        std::fs::write(dir.path().join("added_tokens.json"), legacy.to_string()).unwrap();
    }
    TextModel::open(dir.path()).map_err(|e| {
        e.to_string()
            .replace(&format!("{}/", dir.path().display()), "@")
    })
}

/// Tokens that were only in the configuration were encoded as letters.
#[test]
fn tokens_outside_the_tokenizer_are_added_to_it() {
    let token = |content: &str, special: bool| {
        json!({"content": content, "special": special, "lstrip": false, "rstrip": false,
            "single_word": false, "normalized": false})
    };
    let decoder = json!({
        "260": token("<s>", true), "264": token("<think>", true), "268": token("<|im_end|>", true),
        "269": token("<tool>", false), "300": token("th", false), "400": token("</s>", true),
    });
    let model = edited(|_, config| {
        config["added_tokens_decoder"] = decoder.clone();
        config["eos_token"] = json!("<|im_end|>");
    });
    let model = model.unwrap();
    assert_eq!((model.eos_id(), model.vocab_len()), (Some(268), 270));
    let ids = model.encode_trusted("<s>a<tool>thi<|im_end|></s>").unwrap();
    // `th` is a token of its own now, so that `thi` cannot be merged.
    assert_eq!(ids, [260, 97, 269, 256, 105, 268, 261]);
    assert_eq!(model.decode(&ids, true), "a<tool>thi");
    assert!(model.is_special(268) && !model.is_special(269));

    let legacy = edited(|_, config| {
        config["added_tokens.json"] = json!({"<|im_end|>": 268, "<tool>": 269});
        config["eos_token"] = json!("<|im_end|>");
    });
    let legacy = legacy.unwrap();
    assert_eq!(
        legacy.encode_trusted("<tool><|im_end|>").unwrap(),
        [269, 268]
    );
    assert!(legacy.is_special(268) && !legacy.is_special(269));

    let refused = |decoder: Value| {
        edited(|_, config| config["added_tokens_decoder"] = decoder.clone()).unwrap_err()
    };
    assert_eq!(
        refused(json!({"97": token("<x>", true)})),
        "`@tokenizer_config.json`: the id of token `<x>` is 97, expected 268, the next one that is \
         free"
    );
    assert_eq!(
        refused(json!({"300": token("<x>", true)})),
        "`@tokenizer_config.json`: the id of token `<x>` is 300, expected 268, the next one that is \
         free"
    );
    for odd in [json!({"many": "x"}), json!({"268": "x"})] {
        assert_eq!(
            refused(odd),
            "`@tokenizer_config.json`: added_tokens_decoder is \"x\", expected objects by their ids"
        );
    }
    assert_eq!(
        refused(json!([])),
        "`@tokenizer_config.json`: added_tokens_decoder is [], expected an object"
    );
}

#[test]
fn tokenizers_that_are_not_understood_are_refused_by_name() {
    let check = |edit: &dyn Fn(&mut Value, &mut Value), expected: &str| {
        assert_eq!(edited(edit).unwrap_err(), expected);
    };
    check(
        &|t, _| t["model"]["type"] = json!("Unigram"),
        "`@tokenizer.json`: model.type is \"Unigram\", expected BPE",
    );
    check(
        &|t, _| t["decoder"]["type"] = json!("Metaspace"),
        "`@tokenizer.json`: decoder.type is \"Metaspace\", expected ByteLevel",
    );
    check(
        &|t, _| t["model"]["vocab"]["a"] = json!(-1),
        "`@tokenizer.json`: model.vocab is -1, expected token ids",
    );
    check(
        &|t, _| t["added_tokens"][0]["id"] = json!(1u32 << 30),
        "`@tokenizer.json`: the id of token `<s>` is 1073741824, expected at most 4194303",
    );
    check(
        &|t, _| t["model"]["merges"] = json!([["zz", "a"]]),
        "`@tokenizer.json` does not make a tokenizer",
    );
    check(
        &|_, c| c["eos_token"] = json!("<eos>"),
        "`@tokenizer_config.json`: eos_token is \"<eos>\", expected a token of tokenizer.json",
    );
    check(
        &|_, c| c["chat_template"] = json!(7),
        "`@tokenizer_config.json`: chat_template is 7, expected a string or a list",
    );
}

#[test]
fn reasoning_and_stops_are_split_from_tokens() {
    let model = small_model();
    let ids = model
        .encode_trusted("\nwhy</think>\n\nthe end. STOP more")
        .unwrap();
    let inside = OutputForm {
        reasoning: ReasoningMode::Inside,
        ..OutputForm::PLAIN
    };
    let mut parser = OutputParser::new(model, &inside, vec!["STOP".to_owned()]);
    let (mut reasoning, mut content, mut stopped) = (String::new(), String::new(), false);
    for id in ids {
        let step = parser.push(id);
        assert!(
            !stopped || step.deltas.is_empty(),
            "nothing comes after a stop"
        );
        stopped = step.stopped;
        for delta in step.deltas {
            match delta {
                OutputDelta::Reasoning(text) => reasoning += &text,
                OutputDelta::Content(text) => content += &text,
                other => panic!("no tools were offered: {other:?}"),
            }
        }
    }
    assert!(parser.finish().is_empty());
    assert_eq!(
        (reasoning.as_str(), content.as_str(), stopped),
        ("why", "the end. ", true)
    );
}

proptest! {
    #[test]
    fn streamed_text_is_the_whole_text(ids in prop::collection::vec(0u32..300, 0..40)) {
        let model = small_model();
        let mut decoder = OutputDecoder::new(std::sync::Arc::clone(&model), None);
        let mut text = String::new();
        for id in &ids {
            text += &decoder.push(*id);
        }
        text += &decoder.finish();
        prop_assert_eq!(&text, &model.decode(&ids, true));
        let mut parser = OutputParser::new(std::sync::Arc::clone(&model), &OutputForm::PLAIN, Vec::new());
        let mut deltas: Vec<OutputDelta> = ids.iter().flat_map(|id| parser.push(*id).deltas).collect();
        deltas.extend(parser.finish());
        let content: String = deltas
            .into_iter()
            .map(|delta| delta.text().to_owned())
            .collect();
        prop_assert_eq!(content, text);
    }

    #[test]
    fn any_text_survives_encoding(text in "\\PC{0,40}") {
        let model = small_model();
        let ids = model.encode(&text, false).unwrap();
        prop_assert_eq!(model.decode(&ids, false), text);
    }
}
