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

    /// Where a token begins; one inside a character begins where that does.
    fn of(&mut self, token: u32) -> usize {
        let begins_at = self.n_chars;
        self.n_chars += self.decoder.push(token).chars().count();
        begins_at
    }
}

/// Entries of a plain completion; `text_offset` goes on from `offset`, which moves along.
pub(super) fn completion(
    text: &TextModel,
    tokens: &[TokenChoice],
    offset: &mut Offset,
) -> CompletionLogprobs {
    let mut lists = CompletionLogprobs::default();
    for choice in tokens {
        let name = token_name(&bytes_of(text, choice.token));
        lists.text_offset.push(offset.of(choice.token));
        lists.tokens.push(name);
        lists.token_logprobs.push(finite(choice.logprobs.chosen));
        let top = choice.logprobs.top.iter();
        let top: Map<String, Value> = top
            .map(|(token, logprob)| (token_name(&bytes_of(text, *token)), number(*logprob)))
            .collect();
        lists.top_logprobs.push(top);
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
