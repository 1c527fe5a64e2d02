//! Reads `tokenizer.json`, `tokenizer_config.json` and the chat templates of a folder.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::{
    added::AddedToken,
    error::TextError,
    model::{Parts, SpecialTokens},
    vocab::{ID_MAX, TokenTable},
};
use crate::weights::side_file::{read_json, read_text};

/// The file that makes a folder a tokenizer.
pub(super) const TOKENIZER_NAME: &str = "tokenizer.json";
/// Everything a folder's tokenizer is read from.
pub const FILE_NAMES: [&str; 6] = [
    TOKENIZER_NAME,
    CONFIG_NAME,
    TEMPLATE_NAME,
    ADDED_NAME,
    ENCODER_NAMES[0],
    ENCODER_NAMES[1],
];
const CONFIG_NAME: &str = "tokenizer_config.json";
/// Where older tools kept tokens that are not in the tokenizer.
const ADDED_NAME: &str = "added_tokens.json";
const TEMPLATE_NAME: &str = "chat_template.jinja";
/// V4's encoder where its repository has it, and where packs do. It is not run, only looked at: its prompts changed once.
const ENCODER_NAMES: [&str; 2] = ["encoding/encoding_dsv4.py", "encoding_dsv4.py"];

/// An entry of `added_tokens`.
#[derive(Deserialize)]
struct AddedTokenJson {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    /// Where it is not said: those that are not special.
    normalized: Option<bool>,
}

/// Loads the tokenizer of a folder.
pub(super) fn folder(folder: &Path) -> Result<Parts, TextError> {
    let file = folder.join(TOKENIZER_NAME);
    let mut json: Map<String, Value> = read_json(&file, TOKENIZER_NAME)?;
    for (field, expected) in [("model", "BPE"), ("decoder", "ByteLevel")] {
        let found = json
            .get(field)
            .and_then(|v| v.get("type"))
            .unwrap_or(&Value::Null);
        if found.as_str() != Some(expected) {
            return Err(unsupported(
                &file,
                &format!("{field}.type"),
                expected,
                found,
            ));
        }
    }
    let mut added = added_tokens(&file, json.remove("added_tokens"))?;
    let table = token_table(&file, &json)?;
    let config_file = folder.join(CONFIG_NAME);
    let config: Map<String, Value> = match config_file.exists() {
        true => read_json(&config_file, CONFIG_NAME)?,
        false => Map::new(),
    };
    let (outside_file, outside) = outside_tokens(folder, &config_file, &config)?;
    add_outside(&outside_file, outside, &json, &mut added)?;
    let special = special_tokens(&config_file, &config, &json, &mut added)?;

    // What is left encodes plain text and nothing else.
    json.insert("added_tokens".to_owned(), Value::Array(Vec::new()));
    for unused in ["post_processor", "truncation", "padding"] {
        json.insert(unused.to_owned(), Value::Null);
    }
    let plain: Tokenizer =
        serde_json::from_value(Value::Object(json)).map_err(|e| TextError::Tokenizer {
            file: file.clone(),
            source: e.into(),
        })?;
    let templates = templates(folder, &config_file, &config)?;
    let mut encoders = ENCODER_NAMES.iter().map(|name| folder.join(name));
    let encoder_source = match encoders.find(|file| file.exists()) {
        Some(file) => Some(read_text(&file, "the encoder of prompts")?),
        None => None,
    };
    Ok(Parts {
        file,
        plain,
        table,
        added,
        special,
        templates,
        encoder_source,
    })
}

fn added_tokens(file: &Path, json: Option<Value>) -> Result<Vec<AddedToken>, TextError> {
    let entries: Vec<AddedTokenJson> = match json {
        None | Some(Value::Null) => Vec::new(),
        Some(json) => serde_json::from_value(json).map_err(|e| TextError::Tokenizer {
            file: file.to_owned(),
            source: e.into(),
        })?,
    };
    let mut tokens = Vec::with_capacity(entries.len());
    for entry in entries {
        check_id(file, &entry.content, u64::from(entry.id))?;
        tokens.push(AddedToken {
            id: entry.id,
            content: entry.content,
            special: entry.special,
            lstrip: entry.lstrip,
            rstrip: entry.rstrip,
            single_word: entry.single_word,
            normalized: entry.normalized.unwrap_or(!entry.special),
        });
    }
    Ok(tokens)
}

