//! V4.1, as DeepSeek's `deepseek-recipe` 0.2 has it.

use serde_json::json;

use super::{
    ASSISTANT, BOS, EOS, Effort, REMINDER, SYSTEM, Settings, THINK, THINK_END, USER, definition,
    functions, tools,
    turn::{self, Role, Turn},
};
use crate::text::tools::DsmlTags;

pub(super) fn render(turns: Vec<Turn<'_>>, settings: &Settings<'_>) -> String {
    let turns = arranged(turns, settings);
    // All thoughts are kept beside tools, none before the answer without.
    let keeps_thoughts = settings.thinks && settings.tools.is_some();
    let mut prompt = BOS.to_owned();
    if settings.thinks {
        let score = match settings.effort {
            Effort::Low => 50,
            Effort::High => 75,
            Effort::Max => 100,
        };
        prompt += &format!(
            "{SYSTEM}Reasoning Effort: {score} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
        );
    }
    for (index, turn) in turns.iter().enumerate() {
        let content = &turn.content;
        let before = index.checked_sub(1).map(|before| turns[before].role);
        let user = match before {
            Some(Role::User | Role::Tool) => "\n\n",
            _ => USER,
        };
        match turn.role {
            // The first one shares the token with the effort.
            Role::System | Role::Developer if index == 0 && settings.thinks => {
                prompt.push_str(content);
            }
            Role::System | Role::Developer => prompt += &format!("{SYSTEM}{content}"),
            Role::User => prompt += &format!("{user}{content}"),
            Role::Tool => prompt += &format!("{user}<tool_result>{content}</tool_result>"),
            Role::Reminder => prompt += &format!("{REMINDER}{content}"),
            Role::Assistant => {
                prompt.push_str(ASSISTANT);
                if keeps_thoughts && 0 < index {
                    prompt.push_str(THINK);
                    prompt.push_str(turn.reasoning.unwrap_or_default());
                }
                let calls = tools::calls(DsmlTags::V41, &turn.calls, "\n");
                prompt += &format!("{THINK_END}{content}{calls}{EOS}");
            }
        }
    }
    prompt.push_str(ASSISTANT);
    prompt.push_str(match settings.thinks {
        true => THINK,
        false => THINK_END,
    });
    prompt
}

/// Empty system turns left out, questions that follow each other joined, the first of reminders that do kept, results in the order of
/// their calls; tools and format are shown in the first turn, which is a system's then.
fn arranged<'a>(turns: Vec<Turn<'a>>, settings: &Settings<'_>) -> Vec<Turn<'a>> {
    let mut arranged: Vec<Turn<'a>> = Vec::with_capacity(turns.len() + 1);
    for mut turn in turns {
        if turn.role == Role::Developer {
            turn.role = Role::System;
        }
        match (turn.role, arranged.last_mut()) {
            (Role::System, _) if turn.content.is_empty() => {}
            (Role::User, Some(before)) if before.role == Role::User => {
                before.content += "\n\n";
                before.content += &turn.content;
            }
            (Role::Reminder, Some(before)) if before.role == Role::Reminder => {}
            _ => arranged.push(turn),
        }
    }
    turn::sort_results(&mut arranged);
    let mut shown = String::new();
    if settings.tools.is_some() {
        let schemas = tools::schemas(functions(settings).into_iter().map(definition));
        let instructions = tools::instructions(DsmlTags::V41);
        shown += &format!("\n\n{instructions}{schemas}{}", tools::INSTRUCTIONS_END);
    }
    if let Some(schema) = settings.schema {
        let any_object = json!({"type": "json_object"});
        let schema = match super::is_any_object(schema) {
            true => &any_object,
            false => schema,
        };
        shown += &format!(
            "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{}",
            super::json(schema)
        );
    }
    if !shown.is_empty() {
        if arranged
            .first()
            .is_none_or(|turn| turn.role != Role::System)
        {
            arranged.insert(0, Turn::system(String::new()));
        }
        arranged[0].content += &shown;
    }
    arranged
}
