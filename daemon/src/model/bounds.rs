//! Sizes of a configuration against the tensors beside it.
//!
//! A configuration is text that anybody may have edited, and loops and buffers follow its numbers. So
//! a decoder is only handed out once its layers, experts and widths are those of the tensors; what no
//! tensor shows, such as the context, has a maximum in [`super::fields`].
//!
//! Does not read a tensor, and does not see all of them: whoever takes one still names its shape.

use super::{
    fields::{ConfigError, Fields},
    spec::{AttentionSpec, DecoderSpec, FfnSpec, GqaSpec, MlaSpec, MoeSpec},
};
use crate::weights::Checkpoint;

/// Refuses sizes that are not those of the tensors.
///
/// # Errors
/// [`ConfigError::NotOfTensors`] with key, value and what was found.
pub(super) fn check(
    spec: &DecoderSpec,
    config: Fields<'_>,
    checkpoint: &Checkpoint,
) -> Result<(), ConfigError> {
    let bounds = Bounds { config, checkpoint };
    bounds.matrix(
        "model.embed_tokens.weight",
        [
            (&["vocab_size"], spec.vocab_len.into()),
            (&["hidden_size"], spec.hidden.into()),
        ],
    )?;
    bounds.layers(spec)?;
    match &spec.attention {
        AttentionSpec::Gqa(gqa) => bounds.gqa(gqa)?,
        AttentionSpec::Mla(mla) => bounds.mla(mla)?,
    }
    for (layer, ffn) in spec.ffns.iter().enumerate() {
        let prefix = format!("model.layers.{layer}.mlp");
        match ffn {
            FfnSpec::Mlp { inter, .. } => bounds.mlp(layer, &prefix, *inter)?,
            FfnSpec::Moe(moe) => bounds.moe(layer, &prefix, moe)?,
        }
    }
    Ok(())
}

/// A size and how the configuration comes to it.
struct Size {
    n: usize,
    /// As the message shows it.
    shown: String,
}

impl From<usize> for Size {
    fn from(n: usize) -> Self {
        Self {
            n,
            shown: n.to_string(),
        }
    }
}

/// `n` times `each`, both of which stand in the configuration.
fn product(n: usize, each: usize) -> Size {
    Size {
        n: n.saturating_mul(each),
        shown: format!("{n} ({each} rows each)"),
    }
}

/// Names that a key may have, of which the configuration uses the first that it holds.
type Keys = &'static [&'static str];

const EXPERTS: Keys = &["num_experts", "n_routed_experts", "num_local_experts"];
/// Keys that decide which layers have experts.
const DENSE_LAYERS: Keys = &[
    "first_k_dense_replace",
    "mlp_only_layers",
    "decoder_sparse_step",
];

struct Bounds<'a> {
    config: Fields<'a>,
    checkpoint: &'a Checkpoint,
}

