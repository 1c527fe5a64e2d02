//! Requests that may be run: the raw fields with their ranges checked and their defaults filled in.

use serde_json::{Map, Value, json};

use super::{
    error::RequestError,
    raw::{self, Presence, RawContent, RawLogprobs, RawMessage, RawPrompt, RawRequest},
    shape::{self, AnswerShape},
    tools::{self, Tool, ToolCall, ToolChoice},
};

/// Ranges and lengths of request fields.
pub mod limits {
    /// Choices per prompt, and prompts times choices of one request.
    pub const CHOICES_MAX: u32 = 128;
    /// Likeliest tokens reported per position.
    pub const TOP_LOGPROBS_MAX: u32 = 20;
    /// Log-probabilities of prompts in one answer: the tokens of all choices' prompts, times one and the
    /// likeliest reported. 64 prompts of 2,048 tokens with one each; in JSON they are some 20 MiB.
    pub const ECHOED_LOGPROBS_MAX: usize = 1 << 18;
    /// Stop strings of a request.
    pub const STOP_STRINGS_MAX: usize = 16;
    /// Bytes of one stop string.
    pub const STOP_STRING_LEN_MAX: usize = 1024;
    /// Stop tokens of a request.
    pub const STOP_TOKENS_MAX: usize = 64;
    /// Biased tokens of a request.
    pub const LOGIT_BIASES_MAX: usize = 1024;
    /// Extra template variables of a request.
    pub const TEMPLATE_ARGS_MAX: usize = 32;
    /// Bytes of one extra template variable.
    pub const TEMPLATE_ARG_LEN_MAX: usize = 4096;
    /// Unknown members of a body that are told.
    pub const UNKNOWN_FIELDS_MAX: usize = 16;
    /// Bytes of a schema, a regular expression or a grammar.
    pub const SHAPE_LEN_MAX: usize = 256 << 10;
    /// Texts of which an answer may be one.
    pub const TEXTS_MAX: usize = 1024;
    /// Tools of a request.
    pub const TOOLS_MAX: usize = 1024;
    /// Bytes of one tool, its schema included.
    pub const TOOL_LEN_MAX: usize = 128 << 10;
    /// Bytes of all tools.
    pub const TOOLS_LEN_MAX: usize = 1 << 20;
    /// Bytes of a tool's name.
    pub const TOOL_NAME_LEN_MAX: usize = 128;
    /// Calls of one message.
    pub const TOOL_CALLS_MAX: usize = 1024;
    /// Messages of a conversation.
    pub const MESSAGES_MAX: usize = 16_384;
    /// Bytes of a `user_id` (DeepSeek's limit).
    pub const USER_ID_LEN_MAX: usize = 512;
}

/// Tokens of a plain completion that does not say how many (OpenAI's default).
const COMPLETION_TOKENS_DEFAULT: usize = 16;

/// Template variables that the server itself sets.
const TEMPLATE_ARGS_RESERVED: [&str; 5] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
];

/// `POST /v1/chat/completions`.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatCompletionRequest {
    /// Name of a served model; may be left out when only one is served.
    pub model: Option<String>,
    /// The conversation, at least one message.
    pub messages: Vec<ChatMessage>,
    /// `thinking.type`, or `reasoning_effort: "none"`; absent: the template's own default.
    pub thinking: Option<bool>,
    /// How long to think, passed to the template.
    pub reasoning_effort: Option<ReasoningEffort>,
    /// Extra template variables, scalars only.
    pub template_args: Map<String, Value>,
    /// Functions that the model may call.
    pub tools: Vec<Tool>,
    /// Whether it has to.
    pub tool_choice: ToolChoice,
    /// Whether one answer may have several calls; the default is yes.
    pub parallel_tool_calls: bool,
    /// The last message is an assistant's that the answer continues.
    pub continues: bool,
    /// Everything that both kinds of request share.
    pub options: GenerationOptions,
}

