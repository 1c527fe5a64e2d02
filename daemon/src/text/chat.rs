//! Conversations to prompts: prepares messages for the template or the model's encoder, renders, encodes.
//!
//! Invariant: no character of a message, tool or template argument becomes part of an added token,
//! except `<think>` and `</think>` in what the assistant said before.

use serde_json::{Map, Value, json};

use super::{
    encoding::{ChatEncoding, Effort, Settings},
    error::TextError,
    guard::{Guard, UsedMarks},
    model::TextModel,
    output::OutputForm,
    reasoning::ReasoningMode,
    template::ChatTemplates,
    tools::{ToolMarkup, prompt},
};

/// What a conversation is rendered with, besides its messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatOptions {
    /// Open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// The template's reasoning switch (`thinking`, `enable_thinking`); `None` leaves its default.
    pub thinking: Option<bool>,
    /// Tools offered, a list as in the public API.
    pub tools: Option<Value>,
    /// Where the template shows no tools they are described in the system turn, and calls and results
    /// become text where it knows none; else both are left to the template, as transformers does.
    pub describe_tools: bool,
    /// The schema that the answer will follow, for models that are told of it by their encoder.
    pub schema: Option<Value>,
    /// The last message is an assistant's, and the prompt ends inside it.
    pub continues: bool,
    /// Further variables for the template; they win over all others but the messages.
    pub template_kwargs: Map<String, Value>,
    /// Encoding stops once it is certain that there are more tokens; `None` sets no limit.
    pub tokens_max: Option<usize>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatPrompt {
    /// Tokens, BOS included where the template writes it.
    pub ids: Vec<u32>,
    /// The same as text.
    pub text: String,
    /// The prompt ends in `<think>`: the answer starts with reasoning.
    pub starts_in_reasoning: bool,
    /// How the answer is to be read.
    pub form: OutputForm,
}

/// Roles that templates are given.
const ROLES: [&str; 7] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "latest_reminder",
];

/// How messages are made ready for what renders them.
#[derive(Debug, Clone, Copy)]
struct Preparation {
    /// Arguments of calls become values; else they stay the text that they are.
    parses_arguments: bool,
    /// A message without content has an empty one; else null.
    fills_content: bool,
    /// Between the parts of a content.
    part_separator: &'static str,
    /// `<think>` and `</think>` in what the assistant said are tokens.
    keeps_reasoning_tags: bool,
}

/// What a template or an encoder made of a conversation.
struct Rendered {
    marked: String,
    markup: ToolMarkup,
    knows_reasoning: bool,
}

