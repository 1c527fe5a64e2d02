//! What travels between the parts of a node: requests down, token events up.
//!
//! Named by every module, names none.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Instant,
};

use tokio::sync::mpsc;

/// One generation as the engine sees it.
#[derive(Debug)]
pub struct Request {
    /// Name in logs; unique on this node.
    pub id: RequestId,
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens that were generated before, by an engine that was lost; the next one follows them, the
    /// same as it would have been there.
    pub output: Vec<u32>,
    /// Tokens to generate at most, those generated before included; more than those, or 0 where the
    /// prompt's log-probabilities are all that is wanted.
    pub max_tokens: usize,
    /// The generation ends after one of these came out; it is the last token emitted.
    pub stop_tokens: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What tokens may follow each other, as `grammar::write` has it; `None`: all.
    pub grammar: Option<Arc<str>>,
    /// `None`: no log-probabilities; `Some(n)`: of the chosen token and the `n` likeliest.
    pub top_logprobs: Option<usize>,
    /// First token of the prompt whose log-probabilities are wanted, with those behind it: at least 1,
    /// since nothing comes before the first one. `None`: none are.
    pub scored_from: Option<usize>,
    /// After this moment the request ends with [`FinishReason::DeadlinePassed`].
    pub deadline: Option<Instant>,
    /// With whom beginnings of prompts are shared.
    pub cache_owner: CacheOwner,
    /// Who its work is charged to.
    pub account: Account,
    /// The choices that it is one of.
    pub siblings: Siblings,
    /// Where events go.
    pub sink: TokenSink,
}

/// Whose keys and values a request may find in the cache, and who may find its own: the digest of
/// its API key, made here and never taken from the client; all zeros where everybody may call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheOwner(pub [u8; 32]);

/// Who a request's work is charged to. Accounts share an engine in proportion to their tenants'
/// weights; the users of a tenant share what is the tenant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Digest of the tenant's name; 0 where everybody may call.
    pub tenant: u64,
    /// Digest of the user that the client named; 0 for none.
    pub user: u64,
    /// The tenant's share against other tenants', at least 1.
    pub weight: u32,
    /// Whether somebody waits for the first token.
    pub class: Class,
}

impl Default for Account {
    fn default() -> Self {
        Self {
            tenant: 0,
            user: 0,
            weight: 1,
            class: Class::Interactive,
        }
    }
}

/// The choices of one request, which are submitted together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Siblings {
    /// Names the request they belong to; 0 where there is one choice.
    pub request: u64,
    /// How many they are; 0 counts as 1.
    pub n: u32,
}

/// What a request expects of the time to its first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Soon, or a refusal that says when.
    Interactive,
    /// Whenever there is room.
    Batch,
}

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

/// What a request's sink receives: once that it runs, log-probabilities of its prompt in order, tokens
/// in order, then exactly one end, which may come first.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamItem {
    /// It left the waiting line.
    Started {
        /// Prompt positions found in the cache.
        n_cached: usize,
        /// When the first step that computes for it began.
        at: Instant,
    },
    /// How far its prompt is. For those who account for it; its reader gets none.
    Prefilled {
        /// Positions computed.
        n_computed: usize,
    },
    /// Log-probabilities of tokens of its prompt, when asked for.
    Scored {
        /// Number of the first of them in the prompt.
        first: usize,
        /// In order.
        scores: Vec<TokenLogprobs>,
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
    /// Of the chosen token, or of the one that the prompt has there.
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
    /// What computed it was lost again and again, or came back as something else; tokens sent so far
    /// are valid.
    InsufficientResources,
    /// A step failed; the text is the cause for the log and the client.
    Failed(String),
}

/// What takes a request's events.
pub trait EventSink: Send + Sync {
    /// Takes an event; false when nobody reads any more.
    fn send(&self, item: StreamItem) -> bool;
    /// True when nobody reads any more.
    fn is_cancelled(&self) -> bool;
}

/// The engine's end of a request's stream. Holds room for every event the request can produce, so
/// that the engine never waits for a slow reader.
#[derive(Clone)]
pub struct TokenSink {
    target: Arc<dyn EventSink>,
    on_close: Arc<OnClose>,
}

/// The reader's end. Dropping it cancels the request within one step.
#[derive(Debug)]
pub struct TokenStream {
    items: mpsc::Receiver<StreamItem>,
    on_close: Arc<OnClose>,
}

/// What to do when the reader goes away.
#[derive(Default)]
struct OnClose(OnceLock<Box<dyn Fn() + Send + Sync>>);

/// A sink and its stream for a request of at most `n_tokens_max` tokens, those of its prompt that are
/// scored included.
pub fn token_stream(n_tokens_max: usize) -> (TokenSink, TokenStream) {
    let (tx, items) = mpsc::channel(n_tokens_max + 2);
    let on_close = Arc::<OnClose>::default();
    let sink = TokenSink {
        target: Arc::new(ChannelSink(tx)),
        on_close: Arc::clone(&on_close),
    };
    (sink, TokenStream { items, on_close })
}

struct ChannelSink(mpsc::Sender<StreamItem>);

impl EventSink for ChannelSink {
    fn send(&self, item: StreamItem) -> bool {
        match self.0.try_send(item) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                // The capacity covers the start, an event per token and the end; more is a bug of the engine.
                debug_assert!(false, "a request emitted more events than it may");
                false
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_closed()
    }
}

impl TokenSink {
    /// A sink whose events go elsewhere.
    pub fn to(target: Arc<dyn EventSink>) -> Self {
        Self {
            target,
            on_close: Arc::default(),
        }
    }

    /// This sink with somebody in between, who passes events on.
    #[must_use]
    pub fn through(self, between: impl FnOnce(Self) -> Arc<dyn EventSink>) -> Self {
        let on_close = Arc::clone(&self.on_close);
        Self {
            target: between(self),
            on_close,
        }
    }

    /// Sends an event; false when the reader is gone.
    pub fn send(&self, item: StreamItem) -> bool {
        self.target.send(item)
    }

    /// True when nobody reads any more.
    pub fn is_cancelled(&self) -> bool {
        self.target.is_cancelled()
    }

    /// Calls `hook` once when the reader goes away from now on. Only the first hook counts.
    pub fn on_close(&self, hook: impl Fn() + Send + Sync + 'static) {
        // A second one would be a second owner of the request, which there is not.
        let _ = self.on_close.0.set(Box::new(hook));
    }
}

impl fmt::Debug for TokenSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSink").finish_non_exhaustive()
    }
}

impl fmt::Debug for OnClose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnClose").finish_non_exhaustive()
    }
}

impl TokenStream {
    /// The next event; `None` when the engine is gone without an end.
    pub async fn next(&mut self) -> Option<StreamItem> {
        self.items.recv().await
    }

    /// The next event for callers without an async runtime.
    pub fn blocking_next(&mut self) -> Option<StreamItem> {
        self.items.blocking_recv()
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.items.close();
        if let Some(hook) = self.on_close.0.get() {
            hook();
        }
    }
}
