//! Calls between marks, with arguments in JSON: V3, V3.1, Hermes and Llama.

use super::{
    HEAD_LEN_MAX, ToolMarkup, ToolPart, before,
    json::{self, CallHead, ValueEnd},
};

const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
const FENCE: &str = "```json";
const FENCE_END: &str = "```";
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const PYTHON_TAG: &str = "<|python_tag|>";

/// See the module.
#[derive(Debug)]
pub(in crate::text) struct MarkedParser {
    markup: ToolMarkup,
    state: State,
    held: String,
    /// What was taken since the last thing that came out, for when it is no call after all.
    taken: String,
    n_calls: usize,
}

#[derive(Debug, Clone)]
enum State {
    /// Nothing but white space was seen so far.
    Start,
    Content,
    /// Behind a mark that opens calls, or behind a call.
    Between,
    /// In a call, before its arguments.
    Head,
    /// In arguments that begin like JSON.
    Json(ValueEnd),
    /// In arguments that do not.
    Text,
    /// Behind arguments, in the object or the fence that held them.
    Tail(ValueEnd),
}

impl MarkedParser {
    /// A parser at the start of an answer.
    pub(in crate::text) fn new(markup: ToolMarkup) -> Self {
        Self {
            markup,
            state: State::Start,
            held: String::new(),
            taken: String::new(),
            n_calls: 0,
        }
    }

