//! What a body may look like: every known field of both request kinds, optional, with its JSON type.
//!
//! One struct for chat and plain completions: their common fields mean the same, and fields of the
//! other kind are ignored like unknown ones. Types that allow several shapes have hand-written
//! visitors, so that nothing is buffered and a type error keeps its place in the text.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor},
};

use serde_json::value::RawValue;

use super::{
    error::RequestError,
    locate,
    request::limits,
    shape::{RawFormat, RawStructured},
    tools::{RawToolCall, RawToolChoice},
};

/// Longest problem text passed on; the JSON reader quotes whole strings.
const PROBLEM_LEN_MAX: usize = 300;

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawRequest {
    pub(super) model: Option<String>,
    pub(super) messages: Option<Vec<RawMessage>>,
    pub(super) prompt: Option<RawPrompt>,
    pub(super) max_tokens: Option<u64>,
    pub(super) max_completion_tokens: Option<u64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) n: Option<u64>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<RawStreamOptions>,
    pub(super) stop: Option<OneOrMany>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) logit_bias: Option<BTreeMap<String, f64>>,
    pub(super) logprobs: Option<RawLogprobs>,
    pub(super) top_logprobs: Option<u64>,
    pub(super) seed: Option<RawSeed>,
    pub(super) user: Option<String>,
    pub(super) user_id: Option<String>,
    pub(super) service_tier: Option<String>,
    pub(super) deadline_s: Option<f64>,
    pub(super) thinking: Option<RawTyped>,
    pub(super) reasoning_effort: Option<String>,
    pub(super) chat_template_kwargs: Option<BTreeMap<String, TemplateArg>>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    pub(super) tools: Option<Vec<Box<RawValue>>>,
    pub(super) tool_choice: Option<RawToolChoice>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) continue_final_message: Option<bool>,
    pub(super) response_format: Option<RawFormat>,
    pub(super) structured_outputs: Option<RawStructured>,
    pub(super) guided_json: Option<Box<RawValue>>,
    pub(super) guided_regex: Option<String>,
    pub(super) guided_choice: Option<Vec<String>>,
    pub(super) guided_grammar: Option<String>,
    pub(super) grammar: Option<String>,
    pub(super) add_special_tokens: Option<bool>,
    pub(super) parse_special: Option<bool>,
    pub(super) enable_thinking: Option<bool>,
    // Known and refused when they ask for something.
    pub(super) min_tokens: Option<u64>,
    pub(super) include_stop_str_in_output: Option<bool>,
    pub(super) skip_special_tokens: Option<bool>,
    pub(super) prompt_logprobs: Presence,
    pub(super) echo: Option<bool>,
    pub(super) suffix: Option<String>,
    pub(super) best_of: Option<u64>,
    pub(super) functions: Presence,
    pub(super) function_call: Presence,
    pub(super) modalities: Option<Vec<String>>,
    pub(super) audio: Presence,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawMessage {
    pub(super) role: Option<String>,
    pub(super) content: Option<RawContent>,
    pub(super) reasoning_content: Option<String>,
    /// The same in the word of OpenRouter and vLLM.
    pub(super) reasoning: Option<String>,
    pub(super) name: Option<String>,
    pub(super) tool_call_id: Option<String>,
    pub(super) tool_calls: Option<Vec<RawToolCall>>,
    pub(super) function_call: Presence,
    pub(super) prefix: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawStreamOptions {
    pub(super) include_usage: Option<bool>,
}

/// An object of which only the member `type` matters.
#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawTyped {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
}

/// Reads a body that is an object.
///
/// # Errors
/// When it is no JSON object of this shape; type errors name the field.
pub(crate) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, RequestError> {
    let text = std::str::from_utf8(body).map_err(|e| RequestError::NotUtf8 {
        valid_len: e.valid_up_to(),
    })?;
    // An array would fill the fields by position.
    if text.trim_start().starts_with('[') {
        return Err(RequestError::Json {
            problem: "expected an object, found an array".into(),
        });
    }
    read("", text)
}

/// Reads the value of a member; the whole body where `param` is empty.
///
/// # Errors
/// As [`parse`].
pub(crate) fn read<'a, T: Deserialize<'a>>(param: &str, text: &'a str) -> Result<T, RequestError> {
    serde_json::from_str(text).map_err(|e| {
        let problem = e.to_string();
        if !e.is_data() {
            return RequestError::Json {
                problem: shorten(&problem, PROBLEM_LEN_MAX),
            };
        }
        let inner = locate::path_at(text, offset_of(text, e.line(), e.column()));
        let param = match inner.starts_with('[') || inner.is_empty() || param.is_empty() {
            true => format!("{param}{inner}"),
            false => format!("{param}.{inner}"),
        };
        // The place is in `param` already.
        let problem = problem
            .rsplit_once(" at line ")
            .map_or(problem.as_str(), |(start, _)| start);
        let problem = shorten(&in_json_words(problem), PROBLEM_LEN_MAX);
        if param.is_empty() {
            RequestError::Json { problem }
        } else {
            RequestError::WrongType { param, problem }
        }
    })
}

