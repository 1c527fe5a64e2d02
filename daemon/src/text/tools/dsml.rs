//! Calls in DSML, the markup of V3.2, V4 and V4.1: a tag for each call and one for each argument.
//!
//! Arguments come out as the JSON object that they make, while they come: strings are escaped, everything else is JSON already.

use serde_json::Value;

use super::{HEAD_LEN_MAX, ToolPart, before};

/// What all tags begin with, a token of the models' vocabularies.
pub const DSML: &str = "｜DSML｜";

/// What is behind `｜DSML｜` in tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DsmlTags {
    /// Around all calls of an answer.
    pub block: &'static str,
    /// Around a call.
    pub invoke: &'static str,
    /// Around an argument.
    pub parameter: &'static str,
}

impl DsmlTags {
    /// V3.2's.
    pub const V32: Self = Self {
        block: "function_calls",
        invoke: "invoke",
        parameter: "parameter",
    };
    /// V4's.
    pub const V4: Self = Self {
        block: "tool_calls",
        ..Self::V32
    };
    /// V4.1's.
    pub const V41: Self = Self {
        block: " calls",
        invoke: " invoke",
        parameter: " parameter",
    };
}

/// See the module.
#[derive(Debug)]
pub(in crate::text) struct DsmlParser {
    marks: Marks,
    state: State,
    held: String,
    /// What was taken since the last thing that came out, for when it is no call after all.
    taken: String,
    n_calls: usize,
    /// Of the call that began last.
    n_arguments: usize,
}

#[derive(Debug)]
struct Marks {
    open: String,
    close: String,
    invoke: String,
    invoke_end: String,
    parameter: String,
    parameter_end: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Content,
    /// Between calls.
    Block,
    /// In the name of a call.
    Name,
    /// Between arguments.
    Arguments,
    /// In the head of an argument.
    ArgumentHead,
    Value {
        is_string: bool,
    },
    /// In arguments that are one JSON object, as models write them now and then.
    Object,
}

impl DsmlParser {
    /// A parser at the start of an answer.
    pub(super) fn new(tags: DsmlTags) -> Self {
        let DsmlTags {
            block,
            invoke,
            parameter,
        } = tags;
        Self {
            marks: Marks {
                open: format!("<{DSML}{block}>"),
                close: format!("</{DSML}{block}>"),
                invoke: format!("<{DSML}{invoke} name=\""),
                invoke_end: format!("</{DSML}{invoke}>"),
                parameter: format!("<{DSML}{parameter} name=\""),
                parameter_end: format!("</{DSML}{parameter}>"),
            },
            state: State::Content,
            held: String::new(),
            taken: String::new(),
            n_calls: 0,
            n_arguments: 0,
        }
    }

