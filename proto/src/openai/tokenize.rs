//! `/tokenize` and `/detokenize`, as vLLM and llama.cpp have them.

use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{error::RequestError, raw};

/// `POST /tokenize` with a text; one with `messages` is a chat.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, expecting = "an object")]
pub struct TokenizeRequest {
    /// Name of a served model; may be left out when only one is served.
    pub model: Option<String>,
    /// The text.
    pub prompt: Option<String>,
    /// The text in llama.cpp's word.
    pub content: Option<String>,
    /// There is a conversation.
    pub messages: Option<IgnoredAny>,
    /// BOS goes in front where the model wants it; the default is no, as of `dsd eval tokenize`.
    pub add_special_tokens: Option<bool>,
    /// What spells a special token is that token; the default is yes.
    pub parse_special: Option<bool>,
    /// Whether the answer has the texts of the tokens.
    pub return_token_strs: Option<bool>,
}

/// `POST /detokenize`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, expecting = "an object")]
pub struct DetokenizeRequest {
    /// Name of a served model; may be left out when only one is served.
    pub model: Option<String>,
    /// Ids.
    pub tokens: Option<Vec<u32>>,
}

impl TokenizeRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// [`RequestError`] with the field to blame.
    pub fn from_slice(body: &[u8]) -> Result<Self, RequestError> {
        raw::parse(body)
    }

    /// The text.
    ///
    /// # Errors
    /// [`RequestError::Missing`].
    pub fn text(&self) -> Result<&str, RequestError> {
        let text = self.prompt.as_deref().or(self.content.as_deref());
        text.ok_or_else(|| RequestError::Missing {
            param: "prompt".into(),
        })
    }
}

impl DetokenizeRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// [`RequestError`] with the field to blame.
    pub fn from_slice(body: &[u8]) -> Result<Self, RequestError> {
        let request: Self = raw::parse(body)?;
        match request.tokens {
            Some(_) => Ok(request),
            None => Err(RequestError::Missing {
                param: "tokens".into(),
            }),
        }
    }
}

/// Answer of `POST /tokenize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokenized {
    /// How many.
    pub count: usize,
    /// Tokens that prompt and answer may have together.
    pub max_model_len: usize,
    /// Ids.
    pub tokens: Vec<u32>,
    /// Their texts, when asked for; bytes that are no whole character show as U+FFFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// Answer of `POST /detokenize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detokenized {
    /// The text, special tokens included.
    pub prompt: String,
}
