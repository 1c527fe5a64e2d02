//! Calls in DSML as a grammar: a tag for each argument that the function's schema names.
//!
//! Strings that a schema bounds by nothing but their length or a list are written as they are; every other value is JSON. A
//! schema that says more than which arguments there are is followed by one JSON object in the place of all tags, which
//! readers of DSML know, too.

use serde_json::{Map, Value, json};

use super::write::{Calls, Writer, compact, literal};
use crate::text::{DSML, DsmlTags, ReasoningMode};

/// Members of a function's schema beside which its arguments are independent of each other.
const PLAIN_KEYS: [&str; 11] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$defs",
    "definitions",
];

/// Members of an argument's schema that do not bound its text, or by length only.
const TEXT_KEYS: [&str; 7] = [
    "type",
    "title",
    "description",
    "default",
    "examples",
    "minLength",
    "maxLength",
];

/// The rule `calls`. `max` calls at most.
pub(super) fn calls(
    writer: &mut Writer<'_>,
    tags: DsmlTags,
    calls: &Calls<'_>,
    reasoning: ReasoningMode,
    max: usize,
) {
    let DsmlTags { block, invoke, .. } = tags;
    let mark = writer.mark(DSML);
    let mut each = Vec::new();
    for (idx, (name, schema)) in calls.functions.iter().enumerate() {
        let arguments = match plain_arguments(schema) {
            Some(arguments) if arguments.is_empty() && takes_others(schema) => {
                writer.any_argument(tags);
                "any_argument*".to_owned()
            }
            Some(arguments) => {
                let numbered = arguments.into_iter().enumerate();
                let rules = numbered.map(|(n, argument)| {
                    writer.argument(tags, &format!("{idx}_{n}"), schema, &argument)
                });
                rules.collect::<Vec<_>>().join(" ")
            }
            None => {
                let part = format!("arguments_{idx}");
                let mut schema = (*schema).clone();
                schema.entry("type").or_insert_with(|| json!("object"));
                let schema = compact(&Value::Object(schema));
                writer.part(&part, &schema);
                format!("@{part} {}", literal("\n"))
            }
        };
        let head = literal(&format!("{invoke} name=\"{name}\">\n"));
        let rule = format!("call_{idx}");
        writer.rule(&rule, &format!("{head} {arguments}"));
        each.push(rule);
    }
    let any = format!("( {} )", each.join(" | "));
    let close = format!(
        "{} {mark} {}",
        literal("</"),
        literal(&format!("{invoke}>\n"))
    );
    writer.rule("call", &format!("{} {mark} {any} {close}", literal("<")));
    // Thoughts end with the line breaks that may stand here.
    let breaks = match reasoning {
        ReasoningMode::Off => format!("{}? ", literal("\n\n")),
        _ => String::new(),
    };
    let end = format!("{} {mark} {}", literal("</"), literal(&format!("{block}>")));
    writer.rule("opened", &format!("call{{1,{}}} {end}", max.max(1)));
    let open = format!(
        "{} {mark} {}",
        literal("<"),
        literal(&format!("{block}>\n"))
    );
    writer.rule("calls", &format!("{breaks}{open} opened"));
}

/// The rule for text with calls behind it, where there are any, beside [`calls`]. The text has no beginning of calls that is spelt in
/// letters.
pub(super) fn text_and_calls(writer: &mut Writer<'_>, tags: DsmlTags) -> &'static str {
    let block = tags.block;
    let word = format!("<{DSML}{block}>");
    writer.rule("TEXT", &format!("/(.|\\n)+/ & ~/(.|\\n)*{word}(.|\\n)*/"));
    match writer.has_token(DSML) {
        true => {
            let mark = writer.mark(DSML);
            let rest = literal(&format!("{block}>\n"));
            writer.rule(
                "text_or_calls",
                &format!("TEXT? | LEADING {mark} {rest} opened"),
            );
            // The text takes the beginning of the tag along.
            writer.rule(
                "LEADING",
                &format!("/(.|\\n)*</ & ~/(.|\\n)*{word}(.|\\n)*/"),
            );
        }
        false => {
            writer.rule("text_or_calls", "TEXT? | leading opened");
            let leading = format!("leading[suffix={}]", literal(&format!("{word}\n")));
            writer.rule(&leading, "/(.|\\n)*/");
        }
    }
    "text_or_calls"
}

/// An argument that a function names.
struct Argument<'a> {
    name: &'a str,
    schema: &'a Value,
    is_required: bool,
}

/// The arguments of a function whose schema says nothing else; `None` for any other.
fn plain_arguments(schema: &Map<String, Value>) -> Option<Vec<Argument<'_>>> {
    let properties: Vec<(&String, &Value)> = match schema.get("properties") {
        None => Vec::new(),
        Some(properties) => properties.as_object()?.iter().collect(),
    };
    let required: Vec<&str> = match schema.get("required") {
        None => Vec::new(),
        Some(required) => required
            .as_array()?
            .iter()
            .filter_map(Value::as_str)
            .collect(),
    };
    let is_writable =
        |name: &str| !name.is_empty() && !name.contains(['"', '<', '>', '\n', '\r', '｜']);
    let is_named = |name: &&str| properties.iter().any(|(known, _)| known == name);
    let is_plain = schema.keys().all(|key| PLAIN_KEYS.contains(&key.as_str()))
        && schema.get("type").is_none_or(|kind| kind == "object")
        && properties
            .iter()
            .all(|(name, s)| is_writable(name) && stays_in_definitions(s))
        && required.iter().all(is_named);
    let arguments = properties.into_iter().map(|(name, schema)| Argument {
        name,
        schema,
        is_required: required.contains(&name.as_str()),
    });
    is_plain.then(|| arguments.collect())
}

