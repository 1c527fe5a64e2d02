//! How text is cut before merging, by the names that GGUF files use.
//!
//! The expressions are facts of the models' training: another one gives other tokens.

use serde_json::{Value, json};

/// A pre-tokenizer and what goes with it.
pub(super) struct Splitter {
    /// In the form of a tokenizer.json.
    pub(super) pre_tokenizer: Value,
    /// In the form of a tokenizer.json.
    pub(super) normalizer: Value,
    /// A whole word of the vocabulary is taken before any merging.
    pub(super) ignore_merges: bool,
    /// Used where the file does not say.
    pub(super) add_bos: bool,
}

/// The names known, for messages.
pub(super) const NAMES: &str = "default, gpt-2, smollm, llama-bpe, qwen2, deepseek-llm, \
                                deepseek-coder, deepseek-v3 or deepseek-r1-qwen";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const DEFAULT_WORDS: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3_WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// The letters of DeepSeek's first vocabularies: cased letters of Unicode, as ranges.
const DEEPSEEK_LLM_LETTERS: &str = "\\s?[A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\
    \u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\
    \u{38C}\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}\
    -\u{10C5}\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\
    \u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\
    \u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\
    \u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\
    \u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\
    \u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\
    \u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\
    \u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\
    \u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\
    \u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\
    \u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\
    \u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+";
const DEEPSEEK_LLM_PUNCTUATION: &str =
    "\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+";
const DEEPSEEK_LLM_CJK: &str = "[\u{4E00}-\u{9FA5}\u{0800}-\u{4E00}\u{AC00}-\u{D7FF}]+";
const DEEPSEEK3_CJK: &str = "[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+";

/// Published vocabularies by their merges: the splitter each was trained with, how many merges there
/// are, and the first of them. Models made of them add tokens and leave the merges alone.
const KNOWN_MERGES: [(&str, usize, [&str; 4]); 7] = [
    ("deepseek-v3", 127_741, ["Ġ t", "Ġ a", "i n", "Ġ Ġ"]),
    ("deepseek-llm", 99_757, ["Ġ Ġ", "Ġ t", "Ġ a", "i n"]),
    ("deepseek-coder", 31_757, ["Ġ Ġ", "Ġ t", "Ġ a", "i n"]),
    ("llama-bpe", 280_147, ["Ġ Ġ", "Ġ ĠĠĠ", "ĠĠ ĠĠ", "ĠĠĠ Ġ"]),
    ("qwen2", 151_387, ["Ġ Ġ", "ĠĠ ĠĠ", "i n", "Ġ t"]),
    ("smollm", 48_900, ["Ġ t", "Ġ a", "i n", "h e"]),
    ("gpt-2", 50_000, ["Ġ t", "Ġ a", "h e", "i n"]),
];

/// The name of the splitter that goes with a published vocabulary; `None` for merges that are not
/// known.
pub(super) fn name_by_merges(merges: &[&str]) -> Option<&'static str> {
    let known = KNOWN_MERGES
        .iter()
        .find(|(_, n, first)| merges.len() == *n && merges.starts_with(first));
    known.map(|(name, ..)| *name)
}

/// The splitter that GGUF calls `name`.
pub(super) fn by_name(name: &str) -> Option<Splitter> {
    let digits = json!({"type": "Digits", "individual_digits": true});
    let plain = |steps: Vec<Value>| Splitter {
        pre_tokenizer: sequence(steps),
        normalizer: Value::Null,
        ignore_merges: false,
        add_bos: false,
    };
    Some(match name {
        // What llama.cpp does where it knows no better.
        "default" => plain(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(DEFAULT_WORDS),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
        ]),
        "gpt-2" | "gpt2" => plain(vec![split(GPT2)]),
        "smollm" => plain(vec![split(r"\p{N}"), split(GPT2)]),
        "llama3" | "llama-v3" | "llama-bpe" => Splitter {
            ignore_merges: true,
            add_bos: true,
            ..plain(vec![split(LLAMA3)])
        },
        "qwen2" | "deepseek-r1-qwen" => Splitter {
            normalizer: json!({"type": "NFC"}),
            ..plain(vec![split(QWEN2)])
        },
        "deepseek-llm" => plain(vec![
            split("[\r\n]"),
            split(DEEPSEEK_LLM_LETTERS),
            split(DEEPSEEK_LLM_PUNCTUATION),
            split(r"\s+$"),
            split(DEEPSEEK_LLM_CJK),
            digits,
        ]),
        "deepseek-coder" => plain(vec![
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split(DEEPSEEK_LLM_CJK),
            digits,
        ]),
        "deepseek-v3" => plain(vec![
            split(r"\p{N}{1,3}"),
            split(DEEPSEEK3_CJK),
            split(DEEPSEEK3_WORDS),
        ]),
        _ => return None,
    })
}

/// Whether each space behind something else begins a match, for the pre-tokenizers of [`by_name`] and
/// the same in other words; `None` for any other one.
pub(super) fn takes_spaces(pre_tokenizer: &Value) -> Option<bool> {
    const KNOWN: [(&str, bool); 7] = [
        ("gpt-2", true),
        ("smollm", true),
        ("llama-bpe", true),
        ("qwen2", true),
        ("deepseek-llm", false),
        ("deepseek-coder", false),
        ("deepseek-v3", true),
    ];
    let found = steps(pre_tokenizer)?;
    // SmolLM2's own file.
    if found == ["digits", GPT2] {
        return Some(true);
    }
    let is_it = |name| by_name(name).and_then(|known| steps(&known.pre_tokenizer));
    let known = KNOWN
        .iter()
        .find(|(name, _)| is_it(name).as_ref() == Some(&found));
    known.map(|(_, takes_spaces)| *takes_spaces)
}

/// The expressions of a pre-tokenizer that isolates what they match; `None` when it does anything
/// else.
fn steps(pre_tokenizer: &Value) -> Option<Vec<String>> {
    let kind = pre_tokenizer.get("type")?.as_str()?;
    Some(match kind {
        "Sequence" => {
            let parts = pre_tokenizer.get("pretokenizers")?.as_array()?;
            let parts: Option<Vec<_>> = parts.iter().map(steps).collect();
            parts?.concat()
        }
        "Split" => {
            let is_isolated = pre_tokenizer.get("behavior")? == "Isolated"
                && pre_tokenizer.get("invert")? == false;
            let expression = pre_tokenizer.get("pattern")?.get("Regex")?.as_str()?;
            // Some files have the characters where others have their names.
            let expression = expression.replace('\r', r"\r").replace('\n', r"\n");
            vec![is_isolated.then_some(expression)?]
        }
        "Digits" => {
            vec![(pre_tokenizer.get("individual_digits")? == true).then(|| "digits".into())?]
        }
        "ByteLevel" if pre_tokenizer.get("add_prefix_space")? == false => {
            match pre_tokenizer.get("use_regex")?.as_bool()? {
                true => vec![GPT2.to_owned()],
                false => Vec::new(),
            }
        }
        _ => return None,
    })
}

fn split(expression: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated",
        "invert": false})
}

fn sequence(mut steps: Vec<Value>) -> Value {
    steps.push(
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false}),
    );
    json!({"type": "Sequence", "pretokenizers": steps})
}