impl Bounds<'_> {
    fn wrong(&self, keys: Keys, value: String, found: String) -> ConfigError {
        let is_there = |key: &&&str| self.config.get(key).is_some();
        let key = keys.iter().find(is_there).or_else(|| keys.first());
        ConfigError::NotOfTensors {
            key: key.copied().unwrap_or_default(),
            value,
            found,
        }
    }

    /// Rows and columns of a matrix; one that is packed in several, or in a file of a rank, is left to
    /// whoever takes it.
    fn matrix(&self, name: &str, sizes: [(Keys, Size); 2]) -> Result<(), ConfigError> {
        let Some([rows, cols]) = self.shape(name) else {
            return Ok(());
        };
        for ((keys, size), (found, what)) in
            sizes.into_iter().zip([(rows, "rows"), (cols, "columns")])
        {
            if size.n != found {
                let found = format!("tensor `{name}` has {found} {what}");
                return Err(self.wrong(keys, size.shown, found));
            }
        }
        Ok(())
    }

    fn rows(&self, name: &str, keys: Keys, size: Size) -> Result<(), ConfigError> {
        match self.shape(name) {
            Some([rows, _]) if size.n != rows => {
                let found = format!("tensor `{name}` has {rows} rows");
                Err(self.wrong(keys, size.shown, found))
            }
            _ => Ok(()),
        }
    }

    fn shape(&self, name: &str) -> Option<[usize; 2]> {
        self.checkpoint.shape(name)?.try_into().ok()
    }

    fn layers(&self, spec: &DecoderSpec) -> Result<(), ConfigError> {
        let n_layers = spec.n_layers();
        let is_there = |layer: &usize| {
            let norm = format!("model.layers.{layer}.input_layernorm.weight");
            self.checkpoint.contains(&norm)
        };
        let found = (0..n_layers).take_while(is_there).count();
        if found < n_layers {
            let found = format!("there are tensors of {found} layers");
            return Err(self.wrong(&["num_hidden_layers"], n_layers.to_string(), found));
        }
        Ok(())
    }

    fn gqa(&self, gqa: &GqaSpec) -> Result<(), ConfigError> {
        let attention = "model.layers.0.self_attn";
        for (projection, keys, n_heads) in [
            ("q_proj", &["num_attention_heads"] as Keys, gqa.n_heads),
            (
                "k_proj",
                &["num_key_value_heads", "num_attention_heads"],
                gqa.n_kv_heads,
            ),
        ] {
            let name = format!("{attention}.{projection}.weight");
            self.rows(&name, keys, product(n_heads, gqa.head_dim))?;
        }
        Ok(())
    }

    fn mla(&self, mla: &MlaSpec) -> Result<(), ConfigError> {
        let name = |projection: &str| format!("model.layers.0.self_attn.{projection}.weight");
        let heads: Keys = &["num_attention_heads"];
        let query = product(mla.n_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim);
        let latent: Keys = &["kv_lora_rank"];
        let expanded = mla.qk_nope_head_dim + mla.v_head_dim;
        match mla.q_lora_rank {
            None => self.rows(&name("q_proj"), heads, query)?,
            Some(rank) => {
                self.rows(&name("q_a_proj"), &["q_lora_rank"], rank.into())?;
                self.rows(&name("q_b_proj"), heads, query)?;
            }
        }
        let kv_a = Size {
            n: mla.kv_lora_rank + mla.qk_rope_head_dim,
            shown: format!(
                "{} (and {} rotated)",
                mla.kv_lora_rank, mla.qk_rope_head_dim
            ),
        };
        self.rows(&name("kv_a_proj_with_mqa"), latent, kv_a)?;
        self.matrix(
            &name("kv_b_proj"),
            [
                (heads, product(mla.n_heads, expanded)),
                (latent, mla.kv_lora_rank.into()),
            ],
        )
    }

    fn mlp(&self, layer: usize, prefix: &str, inter: usize) -> Result<(), ConfigError> {
        let name = format!("{prefix}.gate_proj.weight");
        if !self.checkpoint.contains(&name) && self.has_experts(prefix) {
            return Err(self.wrong_kind(layer, "experts"));
        }
        self.rows(&name, &["intermediate_size"], inter.into())
    }

    fn moe(&self, layer: usize, prefix: &str, moe: &MoeSpec) -> Result<(), ConfigError> {
        if !self.has_experts(prefix) {
            return Err(self.wrong_kind(layer, "no experts"));
        }
        let n_experts = moe.gate.n_experts;
        self.rows(&format!("{prefix}.gate.weight"), EXPERTS, n_experts.into())?;
        let last = format!("{prefix}.experts.{}.gate_proj.weight", n_experts - 1);
        if !self.checkpoint.contains(&last) {
            let found = format!("there is no tensor `{last}`");
            return Err(self.wrong(EXPERTS, n_experts.to_string(), found));
        }
        let first = format!("{prefix}.experts.0.gate_proj.weight");
        self.rows(&first, &["moe_intermediate_size"], moe.inter.into())?;
        let shared = moe.shared_inter.unwrap_or(0);
        let name = format!("{prefix}.shared_experts.gate_proj.weight");
        let size = product(shared / moe.inter, moe.inter);
        match self.checkpoint.contains(&name) {
            true => self.rows(&name, &["n_shared_experts"], size),
            false if shared == 0 => Ok(()),
            false => {
                let found = format!("there is no tensor `{name}`");
                Err(self.wrong(&["n_shared_experts"], size.shown, found))
            }
        }
    }

    fn has_experts(&self, prefix: &str) -> bool {
        self.checkpoint
            .contains(&format!("{prefix}.experts.0.gate_proj.weight"))
    }

    fn wrong_kind(&self, layer: usize, what: &str) -> ConfigError {
        let found = format!("the tensors of layer {layer} have {what}");
        let value = DENSE_LAYERS.iter().find_map(|key| self.config.get(key));
        let value = value.map_or_else(
            || "absent".to_owned(),
            |value| value.to_string().chars().take(VALUE_LEN_MAX).collect(),
        );
        self.wrong(DENSE_LAYERS, value, found)
    }
}

/// Characters of a value that a message shows.
const VALUE_LEN_MAX: usize = 100;
