//! JSON that comes in pieces: where a value ends, and the head of a tool call written as an object.

use serde_json::Value;

/// Follows one JSON value from its first character to its last.
///
/// Knows nesting and strings only: what is between them is taken as it is.
#[derive(Debug, Clone, Default)]
pub(super) struct ValueEnd {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    has_begun: bool,
}

impl ValueEnd {
    /// Behind the brace that opens an object.
    pub(super) fn inside_object() -> Self {
        Self {
            depth: 1,
            has_begun: true,
            ..Self::default()
        }
    }

    /// Bytes of `text` that belong to the value, and whether it ends there. Text is a continuation of
    /// what was given before.
    pub(super) fn take(&mut self, text: &str) -> (usize, bool) {
        for (at, c) in text.char_indices() {
            let is_scalar_end = self.depth == 0 && !self.in_string && self.has_begun;
            if is_scalar_end && (matches!(c, ',' | '}' | ']') || c.is_whitespace()) {
                return (at, true);
            }
            self.has_begun = true;
            match c {
                _ if self.is_escaped => self.is_escaped = false,
                '\\' if self.in_string => self.is_escaped = true,
                '"' => self.in_string = !self.in_string,
                _ if self.in_string => continue,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => continue,
            }
            let is_closed = self.depth == 0 && !self.in_string && matches!(c, '"' | '}' | ']');
            if is_closed {
                return (at + c.len_utf8(), true);
            }
        }
        (text.len(), false)
    }
}

/// What is known of a call that is written as `{"name": .., "arguments": ..}`, from its first bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CallHead {
    /// Nothing wrong so far.
    More,
    /// It is no such object.
    Broken,
    /// The name, and the byte at which its arguments begin, an object or an array.
    Arguments {
        /// Of the function.
        name: String,
        /// Where they begin.
        at: usize,
    },
    /// The name, all of its arguments, and the byte behind what was read.
    Whole {
        /// Of the function.
        name: String,
        /// JSON.
        arguments: String,
        /// Behind the object, or behind the arguments where they were a string.
        at: usize,
    },
}

/// Reads the head of a call; `text` is all of it so far.
pub(super) fn call_head(text: &str) -> CallHead {
    let mut reader = Reader { text, at: 0 };
    let (mut name, mut arguments) = (None, None);
    match reader.next() {
        None => return CallHead::More,
        Some('{') => reader.at += 1,
        Some(_) => return CallHead::Broken,
    }
    loop {
        match reader.next() {
            None => return CallHead::More,
            Some('}') => {
                let at = reader.at + 1;
                return match name {
                    Some(name) => CallHead::Whole {
                        name,
                        arguments: arguments.unwrap_or_else(|| "{}".to_owned()),
                        at,
                    },
                    None => CallHead::Broken,
                };
            }
            Some(',') => {
                reader.at += 1;
                continue;
            }
            Some('"') => {}
            Some(_) => return CallHead::Broken,
        }
        let Some(key) = reader.value() else {
            return CallHead::More;
        };
        match reader.next() {
            None => return CallHead::More,
            Some(':') => reader.at += 1,
            Some(_) => return CallHead::Broken,
        }
        let is_arguments = key == "\"arguments\"" || key == "\"parameters\"";
        let Some(first) = reader.next() else {
            return CallHead::More;
        };
        if is_arguments
            && matches!(first, '{' | '[')
            && let Some(name) = name.take_if(|_| true)
        {
            let at = reader.at;
            return CallHead::Arguments { name, at };
        }
        let Some(value) = reader.value() else {
            return CallHead::More;
        };
        let Ok(value) = serde_json::from_str::<Value>(value).map(|v| (v, value)) else {
            return CallHead::Broken;
        };
        match value {
            (Value::String(text), _) if key == "\"name\"" => name = Some(text),
            // Some models write the object as a string.
            (Value::String(text), _) if is_arguments => arguments = Some(text),
            (_, text) if is_arguments => arguments = Some(text.to_owned()),
            _ => {}
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// The next character that is no white space.
    fn next(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    /// The value that begins here, if its end is there.
    fn value(&mut self) -> Option<&'a str> {
        let rest = &self.text[self.at..];
        let (len, has_ended) = ValueEnd::default().take(rest);
        self.at += if has_ended { len } else { 0 };
        has_ended.then(|| &rest[..len])
    }
}

#[cfg(test)]
mod tests {
    use super::{CallHead, ValueEnd, call_head};

    #[test]
    fn a_value_ends_where_it_ends_however_it_is_cut() {
        for value in [
            r#"{"a": [1, {"b": "}\"]"}], "c": ""}"#,
            r#""x \\\" y""#,
            "[]",
            "-1.5e3",
            "true",
        ] {
            let text = format!("{value}, \"more\"");
            for cut in 0..value.len() {
                if !text.is_char_boundary(cut) {
                    continue;
                }
                let mut end = ValueEnd::default();
                let (first, has_ended) = end.take(&text[..cut]);
                assert_eq!((first, has_ended), (cut, false), "{value} at {cut}");
                assert_eq!(end.take(&text[cut..]), (value.len() - cut, true));
            }
        }
    }

    #[test]
    fn heads_of_calls_are_read_in_any_order() {
        let name = || "f".to_owned();
        let check = |text: &str, expected| assert_eq!(call_head(text), expected, "{text}");
        check("", CallHead::More);
        check(" {\"name\": \"f\", \"argu", CallHead::More);
        check("[", CallHead::Broken);
        check("{\"name\": f", CallHead::More);
        check("{\"name\": f}", CallHead::Broken);
        check("{}", CallHead::Broken);
        let text = "{\"name\": \"f\", \"arguments\": {\"a\"";
        let at = text.rfind('{').unwrap();
        check(text, CallHead::Arguments { name: name(), at });
        for (text, arguments) in [
            (r#"{"name": "f"}"#, "{}"),
            (r#"{"parameters": {"a": 1}, "name": "f"}"#, r#"{"a": 1}"#),
            (r#"{"name": "f", "arguments": "{\"a\": 1}"}"#, r#"{"a": 1}"#),
        ] {
            let expected = CallHead::Whole {
                name: name(),
                arguments: arguments.to_owned(),
                at: text.len(),
            };
            assert_eq!(call_head(&format!("{text}x")), expected, "{text}");
        }
    }
}
