//! What a decoder is made of, in the papers' names: the common form of every model line.

use dsd_kernels::backend::{CacheRows, GateShape, KvType, RopeLayout};

use super::{
    bounds,
    fields::{ConfigError, Fields},
    lines,
    rope::RopeSpec,
};
use crate::weights::Checkpoint;

/// A decoder-only transformer with pre-norm residual layers.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// `model_type` of the checkpoint.
    pub architecture: String,
    /// Rows of the embedding; may exceed the tokenizer's.
    pub vocab_len: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Epsilon of the layer norms.
    pub rms_norm_eps: f32,
    /// Positions the model was made for.
    pub context_len: usize,
    /// The output layer is the embedding: the configuration says so, and there is no other.
    pub tied_head: bool,
    /// Rotation of queries and keys.
    pub rope: RopeSpec,
    /// Which elements are rotated together.
    pub rope_layout: RopeLayout,
    /// The same attention in every layer.
    pub attention: AttentionSpec,
    /// One entry per layer.
    pub ffns: Vec<FfnSpec>,
    /// Layers behind the last that hold prediction heads (MTP); their tensors are left alone.
    pub n_extra_layers: usize,
}

/// How tokens look at each other.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionSpec {
    /// Grouped-query attention (Ainslie et al. 2023).
    Gqa(GqaSpec),
    /// Multi-head latent attention (DeepSeek-V2, section 2.1).
    Mla(MlaSpec),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct GqaSpec {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// q, k, v projections have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// Queries and keys are normalised per head before the rotation.
    pub qk_norm: bool,
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaSpec {
    /// Heads.
    pub n_heads: usize,
    /// Rank of the query compression; `None` projects directly.
    pub q_lora_rank: Option<usize>,
    /// Elements of the cached latent.
    pub kv_lora_rank: usize,
    /// Elements of a head without rotation.
    pub qk_nope_head_dim: usize,
    /// Rotated elements of a head, shared over heads on the key side.
    pub qk_rope_head_dim: usize,
    /// Elements of a value head.
    pub v_head_dim: usize,
    /// q_a, kv_a and output projections have a bias.
    pub bias: bool,
    /// Factor on scores.
    pub softmax_scale: f32,
}

/// A layer's feed-forward part.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnSpec {
    /// One SwiGLU MLP (Shazeer 2020).
    Mlp {
        /// Width inside.
        inter: usize,
        /// All three projections have a bias.
        bias: bool,
    },
    /// Routed experts, and perhaps shared ones (DeepSeekMoE, Dai et al. 2024).
    Moe(MoeSpec),
}

/// Routed experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// The choice of experts.
    pub gate: GateShape,
    /// Width inside a routed expert.
    pub inter: usize,
    /// Width inside the shared expert; `None` without.
    pub shared_inter: Option<usize>,
    /// The choice is biased by `e_score_correction_bias`.
    pub gate_bias: bool,
}

impl DecoderSpec {
    /// Layers.
    pub fn n_layers(&self) -> usize {
        self.ffns.len()
    }

    /// What one layer caches per position.
    pub fn cache_rows(&self) -> CacheRows {
        match &self.attention {
            AttentionSpec::Gqa(gqa) => CacheRows::Heads {
                n_kv_heads: gqa.n_kv_heads,
                head_dim: gqa.head_dim,
            },
            AttentionSpec::Mla(mla) => CacheRows::Latent {
                latent_len: mla.kv_lora_rank,
                rope_len: mla.qk_rope_head_dim,
            },
        }
    }

    /// Bytes cached per position over all layers.
    pub fn cache_bytes_per_token(&self, kv_type: KvType) -> usize {
        kv_type.position_bytes(self.cache_rows()) * self.n_layers()
    }
}

/// Reads a checkpoint's configuration and holds its sizes against the tensors.
///
/// # Errors
/// [`ConfigError`] naming the key or the architecture.
pub fn spec_of(checkpoint: &Checkpoint) -> Result<DecoderSpec, ConfigError> {
    let spec = spec_as_configured(checkpoint)?;
    bounds::check(&spec, Fields(checkpoint.config()), checkpoint)?;
    Ok(spec)
}

/// What the configuration says by itself.
pub(super) fn spec_as_configured(checkpoint: &Checkpoint) -> Result<DecoderSpec, ConfigError> {
    let config = Fields(checkpoint.config());
    let mut spec = spec_of_line(config, checkpoint)?;
    // A head of its own is one that training or merging has moved away from the embedding, whatever
    // the configuration says; where it is only a copy, nothing changes. Transformers does the same.
    spec.tied_head &= !checkpoint.contains("lm_head.weight");
    Ok(spec)
}

fn spec_of_line(config: Fields<'_>, checkpoint: &Checkpoint) -> Result<DecoderSpec, ConfigError> {
    match checkpoint.architecture() {
        "llama" => lines::llama::spec(config, checkpoint),
        "qwen2" => lines::qwen2::spec(config),
        "qwen3" => lines::qwen3::spec(config),
        "qwen3_moe" => lines::qwen3_moe::spec(config),
        "deepseek_v2" => lines::deepseek_v2::spec(config),
        "deepseek_v3" => lines::deepseek_v3::spec(config),
        other => Err(ConfigError::UnknownArchitecture {
            architecture: other.to_owned(),
            supported: "llama, qwen2, qwen3, qwen3_moe, deepseek_v2 and deepseek_v3",
        }),
    }
}
