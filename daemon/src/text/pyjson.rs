//! JSON as Python's `json.dumps(ensure_ascii=False)` writes it: what templates' `tojson` must give.

use serde_json::Value;

/// How Python was asked to lay it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Style {
    /// Spaces per level; `None` for one line.
    pub(super) indent: Option<usize>,
    /// Between items.
    pub(super) item_separator: String,
    /// Between key and value.
    pub(super) key_separator: String,
    /// Escape everything beyond ASCII.
    pub(super) ensure_ascii: bool,
    /// Order objects by key.
    pub(super) sort_keys: bool,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            indent: None,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            ensure_ascii: false,
            sort_keys: false,
        }
    }
}

/// Writes `value`.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write(&mut out, value, style, 0);
    out
}

fn write(out: &mut String, value: &Value, style: &Style, level: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(v) => out.push_str(if *v { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&number(n)),
        Value::String(text) => write_string(out, text, style),
        Value::Array(values) => {
            write_items(out, ['[', ']'], values.iter(), style, level, |out, v| {
                write(out, v, style, level + 1);
            });
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| *key);
            }
            write_items(
                out,
                ['{', '}'],
                entries.into_iter(),
                style,
                level,
                |out, (k, v)| {
                    write_string(out, k, style);
                    out.push_str(&style.key_separator);
                    write(out, v, style, level + 1);
                },
            );
        }
    }
}

fn write_items<T>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl ExactSizeIterator<Item = T>,
    style: &Style,
    level: usize,
    mut write_item: impl FnMut(&mut String, T),
) {
    let new_line = |out: &mut String, level: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    };
    out.push(open);
    let n = items.len();
    for (i, item) in items.enumerate() {
        if i != 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, level + 1);
        write_item(out, item);
    }
    if n != 0 {
        new_line(out, level);
    }
    out.push(close);
}

/// Python's shortest form: an exponent has a sign and two digits at least.
fn number(n: &serde_json::Number) -> String {
    let text = n.to_string();
    let Some((mantissa, exponent)) = text.split_once('e') else {
        return text;
    };
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent.trim_start_matches('+')),
    };
    let mantissa = mantissa.strip_suffix(".0").unwrap_or(mantissa);
    format!("{mantissa}e{sign}{digits:0>2}")
}

fn write_string(out: &mut String, text: &str, style: &Style) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{C}' => out.push_str("\\f"),
            c if c < ' ' || (style.ensure_ascii && !c.is_ascii()) => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Style, dumps};

    #[test]
    fn json_reads_as_python_writes_it() {
        let value =
            json!({"b": [1, 2.5, -3, 1e300, 1e-7], "a": "<é\n\u{1}🙂\">", "c": {}, "d": []});
        assert_eq!(
            dumps(&value, &Style::default()),
            r#"{"b": [1, 2.5, -3, 1e+300, 1e-07], "a": "<é\n\u0001🙂\">", "c": {}, "d": []}"#
        );
        let ascii = Style {
            ensure_ascii: true,
            sort_keys: true,
            indent: Some(2),
            item_separator: ",".to_owned(),
            ..Style::default()
        };
        assert_eq!(
            dumps(&json!({"b": [1], "a": "é🙂"}), &ascii),
            "{\n  \"a\": \"\\u00e9\\ud83d\\ude42\",\n  \"b\": [\n    1\n  ]\n}"
        );
    }
}
