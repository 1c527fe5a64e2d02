//! Grammars as text, from what a request asks for.

use serde_json::{Map, Value, json};

use super::dsml;
use crate::text::{ReasoningMode, TextModel, ToolMarkup};

/// What an answer's text has to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// JSON that follows this schema.
    Json(Value),
    /// Text that matches a regular expression from end to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of a grammar in Lark's form.
    Lark(String),
}

/// Calls that an answer is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls<'a> {
    /// How they are written.
    pub markup: ToolMarkup,
    /// Names and schemas of the functions that may be called, one at least.
    pub functions: Vec<(&'a str, &'a Map<String, Value>)>,
    /// Calls at most.
    pub max: usize,
    /// They may be left out, and text come instead or before them.
    pub are_free: bool,
}

/// Calls of one answer at most, where a request sets no limit: a model that repeats itself ends.
const CALLS_MAX: usize = 32;

/// The grammar of an answer: what comes of `answer`, or calls, or either where both are given;
/// behind thoughts where the answer has them.
pub fn write(
    text: &TextModel,
    reasoning: ReasoningMode,
    answer: Option<&Answer>,
    calls: Option<&Calls<'_>>,
) -> String {
    let mut writer = Writer {
        text,
        rules: String::new(),
        parts: Vec::new(),
    };
    let mut alternatives = Vec::new();
    if let Some(answer) = answer {
        writer.answer(answer);
        alternatives.push("answer");
    }
    if let Some(calls) = calls {
        writer.calls(calls, reasoning);
        alternatives.push(match calls.are_free {
            true => writer.text_and_calls(calls.markup),
            false => "calls",
        });
    }
    let thoughts = writer.thoughts(reasoning);
    let start = format!(
        "start: {thoughts}( {} )\n{}",
        alternatives.join(" | "),
        writer.rules
    );
    let mut grammars = vec![json!({"name": "start", "lark_grammar": start})];
    grammars.extend(writer.parts);
    json!({"grammars": grammars}).to_string()
}

/// A schema in one line, with the spaces that models are used to: white space without an end would be
/// allowed otherwise.
pub(super) fn compact(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let mut fields = fields.clone();
            let style = json!({
                "whitespace_flexible": false,
                "item_separator": ", ",
                "key_separator": ": ",
            });
            fields.insert("x-guidance".to_owned(), style);
            Value::Object(fields)
        }
        other => other.clone(),
    }
}

pub(super) struct Writer<'a> {
    text: &'a TextModel,
    /// Of the start grammar, behind its first rule.
    rules: String,
    /// Grammars that rules name.
    pub(super) parts: Vec<Value>,
}