/// `POST /v1/completions`.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// Name of a served model; may be left out when only one is served.
    pub model: Option<String>,
    /// At least one.
    pub prompts: Vec<Prompt>,
    /// What follows the answer: it fills the hole between a prompt and this.
    pub suffix: Option<String>,
    /// BOS goes in front of a text where the model wants it; the default is yes.
    pub add_special_tokens: bool,
    /// What spells a special token in a text is that token; the default is yes.
    pub parse_special: bool,
    /// Each choice begins with its prompt; then there may be 0 tokens to generate.
    pub echo: bool,
    /// Choices that are made of each prompt, of which the `n` likeliest are the answer; at least `n`.
    pub best_of: u32,
    /// Everything that both kinds of request share.
    pub options: GenerationOptions,
}

/// Prompt of a plain completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Tokenised by the client.
    Tokens(Vec<u32>),
}

/// What both kinds of request share.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationOptions {
    /// Tokens to generate at most; absent: whatever the context still holds.
    pub max_tokens: Option<usize>,
    /// Choices per prompt, 1 to [`limits::CHOICES_MAX`].
    pub n: u32,
    /// 0 to 2, default 1.
    pub temperature: f32,
    /// 0 to 1, default 1.
    pub top_p: f32,
    /// 0 is off, which is the default.
    pub top_k: usize,
    /// 0 to 1, default 0.
    pub min_p: f32,
    /// Above 0 to 10, default 1.
    pub repetition_penalty: f32,
    /// -2 to 2, default 0.
    pub frequency_penalty: f32,
    /// -2 to 2, default 0.
    pub presence_penalty: f32,
    /// Token ids and what is added to their logits, -100 to 100, ascending by id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same answer; absent: a fresh one.
    pub seed: Option<u64>,
    /// Texts that end a choice and are not part of it, none empty.
    pub stop: Vec<String>,
    /// Tokens that end a choice, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Whether the model's own end tokens are ignored.
    pub ignore_eos: bool,
    /// The field that says what the answer has to look like, and what it says; `None`: nothing in
    /// particular.
    pub shape: Option<(&'static str, AnswerShape)>,
    /// `None`: none; `Some(n)`: the chosen token's and the `n` likeliest.
    pub top_logprobs: Option<usize>,
    /// Whether the answer is a stream of events.
    pub stream: bool,
    /// Whether a stream ends with a chunk of token counts.
    pub include_usage: bool,
    /// The client's name for its own user; who its work is shared with.
    pub user: Option<String>,
    /// The same in DeepSeek's word, which also keeps users apart in the prefix cache: 1 to
    /// [`limits::USER_ID_LEN_MAX`] of `a-z`, `A-Z`, `0-9`, `-` and `_`.
    pub user_id: Option<String>,
    /// How long the first token may take.
    pub service_tier: ServiceTier,
    /// Seconds from arrival that the client is ready to wait for the whole answer, above 0.
    pub deadline_s: Option<f64>,
}

/// What a client pays for in waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ServiceTier {
    /// `auto` or `default`: as its tenant is served.
    #[default]
    Standard,
    /// `flex`: whenever there is room.
    Flex,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// Text parts; one for plain text, none for null.
    pub content: Vec<String>,
    /// Whether the content was given as a list of parts.
    pub content_is_list: bool,
    /// Earlier thoughts of the assistant.
    pub reasoning_content: Option<String>,
    /// Earlier calls of the assistant.
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's message: the call that it answers.
    pub tool_call_id: Option<String>,
    /// Name of the speaker.
    pub name: Option<String>,
}

/// Who speaks. `developer` is read as `system`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The operator.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What came of a call.
    Tool,
}

/// How long a thinking model is asked to think.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningEffort {
    /// Not at all; also sets [`ChatCompletionRequest::thinking`] to false.
    None,
    /// `minimal`.
    Minimal,
    /// `low`.
    Low,
    /// `medium`.
    Medium,
    /// `high`.
    High,
    /// `xhigh`.
    Xhigh,
    /// `max`, also spelled `ultra`.
    Max,
}

impl ReasoningEffort {
    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Xhigh => "xhigh",
            Self::Max => "max",
        }
    }
}