    /// Takes text and returns what it brought.
    pub(in crate::text) fn push(&mut self, text: &str) -> Vec<ToolPart> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while let Some(next) = self.advance(&mut parts) {
            self.state = next;
        }
        parts
    }

    /// What was held back, when nothing more comes.
    pub(in crate::text) fn finish(&mut self) -> Vec<ToolPart> {
        let held = std::mem::take(&mut self.held);
        let taken = std::mem::take(&mut self.taken);
        let part = match self.state {
            State::Text | State::Json(_) => ToolPart::Arguments(held),
            // Marks and line breaks behind a call.
            State::Between | State::Tail(_) if 0 < self.n_calls && is_rest(&held) => return vec![],
            _ => ToolPart::Content(taken + &held),
        };
        Some(part).filter(|p| !p.is_empty()).into_iter().collect()
    }

    /// Works on what is held; the state to go on in, or `None` when more text is needed.
    fn advance(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        match &mut self.state {
            State::Start => {
                let begun = self.held.trim_start();
                if self.markup != ToolMarkup::Llama {
                    return (!begun.is_empty()).then_some(State::Content);
                }
                if let Some(rest) = begun.strip_prefix(PYTHON_TAG) {
                    let n = self.held.len() - rest.len();
                    self.take(n);
                    return Some(State::Head);
                }
                match begun.chars().next()? {
                    '{' => Some(State::Head),
                    _ if PYTHON_TAG.starts_with(begun) => None,
                    _ => Some(State::Content),
                }
            }
            State::Content => self.content(parts),
            State::Between => self.between(parts),
            State::Head => match self.markup {
                ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => self.marked_head(parts),
                _ => self.object_head(parts),
            },
            State::Json(value) => {
                // A mark ends them whatever they are.
                let (n_certain, is_closed) = match self.markup {
                    ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => {
                        before(&self.held, CALL_END)
                    }
                    _ => (self.held.len(), false),
                };
                let (len, has_ended) = value.take(&self.held[..n_certain]);
                let text: String = self.held.drain(..len).collect();
                parts.extend(Some(ToolPart::Arguments(text)).filter(|p| !p.is_empty()));
                match has_ended {
                    true => Some(State::Tail(ValueEnd::inside_object())),
                    false => is_closed.then_some(State::Between),
                }
            }
            State::Text => {
                let (n_certain, is_closed) = before(&self.held, CALL_END);
                let text = self.held[..n_certain].trim_end();
                let text = match is_closed {
                    true => text.strip_suffix(FENCE_END).unwrap_or(text).trim_end(),
                    // What may be the end of the fence waits for what follows.
                    false => text.trim_end_matches('`').trim_end(),
                };
                let n_taken = match is_closed {
                    true => n_certain,
                    false => text.len(),
                };
                let text = text.to_owned();
                self.held.drain(..n_taken);
                parts.extend(Some(ToolPart::Arguments(text)).filter(|p| !p.is_empty()));
                is_closed.then_some(State::Between)
            }
            State::Tail(object) => match self.markup {
                ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => {
                    let begun = self.held.trim_start();
                    if let Some(rest) = begun.strip_prefix(FENCE_END) {
                        let n = self.held.len() - rest.len();
                        self.held.drain(..n);
                        return Some(State::Between);
                    }
                    (!FENCE_END.starts_with(begun)).then_some(State::Between)
                }
                _ => {
                    let (n_certain, is_closed) = before(&self.held, CLOSE);
                    let (len, has_ended) = object.take(&self.held[..n_certain]);
                    self.held.drain(..len);
                    (has_ended || is_closed).then_some(State::Between)
                }
            },
        }
    }

    fn content(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let open = match self.markup {
            ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => CALLS_BEGIN,
            ToolMarkup::Hermes => OPEN,
            // Elsewhere than at the start an object is text.
            _ => {
                let text = std::mem::take(&mut self.held);
                parts.extend(Some(ToolPart::Content(text)).filter(|p| !p.is_empty()));
                return None;
            }
        };
        let Some(at) = self.held.find(open) else {
            // White space before a mark belongs to it.
            let (n_certain, _) = before(&self.held, open);
            let n_shown = self.held[..n_certain].trim_end().len();
            let text: String = self.held.drain(..n_shown).collect();
            parts.extend(Some(ToolPart::Content(text)).filter(|p| !p.is_empty()));
            return None;
        };
        let n_text = self.held[..at].trim_end().len();
        let text: String = self.held.drain(..n_text).collect();
        parts.extend(Some(ToolPart::Content(text)).filter(|p| !p.is_empty()));
        self.take(at - n_text + open.len());
        Some(match self.markup {
            ToolMarkup::Hermes => State::Head,
            _ => State::Between,
        })
    }

    /// Between calls.
    fn between(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let begun = self.held.trim_start();
        let n = self.held.len() - begun.len();
        // Behind it: another call, or text again.
        let (goes_on, ends): (&[&str], &[&str]) = match self.markup {
            ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => {
                (&[CALL_BEGIN], &[CALL_END, CALLS_END])
            }
            ToolMarkup::Hermes => (&[OPEN], &[CLOSE]),
            _ => (&["{", PYTHON_TAG], &[";", ","]),
        };
        for mark in goes_on {
            if begun.starts_with(mark) {
                let n_mark = if *mark == "{" { 0 } else { mark.len() };
                self.take(n + n_mark);
                return Some(State::Head);
            }
        }
        for mark in ends {
            if begun.starts_with(mark) {
                self.take(n + mark.len());
                if self.n_calls == 0 {
                    return Some(self.give_up(parts));
                }
                self.taken.clear();
                return Some(State::Between);
            }
        }
        let all = goes_on.iter().chain(ends);
        if begun.is_empty() || all.into_iter().any(|mark| mark.starts_with(begun)) {
            return None;
        }
        Some(self.give_up(parts))
    }

    /// `[function] SEPARATOR NAME`, with a fence in V3.
    fn marked_head(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        let end = self.held.find(CALL_END).unwrap_or(self.held.len());
        let Some(at) = self.held[..end].find(SEPARATOR) else {
            return self.is_hopeless().then(|| self.give_up(parts));
        };
        let behind = at + SEPARATOR.len();
        let (name, n_head) = match self.markup {
            ToolMarkup::DeepseekV3 => {
                let Some(fence) = self.held[behind..end].find(FENCE) else {
                    return self.is_hopeless().then(|| self.give_up(parts));
                };
                let fence = behind + fence;
                (self.held[behind..fence].trim(), fence + FENCE.len())
            }
            _ => (self.held[..at].trim(), behind),
        };
        if name.is_empty() {
            return Some(self.give_up(parts));
        }
        // Arguments begin behind white space.
        let rest = self.held[n_head..].trim_start();
        if rest.is_empty() && end == self.held.len() {
            return None;
        }
        let next = match rest.starts_with(['{', '[']) {
            true => State::Json(ValueEnd::default()),
            false => State::Text,
        };
        let name = name.to_owned();
        let n = self.held.len() - rest.len();
        self.begin(n, name, parts);
        Some(next)
    }

    /// `{"name": .., "arguments": ..}`.
    fn object_head(&mut self, parts: &mut Vec<ToolPart>) -> Option<State> {
        match json::call_head(&self.held) {
            CallHead::More => self.is_hopeless().then(|| self.give_up(parts)),
            CallHead::Broken => Some(self.give_up(parts)),
            CallHead::Arguments { name, at } => {
                self.begin(at, name, parts);
                Some(State::Json(ValueEnd::default()))
            }
            CallHead::Whole {
                name,
                arguments,
                at,
            } => {
                self.begin(at, name, parts);
                parts.push(ToolPart::Arguments(arguments));
                Some(State::Between)
            }
        }
    }

    /// True when a call's head will not come to its end.
    fn is_hopeless(&self) -> bool {
        let close = match self.markup {
            ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => CALL_END,
            _ => CLOSE,
        };
        HEAD_LEN_MAX < self.held.len() || self.held.contains(close)
    }

    /// A call begins; `n` bytes of what is held were its head.
    fn begin(&mut self, n: usize, name: String, parts: &mut Vec<ToolPart>) {
        self.held.drain(..n);
        self.taken.clear();
        self.n_calls += 1;
        parts.push(ToolPart::Call(name));
    }

    /// What looked like a call is text.
    fn give_up(&mut self, parts: &mut Vec<ToolPart>) -> State {
        let text = std::mem::take(&mut self.taken);
        parts.extend(Some(ToolPart::Content(text)).filter(|p| !p.is_empty()));
        State::Content
    }

    fn take(&mut self, n: usize) {
        self.taken.extend(self.held.drain(..n));
    }
}

