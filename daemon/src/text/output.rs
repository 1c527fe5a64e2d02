//! What a client sees of a token stream: decoded, split at reasoning tags, calls of tools taken out,
//! cut at stop strings.
//!
//! Pure: tokens in, deltas out. Stop strings are looked for in the answer's text alone: thoughts and
//! arguments of calls are not what a client wrote them for.

use std::sync::Arc;

use super::{
    decoder::OutputDecoder,
    model::TextModel,
    reasoning::{Part, ReasoningMode, ReasoningSplitter},
    stop::StopMatcher,
    tools::{ToolMarkup, ToolParser, ToolPart},
};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputDelta {
    /// Of the answer itself.
    Content(String),
    /// Of the reasoning in front of it.
    Reasoning(String),
    /// A call of this function begins.
    ToolCall(String),
    /// Of the arguments of the call that began last.
    ToolArguments(String),
}

impl OutputDelta {
    /// The new text, whatever it belongs to.
    pub fn text(&self) -> &str {
        match self {
            Self::Content(text)
            | Self::Reasoning(text)
            | Self::ToolCall(text)
            | Self::ToolArguments(text) => text,
        }
    }
}

/// What one token brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutputStep {
    /// In order; none while text is held back.
    pub deltas: Vec<OutputDelta>,
    /// A stop string was found, or a call too many: the generation can be cancelled, nothing more
    /// will come.
    pub stopped: bool,
}

/// How an answer is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputForm {
    /// Whether and where thoughts are told from content.
    pub reasoning: ReasoningMode,
    /// How calls are written, where they are looked for.
    pub tools: Option<ToolMarkup>,
    /// Calls that an answer may have; the next one ends it.
    pub tool_calls_max: usize,
}

impl OutputForm {
    /// All text is content.
    pub const PLAIN: Self = Self {
        reasoning: ReasoningMode::Off,
        tools: None,
        tool_calls_max: usize::MAX,
    };
}

/// The parser of one answer.
#[derive(Debug)]
pub struct OutputParser {
    decoder: OutputDecoder,
    reasoning: ReasoningSplitter,
    tools: Option<ToolParser>,
    n_tool_calls: usize,
    tool_calls_max: usize,
    stop: StopMatcher,
    is_over: bool,
}

impl OutputParser {
    /// A parser at the start of an answer.
    pub fn new(model: Arc<TextModel>, form: &OutputForm, stops: Vec<String>) -> Self {
        Self {
            decoder: OutputDecoder::new(model, form.tools),
            reasoning: ReasoningSplitter::new(form.reasoning),
            tools: form.tools.map(ToolParser::new),
            n_tool_calls: 0,
            tool_calls_max: form.tool_calls_max,
            stop: StopMatcher::new(stops),
            is_over: false,
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> OutputStep {
        let text = self.decoder.push(token);
        let parts = self.reasoning.push(&text);
        let mut deltas = Vec::new();
        self.read(parts, &mut deltas);
        OutputStep {
            deltas,
            stopped: self.is_over,
        }
    }

    /// Takes the end of the stream and gives what was held back.
    pub fn finish(&mut self) -> Vec<OutputDelta> {
        let text = self.decoder.finish();
        let mut parts = self.reasoning.push(&text);
        parts.extend(self.reasoning.finish());
        let mut deltas = Vec::new();
        self.read(parts, &mut deltas);
        let rest = self.tools.as_mut().map_or(vec![], ToolParser::finish);
        rest.into_iter()
            .for_each(|part| self.show(part, &mut deltas));
        if !self.is_over {
            content(self.stop.finish(), &mut deltas);
        }
        deltas
    }

    /// True while what comes next belongs to the reasoning, as far as can be told yet.
    pub fn in_reasoning(&self) -> bool {
        self.reasoning.is_inside()
    }

    /// Calls begun so far.
    pub fn n_tool_calls(&self) -> usize {
        self.n_tool_calls
    }

    /// The stop string that ended the answer.
    pub fn stop_string(&self) -> Option<&str> {
        self.stop.found()
    }

    fn read(&mut self, parts: Vec<Part>, deltas: &mut Vec<OutputDelta>) {
        for part in parts {
            match part {
                Part::Reasoning(text) => deltas.push(OutputDelta::Reasoning(text)),
                Part::Content(text) => match &mut self.tools {
                    None => self.show(ToolPart::Content(text), deltas),
                    Some(tools) => {
                        let parts = tools.push(&text);
                        parts.into_iter().for_each(|part| self.show(part, deltas));
                    }
                },
            }
        }
    }

    fn show(&mut self, part: ToolPart, deltas: &mut Vec<OutputDelta>) {
        if self.is_over {
            return;
        }
        match part {
            ToolPart::Content(text) => {
                content(self.stop.push(&text), deltas);
                self.is_over = self.stop.is_stopped();
            }
            ToolPart::Call(_) if self.n_tool_calls == self.tool_calls_max => self.is_over = true,
            ToolPart::Call(name) => {
                self.n_tool_calls += 1;
                // No stop string reaches over a call.
                content(self.stop.finish(), deltas);
                deltas.push(OutputDelta::ToolCall(name));
            }
            ToolPart::Arguments(text) => deltas.push(OutputDelta::ToolArguments(text)),
        }
    }
}

fn content(text: String, deltas: &mut Vec<OutputDelta>) {
    if !text.is_empty() {
        deltas.push(OutputDelta::Content(text));
    }
}
