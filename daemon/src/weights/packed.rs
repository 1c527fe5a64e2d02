//! Packed codes of compressed-tensors (W4A16) into rows of Int4 blocks: the same codes, zeros and scales
//! in another order.
//!
//! A layer `[outputs, inputs]` lies in rows: `weight_packed` has eight inputs of an output in a 32-bit
//! word, lowest first, each signed code plus 8; `weight_scale` is `[outputs, groups]`;
//! `weight_zero_point`, where codes are asymmetric, `[outputs / 8, groups]` with eight outputs in a word,
//! plus 8 as well; `weight_shape` says `[outputs, inputs]`. A value is `scale * (code - zero)`.
//!
//! Knows no configuration and no names but those of the tensors it is given.

use dsd_kernels::{dtype::Format, matrix::Matrix, quant};

use super::{
    error::WeightsError,
    int4::{CODES, halves, nibble, words},
    quantization::{GROUP_UNIT, PackedScheme},
    tensor::{StoredTensor, StoredType},
};

/// The zero of symmetric codes, plus 8 like all.
const SYMMETRIC_ZERO: u8 = 8;

/// The tensors of one layer.
pub(super) struct PackedRows<'a> {
    /// The weight's name, as models call it.
    pub(super) name: &'a str,
    pub(super) codes: &'a StoredTensor,
    pub(super) scales: &'a StoredTensor,
    pub(super) shape: &'a StoredTensor,
    /// Asymmetric codes only.
    pub(super) zeros: Option<&'a StoredTensor>,
}

/// Repacks a layer of `n_rows` outputs and `n_cols` inputs.
///
/// # Errors
/// [`WeightsError`]: shapes or types that do not belong to the scheme, or a scale that is no half.
pub(super) fn repack(
    scheme: PackedScheme,
    packed: &PackedRows<'_>,
    n_rows: usize,
    n_cols: usize,
) -> Result<Matrix, WeightsError> {
    let (name, file) = (packed.name, packed.codes.file.as_ref());
    let group_len = scheme.group_len.unwrap_or(n_cols);
    if !n_cols.is_multiple_of(group_len) || !n_cols.is_multiple_of(GROUP_UNIT) {
        return Err(WeightsError::Field {
            file: file.to_owned(),
            field: "group_size of quantization_config.config_groups".to_owned(),
            expected: format!(
                "a divisor of the {n_cols} columns of `{name}`, themselves a multiple of 32"
            ),
            found: group_len.to_string(),
        });
    }
    check_shape(packed.shape, [n_rows, n_cols])?;
    let n_groups = n_cols / group_len;
    let words_per_row = n_cols / CODES;
    let codes = words(packed.codes, &[n_rows, words_per_row])?;
    packed.scales.expect_shape(&[n_rows, n_groups])?;
    let scales = halves(packed.scales)?;
    let zeros = match packed.zeros {
        Some(zeros) => Some(words(zeros, &[n_rows.div_ceil(CODES), n_groups])?),
        None => None,
    };

    let block_bytes = Format::Int4.block_bytes();
    let blocks_per_row = n_cols / GROUP_UNIT;
    let mut data = vec![0; n_rows * blocks_per_row * block_bytes];
    for (index, out) in data.chunks_exact_mut(block_bytes).enumerate() {
        let (row, block) = (index / blocks_per_row, index % blocks_per_row);
        let group = block * GROUP_UNIT / group_len;
        let first = row * words_per_row + block * GROUP_UNIT / CODES;
        let block_codes = std::array::from_fn(|k| nibble(codes[first + k / CODES], k % CODES));
        let zero = zeros.map_or(SYMMETRIC_ZERO, |zeros| {
            nibble(zeros[row / CODES * n_groups + group], row % CODES)
        });
        quant::put_int4(out, scales[row * n_groups + group], zero, &block_codes);
    }
    Matrix::new(Format::Int4, n_rows, n_cols, data.into(), None).map_err(|source| {
        WeightsError::Matrix {
            file: file.to_owned(),
            tensor: name.to_owned(),
            source,
        }
    })
}

/// Refuses a `weight_shape` that is not the layer's.
fn check_shape(tensor: &StoredTensor, expected: [usize; 2]) -> Result<(), WeightsError> {
    tensor.expect_shape(&[2])?;
    let width = match tensor.stored_type {
        StoredType::Int {
            bytes: bytes @ (4 | 8),
            ..
        } => usize::from(bytes),
        other => return Err(tensor.wrong_type("i64", other)),
    };
    let found = tensor.data.chunks_exact(width).map(|bytes| {
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(bytes);
        u64::from_le_bytes(wide)
    });
    let found = found.collect::<Vec<_>>();
    match found == expected.map(|n| n as u64) {
        true => Ok(()),
        false => Err(WeightsError::Field {
            file: tensor.file.to_path_buf(),
            field: format!("tensor `{}`", tensor.name),
            expected: format!("{expected:?}"),
            found: format!("{found:?}"),
        }),
    }
}
