//! Random walks over the tokens that a grammar allows, with a real vocabulary: whatever a model
//! prefers, what comes out follows the schema.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

use std::{path::PathBuf, sync::Arc};

use dsd::{
    grammar::{self, Answer, Calls, Constraint, GrammarError, Vocabulary},
    text::{
        DsmlTags, OutputDelta, OutputForm, OutputParser, PromptForm, ReasoningMode, TextModel,
        ToolMarkup,
    },
};
use serde_json::{Map, Value, json};

const N_SCHEMAS: u64 = 1_000;
/// Every schema here bounds what it allows; no answer to one needs so many tokens.
const TOKENS_MAX: usize = 5_000;

fn data() -> PathBuf {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data");
    std::env::var_os("DSD_TEST_DATA").map_or(default, PathBuf::from)
}

fn text() -> Arc<TextModel> {
    let file = data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    Arc::new(TextModel::open(&file).unwrap_or_else(|e| panic!("{e}: run `make test-setup`")))
}

/// SplitMix64.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A schema that bounds the length of what follows it.
fn schema(draws: &mut Draws, depth: usize) -> Value {
    let n_kinds = if depth == 0 { 7 } else { 11 };
    match draws.below(n_kinds) {
        0 => json!({"type": "string", "maxLength": draws.below(12)}),
        1 => json!({"type": "integer", "minimum": -20, "maximum": draws.below(1000)}),
        2 => json!({"type": "number", "minimum": 0, "maximum": 1}),
        3 => json!({"type": "boolean"}),
        4 => json!({"enum": ["a", 5, null, "ü\"\n", [1, 2], {"k": "v"}]}),
        5 => json!({"const": {"fixed": [true, "x y"]}}),
        6 => json!({"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"}),
        7 => {
            let items = without_references(draws, depth - 1);
            json!({"type": "array", "items": items, "minItems": draws.below(2), "maxItems": 1 + draws.below(3)})
        }
        8 => {
            json!({"anyOf": [without_references(draws, depth - 1), without_references(draws, depth - 1)]})
        }
        9 => {
            let inner = without_references(draws, depth - 1);
            json!({"$ref": "#/$defs/inner", "$defs": {"inner": inner}})
        }
        _ => {
            let mut properties = Map::new();
            let mut required = Vec::new();
            for idx in 0..1 + draws.below(4) {
                let name = format!("key {idx}");
                let property = without_references(draws, depth - 1);
                if draws.below(2) == 0 {
                    required.push(json!(name));
                }
                properties.insert(name, property);
            }
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

/// References lead to the root, where a part's are not.
fn without_references(draws: &mut Draws, depth: usize) -> Value {
    loop {
        let schema = schema(draws, depth);
        if !schema.to_string().contains("$ref") {
            return schema;
        }
    }
}

/// Follows the grammar at random until the answer may end and does.
fn walk(
    text: &TextModel,
    constraint: &mut Constraint,
    stop: u32,
    draws: &mut Draws,
) -> Result<Vec<u32>, GrammarError> {
    let mut tokens = Vec::new();
    while tokens.len() < TOKENS_MAX {
        let allowed = constraint.allowed()?;
        let ids: Vec<u32> = (0..text.vocab_len() as u32)
            .filter(|id| {
                let word = allowed.words().get(*id as usize / 32);
                word.is_some_and(|word| word >> (id % 32) & 1 == 1)
            })
            .collect();
        let token = ids[draws.below(ids.len())];
        if token == stop {
            return Ok(tokens);
        }
        constraint.advance(token)?;
        tokens.push(token);
    }
    panic!("no end: {}", text.decode(&tokens[..200], false));
}

#[test]
fn whatever_is_drawn_follows_a_thousand_random_schemas() {
    let text = text();
    let vocabulary = Vocabulary::new(&text).unwrap();
    let stop = text.eos_id().unwrap();
    let stop_tokens: Arc<[u32]> = Arc::from([stop]);
    let mut n_tokens = 0;
    for seed in 0..N_SCHEMAS {
        let mut draws = Draws(seed);
        let schema = schema(&mut draws, 3);
        let answer = Answer::Json(schema.clone());
        let grammar = grammar::write(&text, ReasoningMode::Off, Some(&answer), None);
        let mut constraint = vocabulary
            .compile(&grammar, &stop_tokens)
            .unwrap_or_else(|e| panic!("seed {seed}: {schema}: {e}"));
        let tokens = walk(&text, &mut constraint, stop, &mut draws)
            .unwrap_or_else(|e| panic!("seed {seed}: {schema}: {e}"));
        n_tokens += tokens.len();
        let found = text.decode(&tokens, false);
        let value: Value = serde_json::from_str(&found)
            .unwrap_or_else(|e| panic!("seed {seed}: {schema}: {e}: {found}"));
        let validator = jsonschema::validator_for(&schema).unwrap();
        assert!(validator.is_valid(&value), "seed {seed}: {schema}: {found}");
        // Tokens that came before a loss lead to the same state.
        let mut again = vocabulary.compile(&grammar, &stop_tokens).unwrap();
        tokens.iter().for_each(|t| again.advance(*t).unwrap());
        assert_eq!(
            again.allowed().unwrap().words(),
            constraint.allowed().unwrap().words()
        );
    }
    assert!(N_SCHEMAS as usize <= n_tokens);
}

/// What a client sees of an answer that is nothing but calls.
fn calls_of(text: &Arc<TextModel>, markup: ToolMarkup, tokens: &[u32]) -> Vec<(String, String)> {
    let form = OutputForm {
        tools: Some(markup),
        ..OutputForm::PLAIN
    };
    let mut parser = OutputParser::new(Arc::clone(text), &form, Vec::new());
    let mut deltas: Vec<OutputDelta> = tokens.iter().flat_map(|t| parser.push(*t).deltas).collect();
    deltas.extend(parser.finish());
    let mut calls: Vec<(String, String)> = Vec::new();
    for delta in deltas {
        match delta {
            OutputDelta::ToolCall(name) => calls.push((name, String::new())),
            OutputDelta::ToolArguments(text) => calls.last_mut().unwrap().1 += &text,
            other => panic!("no call: {other:?}"),
        }
    }
    calls
}

#[test]
fn calls_that_are_required_are_calls_in_every_markup() {
    let text = text();
    let vocabulary = Vocabulary::new(&text).unwrap();
    let stop = text.eos_id().unwrap();
    let parameters = json!({
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 5}},
        "required": ["city"], "additionalProperties": false,
    });
    let parameters = parameters.as_object().unwrap();
    for markup in [
        ToolMarkup::DeepseekV3,
        ToolMarkup::DeepseekV31,
        ToolMarkup::Hermes,
        ToolMarkup::Llama,
        ToolMarkup::Dsml(DsmlTags::V4),
        ToolMarkup::Dsml(DsmlTags::V41),
    ] {
        for seed in 0..20 {
            let calls = Calls {
                markup,
                functions: vec![("get_weather", parameters), ("add", parameters)],
                max: 3,
                are_free: false,
            };
            let grammar = grammar::write(&text, ReasoningMode::Off, None, Some(&calls));
            let mut constraint = vocabulary.compile(&grammar, &Arc::from([stop])).unwrap();
            let tokens = walk(&text, &mut constraint, stop, &mut Draws(seed)).unwrap();
            let answer = text.decode(&tokens, false);
            let found = calls_of(&text, markup, &tokens);
            assert!((1..=3).contains(&found.len()), "{markup:?}: {answer}");
            for (name, arguments) in found {
                assert!(name == "get_weather" || name == "add", "{name}");
                let arguments: Value = serde_json::from_str(&arguments).unwrap();
                let schema = Value::Object(parameters.clone());
                let validator = jsonschema::validator_for(&schema).unwrap();
                assert!(validator.is_valid(&arguments), "{markup:?}: {answer}");
            }
        }
    }
}

/// Functions whose arguments DSML has tags for, and some for which it has one object.
#[test]
fn calls_in_dsml_follow_their_schemas_with_published_vocabularies() {
    let functions = [
        json!({
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6, "description": "Its name"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "fixed": {"const": "x y"},
                "day": {"type": "string", "pattern": "^[0-9]{2}$"},
                "n": {"type": "integer", "minimum": 0, "maximum": 20},
                "list": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
            },
            "required": ["city", "list"],
            "$defs": {"item": {"type": "object", "properties": {"k": {"type": "boolean"}}, "additionalProperties": false}},
            "additionalProperties": false,
        }),
        json!({"type": "object", "properties": {}, "additionalProperties": false}),
        json!({
            "anyOf": [
                {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false},
                {"type": "object", "properties": {"b": {"const": null}}, "required": ["b"], "additionalProperties": false},
            ],
        }),
        json!({
            "type": "object", "properties": {"a\"b": {"type": "boolean"}}, "required": ["a\"b"], "additionalProperties": false,
        }),
    ];
    let names = ["get_weather", "ping", "either", "quoted"];
    for (name, tags) in [
        ("deepseek-v3.2", DsmlTags::V32),
        ("deepseek-v4", DsmlTags::V4),
    ] {
        let text = Arc::new(TextModel::open(&data().join("tokenizers").join(name)).unwrap());
        let vocabulary = Vocabulary::new(&text).unwrap();
        let stop = text.eos_id().unwrap();
        let markup = ToolMarkup::Dsml(tags);
        let mut n_seen = [0; 4];
        for seed in 0..24 {
            let named = names.iter().zip(&functions);
            let calls = Calls {
                markup,
                functions: named
                    .map(|(name, f)| (*name, f.as_object().unwrap()))
                    .collect(),
                max: 2,
                are_free: false,
            };
            let reasoning = match seed % 2 {
                0 => ReasoningMode::Off,
                _ => ReasoningMode::Inside,
            };
            let grammar = grammar::write(&text, reasoning, None, Some(&calls));
            let mut constraint = vocabulary.compile(&grammar, &Arc::from([stop])).unwrap();
            if reasoning == ReasoningMode::Inside {
                let thoughts = text.encode_trusted("Well.</think>\n\n").unwrap();
                thoughts
                    .iter()
                    .for_each(|t| constraint.advance(*t).unwrap());
            }
            let tokens = walk(&text, &mut constraint, stop, &mut Draws(seed)).unwrap();
            let answer = text.decode(&tokens, false);
            for (name, arguments) in calls_of(&text, markup, &tokens) {
                let idx = names.iter().position(|known| *known == name).unwrap();
                n_seen[idx] += 1;
                let arguments: Value = serde_json::from_str(&arguments)
                    .unwrap_or_else(|e| panic!("{e}: {arguments}: {answer}"));
                let validator = jsonschema::validator_for(&functions[idx]).unwrap();
                assert!(validator.is_valid(&arguments), "{answer}: {arguments}");
            }
        }
        assert!(!n_seen.contains(&0), "{n_seen:?}");
    }
}

