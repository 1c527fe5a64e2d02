//! Generation over QUIC: one request, deltas as text comes out, one end.
//!
//! The stream is the request's life: whoever asked resets it to cancel.

use crate::wire::schema::{wire_enum, wire_messages, wire_struct};

wire_messages! {
    GenerateRequest = 0x0201, 1, Request;
    GenerateDelta = 0x0202, 1, Control;
    GenerateDone = 0x0203, 1, Control;
}

wire_struct! {
    /// Asks a model to go on from a prompt. Answered by [`GenerateDelta`] frames and a
    /// [`GenerateDone`].
    pub struct GenerateRequest {
        /// Name of the model; empty for the only one loaded.
        pub model: String,
        /// What it goes on from.
        pub input: Input,
        /// Tokens to generate at most; `None` for as many as fit the context.
        pub max_tokens: Option<u32>,
        /// How tokens are chosen.
        pub sampling: Sampling,
        /// The output ends before one of these.
        pub stop: Vec<String>,
        /// Whether a model that can think first shall; `None` leaves it to the template.
        pub thinking: Option<bool>,
    }
}

wire_enum! {
    /// A prompt in one of its forms.
    pub enum Input {
        /// Text, tokenized as it is.
        Prompt(String),
        /// A conversation, put through the model's chat template.
        Chat(Vec<ChatMessage>),
        /// Token ids.
        Tokens(Vec<u32>),
    }
}

wire_struct! {
    /// One turn of a conversation.
    pub struct ChatMessage {
        /// Who speaks.
        pub role: Role,
        /// What is said; never read as special tokens.
        pub content: String,
    }
}

wire_enum! {
    /// Who speaks in a conversation.
    pub enum Role {
        /// Instructions that precede the conversation.
        System,
        /// The person.
        User,
        /// The model.
        Assistant,
        /// The result of a tool call.
        Tool,
    }
}

wire_struct! {
    /// How tokens are chosen; `None` takes the default of the HTTP API, whatever the model's files
    /// recommend.
    pub struct Sampling {
        /// Divides the logits; 0 takes the largest. Default 1.
        pub temperature: Option<f32>,
        /// Keeps the smallest set of likeliest tokens with at least this mass.
        pub top_p: Option<f32>,
        /// Keeps this many likeliest tokens; 0 keeps all.
        pub top_k: Option<u32>,
        /// Drops tokens below this fraction of the likeliest one's probability.
        pub min_p: Option<f32>,
        /// Divides positive and multiplies negative logits of tokens seen; 1 is off.
        pub repetition_penalty: Option<f32>,
        /// Subtracted once per occurrence in the output.
        pub frequency_penalty: Option<f32>,
        /// Subtracted once if the token is in the output.
        pub presence_penalty: Option<f32>,
        /// Key of the generator; `None` for a fresh one.
        pub seed: Option<u64>,
    }
}

impl Sampling {
    /// Everything as the HTTP API has it: temperature 1, no filter, no penalty, a fresh seed.
    pub const DEFAULT: Self = Self {
        temperature: None,
        top_p: None,
        top_k: None,
        min_p: None,
        repetition_penalty: None,
        frequency_penalty: None,
        presence_penalty: None,
        seed: None,
    };
}

wire_struct! {
    /// Text that came out since the last delta.
    pub struct GenerateDelta {
        /// Of the answer.
        pub content: String,
        /// Of the thinking that precedes it.
        pub reasoning: String,
        /// Tokens since the last delta.
        pub n_tokens: u32,
    }
}

wire_enum! {
    /// Why a generation ended.
    pub enum Finish {
        /// A stop token or stop string came out.
        Stop,
        /// `max_tokens` or the context length was reached.
        Length,
    }
}

wire_struct! {
    /// The generation is complete; nothing follows.
    pub struct GenerateDone {
        /// Why it ended.
        pub finish_reason: Finish,
        /// Tokens of the prompt after template and tokenizer.
        pub n_prompt_tokens: u32,
        /// Tokens generated.
        pub n_completion_tokens: u32,
        /// From arrival at the node to the step that takes the request in.
        pub queue_ms: u64,
        /// From arrival at the node to the first token.
        pub ttft_ms: u64,
    }
}