/// The tokens that stand outside `tokenizer.json`, and where: in `added_tokens_decoder` of the
/// configuration, or where it has none, in `added_tokens.json`.
fn outside_tokens(
    folder: &Path,
    config_file: &Path,
    config: &Map<String, Value>,
) -> Result<(PathBuf, Vec<AddedToken>), TextError> {
    let legacy_file = folder.join(ADDED_NAME);
    let mut entries = Vec::new();
    let file = match config.get("added_tokens_decoder") {
        Some(Value::Object(decoder)) => {
            for (id, token) in decoder {
                let Some((id, token)) = id.parse::<u32>().ok().zip(token.as_object()) else {
                    let expected = "objects by their ids";
                    return Err(unsupported(
                        config_file,
                        "added_tokens_decoder",
                        expected,
                        token,
                    ));
                };
                let mut token = token.clone();
                token.insert("id".to_owned(), id.into());
                entries.push(Value::Object(token));
            }
            config_file.to_owned()
        }
        None | Some(Value::Null) if legacy_file.exists() => {
            let legacy: Map<String, Value> = read_json(&legacy_file, ADDED_NAME)?;
            let names: Vec<&Value> = ["bos_token", "eos_token", "pad_token", "unk_token"]
                .iter()
                .filter_map(|key| config.get(*key))
                .map(|token| token.get("content").unwrap_or(token))
                .collect();
            for (content, id) in legacy {
                let special = names.iter().any(|name| **name == content);
                entries.push(json!({"id": id, "content": content, "special": special}));
            }
            legacy_file
        }
        None | Some(Value::Null) => config_file.to_owned(),
        Some(found) => {
            let expected = "an object";
            return Err(unsupported(
                config_file,
                "added_tokens_decoder",
                expected,
                found,
            ));
        }
    };
    let mut tokens = added_tokens(&file, Some(Value::Array(entries)))?;
    tokens.sort_by_key(|token| token.id);
    Ok((file, tokens))
}

