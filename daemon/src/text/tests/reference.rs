//! The reference checkpoints' tokenizers, and the real one in a GGUF file.

use serde_json::Value;

use super::super::{ChatOptions, TextModel};
use crate::text::PromptForm;
use crate::weights::tests::{golden, test_data};

fn read(path: &std::path::Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as u32)
        .collect()
}

#[test]
fn reference_texts_encode_as_recorded() {
    let mut n_checked = 0;
    for model_name in [
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v2_lite",
        "deepseek_v3",
        "deepseek_v3_fp8",
    ] {
        let folder = test_data().join("reference").join(model_name);
        let model = TextModel::open(&folder).unwrap();
        assert!(model.vocab_len() <= 384, "{model_name}");
        for prompt in read(&folder.join("golden.json"))["prompts"]
            .as_array()
            .unwrap()
        {
            if let Some(text) = prompt["text"].as_str() {
                let expected = ids(&prompt["text_ids"]);
                assert_eq!(model.encode(text, false).unwrap(), expected, "{model_name}");
                assert_eq!(model.decode(&expected, false), text, "{model_name}");
                n_checked += 1;
            }
        }
    }
    assert!(0 < n_checked);
}

#[test]
fn smollm2_prompts_encode_as_recorded() {
    let file = test_data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let model = TextModel::open(&file).unwrap();
    assert_eq!(model.vocab_len(), 49152);
    assert!(!model.adds_bos());
    let golden = golden("smollm2.json");
    for prompt in golden["prompts"].as_array().unwrap() {
        let rendered = prompt["rendered"].as_str().unwrap();
        let expected = ids(&prompt["ids"]);
        assert_eq!(model.encode_trusted(rendered).unwrap(), expected);
        assert_eq!(
            model.decode(&ids(&prompt["greedy"]), false),
            prompt["greedy_text"].as_str().unwrap()
        );
        if prompt["kind"] == "raw" {
            assert_eq!(
                model
                    .encode_prompt(rendered, PromptForm::default(), usize::MAX)
                    .unwrap(),
                expected
            );
            continue;
        }
        let messages = prompt["prompt"].as_array().unwrap();
        let options = ChatOptions {
            add_generation_prompt: true,
            ..ChatOptions::default()
        };
        let chat = model.render_chat(messages, &options).unwrap();
        assert_eq!((chat.text.as_str(), chat.ids), (rendered, expected));
    }
}
