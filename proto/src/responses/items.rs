//! Items of a conversation, put in the words of a chat's messages, and errors of those in the words of
//! the items.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::request::{missing, of_type};
use crate::openai::{
    RequestError,
    raw::{self, TextOrParts},
};

/// Of every kind.
#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct Item {
    #[serde(rename = "type")]
    kind: Option<String>,
    role: Option<String>,
    content: Option<Content>,
    summary: Option<Vec<Part>>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    output: Option<Content>,
}

type Content = TextOrParts<Part>;

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
    refusal: Option<String>,
}

fn text(content: Content, path: &str) -> Result<String, RequestError> {
    match content {
        Content::Text(text) => Ok(text),
        Content::Parts(parts) => texts(parts, path),
    }
}

fn texts(parts: Vec<Part>, path: &str) -> Result<String, RequestError> {
    let mut all = String::new();
    for (idx, part) in parts.into_iter().enumerate() {
        let path = |field: &str| format!("{path}[{idx}].{field}");
        all += &match part.kind.as_deref() {
            Some("input_text" | "output_text" | "text" | "summary_text" | "reasoning_text") => {
                part.text.ok_or_else(|| missing(path("text")))?
            }
            Some("refusal") => part.refusal.ok_or_else(|| missing(path("refusal")))?,
            Some(other) => return Err(of_type(path("type"), "content", other)),
            None => return Err(missing(path("type"))),
        };
    }
    Ok(all)
}

/// The conversation as messages of a chat. Thoughts, a text and calls that follow each other are one
/// turn of the assistant.
#[derive(Debug, Default)]
pub(super) struct Turns {
    pub(super) messages: Vec<Value>,
    /// Of each message: the item that it, or its first part, came from.
    origins: Vec<Option<usize>>,
    open: Option<(usize, Map<String, Value>)>,
}

impl Turns {
    pub(super) fn push(&mut self, origin: Option<usize>, message: Value) {
        self.close();
        self.messages.push(message);
        self.origins.push(origin);
    }

    /// Ends the assistant's turn. Thoughts alone are no turn.
    pub(super) fn close(&mut self) {
        if let Some((origin, turn)) = self.open.take()
            && (turn.contains_key("content") || turn.contains_key("tool_calls"))
        {
            self.messages.push(turn.into());
            self.origins.push(Some(origin));
        }
    }

    /// The assistant's turn, a new one where the one that is open has something of `fields`.
    fn turn(&mut self, idx: usize, fields: &[&str]) -> &mut Map<String, Value> {
        let has_some = |turn: &Map<_, _>| fields.iter().any(|field| turn.contains_key(*field));
        if self.open.as_ref().is_some_and(|(_, turn)| has_some(turn)) {
            self.close();
        }
        let new = || {
            let role = ("role".to_owned(), json!("assistant"));
            (idx, Map::from_iter([role]))
        };
        &mut self.open.get_or_insert_with(new).1
    }

    pub(super) fn item(&mut self, idx: usize, item: Item) -> Result<(), RequestError> {
        let path = |field: &str| format!("input[{idx}].{field}");
        match item.kind.as_deref() {
            None | Some("message") => {
                let role = item.role.ok_or_else(|| missing(path("role")))?;
                let content = item.content.ok_or_else(|| missing(path("content")))?;
                let content = text(content, &path("content"))?;
                match role.as_str() {
                    "assistant" => {
                        let turn = self.turn(idx, &["content", "tool_calls"]);
                        turn.insert("content".to_owned(), content.into());
                    }
                    "user" | "system" | "developer" => {
                        self.push(Some(idx), json!({"role": role, "content": content}));
                    }
                    other => {
                        return Err(RequestError::OutOfRange {
                            param: path("role"),
                            found: format!("{:?}", raw::shorten(other, 64)),
                            expected: "`user`, `system`, `developer` or `assistant`".to_owned(),
                        });
                    }
                }
            }
            Some("reasoning") => {
                let text = match item.content {
                    Some(content) => text(content, &path("content"))?,
                    None => texts(item.summary.unwrap_or_default(), &path("summary"))?,
                };
                // What was encrypted elsewhere, nobody here can read.
                if !text.is_empty() {
                    let fields = ["content", "tool_calls", "reasoning_content"];
                    let turn = self.turn(idx, &fields);
                    turn.insert("reasoning_content".to_owned(), text.into());
                }
            }
            Some("function_call") => {
                let id = item.call_id.ok_or_else(|| missing(path("call_id")))?;
                let name = item.name.ok_or_else(|| missing(path("name")))?;
                let arguments = item.arguments.ok_or_else(|| missing(path("arguments")))?;
                let function = json!({"name": name, "arguments": arguments});
                let call = json!({"id": id, "type": "function", "function": function});
                let calls = self.turn(idx, &[]).entry("tool_calls").or_insert(json!([]));
                if let Value::Array(calls) = calls {
                    calls.push(call);
                }
            }
            Some("function_call_output") => {
                let id = item.call_id.ok_or_else(|| missing(path("call_id")))?;
                let output = item.output.ok_or_else(|| missing(path("output")))?;
                let output = text(output, &path("output"))?;
                let message = json!({"role": "tool", "tool_call_id": id, "content": output});
                self.push(Some(idx), message);
            }
            Some(other) => return Err(of_type(path("type"), "an item", other)),
        }
        Ok(())
    }

    /// A chat's error, its field in this API's words.
    pub(super) fn own_words(&self, mut error: RequestError) -> RequestError {
        let (RequestError::WrongType { param, .. }
        | RequestError::Missing { param }
        | RequestError::OutOfRange { param, .. }
        | RequestError::Conflict { param, .. }
        | RequestError::Unsupported { param, .. }) = &mut error
        else {
            return error;
        };
        *param = self.own_name(param);
        error
    }

    fn own_name(&self, param: &str) -> String {
        if let Some(rest) = param.strip_prefix("messages") {
            let item = rest.strip_prefix('[').and_then(|rest| {
                let (idx, field) = rest.split_once(']')?;
                Some((self.origins.get(idx.parse::<usize>().ok()?)?, field))
            });
            let field_of = |field: &str| match field {
                // Several of them share a message.
                field if field.starts_with(".tool_calls") => String::new(),
                ".tool_call_id" => ".call_id".to_owned(),
                other => other.to_owned(),
            };
            return match item {
                Some((Some(idx), field)) => format!("input[{idx}]{}", field_of(field)),
                Some((None, _)) | None => "input".to_owned(),
            };
        }
        let own = [
            ("max_tokens", "max_output_tokens"),
            ("reasoning_effort", "reasoning.effort"),
            ("response_format.json_schema", "text.format"),
            ("response_format", "text.format"),
            ("tool_choice.function", "tool_choice"),
        ];
        for (theirs, ours) in own {
            if let Some(rest) = param.strip_prefix(theirs) {
                return format!("{ours}{rest}");
            }
        }
        match param.starts_with("tools[") {
            true => param.replacen(".function", "", 1),
            false => param.to_owned(),
        }
    }
}
