//! Tool calls as models write them: which markup a model uses, and reading calls out of text that
//! comes in pieces.
//!
//! Pure text in, parts out; knows no tokens and no schemas. What does not become a call comes out as
//! content, so no text is lost.

mod json;
mod parser;
pub(super) mod prompt;

pub(super) use parser::{ToolParser, ToolPart};

/// How a model writes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolMarkup {
    /// V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, then JSON in a fence.
    DeepseekV3,
    /// V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON`.
    DeepseekV31,
    /// `<tool_call>{"name": .., "arguments": ..}</tool_call>`: Hermes, Qwen, and models whose
    /// template knows no tools.
    Hermes,
    /// Llama 3: the object with `parameters` is the whole answer.
    Llama,
}

impl ToolMarkup {
    /// The markup that a chat template writes; `None` where it knows no calls.
    pub(super) fn of_template(source: &str) -> Option<Self> {
        let has = |word| source.contains(word);
        if has("<｜tool▁calls▁begin｜>") {
            return Some(match has("```json") {
                true => Self::DeepseekV3,
                false => Self::DeepseekV31,
            });
        }
        if has("<tool_call>") {
            return Some(Self::Hermes);
        }
        (has("\"parameters\": ") && has("tool_calls")).then_some(Self::Llama)
    }

    /// True for tokens that the markup is made of; their text is needed, special or not.
    pub(super) fn is_mark(self, token: &str) -> bool {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => token.contains("tool▁"),
            Self::Hermes => token.contains("tool_call"),
            Self::Llama => token == "<|python_tag|>",
        }
    }
}