impl TextModel {
    /// Renders a conversation with the model's template and encodes it. Messages are objects as in
    /// the public API; content is a string, null, or a list of text parts.
    ///
    /// # Errors
    /// [`TextError`]; [`TextError::is_request_fault`] tells whose fault it is.
    pub fn render_chat(
        &self,
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<ChatPrompt, TextError> {
        let sources = self.templates().map_or(&[][..], ChatTemplates::sources);
        let guard = self.guard(sources, messages, options)?;
        let (messages, begun) = match messages.split_last() {
            Some((last, before)) if options.continues => (before, Some(last)),
            _ => (messages, None),
        };
        let rendered = match (self.templates(), self.encoding()) {
            (Some(templates), _) => self.by_template(templates, messages, options, &guard)?,
            (None, Some(encoding)) => by_encoding(encoding, messages, options, &guard)?,
            (None, None) => return Err(TextError::NoTemplate),
        };
        let Rendered {
            mut marked,
            markup,
            knows_reasoning,
        } = rendered;
        let goes_on_inside = begun.map(|begun| continue_with(&mut marked, begun, &guard));
        let ids = self.encode_marked(
            &marked,
            Some(guard.mark()),
            options.tokens_max.unwrap_or(usize::MAX),
        )?;
        let end = marked.trim_end();
        let starts_in_reasoning = goes_on_inside.unwrap_or_else(|| end.ends_with("<think>"));
        let closed = goes_on_inside.is_some() || end.ends_with("</think>");
        let reasoning = match options.thinking {
            _ if starts_in_reasoning => ReasoningMode::Inside,
            Some(false) => ReasoningMode::Off,
            _ if closed || !knows_reasoning => ReasoningMode::Off,
            _ => ReasoningMode::MayOpen,
        };
        Ok(ChatPrompt {
            ids,
            text: guard.clean(&marked),
            starts_in_reasoning,
            form: OutputForm {
                reasoning,
                tools: options.tools.as_ref().map(|_| markup),
                tool_calls_max: usize::MAX,
            },
        })
    }

    fn by_template(
        &self,
        templates: &ChatTemplates,
        messages: &[Value],
        options: &ChatOptions,
        guard: &Guard<'_>,
    ) -> Result<Rendered, TextError> {
        let markup = templates.tool_markup().unwrap_or(ToolMarkup::Hermes);
        let render = |fills_content| -> Result<String, TextError> {
            let preparation = Preparation {
                parses_arguments: templates.wants_parsed_arguments(),
                fills_content,
                part_separator: "",
                keeps_reasoning_tags: true,
            };
            let mut prepared = prepare_all(messages, guard, preparation)?;
            if options.describe_tools && templates.tool_markup().is_none() {
                prepared = prompt::as_text(prepared);
            }
            if let Some(tools) = &options.tools
                && options.describe_tools
                && !templates.shows_tools()
            {
                let text = prompt::describe(markup, tools, guard);
                prompt::into_system_turn(&mut prepared, &text);
            }
            let context = self.context(prepared, options, guard);
            templates.render(&context, options.tools.is_some())
        };
        // Some templates want null for an absent content (V2.5 and later tell a tool call by it),
        // others fail on it (V2, R1-0528-Qwen3).
        let marked = match render(false) {
            Err(TextError::Render { .. }) if messages.iter().any(lacks_content) => render(true)?,
            other => other?,
        };
        Ok(Rendered {
            marked,
            markup,
            knows_reasoning: templates.knows_reasoning(),
        })
    }

    /// A guard whose mark occurs in nothing that is rendered.
    fn guard(
        &self,
        sources: &[String],
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<Guard<'_>, TextError> {
        let mut used = UsedMarks::default();
        messages.iter().for_each(|m| used.add(m));
        options.tools.iter().for_each(|t| used.add(t));
        options.schema.iter().for_each(|s| used.add(s));
        for (key, value) in &options.template_kwargs {
            used.add_str(key);
            used.add(value);
        }
        sources.iter().for_each(|s| used.add_str(s));
        self.first_chars()
            .iter()
            .for_each(|c| used.add_str(c.encode_utf8(&mut [0; 4])));
        let mark = used.free().ok_or(TextError::NoMark)?;
        Ok(Guard::new(mark, self.first_chars()))
    }

    /// The template's variables.
    fn context(&self, messages: Vec<Value>, options: &ChatOptions, guard: &Guard<'_>) -> Value {
        let mut context = Map::new();
        let special = self.special();
        for (key, token) in [
            ("bos_token", &special.bos),
            ("eos_token", &special.eos),
            ("pad_token", &special.pad),
            ("unk_token", &special.unk),
        ] {
            if let Some(token) = token {
                context.insert(key.to_owned(), json!(token));
            }
        }
        context.insert(
            "add_generation_prompt".to_owned(),
            json!(options.add_generation_prompt),
        );
        if let Some(thinking) = options.thinking {
            context.insert("thinking".to_owned(), json!(thinking));
            context.insert("enable_thinking".to_owned(), json!(thinking));
        }
        let tools = options
            .tools
            .as_ref()
            .map_or(Value::Null, |t| guard.value(t));
        context.insert("tools".to_owned(), tools);
        context.insert("documents".to_owned(), Value::Null);
        for (key, value) in &options.template_kwargs {
            context.insert(key.clone(), guard.value(value));
        }
        context.insert("messages".to_owned(), Value::Array(messages));
        Value::Object(context)
    }
}

fn by_encoding(
    encoding: ChatEncoding,
    messages: &[Value],
    options: &ChatOptions,
    guard: &Guard<'_>,
) -> Result<Rendered, TextError> {
    let preparation = Preparation {
        parses_arguments: true,
        fills_content: true,
        part_separator: "\n\n",
        keeps_reasoning_tags: encoding.keeps_reasoning_tags(),
    };
    let prepared = prepare_all(messages, guard, preparation)?;
    let argument = |name: &str| options.template_kwargs.get(name);
    let switch = |name: &str| argument(name).and_then(Value::as_bool);
    let effort = argument("reasoning_effort").and_then(Value::as_str);
    let thinks = switch("thinking")
        .or_else(|| switch("enable_thinking"))
        .or(options.thinking)
        .or_else(|| effort.map(|word| word != "none"))
        .unwrap_or_else(|| encoding.thinks_by_default());
    let (tools, schema) = (
        options.tools.as_ref().map(|tools| guard.value(tools)),
        options.schema.as_ref().map(|schema| guard.value(schema)),
    );
    let settings = Settings {
        thinks,
        effort: effort.and_then(Effort::of_word).unwrap_or(Effort::High),
        tools: tools.as_ref(),
        schema: schema.as_ref(),
    };
    let mut marked = encoding.render(&prepared, &settings)?;
    if !options.add_generation_prompt && !options.continues {
        encoding.close(&mut marked);
    }
    Ok(Rendered {
        marked,
        markup: ToolMarkup::Dsml(encoding.tags()),
        knows_reasoning: true,
    })
}

/// Opens the assistant's turn as far as it was given: its thoughts, if any, then its text. True when
/// the answer goes on in the thoughts.
fn continue_with(marked: &mut String, begun: &Value, guard: &Guard<'_>) -> bool {
    let text_of = |key: &str| match begun.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts
            .iter()
            .filter_map(|part| part["text"].as_str())
            .collect(),
        _ => String::new(),
    };
    let (thoughts, content) = (text_of("reasoning_content"), text_of("content"));
    if marked.trim_end().ends_with("<think>") {
        let breaks_lines = marked.ends_with('\n');
        marked.push_str(&guard.text(&thoughts));
        if content.is_empty() && !thoughts.is_empty() {
            return true;
        }
        marked.push_str(match breaks_lines {
            true => "\n</think>\n\n",
            false => "</think>",
        });
    }
    marked.push_str(&guard.text(&content));
    false
}

