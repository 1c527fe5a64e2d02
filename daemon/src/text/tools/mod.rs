//! Tool calls as models write them: which markup a model uses, and reading calls out of text that
//! comes in pieces.
//!
//! Pure text in, parts out; knows no tokens and no schemas. What does not become a call comes out as
//! content, so no text is lost.

mod dsml;
mod json;
mod parser;
pub(super) mod prompt;

use self::{dsml::DsmlParser, parser::MarkedParser};
pub use dsml::{DSML, DsmlTags};

/// Bytes of a call before its arguments.
const HEAD_LEN_MAX: usize = 16 << 10;

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
    /// V3.2, V4 and V4.1: `<｜DSML｜invoke name="NAME">` with a tag for each argument.
    Dsml(DsmlTags),
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
            Self::Dsml(_) => token == DSML,
        }
    }
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ToolPart {
    /// Text that is no call.
    Content(String),
    /// A call of this function begins.
    Call(String),
    /// More of its arguments, JSON.
    Arguments(String),
}

/// The parser of one answer's tool calls.
#[derive(Debug)]
pub(super) enum ToolParser {
    Marked(MarkedParser),
    Dsml(DsmlParser),
}

impl ToolParser {
    /// A parser at the start of an answer.
    pub(super) fn new(markup: ToolMarkup) -> Self {
        match markup {
            ToolMarkup::Dsml(tags) => Self::Dsml(DsmlParser::new(tags)),
            markup => Self::Marked(MarkedParser::new(markup)),
        }
    }

    /// Takes text and returns what it brought.
    pub(super) fn push(&mut self, text: &str) -> Vec<ToolPart> {
        match self {
            Self::Marked(parser) => parser.push(text),
            Self::Dsml(parser) => parser.push(text),
        }
    }

    /// What was held back, when nothing more comes.
    pub(super) fn finish(&mut self) -> Vec<ToolPart> {
        match self {
            Self::Marked(parser) => parser.finish(),
            Self::Dsml(parser) => parser.finish(),
        }
    }
}

impl ToolPart {
    fn is_empty(&self) -> bool {
        match self {
            Self::Content(text) | Self::Arguments(text) => text.is_empty(),
            Self::Call(_) => false,
        }
    }
}

/// Bytes of `text` that are certainly before `mark`, and whether it is there.
fn before(text: &str, mark: &str) -> (usize, bool) {
    match text.find(mark) {
        Some(at) => (at, true),
        None => (text.len() - held_back(text, mark), false),
    }
}

/// Bytes of the longest end of `text` that begins `mark`.
fn held_back(text: &str, mark: &str) -> usize {
    let ends = text.char_indices().map(|(at, _)| &text[at..]);
    let mut begun = ends.filter(|end| end.len() < mark.len() && mark.starts_with(end));
    begun.next().map_or(0, str::len)
}