impl Role {
    /// The word that templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl ChatMessage {
    /// A message of plain text.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: vec![content.into()],
            content_is_list: false,
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }

    /// The message as templates see it.
    pub fn to_value(&self) -> Value {
        let mut object = Map::new();
        object.insert("role".into(), self.role.as_str().into());
        let content = match self.content.as_slice() {
            [] => Value::Null,
            [text] if !self.content_is_list => Value::from(text.as_str()),
            parts => parts
                .iter()
                .map(|text| json!({"type": "text", "text": text}))
                .collect(),
        };
        object.insert("content".into(), content);
        if let Some(reasoning) = &self.reasoning_content {
            object.insert("reasoning_content".into(), reasoning.as_str().into());
        }
        if !self.tool_calls.is_empty() {
            let calls: Vec<Value> = self.tool_calls.iter().map(ToolCall::to_value).collect();
            object.insert("tool_calls".into(), calls.into());
        }
        if let Some(id) = &self.tool_call_id {
            object.insert("tool_call_id".into(), id.as_str().into());
        }
        if let Some(name) = &self.name {
            object.insert("name".into(), name.as_str().into());
        }
        Value::Object(object)
    }
}

impl ChatCompletionRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// [`RequestError`] with the field to blame.
    pub fn from_slice(body: &[u8]) -> Result<Self, RequestError> {
        let mut raw: RawRequest = raw::parse(body)?;
        let wants_continuation = raw.continue_final_message == Some(true);
        let (messages, continues) = messages(raw.messages.take(), wants_continuation)?;
        tools::refuse_functions(raw.functions, raw.function_call)?;
        let tools = tools::tools(raw.tools.take())?;
        let tool_choice = tools::tool_choice(raw.tool_choice.take(), &tools)?;
        let parallel_tool_calls = raw.parallel_tool_calls.unwrap_or(true);
        let top_logprobs = match (raw.logprobs, raw.top_logprobs) {
            (Some(RawLogprobs::Count(_)), _) => {
                return Err(RequestError::WrongType {
                    param: "logprobs".into(),
                    problem: "a chat completion takes a boolean; `top_logprobs` is the count"
                        .into(),
                });
            }
            (Some(RawLogprobs::Flag(true)), top) => Some(top.unwrap_or(0)),
            (_, Some(top)) if 0 < top => {
                return Err(RequestError::Conflict {
                    param: "top_logprobs".into(),
                    problem: "needs `logprobs` to be true".into(),
                });
            }
            _ => None,
        };
        let top_logprobs = top_logprobs
            .map(|top| count("top_logprobs", top))
            .transpose()?;
        let reasoning_effort = raw
            .reasoning_effort
            .as_deref()
            .map(reasoning_effort)
            .transpose()?;
        let thinking = match raw.thinking.as_ref().map(|t| t.kind.as_deref()) {
            None => raw.enable_thinking.or_else(|| {
                let none = reasoning_effort.filter(|e| *e == ReasoningEffort::None);
                none.map(|_| false)
            }),
            Some(Some("enabled")) => Some(true),
            Some(Some("disabled")) => Some(false),
            // Left to the model, which is what absence means here.
            Some(Some("auto" | "adaptive")) => None,
            Some(Some(other)) => {
                return Err(out_of_range(
                    "thinking.type",
                    format!("{other:?}"),
                    "`enabled` or `disabled`",
                ));
            }
            Some(None) => {
                return Err(RequestError::Missing {
                    param: "thinking.type".into(),
                });
            }
        };
        let template_args = template_args(&mut raw)?;
        Ok(Self {
            model: raw.model.take(),
            messages,
            thinking,
            reasoning_effort,
            template_args,
            tools,
            tool_choice,
            parallel_tool_calls,
            continues,
            options: options(
                raw,
                top_logprobs,
                Length {
                    default: None,
                    may_be_none: false,
                },
            )?,
        })
    }
}