/// Adds tokens behind those of `tokenizer.json`, as transformers does: one that is there already
/// keeps its id and gets these flags.
fn add_outside(
    file: &Path,
    tokens: Vec<AddedToken>,
    tokenizer: &Map<String, Value>,
    added: &mut Vec<AddedToken>,
) -> Result<(), TextError> {
    let vocab = tokenizer.get("model").and_then(|m| m.get("vocab"));
    let vocab = vocab.and_then(Value::as_object);
    let ids = vocab.into_iter().flat_map(Map::values);
    let ids = ids.filter_map(Value::as_u64);
    let ids = ids.chain(added.iter().map(|token| u64::from(token.id)));
    let mut next = ids.max().map_or(0, |id| id.saturating_add(1));
    for mut token in tokens {
        if let Some(there) = added.iter_mut().find(|t| t.content == token.content) {
            token.id = there.id;
            *there = token;
            continue;
        }
        let ordinary = vocab.and_then(|vocab| vocab.get(&token.content)?.as_u64());
        match ordinary {
            Some(id) => token.id = check_id(file, &token.content, id)?,
            None if u64::from(token.id) == next => next += 1,
            // Some programs take the id that is written, others the next one.
            None => {
                return Err(TextError::Unsupported {
                    file: file.to_owned(),
                    field: format!("the id of token `{}`", short(&token.content)),
                    expected: format!("{next}, the next one that is free"),
                    found: token.id.to_string(),
                });
            }
        }
        added.push(token);
    }
    Ok(())
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

fn token_table(file: &Path, json: &Map<String, Value>) -> Result<TokenTable, TextError> {
    let vocab = json
        .get("model")
        .and_then(|m| m.get("vocab"))
        .unwrap_or(&Value::Null);
    let Some(vocab) = vocab.as_object() else {
        return Err(unsupported(file, "model.vocab", "an object", vocab));
    };
    let mut table = TokenTable::default();
    for (text, id) in vocab {
        let Some(found) = id.as_u64() else {
            return Err(unsupported(file, "model.vocab", "token ids", id));
        };
        table.insert(check_id(file, text, found)?, text, false);
    }
    Ok(table)
}

/// A token id that the table can hold.
pub(super) fn check_id(file: &Path, token: &str, id: u64) -> Result<u32, TextError> {
    match u32::try_from(id) {
        Ok(id) if id <= ID_MAX => Ok(id),
        _ => Err(TextError::Unsupported {
            file: file.to_owned(),
            field: format!("the id of token `{}`", short(token)),
            expected: format!("at most {ID_MAX}"),
            found: id.to_string(),
        }),
    }
}

fn special_tokens(
    file: &Path,
    config: &Map<String, Value>,
    tokenizer: &Map<String, Value>,
    added: &mut Vec<AddedToken>,
) -> Result<SpecialTokens, TextError> {
    // A name alone or an object with the name in it.
    let mut token = |key: &str| -> Result<Option<String>, TextError> {
        let found = match config.get(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(token)) => token.get("content").unwrap_or(&Value::Null),
            Some(name) => name,
        };
        let refuse = || unsupported(file, key, "a token of tokenizer.json", found);
        let name = found.as_str().ok_or_else(refuse)?;
        if !added.iter().any(|t| t.content == name) {
            // Some tokenizers leave their special tokens among the ordinary ones.
            let vocab = tokenizer.get("model").and_then(|m| m.get("vocab"));
            let id = vocab
                .and_then(|v| v.get(name)?.as_u64())
                .ok_or_else(refuse)?;
            added.push(AddedToken::special(check_id(file, name, id)?, name));
        }
        Ok(Some(name.to_owned()))
    };
    let bos = token("bos_token")?;
    let add_bos = match config.get("add_bos_token") {
        Some(Value::Bool(add)) => *add,
        None | Some(Value::Null) => post_processor_adds(tokenizer, bos.as_deref()),
        Some(found) => return Err(unsupported(file, "add_bos_token", "true or false", found)),
    };
    Ok(SpecialTokens {
        bos,
        eos: token("eos_token")?,
        // Only handed to templates; a name that is no token does no harm there.
        pad: token("pad_token").ok().flatten(),
        unk: token("unk_token").ok().flatten(),
        add_bos,
    })
}

/// Llama 3 says nothing in its configuration and lets the post-processor put BOS in front.
fn post_processor_adds(tokenizer: &Map<String, Value>, bos: Option<&str>) -> bool {
    let Some(post) = tokenizer.get("post_processor") else {
        return false;
    };
    let one = std::slice::from_ref(post);
    let steps = post
        .get("processors")
        .and_then(Value::as_array)
        .map_or(one, Vec::as_slice);
    steps.iter().any(|step| {
        let first = step
            .get("single")
            .and_then(|s| s.get(0)?.get("SpecialToken")?.get("id"));
        bos.is_some() && first.and_then(Value::as_str) == bos
    })
}

/// Named templates; a `chat_template.jinja` file wins over the configuration.
fn templates(
    folder: &Path,
    config_file: &Path,
    config: &Map<String, Value>,
) -> Result<Vec<(String, String)>, TextError> {
    let default = "default".to_owned();
    let file = folder.join(TEMPLATE_NAME);
    if file.exists() {
        return Ok(vec![(default, read_text(&file, TEMPLATE_NAME)?)]);
    }
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![(default, source.clone())]),
        Some(Value::Array(list)) => {
            let mut templates = Vec::new();
            for entry in list {
                let field = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                let (Some(name), Some(source)) = (field("name"), field("template")) else {
                    let expected = "a name and a template";
                    return Err(unsupported(config_file, "chat_template", expected, entry));
                };
                templates.push((name, source));
            }
            Ok(templates)
        }
        Some(found) => Err(unsupported(
            config_file,
            "chat_template",
            "a string or a list",
            found,
        )),
    }
}

fn unsupported(file: &Path, field: &str, expected: &str, found: &Value) -> TextError {
    TextError::Unsupported {
        file: file.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found: found.to_string().chars().take(100).collect(),
    }
}
