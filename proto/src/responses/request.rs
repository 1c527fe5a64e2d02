//! Requests, put in the words of a chat.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{
    Map, Value, json,
    value::{RawValue, to_raw_value},
};

use super::items::{Item, Turns};
use crate::openai::{ChatCompletionRequest, RequestError, limits, raw};

/// `POST /v1/responses`.
#[derive(Debug, Clone)]
pub struct ResponsesRequest {
    /// The chat that it is.
    pub chat: ChatCompletionRequest,
    /// What the answer says of the request.
    pub echo: Echo,
    /// Members of the body that nothing reads.
    pub ignored: Vec<String>,
}

/// What an answer says of its request.
#[derive(Debug, Clone, Serialize)]
pub struct Echo {
    /// The system's words.
    pub instructions: Option<String>,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// Tokens at most.
    pub max_output_tokens: Option<usize>,
    /// Whether one answer may have several calls.
    pub parallel_tool_calls: bool,
    /// How tokens are chosen.
    pub temperature: f32,
    /// How tokens are chosen.
    pub top_p: f32,
    /// Likeliest tokens reported per position.
    pub top_logprobs: usize,
    /// As in the request.
    pub tool_choice: Box<RawValue>,
    /// As in the request.
    pub tools: Box<RawValue>,
    /// As in the request; thoughts are not summarised.
    pub reasoning: Value,
    /// As in the request.
    pub text: Box<RawValue>,
    /// Always `disabled`: what is too long is refused.
    pub truncation: &'static str,
    /// Always false: nothing is kept.
    pub store: bool,
    /// Always false.
    pub background: bool,
    /// Always null.
    pub previous_response_id: Option<String>,
    /// The client's name for its user.
    pub user: Option<String>,
}

/// Members that mean the same in a chat, extensions included.
const AS_IN_CHATS: [&str; 21] = [
    "model",
    "temperature",
    "top_p",
    "stream",
    "parallel_tool_calls",
    "service_tier",
    "user",
    "user_id",
    "deadline_s",
    "seed",
    "stop",
    "stop_token_ids",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "thinking",
    "enable_thinking",
    "chat_template_kwargs",
];

/// Members that need a memory or services of their own.
const REFUSED: [(&str, &str); 6] = [
    (
        "previous_response_id",
        "going on from an answer that was kept, send its items in `input`: a memory",
    ),
    (
        "conversation",
        "a conversation that is kept, send its items in `input`: a memory",
    ),
    ("background", "an answer that is made in the background"),
    ("prompt", "a prompt that is kept"),
    ("context_management", "compaction of the context"),
    ("moderation", "moderation"),
];

/// Members that are read and change nothing, each harmless: answers are not kept, thoughts are told as
/// they are, and a conversation that is too long is refused.
const IGNORED_ON_PURPOSE: [&str; 9] = [
    "store",
    "truncation",
    "max_tool_calls",
    "stream_options",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "access_programs",
];

/// Members that are read in words of their own.
const OWN: [&str; 10] = [
    "input",
    "instructions",
    "max_output_tokens",
    "top_logprobs",
    "include",
    "reasoning",
    "text",
    "tools",
    "tool_choice",
    "metadata",
];

/// Names of the members of a request that are known.
pub(crate) fn request_fields() -> Vec<&'static str> {
    let refused = REFUSED.map(|(name, _)| name);
    [&OWN[..], &AS_IN_CHATS, &refused, &IGNORED_ON_PURPOSE].concat()
}

/// Notes of a request.
const METADATA_MAX: usize = 16;
/// Characters of a note's name.
const METADATA_KEY_LEN_MAX: usize = 64;
/// Characters of a note.
const METADATA_VALUE_LEN_MAX: usize = 512;

type Members<'a> = BTreeMap<String, &'a RawValue>;

