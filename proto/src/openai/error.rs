//! Why a request body was refused, and the error object of the API.

use serde::{Deserialize, Serialize};

/// Body of every answer that is not a success: `{"error": {..}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The one member.
    pub error: ErrorDetail,
}

/// What went wrong, in OpenAI's shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// For a person.
    pub message: String,
    /// Class of the error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field to blame, such as `messages[0].role`.
    pub param: Option<String>,
    /// For a program; stable.
    pub code: Option<String>,
}

/// Why a body is not a request. The text is meant for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The body is no text at all.
    #[error("the body is not valid UTF-8 from byte {valid_len} on")]
    NotUtf8 {
        /// Bytes before the first bad one.
        valid_len: usize,
    },
    /// The body is no JSON.
    #[error("the body is not valid JSON: {problem}")]
    Json {
        /// What the JSON reader says, with line and column.
        problem: String,
    },
    /// A field has a value of another type.
    #[error("`{param}`: {problem}")]
    WrongType {
        /// Path of the field.
        param: String,
        /// Found and expected.
        problem: String,
    },
    /// A field without a default is absent or null.
    #[error("`{param}` is required")]
    Missing {
        /// Path of the field.
        param: String,
    },
    /// A field has the right type and a value that cannot be used.
    #[error("`{param}` is {found}, expected {expected}")]
    OutOfRange {
        /// Path of the field.
        param: String,
        /// The value, shortened.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// Two fields say different things.
    #[error("`{param}` {problem}")]
    Conflict {
        /// Path of the field to blame.
        param: String,
        /// The rule that is broken.
        problem: String,
    },
    /// A known field asks for something this server does not do.
    #[error("`{param}`: {what} is not supported")]
    Unsupported {
        /// Path of the field.
        param: String,
        /// What was asked for.
        what: String,
    },
}

impl RequestError {
    /// The field to blame; none when the body as a whole is wrong.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::NotUtf8 { .. } | Self::Json { .. } => None,
            Self::WrongType { param, .. }
            | Self::Missing { param }
            | Self::OutOfRange { param, .. }
            | Self::Conflict { param, .. }
            | Self::Unsupported { param, .. } => Some(param),
        }
    }

    /// Stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotUtf8 { .. } | Self::Json { .. } => "invalid_json",
            Self::WrongType { .. }
            | Self::Missing { .. }
            | Self::OutOfRange { .. }
            | Self::Conflict { .. } => "invalid_request",
            Self::Unsupported { .. } => "unsupported",
        }
    }
}