    /// Takes text and returns what it brought.
    pub(super) fn push(&mut self, text: &str) -> Vec<ToolPart> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while let Some(next) = self.advance(&mut parts) {
            self.state = next;
        }
        parts
    }

    /// What was held back, when nothing more comes.
    pub(super) fn finish(&mut self) -> Vec<ToolPart> {
        let held = std::mem::take(&mut self.held);
        let taken = std::mem::take(&mut self.taken);
        let marks = [&self.marks.invoke, &self.marks.close];
        let is_rest = marks.iter().any(|mark| mark.starts_with(held.trim()));
        let part = match self.state {
            State::Block if 0 < self.n_calls && is_rest => return vec![],
            State::Content | State::Block | State::Name => ToolPart::Content(taken + &held),
            // A call cut short in its markup has the arguments so far.
            State::Arguments | State::ArgumentHead => return vec![],
            State::Value { is_string } => ToolPart::Arguments(value_text(&held, is_string)),
            State::Object => ToolPart::Arguments(held),
        };
        Some(part).filter(|p| !p.is_empty()).into_iter().collect()
    }

    /// Works on what is held; the state to go on in, or `None` when more text is needed.
    fn advance(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        match self.state {
            State::Content => self.content(parts),
            State::Block => self.block(parts),
            State::Name => self.name(parts),
            State::Arguments => self.arguments(parts),
            State::ArgumentHead => self.argument_head(parts),
            State::Value { is_string } => {
                let (n_certain, is_closed) = before(&self.held, &self.marks.parameter_end);
                let text: String = self.held.drain(..n_certain).collect();
                let mut text = value_text(&text, is_string);
                if is_closed {
                    self.held.drain(..self.marks.parameter_end.len());
                    text.push_str(if is_string { "\"" } else { "" });
                    self.n_arguments += 1;
                }
                show(ToolPart::Arguments(text), parts);
                is_closed.then_some(State::Arguments)
            }
            State::Object => {
                let (n_certain, is_closed) = before(&self.held, &self.marks.invoke_end);
                let n_shown = self.held[..n_certain].trim_end().len();
                show(ToolPart::Arguments(self.held[..n_shown].to_owned()), parts);
                match is_closed {
                    true => self.held.drain(..n_certain + self.marks.invoke_end.len()),
                    false => self.held.drain(..n_shown),
                };
                is_closed.then_some(State::Block)
            }
        }
    }

    fn content(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let (n_certain, is_open) = before(&self.held, &self.marks.open);
        // White space before a mark belongs to it.
        let n_text = self.held[..n_certain].trim_end().len();
        let text: String = self.held.drain(..n_text).collect();
        show(ToolPart::Content(text), parts);
        is_open.then(|| {
            self.take(n_certain - n_text + self.marks.open.len());
            State::Block
        })
    }

    fn block(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let begun = self.held.trim_start();
        let n = self.held.len() - begun.len();
        if begun.starts_with(&self.marks.invoke) {
            self.take(n + self.marks.invoke.len());
            return Some(State::Name);
        }
        if begun.starts_with(&self.marks.close) && 0 < self.n_calls {
            self.held.drain(..n + self.marks.close.len());
            return Some(State::Content);
        }
        if self.marks.invoke.starts_with(begun) || self.marks.close.starts_with(begun) {
            return None;
        }
        Some(self.give_up(parts))
    }

    fn name(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let Some(at) = self.held.find('"') else {
            return self.is_hopeless().then(|| self.give_up(parts));
        };
        let (name, behind) = self.held.split_at(at);
        if name.is_empty() || name.contains(['<', '\n']) {
            return Some(self.give_up(parts));
        }
        match behind[1..].chars().next()? {
            '>' => {}
            _ => return Some(self.give_up(parts)),
        }
        let name = name.to_owned();
        self.held.drain(..at + 2);
        self.taken.clear();
        self.n_calls += 1;
        self.n_arguments = 0;
        parts.push(ToolPart::Call(name));
        Some(State::Arguments)
    }

    fn arguments(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let begun = self.held.trim_start();
        let n = self.held.len() - begun.len();
        if begun.starts_with(&self.marks.parameter) {
            self.take(n + self.marks.parameter.len());
            return Some(State::ArgumentHead);
        }
        if begun.starts_with(&self.marks.invoke_end) {
            self.held.drain(..n + self.marks.invoke_end.len());
            self.end_arguments(parts);
            return Some(State::Block);
        }
        if begun.starts_with('{') && self.n_arguments == 0 {
            self.held.drain(..n);
            return Some(State::Object);
        }
        // The end of all calls ends this one, too.
        if begun.starts_with(&self.marks.close) {
            self.held.drain(..n + self.marks.close.len());
            self.end_arguments(parts);
            return Some(State::Content);
        }
        let marks = [
            &self.marks.parameter,
            &self.marks.invoke_end,
            &self.marks.close,
        ];
        if marks.iter().any(|mark| mark.starts_with(begun)) {
            return None;
        }
        self.end_arguments(parts);
        Some(State::Content)
    }

    /// `NAME" string="true|false">`; without the attribute it is a string.
    fn argument_head(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let Some(end) = self.held.find("\">") else {
            return self.is_hopeless().then(|| self.broken_argument(parts));
        };
        let head = &self.held[..end];
        let (name, is_string) = match head.split_once("\" string=\"") {
            Some((name, "true")) => (name, true),
            Some((name, "false")) => (name, false),
            None if !head.contains('"') => (head, true),
            _ => return Some(self.broken_argument(parts)),
        };
        let name = Value::from(name).to_string();
        let opens = if self.n_arguments == 0 { "{" } else { ", " };
        let quote = if is_string { "\"" } else { "" };
        self.held.drain(..end + 2);
        self.taken.clear();
        parts.push(ToolPart::Arguments(format!("{opens}{name}: {quote}")));
        Some(State::Value { is_string })
    }

    /// What looked like an argument is text behind the call.
    fn broken_argument(&mut self, parts: &mut Vec<ToolPart>) -> State {
        self.end_arguments(parts);
        self.give_up(parts)
    }

    fn end_arguments(&mut self, parts: &mut Vec<ToolPart>) {
        let end = if self.n_arguments == 0 { "{}" } else { "}" };
        parts.push(ToolPart::Arguments(end.to_owned()));
    }

    /// True when a head will not come to its end.
    fn is_hopeless(&self) -> bool {
        HEAD_LEN_MAX < self.held.len() || self.held.contains('\n')
    }

    /// What looked like a call is text.
    fn give_up(&mut self, parts: &mut Vec<ToolPart>) -> State {
        let text = std::mem::take(&mut self.taken);
        show(ToolPart::Content(text), parts);
        State::Content
    }

    fn take(&mut self, n: usize) {
        self.taken.extend(self.held.drain(..n));
    }
}

fn show(part: ToolPart, parts: &mut Vec<ToolPart>) {
    parts.extend(Some(part).filter(|p| !p.is_empty()));
}

/// A piece of an argument as JSON has it.
fn value_text(text: &str, is_string: bool) -> String {
    match is_string {
        true => {
            let quoted = Value::from(text).to_string();
            quoted[1..quoted.len() - 1].to_owned()
        }
        false => text.to_owned(),
    }
}