/// What a model of these generations writes by itself is what the grammar allows.
#[test]
fn calls_in_dsml_as_models_write_them_are_allowed() {
    let text = Arc::new(TextModel::open(&data().join("tokenizers/deepseek-v4")).unwrap());
    let vocabulary = Vocabulary::new(&text).unwrap();
    let stop = text.eos_id().unwrap();
    let schema = json!({
        "type": "object",
        "properties": {"html": {"type": "string"}, "unit": {"enum": ["c", "f"]}, "xs": {"type": "array"}},
        "required": ["html"],
    });
    let calls = Calls {
        markup: ToolMarkup::Dsml(DsmlTags::V4),
        functions: vec![("f", schema.as_object().unwrap())],
        max: 2,
        are_free: false,
    };
    let call = "<｜DSML｜invoke name=\"f\">\n\
        <｜DSML｜parameter name=\"html\" string=\"true\"><b>x</b> </ y\n｜ & \"q\"</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"unit\" string=\"true\">f</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"xs\" string=\"false\">[1, 2.5]</｜DSML｜parameter>\n\
        </｜DSML｜invoke>\n";
    for begin in ["", "\n\n"] {
        let answer = format!("{begin}<｜DSML｜tool_calls>\n{call}{call}</｜DSML｜tool_calls>");
        let grammar = grammar::write(&text, ReasoningMode::Off, None, Some(&calls));
        let mut constraint = vocabulary.compile(&grammar, &Arc::from([stop])).unwrap();
        for token in text.encode_trusted(&answer).unwrap() {
            let advanced = constraint.advance(token);
            assert!(
                advanced.is_ok(),
                "{:?}: {advanced:?}",
                text.token_text(token)
            );
        }
        let allowed = constraint.allowed().unwrap();
        assert_eq!(
            allowed.words()[stop as usize / 32] >> (stop % 32) & 1,
            1,
            "it may end"
        );
    }
}

