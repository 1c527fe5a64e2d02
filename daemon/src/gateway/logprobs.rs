//! Log-probabilities in the shapes of both routes.

use std::{fmt::Write, sync::Arc};

use dsd_proto::openai::{ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob};
use serde_json::{Map, Value};

use super::generation::TokenChoice;
use crate::text::{OutputDecoder, TextModel};

/// Smallest log-probability sent: JSON has no infinity, and clients know this number from OpenAI.
const LOGPROB_MIN: f32 = -9999.0;

/// Entries of a chat, of the answer and of the thoughts.
pub(super) fn chat(text: &TextModel, tokens: &[TokenChoice]) -> ChatLogprobs {
    let entry = |choice: &TokenChoice| {
        let bytes = bytes_of(text, choice.token);
        ChatTokenLogprob {
            token: String::from_utf8_lossy(&bytes).into_owned(),
            logprob: finite(choice.logprobs.chosen),
            bytes,
            top_logprobs: choice
                .logprobs
                .top
                .iter()
                .map(|(token, logprob)| {
                    let bytes = bytes_of(text, *token);
                    TopLogprob {
                        token: String::from_utf8_lossy(&bytes).into_owned(),
                        logprob: finite(*logprob),
                        bytes,
                    }
                })
                .collect(),
        }
    };
    let (thoughts, answer): (Vec<_>, Vec<_>) = tokens.iter().partition(|t| t.is_reasoning);
    ChatLogprobs {
        content: answer.into_iter().map(entry).collect(),
        reasoning_content: thoughts.into_iter().map(entry).collect(),
    }
}

/// Where the next token of a choice begins in its text.
pub(super) struct Offset {
    decoder: OutputDecoder,
    n_chars: usize,
}

impl Offset {
    /// At the start of a text.
    pub(super) fn new(text: &Arc<TextModel>) -> Self {
        Self {
            decoder: OutputDecoder::new(Arc::clone(text), None),
            n_chars: 0,
        }
    }

    /// Where the tokens of a prompt begin that reads `text`; what follows begins where it ends. A first
    /// token that `text` does not begin with was put in front of it.
    fn of_prompt(
        &mut self,
        model: &Arc<TextModel>,
        tokens: &[TokenChoice],
        text: &str,
    ) -> Vec<usize> {
        let mut decoder = OutputDecoder::of_prompt(Arc::clone(model));
        let n_chars = text.chars().count();
        let first = tokens.first().map(|first| bytes_of(model, first.token));
        let is_added = first.is_some_and(|first| !text.as_bytes().starts_with(&first));
        let mut begins_at = 0;
        let mut begins = Vec::with_capacity(tokens.len());
        for (idx, token) in tokens.iter().enumerate() {
            begins.push(begins_at.min(n_chars));
            let n_new = decoder.push(token.token).chars().count();
            begins_at += if idx == 0 && is_added { 0 } else { n_new };
        }
        self.n_chars = n_chars;
        begins
    }

    /// Where a token begins; one inside a character begins where that does.
    fn of(&mut self, token: u32) -> usize {
        let begins_at = self.n_chars;
        self.n_chars += self.decoder.push(token).chars().count();
        begins_at
    }
}

/// Entries of a plain completion; `text_offset` goes on from `offset`, which moves along. `prompt` is the
/// text that the tokens are the prompt of, where they are one.
pub(super) fn completion(
    text: &Arc<TextModel>,
    tokens: &[TokenChoice],
    prompt: Option<&str>,
    offset: &mut Offset,
) -> CompletionLogprobs {
    let mut lists = CompletionLogprobs {
        text_offset: match prompt {
            Some(prompt) => offset.of_prompt(text, tokens, prompt),
            None => tokens
                .iter()
                .map(|choice| offset.of(choice.token))
                .collect(),
        },
        ..CompletionLogprobs::default()
    };
    for choice in tokens {
        let name = token_name(&bytes_of(text, choice.token));
        lists.tokens.push(name);
        let chosen = choice.logprobs.chosen;
        let is_known = !chosen.is_nan();
        lists.token_logprobs.push(is_known.then(|| finite(chosen)));
        let top = choice.logprobs.top.iter();
        let top = || -> Map<String, Value> {
            top.map(|(token, logprob)| (token_name(&bytes_of(text, *token)), number(*logprob)))
                .collect()
        };
        lists.top_logprobs.push(is_known.then(top));
    }
    lists
}

/// Empty for ids without text, such as padding of the vocabulary.
fn bytes_of(text: &TextModel, token: u32) -> Vec<u8> {
    text.token_bytes(token).unwrap_or_default().to_vec()
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(LOGPROB_MIN)
    } else {
        LOGPROB_MIN
    }
}

/// The number that the same `f32` is written as elsewhere in the answer; widening it would show more
/// digits and not compare equal.
fn number(logprob: f32) -> Value {
    let shortest = finite(logprob).to_string();
    shortest.parse::<f64>().map_or(Value::Null, Value::from)
}

/// A token's text, or its bytes when they are no text by themselves, as OpenAI writes them.
fn token_name(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(
        |_| {
            let mut name = String::from("bytes:");
            for byte in bytes {
                // Writing to a string does not fail.
                let _ = write!(name, "\\x{byte:02x}");
            }
            name
        },
        str::to_owned,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_characters_are_named_by_their_bytes() {
        assert_eq!(token_name(" é".as_bytes()), " é");
        assert_eq!(token_name(&[0xe2, 0x82]), "bytes:\\xe2\\x82");
        assert_eq!(finite(f32::NEG_INFINITY), -9999.0);
        assert_eq!(
            number(-2.163_761_9).to_string(),
            serde_json::to_string(&-2.163_761_9_f32).unwrap()
        );
    }
}
