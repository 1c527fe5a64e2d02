//! OpenAI's Responses API without a memory: requests, put in the words of [`crate::openai`]'s chats,
//! and answers.
//!
//! Knows no model and no HTTP. Nothing is kept between requests, so what refers to an earlier answer
//! is refused by its name.
//!
//! Invariant: what a request value holds went through the same checks as a chat's.

mod answer;
mod fields;
mod items;
mod request;

pub use answer::{
    Event, IncompleteDetails, InputTokenCount, InputTokensDetails, OutputItem, OutputPart,
    OutputTokensDetails, Part, ReasoningText, Response, ResponseError, ResponseUsage, Status,
};
pub use request::{Echo, ResponsesRequest};

pub(crate) use fields::FIELDS;
#[cfg(test)]
pub(crate) use request::request_fields;
