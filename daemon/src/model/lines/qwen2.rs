//! Qwen2: R1-Distill-Qwen. Bias on q, k and v.

use super::{
    super::{
        fields::{ConfigError, Fields},
        spec::DecoderSpec,
    },
    dense,
};

pub(in super::super) fn spec(config: Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    dense("qwen2", config, |gqa| gqa.qkv_bias = true)
}
