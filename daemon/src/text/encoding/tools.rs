//! What prompts say of tools, and the calls that the assistant made: DSML.

use serde_json::Value;

use super::{THINK, THINK_END, json, turn::Call};
use crate::text::tools::{DSML, DsmlTags};

/// How calls are written, in the words of V4's encoder and its successors; schemas follow.
pub(super) fn instructions(tags: DsmlTags) -> String {
    let DsmlTags {
        block,
        invoke,
        parameter,
    } = tags;
    format!(
        "## Tools\n\n\
         You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
         \"<{DSML}{block}>\" block like the following:\n\n\
         <{DSML}{block}>\n\
         <{DSML}{invoke} name=\"$TOOL_NAME\">\n\
         <{DSML}{parameter} name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</{DSML}{parameter}>\n\
         ...\n\
         </{DSML}{invoke}>\n\
         <{DSML}{invoke} name=\"$TOOL_NAME2\">\n\
         ...\n\
         </{DSML}{invoke}>\n\
         </{DSML}{block}>\n\n\
         String parameters should be specified as is and set `string=\"true\"`. For all other types (numbers, booleans, arrays, \
         objects), pass the value in JSON format and set `string=\"false\"`.\n\n\
         If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
         {THINK}...{THINK_END} BEFORE any tool calls or final response.\n\n\
         Otherwise, output directly after {THINK_END} with tool calls or final response.\n\n\
         ### Available Tool Schemas\n\n"
    )
}

/// The end of [`instructions`], behind the schemas.
pub(super) const INSTRUCTIONS_END: &str = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to \
     invoke tool calls.\n";

/// The schemas of functions, a line each.
pub(super) fn schemas(functions: impl IntoIterator<Item = Value>) -> String {
    let lines: Vec<String> = functions.into_iter().map(|f| json(&f)).collect();
    lines.join("\n")
}

/// A block of calls with the empty line in front of it; nothing for none. `no_arguments` is what stands where a call has none.
pub(super) fn calls(tags: DsmlTags, calls: &[Call<'_>], no_arguments: &str) -> String {
    let DsmlTags { block, invoke, .. } = tags;
    if calls.is_empty() {
        return String::new();
    }
    let mut shown = format!("\n\n<{DSML}{block}>\n");
    for call in calls {
        shown += &format!("<{DSML}{invoke} name=\"{}\">\n", call.name);
        for (name, value) in &call.arguments {
            argument(tags, name, value, &mut shown);
        }
        if call.arguments.is_empty() {
            shown.push_str(no_arguments);
        }
        shown += &format!("</{DSML}{invoke}>\n");
    }
    shown + &format!("</{DSML}{block}>")
}

fn argument(tags: DsmlTags, name: &str, value: &Value, shown: &mut String) {
    let parameter = tags.parameter;
    let (is_string, text) = match value {
        Value::String(text) => (true, text.clone()),
        value => (false, json(value)),
    };
    *shown += &format!(
        "<{DSML}{parameter} name=\"{name}\" string=\"{is_string}\">{text}</{DSML}{parameter}>\n"
    );
}
