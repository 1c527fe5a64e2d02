//! What a client is told when a request fails: code, status, message, in OpenAI's shape.
//!
//! The one place that turns errors of the parts below into codes. The log gets the cause where it
//! happened; the client gets only what it can act on.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
};
use dsd_proto::{
    anthropic,
    code::Code,
    openai::{ErrorBody, ErrorDetail, RequestError},
};

use super::{generation::ChoiceEnd, health::NotReady};
use crate::{
    catalog::LookupError,
    replica::{Refusal, SubmitError},
    telemetry::chain,
    text::TextError,
};

/// When to come back to a model that is on its way in or out, or down: nothing measures how long
/// that takes.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Read by OpenAI's clients, which otherwise come back twice by themselves.
pub(super) const SHOULD_RETRY: &str = "x-should-retry";

/// Whether clients would repeat a request that was answered with `code` at once, and in vain. They
/// do so after 408, 409, 429 and 5xx; only a body that came too late may come in time.
fn is_retried_for_nothing(code: Code) -> bool {
    let is_retried = matches!(code.http_status(), 408 | 409 | 429 | 500..);
    is_retried && code != Code::RequestTimeout
}

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs; decides the status.
    pub code: Code,
    /// For a person.
    pub message: String,
    /// The field to blame.
    pub param: Option<String>,
    /// When it may work.
    pub retry_after: Option<Duration>,
}

/// Whose shapes a route has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's and DeepSeek's.
    OpenAi,
    /// Anthropic's.
    Anthropic,
}

impl Dialect {
    /// That of a path, whether or not there is a route.
    pub fn of_path(path: &str) -> Self {
        let is_under = |prefix| match path.strip_prefix(prefix) {
            Some(rest) => rest.is_empty() || rest.starts_with('/'),
            None => false,
        };
        match is_under("/anthropic") || is_under("/v1/messages") {
            true => Self::Anthropic,
            false => Self::OpenAi,
        }
    }
}

impl ApiError {
    /// An error without a field to blame.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// An error of the node that is likely gone when the client comes back.
    fn retry_later(code: Code, message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(RETRY_AFTER),
            ..Self::new(code, message)
        }
    }

    /// What is said to new requests while the node goes down.
    pub(super) fn shutting_down() -> Self {
        let message = "the node is shutting down and takes no new requests";
        Self::retry_later(Code::ShuttingDown, message)
    }

    /// Names the field to blame.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// What a client is told about a choice that did not end well.
    pub fn of_end(end: &ChoiceEnd) -> Self {
        match end {
            ChoiceEnd::DeadlinePassed => Self::new(
                Code::DeadlineExceeded,
                "the answer was not complete within the time limit",
            ),
            ChoiceEnd::Stopped => Self::retry_later(
                Code::ModelStopping,
                "the model was unloaded before the answer was complete",
            ),
            ChoiceEnd::Lost => Self::retry_later(
                Code::NotReady,
                "the model's ranks were lost while they computed the answer",
            ),
            ChoiceEnd::Failed(_) => {
                Self::new(Code::Internal, "the model failed while it was answering")
            }
            // Neither is an error; whoever asks anyway gets no invented cause.
            ChoiceEnd::Stop
            | ChoiceEnd::StopString(_)
            | ChoiceEnd::ToolCalls
            | ChoiceEnd::Length => Self::new(Code::Internal, "the answer is complete"),
        }
    }

    /// What a client is told when its text cannot become tokens. Faults of the checkpoint go to the
    /// log and are no fault of the client.
    pub fn of_text(error: &TextError, param: &str) -> Self {
        if let TextError::TooLong { tokens_min, max } = error {
            let found = format!("at least {tokens_min}");
            return Self::new(Code::ContextLengthExceeded, too_long(*max, &found))
                .with_param(param);
        }
        if error.is_request_fault() {
            return Self::new(Code::InvalidRequest, chain(error)).with_param(param);
        }
        tracing::error!(
            error = chain(error),
            "the model's tokenizer or template failed"
        );
        Self::new(Code::Internal, "the model's tokenizer or template failed")
    }

    /// Names `param` where a prompt is to blame: routes call it differently.
    #[must_use]
    pub(super) fn with_prompt_param(mut self, param: &str) -> Self {
        if self.param.as_deref() == Some("prompt") {
            self.param = Some(param.to_owned());
        }
        self
    }

    /// The error object of the API.
    pub fn body(&self) -> ErrorBody {
        let kind = match self.code.http_status() {
            401 | 403 => "authentication_error",
            429 => "rate_limit_error",
            status if status < 500 => "invalid_request_error",
            _ => "server_error",
        };
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: kind.to_owned(),
                param: self.param.clone(),
                code: Some(self.code.name().to_owned()),
            },
        }
    }

    /// The error object as JSON text.
    pub fn json(&self, dialect: Dialect) -> String {
        let text = match dialect {
            Dialect::OpenAi => serde_json::to_string(&self.body()),
            Dialect::Anthropic => serde_json::to_string(&anthropic::ErrorBody {
                kind: "error".to_owned(),
                error: anthropic::ErrorDetail::of_status(self.status(), &self.message),
            }),
        };
        text.unwrap_or_default()
    }

    /// Its HTTP status.
    pub fn status(&self) -> u16 {
        self.code.http_status()
    }

    /// For a person.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The answer of routes in OpenAI's manner.
    pub fn into_response(self) -> Response<Body> {
        self.into_response_in(Dialect::OpenAi)
    }

    /// The answer.
    pub fn into_response_in(self, dialect: Dialect) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json(dialect)));
        *response.status_mut() = StatusCode::from_u16(self.code.http_status()).unwrap_or_default();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(retry_after) = self.retry_after {
            // Whole seconds, rounded up: coming back early only meets the same refusal.
            let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() != 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        } else if is_retried_for_nothing(self.code) {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if !self.code.may_be_retried() {
            // Final, whatever a client thinks of its status.
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.code == Code::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let code = Code::from_name(error.code()).unwrap_or(Code::InvalidRequest);
        Self {
            code,
            message: error.to_string(),
            param: error.param().map(str::to_owned),
            retry_after: None,
        }
    }
}

