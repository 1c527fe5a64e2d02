//! Answers of the API, whole and in chunks.

use serde::{Deserialize, Serialize};

use super::tools::{ToolCallDelta, ToolCallReply};

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token, stop token or stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The model called tools and waits for what comes of it.
    ToolCalls,
    /// The server could not go on; what was sent is valid (DeepSeek's word).
    InsufficientSystemResource,
    /// The request's deadline passed; what was sent is valid.
    DeadlineExceeded,
}

/// Token counts of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of all prompts, each counted once.
    pub prompt_tokens: usize,
    /// Tokens of all choices.
    pub completion_tokens: usize,
    /// The sum.
    pub total_tokens: usize,
    /// Prompt tokens whose keys and values were in the cache (DeepSeek's field).
    pub prompt_cache_hit_tokens: usize,
    /// Prompt tokens that were computed (DeepSeek's field).
    pub prompt_cache_miss_tokens: usize,
    /// The hits again, where OpenAI has them.
    pub prompt_tokens_details: PromptTokensDetails,
    /// Present for chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

/// Where the prompt tokens came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Tokens whose keys and values were in the cache.
    pub cached_tokens: usize,
}

impl Usage {
    /// Counts of one answer; `n_reasoning` for chats.
    pub fn new(
        n_prompt: usize,
        n_cached: usize,
        n_output: usize,
        n_reasoning: Option<usize>,
    ) -> Self {
        Self {
            prompt_tokens: n_prompt,
            completion_tokens: n_output,
            total_tokens: n_prompt + n_output,
            prompt_cache_hit_tokens: n_cached,
            prompt_cache_miss_tokens: n_prompt.saturating_sub(n_cached),
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: n_cached,
            },
            completion_tokens_details: n_reasoning
                .map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens }),
        }
    }
}

/// What the completion tokens were spent on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionTokensDetails {
    /// Tokens spent thinking.
    pub reasoning_tokens: usize,
}

/// Answer of `POST /v1/chat/completions`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatCompletion {
    /// `chatcmpl-..`.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model's name.
    pub model: String,
    /// In order of their index.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
}

/// One answer of a chat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    /// From 0.
    pub index: usize,
    /// The answer.
    pub message: ChatReply,
    /// Present when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// The assistant's message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatReply {
    /// `assistant`.
    pub role: String,
    /// Text without thoughts, calls and stop strings; null beside calls when there is none.
    pub content: Option<String>,
    /// Always null: a model's refusal is text.
    #[serde(default)]
    pub refusal: Option<String>,
    /// Thoughts; absent when there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls of tools; absent when there were none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallReply>,
}

/// One event of a streamed chat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChunk {
    /// The same in all chunks.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model's name.
    pub model: String,
    /// One choice, or none in the chunk of token counts.
    pub choices: Vec<ChatChunkChoice>,
    /// With `include_usage`: null, and the counts in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// What is new in a choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChunkChoice {
    /// From 0.
    pub index: usize,
    /// New text.
    pub delta: ChatDelta,
    /// Of the tokens since the last chunk, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// In the choice's last chunk.
    pub finish_reason: Option<FinishReason>,
}

/// New text of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatDelta {
    /// In the choice's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// New text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// New thoughts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// What is new of a call.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}

/// Log-probabilities of a chat choice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// One entry for each generated token of the answer, end tokens excluded.
    pub content: Vec<ChatTokenLogprob>,
    /// The same of the thoughts; absent when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasoning_content: Vec<ChatTokenLogprob>,
}

/// Log-probability of one generated token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatTokenLogprob {
    /// Its text; bytes that are no whole character show as U+FFFD.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f32,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// The likeliest tokens, descending.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that could have come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f32,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
}

