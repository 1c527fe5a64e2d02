//! `dsctl generate`: text from a prompt, as it comes.

use std::io::{self, Read};

use dsd_proto::{
    quic::{Client, Event},
    wire::generate::{ChatMessage, Finish, GenerateDone, GenerateRequest, Input, Role, Sampling},
};
use serde_json::json;

use crate::{
    cli::{GenerateArgs, Global, SamplingArgs},
    failure::{Exit, Failure},
    output::Output,
    session,
};

/// A prompt longer than a frame is refused anyway.
const PROMPT_LEN_MAX: u64 = 4 << 20;

/// Prints what the model makes of the prompt.
pub(crate) async fn run(
    global: &Global,
    args: GenerateArgs,
    out: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let GenerateArgs {
        prompt,
        chat,
        tokens,
        system,
        sampling,
    } = args;
    let prompt = match prompt {
        Some(text) if text != "-" => text,
        Some(_) | None => read_stdin()?,
    };
    let input = match (chat, tokens) {
        (true, _) => {
            let system = system.map(|content| ChatMessage {
                role: Role::System,
                content,
            });
            let user = ChatMessage {
                role: Role::User,
                content: prompt,
            };
            Input::Chat(system.into_iter().chain([user]).collect())
        }
        (false, true) => Input::Tokens(token_ids(&prompt)?),
        (false, false) => Input::Prompt(prompt),
    };
    let client = session::connect(global).await?;
    let answer = follow(global, &client, &request(&sampling, input), out).await;
    client.close().await;
    match answer? {
        Answer {
            end: End::Interrupted,
            ..
        } => Err(Failure::new(
            Exit::Interrupted,
            "interrupted",
            "interrupted",
        )),
        Answer {
            end: End::Done(done),
            ..
        } => {
            if out.is_json() {
                out.json(&json!({"done": done}))?;
            } else {
                out.raw("\n")?;
                out.dimmed(&summary(&done))?;
            }
            Ok(Exit::Done)
        }
    }
}

/// What came of a generation.
pub(crate) struct Answer {
    /// Text of the answer, without reasoning.
    pub(crate) content: String,
    /// How it ended.
    pub(crate) end: End,
}

/// How a generation ended.
pub(crate) enum End {
    /// By itself.
    Done(GenerateDone),
    /// By Ctrl-C.
    Interrupted,
}

/// The request that the flags and `input` make.
pub(crate) fn request(args: &SamplingArgs, input: Input) -> GenerateRequest {
    GenerateRequest {
        model: args.model.clone(),
        input,
        max_tokens: args.max_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_p: args.top_p,
            top_k: args.top_k,
            min_p: args.min_p,
            repetition_penalty: args.repetition_penalty,
            frequency_penalty: args.frequency_penalty,
            presence_penalty: args.presence_penalty,
            seed: args.seed,
        },
        stop: args.stop.clone(),
        thinking: args.thinking,
    }
}

/// Prints deltas until the end; Ctrl-C cancels the generation on the node.
pub(crate) async fn follow(
    global: &Global,
    client: &Client,
    request: &GenerateRequest,
    out: &mut Output<'_>,
) -> Result<Answer, Failure> {
    let mut interrupts = session::interrupts()?;
    let mut stream = client
        .stream(request, session::call_timeout(global))
        .await
        .map_err(|e| Failure::of_call(&e))?;
    let mut content = String::new();
    let mut was_reasoning = false;
    loop {
        let event = tokio::select! {
            event = stream.next(session::piece_timeout(global)) => event,
            _ = interrupts.recv() => {
                stream.cancel();
                return Ok(Answer { content, end: End::Interrupted });
            }
        };
        match event.map_err(|e| Failure::of_call(&e))? {
            Some(Event::Item(delta)) if out.is_json() => {
                out.json(&json!({"delta": delta}))?;
                content.push_str(&delta.content);
            }
            Some(Event::Item(delta)) => {
                out.dimmed(&delta.reasoning)?;
                was_reasoning |= !delta.reasoning.is_empty();
                if was_reasoning && !delta.content.is_empty() {
                    out.dimmed("\n")?;
                    was_reasoning = false;
                }
                out.text(&delta.content)?;
                content.push_str(&delta.content);
            }
            Some(Event::Reply(done)) => {
                return Ok(Answer {
                    content,
                    end: End::Done(done),
                });
            }
            None => {
                return Err(Failure::new(
                    Exit::Unreachable,
                    "lost",
                    "no end of the answer",
                ));
            }
        }
    }
}

/// One line on what the answer took.
pub(crate) fn summary(done: &GenerateDone) -> String {
    let finish = match done.finish_reason {
        Finish::Stop => "stop",
        Finish::Length => "length",
    };
    format!(
        "[{} + {} tokens, first after {} ms, {finish}]\n",
        done.n_prompt_tokens, done.n_completion_tokens, done.ttft_ms
    )
}

fn read_stdin() -> Result<String, Failure> {
    let refused = |why: String| Failure::new(Exit::Refused, "usage", format!("stdin: {why}"));
    let mut text = String::new();
    let n = io::stdin()
        .lock()
        .take(PROMPT_LEN_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|e| refused(e.to_string()))?;
    if PROMPT_LEN_MAX < n as u64 {
        return Err(refused(format!("more than {PROMPT_LEN_MAX} bytes")));
    }
    Ok(text)
}

fn token_ids(text: &str) -> Result<Vec<u32>, Failure> {
    text.split(|c: char| c == ',' || c.is_whitespace())
        .filter(|part| !part.is_empty())
        .map(|part| {
            part.parse().map_err(|_| {
                Failure::new(
                    Exit::Refused,
                    "usage",
                    format!("{part:?} is not a token id"),
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_are_read_from_commas_and_blanks() {
        assert_eq!(token_ids("1, 2\n3,,4").unwrap(), [1, 2, 3, 4]);
        assert_eq!(token_ids("1,x").unwrap_err().exit, Exit::Refused);
    }
}
