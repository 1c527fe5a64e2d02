//! What a client sees of a token stream: decoded, cut at stop strings, split at reasoning tags.
//!
//! Pure: tokens in, deltas out. Stop strings are looked for in all generated text, reasoning
//! included, as other servers do.

use std::sync::Arc;

use super::{
    decoder::OutputDecoder,
    model::TextModel,
    reasoning::{Part, ReasoningMode, ReasoningSplitter},
    stop::StopMatcher,
};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputDelta {
    /// Of the answer itself.
    Content(String),
    /// Of the reasoning in front of it.
    Reasoning(String),
}

/// What one token brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutputStep {
    /// In order; none while text is held back.
    pub deltas: Vec<OutputDelta>,
    /// A stop string was found: the generation can be cancelled, nothing more will come.
    pub stopped: bool,
}

/// The parser of one answer.
#[derive(Debug)]
pub struct OutputParser {
    decoder: OutputDecoder,
    stop: StopMatcher,
    reasoning: ReasoningSplitter,
}

impl OutputParser {
    /// A parser at the start of an answer.
    pub fn new(model: Arc<TextModel>, mode: ReasoningMode, stops: Vec<String>) -> Self {
        Self {
            decoder: OutputDecoder::new(model),
            stop: StopMatcher::new(stops),
            reasoning: ReasoningSplitter::new(mode),
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> OutputStep {
        let text = self.decoder.push(token);
        let shown = self.stop.push(&text);
        self.step(&shown)
    }

    /// Takes the end of the stream and gives what was held back.
    pub fn finish(&mut self) -> Vec<OutputDelta> {
        let text = self.decoder.finish();
        let mut shown = self.stop.push(&text);
        shown += &self.stop.finish();
        let mut deltas = self.step(&shown).deltas;
        deltas.extend(self.reasoning.finish().into_iter().map(delta));
        deltas
    }

    /// True while what comes next belongs to the reasoning, as far as can be told yet.
    pub fn in_reasoning(&self) -> bool {
        self.reasoning.is_inside()
    }

    fn step(&mut self, shown: &str) -> OutputStep {
        OutputStep {
            deltas: self.reasoning.push(shown).into_iter().map(delta).collect(),
            stopped: self.stop.is_stopped(),
        }
    }
}

fn delta(part: Part) -> OutputDelta {
    match part {
        Part::Reasoning(text) => OutputDelta::Reasoning(text),
        Part::Content(text) => OutputDelta::Content(text),
    }
}
