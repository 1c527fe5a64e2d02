//! Answers, whole and as events.

use serde::Serialize;

use super::request::Echo;
use crate::openai::ChatTokenLogprob;

/// An answer.
#[derive(Debug, Clone, Serialize)]
pub struct Response {
    /// `resp-..`.
    pub id: String,
    /// `response`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created_at: u64,
    /// Seconds since 1970; null before the end.
    pub completed_at: Option<u64>,
    /// How far it is.
    pub status: Status,
    /// Why it failed.
    pub error: Option<ResponseError>,
    /// Why something is missing.
    pub incomplete_details: Option<IncompleteDetails>,
    /// The served model's name, as the request has it.
    pub model: String,
    /// Thoughts, texts and calls, in order.
    pub output: Vec<OutputItem>,
    /// Token counts; null before the end.
    pub usage: Option<ResponseUsage>,
    /// What the request said.
    #[serde(flatten)]
    pub echo: Echo,
}

/// How far an answer, or an item of it, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is being made.
    InProgress,
    /// Nothing is missing.
    Completed,
    /// It ended early.
    Incomplete,
    /// It is of no use.
    Failed,
}

/// Why an answer failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResponseError {
    /// For a program; those of all routes.
    pub code: String,
    /// For a person.
    pub message: String,
}

/// Why an answer ended early.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IncompleteDetails {
    /// `max_output_tokens`; else the `finish_reason` of a chat that ended so.
    pub reason: &'static str,
}

/// Token counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ResponseUsage {
    /// Of the prompt.
    pub input_tokens: usize,
    /// Where they came from.
    pub input_tokens_details: InputTokensDetails,
    /// Generated.
    pub output_tokens: usize,
    /// What they were spent on.
    pub output_tokens_details: OutputTokensDetails,
    /// The sum.
    pub total_tokens: usize,
}

/// Where prompt tokens came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct InputTokensDetails {
    /// In the cache.
    pub cached_tokens: usize,
    /// Always 0: the cache is not written for money here.
    pub cache_write_tokens: usize,
}

/// What generated tokens were spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OutputTokensDetails {
    /// Spent thinking.
    pub reasoning_tokens: usize,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// Thoughts.
    Reasoning {
        /// Its name.
        id: String,
        /// How far it is.
        status: Status,
        /// Always empty: thoughts are told as they are.
        summary: [(); 0],
        /// One, or none yet.
        content: Vec<ReasoningText>,
        /// Always null: nothing is hidden.
        encrypted_content: Option<String>,
    },
    /// Text.
    Message {
        /// Its name.
        id: String,
        /// How far it is.
        status: Status,
        /// `assistant`.
        role: &'static str,
        /// One, or none yet.
        content: Vec<OutputPart>,
    },
    /// A call of a function.
    FunctionCall {
        /// Its name in the answer.
        id: String,
        /// How far it is.
        status: Status,
        /// Its name in the conversation, which the result repeats.
        call_id: String,
        /// The function's.
        name: String,
        /// JSON, as the model wrote it.
        arguments: String,
    },
}

impl OutputItem {
    /// Its name in the answer.
    pub fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. }
            | Self::Message { id, .. }
            | Self::FunctionCall { id, .. } => id,
        }
    }

    /// Says how far it is.
    pub fn set_status(&mut self, new: Status) {
        match self {
            Self::Reasoning { status, .. }
            | Self::Message { status, .. }
            | Self::FunctionCall { status, .. } => *status = new,
        }
    }
}

/// Thoughts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename = "reasoning_text")]
pub struct ReasoningText {
    /// Their text.
    pub text: String,
}

/// Text of a message.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(tag = "type", rename = "output_text")]
pub struct OutputPart {
    /// Always empty.
    pub annotations: [(); 0],
    /// The text.
    pub text: String,
    /// Of its tokens, when asked for.
    pub logprobs: Vec<ChatTokenLogprob>,
}

/// Answer of `POST /v1/responses/input_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct InputTokenCount {
    /// `response.input_tokens`.
    pub object: &'static str,
    /// Of the prompt that the request makes.
    pub input_tokens: usize,
}

