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
        scale: routed_scaling(config, &DEFAULTS)?,
    };
    let gate = with_groups(config, gate, groups, &DEFAULTS)?;
    spec.ffns = ffns(config, gate, false, &DEFAULTS)?;
    Ok(spec)
}

/// What the absence of a key means: the defaults of transformers' configuration classes, by which
/// trimmed files were written.
pub(super) struct Defaults {
    pub(super) routed_scaling_factor: f64,
    pub(super) n_group: Option<usize>,
    pub(super) topk_group: Option<usize>,
    pub(super) first_k_dense_replace: usize,
    pub(super) n_shared_experts: usize,
}

const DEFAULTS: Defaults = Defaults {
    routed_scaling_factor: 1.0,
    n_group: None,
    topk_group: None,
    first_k_dense_replace: 0,
    n_shared_experts: 2,
};

#[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
pub(super) fn routed_scaling(config: Fields<'_>, defaults: &Defaults) -> Result<f32, ConfigError> {
    let scale = config.number_opt("routed_scaling_factor")?;
    Ok(scale.unwrap_or(defaults.routed_scaling_factor) as f32)
}

/// Adds the group limit where the configuration has one.
pub(super) fn with_groups(
    config: Fields<'_>,
    mut gate: GateShape,
    group_score: Option<GroupScore>,
    defaults: &Defaults,
) -> Result<GateShape, ConfigError> {
    let n_groups = config.size_or_none("n_group", defaults.n_group)?;
    let mut available = gate.n_experts;
    if group_score == Some(GroupScore::Max) && n_groups.is_none() {
        return Err(ConfigError::Missing { key: "n_group" });
    }
    if let (Some(group_score), Some(n_groups @ 2..)) = (group_score, n_groups) {
        let top_groups = config
            .size_or_none("topk_group", defaults.topk_group)?
            .ok_or(ConfigError::Missing { key: "topk_group" })?;
        let members_min = match group_score {
            GroupScore::Max => 1,
            GroupScore::TopTwoSum => 2,
        };
        if !gate.n_experts.is_multiple_of(n_groups)
            || top_groups > n_groups
            || gate.n_experts / n_groups < members_min
        {
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
    defaults: &Defaults,
) -> Result<Vec<FfnSpec>, ConfigError> {
    let n_layers = n_layers(config)?;
    let n_dense = config.count_opt("first_k_dense_replace")?;
    let n_dense = n_dense.unwrap_or(defaults.first_k_dense_replace);
    let every = config.size_or("moe_layer_freq", 1)?;
    let inter = config.size("moe_intermediate_size")?;
    let n_shared = match config.0.get("n_shared_experts") {
        None => defaults.n_shared_experts,
        Some(_) => config.count_opt("n_shared_experts")?.unwrap_or(0),
    };
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
