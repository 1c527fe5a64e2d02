//! Long and awkward input: an answer or a named error, in time.

use proptest::prelude::*;
use serde_json::json;

use super::{
    super::{ChatOptions, TextModel},
    small_model, write_tokenizer,
};
use crate::text::PromptForm;
use crate::weights::tests::test_data;

const LEN: usize = 1 << 17;

/// 128 KiB of each; the time grows in line with the length (measured up to 1 MiB, 0.3 to 2 s).
fn texts() -> Vec<String> {
    let unit = [
        "a",
        " ",
        "\n",
        "\t ",
        "<",
        "<\u{FF5C}",
        "9",
        "é",
        "一",
        "!",
        "🙂",
        "a b ",
        " \n",
        "'",
    ];
    unit.iter().map(|u| u.repeat(LEN / u.len())).collect()
}

fn check(model: &TextModel, text: &str) {
    let label: String = text.chars().take(2).collect();
    match model.encode(text, false) {
        Ok(ids) => assert!(
            model.decode(&ids, false) == text,
            "{label:?} came back changed"
        ),
        Err(error) => panic!("{label:?}: {error:?}"),
    }
}

#[test]
fn long_runs_of_anything_are_encoded() {
    let tiny = TextModel::open(&test_data().join("reference/deepseek_v3")).unwrap();
    for text in texts() {
        check(&small_model(), &text);
        check(&tiny, &text);
    }
}

#[test]
fn long_runs_of_token_beginnings_stay_text() {
    let model = small_model();
    for unit in ["<", "<s>", "<|user|", "[tool]"] {
        let message = json!({"role": "user", "content": unit.repeat(LEN / unit.len())});
        let prompt = model
            .render_chat(&[message], &ChatOptions::default())
            .unwrap();
        assert_eq!(
            prompt.ids.iter().filter(|id| 260 <= **id).count(),
            2,
            "{unit}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn mutated_tokenizer_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        digits in any::<bool>(),
        in_config in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        write_tokenizer(dir.path(), &super::ADDED, super::TEMPLATE);
        let name = if in_config { "tokenizer_config.json" } else { "tokenizer.json" };
        let file = dir.path().join(name);
        let mut bytes = std::fs::read(&file).unwrap();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            // Digits and letters keep the JSON whole, so that what reads it is reached.
            bytes[at] = match (digits, bytes[at]) {
                (true, b'0'..=b'9') => b'0' + value % 10,
                (true, b'a'..=b'z') => b'a' + value % 26,
                (true, other) => other,
                (false, _) => value,
            };
        }
        std::fs::write(&file, bytes).unwrap();
        if let Ok(model) = TextModel::open(dir.path()) {
            let _ = model.encode_prompt("think <s> 12 \u{e9}", PromptForm::default(), usize::MAX);
            let message = json!({"role": "user", "content": "think"});
            let _ = model.render_chat(&[message], &ChatOptions::default());
        }
    }
}
