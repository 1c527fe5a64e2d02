//! Why text could not become tokens, or a tokenizer could not be opened.

use std::path::PathBuf;

use crate::weights::WeightsError;

/// Why a tokenizer or template cannot be used, or a prompt cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the checkpoint was refused.
    #[error(transparent)]
    Checkpoint(#[from] WeightsError),
    /// A tokenizer has a part that this version does not know, or an impossible value.
    #[error("`{}`: {field} is {found}, expected {expected}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The part.
        field: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The tokenizer library refused the tokenizer.
    #[error("`{}` does not make a tokenizer", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// Its reason.
        #[source]
        source: tokenizers::Error,
    },
    /// The chat template does not compile.
    #[error(
        "the model's chat template does not compile, so that it has no chat; use completions \
         ({reason})"
    )]
    Template {
        /// Where and why.
        reason: String,
    },
    /// The checkpoint has several chat templates, and none of them is for this conversation.
    #[error(
        "the model has chat templates for special purposes alone ({names}), none of them called \
         `default`; use completions"
    )]
    NoDefaultTemplate {
        /// Their names.
        names: String,
    },
    /// The checkpoint has no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// A message is not one that templates can be given.
    #[error("messages[{index}].{field} is {found}, expected {expected}")]
    Message {
        /// Number of the message, from 0.
        index: usize,
        /// The part.
        field: String,
        /// What would be accepted.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// The template itself refused the conversation (`raise_exception`).
    #[error("the chat template refuses the conversation: {message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// The template failed on the conversation or ran for too long.
    #[error("the chat template failed")]
    Render {
        /// Where and why.
        #[source]
        source: minijinja::Error,
    },
    /// The conversation uses every private-use code point, so that none is left to mark it with.
    #[error("the conversation uses every private-use code point")]
    NoMark,
    /// The prompt does not fit; found out before all of it was encoded.
    #[error("the prompt has at least {tokens_min} tokens, at most {max} fit")]
    TooLong {
        /// Tokens that it has at least.
        tokens_min: usize,
        /// Tokens that it may have.
        max: usize,
    },
    /// A stretch of text without a place to cut would take too much memory to encode.
    #[error(
        "the text has {len} bytes without a place where words surely part, at most {max} are \
         tokenised at once"
    )]
    LongWhole {
        /// Bytes of the stretch.
        len: usize,
        /// Bytes that it may have.
        max: usize,
    },
    /// The tokenizer library could not encode the text.
    #[error("the text cannot be tokenised")]
    Encode {
        /// Its reason.
        #[source]
        source: tokenizers::Error,
    },
}

impl TextError {
    /// True when another request could have succeeded: the fault is the client's, not the
    /// checkpoint's.
    pub fn is_request_fault(&self) -> bool {
        match self {
            Self::NoTemplate
            | Self::NoDefaultTemplate { .. }
            | Self::Template { .. }
            | Self::Message { .. }
            | Self::Refused { .. }
            | Self::Render { .. }
            | Self::NoMark
            | Self::TooLong { .. }
            | Self::LongWhole { .. }
            | Self::Encode { .. } => true,
            Self::Checkpoint(_) | Self::Unsupported { .. } | Self::Tokenizer { .. } => false,
        }
    }
}
