//! What a `config.json` says about quantization: FP8 with tile scales, or a refusal by name.

use std::path::Path;

use serde_json::Value;

use super::error::WeightsError;

/// Rows and columns of an FP8 tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileShape {
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// Longest tile side accepted.
const TILE_MAX: u64 = 1 << 16;

/// The tile shape of an FP8 checkpoint, `None` for one that is not quantized.
///
/// # Errors
/// [`WeightsError::Field`] naming the key whose value is not understood.
pub(super) fn tile_shape(file: &Path, config: &Value) -> Result<Option<TileShape>, WeightsError> {
    let refuse = |key: &str, expected: &str, found: &Value| WeightsError::Field {
        file: file.to_owned(),
        field: key.to_owned(),
        expected: expected.to_owned(),
        found: found.to_string().chars().take(200).collect(),
    };
    if let Some(found) = config.get("compression_config").filter(|v| !v.is_null()) {
        return Err(refuse("compression_config", "none", found));
    }
    let Some(quantization) = config.get("quantization_config").filter(|v| !v.is_null()) else {
        return Ok(None);
    };
    let allowed: [(&str, &[Option<&str>], &str); 4] = [
        ("quant_method", &[Some("fp8")], "\"fp8\""),
        ("fmt", &[None, Some("e4m3")], "\"e4m3\""),
        ("activation_scheme", &[None, Some("dynamic")], "\"dynamic\""),
        (
            "scale_fmt",
            &[None, Some("ue8m0"), Some("float")],
            "\"ue8m0\" or none",
        ),
    ];
    for (key, values, expected) in allowed {
        let found = quantization.get(key).filter(|v| !v.is_null());
        let fits = match found {
            None => values.contains(&None),
            Some(value) => value.as_str().is_some_and(|v| values.contains(&Some(v))),
        };
        if !fits {
            let key = format!("quantization_config.{key}");
            return Err(refuse(&key, expected, found.unwrap_or(&Value::Null)));
        }
    }
    let side = |value: &Value| value.as_u64().filter(|n| (1..=TILE_MAX).contains(n));
    let block = quantization
        .get("weight_block_size")
        .unwrap_or(&Value::Null);
    match block.as_array().map(Vec::as_slice) {
        Some([rows, cols]) => match (side(rows), side(cols)) {
            (Some(rows), Some(cols)) => Ok(Some(TileShape {
                rows: rows as usize,
                cols: cols as usize,
            })),
            _ => Err(refuse(
                "quantization_config.weight_block_size",
                "two lengths",
                block,
            )),
        },
        _ => Err(refuse(
            "quantization_config.weight_block_size",
            "two lengths",
            block,
        )),
    }
}
