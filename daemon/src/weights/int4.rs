//! AWQ and GPTQ tensors into rows of Int4 blocks: the same codes, zeros and scales in another
//! order.
//!
//! Both store a linear layer transposed, `[inputs, outputs]`, eight codes in a 32-bit word: AWQ those
//! of eight outputs, GPTQ those of eight inputs. Scales `[groups, outputs]` are halves; zeros
//! `[groups, outputs / 8]` are packed. A value is `scale * (code - zero)`.
//!
//! Knows no configuration and no names but those of the tensors it is given.

use dsd_kernels::{
    dtype::Format,
    matrix::{Matrix, MatrixError},
    quant,
};
use half::f16;

use super::{
    error::WeightsError,
    quantization::{GROUP_UNIT, Int4Packing, Int4Scheme},
    tensor::{StoredTensor, StoredType},
};

/// Codes in a word.
pub(super) const CODES: usize = 8;
/// Which nibble of an AWQ word holds output `i`.
const AWQ_NIBBLE: [usize; CODES] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The tensors of one layer.
pub(super) struct Packed<'a> {
    /// The weight's name, as models call it.
    pub(super) name: &'a str,
    pub(super) codes: &'a StoredTensor,
    pub(super) zeros: &'a StoredTensor,
    pub(super) scales: &'a StoredTensor,
    /// Group of every input; GPTQ only.
    pub(super) groups: Option<&'a StoredTensor>,
}

/// Repacks a layer of `n_rows` outputs and `n_cols` inputs.
///
/// # Errors
/// [`WeightsError`]: shapes or types that do not belong to the scheme, inputs in another order than
/// that of their groups, or a scale that is no half.
pub(super) fn repack(
    scheme: Int4Scheme,
    packed: &Packed<'_>,
    n_rows: usize,
    n_cols: usize,
) -> Result<Matrix, WeightsError> {
    let name = packed.name;
    let file = packed.codes.file.as_ref();
    let group_len = scheme.group_len.unwrap_or(n_cols);
    let refuse = |field: String, expected: String, found: String| WeightsError::Field {
        file: file.to_owned(),
        field,
        expected,
        found,
    };
    if !n_cols.is_multiple_of(group_len) || !n_cols.is_multiple_of(GROUP_UNIT) {
        return Err(refuse(
            "quantization_config.group_size".to_owned(),
            format!("a divisor of the {n_cols} columns of `{name}`, themselves a multiple of 32"),
            group_len.to_string(),
        ));
    }
    if !n_rows.is_multiple_of(CODES) {
        return Err(refuse(
            format!("rows of `{name}`"),
            "a multiple of 8".to_owned(),
            n_rows.to_string(),
        ));
    }
    let n_groups = n_cols / group_len;
    let codes = words(
        packed.codes,
        &match scheme.packing {
            Int4Packing::Awq => [n_cols, n_rows / CODES],
            Int4Packing::Gptq { .. } => [n_cols / CODES, n_rows],
        },
    )?;
    let zeros = words(packed.zeros, &[n_groups, n_rows / CODES])?;
    packed.scales.expect_shape(&[n_groups, n_rows])?;
    let scales = halves(packed.scales)?;
    if let Some(groups) = packed.groups {
        check_order(groups, n_cols, group_len)?;
    }

    let zero_offset = match scheme.packing {
        Int4Packing::Awq => 0,
        Int4Packing::Gptq {
            zero_offset,
            symmetric,
        } => symmetric
            .then(|| zero_offset_of(zeros))
            .flatten()
            .unwrap_or(zero_offset),
    };
    let block_bytes = Format::Int4.block_bytes();
    let (blocks_per_row, n_eights) = (n_cols / GROUP_UNIT, n_rows / CODES);
    let mut data = vec![0; n_rows * blocks_per_row * block_bytes];
    // Block after block of inputs, eight outputs at a time: their words are neighbours in the file.
    for block in 0..blocks_per_row {
        let (first, group) = (block * GROUP_UNIT, block * GROUP_UNIT / group_len);
        for eight in 0..n_eights {
            let zeros = zeros[group * n_eights + eight];
            let (block_codes, zeros) = match scheme.packing {
                Int4Packing::Awq => (
                    awq_block(codes, first * n_eights + eight, n_eights),
                    AWQ_NIBBLE.map(|i| nibble(zeros, i)),
                ),
                Int4Packing::Gptq { .. } => (
                    gptq_block(codes, first / CODES * n_rows + eight * CODES, n_rows),
                    std::array::from_fn(|i| (nibble(zeros, i) + zero_offset) & 15),
                ),
            };
            for (i, codes) in block_codes.iter().enumerate() {
                let row = eight * CODES + i;
                let at = (row * blocks_per_row + block) * block_bytes;
                let (out, scale) = (
                    &mut data[at..at + block_bytes],
                    scales[group * n_rows + row],
                );
                quant::put_int4(out, scale, zeros[i], codes);
            }
        }
    }
    Matrix::new(Format::Int4, n_rows, n_cols, data.into(), None).map_err(|source: MatrixError| {
        WeightsError::Matrix {
            file: file.to_owned(),
            tensor: name.to_owned(),
            source,
        }
    })
}