/// Follows a grammar by the tokens of a text, as far as it goes: bytes of the text, and whether the
/// answer may end there.
fn follow(text: &TextModel, constraint: &mut Constraint, answer: &str, stop: u32) -> (usize, bool) {
    let form = PromptForm {
        add_special: false,
        parse_special: true,
    };
    let mut n = 0;
    for token in text.encode_prompt(answer, form, usize::MAX).unwrap() {
        if constraint.advance(token).is_err() {
            return (n, false);
        }
        n += text.token_bytes(token).unwrap().len();
    }
    let allowed = constraint.allowed().unwrap();
    let may_end = allowed.words()[stop as usize / 32] >> (stop % 32) & 1 == 1;
    (n, may_end)
}

/// Asked for nothing, a model may write text, calls, or both; strict functions' arguments follow their
/// schema.
#[test]
fn text_is_free_where_calls_are_and_calls_follow_their_schema() {
    let strict = json!({
        "type": "object", "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"], "additionalProperties": false,
    });
    let (strict, any) = (strict.as_object().unwrap(), Map::new());
    let data = data();
    let smollm2 = data.join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let v3 = data.join("tokenizers/deepseek-v3.1");
    let qwen = data.join("tokenizers/qwen-3");
    let deepseek = |name: &str, arguments: &str| {
        format!(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        )
    };
    let hermes = |name: &str, arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    let llama = |name: &str, arguments: &str| {
        format!("{{\"name\": \"{name}\", \"parameters\": {arguments}}}")
    };
    let v4 = data.join("tokenizers/deepseek-v4");
    let dsml = |name: &str, arguments: &str| {
        let arguments: Value = serde_json::from_str(arguments).unwrap();
        let arguments = arguments.as_object().unwrap().iter().map(|(name, value)| {
            let (is_string, value) = match value.as_str() {
                Some(text) => (true, text.to_owned()),
                None => (false, value.to_string().replace(',', ", ")),
            };
            format!("<｜DSML｜parameter name=\"{name}\" string=\"{is_string}\">{value}</｜DSML｜parameter>\n")
        });
        let arguments: String = arguments.collect();
        format!(
            "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"{name}\">\n{arguments}</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
        )
    };
    type Write<'a> = &'a dyn Fn(&str, &str) -> String;
    let tags = ToolMarkup::Dsml(DsmlTags::V4);
    let cases: [(&PathBuf, ToolMarkup, Write<'_>); 6] = [
        (&v4, tags, &dsml),
        (&smollm2, tags, &dsml),
        (&smollm2, ToolMarkup::Hermes, &hermes),
        (&qwen, ToolMarkup::Hermes, &hermes),
        (&v3, ToolMarkup::DeepseekV31, &deepseek),
        (&smollm2, ToolMarkup::Llama, &llama),
    ];
    for (path, markup, call) in cases {
        let text = TextModel::open(path).unwrap();
        let vocabulary = Vocabulary::new(&text).unwrap();
        let stop = text.eos_id().unwrap();
        let calls = Calls {
            markup,
            functions: vec![("weather", strict), ("add", &any)],
            max: 2,
            are_free: true,
        };
        let grammar = grammar::write(&text, ReasoningMode::Off, None, Some(&calls));
        let check = |answer: &str, expected: (usize, bool)| {
            let mut constraint = vocabulary.compile(&grammar, &Arc::from([stop])).unwrap();
            let found = follow(&text, &mut constraint, answer, stop);
            assert_eq!(found, expected, "{markup:?} of {path:?}: {answer}");
        };
        let whole = |answer: &str| check(answer, (answer.len(), true));
        whole("");
        whole("It is 21 < 22, {said} he:\n\n<b>warm</b>.");
        let good = call("weather", "{\"city\": \"Rome\"}");
        whole(&good);
        whole(&call("add", "{\"a\": [1, 2]}"));
        if markup != ToolMarkup::Llama {
            whole(&format!("Let me look.\n{good}"));
        }
        for wrong in [call("weather", "{\"city\": 5}"), call("other", "{}")] {
            let mut constraint = vocabulary.compile(&grammar, &Arc::from([stop])).unwrap();
            let (n, may_end) = follow(&text, &mut constraint, &wrong, stop);
            assert!(
                n < wrong.len() && !may_end,
                "{markup:?} of {path:?}: {wrong}"
            );
        }
    }
}

