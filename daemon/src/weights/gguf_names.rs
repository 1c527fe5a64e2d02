//! GGUF tensor names to the names Hugging Face checkpoints use.

/// What a GGUF tensor is called in a Hugging Face checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HfName {
    /// One tensor.
    Whole(String),
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
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => "mlp.gate",
        _ => return None,
    };
    Some(HfName::Whole(format!(
        "model.layers.{layer}.{hf_part}.{kind}"
    )))
}