impl CompletionRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// [`RequestError`] with the field to blame.
    pub fn from_slice(body: &[u8]) -> Result<Self, RequestError> {
        let mut raw: RawRequest = raw::parse(body)?;
        let prompts = match raw.prompt.take() {
            None => {
                return Err(RequestError::Missing {
                    param: "prompt".into(),
                });
            }
            Some(RawPrompt::Empty) => {
                return Err(out_of_range(
                    "prompt",
                    "an empty list",
                    "at least one prompt",
                ));
            }
            Some(RawPrompt::Text(text)) => vec![Prompt::Text(text)],
            Some(RawPrompt::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
            Some(RawPrompt::Tokens(ids)) => vec![Prompt::Tokens(ids)],
            Some(RawPrompt::TokenLists(lists)) => lists.into_iter().map(Prompt::Tokens).collect(),
        };
        let best_of = best_of(&raw)?;
        let n_choices = prompts
            .len()
            .saturating_mul(usize::try_from(best_of).unwrap_or(usize::MAX));
        if limits::CHOICES_MAX as usize <= n_choices.saturating_sub(1) {
            return Err(out_of_range(
                "prompt",
                format!("{} prompts, {n_choices} choices in all", prompts.len()),
                format!("at most {} choices", limits::CHOICES_MAX),
            ));
        }
        let echo = raw.echo == Some(true);
        let suffix = raw.suffix.take().filter(|suffix| !suffix.is_empty());
        let is_text = |prompt: &Prompt| matches!(prompt, Prompt::Text(_));
        if suffix.is_some() && !prompts.iter().all(is_text) {
            return Err(RequestError::Conflict {
                param: "suffix".into(),
                problem: "needs prompts that are texts".into(),
            });
        }
        if suffix.is_some() && echo {
            return Err(RequestError::Conflict {
                param: "echo".into(),
                problem: "does not go with `suffix`: the answer would stand between both".into(),
            });
        }
        let top_logprobs = match raw.logprobs {
            None | Some(RawLogprobs::Flag(false)) => None,
            Some(RawLogprobs::Count(top)) => Some(count("logprobs", top)?),
            Some(RawLogprobs::Flag(true)) => {
                return Err(RequestError::WrongType {
                    param: "logprobs".into(),
                    problem: "a plain completion takes a count".into(),
                });
            }
        };
        Ok(Self {
            model: raw.model.take(),
            prompts,
            suffix,
            add_special_tokens: raw.add_special_tokens.unwrap_or(true),
            parse_special: raw.parse_special.unwrap_or(true),
            echo,
            best_of: u32::try_from(best_of).unwrap_or(limits::CHOICES_MAX),
            options: options(
                raw,
                top_logprobs,
                Length {
                    default: Some(COMPLETION_TOKENS_DEFAULT),
                    may_be_none: echo,
                },
            )?,
        })
    }
}

/// Choices that are made of each prompt.
fn best_of(raw: &RawRequest) -> Result<u64, RequestError> {
    let n = raw.n.unwrap_or(1);
    let best_of = raw.best_of.unwrap_or(n);
    if best_of < n || u64::from(limits::CHOICES_MAX) < best_of.max(n) {
        let expected = format!("at least `n`, {n}, at most {}", limits::CHOICES_MAX);
        let param = if raw.best_of.is_some() {
            "best_of"
        } else {
            "n"
        };
        return Err(out_of_range(param, best_of, expected));
    }
    if n < best_of && raw.stream == Some(true) {
        return Err(RequestError::Conflict {
            param: "best_of".into(),
            problem: "does not go with `stream`: the best are known when all are there".into(),
        });
    }
    Ok(best_of)
}

/// How many tokens may be asked for.
#[derive(Clone, Copy)]
struct Length {
    /// Where nobody says.
    default: Option<usize>,
    /// 0 makes sense.
    may_be_none: bool,
}

/// The conversation, and whether the answer continues its last message.
fn messages(
    raw: Option<Vec<RawMessage>>,
    wants_continuation: bool,
) -> Result<(Vec<ChatMessage>, bool), RequestError> {
    let raw = raw.ok_or_else(|| RequestError::Missing {
        param: "messages".into(),
    })?;
    if raw.is_empty() || limits::MESSAGES_MAX < raw.len() {
        let expected = format!("1 to {} messages", limits::MESSAGES_MAX);
        return Err(out_of_range(
            "messages",
            format!("a list of {}", raw.len()),
            expected,
        ));
    }
    let n = raw.len();
    let prefixed = raw.iter().position(|message| message.prefix == Some(true));
    if let Some(idx) = prefixed.filter(|idx| idx + 1 < n) {
        return Err(RequestError::Conflict {
            param: format!("messages[{idx}].prefix"),
            problem: "is for the last message only".into(),
        });
    }
    let messages = raw.into_iter().enumerate();
    let messages: Vec<ChatMessage> = messages
        .map(|(idx, message)| chat_message(idx, message))
        .collect::<Result<_, _>>()?;
    let continues = prefixed.is_some() || wants_continuation;
    check_turns(&messages, continues)?;
    Ok((messages, continues))
}

