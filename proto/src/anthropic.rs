//! Anthropic's Messages API, as far as a model of text can have it: requests, put in the words of
//! [`crate::openai`], and answers.
//!
//! Invariant: what a request value holds went through the same checks as a chat's.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::openai::{
    ChatCompletionRequest, RequestError,
    raw::{self, TextOrParts},
};

/// `POST /v1/messages`.
#[derive(Debug, Clone, PartialEq)]
pub struct MessagesRequest(pub ChatCompletionRequest);

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct Raw {
    model: Option<Value>,
    max_tokens: Option<Value>,
    messages: Option<Vec<RawMessage>>,
    system: Option<Content>,
    stream: Option<Value>,
    temperature: Option<Value>,
    top_p: Option<Value>,
    top_k: Option<Value>,
    stop_sequences: Option<Value>,
    tools: Option<Vec<RawTool>>,
    tool_choice: Option<RawChoice>,
    thinking: Option<Value>,
    metadata: Option<Metadata>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct Metadata {
    user_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct RawMessage {
    role: Option<String>,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct RawTool {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: Option<Value>,
    description: Option<Value>,
    input_schema: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct RawChoice {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

/// Text, or blocks.
type Content = TextOrParts<Block>;

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
struct Block {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
    thinking: Option<String>,
    id: Option<String>,
    name: Option<String>,
    input: Option<Value>,
    tool_use_id: Option<String>,
    content: Option<Content>,
}

impl MessagesRequest {
    /// Reads and checks a body. `needs_max_tokens`: it is refused without, as Anthropic does.
    ///
    /// # Errors
    /// [`RequestError`] with the field to blame.
    pub fn from_slice(body: &[u8], needs_max_tokens: bool) -> Result<Self, RequestError> {
        let raw: Raw = raw::parse(body)?;
        if raw.max_tokens.is_none() && needs_max_tokens {
            return Err(missing("max_tokens"));
        }
        let mut chat = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                chat.insert(name.to_owned(), value);
            }
        };
        set("model", raw.model);
        set("max_tokens", raw.max_tokens);
        set("temperature", raw.temperature);
        set("top_p", raw.top_p);
        set("top_k", raw.top_k);
        set("stop", raw.stop_sequences);
        set("stream", raw.stream);
        set("thinking", raw.thinking);
        // Theirs may hold anything; ours is of fewer characters.
        set(
            "user",
            raw.metadata.and_then(|m| m.user_id).map(Value::from),
        );
        set("tools", raw.tools.map(tools).transpose()?);
        if let Some(choice) = raw.tool_choice {
            let parallel = choice.disable_parallel_tool_use.map(|no| Value::from(!no));
            set("parallel_tool_calls", parallel);
            set("tool_choice", Some(tool_choice(choice)?));
        }
        let mut messages = Vec::new();
        if let Some(system) = raw.system {
            messages.push(json!({"role": "system", "content": texts("system", system)?}));
        }
        let given = raw.messages.ok_or_else(|| missing("messages"))?;
        for (idx, message) in given.into_iter().enumerate() {
            turn(idx, message, &mut messages)?;
        }
        let ends_with_assistant = messages.last().is_some_and(|m| m["role"] == "assistant");
        set(
            "continue_final_message",
            Some(Value::from(ends_with_assistant)),
        );
        set("messages", Some(Value::from(messages)));
        let body = serde_json::to_vec(&chat).map_err(|e| RequestError::Json {
            problem: e.to_string(),
        })?;
        ChatCompletionRequest::from_slice(&body).map(Self)
    }
}

/// Names of the members of a request that are read.
#[cfg(test)]
pub(crate) fn request_fields() -> &'static [&'static str] {
    raw::fields_of::<Raw>()
}

fn missing(param: impl Into<String>) -> RequestError {
    RequestError::Missing {
        param: param.into(),
    }
}

fn unsupported(param: String, what: &str, kind: &str) -> RequestError {
    let kind: String = kind.chars().take(64).collect();
    RequestError::Unsupported {
        param,
        what: format!("{what} of type {kind:?}"),
    }
}

/// One turn, in as many messages as it takes: results of calls are messages of their own.
fn turn(idx: usize, message: RawMessage, messages: &mut Vec<Value>) -> Result<(), RequestError> {
    let path = |field: &str| format!("messages[{idx}].{field}");
    let role = message.role.ok_or_else(|| missing(path("role")))?;
    let content = message.content.ok_or_else(|| missing(path("content")))?;
    if role != "user" && role != "assistant" {
        return Err(RequestError::OutOfRange {
            param: path("role"),
            found: format!("{:?}", role.chars().take(64).collect::<String>()),
            expected: "`user` or `assistant`".to_owned(),
        });
    }
    let blocks = match content {
        Content::Text(text) => {
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Content::Parts(blocks) => blocks,
    };
    let (mut text, mut thoughts, mut calls) = (Vec::new(), String::new(), Vec::new());
    for (at, block) in blocks.into_iter().enumerate() {
        let path = |field: &str| path(&format!("content[{at}].{field}"));
        let kind = block.kind.as_deref().ok_or_else(|| missing(path("type")))?;
        match (kind, role.as_str()) {
            ("text", _) => text.push(block.text.ok_or_else(|| missing(path("text")))?),
            ("thinking", "assistant") => thoughts += &block.thinking.unwrap_or_default(),
            // Nobody here can read them.
            ("redacted_thinking", "assistant") => {}
            ("tool_use", "assistant") => {
                let id = block.id.ok_or_else(|| missing(path("id")))?;
                let name = block.name.ok_or_else(|| missing(path("name")))?;
                let input = block.input.unwrap_or_else(|| json!({}));
                let function = json!({"name": name, "arguments": input.to_string()});
                calls.push(json!({"id": id, "type": "function", "function": function}));
            }
            ("tool_result", "user") => {
                let id = block
                    .tool_use_id
                    .ok_or_else(|| missing(path("tool_use_id")))?;
                let result = match block.content {
                    Some(content) => texts(&path("content"), content)?,
                    None => Value::from(""),
                };
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": result}));
            }
            (other, _) => return Err(unsupported(path("type"), "content", other)),
        }
    }
    if role == "user" && text.is_empty() {
        return Ok(());
    }
    let mut message = json!({"role": role, "content": text.concat()});
    if text.is_empty() {
        message["content"] = Value::Null;
    }
    if !thoughts.is_empty() {
        message["reasoning_content"] = Value::from(thoughts);
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::from(calls);
    }
    messages.push(message);
    Ok(())
}

/// Content that may hold text only.
fn texts(path: &str, content: Content) -> Result<Value, RequestError> {
    let blocks = match content {
        Content::Text(text) => return Ok(Value::from(text)),
        Content::Parts(blocks) => blocks,
    };
    let mut all = String::new();
    for (at, block) in blocks.into_iter().enumerate() {
        match (block.kind.as_deref(), block.text) {
            (Some("text"), Some(text)) => all += &text,
            (Some("text"), None) => return Err(missing(format!("{path}[{at}].text"))),
            (Some(other), _) => {
                return Err(unsupported(format!("{path}[{at}].type"), "content", other));
            }
            (None, _) => return Err(missing(format!("{path}[{at}].type"))),
        }
    }
    Ok(Value::from(all))
}

fn tools(raw: Vec<RawTool>) -> Result<Value, RequestError> {
    let mut tools = Vec::with_capacity(raw.len());
    for (idx, tool) in raw.into_iter().enumerate() {
        match tool.kind.as_deref() {
            None | Some("custom") => {}
            Some(other) => return Err(unsupported(format!("tools[{idx}].type"), "a tool", other)),
        }
        let mut function = Map::new();
        let name = tool
            .name
            .ok_or_else(|| missing(format!("tools[{idx}].name")))?;
        function.insert("name".to_owned(), name);
        if let Some(description) = tool.description {
            function.insert("description".to_owned(), description);
        }
        let schema = tool.input_schema;
        let schema = schema.ok_or_else(|| missing(format!("tools[{idx}].input_schema")))?;
        function.insert("parameters".to_owned(), schema);
        tools.push(json!({"type": "function", "function": function}));
    }
    Ok(Value::from(tools))
}

fn tool_choice(choice: RawChoice) -> Result<Value, RequestError> {
    match choice.kind.as_deref() {
        Some("auto") => Ok(json!("auto")),
        Some("any") => Ok(json!("required")),
        Some("none") => Ok(json!("none")),
        Some("tool") => {
            let name = choice.name.ok_or_else(|| missing("tool_choice.name"))?;
            Ok(json!({"type": "function", "function": {"name": name}}))
        }
        Some(other) => Err(unsupported(
            "tool_choice.type".to_owned(),
            "a choice",
            other,
        )),
        None => Err(missing("tool_choice.type")),
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `msg-..`.
    pub id: String,
    /// `message`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `assistant`.
    pub role: String,
    /// The served model's name.
    pub model: String,
    /// Thoughts, text and calls, in order.
    pub content: Vec<ContentBlock>,
    /// Why it ended; null while a stream goes on.
    pub stop_reason: Option<StopReason>,
    /// The stop sequence that ended it.
    pub stop_sequence: Option<String>,
    /// Token counts.
    pub usage: MessageUsage,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock {
    /// Thoughts.
    Thinking {
        /// Their text.
        thinking: String,
        /// Always empty: nobody checks it here.
        signature: String,
    },
    /// Text.
    Text {
        /// It.
        text: String,
    },
    /// A call of a tool.
    ToolUse {
        /// Its name in the conversation.
        id: String,
        /// Of the tool.
        name: String,
        /// Arguments; as text where the model wrote no JSON.
        input: Value,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model was done.
    EndTurn,
    /// `max_tokens`, the context, the deadline, or the server's end.
    MaxTokens,
    /// One of `stop_sequences`.
    StopSequence,
    /// Calls wait for their results.
    ToolUse,
}

/// Token counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageUsage {
    /// Prompt tokens that were computed.
    pub input_tokens: usize,
    /// Always 0: the cache is not written for money here.
    pub cache_creation_input_tokens: usize,
    /// Prompt tokens that were in the cache.
    pub cache_read_input_tokens: usize,
    /// Tokens generated.
    pub output_tokens: usize,
}

/// One event of a stream; its `type` is the event's name, too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MessageEvent {
    /// The first one.
    MessageStart {
        /// Without content.
        message: Message,
    },
    /// A part begins.
    ContentBlockStart {
        /// Its number.
        index: usize,
        /// Empty.
        content_block: ContentBlock,
    },
    /// More of the part.
    ContentBlockDelta {
        /// Its number.
        index: usize,
        /// What is new.
        delta: BlockDelta,
    },
    /// The part is complete.
    ContentBlockStop {
        /// Its number.
        index: usize,
    },
    /// How the answer ended.
    MessageDelta {
        /// Why.
        delta: MessageEnd,
        /// Token counts.
        usage: MessageUsage,
    },
    /// The last one.
    MessageStop,
    /// Nothing new.
    Ping,
    /// It failed.
    Error {
        /// Why.
        error: ErrorDetail,
    },
}

impl MessageEvent {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
            Self::Ping => "ping",
            Self::Error { .. } => "error",
        }
    }
}

/// What is new of a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BlockDelta {
    /// Of thoughts.
    ThinkingDelta {
        /// New text.
        thinking: String,
    },
    /// Of text.
    TextDelta {
        /// New text.
        text: String,
    },
    /// Of a call's arguments.
    InputJsonDelta {
        /// New text.
        partial_json: String,
    },
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageEnd {
    /// Why.
    pub stop_reason: StopReason,
    /// The stop sequence that ended it.
    pub stop_sequence: Option<String>,
}

/// Body of every answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// `error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Why.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For a person.
    pub message: String,
}

impl ErrorDetail {
    /// With the type that Anthropic has for a status.
    pub fn of_status(status: u16, message: impl Into<String>) -> Self {
        let kind = match status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            400..500 => "invalid_request_error",
            _ => "api_error",
        };
        Self {
            kind: kind.to_owned(),
            message: message.into(),
        }
    }
}