/// One event of a stream, without its number; its `type` is the event's name, too.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type")]
pub enum Event {
    /// The first one.
    #[serde(rename = "response.created")]
    Created {
        /// Without output.
        response: Response,
    },
    /// The second one.
    #[serde(rename = "response.in_progress")]
    InProgress {
        /// Without output.
        response: Response,
    },
    /// An item begins.
    #[serde(rename = "response.output_item.added")]
    ItemAdded {
        /// Its number.
        output_index: usize,
        /// Empty.
        item: OutputItem,
    },
    /// Text of an item begins.
    #[serde(rename = "response.content_part.added")]
    PartAdded {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// Always 0.
        content_index: usize,
        /// Empty.
        part: Part,
    },
    /// More text.
    #[serde(rename = "response.output_text.delta")]
    TextDelta {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// Always 0.
        content_index: usize,
        /// New text.
        delta: String,
        /// Of the new tokens, when asked for.
        logprobs: Vec<ChatTokenLogprob>,
    },
    /// The text is complete.
    #[serde(rename = "response.output_text.done")]
    TextDone {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// Always 0.
        content_index: usize,
        /// All of it.
        text: String,
        /// Of all tokens, when asked for.
        logprobs: Vec<ChatTokenLogprob>,
    },
    /// More thoughts.
    #[serde(rename = "response.reasoning_text.delta")]
    ReasoningDelta {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// Always 0.
        content_index: usize,
        /// New text.
        delta: String,
    },
    /// The thoughts are complete.
    #[serde(rename = "response.reasoning_text.done")]
    ReasoningDone {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// Always 0.
        content_index: usize,
        /// All of them.
        text: String,
    },
    /// More of a call's arguments.
    #[serde(rename = "response.function_call_arguments.delta")]
    ArgumentsDelta {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// New text.
        delta: String,
    },
    /// The call is complete.
    #[serde(rename = "response.function_call_arguments.done")]
    ArgumentsDone {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// The function's name.
        name: String,
        /// All of them.
        arguments: String,
    },
    /// Text of an item is complete.
    #[serde(rename = "response.content_part.done")]
    PartDone {
        /// The item's name.
        item_id: String,
        /// The item's number.
        output_index: usize,
        /// Always 0.
        content_index: usize,
        /// All of it.
        part: Part,
    },
    /// The item is complete.
    #[serde(rename = "response.output_item.done")]
    ItemDone {
        /// Its number.
        output_index: usize,
        /// All of it.
        item: OutputItem,
    },
    /// The last one of a whole answer.
    #[serde(rename = "response.completed")]
    Completed {
        /// All of it.
        response: Response,
    },
    /// The last one of an answer that ended early.
    #[serde(rename = "response.incomplete")]
    Incomplete {
        /// What there is of it.
        response: Response,
    },
    /// The last one of an answer that is of no use.
    #[serde(rename = "response.failed")]
    Failed {
        /// With the error.
        response: Response,
    },
}

impl Event {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "response.created",
            Self::InProgress { .. } => "response.in_progress",
            Self::ItemAdded { .. } => "response.output_item.added",
            Self::PartAdded { .. } => "response.content_part.added",
            Self::TextDelta { .. } => "response.output_text.delta",
            Self::TextDone { .. } => "response.output_text.done",
            Self::ReasoningDelta { .. } => "response.reasoning_text.delta",
            Self::ReasoningDone { .. } => "response.reasoning_text.done",
            Self::ArgumentsDelta { .. } => "response.function_call_arguments.delta",
            Self::ArgumentsDone { .. } => "response.function_call_arguments.done",
            Self::PartDone { .. } => "response.content_part.done",
            Self::ItemDone { .. } => "response.output_item.done",
            Self::Completed { .. } => "response.completed",
            Self::Incomplete { .. } => "response.incomplete",
            Self::Failed { .. } => "response.failed",
        }
    }
}

/// Text of an item, of either kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Part {
    /// Of a message.
    Text(OutputPart),
    /// Of thoughts.
    Reasoning(ReasoningText),
}