/// The codes of eight outputs: a word for every input, `stride` words apart.
fn awq_block(words: &[[u8; 4]], first: usize, stride: usize) -> [[u8; GROUP_UNIT]; CODES] {
    let mut codes = [[0; GROUP_UNIT]; CODES];
    for k in 0..GROUP_UNIT {
        let word = words[first + k * stride];
        for (codes, index) in codes.iter_mut().zip(AWQ_NIBBLE) {
            codes[k] = nibble(word, index);
        }
    }
    codes
}

/// The codes of eight outputs: neighbouring words, those of the next eight inputs `stride` on.
fn gptq_block(words: &[[u8; 4]], first: usize, stride: usize) -> [[u8; GROUP_UNIT]; CODES] {
    let mut codes = [[0; GROUP_UNIT]; CODES];
    for (i, codes) in codes.iter_mut().enumerate() {
        for (k, code) in codes.iter_mut().enumerate() {
            *code = nibble(words[first + k / CODES * stride + i], k % CODES);
        }
    }
    codes
}

/// What stored zeros of a symmetric layer are less than the real ones, which are all 8: files exist
/// whose configuration and whose zeros are of different versions. `None` where the zeros are not such.
fn zero_offset_of(zeros: &[[u8; 4]]) -> Option<u8> {
    let (first, rest) = zeros.split_first()?;
    match first {
        _ if rest.iter().any(|zero| zero != first) => None,
        [0x77, 0x77, 0x77, 0x77] => Some(1),
        [0x88, 0x88, 0x88, 0x88] => Some(0),
        _ => None,
    }
}

pub(super) fn nibble(word: [u8; 4], index: usize) -> u8 {
    (word[index / 2] >> (index % 2 * 4)) & 15
}

/// The 32-bit words of a tensor of exactly this shape.
pub(super) fn words<'a>(
    tensor: &'a StoredTensor,
    shape: &[usize],
) -> Result<&'a [[u8; 4]], WeightsError> {
    tensor.expect_shape(shape)?;
    match tensor.stored_type {
        StoredType::Int { bytes: 4, .. } => Ok(tensor.data.as_chunks::<4>().0),
        other => Err(tensor.wrong_type("i32", other)),
    }
}

/// Scales as halves. Some files hold them as bf16 or f32; what a half does not hold is refused.
pub(super) fn halves(tensor: &StoredTensor) -> Result<Vec<f16>, WeightsError> {
    let values = tensor.to_f32()?;
    let exact = |value: f32| f16::from_f32(value).to_f32() == value;
    match values.iter().position(|v| !exact(*v)) {
        None => Ok(values.into_iter().map(f16::from_f32).collect()),
        Some(index) => Err(WeightsError::Field {
            file: tensor.file.to_path_buf(),
            field: format!("element {index} of tensor `{}`", tensor.name),
            expected: "a number that f16 holds".to_owned(),
            found: values[index].to_string(),
        }),
    }
}

/// Refuses inputs that were dealt to groups out of order (`desc_act`): kernels read a group's
/// columns side by side.
fn check_order(tensor: &StoredTensor, n_cols: usize, group_len: usize) -> Result<(), WeightsError> {
    for (input, group) in words(tensor, &[n_cols])?.iter().enumerate() {
        let (found, expected) = (i32::from_le_bytes(*group), input / group_len);
        if usize::try_from(found) != Ok(expected) {
            return Err(WeightsError::Field {
                file: tensor.file.to_path_buf(),
                field: format!("tensor `{}` (desc_act)", tensor.name),
                expected: format!("column {input} in group {expected}, columns in order"),
                found: format!("group {found}"),
            });
        }
    }
    Ok(())
}
