//! Llama: R1-Distill-Llama, deepseek-llm, SmolLM2.

use dsd_kernels::backend::RopeLayout;

use super::{
    super::{
        fields::{ConfigError, Fields},
        spec::{DecoderSpec, FfnSpec},
    },
    dense,
};
use crate::weights::Checkpoint;

pub(in super::super) fn spec(
    config: Fields<'_>,
    checkpoint: &Checkpoint,
) -> Result<DecoderSpec, ConfigError> {
    let bias = config.flag_or("attention_bias", false)?;
    let mlp_bias = config.flag_or("mlp_bias", false)?;
    let mut spec = dense("llama", config, |gqa| {
        gqa.qkv_bias = bias;
        gqa.output_bias = bias;
    })?;
    for ffn in &mut spec.ffns {
        if let FfnSpec::Mlp { bias, .. } = ffn {
            *bias = mlp_bias;
        }
    }
    if checkpoint.rope_interleaved_qk() {
        spec.rope_layout = RopeLayout::Pairs;
    }
    Ok(spec)
}
