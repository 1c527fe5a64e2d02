//! One message of a conversation, as the encoders look at it.

use serde_json::{Map, Value};

use crate::text::error::TextError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    Reminder,
}

/// See the module. Strings are marked.
#[derive(Debug, Clone)]
pub(super) struct Turn<'a> {
    pub(super) role: Role,
    pub(super) content: String,
    pub(super) reasoning: Option<&'a str>,
    pub(super) calls: Vec<Call<'a>>,
    /// The call that a result answers.
    pub(super) call_id: Option<&'a str>,
}

/// A call that the assistant made.
#[derive(Debug, Clone)]
pub(super) struct Call<'a> {
    pub(super) id: &'a str,
    pub(super) name: &'a str,
    pub(super) arguments: Map<String, Value>,
}

impl Turn<'_> {
    pub(super) fn system(content: String) -> Self {
        Self {
            role: Role::System,
            content,
            reasoning: None,
            calls: Vec::new(),
            call_id: None,
        }
    }
}

/// The messages of a conversation; strings and arguments are as `chat` prepares them.
pub(super) fn read(messages: &[Value]) -> Result<Vec<Turn<'_>>, TextError> {
    let numbered = messages.iter().enumerate();
    numbered
        .map(|(index, message)| one(index, message))
        .collect()
}

fn one(index: usize, message: &Value) -> Result<Turn<'_>, TextError> {
    let text = |key: &str| message[key].as_str();
    let role = match text("role") {
        Some("system") => Role::System,
        Some("developer") => Role::Developer,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        Some("latest_reminder") => Role::Reminder,
        other => {
            return Err(TextError::Message {
                index,
                field: "role".to_owned(),
                expected: "system, developer, user, assistant, tool or latest_reminder",
                found: other.unwrap_or_default().to_owned(),
            });
        }
    };
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    Ok(Turn {
        role,
        content: text("content").unwrap_or_default().to_owned(),
        reasoning: text("reasoning_content"),
        calls: calls.map(call).collect(),
        call_id: text("tool_call_id"),
    })
}

fn call(call: &Value) -> Call<'_> {
    let function = &call["function"];
    let arguments = match &function["arguments"] {
        Value::Object(arguments) => arguments.clone(),
        Value::Null => Map::new(),
        // What is no object becomes one argument of this name, as the published encoders have it.
        Value::String(text) => Map::from_iter([("arguments".to_owned(), text.as_str().into())]),
        other => Map::from_iter([("arguments".to_owned(), super::json(other).into())]),
    };
    Call {
        id: call["id"].as_str().unwrap_or_default(),
        name: function["name"].as_str().unwrap_or_default(),
        arguments,
    }
}

/// The last turn of somebody whom the assistant answers; results are none.
pub(super) fn last_user(turns: &[Turn<'_>]) -> Option<usize> {
    let asks = |turn: &Turn<'_>| matches!(turn.role, Role::User | Role::Developer);
    turns.iter().rposition(asks)
}

/// Without what V3.2 and V4 leave out where no thoughts are kept: thoughts before the last question, and developers' turns
/// before it.
pub(super) fn without_old_thoughts(turns: Vec<Turn<'_>>, last_user: usize) -> Vec<Turn<'_>> {
    let numbered = turns.into_iter().enumerate();
    let kept = numbered.filter_map(|(index, mut turn)| {
        if last_user <= index {
            return Some(turn);
        }
        turn.reasoning = None;
        (turn.role != Role::Developer).then_some(turn)
    });
    kept.collect()
}

/// Results of an assistant's calls in the order of the calls: each run of questions and results behind calls is looked at,
/// and questions keep their places. A result of an unknown call counts as one of the first.
pub(super) fn sort_results(turns: &mut [Turn<'_>]) {
    let mut order: Vec<&str> = Vec::new();
    let mut at = 0;
    while at < turns.len() {
        let turn = &turns[at];
        if turn.role == Role::Assistant && !turn.calls.is_empty() {
            order = turn.calls.iter().map(|call| call.id).collect();
        }
        let is_of_run = |turn: &Turn<'_>| matches!(turn.role, Role::User | Role::Tool);
        let n_run = turns[at..].iter().take_while(|t| is_of_run(t)).count();
        let run = &mut turns[at..at + n_run];
        let places: Vec<usize> = (0..n_run)
            .filter(|i| run[*i].role == Role::Tool && run[*i].call_id.is_some())
            .collect();
        let mut results: Vec<Turn<'_>> = places.iter().map(|i| run[*i].clone()).collect();
        if !order.is_empty() {
            results.sort_by_key(|turn| {
                let of_call = |id: &&str| Some(*id) == turn.call_id;
                order.iter().position(of_call).unwrap_or(0)
            });
        }
        for (place, result) in places.into_iter().zip(results) {
            run[place] = result;
        }
        at += n_run.max(1);
    }
}