impl From<LookupError> for ApiError {
    fn from(error: LookupError) -> Self {
        let code = match error {
            LookupError::Unknown { .. } => Code::ModelNotFound,
            LookupError::NameNeeded { .. } => Code::InvalidRequest,
            LookupError::Loading { .. } => Code::ModelLoading,
            LookupError::Unloading { .. } => Code::ModelStopping,
            LookupError::NothingServed => Code::NotReady,
        };
        let retry_after = code.may_be_retried().then_some(RETRY_AFTER);
        Self {
            code,
            message: error.to_string(),
            param: Some("model".to_owned()),
            retry_after,
        }
    }
}

impl From<NotReady> for ApiError {
    fn from(reason: NotReady) -> Self {
        let code = match reason {
            NotReady::Draining => Code::ShuttingDown,
            NotReady::NoModel
            | NotReady::Loading { .. }
            | NotReady::NotServed { .. }
            | NotReady::Stalled { .. }
            | NotReady::Dead { .. }
            | NotReady::Forming { .. }
            | NotReady::NoToken { .. }
            | NotReady::TokenTooOld { .. }
            | NotReady::DamagedWeights { .. }
            | NotReady::WrongToken { .. } => Code::NotReady,
        };
        Self::retry_later(code, reason.to_string())
    }
}

/// OpenAI's words and, behind the colon, Anthropic's, which clients look for to shorten a conversation by
/// themselves: LiteLLM for the former, LangChain for the latter.
fn too_long(prompt_len_max: usize, found: &str) -> String {
    format!(
        "This model's maximum context length is {} tokens. However, your messages resulted in {found} \
         tokens: the prompt is too long. Please reduce the length of the messages.",
        prompt_len_max + 1
    )
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Refused(
                Refusal::Busy { retry_after, .. } | Refusal::QueueFull { retry_after, .. },
            ) => Self {
                code: Code::QueueFull,
                message,
                param: None,
                retry_after: Some(retry_after),
            },
            SubmitError::Refused(Refusal::TooLate { .. }) => {
                Self::new(Code::DeadlineExceeded, message)
            }
            SubmitError::PromptTooLong { n_prompt, max } => {
                let message = too_long(max, &n_prompt.to_string());
                Self::new(Code::ContextLengthExceeded, message).with_param("prompt")
            }
            SubmitError::EmptyPrompt | SubmitError::TokenOutOfRange { .. } => {
                Self::new(Code::InvalidRequest, message).with_param("prompt")
            }
            SubmitError::Stopping => Self::retry_later(Code::ModelStopping, message),
            SubmitError::Dead => Self::retry_later(Code::NotReady, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_back_in_whole_seconds() {
        let error = SubmitError::Refused(Refusal::QueueFull {
            waiting: 5,
            max: 5,
            retry_after: Duration::from_millis(1200),
        });
        let response = ApiError::from(error).into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
    }

    /// OpenAI's clients repeat 408, 409, 429 and 5xx twice by themselves.
    #[test]
    fn clients_are_told_not_to_repeat_what_is_final() {
        let check = |error: ApiError, expected: Option<&str>| {
            let response = error.clone().into_response();
            let found = response.headers().get(SHOULD_RETRY);
            assert_eq!(found.map(|v| v.to_str().unwrap()), expected, "{error:?}");
        };
        let plain = |code| ApiError::new(code, "words");
        check(plain(Code::DeadlineExceeded), Some("false"));
        check(plain(Code::Internal), Some("false"));
        check(plain(Code::QueueFull), Some("false"));
        check(plain(Code::RequestTimeout), None);
        check(plain(Code::InvalidRequest), Some("false"));
        check(plain(Code::PayloadTooLarge), Some("false"));
        check(ApiError::shutting_down(), None);
    }

    #[test]
    fn bodies_have_the_shape_that_clients_parse() {
        let error = ApiError::from(RequestError::Missing {
            param: "messages".into(),
        });
        assert_eq!(
            error.json(Dialect::OpenAi),
            r#"{"error":{"message":"`messages` is required","type":"invalid_request_error","param":"messages","code":"invalid_request"}}"#
        );
    }

    #[test]
    fn what_will_not_succeed_at_once_is_not_tried_again_by_official_clients() {
        let response = ApiError::of_end(&ChoiceEnd::DeadlinePassed).into_response();
        assert_eq!(response.status(), 504);
        assert_eq!(response.headers()["x-should-retry"], "false");
        let response = ApiError::of_end(&ChoiceEnd::Lost).into_response();
        assert_eq!(response.status(), 503);
        assert!(!response.headers().contains_key("x-should-retry"));
        assert_eq!(response.headers()["retry-after"], "5");
    }
}