fn lacks_content(message: &Value) -> bool {
    message.get("content").is_none_or(Value::is_null)
}

fn prepare_all(
    messages: &[Value],
    guard: &Guard<'_>,
    preparation: Preparation,
) -> Result<Vec<Value>, TextError> {
    let one = |(index, message): (usize, &_)| prepare(index, message, guard, preparation);
    messages.iter().enumerate().map(one).collect()
}

/// Checks one message and marks its strings.
fn prepare(
    index: usize,
    message: &Value,
    guard: &Guard<'_>,
    preparation: Preparation,
) -> Result<Value, TextError> {
    let refuse = |field: &str, expected: &'static str, found: &Value| TextError::Message {
        index,
        field: field.to_owned(),
        expected,
        found: found.to_string().chars().take(100).collect(),
    };
    let Some(fields) = message.as_object() else {
        return Err(refuse("(all)", "an object", message));
    };
    let role = fields.get("role").unwrap_or(&Value::Null);
    let Some(role) = role.as_str().filter(|r| ROLES.contains(r)) else {
        return Err(refuse(
            "role",
            "system, developer, user, assistant or tool",
            role,
        ));
    };
    let mark = |text: &str| match role {
        "assistant" if preparation.keeps_reasoning_tags => guard.assistant_text(text),
        _ => guard.text(text),
    };
    let content = match fields.get("content").unwrap_or(&Value::Null) {
        Value::Null if preparation.fills_content => json!(""),
        Value::Null => Value::Null,
        Value::String(text) => json!(mark(text)),
        Value::Array(parts) => {
            let mut texts = Vec::with_capacity(parts.len());
            for part in parts {
                let kind = part.get("type").and_then(Value::as_str);
                match part.get("text").and_then(Value::as_str) {
                    Some(t) if kind == Some("text") => texts.push(t),
                    _ => return Err(refuse("content", "a list of text parts", part)),
                }
            }
            json!(mark(&texts.join(preparation.part_separator)))
        }
        other => {
            return Err(refuse(
                "content",
                "a string, null or a list of text parts",
                other,
            ));
        }
    };
    let mut prepared = Map::new();
    for (key, value) in fields {
        let value = match key.as_str() {
            "role" => value.clone(),
            "content" => continue,
            "tool_calls" if preparation.parses_arguments => {
                guard.value(&with_parsed_arguments(value))
            }
            _ => guard.value(value),
        };
        prepared.insert(guard.key(key), value);
    }
    prepared.insert("content".to_owned(), content);
    Ok(Value::Object(prepared))
}

/// Tool calls with arguments as values; a string that is no JSON stays one.
fn with_parsed_arguments(tool_calls: &Value) -> Value {
    let mut tool_calls = tool_calls.clone();
    for call in tool_calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        let parsed = arguments
            .as_str()
            .and_then(|text| serde_json::from_str(text).ok());
        if let Some(parsed) = parsed {
            *arguments = parsed;
        }
    }
    tool_calls
}
