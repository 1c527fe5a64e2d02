//! What went wrong, what to do next, and the exit code that says so.

use std::{error::Error, fmt, io, process::ExitCode};

use dsd_proto::{
    code::Code,
    quic::{ClientError, PkiError},
};
use serde_json::json;

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// As asked.
    Done = 0,
    /// Wrong usage, or the node said no.
    Refused = 1,
    /// The answer is that something is not well.
    Unhealthy = 2,
    /// Nobody to ask.
    Unreachable = 3,
    /// No answer in time.
    TimedOut = 4,
    /// Stopped by Ctrl-C, as shells number it.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) exit: Exit,
    /// A word for programs.
    pub(crate) kind: String,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// A failure without advice.
    pub(crate) fn new(exit: Exit, kind: &str, message: impl Into<String>) -> Self {
        Self {
            exit,
            kind: kind.to_owned(),
            message: message.into(),
            hint: None,
        }
    }

    /// Adds what to do next.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// For `--json`.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        json!({"error": {"kind": self.kind, "message": self.message, "hint": self.hint}})
    }

    /// What a call to a node ended with.
    pub(crate) fn of_call(error: &ClientError) -> Self {
        let message = chain(error);
        match error {
            ClientError::Unreachable { .. } => Self::new(Exit::Unreachable, "unreachable", message)
                .hint("is dsd running? start one with `dsd dev`, or name another node with --node"),
            ClientError::Untrusted { .. } => Self::new(Exit::Unreachable, "untrusted", message)
                .hint("the certificates in --state belong to another cluster than this node"),
            ClientError::Refused { .. } => Self::new(Exit::Unreachable, "refused", message)
                .hint("are the certificates in --state of this node's cluster?"),
            ClientError::Socket(_) | ClientError::BadAddress { .. } => {
                Self::new(Exit::Unreachable, "unreachable", message)
            }
            ClientError::Lost { .. } | ClientError::BrokenOff => {
                Self::new(Exit::Unreachable, "lost", message).hint("see the node's log")
            }
            ClientError::TimedOut { .. } => Self::new(Exit::TimedOut, "timeout", message)
                .hint("allow more with --timeout, or see what the node does with `dsctl status`"),
            ClientError::Tls(_) => Self::new(Exit::Refused, "tls", message),
            ClientError::Frame(_) => Self::new(Exit::Refused, "frame", message)
                .hint("dsctl and dsd must be of the same release"),
            ClientError::Answered(reply) => {
                let code = reply.code();
                let exit = match code {
                    Code::DeadlineExceeded | Code::RequestTimeout => Exit::TimedOut,
                    Code::NotReady | Code::Internal => Exit::Unhealthy,
                    _ => Exit::Refused,
                };
                let failure = Self::new(exit, code.name(), reply.message.clone());
                match (reply.retry_after_ms, code) {
                    (Some(ms), _) => failure.hint(format!("try again in {ms} ms")),
                    (None, Code::ModelNotFound) => {
                        failure.hint("`dsctl model list` shows what there is")
                    }
                    (None, _) => failure,
                }
            }
        }
    }

    /// Why there are no usable certificates.
    pub(crate) fn of_pki(error: &PkiError) -> Self {
        let message = chain(error);
        let failure = Self::new(Exit::Refused, "certificates", message);
        match error {
            PkiError::Missing { .. } => failure.hint(
                "`dsd dev` makes certificates in its state folder at its first start; \
                 name that folder with --state",
            ),
            _ => failure,
        }
    }

    /// Output that cannot be written. A reader that has seen enough is no failure.
    pub(crate) fn of_output(error: &io::Error) -> Self {
        let exit = match error.kind() {
            io::ErrorKind::BrokenPipe => Exit::Done,
            _ => Exit::Refused,
        };
        Self::new(exit, "output", format!("cannot write the output: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "dsctl: {}", crate::output::printable(&self.message))?;
        match &self.hint {
            Some(hint) => writeln!(f, "  {hint}"),
            None => Ok(()),
        }
    }
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
