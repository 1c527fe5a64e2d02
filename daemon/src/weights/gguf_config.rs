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
const ARCHITECTURES: [(&str, &str); 5] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3moe", "qwen3_moe"),
    // V3 and its kin too; which of the two it is, the router's scores tell.
    ("deepseek2", "deepseek_v2"),
];

/// `expert_gating_func` of a router that scores by softmax; also that of files without the key.
const GATING_SOFTMAX: u64 = 1;
/// `expert_gating_func` of a router that scores by the logistic function.
const GATING_SIGMOID: u64 = 2;

/// Builds the configuration.
///
/// # Errors
/// [`WeightsError::Field`] for a missing, mistyped or unsupported key.
pub(super) fn translate(
    metadata: &GgufMetadata,
    tensors: &[StoredTensor],
) -> Result<Value, WeightsError> {
    let keys = Keys::new(metadata)?;
    let has = |name: &str| tensors.iter().any(|t| t.name == name);
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set("model_type", json!(keys.model_type));
    set("hidden_act", json!("silu"));
    set("hidden_size", json!(keys.required("embedding_length")?));
    set("num_hidden_layers", json!(keys.required("block_count")?));
    set(
        "num_attention_heads",
        json!(keys.required_uniform("attention.head_count")?),
    );
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
    for (key, gguf_key) in [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ] {
        if let Some(id) = metadata.uint(gguf_key)? {
            set(key, json!(id));
        }
    }
    if keys.architecture == "deepseek2" {
        set("attention_bias", json!(has("blk.0.attn_kv_a_mqa.bias")));
        latent_attention(&keys, &mut config)?;
        deepseek_experts(&keys, &mut config)?;
    } else {
        set("attention_bias", json!(has("blk.0.attn_q.bias")));
        set("mlp_bias", json!(has("blk.0.ffn_up.bias")));
        grouped_attention(&keys, &mut config)?;
        qwen_experts(&keys, &mut config)?;
    }
    Ok(Value::Object(config))
}

/// Heads of the llama and Qwen lines, which rotate whole heads and have values as wide as keys.
fn grouped_attention(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), WeightsError> {
    let hidden_size = keys.required("embedding_length")?;
    let n_heads = keys.required_uniform("attention.head_count")?;
    if hidden_size == 0 || n_heads == 0 {
        return Err(keys.field("attention.head_count", "at least 1", "0"));
    }
    let n_kv_heads = keys.uniform("attention.head_count_kv")?.unwrap_or(n_heads);
    let head_dim = match keys.uint("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let expected = format!("a divisor of the embedding length {hidden_size}");
            return Err(keys.field("attention.head_count", &expected, &n_heads.to_string()));
        }
    };
    keys.equals_if_there("attention.value_length", head_dim)?;
    keys.equals_if_there("rope.dimension_count", head_dim)?;
    config.insert("num_key_value_heads".to_owned(), json!(n_kv_heads));
    config.insert("head_dim".to_owned(), json!(head_dim));
    Ok(())
}

/// MLA. Files with `attention.key_length_mla` describe the absorbed form in the plain keys (one
/// KV head as wide as latent and rotated part together); older ones the expanded form.
fn latent_attention(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), WeightsError> {
    let rope_dim = keys.required("rope.dimension_count")?;
    let latent_len = keys.required("attention.kv_lora_rank")?;
    let (key_len, value_len) = match keys.uint("attention.key_length_mla")? {
        Some(key_len) => {
            keys.equals_if_there("attention.key_length", latent_len.saturating_add(rope_dim))?;
            keys.equals_if_there("attention.value_length", latent_len)?;
            (key_len, keys.required("attention.value_length_mla")?)
        }
        None => (
            keys.required("attention.key_length")?,
            keys.required("attention.value_length")?,
        ),
    };
    let Some(nope_dim) = key_len.checked_sub(rope_dim) else {
        let expected = format!("at least the {rope_dim} rotated elements");
        return Err(keys.field("attention.key_length", &expected, &key_len.to_string()));
    };
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set(
        "q_lora_rank",
        json!(
            keys.uint("attention.q_lora_rank")?
                .filter(|rank| *rank != 0)
        ),
    );
    set("kv_lora_rank", json!(latent_len));
    set("qk_nope_head_dim", json!(nope_dim));
    set("qk_rope_head_dim", json!(rope_dim));
    set("v_head_dim", json!(value_len));
    Ok(())
}

/// Experts of DeepSeek-V2 and V3. Files without group keys choose among all experts, as the
/// programs that write and read them do.
fn deepseek_experts(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), WeightsError> {
    if let Some(n) = keys.uint("nextn_predict_layers")?.filter(|n| *n != 0) {
        return Err(keys.field("nextn_predict_layers", "0", &n.to_string()));
    }
    let n_groups = keys.uint("expert_group_count")?.unwrap_or(1);
    let sigmoid = keys.model_type == "deepseek_v3";
    let topk_method = match (sigmoid, n_groups) {
        (true, _) => "noaux_tc",
        (false, 0 | 1) => "greedy",
        (false, _) => "group_limited_greedy",
    };
    // Zero and absent both mean that nothing is scaled.
    let scale = keys.float("expert_weights_scale")?.filter(|s| *s != 0.0);
    let norm = keys.metadata.bool(&keys.name("expert_weights_norm"))?;
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set("topk_method", json!(topk_method));
    set("n_routed_experts", json!(keys.required("expert_count")?));
    set(
        "num_experts_per_tok",
        json!(keys.required("expert_used_count")?),
    );
    set(
        "moe_intermediate_size",
        json!(keys.required("expert_feed_forward_length")?),
    );
    set(
        "n_shared_experts",
        json!(keys.uint("expert_shared_count")?.unwrap_or(0)),
    );
    set(
        "first_k_dense_replace",
        json!(keys.uint("leading_dense_block_count")?.unwrap_or(0)),
    );
    set("n_group", json!(n_groups.max(1)));
    set("topk_group", json!(keys.uint("expert_group_used_count")?));
    set("norm_topk_prob", json!(norm.unwrap_or(false)));
    set("routed_scaling_factor", json!(scale.unwrap_or(1.0)));
    Ok(())
}

