//! Marks text from a client so that no added token can be read out of it.
//!
//! A private-use code point that occurs nowhere in the input is put behind every character that
//! begins an added token. The template sees almost the same text, no added token survives in it,
//! and the mark is taken out again before the text is encoded.

use std::collections::HashSet;

use serde_json::{Map, Value};

/// The tags that templates look for in what the assistant said before.
const REASONING_TAGS: [&str; 2] = ["<think>", "</think>"];

/// Keys by which templates reach into messages and tools: they are the public API's words, not the
/// client's, and stay as they are.
const API_KEYS: [&str; 16] = [
    "arguments",
    "content",
    "description",
    "enum",
    "function",
    "id",
    "name",
    "parameters",
    "properties",
    "reasoning_content",
    "required",
    "role",
    "text",
    "tool_call_id",
    "tool_calls",
    "type",
];

/// A mark and where it goes.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    mark: char,
    first_chars: &'a HashSet<char>,
}

/// Private-use code points seen so far.
#[derive(Debug, Default)]
pub(super) struct UsedMarks(HashSet<char>);

fn is_private_use(c: char) -> bool {
    matches!(c, '\u{E000}'..='\u{F8FF}' | '\u{F0000}'..='\u{FFFFD}' | '\u{100000}'..='\u{10FFFD}')
}

impl UsedMarks {
    pub(super) fn add_str(&mut self, text: &str) {
        self.0.extend(text.chars().filter(|c| is_private_use(*c)));
    }

    pub(super) fn add(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.add_str(text),
            Value::Array(values) => values.iter().for_each(|v| self.add(v)),
            Value::Object(map) => {
                for (key, value) in map {
                    self.add_str(key);
                    self.add(value);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => (),
        }
    }

    /// The first code point not seen.
    pub(super) fn free(&self) -> Option<char> {
        let ranges = ['\u{E000}'..='\u{F8FF}', '\u{F0000}'..='\u{FFFFD}'];
        ranges.into_iter().flatten().find(|c| !self.0.contains(c))
    }
}

impl<'a> Guard<'a> {
    pub(super) fn new(mark: char, first_chars: &'a HashSet<char>) -> Self {
        Self { mark, first_chars }
    }

    pub(super) fn mark(&self) -> char {
        self.mark
    }

    /// `text` with marks.
    pub(super) fn text(&self, text: &str) -> String {
        let mut marked = String::with_capacity(text.len() + 16);
        for c in text.chars() {
            marked.push(c);
            if self.first_chars.contains(&c) {
                marked.push(self.mark);
            }
        }
        marked
    }

    /// Like [`Guard::text`], with `<think>` and `</think>` left alone.
    pub(super) fn assistant_text(&self, text: &str) -> String {
        let mut marked = String::with_capacity(text.len() + 16);
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let tag = REASONING_TAGS.into_iter().find(|tag| rest.starts_with(tag));
            let taken = tag.map_or_else(|| c.len_utf8(), str::len);
            marked.push_str(&rest[..taken]);
            if tag.is_none() && self.first_chars.contains(&c) {
                marked.push(self.mark);
            }
            rest = &rest[taken..];
        }
        marked
    }

    /// All strings and keys in `value` with marks.
    pub(super) fn value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text)),
            Value::Array(values) => values.iter().map(|v| self.value(v)).collect(),
            Value::Object(map) => {
                let marked: Map<String, Value> = map
                    .iter()
                    .map(|(k, v)| (self.key(k), self.value(v)))
                    .collect();
                Value::Object(marked)
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        }
    }

    /// A key of an object with marks, unless the API defines it.
    pub(super) fn key(&self, key: &str) -> String {
        match API_KEYS.contains(&key) {
            true => key.to_owned(),
            false => self.text(key),
        }
    }

    /// The text without marks.
    pub(super) fn clean(&self, text: &str) -> String {
        text.replace(self.mark, "")
    }
}
