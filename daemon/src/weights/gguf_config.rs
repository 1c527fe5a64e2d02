//! GGUF metadata to the keys of a Hugging Face `config.json`.
//!
//! Invariant: what the metadata says and this file does not understand, but which changes the
//! arithmetic, is refused by name.

use serde_json::{Map, Value, json};

use super::{
    error::WeightsError,
    gguf::{GgufMetadata, GgufValue},
    tensor::StoredTensor,
};

/// The architectures served from GGUF: their name there, their `model_type`.
const ARCHITECTURES: [(&str, &str); 4] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3moe", "qwen3_moe"),
];

/// Builds the configuration.
///
/// # Errors
/// [`WeightsError::Field`] for a missing, mistyped or unsupported key.
pub(super) fn translate(
    metadata: &GgufMetadata,
    tensors: &[StoredTensor],
) -> Result<Value, WeightsError> {
    let keys = Keys::new(metadata)?;
    refuse_split(metadata)?;
    let has = |name: &str| tensors.iter().any(|t| t.name == name);
    let hidden_size = keys.required("embedding_length")?;
    let n_heads = keys.required_uniform("attention.head_count")?;
    if hidden_size == 0 || n_heads == 0 {
        return Err(keys.field("attention.head_count", "at least 1", "0"));
    }
    let n_kv_heads = keys.uniform("attention.head_count_kv")?.unwrap_or(n_heads);
    let head_dim = match metadata.uint(&keys.name("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let expected = format!("a divisor of the embedding length {hidden_size}");
            return Err(keys.field("attention.head_count", &expected, &n_heads.to_string()));
        }
    };
    // All supported models rotate whole heads and have values as wide as keys.
    keys.equals_if_there("attention.value_length", head_dim)?;
    keys.equals_if_there("rope.dimension_count", head_dim)?;

    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set("model_type", json!(keys.model_type));
    set("hidden_act", json!("silu"));
    set("hidden_size", json!(hidden_size));
    set("num_hidden_layers", json!(keys.required("block_count")?));
    set("num_attention_heads", json!(n_heads));
    set("num_key_value_heads", json!(n_kv_heads));
    set("head_dim", json!(head_dim));
    set(
        "intermediate_size",
        json!(keys.required_uniform("feed_forward_length")?),
    );
    set(
        "rms_norm_eps",
        json!(keys.required_float("attention.layer_norm_rms_epsilon")?),
    );
    set(
        "max_position_embeddings",
        json!(keys.required("context_length")?),
    );
    let rope_theta = metadata
        .float(&keys.name("rope.freq_base"))?
        .unwrap_or(10_000.0);
    set("rope_theta", json!(rope_theta));
    set("rope_scaling", rope_scaling(&keys)?);
    set("vocab_size", json!(vocab_size(metadata, tensors)?));
    set("tie_word_embeddings", json!(!has("output.weight")));
    set("attention_bias", json!(has("blk.0.attn_q.bias")));
    set("mlp_bias", json!(has("blk.0.ffn_up.bias")));
    if keys.model_type != "llama" {
        set("use_sliding_window", json!(false));
    }
    for (key, gguf_key) in [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ] {
        if let Some(id) = metadata.uint(gguf_key)? {
            set(key, json!(id));
        }
    }
    let n_experts = metadata.uint(&keys.name("expert_count"))?.unwrap_or(0);
    if keys.model_type == "qwen3_moe" {
        set("num_experts", json!(keys.required("expert_count")?));
        set(
            "num_experts_per_tok",
            json!(keys.required("expert_used_count")?),
        );
        set(
            "moe_intermediate_size",
            json!(keys.required("expert_feed_forward_length")?),
        );
        set("norm_topk_prob", json!(true));
        set("decoder_sparse_step", json!(1));
        set("mlp_only_layers", json!([]));
    } else if n_experts != 0 {
        return Err(keys.field("expert_count", "0", &n_experts.to_string()));
    }
    Ok(Value::Object(config))
}