/// `POST /v1/messages/count_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCount {
    /// Of the prompt that the request makes.
    pub input_tokens: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::{Role, ToolChoice};

    fn read(fields: &str) -> Result<ChatCompletionRequest, RequestError> {
        MessagesRequest::from_slice(format!("{{{fields}}}").as_bytes(), true).map(|r| r.0)
    }

    #[test]
    fn a_conversation_with_tools_is_put_in_the_other_words() {
        let request = read(
            r#""model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}],
            "stop_sequences": ["x"], "temperature": 0.5, "top_k": 3, "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"k": [1]}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]},
                    {"type": "text", "text": "c"}]}]"#,
        )
        .unwrap();
        let roles: Vec<Role> = request.messages.iter().map(|m| m.role).collect();
        assert_eq!(
            roles,
            [
                Role::System,
                Role::User,
                Role::Assistant,
                Role::Tool,
                Role::User
            ]
        );
        let assistant = &request.messages[2];
        assert_eq!(assistant.reasoning_content.as_deref(), Some("t"));
        assert_eq!(assistant.tool_calls[0].arguments, r#"{"k":[1]}"#);
        assert_eq!(request.messages[3].content, ["r"]);
        assert_eq!(request.tool_choice, ToolChoice::Required);
        assert_eq!(
            (request.thinking, request.parallel_tool_calls),
            (Some(true), false)
        );
        assert_eq!(request.options.stop, ["x"]);
        assert_eq!(
            (request.options.max_tokens, request.options.top_k),
            (Some(9), 3)
        );
        assert!(!request.continues);
    }

    #[test]
    fn a_beginning_of_the_answer_is_continued() {
        let request = read(
            r#""max_tokens": 9, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#,
        );
        assert!(request.unwrap().continues);
    }

    #[test]
    fn errors_name_the_field() {
        for (fields, param) in [
            (r#""messages": []"#, "max_tokens"),
            (r#""max_tokens": 5, "messages": 5"#, "messages"),
            (
                r#""max_tokens": 5, "messages": [{"role": "user", "content": 5}]"#,
                "messages[0].content",
            ),
            (r#""max_tokens": 5"#, "messages"),
            (r#""max_tokens": 5, "messages": []"#, "messages"),
            (
                r#""max_tokens": 0, "messages": [{"role": "user", "content": "a"}]"#,
                "max_tokens",
            ),
            (
                r#""max_tokens": 5, "messages": [{"role": "king", "content": "a"}]"#,
                "messages[0].role",
            ),
            (
                r#""max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]"#,
                "messages[0].content[0].type",
            ),
            (
                r#""max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "9"}]}]"#,
                "messages[0].tool_call_id",
            ),
            (
                r#""max_tokens": 5, "tools": [{"type": "web_search_20250305", "name": "w"}], "messages": [{"role": "user", "content": "a"}]"#,
                "tools[0].type",
            ),
            (
                r#""max_tokens": 5, "tool_choice": {"type": "any"}, "messages": [{"role": "user", "content": "a"}]"#,
                "tool_choice",
            ),
        ] {
            let error = read(fields).expect_err(fields);
            assert_eq!(error.param(), Some(param), "{fields}: {error}");
        }
    }
}
