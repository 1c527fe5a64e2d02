//! Tensors into a decoder: every tensor is asked for with its shape and this rank's piece of it, and
//! none may be left over.

use std::collections::BTreeSet;

use dsd_kernels::backend::WeightStore;

use super::{
    Decoder, ModelError,
    decoder::Layer,
    layers::{Attention, Ffn, Gqa, Loading, Mla, Mlp, Moe},
    spec::{AttentionSpec, DecoderSpec, FfnSpec},
    split::Split,
};
use crate::weights::{Cut, RankTensors, Role, TensorSource};

/// Builds one rank's part of the decoder from the tensors of `source`.
///
/// # Errors
/// [`ModelError`]: a missing or misshapen tensor, or a cut inside a block.
pub fn build<B: WeightStore>(
    source: &dyn TensorSource,
    split: &Split,
    store: &B,
) -> Result<Decoder<B>, ModelError> {
    let from = Loading {
        source,
        store,
        split,
    };
    let full = &split.full;
    let table = [full.vocab_len, full.hidden];
    let rows = Cut::rows(&split.vocab, full.vocab_len);
    let matrix = |name: &str| source.matrix(name, table, &rows, Role::Linear);
    let embedding = matrix("model.embed_tokens.weight")?;
    let mut spec = split.local.clone();
    if source.contains(ROPE_FACTORS) {
        let n = spec.rope.inverse_frequencies.len();
        spec.rope.divide(&source.vector(ROPE_FACTORS, n, 0..n)?);
    }
    let layers = (0..spec.n_layers())
        .map(|index| {
            let prefix = format!("model.layers.{index}");
            let gain = |name: &str| from.gain(&format!("{prefix}.{name}"), full.hidden);
            Ok(Layer {
                attention_norm: gain("input_layernorm")?,
                attention: attention(&from, &format!("{prefix}.self_attn"))?,
                ffn_norm: gain("post_attention_layernorm")?,
                ffn: ffn(&from, index, &format!("{prefix}.mlp"))?,
            })
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    let norm = from.gain("model.norm", full.hidden)?;
    let head = match full.tied_head {
        true => None,
        false => Some(store.weight(vec![matrix("lm_head.weight")?])),
    };
    Ok(Decoder {
        embedding: store.weight(vec![embedding]),
        first_token: split.vocab.start,
        layers,
        norm,
        head,
        spec,
    })
}

/// Per-frequency divisors that some GGUF files carry instead of a scaling rule.
const ROPE_FACTORS: &str = "rope_freqs.weight";

fn attention<B: WeightStore>(
    from: &Loading<'_, B>,
    prefix: &str,
) -> Result<Attention<B>, ModelError> {
    Ok(
        match (&from.split.full.attention, &from.split.local.attention) {
            (AttentionSpec::Gqa(full), AttentionSpec::Gqa(local)) => {
                Attention::Gqa(Gqa::load(from, full, local, prefix)?)
            }
            (AttentionSpec::Mla(full), AttentionSpec::Mla(local)) => {
                Attention::Mla(Mla::load(from, full, local, prefix)?)
            }
            (AttentionSpec::Gqa(_), AttentionSpec::Mla(_))
            | (AttentionSpec::Mla(_), AttentionSpec::Gqa(_)) => {
                unreachable!("a rank's part is of the same kind as the whole")
            }
        },
    )
}

fn ffn<B: WeightStore>(
    from: &Loading<'_, B>,
    index: usize,
    prefix: &str,
) -> Result<Ffn<B>, ModelError> {
    let Split {
        full, local, ffns, ..
    } = from.split;
    let ranges = &ffns[index];
    Ok(match (&full.ffns[index], &local.ffns[index]) {
        (FfnSpec::Mlp { inter, bias }, FfnSpec::Mlp { .. }) => {
            Ffn::Mlp(Mlp::load(from, *inter, &ranges.inter, *bias, prefix)?)
        }
        (FfnSpec::Moe(full), FfnSpec::Moe(local)) => {
            Ffn::Moe(Moe::load(from, full, local, ranges, prefix)?)
        }
        (FfnSpec::Mlp { .. }, FfnSpec::Moe(_)) | (FfnSpec::Moe(_), FfnSpec::Mlp { .. }) => {
            unreachable!("a rank's part is of the same kind as the whole")
        }
    })
}

/// Everything in the checkpoint or pack must have been asked for, except what is known to be unused:
/// the layers of prediction heads (MTP), also where the configuration counts none, and precomputed
/// frequencies that old exports carry (none of which a pack has). Call after [`build`].
///
/// # Errors
/// [`ModelError::ExtraTensors`].
pub fn refuse_extra_tensors(
    source: &RankTensors<'_>,
    spec: &DecoderSpec,
) -> Result<(), ModelError> {
    let n = spec.n_layers();
    let mut extra = source.unclaimed();
    // Only such a layer joins the stream with the next token's embedding: layers that the
    // configuration cut off are no part of this.
    let unused_layers: BTreeSet<usize> = extra
        .iter()
        .filter(|name| name.contains(".eh_proj."))
        .filter_map(|name| layer_of(name))
        .chain(n..n + spec.n_extra_layers)
        .filter(|layer| n <= *layer)
        .collect();
    extra.retain(|name| {
        let unused = layer_of(name).is_some_and(|layer| unused_layers.contains(&layer))
            || name.ends_with(".rotary_emb.inv_freq");
        !unused
    });
    match extra.iter().min() {
        None => Ok(()),
        Some(first) => Err(ModelError::ExtraTensors {
            architecture: spec.architecture.clone(),
            n: extra.len(),
            first: first.clone(),
        }),
    }
}

/// The layer that a tensor belongs to.
fn layer_of(name: &str) -> Option<usize> {
    let (layer, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse().ok()
}