/// Refuses conversations that nobody could answer.
fn check_turns(messages: &[ChatMessage], continues: bool) -> Result<(), RequestError> {
    let conflict = |param: String, problem: &str| {
        let problem = problem.into();
        Err(RequestError::Conflict { param, problem })
    };
    let last = messages.len() - 1;
    match messages[last].role {
        Role::Assistant if !continues => {
            let problem = "is `assistant` in the last message, which asks for nothing; `prefix: true` \
                           in it has it continued";
            return conflict(format!("messages[{last}].role"), problem);
        }
        Role::Assistant if !messages[last].tool_calls.is_empty() => {
            let problem = "cannot be continued; the results of the calls have to follow";
            return conflict(format!("messages[{last}].tool_calls"), problem);
        }
        Role::Assistant => {}
        _ if continues => {
            let problem = "has to be `assistant` to be continued";
            return conflict(format!("messages[{last}].role"), problem);
        }
        _ => {}
    }
    let asks = |message: &ChatMessage| matches!(message.role, Role::User | Role::Tool);
    if !messages.iter().any(asks) {
        return conflict("messages".into(), "have no message of a `user`");
    }
    let mut called: Vec<&str> = Vec::new();
    for (idx, message) in messages.iter().enumerate() {
        called.extend(message.tool_calls.iter().map(|call| call.id.as_str()));
        if let Some(id) = message.tool_call_id.as_deref()
            && !called.contains(&id)
        {
            let problem = format!("{:?} is the id of no call before it", raw::shorten(id, 64));
            return conflict(format!("messages[{idx}].tool_call_id"), &problem);
        }
    }
    Ok(())
}

fn chat_message(idx: usize, raw: RawMessage) -> Result<ChatMessage, RequestError> {
    let path = |field: &str| format!("messages[{idx}].{field}");
    let role = match raw.role.as_deref() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        Some("function") => {
            let what = "the form before the role `tool`, which says the same,";
            return Err(unsupported(path("role"), what));
        }
        Some(other) => {
            let found = format!("{:?}", raw::shorten(other, 64));
            return Err(out_of_range(
                path("role"),
                found,
                "`system`, `developer`, `user`, `assistant` or `tool`",
            ));
        }
        None => {
            return Err(RequestError::Missing {
                param: path("role"),
            });
        }
    };
    if raw.function_call == Presence::Something {
        let what = "the form before `tool_calls`, which says the same,";
        return Err(unsupported(path("function_call"), what));
    }
    let only_for = |field: &str, role: &str| RequestError::Conflict {
        param: path(field),
        problem: format!("is for messages of the role `{role}` only"),
    };
    let tool_calls = tools::tool_calls(&path("tool_calls"), raw.tool_calls.unwrap_or_default())?;
    if !tool_calls.is_empty() && role != Role::Assistant {
        return Err(only_for("tool_calls", "assistant"));
    }
    let tool_call_id = raw.tool_call_id;
    match (role, &tool_call_id) {
        (Role::Tool, None) => {
            return Err(RequestError::Missing {
                param: path("tool_call_id"),
            });
        }
        (Role::Tool, Some(_)) | (_, None) => {}
        (_, Some(_)) => return Err(only_for("tool_call_id", "tool")),
    }
    if raw.prefix == Some(true) && role != Role::Assistant {
        return Err(only_for("prefix", "assistant"));
    }
    let mut content_is_list = false;
    let content = match raw.content {
        None if role == Role::Assistant => Vec::new(),
        None => {
            return Err(RequestError::Missing {
                param: path("content"),
            });
        }
        Some(RawContent::Text(text)) => vec![text],
        Some(RawContent::Parts(parts)) => {
            content_is_list = true;
            let mut texts = Vec::with_capacity(parts.len());
            for (part_idx, part) in parts.into_iter().enumerate() {
                let part_path = |field: &str| path(&format!("content[{part_idx}].{field}"));
                match (part.kind.as_deref(), part.text) {
                    (Some("text"), Some(text)) => texts.push(text),
                    (Some("text"), None) => {
                        return Err(RequestError::Missing {
                            param: part_path("text"),
                        });
                    }
                    (Some(other), _) => {
                        let what = format!("content of type {:?}", raw::shorten(other, 64));
                        return Err(unsupported(part_path("type"), what));
                    }
                    (None, _) => {
                        return Err(RequestError::Missing {
                            param: part_path("type"),
                        });
                    }
                }
            }
            texts
        }
    };
    Ok(ChatMessage {
        role,
        content,
        content_is_list,
        reasoning_content: raw.reasoning_content.or(raw.reasoning),
        tool_calls,
        tool_call_id,
        name: raw.name,
    })
}