impl Writer<'_> {
    pub(super) fn rule(&mut self, name: &str, body: &str) {
        self.rules.push_str(&format!("{name}: {body}\n"));
    }

    /// A grammar of JSON that rules can name.
    pub(super) fn part(&mut self, name: &str, schema: &Value) {
        self.parts
            .push(json!({"name": name, "json_schema": schema}));
    }

    pub(super) fn has_token(&self, word: &str) -> bool {
        self.text.added_id(word).is_some()
    }

    /// The token that reads so where there is one, else its text.
    pub(super) fn mark(&self, word: &str) -> String {
        match self.text.added_id(word) {
            Some(id) => format!("<[{id}]>"),
            None => literal(word),
        }
    }

    fn answer(&mut self, answer: &Answer) {
        let part = match answer {
            Answer::Json(schema) => json!({"name": "text", "json_schema": compact(schema)}),
            Answer::Lark(grammar) => json!({"name": "text", "lark_grammar": grammar}),
            Answer::Regex(regex) => {
                let grammar = format!("start: TEXT\nTEXT: /{}/\n", slashes_escaped(regex));
                json!({"name": "text", "lark_grammar": grammar})
            }
            Answer::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| literal(text)).collect();
                let grammar = format!("start: {}\n", texts.join(" | "));
                json!({"name": "text", "lark_grammar": grammar})
            }
        };
        self.parts.push(part);
        self.rule("answer", "@text");
    }

    fn calls(&mut self, calls: &Calls<'_>, reasoning: ReasoningMode) {
        if let ToolMarkup::Dsml(tags) = calls.markup {
            return dsml::calls(self, tags, calls, reasoning, calls.max.min(CALLS_MAX));
        }
        let mut each = Vec::new();
        for (idx, (name, schema)) in calls.functions.iter().enumerate() {
            let mut schema = (*schema).clone();
            schema.entry("type").or_insert_with(|| json!("object"));
            let part = format!("arguments_{idx}");
            self.part(&part, &compact(&Value::Object(schema)));
            let separator = self.mark("<｜tool▁sep｜>");
            let body = match calls.markup {
                ToolMarkup::DeepseekV3 => {
                    let head = literal(&format!("{name}\n```json\n"));
                    format!("\"function\" {separator} {head} @{part} \"\\n```\"")
                }
                ToolMarkup::DeepseekV31 => format!("{} {separator} @{part}", literal(name)),
                ToolMarkup::Hermes => {
                    let head = literal(&format!("{{\"name\": \"{name}\", \"arguments\": "));
                    format!("{head} @{part} \"}}\"")
                }
                ToolMarkup::Llama | ToolMarkup::Dsml(_) => {
                    let head = literal(&format!("{{\"name\": \"{name}\", \"parameters\": "));
                    format!("{head} @{part} \"}}\"")
                }
            };
            let rule = format!("call_{idx}");
            self.rule(&rule, &body);
            each.push(rule);
        }
        let any = format!("( {} )", each.join(" | "));
        let opening = self.opening(calls.markup);
        let (between, last, open, close) = match calls.markup {
            ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => (
                match calls.markup {
                    ToolMarkup::DeepseekV3 => literal("\n"),
                    _ => String::new(),
                },
                self.mark("<｜tool▁calls▁end｜>"),
                self.mark("<｜tool▁call▁begin｜>"),
                self.mark("<｜tool▁call▁end｜>"),
            ),
            ToolMarkup::Hermes => (
                format!("{} {opening}", literal("\n")),
                String::new(),
                literal("\n"),
                format!("{} {}", literal("\n"), self.mark("</tool_call>")),
            ),
            ToolMarkup::Llama | ToolMarkup::Dsml(_) => {
                (literal("; "), String::new(), String::new(), String::new())
            }
        };
        self.rule("call", &format!("{open} {any} {close}"));
        let more = match calls.max.min(CALLS_MAX) {
            0 | 1 => String::new(),
            max => format!("more{{0,{}}}", max - 1),
        };
        if !more.is_empty() {
            self.rule("more", &format!("{between} call"));
        }
        self.rule("opened", &format!("call {more} {last}"));
        self.rule("calls", &format!("{opening} opened"));
    }

    /// What calls begin with.
    fn opening(&self, markup: ToolMarkup) -> String {
        opening_word(markup).map_or_else(String::new, |word| self.mark(word))
    }

    /// The rule for text with calls behind it, where there are any. The text has nothing that whoever
    /// reads the answer takes for their beginning.
    fn text_and_calls(&mut self, markup: ToolMarkup) -> &'static str {
        if let ToolMarkup::Dsml(tags) = markup {
            return dsml::text_and_calls(self, tags);
        }
        let Some(word) = opening_word(markup) else {
            self.rule("text_or_calls", "calls | TEXT?");
            self.rule("TEXT", "/[ \\t\\r\\n]*[^ \\t\\r\\n{](.|\\n)*/");
            return "text_or_calls";
        };
        let without = format!("/(.|\\n)+/ & ~/(.|\\n)*{word}(.|\\n)*/");
        self.rule("TEXT", &without);
        match self.text.added_id(word) {
            Some(_) => self.rule("text_or_calls", "TEXT? calls?"),
            None => {
                self.rule("text_or_calls", "TEXT? | leading opened");
                let leading = format!("leading[suffix={}]", literal(word));
                self.rule(&leading, "/(.|\\n)*/");
            }
        }
        "text_or_calls"
    }

    /// What stands before the answer, for the first rule.
    fn thoughts(&mut self, reasoning: ReasoningMode) -> &'static str {
        if reasoning == ReasoningMode::Off {
            return "";
        }
        // The tag spelt in letters would end them for whoever reads the text.
        let any = "/(.|\\n)+/ & ~/(.|\\n)*<\\/think>(.|\\n)*/";
        match self.text.added_id("</think>") {
            Some(id) => {
                self.rule("thoughts", &format!("THOUGHT? <[{id}]> BREAK?"));
                self.rule("THOUGHT", any);
            }
            None => {
                self.rule("thoughts", "thought BREAK?");
                self.rule("thought[suffix=\"</think>\"]", "/(.|\\n)*/");
            }
        }
        self.rule("BREAK", "/[\\r\\n]{1,4}/");
        match reasoning {
            ReasoningMode::Inside => "thoughts ",
            _ => {
                let open = self.mark("<think>");
                self.rule("thinking", &format!("{open} thoughts"));
                "thinking? "
            }
        }
    }
}

/// What calls begin with, where they have a word for it; none has a character that means more in a
/// regular expression.
fn opening_word(markup: ToolMarkup) -> Option<&'static str> {
    match markup {
        ToolMarkup::DeepseekV3 | ToolMarkup::DeepseekV31 => Some("<｜tool▁calls▁begin｜>"),
        ToolMarkup::Hermes => Some("<tool_call>"),
        ToolMarkup::Llama | ToolMarkup::Dsml(_) => None,
    }
}

/// A literal of Lark's, which escapes like JSON.
pub(super) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// A regular expression between slashes.
fn slashes_escaped(regex: &str) -> String {
    let mut escaped = String::with_capacity(regex.len() + 8);
    let mut is_escaped = false;
    for c in regex.chars() {
        match c {
            '/' if !is_escaped => escaped.push_str("\\/"),
            '\n' => escaped.push_str("\\n"),
            c => escaped.push(c),
        }
        is_escaped = c == '\\' && !is_escaped;
    }
    escaped
}
