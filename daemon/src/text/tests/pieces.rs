//! Text encoded in pieces: the same tokens as in one go, and none at all where they cannot fit.

use proptest::prelude::*;

use super::{
    super::{
        TextError, TextModel,
        pieces::{PIECE_LEN, WHOLE_LEN_MAX},
    },
    small_model,
};
use crate::text::PromptForm;
use crate::weights::tests::test_data;

/// Every pre-tokenizer that is known, by real tokenizers.
fn models() -> Vec<TextModel> {
    let tokenizers = [
        "deepseek-coder-33b-base",
        "deepseek-v2",
        "deepseek-v3",
        "deepseek-r1-distill-llama-8b",
        "qwen-2.5",
    ];
    let folders = tokenizers.map(|name| test_data().join("tokenizers").join(name));
    let smollm2 = test_data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let paths = folders.into_iter().chain([smollm2]);
    paths.map(|path| TextModel::open(&path).unwrap()).collect()
}

/// What expressions treat differently, and what combines with its neighbours.
const PARTS: [&str; 44] = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u{A0}",
    "\u{3000}",
    "a",
    "Z",
    "the",
    " quick",
    "'s",
    "'",
    "'LL",
    "1",
    "23",
    "4567",
    "²",
    "٣",
    ".",
    ",",
    "!?",
    "$",
    "+=",
    "\u{1}",
    "\0",
    "é",
    "e\u{301}",
    "\u{301}",
    "\u{344}",
    "中",
    "文字",
    "の",
    "カ\u{3099}",
    "、",
    "。",
    "，",
    "한글",
    "\u{1100}\u{1161}",
    "привет",
    "हिन्दी",
    "ไทย",
    "🙂",
    "\u{212A}",
];

fn texts() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(PARTS.to_vec()).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(part, 2..24).prop_map(|parts| parts.concat())
}

/// Encodes `text` and its pieces between all places to cut; gives their number.
fn check(model: &TextModel, text: &str) -> usize {
    let cuts = model.cuts().unwrap();
    let mut whole = Vec::new();
    model.encode_piece(text, &mut whole).unwrap();
    let mut pieces = Vec::new();
    let (mut start, mut n_pieces) = (0, 0);
    let ends = text.char_indices().map(|(at, _)| at).skip(1);
    for end in ends.filter(|at| cuts.is_cut(text, *at)).chain([text.len()]) {
        model.encode_piece(&text[start..end], &mut pieces).unwrap();
        (start, n_pieces) = (end, n_pieces + 1);
    }
    assert_eq!(pieces, whole, "{text:?}");
    assert!(
        cuts.tokens_min(cuts.bytes_kept(text)) <= whole.len(),
        "{text:?}"
    );
    n_pieces
}

#[test]
fn pieces_have_the_tokens_of_the_whole() {
    let models = models();
    let mut n_pieces = vec![0; models.len()];
    let config = ProptestConfig::with_cases(4000);
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let n_pieces_cell = std::cell::RefCell::new(&mut n_pieces);
    runner
        .run(&texts(), |text| {
            for (model, n) in models.iter().zip(n_pieces_cell.borrow_mut().iter_mut()) {
                *n += check(model, &text);
            }
            Ok(())
        })
        .unwrap();
    // On average there is something to compare.
    assert!(n_pieces.iter().all(|n| 2 * 4000 < *n), "{n_pieces:?}");
}

#[test]
fn every_pair_of_characters_is_cut_where_it_parts() {
    let models = models();
    for a in PARTS {
        for b in PARTS {
            for c in ["", "x", " y", "\n", "7", "!"] {
                for model in &models {
                    check(model, &format!("{c}{a}{b}{c}"));
                }
            }
        }
    }
}

#[test]
fn every_published_tokenizer_has_places_to_cut() {
    for folder in std::fs::read_dir(test_data().join("tokenizers")).unwrap() {
        let path = folder.unwrap().path();
        let model = TextModel::open(&path).unwrap();
        assert!(model.cuts().is_some(), "{}", path.display());
    }
}

#[test]
fn a_long_text_is_the_same_in_pieces() {
    let line =
        "The quick brown fox: 42 jumps (over) it's dog.\n\n  中文字，日本の。 привет мир\t1,2,3 ";
    let text = line.repeat(3 * PIECE_LEN / line.len());
    for model in models() {
        let mut whole = Vec::new();
        model.encode_piece(&text, &mut whole).unwrap();
        assert!(model.encode(&text, false).unwrap() == whole);
    }
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_before_it_is_encoded() {
    for model in models() {
        let start = crate::runtime::clock::now();
        let piece = "\n".repeat(WHOLE_LEN_MAX);
        model.encode(&piece, false).unwrap();
        let of_piece = start.elapsed();
        let text = "\n".repeat(64 << 20);
        let start = crate::runtime::clock::now();
        let refused = model
            .encode_prompt(&text, PromptForm::default(), 8191)
            .map(|ids| ids.len());
        let Err(TextError::TooLong { tokens_min, max }) = refused else {
            panic!("64 MiB cannot be 8191 tokens: {refused:?}");
        };
        assert!(
            max == 8191 && (64 << 20) / 1024 <= tokens_min,
            "{tokens_min}"
        );
        // Encoding takes half a minute, 256 times as long as that of a piece.
        let took = start.elapsed();
        assert!(took < 32 * of_piece, "{took:?} beside {of_piece:?}");
        // What may fit is found out on the way.
        let text = "word ".repeat(100_000);
        let error = model
            .encode_prompt(&text, PromptForm::default(), 8191)
            .unwrap_err();
        assert!(matches!(error, TextError::TooLong { .. }), "{error}");
    }
}

#[test]
fn a_stretch_without_a_place_to_cut_has_a_limit() {
    let model = small_model();
    let check = |text: &str| {
        let error = model.encode(text, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the text has 262145 bytes without a place where words surely part, at most 262144 are \
             tokenised at once"
        );
        assert!(error.is_request_fault());
    };
    check(&"-".repeat(WHOLE_LEN_MAX + 1));
    check(&format!(
        "{}{}",
        "a ".repeat(PIECE_LEN),
        "-".repeat(WHOLE_LEN_MAX)
    ));
    let fits = "-".repeat(WHOLE_LEN_MAX);
    assert_eq!(model.encode(&fits, false).unwrap().len(), WHOLE_LEN_MAX);
}
