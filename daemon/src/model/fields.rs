//! Reading a model's configuration: every value has a type, a range and a name in the error.

use serde_json::Value;

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nothing here runs models of this kind.
    #[error("architecture `{architecture}` is not supported; supported are {supported}")]
    UnknownArchitecture {
        /// `model_type` of the checkpoint.
        architecture: String,
        /// The ones that are.
        supported: &'static str,
    },
    /// A required key is absent.
    #[error("config key `{key}` is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value has another type than expected.
    #[error("config key `{key}` is {found}, expected {expected}")]
    WrongType {
        /// The key.
        key: &'static str,
        /// What is there.
        found: String,
        /// What should be.
        expected: &'static str,
    },
    /// A value is known but not one this code computes.
    #[error("config key `{key}` is {found}, which is not supported; {supported}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// What is there.
        found: String,
        /// What would work.
        supported: &'static str,
    },
    /// A size beyond what any model has.
    #[error("config key `{key}` is {found}, at most {max} is supported")]
    TooLarge {
        /// The key.
        key: &'static str,
        /// What is there.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// A size that the tensors do not have.
    #[error("config key `{key}` is {value}, but {found}")]
    NotOfTensors {
        /// The key.
        key: &'static str,
        /// What is there.
        value: String,
        /// What the tensors say.
        found: String,
    },
    /// Two values exclude each other.
    #[error("config is contradictory: {what}")]
    Contradiction {
        /// The rule broken, with the numbers.
        what: String,
    },
}

/// Layers; the deepest published models have about 130.
const LAYERS_MAX: u64 = 1024;
/// Positions; what they take is bounded by the KV cache.
const CONTEXT_MAX: u64 = 1 << 26;
/// Widths of the residual stream, of feed-forward layers and of low-rank projections.
const WIDTH_MAX: u64 = 1 << 20;
/// Rows of the embedding.
const VOCAB_MAX: u64 = 1 << 24;
/// Heads of a layer.
const HEADS_MAX: u64 = 1 << 12;
/// Elements of a head; half of them have a frequency of the rotation each.
const HEAD_DIM_MAX: u64 = 1 << 14;
/// Experts of a layer; published models have up to 512.
const EXPERTS_MAX: u64 = 1 << 14;
/// Any other count.
const COUNT_MAX: u64 = 1 << 20;

/// The largest value of a size.
fn size_max(key: &str) -> u64 {
    match key {
        "num_hidden_layers" | "num_nextn_predict_layers" | "num_mtp_layers" => LAYERS_MAX,
        "max_position_embeddings" => CONTEXT_MAX,
        "hidden_size"
        | "intermediate_size"
        | "moe_intermediate_size"
        | "q_lora_rank"
        | "kv_lora_rank" => WIDTH_MAX,
        "vocab_size" => VOCAB_MAX,
        "num_attention_heads" | "num_key_value_heads" => HEADS_MAX,
        "head_dim" | "qk_nope_head_dim" | "qk_rope_head_dim" | "v_head_dim" => HEAD_DIM_MAX,
        "num_experts"
        | "n_routed_experts"
        | "num_local_experts"
        | "num_experts_per_tok"
        | "n_shared_experts"
        | "n_group"
        | "topk_group" => EXPERTS_MAX,
        _ => COUNT_MAX,
    }
}

/// A configuration object.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Value);

impl<'a> Fields<'a> {
    /// The value of `key`; null counts as absent.
    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// A count of at least one.
    pub(super) fn size(self, key: &'static str) -> Result<usize, ConfigError> {
        self.size_opt(key)?.ok_or(ConfigError::Missing { key })
    }

    /// A count of at least one under the first of two names that is there. Files saved by
    /// transformers 5 use its own names for some of the published keys.
    pub(super) fn size_either(
        self,
        key: &'static str,
        alias: &'static str,
    ) -> Result<usize, ConfigError> {
        match self.size_opt(key)? {
            Some(size) => Ok(size),
            None => self.size_opt(alias)?.ok_or(ConfigError::Missing { key }),
        }
    }

    pub(super) fn size_or(self, key: &'static str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.size_opt(key)?.unwrap_or(default))
    }

    /// A count of at least one where absent and null differ: what the key's absence means is the
    /// default of the vendor's program, and null says that there is none of it.
    pub(super) fn size_or_none(
        self,
        key: &'static str,
        absent: Option<usize>,
    ) -> Result<Option<usize>, ConfigError> {
        match self.0.get(key) {
            None => Ok(absent),
            Some(_) => self.size_opt(key),
        }
    }

    /// A count of at least one, absent or null.
    pub(super) fn size_opt(self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        match self.count_opt(key)? {
            Some(0) => Err(wrong(key, &Value::from(0), "a positive integer")),
            other => Ok(other),
        }
    }

    /// A count that may be zero.
    pub(super) fn count_opt(self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let max = size_max(key);
        match value.as_u64() {
            Some(found) if max < found => Err(ConfigError::TooLarge { key, found, max }),
            Some(n) => Ok(usize::try_from(n).ok()),
            None => Err(wrong(key, value, "an integer that is not negative")),
        }
    }

    pub(super) fn number(self, key: &'static str) -> Result<f64, ConfigError> {
        self.number_opt(key)?.ok_or(ConfigError::Missing { key })
    }

    pub(super) fn number_opt(self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(wrong(key, value, "a number")),
        }
    }

    pub(super) fn flag_or(self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => Err(wrong(key, value, "true or false")),
        }
    }

    pub(super) fn text(self, key: &'static str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(value) => Err(wrong(key, value, "a string")),
        }
    }

    pub(super) fn object(self, key: &'static str) -> Result<Option<Self>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value @ Value::Object(_)) => Ok(Some(Self(value))),
            Some(value) => Err(wrong(key, value, "an object")),
        }
    }

    pub(super) fn sizes(self, key: &'static str) -> Result<Vec<usize>, ConfigError> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(value) => value
                .as_array()
                .and_then(|list| {
                    list.iter()
                        .map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
                        .collect::<Option<Vec<_>>>()
                })
                .ok_or_else(|| wrong(key, value, "a list of integers")),
        }
    }

    /// Refuses any value but `expected` (absent is fine).
    pub(super) fn only(self, key: &'static str, expected: &'static str) -> Result<(), ConfigError> {
        match self.text(key)? {
            Some(found) if found != expected => {
                Err(unsupported(key, found, "only the usual value is"))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn wrong(key: &'static str, value: &Value, expected: &'static str) -> ConfigError {
    ConfigError::WrongType {
        key,
        found: value.to_string(),
        expected,
    }
}

pub(super) fn unsupported(
    key: &'static str,
    found: impl std::fmt::Display,
    supported: &'static str,
) -> ConfigError {
    ConfigError::Unsupported {
        key,
        found: format!("`{found}`"),
        supported,
    }
}

pub(super) fn contradiction(what: String) -> ConfigError {
    ConfigError::Contradiction { what }
}
