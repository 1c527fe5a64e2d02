//! What a `config.json` says about quantization: a scheme this program reads, or a refusal by name.
//!
//! Which modules are quantized is seen in the files, where a module has either a plain weight or
//! packed ones; the lists of modules left alone (`modules_to_not_convert`, `ignore`) say the same
//! and are only checked to be lists of names.

use std::path::Path;

use serde_json::Value;

use super::error::WeightsError;

/// How the quantized tensors of a checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Not quantized, or in blocks that describe themselves.
    Plain,
    /// FP8 with tile scales.
    Fp8(TileShape),
    /// FP8 with a scale per row (compressed-tensors `float-quantized`).
    Fp8Rows,
    /// Int8 with a scale per row (compressed-tensors `int-quantized`, W8A8).
    Int8,
    /// Four bits in groups of columns.
    Int4(Int4Scheme),
    /// Four bits in groups of columns (compressed-tensors `pack-quantized`, W4A16).
    Packed(PackedScheme),
}

/// Rows and columns of an FP8 tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileShape {
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// A packing of four-bit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Int4Scheme {
    pub(super) packing: Int4Packing,
    /// Columns of a group; `None` where a row is one.
    pub(super) group_len: Option<usize>,
}

/// Packed codes of compressed-tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PackedScheme {
    /// Columns of a group; `None` where a row is one.
    pub(super) group_len: Option<usize>,
    /// Without zeros of their own.
    pub(super) symmetric: bool,
}

/// In which order codes and zeros lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Int4Packing {
    /// AWQ's GEMM layout: eight rows in a word, evens first.
    Awq,
    /// GPTQ: eight columns in a word; zeros are stored less `zero_offset`.
    Gptq {
        /// 1 for the first version of the format, 0 for the second, as the configuration has it.
        zero_offset: u8,
        /// All zeros may be the middle of the codes, which says more about the version.
        symmetric: bool,
    },
}

/// Longest tile side and group accepted.
const SIDE_MAX: u64 = 1 << 16;
/// Columns that kernels read with one scale; a group is a multiple.
pub(super) const GROUP_UNIT: usize = 32;

/// An object of the configuration, with its path for messages.
#[derive(Clone)]
struct Section<'a> {
    file: &'a Path,
    path: String,
    value: &'a Value,
}

