//! Tokenizers from GGUF metadata.

use std::{collections::HashMap, path::Path, sync::Arc};

use proptest::prelude::*;
use serde_json::Value;

use super::super::{ChatOptions, TextModel};
use crate::text::PromptForm;
use crate::weights::tests::{
    golden, test_data,
    writer::{GgufWriter, tiny_llama_gguf},
};

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// A GGUF file with six tokens, two of them special.
fn small() -> GgufWriter {
    tiny_llama_gguf()
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "gpt-2")
        .strings(
            "tokenizer.ggml.tokens",
            &["<s>", "</s>", "a", "b", "ab", "<tool>", "Ġ"],
        )
        .i32s(
            "tokenizer.ggml.token_type",
            &[
                CONTROL,
                CONTROL,
                NORMAL,
                NORMAL,
                NORMAL,
                USER_DEFINED,
                NORMAL,
            ],
        )
        .strings("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.bos_token_id", 0)
        .u32("tokenizer.ggml.eos_token_id", 1)
        .bool("tokenizer.ggml.add_bos_token", true)
        .string(
            "tokenizer.chat_template",
            "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        )
}

fn open(writer: &GgufWriter) -> Result<TextModel, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, writer.bytes()).unwrap();
    TextModel::open(&file).map_err(|e| {
        e.to_string()
            .replace(&format!("{}/", dir.path().display()), "@")
    })
}

#[test]
fn a_tokenizer_comes_out_of_the_metadata() {
    let model = open(&small()).unwrap();
    assert_eq!(
        (model.bos_id(), model.eos_id(), model.vocab_len()),
        (Some(0), Some(1), 7)
    );
    assert_eq!(
        model
            .encode_prompt("ab b", PromptForm::default(), usize::MAX)
            .unwrap(),
        [0, 4, 6, 3]
    );
    assert_eq!(model.encode_trusted("a<tool>b</s>").unwrap(), [2, 5, 3, 1]);
    assert_eq!(model.decode(&[0, 4, 6, 5, 1], true), "ab <tool>");
    let message = serde_json::json!({"role": "user", "content": "ab"});
    let prompt = model
        .render_chat(&[message], &ChatOptions::default())
        .unwrap();
    assert_eq!(prompt.ids, [0, 4, 1]);
}