/// Answer of `POST /v1/completions`; also one event of a stream of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// `cmpl-..`.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model's name.
    pub model: String,
    /// In order of their index; one in a stream's event, none in its event of token counts.
    pub choices: Vec<CompletionChoice>,
    /// Token counts; in a stream as for [`ChatChunk::usage`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One continuation of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompletionChoice {
    /// Prompt number times `n` plus the number among that prompt's choices.
    pub index: usize,
    /// The text, or what is new of it.
    pub text: String,
    /// Present when asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Absent while a stream goes on.
    pub finish_reason: Option<FinishReason>,
}

/// Log-probabilities of a plain completion: parallel lists, one entry per token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CompletionLogprobs {
    /// Texts of the tokens; bytes that are no whole character show as `bytes:\xNN..`.
    pub tokens: Vec<String>,
    /// Natural logarithms; none of the first token of a prompt, before which nothing comes.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens by text.
    pub top_logprobs: Vec<Option<serde_json::Map<String, serde_json::Value>>>,
    /// Where in the choice's text each token begins, in characters.
    pub text_offset: Vec<usize>,
}

/// Answer of `GET /v1/models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// Served models by name.
    pub data: Vec<Model>,
}

/// A served model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// `model`.
    pub object: String,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// Who serves it.
    pub owned_by: String,
    /// Tokens that prompt and answer may have together.
    pub max_model_len: usize,
}

/// Answer of `GET /user/balance`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// Whether a request would be taken now.
    pub is_available: bool,
    /// What is left of the tenant's cap on tokens; none without one.
    pub balance_infos: Vec<BalanceEntry>,
}

/// An amount of something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalanceEntry {
    /// `TOKENS`: nobody pays here.
    pub currency: String,
    /// Tokens that may be asked for now.
    pub total_balance: String,
    /// The same.
    pub granted_balance: String,
    /// Always `0`.
    pub topped_up_balance: String,
}

/// Answer of `GET /tokenizer_info`, with the names of `tokenizer_config.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerDescription {
    /// The served model's name.
    pub model: String,
    /// Text of the token that texts begin with.
    pub bos_token: Option<String>,
    /// Text of the token that answers end with.
    pub eos_token: Option<String>,
    /// Whether texts begin with `bos_token`.
    pub add_bos_token: bool,
    /// Ids.
    pub vocab_size: usize,
    /// Tokens that prompt and answer may have together.
    pub model_max_length: usize,
    /// The default one, in Jinja.
    pub chat_template: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(chunk: &ChatChunk, expected: &str) {
        assert_eq!(serde_json::to_string(chunk).unwrap(), expected);
    }

    #[test]
    fn chunks_leave_out_what_is_not_there() {
        let mut chunk = ChatChunk {
            id: "i".into(),
            object: "chat.completion.chunk".into(),
            created: 1,
            model: "m".into(),
            choices: vec![ChatChunkChoice {
                index: 0,
                delta: ChatDelta {
                    role: None,
                    content: Some("x".into()),
                    ..ChatDelta::default()
                },
                logprobs: None,
                finish_reason: None,
            }],
            usage: None,
        };
        let head = r#"{"id":"i","object":"chat.completion.chunk","created":1,"model":"m","#;
        let choice = r#""choices":[{"index":0,"delta":{"content":"x"},"logprobs":null,"finish_reason":null}]"#;
        check(&chunk, &format!("{head}{choice}}}"));
        chunk.usage = Some(None);
        check(&chunk, &format!("{head}{choice},\"usage\":null}}"));
        chunk.choices.clear();
        chunk.usage = Some(Some(Usage::new(5, 3, 2, Some(1))));
        check(
            &chunk,
            &format!(
                "{head}\"choices\":[],\"usage\":{{\"prompt_tokens\":5,\"completion_tokens\":2,\"total_tokens\":7,\
                 \"prompt_cache_hit_tokens\":3,\"prompt_cache_miss_tokens\":2,\
                 \"prompt_tokens_details\":{{\"cached_tokens\":3}},\
                 \"completion_tokens_details\":{{\"reasoning_tokens\":1}}}}}}"
            ),
        );
    }
}
