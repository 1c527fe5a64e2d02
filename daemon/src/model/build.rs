//! A checkpoint's tensors into a decoder: every tensor is asked for with its shape, and none may
//! be left over.

use dsd_kernels::backend::Backend;

use super::{
    Decoder, ModelError,
    decoder::Layer,
    layers::{Attention, Ffn, Gqa, Mla, Mlp, Moe},
    spec::{AttentionSpec, DecoderSpec, FfnSpec, spec_of},
};
use crate::weights::Checkpoint;

/// Builds the decoder a checkpoint describes.
///
/// # Errors
/// [`ModelError`]: an unknown or contradictory configuration, a missing or misshapen tensor, or
/// tensors that do not belong to the model.
pub fn build<B: Backend>(checkpoint: &Checkpoint, backend: &B) -> Result<Decoder<B>, ModelError> {
    let mut spec = spec_of(checkpoint)?;
    let (vocab_len, hidden) = (spec.vocab_len, spec.hidden);
    let embedding = checkpoint.matrix("model.embed_tokens.weight", vocab_len, hidden)?;
    if checkpoint.contains(ROPE_FACTORS) {
        let n = spec.rope.inverse_frequencies.len();
        spec.rope.divide(&checkpoint.vector(ROPE_FACTORS, n)?);
    }
    let gain = |name: &str| {
        Ok::<_, ModelError>(backend.upload(&checkpoint.vector(&format!("{name}.weight"), hidden)?))
    };
    let layers = (0..spec.n_layers())
        .map(|index| {
            let prefix = format!("model.layers.{index}");
            Ok(Layer {
                attention_norm: gain(&format!("{prefix}.input_layernorm"))?,
                attention: attention(checkpoint, backend, &spec, &prefix)?,
                ffn_norm: gain(&format!("{prefix}.post_attention_layernorm"))?,
                ffn: ffn(checkpoint, backend, &spec, index, &prefix)?,
            })
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    let norm = gain("model.norm")?;
    let head = if spec.tied_head {
        None
    } else {
        Some(backend.weight(vec![checkpoint.matrix(
            "lm_head.weight",
            vocab_len,
            hidden,
        )?]))
    };
    refuse_extra_tensors(checkpoint, &spec)?;
    Ok(Decoder {
        embedding: backend.weight(vec![embedding]),
        layers,
        norm,
        head,
        spec,
    })
}

/// Per-frequency divisors that some GGUF files carry instead of a scaling rule.
const ROPE_FACTORS: &str = "rope_freqs.weight";

fn attention<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &B,
    spec: &DecoderSpec,
    prefix: &str,
) -> Result<Attention<B>, ModelError> {
    let prefix = format!("{prefix}.self_attn");
    Ok(match &spec.attention {
        AttentionSpec::Gqa(gqa) => {
            Attention::Gqa(Gqa::load(checkpoint, backend, spec, gqa, &prefix)?)
        }
        AttentionSpec::Mla(mla) => {
            Attention::Mla(Mla::load(checkpoint, backend, spec, mla, &prefix)?)
        }
    })
}

fn ffn<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &B,
    spec: &DecoderSpec,
    index: usize,
    prefix: &str,
) -> Result<Ffn<B>, ModelError> {
    let prefix = format!("{prefix}.mlp");
    Ok(match &spec.ffns[index] {
        FfnSpec::Mlp { inter, bias } => Ffn::Mlp(Mlp::load(
            checkpoint,
            backend,
            spec.hidden,
            *inter,
            *bias,
            &prefix,
        )?),
        FfnSpec::Moe(moe) => Ffn::Moe(Moe::load(checkpoint, backend, spec.hidden, moe, &prefix)?),
    })
}

/// Everything in the checkpoint must have been asked for, except what is known to be unused: the
/// layers of prediction heads, a copy of the tied output layer, and precomputed frequencies that
/// old exports carry.
fn refuse_extra_tensors(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<(), ModelError> {
    let n = spec.n_layers();
    let unused_layers = (n..n + spec.n_extra_layers)
        .map(|i| format!("model.layers.{i}."))
        .collect::<Vec<_>>();
    let mut extra = checkpoint.unclaimed();
    extra.retain(|name| {
        let unused = unused_layers.iter().any(|layer| name.starts_with(layer))
            || name.ends_with(".rotary_emb.inv_freq")
            || (spec.tied_head && name == "lm_head.weight");
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
