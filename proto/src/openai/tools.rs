//! Tools of a chat: what a request offers, which calls it wants, and calls in messages.

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, MapAccess, Visitor},
};
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    error::RequestError,
    raw::{self, Presence},
    request::{limits, out_of_range, unsupported},
};

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// 1 to [`limits::TOOL_NAME_LEN_MAX`] of `a-z`, `A-Z`, `0-9`, `-` and `_`.
    pub name: String,
    /// JSON Schema of its arguments, an object; empty: any.
    pub parameters: Map<String, Value>,
    /// Whether the arguments have to follow the schema.
    pub strict: bool,
    /// The tool as the client wrote it, for the template.
    pub source: Value,
}

/// Which calls the answer has to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// None: tools are not offered.
    None,
    /// The model decides.
    #[default]
    Auto,
    /// One at least, of any tool.
    Required,
    /// Of this tool.
    Named(String),
}

/// A call that the assistant made earlier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The client's or our name for it.
    pub id: String,
    /// Of the function.
    pub name: String,
    /// JSON, as it was written.
    pub arguments: String,
}

impl ToolCall {
    /// The call as templates see it.
    pub fn to_value(&self) -> Value {
        json!({
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        })
    }
}

/// A call in an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCallReply {
    /// `call_..`, unique in the conversation.
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is called.
    pub function: FunctionReply,
}

/// The function of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionReply {
    /// Of the tool.
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

/// What is new of a call in a streamed answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCallDelta {
    /// Which of the answer's calls, from 0.
    pub index: usize,
    /// In a call's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// In a call's first chunk: `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// New text.
    pub function: FunctionDelta,
}

/// What is new of a call's function.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionDelta {
    /// In a call's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// New text of the arguments.
    pub arguments: String,
}

/// `tool_calls` of a message.
#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawToolCall {
    id: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    function: Option<RawFunction>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
struct RawFunction {
    name: Option<String>,
    arguments: Option<String>,
}

/// `tool_choice`: a word or an object.
#[derive(Debug)]
pub(super) enum RawToolChoice {
    Word(String),
    Named {
        kind: Option<String>,
        name: Option<String>,
    },
}

impl<'de> Deserialize<'de> for RawToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoiceVisitor;
        impl<'de> Visitor<'de> for ChoiceVisitor {
            type Value = RawToolChoice;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or an object")
            }
            fn visit_str<E: Error>(self, word: &str) -> Result<Self::Value, E> {
                Ok(RawToolChoice::Word(word.to_owned()))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut kind, mut name) = (None, None);
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "type" => kind = map.next_value()?,
                        "function" => {
                            name = map
                                .next_value::<Option<RawFunction>>()?
                                .and_then(|f| f.name);
                        }
                        _ => {
                            map.next_value::<serde::de::IgnoredAny>()?;
                        }
                    }
                }
                Ok(RawToolChoice::Named { kind, name })
            }
        }
        deserializer.deserialize_any(ChoiceVisitor)
    }
}

/// Checks `tools`.
pub(super) fn tools(raw: Option<Vec<Box<RawValue>>>) -> Result<Vec<Tool>, RequestError> {
    let raw = raw.unwrap_or_default();
    if limits::TOOLS_MAX < raw.len() {
        let expected = format!("at most {}", limits::TOOLS_MAX);
        let found = format!("a list of {}", raw.len());
        return Err(out_of_range("tools", found, expected));
    }
    let len: usize = raw.iter().map(|tool| tool.get().len()).sum();
    if limits::TOOLS_LEN_MAX < len {
        let expected = format!("at most {}", limits::TOOLS_LEN_MAX);
        return Err(out_of_range("tools", format!("{len} bytes long"), expected));
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(raw.len());
    for (idx, raw) in raw.iter().enumerate() {
        let tool = tool(idx, raw.get())?;
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(RequestError::Conflict {
                param: format!("tools[{idx}].function.name"),
                problem: format!("is {:?}, as of a tool before it", tool.name),
            });
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(idx: usize, text: &str) -> Result<Tool, RequestError> {
    let path = |field: &str| format!("tools[{idx}]{field}");
    if limits::TOOL_LEN_MAX < text.len() {
        let expected = format!("at most {}", limits::TOOL_LEN_MAX);
        let found = format!("{} bytes long", text.len());
        return Err(out_of_range(path(""), found, expected));
    }
    let wrong = |field: &str, found: &Value, expected: &str| RequestError::WrongType {
        param: path(field),
        problem: format!("invalid type: {}, expected {expected}", kind_of(found)),
    };
    let source: Value = serde_json::from_str(text).map_err(|e| RequestError::Json {
        problem: e.to_string(),
    })?;
    let Some(fields) = source.as_object() else {
        return Err(wrong("", &source, "an object"));
    };
    match fields.get("type") {
        None | Some(Value::Null) => {
            return Err(RequestError::Missing {
                param: path(".type"),
            });
        }
        Some(Value::String(kind)) if kind == "function" => {}
        Some(Value::String(kind)) => {
            let what = format!("a tool of type {:?}", raw::shorten(kind, 64));
            return Err(unsupported(path(".type"), what));
        }
        Some(other) => return Err(wrong(".type", other, "a string")),
    }
    let function = match fields.get("function") {
        None | Some(Value::Null) => {
            return Err(RequestError::Missing {
                param: path(".function"),
            });
        }
        Some(Value::Object(function)) => function,
        Some(other) => return Err(wrong(".function", other, "an object")),
    };
    let name = match function.get("name") {
        None | Some(Value::Null) => {
            return Err(RequestError::Missing {
                param: path(".function.name"),
            });
        }
        Some(Value::String(name)) => tool_name(path(".function.name"), name)?,
        Some(other) => return Err(wrong(".function.name", other, "a string")),
    };
    match function.get("description") {
        None | Some(Value::Null | Value::String(_)) => {}
        Some(other) => return Err(wrong(".function.description", other, "a string")),
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(schema)) => schema.clone(),
        Some(other) => return Err(wrong(".function.parameters", other, "an object")),
    };
    let strict = match function.get("strict") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(strict)) => *strict,
        Some(other) => return Err(wrong(".function.strict", other, "a boolean")),
    };
    Ok(Tool {
        name,
        parameters,
        strict,
        source,
    })
}

