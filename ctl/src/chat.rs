//! `dsctl chat`: a conversation at the terminal.
//!
//! Each turn has a connection of its own, so that nothing is kept alive while a person thinks.

use dsd_proto::wire::generate::{ChatMessage, Input, Role};
use rustyline::{DefaultEditor, error::ReadlineError};
use tokio::runtime::Runtime;

use crate::{
    cli::{ChatArgs, Global},
    failure::{Exit, Failure},
    generate::{self, Answer, End},
    output::Output,
    session,
};

/// What a line at the prompt asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'t> {
    Say(&'t str),
    Reset,
    Quit,
    Help,
    Unknown(&'t str),
    Nothing,
}

/// Talks until `/quit` or the end of input.
pub(crate) fn run(
    global: &Global,
    args: ChatArgs,
    runtime: &Runtime,
    out: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let ChatArgs { system, sampling } = args;
    let node = runtime.block_on(async {
        let client = session::connect(global).await?;
        let node = client.node().name.to_string();
        client.close().await;
        Ok::<_, Failure>(node)
    })?;
    if !out.is_json() {
        out.dimmed(&format!(
            "connected to {node}; /help lists commands, Ctrl-C stops an answer\n"
        ))?;
    }
    let terminal = |e: ReadlineError| Failure::new(Exit::Refused, "terminal", e.to_string());
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    let opening = system.map(|content| ChatMessage {
        role: Role::System,
        content,
    });
    let mut turns: Vec<ChatMessage> = opening.iter().cloned().collect();
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(Exit::Done),
            Err(e) => return Err(terminal(e)),
        };
        match parse(&line) {
            Line::Nothing => {}
            Line::Quit => return Ok(Exit::Done),
            Line::Reset => turns = opening.iter().cloned().collect(),
            Line::Help => out.line("/reset forgets the conversation, /quit ends it")?,
            Line::Unknown(command) => {
                out.line(&format!("{command} is not a command; see /help"))?
            }
            Line::Say(text) => {
                // A line that cannot be remembered can still be said.
                let _not_remembered = editor.add_history_entry(line.as_str());
                turns.push(ChatMessage {
                    role: Role::User,
                    content: text.to_owned(),
                });
                let request = generate::request(&sampling, Input::Chat(turns.clone()));
                let answer = runtime.block_on(async {
                    let client = session::connect(global).await?;
                    let answer = generate::follow(global, &client, &request, out).await;
                    client.close().await;
                    answer
                });
                match answer {
                    Ok(answer) => end_turn(answer, &mut turns, out)?,
                    Err(failure) if failure.kind == "output" => return Err(failure),
                    Err(failure) => {
                        // The person decides whether to say it again.
                        turns.pop();
                        out.line("")?;
                        out.line(failure.to_string().trim_end())?;
                    }
                }
            }
        }
    }
}

/// What was said stays in the conversation, also when it was cut short.
fn end_turn(
    answer: Answer,
    turns: &mut Vec<ChatMessage>,
    out: &mut Output<'_>,
) -> Result<(), Failure> {
    turns.push(ChatMessage {
        role: Role::Assistant,
        content: answer.content,
    });
    match answer.end {
        End::Done(done) if out.is_json() => out.json(&serde_json::json!({"done": done})),
        End::Done(done) => {
            out.raw("\n")?;
            out.dimmed(&generate::summary(&done))
        }
        End::Interrupted => {
            out.raw("\n")?;
            out.dimmed("[stopped]\n")
        }
    }
}

fn parse(line: &str) -> Line<'_> {
    match line.trim() {
        "" => Line::Nothing,
        "/quit" | "/exit" => Line::Quit,
        "/reset" => Line::Reset,
        "/help" => Line::Help,
        other if other.starts_with('/') => Line::Unknown(other),
        other => Line::Say(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_speech() {
        assert_eq!(parse(" hello "), Line::Say("hello"));
        assert_eq!(parse("/reset"), Line::Reset);
        assert_eq!(parse("/quit "), Line::Quit);
        assert_eq!(parse("/what"), Line::Unknown("/what"));
        assert_eq!(parse("  "), Line::Nothing);
    }
}
