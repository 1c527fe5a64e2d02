//! Tools in the prompts of models whose templates show none.

use serde_json::{Map, Value, json};

use super::ToolMarkup;
use crate::text::{guard::Guard, pyjson};

/// What the system turn says of `tools`, a list as in the public API. The DeepSeek forms are those of
/// the model card of V3.1, the other one is that of Hermes and Qwen 2.5.
pub(in crate::text) fn describe(markup: ToolMarkup, tools: &Value, guard: &Guard<'_>) -> String {
    let tools = || tools.as_array().into_iter().flatten();
    let style = pyjson::Style::default();
    let dumped = |value: &Value| guard.text(&pyjson::dumps(value, &style));
    let example = match markup {
        ToolMarkup::DeepseekV3 => {
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```<｜tool▁call▁end｜>"
        }
        ToolMarkup::DeepseekV31 => {
            "<｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        }
        // Models that write DSML have an encoder, which shows tools itself.
        ToolMarkup::Hermes | ToolMarkup::Llama | ToolMarkup::Dsml(_) => {
            let all: String = tools().map(|tool| dumped(tool) + "\n").collect();
            return format!(
                "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
                 You are provided with function signatures within <tools></tools> XML tags:\n\
                 <tools>\n{all}</tools>\n\n\
                 For each function call, return a json object with function name and arguments \
                 within <tool_call></tool_call> XML tags:\n\
                 <tool_call>\n{{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>"
            );
        }
    };
    let one = |tool: &Value| {
        let function = &tool["function"];
        let text = |key: &str| guard.text(function[key].as_str().unwrap_or_default());
        let parameters = match &function["parameters"] {
            Value::Null => json!({}),
            schema => schema.clone(),
        };
        format!(
            "### {}\nDescription: {}\n\nParameters: {}\n\n",
            text("name"),
            text("description"),
            dumped(&parameters)
        )
    };
    let all: String = tools().map(one).collect();
    format!(
        "## Tools\n\nYou have access to the following tools:\n\n{all}\
         IMPORTANT: ALWAYS adhere to this exact format for tool use:\n\
         <｜tool▁calls▁begin｜>{example}{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\n\
         Where:\n\n\
         - `tool_call_name` must be an exact match to one of the available tools\n\
         - `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n\
         - For multiple tool calls, chain them directly without separators or spaces"
    )
}

/// Puts a text into the first system turn, behind what it says; there is one from then on.
pub(in crate::text) fn into_system_turn(messages: &mut Vec<Value>, text: &str) {
    let is_system = |message: &&mut Value| message["role"] == "system";
    match messages.iter_mut().find(is_system) {
        Some(message) => {
            let content = message["content"].as_str().unwrap_or_default();
            let content = match content.is_empty() {
                true => text.to_owned(),
                false => format!("{content}\n\n{text}"),
            };
            message["content"] = json!(content);
        }
        None => messages.insert(0, json!({"role": "system", "content": text})),
    }
}

/// Calls and their results as the text that Hermes has for them, for templates that know neither.
pub(in crate::text) fn as_text(messages: Vec<Value>) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::with_capacity(messages.len());
    let mut was_result = false;
    for mut message in messages {
        let content = message["content"].as_str().unwrap_or_default().to_owned();
        let calls = message.as_object_mut().and_then(|m| m.remove("tool_calls"));
        let is_result = message["role"] == "tool";
        if is_result {
            let result = format!("<tool_response>\n{content}\n</tool_response>");
            match plain.last_mut().filter(|_| was_result) {
                Some(turn) => {
                    let before = turn["content"].as_str().unwrap_or_default();
                    turn["content"] = json!(format!("{before}\n{result}"));
                }
                None => plain.push(json!({"role": "user", "content": result})),
            }
        } else {
            if let Some(Value::Array(calls)) = calls {
                let calls = calls.iter().map(|call| call_text(&call["function"]));
                let parts = Some(content).filter(|c| !c.is_empty()).into_iter();
                let text: Vec<String> = parts.chain(calls).collect();
                message["content"] = json!(text.join("\n"));
            }
            plain.push(message);
        }
        was_result = is_result;
    }
    plain
}

fn call_text(function: &Value) -> String {
    let style = pyjson::Style::default();
    let arguments = match &function["arguments"] {
        Value::String(text) => text.clone(),
        Value::Null => "{}".to_owned(),
        value => pyjson::dumps(value, &style),
    };
    let mut head = Map::new();
    head.insert("name".to_owned(), function["name"].clone());
    let head = pyjson::dumps(&Value::Object(head), &style);
    let head = head.trim_end_matches('}');
    format!("<tool_call>\n{head}, \"arguments\": {arguments}}}\n</tool_call>")
}
