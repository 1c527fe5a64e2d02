//! V3.2, as `encoding_dsv32.py` of its repository has it.

use super::{
    ASSISTANT, BOS, EOS, Settings, THINK, THINK_END, USER, first_system, functions, json, tools,
    turn::{self, Role, Turn},
};
use crate::text::tools::{DSML, DsmlTags};

pub(super) fn render(mut turns: Vec<Turn<'_>>, settings: &Settings<'_>) -> String {
    if settings.tools.is_some() {
        let shown = format!("\n\n{}", instructions(settings));
        first_system(&mut turns).content.push_str(&shown);
    }
    if let Some(schema) = settings.schema {
        let shown = format!(
            "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{}",
            json(schema)
        );
        first_system(&mut turns).content.push_str(&shown);
    }
    if settings.thinks
        && let Some(last) = turn::last_user(&turns)
    {
        turns = turn::without_old_thoughts(turns, last);
    }
    let last_user = turn::last_user(&turns);
    let mut prompt = BOS.to_owned();
    // Calls of the last assistant's turn, and results seen of them.
    let (mut n_calls, mut n_results) = (0, 0);
    for (index, turn) in turns.iter().enumerate() {
        let opens = |is_current: bool| match settings.thinks && is_current {
            true => THINK,
            false => THINK_END,
        };
        let content = &turn.content;
        match turn.role {
            Role::System => prompt.push_str(content),
            Role::Developer => {
                prompt += &format!("{USER}\n\n# The user's message is: {content}{ASSISTANT}");
                prompt.push_str(opens(Some(index) == last_user));
            }
            // Refused before for having no token of its own.
            Role::User | Role::Reminder => {
                prompt += &format!("{USER}{content}{ASSISTANT}");
                prompt.push_str(opens(Some(index) == last_user));
            }
            Role::Tool => {
                n_results += 1;
                if n_results == 1 {
                    prompt.push_str("\n\n<function_results>");
                }
                prompt += &format!("\n<result>{content}</result>");
                let goes_on = turns.get(index + 1).is_some_and(|t| t.role == Role::Tool);
                if n_results == n_calls || !goes_on {
                    prompt.push_str("\n</function_results>\n\n");
                    prompt.push_str(opens(last_user.is_none_or(|last| last <= index)));
                    n_results = 0;
                }
            }
            Role::Assistant => {
                (n_calls, n_results) = (turn.calls.len(), 0);
                if settings.thinks && last_user.is_none_or(|last| last < index) {
                    prompt.push_str(turn.reasoning.unwrap_or_default());
                    prompt.push_str(THINK_END);
                }
                prompt += &format!(
                    "{content}{}{EOS}",
                    tools::calls(DsmlTags::V32, &turn.calls, "\n")
                );
            }
        }
    }
    prompt
}

fn instructions(settings: &Settings<'_>) -> String {
    let schemas = tools::schemas(functions(settings).into_iter().cloned());
    format!(
        "## Tools\n\n\
         You have access to a set of tools you can use to answer the user's question.\n\
         You can invoke functions by writing a \"<{DSML}function_calls>\" block like the following as part of your reply to the \
         user:\n\
         <{DSML}function_calls>\n\
         <{DSML}invoke name=\"$FUNCTION_NAME\">\n\
         <{DSML}parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</{DSML}parameter>\n\
         ...\n\
         </{DSML}invoke>\n\
         <{DSML}invoke name=\"$FUNCTION_NAME2\">\n\
         ...\n\
         </{DSML}invoke>\n\
         </{DSML}function_calls>\n\n\
         String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use \
         JSON format. The \"string\" attribute should be set to \"true\" for string type parameters and \"false\" for other types \
         (numbers, booleans, arrays, objects).\n\n\
         If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here \
         is an example:\n\n\
         <{DSML}function_calls>\n\
         ...\n\
         </{DSML}function_calls>\n\n\
         <function_results>\n\
         ...\n\
         </function_results>\n\n\
         {THINK}...thinking about results{THINK_END}\n\n\
         Here are the functions available in JSONSchema format:\n\
         <functions>\n{schemas}\n</functions>\n"
    )
}