fn reasoning_effort(word: &str) -> Result<ReasoningEffort, RequestError> {
    Ok(match word {
        "none" => ReasoningEffort::None,
        "minimal" => ReasoningEffort::Minimal,
        "low" => ReasoningEffort::Low,
        "medium" => ReasoningEffort::Medium,
        "high" => ReasoningEffort::High,
        "xhigh" => ReasoningEffort::Xhigh,
        "max" | "ultra" => ReasoningEffort::Max,
        other => {
            let found = format!("{:?}", raw::shorten(other, 64));
            return Err(out_of_range(
                "reasoning_effort",
                found,
                "none, minimal, low, medium, high, xhigh, max or ultra",
            ));
        }
    })
}

fn template_args(raw: &mut RawRequest) -> Result<Map<String, Value>, RequestError> {
    let args = raw.chat_template_kwargs.take().unwrap_or_default();
    if limits::TEMPLATE_ARGS_MAX < args.len() {
        let expected = format!("at most {}", limits::TEMPLATE_ARGS_MAX);
        return Err(out_of_range(
            "chat_template_kwargs",
            format!("{} variables", args.len()),
            expected,
        ));
    }
    for name in args.keys() {
        let param = format!("chat_template_kwargs.{}", raw::shorten(name, 64));
        if TEMPLATE_ARGS_RESERVED.contains(&name.as_str()) {
            return Err(RequestError::Conflict {
                param,
                problem: "is set by the server".into(),
            });
        }
        if 64 < name.len() {
            return Err(out_of_range(
                param,
                format!("a name of {} bytes", name.len()),
                "at most 64",
            ));
        }
    }
    Ok(args.into_iter().map(|(name, arg)| (name, arg.0)).collect())
}