/// Names of a body's members that nothing here reads, the first of them, each shortened.
pub(super) fn unknown_fields(body: &[u8]) -> Vec<String> {
    let known = request_fields();
    let members: BTreeMap<String, IgnoredAny> = serde_json::from_slice(body).unwrap_or_default();
    let unknown = members
        .into_keys()
        .filter(|name| !known.contains(&name.as_str()));
    unknown
        .take(limits::UNKNOWN_FIELDS_MAX)
        .map(|name| shorten(&name, 64))
        .collect()
}

/// Names of the members of a request that are read.
pub(crate) fn request_fields() -> &'static [&'static str] {
    fields_of::<RawRequest>()
}

/// The names of the fields of a struct.
pub(crate) fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct FieldNames<'a>(&'a mut &'static [&'static str]);
    impl<'de> Deserializer<'de> for FieldNames<'_> {
        type Error = serde::de::value::Error;
        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(Error::custom("only names are asked for"))
        }
        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }
        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
    let mut names: &[&str] = &[];
    drop(T::deserialize(FieldNames(&mut names)));
    names
}

/// The reader's names of types in JSON's words. What the client sent stands quoted between them and is
/// left alone.
fn in_json_words(problem: &str) -> String {
    const FOUND: [(&str, &str); 4] = [
        ("invalid type: floating point ", "invalid type: number "),
        ("invalid type: sequence", "invalid type: array"),
        ("invalid type: map", "invalid type: object"),
        ("invalid type: unit value", "invalid type: null"),
    ];
    const EXPECTED: [(&str, &str); 6] = [
        ("f64", "a number"),
        ("f32", "a number"),
        ("u64", "an integer from 0 on"),
        ("u32", "an integer from 0 on"),
        ("i64", "an integer"),
        ("a sequence", "an array"),
    ];
    let Some((found, expected)) = problem.rsplit_once(", expected ") else {
        return problem.to_owned();
    };
    let begins = |(from, to): &(&str, &str)| Some(format!("{to}{}", found.strip_prefix(from)?));
    let found = FOUND
        .iter()
        .find_map(begins)
        .unwrap_or_else(|| found.to_owned());
    let word = EXPECTED.iter().find(|(from, _)| *from == expected);
    let expected = word.map_or(expected, |(_, to)| to);
    format!("{found}, expected {expected}")
}

/// At most `len_max` characters of a text.
pub(crate) fn shorten(text: &str, len_max: usize) -> String {
    match text.char_indices().nth(len_max) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Bytes up to a position counted in lines from 1 and bytes of the line.
fn offset_of(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum();
    before + column
}

/// Text, or parts.
#[derive(Debug)]
pub(crate) enum TextOrParts<T> {
    Text(String),
    Parts(Vec<T>),
}

/// Content of a message, of whose parts only text is supported.
pub(super) type RawContent = TextOrParts<RawPart>;

#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "an object")]
pub(super) struct RawPart {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) text: Option<String>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for TextOrParts<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ContentVisitor<T> {
            type Value = TextOrParts<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(TextOrParts::Text(text.to_owned()))
            }
            fn visit_string<E: Error>(self, text: String) -> Result<Self::Value, E> {
                Ok(TextOrParts::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(TextOrParts::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor(PhantomData))
    }
}

/// One string or a list of strings.
#[derive(Debug)]
pub(super) struct OneOrMany(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = OneOrMany;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut list = Vec::new();
                while let Some(text) = seq.next_element()? {
                    list.push(text);
                }
                Ok(OneOrMany(list))
            }
        }
        deserializer.deserialize_any(ListVisitor)
    }
}

/// `prompt` of plain completions: one or many texts or token lists.
#[derive(Debug)]
pub(super) enum RawPrompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
    Empty,
}

impl<'de> Deserialize<'de> for RawPrompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

