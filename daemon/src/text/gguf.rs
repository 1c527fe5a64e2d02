//! Builds a tokenizer from the metadata of a GGUF file.

use std::collections::HashSet;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, Tokenizer,
    models::bpe::{BPE, Vocab},
};

use super::{
    added::AddedToken,
    error::TextError,
    load::check_id,
    model::{Parts, SpecialTokens},
    split,
    vocab::TokenTable,
};
use crate::weights::{GgufMetadata, GgufValue};

/// Types of tokens in `tokenizer.ggml.token_type`.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Loads the tokenizer in `metadata`.
pub(super) fn load(metadata: &GgufMetadata) -> Result<Parts, TextError> {
    let file = metadata.file().to_owned();
    let splitter = splitter(metadata)?;
    let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
    let types = token_types(metadata, tokens.len())?;
    let mut vocab = Vocab::default();
    let mut table = TokenTable::default();
    let mut added = Vec::new();
    let mut seen = HashSet::with_capacity(tokens.len());
    for (i, (text, token_type)) in tokens.iter().zip(types).enumerate() {
        let id = check_id(&file, text, i as u64)?;
        let special = matches!(token_type, UNKNOWN | CONTROL);
        table.insert(id, text, special);
        // Of two tokens that read alike only the first can be meant.
        if !seen.insert(*text) {
            continue;
        }
        if special || token_type == USER_DEFINED {
            added.push(AddedToken {
                special,
                ..AddedToken::special(id, text)
            });
        }
        // Control tokens stay out of the model, so that no text can merge into one.
        if !special {
            vocab.insert((*text).to_owned(), id);
        }
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges(metadata)?)
        .ignore_merges(splitter.ignore_merges)
        .build()
        .map_err(|source| TextError::Tokenizer {
            file: file.clone(),
            source,
        })?;
    let mut plain = Tokenizer::new(bpe);
    plain.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(
        metadata,
        splitter.pre_tokenizer,
    )?));
    if !splitter.normalizer.is_null() {
        let normalizer = part::<NormalizerWrapper>(metadata, splitter.normalizer)?;
        plain
            .with_normalizer(Some(normalizer))
            .map_err(|source| TextError::Tokenizer {
                file: file.clone(),
                source,
            })?;
    }
    let special = special_tokens(metadata, &tokens, &mut added, splitter.add_bos)?;
    let template = metadata.string("tokenizer.chat_template")?;
    Ok(Parts {
        file,
        plain,
        table,
        added,
        special,
        templates: template
            .map(|t| ("default".to_owned(), t.to_owned()))
            .into_iter()
            .collect(),
        encoder_source: None,
    })
}

fn splitter(metadata: &GgufMetadata) -> Result<split::Splitter, TextError> {
    let key = "tokenizer.ggml.model";
    match metadata.string(key)? {
        Some("gpt2") => (),
        found => {
            let found = found.map_or_else(|| "missing".to_owned(), |f| format!("`{f}`"));
            return Err(metadata.field(key, "gpt2 (byte-level BPE)", &found).into());
        }
    }
    let key = "tokenizer.ggml.pre";
    let named = metadata.string(key)?;
    let name = match named {
        Some(name) if name != "default" => name,
        // Without a name, or with one that says nothing, the merges have to tell: another splitter
        // gives other tokens, and answers that are only somewhat worse.
        _ => {
            let merges = strings(metadata, "tokenizer.ggml.merges")?;
            let Some(name) = split::name_by_merges(&merges).or(named) else {
                let expected = format!(
                    "the name of a pre-tokenizer, as these merges are of no known vocabulary: \
                     write it with `gguf-new-metadata --pre-tokenizer NAME`, NAME being {}",
                    split::NAMES
                );
                return Err(metadata.field(key, &expected, "missing").into());
            };
            tracing::warn!(
                file = %metadata.file().display(),
                pre_tokenizer = name,
                "the file does not say how text is cut ({key}); chosen by its merges"
            );
            name
        }
    };
    split::by_name(name).ok_or_else(|| {
        metadata
            .field(key, split::NAMES, &format!("`{name}`"))
            .into()
    })
}

fn part<T: DeserializeOwned>(metadata: &GgufMetadata, json: Value) -> Result<T, TextError> {
    serde_json::from_value(json).map_err(|e| TextError::Tokenizer {
        file: metadata.file().to_owned(),
        source: e.into(),
    })
}

fn strings<'a>(metadata: &'a GgufMetadata, key: &str) -> Result<Vec<&'a str>, TextError> {
    let values = metadata
        .array(key)?
        .ok_or_else(|| metadata.field(key, "an array of strings", "missing"))?;
    let mut strings = Vec::with_capacity(values.len());
    for value in values {
        let GgufValue::String(text) = value else {
            return Err(metadata
                .field(key, "an array of strings", &value.to_string())
                .into());
        };
        strings.push(text.as_str());
    }
    Ok(strings)
}

fn token_types(metadata: &GgufMetadata, n_tokens: usize) -> Result<Vec<u64>, TextError> {
    let key = "tokenizer.ggml.token_type";
    let values = metadata
        .array(key)?
        .ok_or_else(|| metadata.field(key, "an array of integers", "missing"))?;
    if values.len() != n_tokens {
        let expected = format!("as many as there are tokens, {n_tokens}");
        return Err(metadata
            .field(key, &expected, &values.len().to_string())
            .into());
    }
    let mut types = Vec::with_capacity(n_tokens);
    for value in values {
        types.push(match value {
            GgufValue::Uint(v) => *v,
            GgufValue::Int(v) if 0 <= *v => v.unsigned_abs(),
            other => {
                let found = other.to_string();
                return Err(metadata.field(key, "an array of integers", &found).into());
            }
        });
    }
    Ok(types)
}

fn merges(metadata: &GgufMetadata) -> Result<Vec<(String, String)>, TextError> {
    let key = "tokenizer.ggml.merges";
    let mut merges = Vec::new();
    for merge in strings(metadata, key)? {
        let Some((left, right)) = merge
            .split_once(' ')
            .filter(|(l, r)| !l.is_empty() && !r.is_empty())
        else {
            return Err(metadata
                .field(key, "two tokens", &format!("`{merge}`"))
                .into());
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

fn special_tokens(
    metadata: &GgufMetadata,
    tokens: &[&str],
    added: &mut Vec<AddedToken>,
    add_bos_default: bool,
) -> Result<SpecialTokens, TextError> {
    let mut token = |name: &str| -> Result<Option<String>, TextError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = metadata.uint(&key)? else {
            return Ok(None);
        };
        let text = usize::try_from(id).ok().and_then(|i| tokens.get(i));
        let Some(text) = text else {
            let expected = format!("below the number of tokens, {}", tokens.len());
            return Err(metadata.field(&key, &expected, &id.to_string()).into());
        };
        // Converters now and then leave such a token's type at "normal".
        if !added.iter().any(|t| t.content == *text) {
            added.push(AddedToken::special(
                check_id(metadata.file(), text, id)?,
                text,
            ));
        }
        Ok(Some((*text).to_owned()))
    };
    Ok(SpecialTokens {
        bos: token("bos")?,
        eos: token("eos")?,
        pad: token("padding")?,
        unk: token("unknown")?,
        add_bos: metadata
            .bool("tokenizer.ggml.add_bos_token")?
            .unwrap_or(add_bos_default),
    })
}
