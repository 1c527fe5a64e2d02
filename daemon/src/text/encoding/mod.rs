//! Prompts of the models that come with an encoder instead of a chat template: V3.2, V4 and V4.1.
//!
//! Takes messages whose strings are marked (see `guard`) and returns marked text; knows no tokens. The forms are
//! those of the encoders that DeepSeek publishes beside its weights (`encoding/encoding_dsv32.py`,
//! `encoding_dsv4.py`) and of its `deepseek-recipe`, whose prompts are the tests' goldens.

mod turn;
mod tools;
mod v32;
mod v4;
mod v4_0731;
mod v41;

use serde_json::{Map, Value};

use self::turn::Turn;
use super::{
    error::TextError,
    pyjson,
    tools::{DSML, DsmlTags},
};

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";
const SYSTEM: &str = "<｜System｜>";
const REMINDER: &str = "<｜latest_reminder｜>";
const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

/// Text that only the encoder of V4's weights of July 2026 and later has.
const EFFORT_0731: &str = "Beyond maximum";

/// Which encoder a model was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChatEncoding {
    /// V3.2's.
    V32,
    /// V4's, as published with its first weights.
    V4,
    /// V4's since the weights of July 2026, which know three efforts.
    V4Of0731,
    /// V4.1's.
    V41,
}

/// What a conversation is rendered with.
#[derive(Debug)]
pub(super) struct Settings<'a> {
    /// The answer begins with thoughts.
    pub(super) thinks: bool,
    /// How much of them.
    pub(super) effort: Effort,
    /// Tools offered, marked; a list as in the public API.
    pub(super) tools: Option<&'a Value>,
    /// The schema that the answer is asked to follow, marked.
    pub(super) schema: Option<&'a Value>,
}

/// DeepSeek's levels of `reasoning_effort`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effort {
    Low,
    High,
    Max,
}

impl Effort {
    /// The level that a word of the public API means; OpenAI's finer ones fall on DeepSeek's, as its own service has it.
    pub(super) fn of_word(word: &str) -> Option<Self> {
        match word {
            "minimal" | "low" => Some(Self::Low),
            "medium" | "high" | "xhigh" => Some(Self::High),
            "ultra" | "max" => Some(Self::Max),
            _ => None,
        }
    }
}

impl ChatEncoding {
    /// The encoder that belongs to a vocabulary, told by its added tokens, and to the encoder's own source where the model's
    /// folder has it; `None` where the vocabulary knows no DSML.
    pub(super) fn of_vocabulary(
        has_token: impl Fn(&str) -> bool,
        encoder_source: Option<&str>,
    ) -> Option<Self> {
        if !has_token(DSML) {
            return None;
        }
        Some(match encoder_source {
            _ if has_token(SYSTEM) => Self::V41,
            _ if !has_token(REMINDER) => Self::V32,
            Some(source) if !source.contains(EFFORT_0731) => Self::V4,
            _ => Self::V4Of0731,
        })
    }

    /// The tags that its calls are written in.
    pub(super) fn tags(self) -> DsmlTags {
        match self {
            Self::V32 => DsmlTags::V32,
            Self::V4 | Self::V4Of0731 => DsmlTags::V4,
            Self::V41 => DsmlTags::V41,
        }
    }

    /// Whether the model thinks unless a request says otherwise.
    pub(super) fn thinks_by_default(self) -> bool {
        self != Self::V32
    }

    /// True where tags of thoughts in what the assistant said before are tokens: the published encoders of V3.2 and V4 encode
    /// the prompt as a whole, the later ones encode such text as text.
    pub(super) fn keeps_reasoning_tags(self) -> bool {
        matches!(self, Self::V32 | Self::V4)
    }

    /// The prompt, which ends where the answer begins.
    ///
    /// # Errors
    /// [`TextError::Message`] for a role that the encoder does not know.
    pub(super) fn render(
        self,
        messages: &[Value],
        settings: &Settings<'_>,
    ) -> Result<String, TextError> {
        let turns = turn::read(messages)?;
        // V3.2 has no token for it.
        let reminder = turns
            .iter()
            .position(|turn| turn.role == turn::Role::Reminder);
        if let Some(index) = reminder.filter(|_| self == Self::V32) {
            return Err(TextError::Message {
                index,
                field: "role".to_owned(),
                expected: "system, developer, user, assistant or tool",
                found: "latest_reminder".to_owned(),
            });
        }
        Ok(match self {
            Self::V32 => v32::render(turns, settings),
            Self::V4 => v4::render(turns, settings),
            Self::V4Of0731 => v4_0731::render(turns, settings),
            Self::V41 => v41::render(turns, settings),
        })
    }

    /// Takes back the opening of the assistant's turn.
    pub(super) fn close(self, marked: &mut String) {
        let opened = [THINK, THINK_END].map(|tag| format!("{ASSISTANT}{tag}"));
        if let Some(rest) = opened.iter().find_map(|o| marked.strip_suffix(o.as_str())) {
            marked.truncate(rest.len());
        }
    }
}

/// JSON in one line, as the encoders write it.
fn json(value: &Value) -> String {
    pyjson::dumps(value, &pyjson::Style::default())
}

/// The tools that are offered: the function of each.
fn functions<'a>(settings: &Settings<'a>) -> Vec<&'a Value> {
    let tools = settings.tools.and_then(Value::as_array);
    tools
        .into_iter()
        .flatten()
        .map(|tool| &tool["function"])
        .collect()
}

/// A function as the newer encoders show it: with these members, in this order.
fn definition(function: &Value) -> Value {
    let or = |key: &str, default: Value| match &function[key] {
        Value::Null => default,
        value => value.clone(),
    };
    let mut definition = Map::new();
    definition.insert("name".to_owned(), function["name"].clone());
    definition.insert("description".to_owned(), or("description", "".into()));
    definition.insert("parameters".to_owned(), or("parameters", Map::new().into()));
    Value::Object(definition)
}

/// True for the schema that asks for an object and nothing else.
fn is_any_object(schema: &Value) -> bool {
    schema
        .as_object()
        .is_some_and(|s| s.len() == 1 && s.get("type").is_some_and(|t| t == "object"))
}

/// The first system turn, behind which tools and formats are shown; an empty one is put in front where there is none.
fn first_system<'t, 'a>(turns: &'t mut Vec<Turn<'a>>) -> &'t mut Turn<'a> {
    let at = turns
        .iter()
        .position(|turn| turn.role == turn::Role::System);
    let at = at.unwrap_or_else(|| {
        turns.insert(0, Turn::system(String::new()));
        0
    });
    &mut turns[at]
}
