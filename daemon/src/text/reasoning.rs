//! Splits output into reasoning (`<think>` .. `</think>`) and content.
//!
//! Pure text in, text out; knows no tokens. Line breaks right behind a tag are dropped, as
//! DeepSeek's own API does.

/// Where an output may hold reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningMode {
    /// Nowhere: thinking is off, or the model knows no tags.
    Off,
    /// It starts inside: the prompt ended in `<think>`.
    Inside,
    /// The model may open it itself, as the first thing it writes.
    MayOpen,
}

/// A part of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Reasoning(String),
    Content(String),
}

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// The splitter of one output.
#[derive(Debug)]
pub(super) struct ReasoningSplitter {
    state: State,
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Whitespace, or the beginning of `<think>`, was seen so far.
    Start,
    /// Behind `<think>`: line breaks are dropped.
    ReasoningStart,
    Reasoning,
    /// Behind `</think>`: line breaks are dropped.
    ContentStart,
    Content,
}

impl ReasoningSplitter {
    pub(super) fn new(mode: ReasoningMode) -> Self {
        let state = match mode {
            ReasoningMode::Off => State::Content,
            ReasoningMode::Inside => State::ReasoningStart,
            ReasoningMode::MayOpen => State::Start,
        };
        Self {
            state,
            held: String::new(),
        }
    }

    /// Takes text and returns what can be shown.
    pub(super) fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while let Some(next) = self.advance(&mut parts) {
            self.state = next;
        }
        parts
    }

    /// What was held back, when nothing more comes.
    pub(super) fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let part = match self.state {
            State::Start | State::Content | State::ContentStart => Part::Content(held),
            State::Reasoning | State::ReasoningStart => Part::Reasoning(held),
        };
        Some(part).filter(|p| !p.is_empty()).into_iter().collect()
    }

    pub(super) fn is_inside(&self) -> bool {
        matches!(self.state, State::ReasoningStart | State::Reasoning)
    }

    /// Works on what is held; the state to go on in, or `None` when more text is needed.
    fn advance(&mut self, parts: &mut Vec<Part>) -> Option<State> {
        match self.state {
            State::Start => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    return Some(State::ReasoningStart);
                }
                (!OPEN.starts_with(begun)).then_some(State::Content)
            }
            State::ReasoningStart => self.drop_line_breaks().then_some(State::Reasoning),
            State::ContentStart => self.drop_line_breaks().then_some(State::Content),
            State::Reasoning => {
                let close = self.held.find(CLOSE);
                let end = close.unwrap_or_else(|| self.held.len() - held_back(&self.held));
                let text: String = self.held.drain(..end).collect();
                parts.extend(Some(Part::Reasoning(text)).filter(|p| !p.is_empty()));
                close?;
                self.held.drain(..CLOSE.len());
                Some(State::ContentStart)
            }
            State::Content => {
                let text = std::mem::take(&mut self.held);
                parts.extend(Some(Part::Content(text)).filter(|p| !p.is_empty()));
                None
            }
        }
    }

    /// True when something else than line breaks is held.
    fn drop_line_breaks(&mut self) -> bool {
        let n = self.held.len() - self.held.trim_start_matches(['\n', '\r']).len();
        self.held.drain(..n);
        !self.held.is_empty()
    }
}

impl Part {
    fn is_empty(&self) -> bool {
        match self {
            Self::Reasoning(text) | Self::Content(text) => text.is_empty(),
        }
    }
}

/// Bytes of the longest end of `text` that begins `</think>`. ASCII, so any match is a border.
fn held_back(text: &str) -> usize {
    (1..CLOSE.len())
        .rev()
        .find(|n| text.ends_with(&CLOSE[..*n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Part, ReasoningMode, ReasoningSplitter};

    /// All reasoning and all content, for any pieces.
    fn run<'a>(mode: ReasoningMode, pieces: impl IntoIterator<Item = &'a str>) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(mode);
        let mut parts = Vec::new();
        for piece in pieces {
            parts.extend(splitter.push(piece));
        }
        parts.extend(splitter.finish());
        let (mut reasoning, mut content) = (String::new(), String::new());
        for part in parts {
            match part {
                Part::Reasoning(text) => {
                    assert!(content.is_empty(), "reasoning does not come back");
                    reasoning += &text;
                }
                Part::Content(text) => content += &text,
            }
        }
        (reasoning, content)
    }

    #[test]
    fn tags_split_reasoning_from_content() {
        let check = |mode, text: &str, reasoning: &str, content: &str| {
            assert_eq!(
                run(mode, [text]),
                (reasoning.to_owned(), content.to_owned()),
                "{text}"
            );
        };
        check(
            ReasoningMode::Inside,
            "\nwhy</think>\n\nbecause",
            "why",
            "because",
        );
        check(ReasoningMode::Inside, "why", "why", "");
        check(ReasoningMode::Inside, "a</thi", "a</thi", "");
        check(
            ReasoningMode::Inside,
            "a</think>b</think>",
            "a",
            "b</think>",
        );
        check(
            ReasoningMode::MayOpen,
            "\n<think>\nwhy\n</think>\nok",
            "why\n",
            "ok",
        );
        check(ReasoningMode::MayOpen, "  ok <think>", "", "  ok <think>");
        check(ReasoningMode::MayOpen, "<thin", "", "<thin");
        check(
            ReasoningMode::Off,
            "<think>x</think>",
            "",
            "<think>x</think>",
        );
    }

    proptest! {
        #[test]
        fn any_cut_splits_like_the_whole(
            words in prop::collection::vec(
                prop_oneof![
                    Just("<think>"), Just("</think>"), Just("<"), Just("</th"), Just("\n"),
                    Just("é"), Just("a"), Just(" "),
                ],
                0..10,
            ),
            inside in any::<bool>(),
        ) {
            let text = words.concat();
            let mode = if inside { ReasoningMode::Inside } else { ReasoningMode::MayOpen };
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let whole = run(mode, [text.as_str()]);
            prop_assert_eq!(&run(mode, chars.iter().map(String::as_str)), &whole);
            prop_assert_eq!(&run(mode, words), &whole);
        }
    }
}
