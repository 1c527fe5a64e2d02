//! DeepSeek-V3, R1, V3.1: latent attention, sigmoid-routed experts balanced by a bias
//! (DeepSeek-V3 report, section 2.1).

use dsd_kernels::backend::{GateShape, GroupScore, RopeLayout, Scoring};

use super::{
    super::{
        fields::{ConfigError, Fields},
        spec::DecoderSpec,
    },
    deepseek_v2::{Defaults, ffns, routed_scaling, with_groups},
    mla,
};

const DEFAULTS: Defaults = Defaults {
    routed_scaling_factor: 2.5,
    n_group: Some(8),
    topk_group: Some(4),
    first_k_dense_replace: 3,
    n_shared_experts: 1,
};

pub(in super::super) fn spec(config: Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    config.only("scoring_func", "sigmoid")?;
    config.only("topk_method", "noaux_tc")?;
    let mut spec = mla("deepseek_v3", config)?;
    if !config.flag_or("rope_interleave", true)? {
        spec.rope_layout = RopeLayout::Halves;
    }
    let gate = GateShape {
        n_experts: config.size_either("n_routed_experts", "num_local_experts")?,
        top_k: config.size("num_experts_per_tok")?,
        scoring: Scoring::Sigmoid,
        groups: None,
        normalize: config.flag_or("norm_topk_prob", true)?,
        scale: routed_scaling(config, &DEFAULTS)?,
    };
    let gate = with_groups(config, gate, Some(GroupScore::TopTwoSum), &DEFAULTS)?;
    spec.ffns = ffns(config, gate, true, &DEFAULTS)?;
    spec.n_extra_layers = match config.count_opt("num_nextn_predict_layers")? {
        Some(n) => n,
        None => config.count_opt("num_mtp_layers")?.unwrap_or(0),
    };
    Ok(spec)
}