/// The token ids after which generation ends: end of sequence, of turn, of message.
///
/// # Errors
/// [`WeightsError::Field`] for an id that is no integer.
pub(super) fn eos_token_ids(metadata: &GgufMetadata) -> Result<Vec<u32>, WeightsError> {
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        let Some(id) = metadata.uint(&key)? else {
            continue;
        };
        let id = u32::try_from(id)
            .map_err(|_| metadata.field(&key, "a 32-bit token id", &id.to_string()))?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn refuse_split(metadata: &GgufMetadata) -> Result<(), WeightsError> {
    match metadata.uint("split.count")? {
        None | Some(0 | 1) => Ok(()),
        Some(n) => Err(metadata.field("split.count", "one file", &format!("{n} files"))),
    }
}

/// Rows of the embedding: what logits have, padding included.
fn vocab_size(metadata: &GgufMetadata, tensors: &[StoredTensor]) -> Result<usize, WeightsError> {
    let embedding = tensors.iter().find(|t| t.name == "token_embd.weight");
    match embedding.map(|t| (t, t.shape.as_slice())) {
        Some((_, [n_rows, _])) => Ok(*n_rows),
        Some((t, _)) => Err(WeightsError::TensorShape {
            file: t.file.to_path_buf(),
            tensor: t.name.clone(),
            expected: "two dimensions".to_owned(),
            found: super::tensor::shape_of(&t.shape),
        }),
        None => Err(WeightsError::MissingTensor {
            file: metadata.file().to_owned(),
            tensor: "token_embd.weight".to_owned(),
        }),
    }
}

fn rope_scaling(keys: &Keys<'_>) -> Result<Value, WeightsError> {
    let metadata = keys.metadata;
    let key = keys.name("rope.scaling.type");
    let factor_key = keys.name("rope.scaling.factor");
    let rope_type = match metadata.string(&key)? {
        // Before `rope.scaling.type` there was only a linear factor.
        None if metadata.value(&keys.name("rope.scale_linear")).is_some() => {
            let key = keys.name("rope.scale_linear");
            return match metadata.float(&key)? {
                None | Some(1.0) => Ok(Value::Null),
                Some(factor) => Ok(json!({"rope_type": "linear", "factor": factor})),
            };
        }
        None | Some("none") => return Ok(Value::Null),
        Some(known @ ("linear" | "yarn")) => known,
        Some(other) => return Err(metadata.field(&key, "none, linear or yarn", other)),
    };
    let factor = metadata
        .float(&factor_key)?
        .ok_or_else(|| metadata.field(&factor_key, "a number", "missing"))?;
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), json!(rope_type));
    scaling.insert("factor".to_owned(), json!(factor));
    if let Some(n) = metadata.uint(&keys.name("rope.scaling.original_context_length"))? {
        scaling.insert("original_max_position_embeddings".to_owned(), json!(n));
    }
    for (hf_key, suffix) in [
        ("attn_factor", "rope.scaling.attn_factor"),
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ] {
        if let Some(value) = metadata.float(&keys.name(suffix))? {
            scaling.insert(hf_key.to_owned(), json!(value));
        }
    }
    Ok(Value::Object(scaling))
}

/// Access to the keys under the architecture's prefix.
struct Keys<'a> {
    metadata: &'a GgufMetadata,
    architecture: &'a str,
    model_type: &'static str,
}

impl<'a> Keys<'a> {
    fn new(metadata: &'a GgufMetadata) -> Result<Self, WeightsError> {
        let key = "general.architecture";
        let expected = ARCHITECTURES.map(|(name, _)| name).join(", ");
        let found = metadata
            .string(key)?
            .ok_or_else(|| metadata.field(key, &expected, "missing"))?;
        match ARCHITECTURES.iter().find(|(name, _)| *name == found) {
            Some((architecture, model_type)) => Ok(Self {
                metadata,
                architecture,
                model_type,
            }),
            None => Err(metadata.field(key, &expected, &format!("`{found}`"))),
        }
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    fn required(&self, suffix: &str) -> Result<u64, WeightsError> {
        self.metadata
            .uint(&self.name(suffix))?
            .ok_or_else(|| self.field(suffix, "an integer", "missing"))
    }

    fn required_float(&self, suffix: &str) -> Result<f64, WeightsError> {
        self.metadata
            .float(&self.name(suffix))?
            .ok_or_else(|| self.field(suffix, "a number", "missing"))
    }

    fn required_uniform(&self, suffix: &str) -> Result<u64, WeightsError> {
        self.uniform(suffix)?
            .ok_or_else(|| self.field(suffix, "an integer", "missing"))
    }

    /// An integer, or an array with one equal integer per layer.
    fn uniform(&self, suffix: &str) -> Result<Option<u64>, WeightsError> {
        let name = self.name(suffix);
        let Some(GgufValue::Array(per_layer)) = self.metadata.value(&name) else {
            return self.metadata.uint(&name);
        };
        match per_layer.split_first() {
            Some((GgufValue::Uint(first), rest))
                if rest.iter().all(|v| *v == GgufValue::Uint(*first)) =>
            {
                Ok(Some(*first))
            }
            _ => Err(self.field(suffix, "the same integer for all layers", "differing ones")),
        }
    }

    fn equals_if_there(&self, suffix: &str, expected: u64) -> Result<(), WeightsError> {
        match self.metadata.uint(&self.name(suffix))? {
            Some(found) if found != expected => {
                Err(self.field(suffix, &expected.to_string(), &found.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn field(&self, suffix: &str, expected: &str, found: &str) -> WeightsError {
        self.metadata.field(&self.name(suffix), expected, found)
    }
}
