//! Qwen3-MoE: Qwen3 with softmax-routed experts and no shared one.

use dsd_kernels::backend::{GateShape, Scoring};

use super::{
    super::{
        fields::{ConfigError, Fields},
        spec::{DecoderSpec, FfnSpec, MoeSpec},
    },
    check_top_k, qwen3,
};

pub(in super::super) fn spec(config: Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    let mut spec = qwen3::spec(config)?;
    "qwen3_moe".clone_into(&mut spec.architecture);
    let (n_experts, top_k) = (
        config.size_either("num_experts", "num_local_experts")?,
        config.size("num_experts_per_tok")?,
    );
    check_top_k(top_k, n_experts)?;
    let moe = MoeSpec {
        gate: GateShape {
            n_experts,
            top_k,
            scoring: Scoring::Softmax,
            groups: None,
            normalize: config.flag_or("norm_topk_prob", false)?,
            scale: 1.0,
        },
        inter: config.size("moe_intermediate_size")?,
        shared_inter: None,
        gate_bias: false,
    };
    let dense_layers = config.sizes("mlp_only_layers")?;
    let step = config.size_or("decoder_sparse_step", 1)?;
    for (layer, ffn) in spec.ffns.iter_mut().enumerate() {
        if !dense_layers.contains(&layer) && (layer + 1).is_multiple_of(step) {
            *ffn = FfnSpec::Moe(moe.clone());
        }
    }
    Ok(spec)
}