/// Experts of Qwen3-MoE; the dense lines must have none.
fn qwen_experts(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), WeightsError> {
    if keys.model_type != "qwen3_moe" {
        return keys.equals_if_there("expert_count", 0);
    }
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
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
    Ok(())
}

/// Control tokens that end a turn or a text, whatever the keys say: files are about that name one
/// end token of several. They are those of llama.cpp for the lines served here, the ends of a file in
/// a filled hole included.
const END_TOKENS: [&str; 18] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<\u{FF5C}end\u{2581}of\u{2581}sentence\u{FF5C}>",
    "</s>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<|fim_pad|>",
    "<fim_pad>",
    "<|repo_name|>",
    "<reponame>",
    "<|file_sep|>",
];
/// Type of control tokens in `tokenizer.ggml.token_type`.
const CONTROL: u64 = 3;

/// The token ids after which generation ends: end of sequence, of turn, of message, and the control
/// tokens that are known to be such.
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
    let tokens = metadata.array("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = metadata.array("tokenizer.ggml.token_type")?;
    for (id, (token, kind)) in (0..).zip(tokens.iter().zip(types.unwrap_or_default())) {
        let is_control = match kind {
            GgufValue::Uint(kind) => *kind == CONTROL,
            GgufValue::Int(kind) => u64::try_from(*kind) == Ok(CONTROL),
            _ => false,
        };
        let GgufValue::String(token) = token else {
            continue;
        };
        if is_control && END_TOKENS.contains(&token.as_str()) && !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
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
    // Before `rope.scaling.factor` there was only a linear one. Zero stands for none.
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|factor| *factor != 0.0);
    let rope_type = match metadata.string(&key)? {
        Some("none") => return Ok(Value::Null),
        // A factor without a type is a linear one, as in the programs that write these files.
        None | Some("linear") if matches!(factor, None | Some(1.0)) => return Ok(Value::Null),
        None | Some("linear") => "linear",
        Some("yarn") => "yarn",
        Some(other) => return Err(metadata.field(&key, "none, linear or yarn", other)),
    };
    let factor = factor.ok_or_else(|| keys.field("rope.scaling.factor", "a number", "missing"))?;
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), json!(rope_type));
    scaling.insert("factor".to_owned(), json!(factor));
    if let Some(n) = metadata.uint(&keys.name("rope.scaling.original_context_length"))? {
        scaling.insert("original_max_position_embeddings".to_owned(), json!(n));
    }
    for (hf_key, suffix) in [
        ("attn_factor", "rope.scaling.attn_factor"),
        ("attn_factor", "rope.scaling.yarn_attn_factor"),
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ] {
        if let Some(value) = metadata.float(&keys.name(suffix))? {
            scaling.insert(hf_key.to_owned(), json!(value));
        }
    }
    if let Some(multiplier) = keys.float("rope.scaling.yarn_log_multiplier")? {
        // Written as a tenth of `mscale_all_dim`. There is no key for `mscale`, which equals it in
        // all models that have both.
        let mscale = multiplier * 10.0;
        scaling.insert("mscale".to_owned(), json!(mscale));
        scaling.insert("mscale_all_dim".to_owned(), json!(mscale));
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
        let Some((architecture, model_type)) =
            ARCHITECTURES.iter().find(|(name, _)| *name == found)
        else {
            return Err(metadata.field(key, &expected, &format!("`{found}`")));
        };
        let mut keys = Self {
            metadata,
            architecture,
            model_type,
        };
        if found == "deepseek2" {
            match keys.uint("expert_gating_func")? {
                None | Some(0 | GATING_SOFTMAX) => {}
                Some(GATING_SIGMOID) => keys.model_type = "deepseek_v3",
                Some(other) => {
                    let expected = "1 (softmax) or 2 (sigmoid)";
                    return Err(keys.field("expert_gating_func", expected, &other.to_string()));
                }
            }
        }
        Ok(keys)
    }

    fn uint(&self, suffix: &str) -> Result<Option<u64>, WeightsError> {
        self.metadata.uint(&self.name(suffix))
    }

    fn float(&self, suffix: &str) -> Result<Option<f64>, WeightsError> {
        self.metadata.float(&self.name(suffix))
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    fn required(&self, suffix: &str) -> Result<u64, WeightsError> {
        self.uint(suffix)?
            .ok_or_else(|| self.field(suffix, "an integer", "missing"))
    }

    fn required_float(&self, suffix: &str) -> Result<f64, WeightsError> {
        self.float(suffix)?
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
        match self.uint(suffix)? {
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
