//! V4 since its weights of July 2026, as DeepSeek's `deepseek-recipe` 0.2 has it.

use super::{
    ASSISTANT, BOS, EOS, Effort, REMINDER, Settings, THINK, THINK_END, USER, definition, functions,
    json, tools,
    turn::{Role, Turn},
    v4,
};
use crate::text::tools::DsmlTags;

const EFFORT_MAX: &str = "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n\
    You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem \
    into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any \
    surface symptom.\n\
    Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
    assumption remains unchecked and no error remains undiscovered.\n\n";

/// What is said where any object will do.
const ANY_OBJECT: &str = "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY.";

pub(super) fn render(turns: Vec<Turn<'_>>, settings: &Settings<'_>) -> String {
    let turns = arranged(turns, settings);
    // All thoughts are kept beside tools, none before the answer without.
    let keeps_thoughts = settings.thinks && settings.tools.is_some();
    let mut prompt = BOS.to_owned();
    if settings.thinks {
        prompt.push_str(match settings.effort {
            Effort::Low => "",
            Effort::High => v4::EFFORT,
            Effort::Max => EFFORT_MAX,
        });
    }
    let mut before = None;
    for turn in &turns {
        let content = &turn.content;
        match turn.role {
            Role::System | Role::Developer => {
                if before == Some(Role::System) {
                    prompt.push_str("\n\n");
                }
                prompt.push_str(content);
            }
            Role::User => {
                prompt.push_str(match before {
                    Some(Role::User | Role::Tool) => "\n\n",
                    _ => USER,
                });
                prompt.push_str(content);
            }
            Role::Tool => {
                prompt.push_str(match before {
                    Some(Role::Tool) => "\n\n",
                    _ => USER,
                });
                prompt += &format!("<tool_result>{content}</tool_result>");
            }
            Role::Reminder => {
                prompt.push_str(REMINDER);
                prompt.push_str(content);
            }
            Role::Assistant => {
                prompt.push_str(ASSISTANT);
                if keeps_thoughts {
                    prompt.push_str(THINK);
                    prompt.push_str(turn.reasoning.unwrap_or_default());
                }
                prompt.push_str(THINK_END);
                prompt.push_str(content);
                prompt.push_str(&tools::calls(DsmlTags::V4, &turn.calls, ""));
                prompt.push_str(EOS);
            }
        }
        before = Some(turn.role);
    }
    prompt.push_str(ASSISTANT);
    prompt.push_str(match settings.thinks {
        true => THINK,
        false => THINK_END,
    });
    prompt
}

/// System turns in front, with tools and format behind them; questions that follow each other joined; calls and their results
/// in the order of the calls' ids.
fn arranged<'a>(turns: Vec<Turn<'a>>, settings: &Settings<'_>) -> Vec<Turn<'a>> {
    let (mut system, mut others): (Vec<Turn<'a>>, Vec<Turn<'a>>) = (Vec::new(), Vec::new());
    for mut turn in turns {
        if turn.role == Role::Developer {
            turn.role = Role::System;
        }
        match (turn.role, others.last_mut()) {
            (Role::System, _) if turn.content.is_empty() => {}
            (Role::System, _) => system.push(turn),
            (Role::User, Some(before)) if before.role == Role::User => {
                if !before.content.is_empty() && !turn.content.is_empty() {
                    before.content += "\n\n";
                }
                before.content += &turn.content;
            }
            _ => others.push(turn),
        }
    }
    for at in 0..others.len() {
        let n_calls = others[at].calls.len();
        others[at].calls.sort_by_key(|call| call.id);
        if let Some(results) = others.get_mut(at + 1..at + 1 + n_calls) {
            results.sort_by_key(|turn| (turn.role != Role::Tool, turn.call_id));
        }
    }
    let mut shown = Vec::new();
    if settings.tools.is_some() {
        let schemas = tools::schemas(functions(settings).into_iter().map(definition));
        let instructions = tools::instructions(DsmlTags::V4);
        shown.push(format!(
            "{instructions}{schemas}{}",
            tools::INSTRUCTIONS_END
        ));
    }
    match settings.schema {
        None => {}
        Some(schema) if super::is_any_object(schema) => shown.push(ANY_OBJECT.to_owned()),
        Some(schema) => shown.push(format!(
            "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{}",
            json(schema)
        )),
    }
    if !shown.is_empty() && system.is_empty() {
        system.push(Turn::system(String::new()));
    }
    system.extend(shown.into_iter().map(Turn::system));
    system.extend(others);
    system
}
