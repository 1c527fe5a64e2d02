//! GGUF tensor names to the names Hugging Face checkpoints use.

/// What a GGUF tensor is called in a Hugging Face checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HfName {
    /// One tensor.
    Whole(String),
    /// One matrix per head, `[heads, rows, cols]`; reachable as `[heads * rows, cols]`.
    HeadStack(String),
    /// A stack of experts' matrices, to be cut along its slowest dimension; each one is called
    /// `prefix.EXPERT.suffix`.
    ExpertStack {
        /// `model.layers.N.mlp.experts`.
        prefix: String,
        /// `gate_proj.weight` and so on.
        suffix: &'static str,
    },
}

/// Translates a name. One that is in no table stays as it is, so that whoever builds the model
/// sees it among the unclaimed.
pub(super) fn translate(name: &str) -> HfName {
    let whole = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => return translate_layer(name).unwrap_or_else(|| HfName::Whole(name.to_owned())),
    };
    HfName::Whole(whole.to_owned())
}

fn translate_layer(name: &str) -> Option<HfName> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // Only the canonical spelling: `00` and `+0` stay untranslated, so that they cannot pass for
    // another layer's tensor.
    let layer_idx: u32 = layer.parse().ok()?;
    if layer_idx.to_string() != layer {
        return None;
    }
    if rest == "exp_probs_b.bias" {
        let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
        return Some(HfName::Whole(name));
    }
    let stack = match rest {
        "ffn_gate_exps.weight" => Some("gate_proj.weight"),
        "ffn_up_exps.weight" => Some("up_proj.weight"),
        "ffn_down_exps.weight" => Some("down_proj.weight"),
        _ => None,
    };
    if let Some(suffix) = stack {
        let prefix = format!("model.layers.{layer}.mlp.experts");
        return Some(HfName::ExpertStack { prefix, suffix });
    }
    // `kv_b_proj` in two, the key half transposed; no Hugging Face checkpoint has these.
    let heads = match rest {
        "attn_k_b.weight" => Some("k_b_proj"),
        "attn_v_b.weight" => Some("v_b_proj"),
        _ => None,
    };
    if let Some(part) = heads {
        let name = format!("model.layers.{layer}.self_attn.{part}.weight");
        return Some(HfName::HeadStack(name));
    }
    let (part, kind) = rest.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let hf_part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_q_a" => "self_attn.q_a_proj",
        "attn_q_a_norm" => "self_attn.q_a_layernorm",
        "attn_q_b" => "self_attn.q_b_proj",
        "attn_kv_a_mqa" => "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm" => "self_attn.kv_a_layernorm",
        "attn_kv_b" => "self_attn.kv_b_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => "mlp.gate",
        "ffn_gate_shexp" => "mlp.shared_experts.gate_proj",
        "ffn_up_shexp" => "mlp.shared_experts.up_proj",
        "ffn_down_shexp" => "mlp.shared_experts.down_proj",
        _ => return None,
    };
    Some(HfName::Whole(format!(
        "model.layers.{layer}.{hf_part}.{kind}"
    )))
}