impl<'a> Section<'a> {
    fn field(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    fn section(&self, key: &str, value: &'a Value) -> Self {
        Self {
            file: self.file,
            path: format!("{}.{key}", self.path),
            value,
        }
    }

    fn refuse(&self, key: &str, expected: &str) -> WeightsError {
        let found = self.value.get(key).unwrap_or(&Value::Null);
        WeightsError::Field {
            file: self.file.to_owned(),
            field: format!("{}.{key}", self.path),
            expected: expected.to_owned(),
            found: found.to_string().chars().take(200).collect(),
        }
    }

    /// Refuses `key` unless `fits` takes its value; absent and null are `None`.
    fn expect(
        &self,
        key: &str,
        expected: &str,
        fits: impl Fn(Option<&Value>) -> bool,
    ) -> Result<(), WeightsError> {
        match fits(self.field(key)) {
            true => Ok(()),
            false => Err(self.refuse(key, expected)),
        }
    }

    /// Refuses anything but one of `words`.
    fn expect_word(&self, key: &str, words: &[Option<&str>]) -> Result<(), WeightsError> {
        let names = words.iter().map(|word| match word {
            Some(word) => format!("{word:?}"),
            None => "none".to_owned(),
        });
        let expected = names.collect::<Vec<_>>().join(" or ");
        self.expect(key, &expected, |found| match found {
            None => words.contains(&None),
            Some(found) => found.as_str().is_some_and(|f| words.contains(&Some(f))),
        })
    }

    fn expect_names(&self, key: &str) -> Result<(), WeightsError> {
        self.expect(key, "a list of names", |found| {
            found.is_none_or(|v| {
                v.as_array()
                    .is_some_and(|list| list.iter().all(Value::is_string))
            })
        })
    }
}

fn is_false(value: Option<&Value>) -> bool {
    value.is_none_or(|v| *v == Value::Bool(false))
}

fn is_empty(value: Option<&Value>) -> bool {
    value.is_none_or(|v| {
        v.as_object().is_some_and(serde_json::Map::is_empty)
            || v.as_array().is_some_and(Vec::is_empty)
    })
}

/// The scheme of a checkpoint.
///
/// # Errors
/// [`WeightsError::Field`] naming the key whose value is not understood.
pub(super) fn scheme(file: &Path, config: &Value) -> Result<Scheme, WeightsError> {
    if let Some(found) = config.get("compression_config").filter(|v| !v.is_null()) {
        return Err(WeightsError::Field {
            file: file.to_owned(),
            field: "compression_config".to_owned(),
            expected: "none".to_owned(),
            found: found.to_string().chars().take(200).collect(),
        });
    }
    let Some(value) = config.get("quantization_config").filter(|v| !v.is_null()) else {
        return Ok(Scheme::Plain);
    };
    let section = Section {
        file,
        path: "quantization_config".to_owned(),
        value,
    };
    match section.field("quant_method").and_then(Value::as_str) {
        Some("fp8") => fp8(&section).map(Scheme::Fp8),
        Some("awq") => awq(&section).map(Scheme::Int4),
        Some("gptq") => gptq(&section).map(Scheme::Int4),
        Some("compressed-tensors") => compressed(&section),
        _ => Err(section.refuse(
            "quant_method",
            "\"fp8\", \"awq\", \"gptq\" or \"compressed-tensors\"",
        )),
    }
}

fn fp8(section: &Section<'_>) -> Result<TileShape, WeightsError> {
    section.expect_word("fmt", &[Some("e4m3"), None])?;
    section.expect_word("activation_scheme", &[Some("dynamic"), None])?;
    section.expect_word("scale_fmt", &[Some("ue8m0"), Some("float"), None])?;
    section.expect_names("modules_to_not_convert")?;
    let side = |value: &Value| value.as_u64().filter(|n| (1..=SIDE_MAX).contains(n));
    let block = section.field("weight_block_size").and_then(Value::as_array);
    let sides = block.map(|sides| sides.iter().map(side).collect::<Vec<_>>());
    match sides.as_deref() {
        Some([Some(rows), Some(cols)]) => Ok(TileShape {
            rows: *rows as usize,
            cols: *cols as usize,
        }),
        _ => Err(section.refuse("weight_block_size", "two lengths")),
    }
}

/// Columns of a group: -1 makes a row one group.
fn group_len(section: &Section<'_>) -> Result<Option<usize>, WeightsError> {
    let found = section.field("group_size").and_then(Value::as_i64);
    match found {
        Some(-1) => Ok(None),
        Some(n) if 0 < n && n.cast_unsigned() <= SIDE_MAX && n % GROUP_UNIT as i64 == 0 => {
            Ok(usize::try_from(n).ok())
        }
        _ => Err(section.refuse("group_size", "-1 or a multiple of 32 up to 65536")),
    }
}

fn awq(section: &Section<'_>) -> Result<Int4Scheme, WeightsError> {
    section.expect("bits", "4", |v| v.and_then(Value::as_u64) == Some(4))?;
    section.expect_word("version", &[Some("gemm"), Some("GEMM"), None])?;
    section.expect("zero_point", "true", |v| {
        v.is_none_or(|v| *v == Value::Bool(true))
    })?;
    section.expect_names("modules_to_not_convert")?;
    Ok(Int4Scheme {
        packing: Int4Packing::Awq,
        group_len: group_len(section)?,
    })
}

/// `desc_act` is not looked at: the order of columns is seen in `g_idx`.
fn gptq(section: &Section<'_>) -> Result<Int4Scheme, WeightsError> {
    section.expect("bits", "4", |v| v.and_then(Value::as_u64) == Some(4))?;
    section.expect("is_marlin_format", "false", is_false)?;
    section.expect("dynamic", "no rules for single modules", is_empty)?;
    section.expect_word("pack_dtype", &[Some("int32"), None])?;
    section.expect_names("modules_to_not_convert")?;
    section.expect_word("checkpoint_format", &[Some("gptq"), Some("gptq_v2"), None])?;
    let format = section.field("checkpoint_format").and_then(Value::as_str);
    let zero_offset = u8::from(format != Some("gptq_v2"));
    section.expect("sym", "true or false", |v| v.is_none_or(Value::is_boolean))?;
    // Transformers takes an absent key for true.
    let symmetric = section.field("sym") != Some(&Value::Bool(false));
    Ok(Int4Scheme {
        packing: Int4Packing::Gptq {
            zero_offset,
            symmetric,
        },
        group_len: group_len(section)?,
    })
}

/// compressed-tensors: all groups of layers in the same scheme.
fn compressed(section: &Section<'_>) -> Result<Scheme, WeightsError> {
    section.expect_word("format", &FORMATS.map(Some))?;
    section.expect_word("quantization_status", &[Some("compressed"), None])?;
    section.expect("kv_cache_scheme", "none", |v| v.is_none())?;
    section.expect("sparsity_config", "none", is_empty)?;
    section.expect_names("ignore")?;
    let format = section.field("format").and_then(Value::as_str);
    let groups = section.field("config_groups").unwrap_or(&Value::Null);
    let groups_section = section.section("config_groups", groups);
    let mut scheme = None;
    for (name, group) in groups.as_object().into_iter().flatten() {
        let group = groups_section.section(name, group);
        group.expect_word("format", &[format, None])?;
        group.expect("output_activations", "none", |v| v.is_none())?;
        let Some(weights) = group.field("weights") else {
            return Err(group.refuse("weights", "a description"));
        };
        let weights = group.section("weights", weights);
        weights.expect("dynamic", "false", is_false)?;
        let of_group = match format {
            Some("pack-quantized") => packed(&group, &weights)?,
            Some("float-quantized") => per_row(&group, &weights, "float", Scheme::Fp8Rows)?,
            _ => per_row(&group, &weights, "int", Scheme::Int8)?,
        };
        if scheme.is_some_and(|scheme| scheme != of_group) {
            return Err(groups_section.refuse(name, "the same scheme in all groups"));
        }
        scheme = Some(of_group);
    }
    scheme.ok_or_else(|| section.refuse("config_groups", "at least one group"))
}

/// The formats of compressed-tensors that are read.
const FORMATS: [&str; 3] = ["int-quantized", "pack-quantized", "float-quantized"];

/// W8A8 in integers or FP8: weights with a scale per output, activations rounded while running.
fn per_row(
    group: &Section<'_>,
    weights: &Section<'_>,
    kind: &str,
    scheme: Scheme,
) -> Result<Scheme, WeightsError> {
    eight_bits(weights, kind)?;
    weights.expect_word("strategy", &[Some("channel")])?;
    weights.expect("actorder", "none", is_false)?;
    if let Some(input) = group.field("input_activations") {
        let input = group.section("input_activations", input);
        eight_bits(&input, kind)?;
        input.expect("dynamic", "true", |v| v == Some(&Value::Bool(true)))?;
        input.expect_word("strategy", &[Some("token")])?;
    }
    Ok(scheme)
}

fn eight_bits(section: &Section<'_>, kind: &str) -> Result<(), WeightsError> {
    section.expect("num_bits", "8", |v| v.and_then(Value::as_u64) == Some(8))?;
    section.expect_word("type", &[Some(kind)])?;
    section.expect("symmetric", "true", |v| v == Some(&Value::Bool(true)))
}

/// W4A16. `actorder` of weights leaves columns where they were; that of groups does not.
fn packed(group: &Section<'_>, weights: &Section<'_>) -> Result<Scheme, WeightsError> {
    group.expect("input_activations", "none", |v| v.is_none())?;
    weights.expect("num_bits", "4", |v| v.and_then(Value::as_u64) == Some(4))?;
    weights.expect_word("type", &[Some("int"), None])?;
    weights.expect("symmetric", "true or false", |v| {
        v.is_none_or(Value::is_boolean)
    })?;
    weights.expect("actorder", "\"weight\", \"static\" or none", |v| {
        is_false(v)
            || v.and_then(Value::as_str)
                .is_some_and(|v| ["weight", "static"].contains(&v))
    })?;
    weights.expect_word("strategy", &[Some("group"), Some("channel")])?;
    let is_channel = weights.field("strategy").and_then(Value::as_str) == Some("channel");
    Ok(Scheme::Packed(PackedScheme {
        group_len: match is_channel {
            true => None,
            false => group_len(weights)?,
        },
        symmetric: weights.field("symmetric") != Some(&Value::Bool(false)),
    }))
}
