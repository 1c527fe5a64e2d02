//! Every field of the public APIs' requests and what becomes of it: the one list behind the table of
//! docs/API.md.
//!
//! Invariant: a field that is read stands here, and a field that stands here as read is; the tests hold
//! both against the types that bodies are read into.

use std::fmt::Write;

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// It does what it says.
    Obeyed,
    /// Whatever asks for something is an error that names it.
    Refused,
    /// It changes nothing here and does no harm.
    Ignored,
}

/// One field of a request.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name in the body.
    pub name: &'static str,
    /// What becomes of it.
    pub treatment: Treatment,
    /// Range, default, or why.
    pub note: &'static str,
}

/// The fields of an API.
#[derive(Debug, Clone, Copy)]
pub struct Api {
    /// Its routes.
    pub title: &'static str,
    /// In the order of the table.
    pub fields: &'static [Field],
}

pub(crate) const fn obeyed(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        treatment: Treatment::Obeyed,
        note,
    }
}

pub(crate) const fn refused(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        treatment: Treatment::Refused,
        note,
    }
}

pub(crate) const fn ignored(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        treatment: Treatment::Ignored,
        note,
    }
}

/// All of them.
pub const APIS: [Api; 3] = [
    Api {
        title: "`/v1/chat/completions` and `/v1/completions`",
        fields: &[
            obeyed("model", "may be left out where one model is served"),
            obeyed("messages", "chats: 1 to 16,384"),
            obeyed("prompt", "completions: texts or lists of token ids"),
            obeyed(
                "max_tokens",
                "chats: whatever the context holds; completions: 16",
            ),
            obeyed("max_completion_tokens", "the same"),
            obeyed("temperature", "0 to 2; 1"),
            obeyed("top_p", "0 to 1; 1"),
            obeyed("top_k", "0 or -1 is off; 0"),
            obeyed("min_p", "0 to 1; 0"),
            obeyed("repetition_penalty", "above 0 to 10; 1"),
            obeyed("presence_penalty", "-2 to 2; 0"),
            obeyed("frequency_penalty", "-2 to 2; 0"),
            obeyed("logit_bias", "up to 1,024 tokens, -100 to 100"),
            obeyed("seed", "64 bits; a fresh one"),
            obeyed("n", "1 to 128; 1"),
            obeyed("stop", "up to 16 texts of 1 to 1,024 bytes"),
            obeyed("stop_token_ids", "up to 64"),
            obeyed("ignore_eos", "false"),
            obeyed("stream", "false"),
            obeyed("stream_options", "`include_usage`; with `stream`"),
            obeyed("logprobs", "chats: a boolean; completions: 0 to 20"),
            obeyed("top_logprobs", "chats: 0 to 20, with `logprobs`"),
            obeyed("user", "whose work it is"),
            obeyed("user_id", "the same, with cached prompts of its own"),
            obeyed("service_tier", "`auto`, `default`, `flex`"),
            obeyed("deadline_s", "above 0"),
            obeyed(
                "thinking",
                "chats: `type` is `enabled`, `disabled`, `auto` or `adaptive`",
            ),
            obeyed("enable_thinking", "chats: the same as a boolean"),
            obeyed(
                "reasoning_effort",
                "chats: `none`, `minimal`, `low`, `medium`, `high`, `xhigh`, `max`, `ultra`; told to the template",
            ),
            obeyed("chat_template_kwargs", "chats: up to 32 scalars"),
            obeyed("tools", "chats: up to 1,024, 1 MiB together"),
            obeyed(
                "tool_choice",
                "chats: `none`, `auto`, `required`, or a function",
            ),
            obeyed("parallel_tool_calls", "chats: true"),
            obeyed("continue_final_message", "chats: false"),
            obeyed("response_format", "`text`, `json_object`, `json_schema`"),
            obeyed(
                "structured_outputs",
                "`json`, `json_object`, `regex`, `choice`, `grammar`",
            ),
            obeyed("guided_json", "a schema"),
            obeyed("guided_regex", "up to 256 KiB"),
            obeyed("guided_choice", "up to 1,024 texts"),
            obeyed("guided_grammar", "Lark's form"),
            obeyed("grammar", "the same"),
            obeyed("suffix", "completions: fills the hole before it"),
            obeyed("add_special_tokens", "completions: true"),
            obeyed("parse_special", "completions: true"),
            obeyed("echo", "completions: false"),
            obeyed("best_of", "completions: `n` to 128; refused in streams"),
            refused("min_tokens", "above 0"),
            refused("include_stop_str_in_output", "true"),
            refused("skip_special_tokens", "false"),
            refused("prompt_logprobs", ""),
            refused("functions", "`tools` says the same"),
            refused("function_call", "`tool_choice` says the same"),
            refused("modalities", "other than `text`"),
            refused("audio", ""),
        ],
    },
    Api {
        title: "`/v1/messages` and `/v1/messages/count_tokens`",
        fields: &[
            obeyed("model", "as in chats"),
            obeyed("max_tokens", "required, but not to count"),
            obeyed("messages", "text, `tool_use`, `tool_result`, `thinking`"),
            obeyed("system", "text"),
            obeyed("stream", "false"),
            obeyed("temperature", "0 to 2; 1"),
            obeyed("top_p", "0 to 1; 1"),
            obeyed("top_k", "off"),
            obeyed("stop_sequences", "as `stop` in chats"),
            obeyed(
                "tools",
                "with `input_schema`; those of the server are refused",
            ),
            obeyed(
                "tool_choice",
                "`auto`, `any`, `tool`, `none`, `disable_parallel_tool_use`",
            ),
            obeyed("thinking", "on or off; its budget is ignored"),
            obeyed("metadata", "`user_id`, as `user` in chats"),
        ],
    },
    Api {
        title: "`/v1/responses` and `/v1/responses/input_tokens`",
        fields: crate::responses::FIELDS,
    },
];

