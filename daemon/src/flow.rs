//! What travels between the parts of a node: requests down, token events up.
//!
//! Named by every module, names none.

use std::{sync::Arc, time::Instant};

use tokio::sync::mpsc;

/// One generation as the engine sees it.
#[derive(Debug)]
pub struct Request {
    /// Name in logs; unique on this node.
    pub id: RequestId,
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most, at least one.
    pub max_tokens: usize,
    /// The generation ends after one of these came out; it is the last token emitted.
    pub stop_tokens: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// `None`: no log-probabilities; `Some(n)`: of the chosen token and the `n` likeliest.
    pub top_logprobs: Option<usize>,
    /// After this moment the request ends with [`FinishReason::DeadlinePassed`].
    pub deadline: Option<Instant>,
    /// With whom beginnings of prompts are shared.
    pub cache_owner: CacheOwner,
    /// Where events go.
    pub sink: TokenSink,
}

/// Whose keys and values a request may find in the cache, and who may find its own: the digest of
/// its API key, made here and never taken from the client; all zeros where everybody may call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheOwner(pub [u8; 32]);

/// Names a request in logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// How the next token is chosen from logits. Greedy when `temperature` is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the largest.
    pub temperature: f32,
    /// Keeps the smallest set of likeliest tokens with at least this mass; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Drops tokens below this fraction of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off
    /// (CTRL, Keskar et al. 2019, section 4.1).
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output (OpenAI).
    pub frequency_penalty: f32,
    /// Subtracted once if the token is in the output (OpenAI).
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the counter-based generator; the position in the sequence is its counter.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy, nothing filtered.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// What a request's sink receives: once that it runs, tokens in order, then exactly one end, which
/// may come first.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamItem {
    /// It left the waiting line.
    Started {
        /// Prompt positions found in the cache.
        n_cached: usize,
    },
    /// The next token.
    Token(TokenEvent),
    /// Nothing follows.
    Finished(FinishReason),
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// Number of this token in the output, from 0.
    pub index: usize,
    /// Vocabulary id.
    pub token: u32,
    /// Log-probabilities, when asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities (natural logarithm) under the model's unmodified distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens, descending; ties by smaller id first.
    pub top: Vec<(u32, f32)>,
}

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came out.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The deadline passed; tokens sent so far are valid.
    DeadlinePassed,
    /// The node is going down or the model is being unloaded.
    Stopped,
    /// A step failed; the text is the cause for the log and the client.
    Failed(String),
}

/// The engine's end of a request's stream. Holds room for every event the request can produce, so
/// that the engine never waits for a slow reader.
#[derive(Debug, Clone)]
pub struct TokenSink(mpsc::Sender<StreamItem>);

/// The reader's end. Dropping it cancels the request within one step.
#[derive(Debug)]
pub struct TokenStream(mpsc::Receiver<StreamItem>);

/// A sink and its stream for a request of at most `max_tokens` tokens.
pub fn token_stream(max_tokens: usize) -> (TokenSink, TokenStream) {
    let (tx, rx) = mpsc::channel(max_tokens + 2);
    (TokenSink(tx), TokenStream(rx))
}

impl TokenSink {
    /// Sends an event; false when the reader is gone.
    pub fn send(&self, item: StreamItem) -> bool {
        match self.0.try_send(item) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                // The capacity covers the start, max_tokens events and the end; more is a bug of the engine.
                debug_assert!(false, "a request emitted more events than it may");
                false
            }
        }
    }

    /// True when nobody reads any more.
    pub fn is_cancelled(&self) -> bool {
        self.0.is_closed()
    }
}

impl TokenStream {
    /// The next event; `None` when the engine is gone without an end.
    pub async fn next(&mut self) -> Option<StreamItem> {
        self.0.recv().await
    }

    /// The next event for callers without an async runtime.
    pub fn blocking_next(&mut self) -> Option<StreamItem> {
        self.0.blocking_recv()
    }
}
