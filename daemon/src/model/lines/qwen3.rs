//! Qwen3: R1-0528-Qwen3. Queries and keys are normalised per head.

use super::{
    super::{
        fields::{ConfigError, Fields},
        spec::DecoderSpec,
    },
    dense,
};

pub(in super::super) fn spec(config: Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    let bias = config.flag_or("attention_bias", false)?;
    dense("qwen3", config, |gqa| {
        gqa.qkv_bias = bias;
        gqa.output_bias = bias;
        gqa.qk_norm = true;
    })
}