/// The tables as docs/API.md has them.
pub fn tables() -> String {
    let mut text = String::new();
    for api in APIS {
        let _ = write!(
            text,
            "\n### {}\n\n| field | | |\n|---|---|---|\n",
            api.title
        );
        for field in api.fields {
            let treatment = match field.treatment {
                Treatment::Obeyed => "obeyed",
                Treatment::Refused => "refused",
                Treatment::Ignored => "ignored on purpose",
            };
            let _ = writeln!(text, "| `{}` | {treatment} | {} |", field.name, field.note);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use super::*;

    #[test]
    fn every_field_that_is_read_is_told_of_and_no_other() {
        let read = [
            crate::openai::raw::request_fields().to_vec(),
            crate::anthropic::request_fields().to_vec(),
            crate::responses::request_fields(),
        ];
        for (api, read) in APIS.iter().zip(read) {
            let told: BTreeSet<&str> = api.fields.iter().map(|field| field.name).collect();
            assert_eq!(told.len(), api.fields.len(), "{}", api.title);
            let read: BTreeSet<&str> = read.into_iter().collect();
            assert_eq!(told, read, "{}", api.title);
        }
    }

    /// Rewritten with UPDATE_GOLDEN=1.
    #[test]
    fn the_documentation_has_the_tables() {
        const FROM: &str = "<!-- fields: written by a test -->\n";
        const TO: &str = "<!-- end of fields -->\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/API.md");
        let text = fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once(FROM).unwrap();
        let (found, after) = rest.split_once(TO).unwrap();
        let expected = format!("{}\n", tables());
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(path, format!("{before}{FROM}{expected}{TO}{after}")).unwrap();
            return;
        }
        assert_eq!(
            found, expected,
            "run the test with UPDATE_GOLDEN=1 to rewrite docs/API.md"
        );
    }
}