/// An element of a `prompt` list; the first one decides what the others must be.
enum PromptElement {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = RawPrompt;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a string, a list of strings, a list of token ids or a list of lists of token ids",
        )
    }
    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(RawPrompt::Text(text.to_owned()))
    }
    fn visit_string<E: Error>(self, text: String) -> Result<Self::Value, E> {
        Ok(RawPrompt::Text(text))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        fn rest<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(
            first: T,
            seq: &mut A,
        ) -> Result<Vec<T>, A::Error> {
            let mut list = vec![first];
            while let Some(element) = seq.next_element()? {
                list.push(element);
            }
            Ok(list)
        }
        Ok(match seq.next_element()? {
            None => RawPrompt::Empty,
            Some(PromptElement::Text(first)) => RawPrompt::Texts(rest(first, &mut seq)?),
            Some(PromptElement::Token(first)) => RawPrompt::Tokens(rest(first, &mut seq)?),
            Some(PromptElement::Tokens(first)) => RawPrompt::TokenLists(rest(first, &mut seq)?),
        })
    }
}

impl<'de> Deserialize<'de> for PromptElement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = PromptElement;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(PromptElement::Text(text.to_owned()))
            }
            fn visit_u64<E: Error>(self, id: u64) -> Result<Self::Value, E> {
                let id = u32::try_from(id)
                    .map_err(|_| E::invalid_value(Unexpected::Unsigned(id), &self))?;
                Ok(PromptElement::Token(id))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(PromptElement::Tokens(ids))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// A flag for chat, a count for plain completions.
#[derive(Debug, Clone, Copy)]
pub(super) enum RawLogprobs {
    Flag(bool),
    Count(u64),
}

impl<'de> Deserialize<'de> for RawLogprobs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LogprobsVisitor;
        impl Visitor<'_> for LogprobsVisitor {
            type Value = RawLogprobs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean (chat) or a count (completions)")
            }
            fn visit_bool<E: Error>(self, flag: bool) -> Result<Self::Value, E> {
                Ok(RawLogprobs::Flag(flag))
            }
            fn visit_u64<E: Error>(self, count: u64) -> Result<Self::Value, E> {
                Ok(RawLogprobs::Count(count))
            }
        }
        deserializer.deserialize_any(LogprobsVisitor)
    }
}

/// Any integer of 64 bits, signed or not.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawSeed(pub(super) u64);

impl<'de> Deserialize<'de> for RawSeed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SeedVisitor;
        impl Visitor<'_> for SeedVisitor {
            type Value = RawSeed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer of at most 64 bits")
            }
            fn visit_u64<E: Error>(self, seed: u64) -> Result<Self::Value, E> {
                Ok(RawSeed(seed))
            }
            fn visit_i64<E: Error>(self, seed: i64) -> Result<Self::Value, E> {
                Ok(RawSeed(seed.cast_unsigned()))
            }
        }
        deserializer.deserialize_any(SeedVisitor)
    }
}

/// A value of `chat_template_kwargs`. Scalars only: templates need no more, and a nested value costs
/// tens of times its length in memory.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TemplateArg(pub(super) serde_json::Value);

impl<'de> Deserialize<'de> for TemplateArg {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ArgVisitor;
        impl Visitor<'_> for ArgVisitor {
            type Value = TemplateArg;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a number, a boolean or null")
            }
            fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
                Ok(TemplateArg(value.into()))
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
                Ok(TemplateArg(value.into()))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
                Ok(TemplateArg(value.into()))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
                Ok(TemplateArg(value.into()))
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
                if value.len() > limits::TEMPLATE_ARG_LEN_MAX {
                    return Err(E::custom(format_args!(
                        "a string of {} bytes, at most {} are allowed",
                        value.len(),
                        limits::TEMPLATE_ARG_LEN_MAX
                    )));
                }
                Ok(TemplateArg(value.into()))
            }
            fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
                Ok(TemplateArg(serde_json::Value::Null))
            }
        }
        deserializer.deserialize_any(ArgVisitor)
    }
}

/// Whether a field asks for anything; its content is skipped, not kept.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Absent, null or empty.
    #[default]
    Nothing,
    /// Anything else.
    Something,
}

impl<'de> Deserialize<'de> for Presence {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PresenceVisitor;
        impl<'de> Visitor<'de> for PresenceVisitor {
            type Value = Presence;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
                Ok(Presence::Nothing)
            }
            fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Presence::Something)
            }
            fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
                Ok(Presence::Something)
            }
            fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Presence::Something)
            }
            fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Presence::Something)
            }
            fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
                Ok(Presence::Something)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut presence = Presence::Nothing;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    presence = Presence::Something;
                }
                Ok(presence)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut presence = Presence::Nothing;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    presence = Presence::Something;
                }
                Ok(presence)
            }
        }
        deserializer.deserialize_any(PresenceVisitor)
    }
}
