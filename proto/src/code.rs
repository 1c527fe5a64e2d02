//! The closed list of error codes that clients and operators see, over HTTP and over the wire.
//!
//! Does not know messages or shapes of error bodies; `proto::wire` carries the number, the HTTP
//! edge the name and the status.
//!
//! Invariant: names and numbers are never reused; a code that goes away leaves its number unused.

use std::fmt;

macro_rules! codes {
    ($($(#[$meta:meta])* $variant:ident = $number:literal, $name:literal, $status:literal, $retry:ident;)*) => {
        /// What went wrong, in a word that programs may match on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$meta])* $variant,)*
        }

        impl Code {
            /// Every code, in order of number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Number on the wire.
            pub fn number(self) -> u16 {
                match self { $(Self::$variant => $number,)* }
            }

            /// Name in JSON bodies, logs and metrics.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// HTTP status it is answered with.
            pub fn http_status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// Whether the same request may succeed later without change.
            pub fn may_be_retried(self) -> bool {
                match self { $(Self::$variant => codes!(@$retry),)* }
            }
        }
    };
    (@retry) => { true };
    (@final) => { false };
}

codes! {
    /// A field is missing, of the wrong type or out of range.
    InvalidRequest = 1, "invalid_request", 400, final;
    /// The body is not JSON, or not UTF-8.
    InvalidJson = 2, "invalid_json", 400, final;
    /// No or a wrong API key.
    Unauthorized = 3, "unauthorized", 401, final;
    /// The caller is known but may not do this.
    Forbidden = 4, "forbidden", 403, final;
    /// No such route or thing.
    NotFound = 5, "not_found", 404, final;
    /// The route exists under another HTTP method.
    MethodNotAllowed = 6, "method_not_allowed", 405, final;
    /// This node serves no model of that name.
    ModelNotFound = 7, "model_not_found", 404, final;
    /// Prompt plus output does not fit the context.
    ContextLengthExceeded = 8, "context_length_exceeded", 400, final;
    /// The body or frame is longer than its limit.
    PayloadTooLarge = 9, "payload_too_large", 413, final;
    /// The body is of another content type than JSON.
    UnsupportedMediaType = 10, "unsupported_media_type", 415, final;
    /// A valid request for something this build does not do.
    Unsupported = 11, "unsupported", 400, final;
    /// Every place in the waiting line is taken; the answer says when to come back.
    QueueFull = 12, "queue_full", 429, retry;
    /// The model is being unloaded.
    ModelStopping = 13, "model_stopping", 503, retry;
    /// The model is not loaded yet.
    ModelLoading = 14, "model_loading", 503, retry;
    /// The model is loaded already, or its name is taken by another one.
    ModelExists = 15, "model_exists", 409, final;
    /// The request's own deadline passed before it was done.
    DeadlineExceeded = 16, "deadline_exceeded", 504, retry;
    /// The client took too long to send its request.
    RequestTimeout = 17, "request_timeout", 408, retry;
    /// A model file is damaged, incomplete or not what its headers say.
    WeightsInvalid = 18, "weights_invalid", 422, final;
    /// The architecture or weight format is not one this build runs.
    ModelUnsupported = 19, "model_unsupported", 422, final;
    /// The memory plan does not fit what the node may use.
    InsufficientMemory = 20, "insufficient_memory", 507, final;
    /// A fault of the node; its log has the cause.
    Internal = 21, "internal", 500, final;
    /// The node is up but no token came out lately.
    NotReady = 22, "not_ready", 503, retry;
    /// The node is going down.
    ShuttingDown = 23, "shutting_down", 503, retry;
    /// The client went away; seen in logs and metrics only.
    ClientGone = 24, "client_gone", 499, final;
    /// Bytes that are not a frame, or a frame whose body is not what its header says.
    BadFrame = 25, "bad_frame", 400, final;
    /// A frame of a type that has no place here.
    UnknownMessage = 26, "unknown_message", 400, final;
    /// A known message in a version or layout this build does not speak.
    VersionMismatch = 27, "version_mismatch", 400, final;
    /// As many calls run already as this connection may have.
    TooManyCalls = 28, "too_many_calls", 429, retry;
    /// The first line and the header fields of a request are longer than their limit.
    HeadTooLarge = 29, "head_too_large", 431, final;
    /// The tenant is over one of its own caps; the answer says when there is room under it again.
    RateLimited = 30, "rate_limited", 429, retry;
    /// Too many long request bodies arrive at once.
    BodyBudgetFull = 36, "body_budget_full", 503, retry;
}

impl Code {
    /// The code of a wire number; `None` for one that a newer release added.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.number() == number)
    }

    /// The code of a name; `None` when there is none.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.name() == name)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_lead_back_to_their_code() {
        for &code in Code::ALL {
            assert_eq!(Code::from_number(code.number()), Some(code));
            assert_eq!(Code::from_name(code.name()), Some(code));
            assert!((400..600).contains(&code.http_status()), "{code}");
        }
        assert_eq!(Code::from_number(0), None);
        assert_eq!(Code::from_name("teapot"), None);
    }
}
