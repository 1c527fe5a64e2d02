//! Text to tokens and back: tokenizer, chat templates and encoders, incremental output parsing.
//!
//! Knows a checkpoint's tokenizer and template files; knows no request, no model and no sampling.
//!
//! Invariant: text of a conversation never becomes a special or added token, whatever it spells; only
//! chat templates, [`TextModel::encode_trusted`] and raw prompts that ask for it make those.
//! Invariant: the text of a token stream does not depend on how the stream was cut.
//!
//! `catalog` opens one [`TextModel`] per model; `gateway` renders prompts and parses output with it.

pub mod model;
pub mod chat;
pub mod output;
mod error;
mod load;
mod gguf;
mod split;
mod pieces;
mod template;
mod generation;
mod guard;
mod added;
mod vocab;
mod decoder;
mod reasoning;
mod stop;
mod tools;
mod jinja_value;
mod pyjson;
mod encoding;
#[cfg(test)]
mod tests;

pub use chat::{ChatOptions, ChatPrompt};
pub use decoder::OutputDecoder;
pub use error::TextError;
pub use load::FILE_NAMES;
pub use model::{PromptForm, TextModel};
pub use output::{OutputDelta, OutputForm, OutputParser, OutputStep};
pub use reasoning::ReasoningMode;
pub use tools::{DSML, DsmlTags, ToolMarkup};