impl ResponsesRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// [`RequestError`] with the field to blame, in this API's words.
    pub fn from_slice(body: &[u8]) -> Result<Self, RequestError> {
        let mut members = raw::parse::<Object<'_>>(body)?.0;
        // Null is absence.
        members.retain(|_, value| value.get() != "null");
        for (param, what) in REFUSED {
            let asks = members
                .get(param)
                .is_some_and(|v| !matches!(v.get(), "false" | "[]"));
            if asks {
                return Err(unsupported(param, what));
            }
        }
        let mut chat: BTreeMap<&str, Box<RawValue>> = BTreeMap::new();
        for name in AS_IN_CHATS {
            if let Some(value) = members.get(name) {
                chat.insert(name, (*value).to_owned());
            }
        }
        if let Some(max) = members.get("max_output_tokens") {
            chat.insert("max_tokens", (*max).to_owned());
        }
        // What becomes a tree in memory, many times its length, for a moment.
        for (param, len_max) in [
            ("tools", limits::TOOLS_LEN_MAX),
            ("tool_choice", limits::TOOL_LEN_MAX),
            ("text", limits::SHAPE_LEN_MAX),
        ] {
            let len = members.get(param).map_or(0, |value| value.get().len());
            if len_max < len {
                return Err(RequestError::OutOfRange {
                    param: param.to_owned(),
                    found: format!("{len} bytes long"),
                    expected: format!("at most {len_max}"),
                });
            }
        }
        let top_logprobs: Option<u64> = member(&members, "top_logprobs")?;
        let include: Vec<String> = member(&members, "include")?.unwrap_or_default();
        if include
            .iter()
            .any(|what| what == "message.output_text.logprobs")
        {
            set(&mut chat, "logprobs", &true);
            set(&mut chat, "top_logprobs", &top_logprobs.unwrap_or(0));
        }
        let reasoning: Reasoning = member(&members, "reasoning")?.unwrap_or_default();
        if let Some(effort) = &reasoning.effort {
            set(&mut chat, "reasoning_effort", effort);
        }
        let text: Text = member(&members, "text")?.unwrap_or_default();
        if let Some(format) = &text.format {
            set(&mut chat, "response_format", &format.of_chat());
        }
        let tools: Vec<Tool> = member(&members, "tools")?.unwrap_or_default();
        if !tools.is_empty() {
            let tools: Vec<Value> = tools
                .iter()
                .enumerate()
                .map(|(idx, tool)| tool.of_chat(idx))
                .collect::<Result<_, _>>()?;
            set(&mut chat, "tools", &tools);
        }
        let choice: Option<Choice> = member(&members, "tool_choice")?;
        if let Some(choice) = &choice {
            set(&mut chat, "tool_choice", &choice.of_chat()?);
        }
        let instructions: Option<String> = member(&members, "instructions")?;
        let input = members.get("input").ok_or_else(|| missing("input"))?.get();
        let mut turns = Turns::default();
        if let Some(instructions) = &instructions {
            turns.push(None, json!({"role": "system", "content": instructions}));
        }
        match input.as_bytes().first() {
            Some(b'"') => {
                let text: String = raw::read("input", input)?;
                turns.push(None, json!({"role": "user", "content": text}));
            }
            Some(b'[') => {
                let items: Vec<Item> = raw::read("input", input)?;
                for (idx, item) in items.into_iter().enumerate() {
                    turns.item(idx, item)?;
                }
            }
            _ => {
                return Err(RequestError::WrongType {
                    param: "input".to_owned(),
                    problem: "expected a string or a list of items".to_owned(),
                });
            }
        }
        turns.close();
        set(&mut chat, "messages", &turns.messages);
        let metadata = metadata(&members)?;
        let body = serde_json::to_vec(&chat).map_err(|e| RequestError::Json {
            problem: e.to_string(),
        })?;
        let mut chat = ChatCompletionRequest::from_slice(&body).map_err(|e| turns.own_words(e))?;
        if let Some((param, _)) = &mut chat.options.shape {
            *param = "text.format";
        }
        let echo = Echo {
            instructions,
            metadata,
            max_output_tokens: chat.options.max_tokens,
            parallel_tool_calls: chat.parallel_tool_calls,
            temperature: chat.options.temperature,
            top_p: chat.options.top_p,
            top_logprobs: chat.options.top_logprobs.unwrap_or(0),
            tool_choice: as_sent(&members, "tool_choice", "\"auto\"")?,
            tools: as_sent(&members, "tools", "[]")?,
            reasoning: json!({"effort": reasoning.effort, "summary": null}),
            text: as_sent(&members, "text", r#"{"format":{"type":"text"}}"#)?,
            truncation: "disabled",
            store: false,
            background: false,
            previous_response_id: None,
            user: chat.options.user.clone(),
        };
        let known = request_fields();
        let ignored = members
            .keys()
            .filter(|name| !known.contains(&name.as_str()));
        let ignored = ignored.take(limits::UNKNOWN_FIELDS_MAX);
        Ok(Self {
            chat,
            echo,
            ignored: ignored.map(|name| raw::shorten(name, 64)).collect(),
        })
    }
}

/// Members of an object, unread.
#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct Object<'a>(#[serde(borrow)] Members<'a>);

fn member<'a, T: Deserialize<'a>>(
    members: &Members<'a>,
    param: &str,
) -> Result<Option<T>, RequestError> {
    let value = members.get(param);
    value.map(|value| raw::read(param, value.get())).transpose()
}

