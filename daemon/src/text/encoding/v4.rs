//! V4, as `encoding_dsv4.py` of its first repository has it.

use super::{
    ASSISTANT, BOS, EOS, Effort, REMINDER, Settings, THINK, THINK_END, USER, first_system,
    functions, json, tools,
    turn::{self, Role, Turn},
};
use crate::text::tools::DsmlTags;

/// In front of everything where the effort is `max`; since July 2026 where it is `high`.
pub(super) const EFFORT: &str = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n\
    You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously \
    stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n\
    Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and \
    rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

pub(super) fn render(mut turns: Vec<Turn<'_>>, settings: &Settings<'_>) -> String {
    turn::sort_results(&mut turns);
    if settings.tools.is_some() {
        let schemas = tools::schemas(functions(settings).into_iter().cloned());
        let shown = format!(
            "\n\n{}{schemas}{}",
            tools::instructions(DsmlTags::V4),
            tools::INSTRUCTIONS_END
        );
        first_system(&mut turns).content.push_str(&shown);
    }
    if let Some(schema) = settings.schema {
        let shown = format!(
            "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{}",
            json(schema)
        );
        first_system(&mut turns).content.push_str(&shown);
    }
    let mut turns = merged(turns);
    // All thoughts are kept beside tools.
    let drops_thoughts = settings.tools.is_none();
    if settings.thinks
        && drops_thoughts
        && let Some(last) = turn::last_user(&turns)
    {
        turns = turn::without_old_thoughts(turns, last);
    }
    let last_user = turn::last_user(&turns);
    let mut prompt = BOS.to_owned();
    if settings.thinks && settings.effort == Effort::Max {
        prompt.push_str(EFFORT);
    }
    for (index, turn) in turns.iter().enumerate() {
        match turn.role {
            Role::System => prompt.push_str(&turn.content),
            Role::Developer | Role::User | Role::Tool => {
                prompt.push_str(USER);
                prompt.push_str(&turn.content);
            }
            Role::Reminder => {
                prompt.push_str(REMINDER);
                prompt.push_str(&turn.content);
            }
            Role::Assistant => {
                let is_current = last_user.is_none_or(|last| last < index);
                if settings.thinks && (!drops_thoughts || is_current) {
                    prompt.push_str(turn.reasoning.unwrap_or_default());
                    prompt.push_str(THINK_END);
                }
                prompt.push_str(&turn.content);
                prompt.push_str(&tools::calls(DsmlTags::V4, &turn.calls, "\n"));
                prompt.push_str(EOS);
            }
        }
        let next = turns.get(index + 1).map(|turn| turn.role);
        let is_answered = matches!(next, None | Some(Role::Assistant | Role::Reminder));
        if is_answered && matches!(turn.role, Role::User | Role::Developer) {
            prompt.push_str(ASSISTANT);
            let is_current = last_user.is_none_or(|last| last <= index);
            prompt.push_str(match settings.thinks && (!drops_thoughts || is_current) {
                true => THINK,
                false => THINK_END,
            });
        }
    }
    prompt
}

/// Results are parts of the user's turn, as are questions that follow each other.
fn merged(turns: Vec<Turn<'_>>) -> Vec<Turn<'_>> {
    let mut merged: Vec<Turn<'_>> = Vec::with_capacity(turns.len());
    for mut turn in turns {
        if turn.role == Role::Tool {
            turn.role = Role::User;
            turn.content = format!("<tool_result>{}</tool_result>", turn.content);
        }
        match merged.last_mut() {
            Some(before) if before.role == Role::User && turn.role == Role::User => {
                before.content += "\n\n";
                before.content += &turn.content;
            }
            _ => merged.push(turn),
        }
    }
    merged
}
