//! Prompts and outputs of whole text models: written here, of the reference checkpoints, and real.

mod forgery;
mod gguf;
mod hostile;
mod pieces;
mod real;
mod encodings;
mod reference;
mod small;

use std::{path::Path, sync::Arc};

use serde_json::{Value, json};

use super::TextModel;

/// Writes a byte-level tokenizer whose ids 0..256 are the bytes, then a few merges, then `added`.
fn write_tokenizer(folder: &Path, added: &[(&str, bool)], template: &str) {
    // The byte-level alphabet in the order of bytes.
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    let mut vocab = serde_json::Map::new();
    for byte in 0..256u32 {
        let code = if printable(byte) { byte } else { next };
        next += u32::from(!printable(byte));
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
    }
    let merges = [["t", "h"], ["th", "i"], ["n", "k"], ["Ġ", "a"]];
    for [left, right] in merges {
        let id = vocab.len();
        vocab.insert(format!("{left}{right}"), json!(id));
    }
    let first_added = vocab.len();
    let added_tokens: Vec<Value> = added
        .iter()
        .enumerate()
        .map(|(i, (content, special))| {
            json!({"id": first_added + i, "content": content, "special": special,
                "lstrip": false, "rstrip": false, "single_word": false, "normalized": !special})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": merges},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"},
        "add_bos_token": true, "chat_template": template});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

const ADDED: [(&str, bool); 8] = [
    ("<s>", true),
    ("</s>", true),
    ("<|user|>", false),
    ("<|assistant|>", false),
    ("<think>", false),
    ("</think>", false),
    ("[tool]", true),
    ("\u{FF5C}", false),
];

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\
    {% if m.role == 'assistant' and m.content is string and '</think>' in m.content %}\
    {{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}\
    {% for k, v in m.items() %}{% if k not in ['role', 'content'] %}[{{ k }}={{ v | tojson }}]\
    {% endif %}{% endfor %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}\
    {% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>\n{% endif %}{% endif %}";

/// The model of [`ADDED`] and [`TEMPLATE`].
fn small_model() -> Arc<TextModel> {
    model_with(TEMPLATE)
}

fn model_with(template: &str) -> Arc<TextModel> {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path(), &ADDED, template);
    Arc::new(TextModel::open(dir.path()).unwrap())
}
