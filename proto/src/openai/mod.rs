//! The public HTTP API, field for field: requests of OpenAI clients with the usual extensions, answers, errors.
//!
//! Knows JSON and ranges of numbers; knows no model, no tokens and no HTTP.
//!
//! Invariant: a request value holds only what may be run; everything else was refused by name.

mod error;
mod locate;
pub(crate) mod raw;
mod request;
mod response;
mod shape;
mod tokenize;
mod tools;
#[cfg(test)]
mod tests;

pub use error::{ErrorBody, ErrorDetail, RequestError};
pub use request::{
    ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationOptions, Prompt,
    ReasoningEffort, Role, ServiceTier, limits, positive_seconds, unknown_fields,
};
pub use response::{
    Balance, BalanceEntry, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta,
    ChatLogprobs, ChatReply, ChatTokenLogprob, Completion, CompletionChoice, CompletionLogprobs,
    CompletionTokensDetails, FinishReason, Model, ModelList, TokenizerDescription, TopLogprob,
    Usage,
};
pub use shape::AnswerShape;
pub use tokenize::{DetokenizeRequest, Detokenized, TokenizeRequest, Tokenized};
pub use tools::{
    FunctionDelta, FunctionReply, Tool, ToolCall, ToolCallDelta, ToolCallReply, ToolChoice,
};