/// A name of which no template can make anything else.
fn tool_name(param: String, name: &str) -> Result<String, RequestError> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.is_empty() || limits::TOOL_NAME_LEN_MAX < name.len() || !name.bytes().all(is_allowed) {
        let found = format!("{:?}", raw::shorten(name, 64));
        let expected = format!(
            "1 to {} of letters a-z and A-Z, digits, `-` and `_`",
            limits::TOOL_NAME_LEN_MAX
        );
        return Err(out_of_range(param, found, expected));
    }
    Ok(name.to_owned())
}

/// Checks `tool_choice` against the tools that are offered.
pub(super) fn tool_choice(
    raw: Option<RawToolChoice>,
    tools: &[Tool],
) -> Result<ToolChoice, RequestError> {
    let param = "tool_choice";
    let choice = match raw {
        None => return Ok(ToolChoice::default()),
        Some(RawToolChoice::Word(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            other => {
                let found = format!("{:?}", raw::shorten(other, 64));
                let expected = "`none`, `auto`, `required` or an object with a function's name";
                return Err(out_of_range(param, found, expected));
            }
        },
        Some(RawToolChoice::Named { kind, name }) => match (kind.as_deref(), name) {
            (Some("function"), Some(name)) => ToolChoice::Named(name),
            (Some("function"), None) => {
                return Err(RequestError::Missing {
                    param: "tool_choice.function.name".into(),
                });
            }
            (Some(other), _) => {
                let what = format!("a choice of type {:?}", raw::shorten(other, 64));
                return Err(unsupported("tool_choice.type", what));
            }
            (None, _) => {
                return Err(RequestError::Missing {
                    param: "tool_choice.type".into(),
                });
            }
        },
    };
    match &choice {
        ToolChoice::Named(name) if tools.iter().all(|tool| tool.name != *name) => {
            Err(RequestError::Conflict {
                param: "tool_choice.function.name".into(),
                problem: format!("{:?} is none of the `tools`", raw::shorten(name, 64)),
            })
        }
        ToolChoice::Required if tools.is_empty() => Err(RequestError::Conflict {
            param: param.into(),
            problem: "`required` needs `tools`".into(),
        }),
        _ => Ok(choice),
    }
}

/// Checks `tool_calls` of a message of the assistant.
pub(super) fn tool_calls(path: &str, raw: Vec<RawToolCall>) -> Result<Vec<ToolCall>, RequestError> {
    if limits::TOOL_CALLS_MAX < raw.len() {
        let expected = format!("at most {}", limits::TOOL_CALLS_MAX);
        return Err(out_of_range(
            path,
            format!("a list of {}", raw.len()),
            expected,
        ));
    }
    let call = |(idx, raw): (usize, RawToolCall)| {
        let path = |field: &str| format!("{path}[{idx}].{field}");
        let missing = |field: &str| RequestError::Missing { param: path(field) };
        match raw.kind.as_deref() {
            None | Some("function") => {}
            Some(other) => {
                let what = format!("a call of type {:?}", raw::shorten(other, 64));
                return Err(unsupported(path("type"), what));
            }
        }
        let function = raw.function.ok_or_else(|| missing("function"))?;
        let name = function.name.ok_or_else(|| missing("function.name"))?;
        let arguments = function.arguments;
        Ok(ToolCall {
            id: raw.id.ok_or_else(|| missing("id"))?,
            name: tool_name(path("function.name"), &name)?,
            arguments: arguments.ok_or_else(|| missing("function.arguments"))?,
        })
    };
    raw.into_iter().enumerate().map(call).collect()
}

/// Refuses the form that came before tools, by the modern names.
pub(super) fn refuse_functions(functions: Presence, choice: Presence) -> Result<(), RequestError> {
    let refused = [
        (functions, "functions", "tools"),
        (choice, "function_call", "tool_choice"),
    ];
    let found = refused
        .into_iter()
        .find(|(presence, ..)| *presence == Presence::Something);
    match found {
        None => Ok(()),
        Some((_, old, new)) => Err(RequestError::Unsupported {
            param: old.into(),
            what: format!("the form before `{new}`, which says the same,"),
        }),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