/// A member as it came, or what its absence means.
fn as_sent(
    members: &Members<'_>,
    param: &str,
    default: &str,
) -> Result<Box<RawValue>, RequestError> {
    match members.get(param) {
        Some(value) => Ok((*value).to_owned()),
        None => raw::read(param, default),
    }
}

fn set(chat: &mut BTreeMap<&str, Box<RawValue>>, name: &'static str, value: &impl Serialize) {
    // Only a map with keys that are no strings cannot be written; none has one.
    if let Ok(value) = to_raw_value(value) {
        chat.insert(name, value);
    }
}

pub(super) fn missing(param: impl Into<String>) -> RequestError {
    RequestError::Missing {
        param: param.into(),
    }
}

fn unsupported(param: impl Into<String>, what: impl Into<String>) -> RequestError {
    RequestError::Unsupported {
        param: param.into(),
        what: what.into(),
    }
}

pub(super) fn of_type(param: String, what: &str, kind: &str) -> RequestError {
    unsupported(
        param,
        format!("{what} of type {:?}", raw::shorten(kind, 64)),
    )
}

fn metadata(members: &Members<'_>) -> Result<BTreeMap<String, String>, RequestError> {
    let notes: BTreeMap<String, String> = member(members, "metadata")?.unwrap_or_default();
    let is_long = |(key, value): (&String, &String)| {
        METADATA_KEY_LEN_MAX < key.chars().count() || METADATA_VALUE_LEN_MAX < value.chars().count()
    };
    if METADATA_MAX < notes.len() || notes.iter().any(is_long) {
        return Err(RequestError::OutOfRange {
            param: "metadata".to_owned(),
            found: format!("{} notes, or long ones", notes.len()),
            expected: format!(
                "at most {METADATA_MAX} of {METADATA_KEY_LEN_MAX} and {METADATA_VALUE_LEN_MAX} characters"
            ),
        });
    }
    Ok(notes)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
struct Reasoning {
    effort: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
struct Text {
    format: Option<Format>,
}

/// `text.format`, as it came.
#[derive(Debug, Deserialize)]
struct Format(Map<String, Value>);

impl Format {
    fn of_chat(&self) -> Value {
        let kind = self.0.get("type").cloned().unwrap_or_default();
        match self.0.get("schema") {
            Some(schema) => json!({"type": kind, "json_schema": {"schema": schema}}),
            None => json!({"type": kind}),
        }
    }
}

/// A tool, as it came.
#[derive(Debug, Deserialize)]
struct Tool(Map<String, Value>);

impl Tool {
    fn of_chat(&self, idx: usize) -> Result<Value, RequestError> {
        let param = format!("tools[{idx}].type");
        match self.0.get("type").and_then(Value::as_str) {
            Some("function") => {}
            Some(other) => return Err(of_type(param, "a tool", other)),
            None => return Err(missing(param)),
        }
        let mut function = Map::new();
        for name in ["name", "description", "parameters", "strict"] {
            if let Some(value) = self.0.get(name) {
                function.insert(name.to_owned(), value.clone());
            }
        }
        Ok(json!({"type": "function", "function": function}))
    }
}

/// `tool_choice`, as it came.
#[derive(Debug, Deserialize)]
struct Choice(Value);

impl Choice {
    fn of_chat(&self) -> Result<Value, RequestError> {
        let Value::Object(choice) = &self.0 else {
            return Ok(self.0.clone());
        };
        let param = "tool_choice.type";
        match choice.get("type").and_then(Value::as_str) {
            Some("function") => {
                let name = choice
                    .get("name")
                    .ok_or_else(|| missing("tool_choice.name"))?;
                Ok(json!({"type": "function", "function": {"name": name}}))
            }
            Some(other) => Err(of_type(param.to_owned(), "a choice", other)),
            None => Err(missing(param)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::{AnswerShape, Role, ToolChoice};

    fn read(fields: &str) -> Result<ResponsesRequest, RequestError> {
        ResponsesRequest::from_slice(format!("{{{fields}}}").as_bytes())
    }

    #[test]
    fn items_are_put_in_the_words_of_a_chat() {
        let request = read(
            r#""model": "m", "instructions": "be", "max_output_tokens": 9, "temperature": 0.5, "store": true, "what": 1,
            "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"k": "v"}, "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "n", "strict": true, "schema": {"type": "object"}}, "verbosity": "low"},
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true}],
            "include": ["reasoning.encrypted_content", "message.output_text.logprobs"], "parallel_tool_calls": false, "truncation": "auto",
            "input": [
                {"role": "user", "content": "a"},
                {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
                {"type": "message", "role": "assistant", "id": "x", "status": "completed", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "r"},
                {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "s"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "c"}]}]"#,
        )
        .unwrap();
        let chat = &request.chat;
        let roles: Vec<Role> = chat.messages.iter().map(|m| m.role).collect();
        let (system, user, assistant, tool) =
            (Role::System, Role::User, Role::Assistant, Role::Tool);
        assert_eq!(roles, [system, user, assistant, tool, tool, user]);
        let turn = &chat.messages[2];
        assert_eq!(turn.reasoning_content.as_deref(), Some("t"));
        assert_eq!(
            (&turn.content[..], turn.tool_calls.len()),
            (&["b".to_owned()][..], 2)
        );
        assert_eq!(chat.tool_choice, ToolChoice::Named("f".to_owned()));
        assert!(chat.tools[0].strict && !chat.parallel_tool_calls);
        assert_eq!(chat.options.max_tokens, Some(9));
        assert_eq!(chat.options.top_logprobs, Some(0));
        let schema = AnswerShape::Json(json!({"type": "object"}));
        assert_eq!(chat.options.shape, Some(("text.format", schema)));
        assert_eq!(request.ignored, ["what"]);
        assert_eq!(request.echo.metadata["k"], "v");
        assert!(request.echo.tools.get().contains("\"f\""));
        assert!(!request.echo.store);
    }

    #[test]
    fn errors_name_the_field_of_this_api() {
        let user = r#"{"role": "user", "content": "a"}"#;
        for (fields, param) in [
            (String::new(), "input"),
            (r#""input": []"#.to_owned(), "input"),
            (r#""input": 5"#.to_owned(), "input"),
            (
                r#""input": "a", "max_output_tokens": 0"#.to_owned(),
                "max_output_tokens",
            ),
            (
                r#""input": "a", "max_output_tokens": "x""#.to_owned(),
                "max_output_tokens",
            ),
            (
                r#""input": "a", "temperature": 9"#.to_owned(),
                "temperature",
            ),
            (
                r#""input": "a", "previous_response_id": "resp-1""#.to_owned(),
                "previous_response_id",
            ),
            (
                r#""input": "a", "conversation": {"id": "c"}"#.to_owned(),
                "conversation",
            ),
            (
                r#""input": "a", "background": true"#.to_owned(),
                "background",
            ),
            (
                r#""input": "a", "prompt": {"id": "p"}"#.to_owned(),
                "prompt",
            ),
            (
                r#""input": "a", "reasoning": {"effort": "much"}"#.to_owned(),
                "reasoning.effort",
            ),
            (
                r#""input": "a", "reasoning": {"effort": 5}"#.to_owned(),
                "reasoning.effort",
            ),
            (
                r#""input": "a", "text": {"format": {"type": "xml"}}"#.to_owned(),
                "text.format.type",
            ),
            (
                r#""input": "a", "text": {"format": {"type": "json_schema"}}"#.to_owned(),
                "text.format.schema",
            ),
            (
                r#""input": "a", "tools": [{"type": "web_search"}]"#.to_owned(),
                "tools[0].type",
            ),
            (
                r#""input": "a", "tools": [{"type": "function"}]"#.to_owned(),
                "tools[0].name",
            ),
            (
                r#""input": "a", "tool_choice": "required""#.to_owned(),
                "tool_choice",
            ),
            (
                r#""input": "a", "tool_choice": {"type": "mcp"}"#.to_owned(),
                "tool_choice.type",
            ),
            (
                r#""input": "a", "metadata": {"k": 5}"#.to_owned(),
                "metadata.k",
            ),
            (
                format!(r#""input": [{user}, {{"role": "king", "content": "a"}}]"#),
                "input[1].role",
            ),
            (
                format!(r#""input": [{user}, {{"type": "item_reference", "id": "x"}}]"#),
                "input[1].type",
            ),
            (
                format!(
                    r#""input": [{user}, {{"role": "user", "content": [{{"type": "input_image"}}]}}]"#
                ),
                "input[1].content[0].type",
            ),
            (
                format!(
                    r#""instructions": "i", "input": [{user}, {{"type": "function_call_output", "call_id": "9", "output": ""}}]"#
                ),
                "input[1].call_id",
            ),
            (
                format!(r#""input": [{user}, {{"role": "assistant", "content": "b"}}]"#),
                "input",
            ),
        ] {
            let error = read(&fields).expect_err(&fields);
            let found = error.param().unwrap_or_default();
            assert!(
                found == param || param == "input" && found.starts_with("input"),
                "{fields}: {error}"
            );
        }
    }
}
