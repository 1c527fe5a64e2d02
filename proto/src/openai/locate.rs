//! Finds which field of a JSON text a byte offset belongs to, so that a type error can name it.
//!
//! Runs only after a failure, on text whose part before the offset is well-formed.

use std::fmt::Write;

/// Deepest path reported; the JSON reader itself refuses deeper texts.
const DEPTH_MAX: usize = 128;

enum Level {
    Object { key: String, expects_key: bool },
    Array { index: usize },
}

/// Path of the value at or just before `offset`, such as `messages[1].content`; empty at the top.
pub(super) fn path_at(text: &str, offset: usize) -> String {
    let bytes = text.as_bytes();
    let mut levels: Vec<Level> = Vec::new();
    let mut at = 0;
    // A bracket right before the offset belongs to the value that was refused, not to its inside.
    let opens = |end: usize| {
        end.checked_sub(1)
            .and_then(|last| bytes.get(last))
            .is_some_and(|b| matches!(b, b'[' | b'{'))
    };
    let end = if opens(offset) { offset - 1 } else { offset };
    while at < end.min(bytes.len()) {
        match bytes[at] {
            b'{' if levels.len() < DEPTH_MAX => levels.push(Level::Object {
                key: String::new(),
                expects_key: true,
            }),
            b'[' if levels.len() < DEPTH_MAX => levels.push(Level::Array { index: 0 }),
            b'}' | b']' => drop(levels.pop()),
            b':' => {
                if let Some(Level::Object { expects_key, .. }) = levels.last_mut() {
                    *expects_key = false;
                }
            }
            b',' => match levels.last_mut() {
                Some(Level::Object { key, expects_key }) => {
                    key.clear();
                    *expects_key = true;
                }
                Some(Level::Array { index }) => *index += 1,
                None => {}
            },
            b'"' => {
                let end = string_end(bytes, at);
                if let Some(Level::Object {
                    key,
                    expects_key: true,
                }) = levels.last_mut()
                {
                    *key = text
                        .get(at + 1..end)
                        .unwrap_or("")
                        .chars()
                        .take(64)
                        .collect();
                }
                at = end;
            }
            _ => {}
        }
        at += 1;
    }
    render(&levels)
}

/// Index of the closing quote of the string that opens at `start`, or the end of the text.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at.min(bytes.len())
}

fn render(levels: &[Level]) -> String {
    let mut path = String::new();
    for level in levels {
        match level {
            Level::Object { key, .. } if key.is_empty() => {}
            Level::Object { key, .. } if path.is_empty() => path.push_str(key),
            Level::Object { key, .. } => {
                path.push('.');
                path.push_str(key);
            }
            Level::Array { index } => drop(write!(path, "[{index}]")),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(marked: &str, expected: &str) {
        let offset = marked.find('^').expect("the text has a mark");
        let text = marked.replace('^', "");
        assert_eq!(path_at(&text, offset), expected, "{marked}");
    }

    #[test]
    fn offsets_are_named_by_the_field_around_them() {
        check(r#"{"temperature": "x"^}"#, "temperature");
        check(r#"{"a": 1, "temperature": ^{}}"#, "temperature");
        check(
            r#"{"messages": [{"role": "user"}, {"content": 5^}]}"#,
            "messages[1].content",
        );
        check(r#"{"prompt": [1, 2, ^{}]}"#, "prompt[2]");
        check(r#"{"a\"b": {"c": [0, [1, 2^]]}}"#, r#"a\"b.c[1][1]"#);
        check(r#"{"s": "{[\"", "t": tru^e}"#, "t");
        check(r#"{"a": 1, "a"^: 2}"#, "a");
        check(r#"{"a": {"b": [^1]}}"#, "a.b");
        check(r#"5^"#, "");
    }

    #[test]
    fn any_text_and_offset_end_without_panic() {
        for text in ["", "\"", "\"\\", "]]]]", "{{{{\"é\"", "{\"a\\"] {
            for offset in 0..text.len() + 2 {
                let _ = path_at(text, offset);
            }
        }
    }
}