/// True where a function takes arguments that its schema does not name.
fn takes_others(schema: &Map<String, Value>) -> bool {
    schema.get("additionalProperties") != Some(&Value::Bool(false))
}

/// True where every reference leads to the definitions that come along.
fn stays_in_definitions(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.iter().all(|(key, value)| match value {
            Value::String(target) if key == "$ref" => {
                target.starts_with("#/$defs/") || target.starts_with("#/definitions/")
            }
            value => stays_in_definitions(value),
        }),
        Value::Array(values) => values.iter().all(stays_in_definitions),
        _ => true,
    }
}

impl Writer<'_> {
    /// A text of so many characters and the end of its argument.
    fn text(&mut self, tags: DsmlTags, number: &str, chars: &str) -> String {
        let parameter = tags.parameter;
        let name = format!("TEXT_{number}");
        let end = format!("<\\/{DSML}{parameter}>");
        // The text takes the beginning of the tag behind it along: where it ends is known by the token that follows.
        let (behind, after, rest) = match self.has_token(DSML) {
            true => {
                let rest = literal(&format!("{parameter}>\n"));
                ("<\\/", "(.|\\n)*", format!("{} {rest}", self.mark(DSML)))
            }
            false => (end.as_str(), "(.|\\n)+", literal("\n")),
        };
        let pattern = format!("/(.|\\n){chars}{behind}/ & ~/(.|\\n)*{end}{after}/");
        self.rule(&name, &pattern);
        format!("{name} {rest}")
    }

    /// The rule of an argument of any name and value.
    fn any_argument(&mut self, tags: DsmlTags) {
        if self.parts.iter().any(|part| part["name"] == "any_value") {
            return;
        }
        let parameter = tags.parameter;
        let mark = self.mark(DSML);
        self.part("any_value", &compact(&json!({})));
        let name = literal(&format!("{parameter} name=\""));
        let open = format!("{} {mark} {name} ANY_NAME", literal("<"));
        let text = self.text(tags, "ANY", "*");
        let end = literal(&format!("{parameter}>\n"));
        let value = format!("@any_value {} {mark} {end}", literal("</"));
        let (is_text, is_value) = (
            literal("\" string=\"true\">"),
            literal("\" string=\"false\">"),
        );
        self.rule(
            "any_argument",
            &format!("{open} ( {is_text} {text} | {is_value} {value} )"),
        );
        self.rule("ANY_NAME", "/[^\"<>\\r\\n｜]{1,64}/");
    }

    /// The rule of an argument, by name; with a question mark where it may be left out.
    fn argument(
        &mut self,
        tags: DsmlTags,
        number: &str,
        function: &Map<String, Value>,
        argument: &Argument<'_>,
    ) -> String {
        let Argument {
            name,
            schema,
            is_required,
        } = argument;
        let parameter = tags.parameter;
        let mark = self.mark(DSML);
        let head = |is_string: bool| {
            literal(&format!(
                "{parameter} name=\"{name}\" string=\"{is_string}\">"
            ))
        };
        let end = literal(&format!("{parameter}>\n"));
        let close = format!("{} {mark} {end}", literal("</"));
        let open = literal("<");
        let body = match (texts_of(schema), text_of(schema)) {
            (Some(texts), _) => {
                let texts: Vec<String> = texts.iter().map(|text| literal(text)).collect();
                format!("{} ( {} ) {close}", head(true), texts.join(" | "))
            }
            (None, Some(chars)) => format!("{} {}", head(true), self.text(tags, number, &chars)),
            (None, None) => {
                let part = format!("value_{number}");
                let mut schema = (*schema).clone();
                if let Value::Object(schema) = &mut schema {
                    for key in ["$defs", "definitions"] {
                        if let Some(definitions) = function.get(key) {
                            schema.entry(key).or_insert_with(|| definitions.clone());
                        }
                    }
                }
                self.part(&part, &compact(&schema));
                format!("{} @{part} {close}", head(false))
            }
        };
        let rule = format!("argument_{number}");
        self.rule(&rule, &format!("{open} {mark} {body}"));
        match is_required {
            true => rule,
            false => format!("{rule}?"),
        }
    }
}

/// The texts of a list of texts.
fn texts_of(schema: &Value) -> Option<Vec<&str>> {
    let fields = schema.as_object()?;
    let only = |key: &str| {
        fields
            .keys()
            .all(|k| k == key || k == "type" || k == "description" || k == "title")
            && fields.get("type").is_none_or(|kind| kind == "string")
    };
    let is_writable = |text: &&str| !text.contains(['<', '｜']);
    match (fields.get("enum"), fields.get("const")) {
        (Some(Value::Array(values)), None) if only("enum") && !values.is_empty() => values
            .iter()
            .map(|v| v.as_str().filter(is_writable))
            .collect(),
        (None, Some(Value::String(text))) if only("const") => Some(text.as_str())
            .filter(is_writable)
            .map(|text| vec![text]),
        _ => None,
    }
}

/// How often a character repeats in a string that is bounded by length at most: a repetition of regular expressions.
fn text_of(schema: &Value) -> Option<String> {
    let fields = schema.as_object()?;
    let is_text = fields.get("type").is_some_and(|kind| kind == "string")
        && fields.keys().all(|key| TEXT_KEYS.contains(&key.as_str()));
    if !is_text {
        return None;
    }
    let bound = |key: &str| fields.get(key).map(Value::as_u64);
    match (bound("minLength"), bound("maxLength")) {
        (None, None) => Some("*".to_owned()),
        (Some(Some(min)), None) => Some(format!("{{{min},}}")),
        (None, Some(Some(max))) => Some(format!("{{0,{max}}}")),
        (Some(Some(min)), Some(Some(max))) if min <= max => Some(format!("{{{min},{max}}}")),
        _ => None,
    }
}