/// Checks everything that both kinds share.
fn options(
    mut raw: RawRequest,
    top_logprobs: Option<usize>,
    length: Length,
) -> Result<GenerationOptions, RequestError> {
    refuse_unsupported(&raw)?;
    let shape = shape::shape(&mut raw)?;
    if shape.is_some() && raw.ignore_eos == Some(true) {
        return Err(RequestError::Conflict {
            param: "ignore_eos".into(),
            problem: "does not go with an answer of a given shape, which ends where it is complete"
                .into(),
        });
    }
    let max_tokens = match (raw.max_tokens, raw.max_completion_tokens) {
        (Some(a), Some(b)) if a != b => {
            return Err(RequestError::Conflict {
                param: "max_completion_tokens".into(),
                problem: format!("is {b} and `max_tokens` is {a}; give one of them"),
            });
        }
        (Some(0), _) if !length.may_be_none => {
            return Err(out_of_range("max_tokens", 0, "at least 1"));
        }
        (_, Some(0)) if !length.may_be_none => {
            return Err(out_of_range("max_completion_tokens", 0, "at least 1"));
        }
        (given, other) => given
            .or(other)
            .map(|max| usize::try_from(max).unwrap_or(usize::MAX))
            .or(length.default),
    };
    let n = raw.n.unwrap_or(1);
    if n < 1 || u64::from(limits::CHOICES_MAX) < n {
        return Err(out_of_range(
            "n",
            n,
            format!("1 to {}", limits::CHOICES_MAX),
        ));
    }
    let top_k = raw.top_k.unwrap_or(0);
    if top_k < -1 {
        return Err(out_of_range(
            "top_k",
            top_k,
            "at least 1, or 0 or -1 for off",
        ));
    }
    let repetition_penalty = number("repetition_penalty", raw.repetition_penalty, 0.0, 10.0, 1.0)?;
    if repetition_penalty <= 0.0 {
        return Err(out_of_range(
            "repetition_penalty",
            repetition_penalty,
            "above 0",
        ));
    }
    let stream = raw.stream.unwrap_or(false);
    if raw.stream_options.is_some() && !stream {
        return Err(RequestError::Conflict {
            param: "stream_options".into(),
            problem: "needs `stream` to be true".into(),
        });
    }
    let stop_token_ids = raw.stop_token_ids.unwrap_or_default();
    if limits::STOP_TOKENS_MAX < stop_token_ids.len() {
        let expected = format!("at most {}", limits::STOP_TOKENS_MAX);
        return Err(out_of_range(
            "stop_token_ids",
            format!("a list of {}", stop_token_ids.len()),
            expected,
        ));
    }
    let deadline_s = raw
        .deadline_s
        .map(|seconds| positive_seconds("deadline_s", seconds))
        .transpose()?;
    Ok(GenerationOptions {
        max_tokens,
        n: u32::try_from(n).unwrap_or(limits::CHOICES_MAX),
        temperature: number("temperature", raw.temperature, 0.0, 2.0, 1.0)?,
        top_p: number("top_p", raw.top_p, 0.0, 1.0, 1.0)?,
        top_k: usize::try_from(top_k).unwrap_or(0),
        min_p: number("min_p", raw.min_p, 0.0, 1.0, 0.0)?,
        repetition_penalty,
        frequency_penalty: number("frequency_penalty", raw.frequency_penalty, -2.0, 2.0, 0.0)?,
        presence_penalty: number("presence_penalty", raw.presence_penalty, -2.0, 2.0, 0.0)?,
        logit_bias: logit_bias(raw.logit_bias.unwrap_or_default())?,
        seed: raw.seed.map(|seed| seed.0),
        stop: stop_strings(raw.stop.map(|list| list.0).unwrap_or_default())?,
        stop_token_ids,
        ignore_eos: raw.ignore_eos.unwrap_or(false),
        shape,
        top_logprobs,
        stream,
        include_usage: raw
            .stream_options
            .and_then(|o| o.include_usage)
            .unwrap_or(false),
        user: raw.user,
        user_id: raw.user_id.map(user_id).transpose()?,
        service_tier: service_tier(raw.service_tier.as_deref())?,
        deadline_s,
    })
}

/// Names of members of a body that are ignored, some of them where there are many.
pub fn unknown_fields(body: &[u8]) -> Vec<String> {
    raw::unknown_fields(body)
}

/// A time to wait that makes sense: a number above 0.
///
/// # Errors
/// [`RequestError::OutOfRange`] for anything else, `param` to blame.
pub fn positive_seconds(param: &str, seconds: f64) -> Result<f64, RequestError> {
    if seconds.is_finite() && 0.0 < seconds {
        Ok(seconds)
    } else {
        Err(out_of_range(param, seconds, "a number of seconds above 0"))
    }
}

fn user_id(id: String) -> Result<String, RequestError> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if id.is_empty() || limits::USER_ID_LEN_MAX < id.len() {
        let expected = format!("1 to {} bytes", limits::USER_ID_LEN_MAX);
        return Err(out_of_range(
            "user_id",
            format!("{} bytes long", id.len()),
            expected,
        ));
    }
    if !id.bytes().all(is_allowed) {
        return Err(out_of_range(
            "user_id",
            format!("{:?}", raw::shorten(&id, 64)),
            "letters a-z and A-Z, digits, `-` and `_` only",
        ));
    }
    Ok(id)
}

fn service_tier(word: Option<&str>) -> Result<ServiceTier, RequestError> {
    match word {
        None | Some("auto" | "default") => Ok(ServiceTier::Standard),
        Some("flex") => Ok(ServiceTier::Flex),
        Some(other) => Err(out_of_range(
            "service_tier",
            format!("{:?}", raw::shorten(other, 64)),
            "`auto`, `default` or `flex`",
        )),
    }
}

