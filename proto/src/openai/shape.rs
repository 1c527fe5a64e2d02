//! What an answer has to look like: `response_format`, and what other servers call it.

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::{
    error::RequestError,
    raw::{self, RawRequest},
    request::{limits, out_of_range, unsupported},
};

/// What an answer has to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerShape {
    /// JSON that follows this schema.
    Json(Value),
    /// Text that matches this regular expression from end to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of this grammar, in Lark's form.
    Grammar(String),
}

/// `response_format`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawFormat {
    #[serde(rename = "type")]
    kind: Option<String>,
    json_schema: Option<RawSchema>,
    /// Where llama.cpp and others have the schema.
    schema: Option<Box<RawValue>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
struct RawSchema {
    schema: Option<Box<RawValue>>,
}

/// `structured_outputs`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawStructured {
    json: Option<Box<RawValue>>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
}

/// The one shape that a request asks for, and the field that does.
pub(super) fn shape(
    raw: &mut RawRequest,
) -> Result<Option<(&'static str, AnswerShape)>, RequestError> {
    let mut found: Vec<(&'static str, AnswerShape)> = Vec::new();
    if let Some(format) = raw.response_format.take()
        && let Some(shape) = of_format(format)?
    {
        found.push(("response_format", shape));
    }
    let structured = raw.structured_outputs.take().unwrap_or_default();
    let schemas = [
        ("guided_json", raw.guided_json.take()),
        ("structured_outputs.json", structured.json),
    ];
    for (param, schema) in schemas {
        if let Some(schema) = schema {
            found.push((param, AnswerShape::Json(read_schema(param, schema.get())?)));
        }
    }
    if structured.json_object == Some(true) {
        found.push(("structured_outputs.json_object", any_object()));
    }
    let texts = [
        ("guided_regex", raw.guided_regex.take(), true),
        ("structured_outputs.regex", structured.regex, true),
        ("guided_grammar", raw.guided_grammar.take(), false),
        ("grammar", raw.grammar.take(), false),
        ("structured_outputs.grammar", structured.grammar, false),
    ];
    for (param, text, is_regex) in texts {
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            continue;
        };
        check_len(param, text.len())?;
        let shape = match is_regex {
            true => AnswerShape::Regex(text),
            false => AnswerShape::Grammar(text),
        };
        found.push((param, shape));
    }
    let choices = [
        ("guided_choice", raw.guided_choice.take()),
        ("structured_outputs.choice", structured.choice),
    ];
    for (param, texts) in choices {
        let Some(texts) = texts else { continue };
        if texts.is_empty() || limits::TEXTS_MAX < texts.len() {
            let expected = format!("1 to {} texts", limits::TEXTS_MAX);
            return Err(out_of_range(
                param,
                format!("a list of {}", texts.len()),
                expected,
            ));
        }
        if let Some(idx) = texts.iter().position(String::is_empty) {
            return Err(out_of_range(format!("{param}[{idx}]"), "empty", "a text"));
        }
        check_len(param, texts.iter().map(String::len).sum())?;
        found.push((param, AnswerShape::Choice(texts)));
    }
    if let [(first, _), (second, _), ..] = &found[..] {
        return Err(RequestError::Conflict {
            param: (*second).into(),
            problem: format!("and `{first}` both say what the answer has to look like"),
        });
    }
    Ok(found.pop())
}

fn of_format(format: RawFormat) -> Result<Option<AnswerShape>, RequestError> {
    match format.kind.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => match format.schema {
            Some(schema) => {
                let schema = read_schema("response_format.schema", schema.get())?;
                Ok(Some(AnswerShape::Json(schema)))
            }
            None => Ok(Some(any_object())),
        },
        Some("json_schema") => {
            let param = "response_format.json_schema.schema";
            let schema = format.json_schema.unwrap_or_default().schema;
            let schema = schema
                .or(format.schema)
                .ok_or_else(|| RequestError::Missing {
                    param: param.into(),
                })?;
            Ok(Some(AnswerShape::Json(read_schema(param, schema.get())?)))
        }
        Some(other) => {
            let what = format!("response format {:?}", raw::shorten(other, 64));
            Err(unsupported("response_format.type", what))
        }
        None => Err(RequestError::Missing {
            param: "response_format.type".into(),
        }),
    }
}

fn any_object() -> AnswerShape {
    AnswerShape::Json(json!({"type": "object"}))
}

/// A schema is an object or a boolean; some clients send it as a string of JSON.
fn read_schema(param: &str, text: &str) -> Result<Value, RequestError> {
    check_len(param, text.len())?;
    let wrong = |problem: String| RequestError::WrongType {
        param: param.into(),
        problem,
    };
    let read = |text: &str| serde_json::from_str::<Value>(text).map_err(|e| wrong(e.to_string()));
    match read(text)? {
        Value::String(inner) => match read(&inner)? {
            schema @ (Value::Object(_) | Value::Bool(_)) => Ok(schema),
            _ => Err(wrong("the text is no JSON Schema".into())),
        },
        schema @ (Value::Object(_) | Value::Bool(_)) => Ok(schema),
        _ => Err(wrong("expected a JSON Schema, which is an object".into())),
    }
}

fn check_len(param: &str, len: usize) -> Result<(), RequestError> {
    if limits::SHAPE_LEN_MAX < len {
        let expected = format!("at most {}", limits::SHAPE_LEN_MAX);
        return Err(out_of_range(param, format!("{len} bytes long"), expected));
    }
    Ok(())
}