#[test]
fn grammars_that_cannot_be_followed_are_refused_in_bounded_time() {
    let text = text();
    let vocabulary = Vocabulary::new(&text).unwrap();
    let deep = (0..100).fold(
        json!({"type": "string"}),
        |inner, _| json!({"type": "array", "items": inner}),
    );
    let wide: Map<String, Value> = (0..5_000)
        .map(|i| (format!("property {i}"), json!({"type": "string"})))
        .collect();
    let refused = [
        Answer::Json(json!({"type": "strin"})),
        Answer::Json(json!(false)),
        Answer::Json(json!({"$ref": "#/$defs/none"})),
        Answer::Json(json!({"$ref": "https://example.com/schema"})),
        Answer::Regex("(".to_owned()),
        Answer::Lark("start: nothing".to_owned()),
        Answer::Lark("begin: \"a\"".to_owned()),
    ];
    for answer in refused {
        let grammar = grammar::write(&text, ReasoningMode::Off, Some(&answer), None);
        let compiled = vocabulary.compile(&grammar, &Arc::from([0]));
        let outcome = compiled.and_then(|mut constraint| constraint.allowed().map(drop));
        assert!(outcome.is_err(), "{answer:?}");
    }
    // Whether they are taken or not: they end.
    for answer in [
        Answer::Json(deep),
        Answer::Json(json!({"type": "object", "properties": wide})),
        Answer::Json(json!({"$ref": "#"})),
        Answer::Regex("(a{1000}){1000}".to_owned()),
        Answer::Regex("(a|aa)*b{0,500}(c|d|e){0,500}".to_owned()),
        Answer::Lark("start: start start | \"a\"".to_owned()),
    ] {
        let grammar = grammar::write(&text, ReasoningMode::Off, Some(&answer), None);
        let compiled = vocabulary.compile(&grammar, &Arc::from([0]));
        drop(compiled.and_then(|mut constraint| constraint.allowed().map(drop)));
    }
}