/// True for what may stand behind the last call without being text: the beginnings of marks.
fn is_rest(held: &str) -> bool {
    let held = held.trim();
    let marks = [CALL_END, CALLS_END, CLOSE, "}", ";"];
    held.is_empty() || marks.iter().any(|mark| mark.starts_with(held))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::text::tools::{DsmlTags, ToolMarkup, ToolParser, ToolPart};

    const ALL: [ToolMarkup; 6] = [
        ToolMarkup::DeepseekV3,
        ToolMarkup::DeepseekV31,
        ToolMarkup::Hermes,
        ToolMarkup::Llama,
        ToolMarkup::Dsml(DsmlTags::V32),
        ToolMarkup::Dsml(DsmlTags::V41),
    ];

    /// Content, and names with arguments, for any pieces.
    fn run<'a>(
        markup: ToolMarkup,
        pieces: impl IntoIterator<Item = &'a str>,
    ) -> (String, Vec<(String, String)>) {
        let mut parser = ToolParser::new(markup);
        let mut parts: Vec<ToolPart> = pieces.into_iter().flat_map(|p| parser.push(p)).collect();
        parts.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::new());
        for part in parts {
            match part {
                ToolPart::Content(text) => content += &text,
                ToolPart::Call(name) => calls.push((name, String::new())),
                ToolPart::Arguments(text) => calls.last_mut().unwrap().1 += &text,
            }
        }
        (content, calls)
    }

    fn check(markup: ToolMarkup, text: &str, content: &str, calls: &[(&str, &str)]) {
        let calls: Vec<_> = calls
            .iter()
            .map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned()))
            .collect();
        let expected = (content.to_owned(), calls);
        assert_eq!(run(markup, [text]), expected, "{markup:?} {text}");
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let pieces = chars.iter().map(String::as_str);
        assert_eq!(
            run(markup, pieces),
            expected,
            "{markup:?} {text} by characters"
        );
    }

    #[test]
    fn calls_of_v3_are_read() {
        let call = |name: &str, arguments: &str| {
            format!(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
            )
        };
        let all = |calls: &str| format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>");
        let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
            check(ToolMarkup::DeepseekV3, text, content, calls)
        };
        let weather = call("get_weather", "{\"city\": \"杭州 ``` {\"}");
        let arguments = "{\"city\": \"杭州 ``` {\"}";
        check(&all(&weather), "", &[("get_weather", arguments)]);
        let two = all(&format!("{weather}\n{}", call("add", "{}")));
        let calls = [("get_weather", arguments), ("add", "{}")];
        check(&format!("Let me look.\n{two}"), "Let me look.", &calls);
        check(&format!("{two}\nDone."), "\nDone.", &calls);
        // Broken ones.
        check(
            "a <｜tool▁calls▁begin｜>b",
            "a <｜tool▁calls▁begin｜>b",
            &[],
        );
        check(
            &all("x"),
            "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>",
            &[],
        );
        check(&all(""), "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>", &[]);
        let nameless = all(&call("", "{}"));
        check(&nameless, &nameless, &[]);
        check(&all(&call("f", "1, 2")), "", &[("f", "1, 2")]);
        check(
            &all(&call("f", "{\"a\": 1")),
            "",
            &[("f", "{\"a\": 1\n```")],
        );
    }

    #[test]
    fn calls_of_v31_are_read() {
        let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
            check(ToolMarkup::DeepseekV31, text, content, calls)
        };
        let two = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"a\"}<｜tool▁call▁end｜>\
                   <｜tool▁call▁begin｜>add<｜tool▁sep｜>[1]<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let calls = [("get_weather", "{\"city\": \"a\"}"), ("add", "[1]")];
        check(two, "", &calls);
        check(&format!("Both.\n\n{two}"), "Both.", &calls);
        // Cut off inside.
        let cut = "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{\"xs\": [1, 2";
        check(cut, "x", &[("add", "{\"xs\": [1, 2")]);
        let cut = "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add";
        check(cut, cut, &[]);
    }

    #[test]
    fn calls_of_hermes_are_read() {
        let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
            check(ToolMarkup::Hermes, text, content, calls)
        };
        let one = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\"}}\n</tool_call>";
        let arguments = "{\"a\": \"</tool_call>\"}";
        check(one, "", &[("f", arguments)]);
        let two = format!("Look:\n{one}\n{one}");
        check(&two, "Look:", &[("f", arguments), ("f", arguments)]);
        check(
            "<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\"}</tool_call> ok",
            " ok",
            &[("f", "{\"a\": 1}")],
        );
        check(
            "<tool_call>{\"name\": \"f\"}</tool_call>",
            "",
            &[("f", "{}")],
        );
        // A brace is missing, or one member too many.
        check(
            "<tool_call>{\"name\": \"f\", \"arguments\": {}</tool_call>",
            "",
            &[("f", "{}")],
        );
        check(
            "<tool_call>{\"name\": \"f\", \"arguments\": {}, \"id\": \"}\"}</tool_call>x",
            "x",
            &[("f", "{}")],
        );
        for text in [
            "<tool_call>\nnot json</tool_call> and more",
            "<tool_call>{\"name\": 5}</tool_call>",
            "a < b <tool",
            "<tool_call>",
        ] {
            check(text, text, &[]);
        }
    }

    #[test]
    fn calls_of_llama_are_read() {
        let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
            check(ToolMarkup::Llama, text, content, calls)
        };
        let one = "{\"name\": \"f\", \"parameters\": {\"a\": 1}}";
        check(one, "", &[("f", "{\"a\": 1}")]);
        check(
            &format!("<|python_tag|>{one}; {one}"),
            "",
            &[("f", "{\"a\": 1}"); 2],
        );
        for text in ["{\"a\": 1}", "hi {", " {", "<|python"] {
            check(text, text, &[]);
        }
    }

    #[test]
    fn calls_of_dsml_are_read() {
        let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
            // Written with a plain sign for the token, for the eye.
            let spelt = |text: &str| text.replace('§', "｜DSML｜");
            check(
                ToolMarkup::Dsml(DsmlTags::V4),
                &spelt(text),
                &spelt(content),
                calls,
            );
        };
        let open = "<§tool_calls>\n<§invoke name=\"f\">\n";
        let close = "</§invoke>\n</§tool_calls>";
        let a = "<§parameter name=\"a\" string=\"false\">1</§parameter>\n";
        check(
            &format!("x\n\n{open}{a}{close}\n"),
            "x\n",
            &[("f", "{\"a\": 1}")],
        );
        check(&format!("{open}{close} and"), " and", &[("f", "{}")]);
        // The attribute left out, an object instead of tags, an end left out.
        check(
            &format!("{open}<§parameter name=\"a\">\"</§parameter>{close}"),
            "",
            &[("f", r#"{"a": "\""}"#)],
        );
        check(
            &format!("{open}{{\"a\": [1]}}\n{close}"),
            "",
            &[("f", "{\"a\": [1]}")],
        );
        check(
            &format!("{open}{a}</§tool_calls>"),
            "",
            &[("f", "{\"a\": 1}")],
        );
        // What is no argument stands behind the call.
        check(
            &format!("{open}{a}well{close}"),
            &format!("\nwell{close}"),
            &[("f", "{\"a\": 1}")],
        );
        let broken = "<§parameter name=\"b\" string=\"maybe\">2</§parameter>";
        check(
            &format!("{open}{a}{broken}{close}"),
            &format!("\n{broken}{close}"),
            &[("f", "{\"a\": 1}")],
        );
        // Cut short.
        check(
            &format!("{open}<§parameter name=\"a\" string=\"true\">x</§par"),
            "",
            &[("f", "{\"a\": \"x</｜DSML｜par")],
        );
        check(&format!("{open}{a}<§para"), "", &[("f", "{\"a\": 1")]);
        for text in [
            "<§tool_calls>",
            "<§tool_calls>\n<§invoke name=",
            "<§tool_calls>\n<§invoke name=\"\">",
            "<§tool_calls>\n<§invoke name=\"f\"/>",
            "<§tool_calls></§tool_calls>",
            "<§invoke name=\"f\">",
            "a <§ b",
        ] {
            check(text, text, &[]);
        }
    }

    proptest! {
        #[test]
        fn any_cut_reads_like_the_whole_and_nothing_is_lost(
            words in prop::collection::vec(
                prop_oneof![
                    Just("<｜tool▁calls▁begin｜>"), Just("<｜tool▁calls▁end｜>"), Just("<｜tool▁call▁begin｜>"),
                    Just("<｜tool▁call▁end｜>"), Just("function<｜tool▁sep｜>f"), Just("f<｜tool▁sep｜>"),
                    Just("```json\n"), Just("```"), Just("<tool_call>"), Just("</tool_call>"), Just("\n"),
                    Just("{\"name\": \"f\", \"arguments\": "), Just("{\"a\": 1}"), Just("}"), Just("é"), Just(" a"),
                    Just("<｜DSML｜function_calls>"), Just("</｜DSML｜function_calls>"), Just("<｜DSML｜invoke name=\"f\">"),
                    Just("</｜DSML｜invoke>"), Just("<｜DSML｜parameter name=\"a\" string=\"true\">"),
                    Just("</｜DSML｜parameter>"), Just("<｜DSML｜ calls>"), Just("<｜DSML｜ invoke name=\"f\">"),
                ],
                0..16,
            ),
        ) {
            let text = words.concat();
            let chars: Vec<String> = text.chars().map(String::from).collect();
            for markup in ALL {
                let whole = run(markup, [text.as_str()]);
                prop_assert_eq!(&run(markup, chars.iter().map(String::as_str)), &whole);
                prop_assert_eq!(&run(markup, words.iter().copied()), &whole);
                if whole.1.is_empty() {
                    prop_assert_eq!(&whole.0, &text, "no call, so all of it is content");
                }
            }
        }
    }
}