#[test]
fn metadata_that_makes_no_tokenizer_is_refused_by_name() {
    let check = |writer: GgufWriter, expected: &str| {
        assert_eq!(open(&writer).unwrap_err(), format!("`@m.gguf`{expected}"));
    };
    check(
        small().string("tokenizer.ggml.model", "llama"),
        ": tokenizer.ggml.model is `llama`, expected gpt2 (byte-level BPE)",
    );
    check(
        small().without("tokenizer.ggml.model"),
        ": tokenizer.ggml.model is missing, expected gpt2 (byte-level BPE)",
    );
    check(
        small().string("tokenizer.ggml.pre", "tekken"),
        ": tokenizer.ggml.pre is `tekken`, expected default, gpt-2, smollm, llama-bpe, qwen2, deepseek-llm, deepseek-coder, deepseek-v3 or deepseek-r1-qwen",
    );
    check(
        small().without("tokenizer.ggml.pre"),
        ": tokenizer.ggml.pre is missing, expected the name of a pre-tokenizer, as these merges are of no known vocabulary: write it with `gguf-new-metadata --pre-tokenizer NAME`, NAME being default, gpt-2, smollm, llama-bpe, qwen2, deepseek-llm, deepseek-coder, deepseek-v3 or deepseek-r1-qwen",
    );
    check(
        small().without("tokenizer.ggml.tokens"),
        ": tokenizer.ggml.tokens is missing, expected an array of strings",
    );
    check(
        small().i32s("tokenizer.ggml.token_type", &[1]),
        ": tokenizer.ggml.token_type is 1, expected as many as there are tokens, 7",
    );
    check(
        small().strings("tokenizer.ggml.merges", &["ab"]),
        ": tokenizer.ggml.merges is `ab`, expected two tokens",
    );
    check(
        small().strings("tokenizer.ggml.merges", &["a z"]),
        " does not make a tokenizer",
    );
    check(
        small().u32("tokenizer.ggml.bos_token_id", 7),
        ": tokenizer.ggml.bos_token_id is 7, expected below the number of tokens, 7",
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn mutated_metadata_never_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let writer = small();
        let mut bytes = writer.bytes();
        let data_len: usize = writer.tensors.iter().map(|t| t.bytes.len()).sum();
        let header_len = bytes.len() - data_len;
        for (at, value) in edits {
            bytes[at.index(header_len)] = value;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        std::fs::write(&file, bytes).unwrap();
        if let Ok(model) = TextModel::open(&file) {
            let _ = model.encode_prompt("ab <s> 12 é", PromptForm::default(), usize::MAX);
            let _ = model.encode_trusted("ab <s> 12 é");
            let message = serde_json::json!({"role": "user", "content": "ab"});
            let _ = model.render_chat(&[message], &ChatOptions::default());
        }
    }
}

/// The same tokenizer the way converters write it, under the name they give its splitter.
fn as_gguf(tokenizer: &Value, pre: &str) -> GgufWriter {
    let mut tokens: HashMap<u64, (&str, i32)> = HashMap::new();
    for (text, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens.insert(id.as_u64().unwrap(), (text, NORMAL));
    }
    for token in tokenizer["added_tokens"].as_array().unwrap() {
        let kind = if token["special"] == true {
            CONTROL
        } else {
            USER_DEFINED
        };
        tokens.insert(
            token["id"].as_u64().unwrap(),
            (token["content"].as_str().unwrap(), kind),
        );
    }
    let n = tokens.keys().max().unwrap() + 1;
    let holes: Vec<String> = (0..n).map(|id| format!("[PAD{id}]")).collect();
    let (texts, types): (Vec<&str>, Vec<i32>) = (0..n)
        .map(|id| {
            tokens
                .get(&id)
                .copied()
                .unwrap_or((&holes[id as usize], UNUSED))
        })
        .unzip();
    let merges: Vec<String> = tokenizer["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|merge| match merge {
            Value::String(text) => text.clone(),
            pair => format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            ),
        })
        .collect();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    tiny_llama_gguf()
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &texts)
        .i32s("tokenizer.ggml.token_type", &types)
        .strings("tokenizer.ggml.merges", &merges)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn splitters_by_name_cut_as_the_published_tokenizers_do() {
    let golden = golden("tokenizer_cases.json");
    for (name, pre) in [
        ("deepseek-v2", "deepseek-llm"),
        ("deepseek-v3.1", "deepseek-v3"),
        ("deepseek-r1-distill-qwen-7b", "deepseek-r1-qwen"),
        ("qwen-3", "qwen2"),
        ("deepseek-r1-distill-llama-8b", "llama-bpe"),
        ("deepseek-coder-33b-base", "deepseek-coder"),
    ] {
        let folder = test_data().join("tokenizers").join(name);
        assert!(
            folder.is_dir(),
            "{} is missing: run `make test-setup`",
            folder.display()
        );
        let published = Arc::new(TextModel::open(&folder).unwrap());
        let tokenizer = read(&folder.join("tokenizer.json"));
        let named = as_gguf(&tokenizer, pre);
        let ours = open(&named).unwrap_or_else(|e| panic!("{name}: {e}"));
        // Older files do not name it, and got other tokens without a word.
        let unnamed = named.clone().without("tokenizer.ggml.pre");
        let unnamed = open(&unnamed).unwrap_or_else(|e| panic!("{name}: {e}"));
        let default = open(&named.string("tokenizer.ggml.pre", "default")).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let expected = published.encode_trusted(text).unwrap();
            assert_eq!(
                ours.encode_trusted(text).unwrap(),
                expected,
                "{name}: {}",
                case["name"]
            );
            for recognised in [&unnamed, &default] {
                assert_eq!(recognised.encode_trusted(text).unwrap(), expected, "{name}");
            }
            let plain = published.encode(text, false).unwrap();
            assert_eq!(
                ours.encode(text, false).unwrap(),
                plain,
                "{name}: {}",
                case["name"]
            );
        }
    }
}
