//! One file per model line.

pub(super) mod llama;
pub(super) mod qwen2;
pub(super) mod qwen3;
pub(super) mod qwen3_moe;
pub(super) mod deepseek_v2;
pub(super) mod deepseek_v3;

use dsd_kernels::backend::RopeLayout;
use serde_json::Value;

use super::{
    fields::{ConfigError, Fields, contradiction, unsupported},
    rope::RopeSpec,
    spec::{AttentionSpec, DecoderSpec, FfnSpec, GqaSpec, MlaSpec},
};

/// The part that Llama and the Qwen lines share: grouped-query attention and SwiGLU layers.
fn dense(
    architecture: &str,
    config: Fields<'_>,
    attention: impl FnOnce(&mut GqaSpec),
) -> Result<DecoderSpec, ConfigError> {
    let hidden = config.size("hidden_size")?;
    let n_heads = config.size("num_attention_heads")?;
    let n_kv_heads = config.size_or("num_key_value_heads", n_heads)?;
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(contradiction(format!(
            "num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}"
        )));
    }
    let head_dim = match config.size_opt("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(n_heads) => hidden / n_heads,
        None => {
            return Err(contradiction(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}"
            )));
        }
    };
    let mut gqa = GqaSpec {
        n_heads,
        n_kv_heads,
        head_dim,
        qkv_bias: false,
        output_bias: false,
        qk_norm: false,
    };
    attention(&mut gqa);
    let rope = RopeSpec::read(config, head_dim)?;
    let inter = config.size("intermediate_size")?;
    let mut spec = common(architecture, config, rope, AttentionSpec::Gqa(gqa))?;
    spec.rope_layout = RopeLayout::Halves;
    spec.ffns = vec![FfnSpec::Mlp { inter, bias: false }; n_layers(config)?];
    Ok(spec)
}

/// Multi-head latent attention and the sizes all DeepSeek lines share; feed-forward layers are
/// the caller's.
fn mla(architecture: &str, config: Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    if config.0.get("q_lora_rank").is_none() {
        return Err(ConfigError::Missing { key: "q_lora_rank" });
    }
    let (nope, rope_dim) = (
        config.size("qk_nope_head_dim")?,
        config.size("qk_rope_head_dim")?,
    );
    let rope = RopeSpec::read(config, rope_dim)?;
    let scale = ((nope + rope_dim) as f64).powf(-0.5) * rope.softmax_factor * rope.softmax_factor;
    #[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
    let attention = AttentionSpec::Mla(MlaSpec {
        n_heads: config.size("num_attention_heads")?,
        q_lora_rank: config.size_opt("q_lora_rank")?,
        kv_lora_rank: config.size("kv_lora_rank")?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_dim,
        v_head_dim: config.size("v_head_dim")?,
        bias: config.flag_or("attention_bias", false)?,
        softmax_scale: scale as f32,
    });
    common(architecture, config, rope, attention)
}

fn common(
    architecture: &str,
    config: Fields<'_>,
    rope: RopeSpec,
    attention: AttentionSpec,
) -> Result<DecoderSpec, ConfigError> {
    config.only("hidden_act", "silu")?;
    if config.flag_or("use_sliding_window", false)? {
        return Err(unsupported(
            "use_sliding_window",
            true,
            "only full attention is",
        ));
    }
    let layer_types = config.get("layer_types").and_then(Value::as_array);
    if let Some(other) = layer_types.and_then(|l| l.iter().find(|t| *t != "full_attention")) {
        return Err(unsupported("layer_types", other, "only full_attention is"));
    }
    let eps = config.number("rms_norm_eps")?;
    #[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
    Ok(DecoderSpec {
        architecture: architecture.to_owned(),
        vocab_len: config.size("vocab_size")?,
        hidden: config.size("hidden_size")?,
        rms_norm_eps: eps as f32,
        context_len: config.size("max_position_embeddings")?,
        tied_head: config.flag_or("tie_word_embeddings", false)?,
        rope,
        rope_layout: RopeLayout::Pairs,
        attention,
        ffns: Vec::new(),
        n_extra_layers: 0,
    })
}

fn n_layers(config: Fields<'_>) -> Result<usize, ConfigError> {
    config.size("num_hidden_layers")
}

/// `top_k` experts must exist.
fn check_top_k(top_k: usize, available: usize) -> Result<(), ConfigError> {
    if top_k > available {
        return Err(contradiction(format!(
            "num_experts_per_tok {top_k} exceeds the {available} experts that can be chosen"
        )));
    }
    Ok(())
}