fn refuse_unsupported(raw: &RawRequest) -> Result<(), RequestError> {
    for (param, asks, what) in [
        (
            "min_tokens",
            raw.min_tokens.is_some_and(|n| 0 < n),
            "a least number of tokens",
        ),
        (
            "include_stop_str_in_output",
            raw.include_stop_str_in_output == Some(true),
            "the stop string in the answer",
        ),
        (
            "skip_special_tokens",
            raw.skip_special_tokens == Some(false),
            "special tokens in the answer",
        ),
        (
            "prompt_logprobs",
            raw.prompt_logprobs == Presence::Something,
            "log-probabilities of the prompt",
        ),
    ] {
        if asks {
            return Err(unsupported(param, what));
        }
    }
    let not_text = |modalities: &Vec<String>| modalities.iter().any(|m| m != "text");
    if raw.modalities.as_ref().is_some_and(not_text) || raw.audio == Presence::Something {
        return Err(unsupported("modalities", "output other than text"));
    }
    Ok(())
}

fn logit_bias(
    raw: std::collections::BTreeMap<String, f64>,
) -> Result<Vec<(u32, f32)>, RequestError> {
    if limits::LOGIT_BIASES_MAX < raw.len() {
        let expected = format!("at most {}", limits::LOGIT_BIASES_MAX);
        return Err(out_of_range(
            "logit_bias",
            format!("{} tokens", raw.len()),
            expected,
        ));
    }
    let mut biases = Vec::with_capacity(raw.len());
    for (key, bias) in raw {
        let param = format!("logit_bias.{}", raw::shorten(&key, 64));
        let Ok(id) = key.parse::<u32>() else {
            return Err(RequestError::WrongType {
                param,
                problem: "the key is no token id".into(),
            });
        };
        biases.push((id, number(&param, Some(bias), -100.0, 100.0, 0.0)?));
    }
    biases.sort_unstable_by_key(|(id, _)| *id);
    // "1" and "01" are two keys and one token.
    if let Some(pair) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let param = format!("logit_bias.{}", pair[0].0);
        return Err(RequestError::Conflict {
            param,
            problem: "is given twice".into(),
        });
    }
    Ok(biases)
}

fn stop_strings(stop: Vec<String>) -> Result<Vec<String>, RequestError> {
    if limits::STOP_STRINGS_MAX < stop.len() {
        let expected = format!("at most {}", limits::STOP_STRINGS_MAX);
        return Err(out_of_range(
            "stop",
            format!("a list of {}", stop.len()),
            expected,
        ));
    }
    for (idx, text) in stop.iter().enumerate() {
        if text.is_empty() || limits::STOP_STRING_LEN_MAX < text.len() {
            let expected = format!("1 to {} bytes", limits::STOP_STRING_LEN_MAX);
            return Err(out_of_range(
                format!("stop[{idx}]"),
                format!("{} bytes long", text.len()),
                expected,
            ));
        }
    }
    Ok(stop)
}

fn count(param: &str, top: u64) -> Result<usize, RequestError> {
    if u64::from(limits::TOP_LOGPROBS_MAX) < top {
        return Err(out_of_range(
            param,
            top,
            format!("0 to {}", limits::TOP_LOGPROBS_MAX),
        ));
    }
    Ok(usize::try_from(top).unwrap_or(0))
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the range was checked; precision beyond f32 has no use"
)]
fn number(
    param: &str,
    value: Option<f64>,
    min: f64,
    max: f64,
    default: f32,
) -> Result<f32, RequestError> {
    match value {
        None => Ok(default),
        Some(value) if (min..=max).contains(&value) => Ok(value as f32),
        Some(value) => Err(out_of_range(param, value, format!("{min} to {max}"))),
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "callers give numbers and fresh strings"
)]
pub(super) fn out_of_range(
    param: impl Into<String>,
    found: impl ToString,
    expected: impl Into<String>,
) -> RequestError {
    RequestError::OutOfRange {
        param: param.into(),
        found: found.to_string(),
        expected: expected.into(),
    }
}

pub(super) fn unsupported(param: impl Into<String>, what: impl Into<String>) -> RequestError {
    RequestError::Unsupported {
        param: param.into(),
        what: what.into(),
    }
}
