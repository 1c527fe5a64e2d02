//! DeepSeek-V2, V2-Lite, V2.5: latent attention, softmax-routed experts (DeepSeek-V2 report).

use dsd_kernels::backend::{GateGroups, GateShape, GroupScore, Scoring};

use super::{
    super::{
        fields::{ConfigError, Fields, contradiction, unsupported},
        spec::{DecoderSpec, FfnSpec, MoeSpec},
    },
    check_top_k, mla, n_layers,
};

pub(in super::super) fn spec(config: Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    config.only("scoring_func", "softmax")?;
    if config.flag_or("norm_topk_prob", false)? {
        // Published code disagrees on what it means with this router, and no checkpoint sets it.
        return Err(unsupported(
            "norm_topk_prob",
            true,
            "false is, for deepseek_v2",
        ));
    }
    let mut spec = mla("deepseek_v2", config)?;
    let groups = match config.text("topk_method")?.unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => Some(GroupScore::Max),
        other => {
            let supported = "greedy and group_limited_greedy are, for deepseek_v2";
            return Err(unsupported("topk_method", other, supported));
        }
    };
    let gate = GateShape {
        n_experts: config.size_either("n_routed_experts", "num_local_experts")?,
        top_k: config.size("num_experts_per_tok")?,
        scoring: Scoring::Softmax,
        groups: None,
        normalize: false,
        scale: routed_scaling(config)?,
    };
    spec.ffns = ffns(config, with_groups(config, gate, groups)?, false)?;
    Ok(spec)
}

#[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
pub(super) fn routed_scaling(config: Fields<'_>) -> Result<f32, ConfigError> {
    Ok(config.number_opt("routed_scaling_factor")?.unwrap_or(1.0) as f32)
}

/// Adds the group limit where the configuration has one.
pub(super) fn with_groups(
    config: Fields<'_>,
    mut gate: GateShape,
    group_score: Option<GroupScore>,
) -> Result<GateShape, ConfigError> {
    let n_groups = config.size_or("n_group", 1)?;
    let mut available = gate.n_experts;
    if let Some(group_score) = group_score
        && n_groups > 1
    {
        let top_groups = config.size("topk_group")?;
        if !gate.n_experts.is_multiple_of(n_groups) || top_groups > n_groups {
            return Err(contradiction(format!(
                "n_group {n_groups} and topk_group {top_groups} do not fit {} experts",
                gate.n_experts
            )));
        }
        available = gate.n_experts / n_groups * top_groups;
        gate.groups = Some(GateGroups {
            n_groups,
            top_groups,
            group_score,
        });
    }
    check_top_k(gate.top_k, available)?;
    Ok(gate)
}

/// Dense layers first, then experts.
pub(super) fn ffns(
    config: Fields<'_>,
    gate: GateShape,
    gate_bias: bool,
) -> Result<Vec<FfnSpec>, ConfigError> {
    let n_layers = n_layers(config)?;
    let n_dense = config.count_opt("first_k_dense_replace")?.unwrap_or(0);
    let every = config.size_or("moe_layer_freq", 1)?;
    let inter = config.size("moe_intermediate_size")?;
    let n_shared = config.count_opt("n_shared_experts")?.unwrap_or(0);
    let shared_inter = (n_shared > 0).then_some(n_shared * inter);
    let moe = MoeSpec {
        gate,
        inter,
        shared_inter,
        gate_bias,
    };
    let dense_inter = config.size("intermediate_size")?;
    Ok((0..n_layers)
        .map(|layer| {
            if layer < n_dense || !layer.is_multiple_of(every) {
                FfnSpec::Mlp {
                    inter: dense_inter,
                    bias: false,
                }
            } else {
                FfnSpec::Moe(moe.clone())
            }
        })
        .collect())
}
