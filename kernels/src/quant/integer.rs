//! Int8 with one scale per row, and Int4 in groups with integer zeros: what AWQ, GPTQ and W8A8
//! checkpoints hold, and rounding to them.

use half::f16;

use super::{decode_row, int8, plain::f16_to_f32};
use crate::{
    dtype::Format,
    matrix::{Matrix, TileScales},
};

/// Columns of an Int4 block.
const BLOCK_LEN: usize = 32;
/// Bytes of an Int4 block.
const BLOCK_BYTES: usize = Format::Int4.block_bytes();

pub(super) fn decode_int8(matrix: &Matrix, row: usize, bytes: &[u8], out: &mut [f32]) {
    let scale = matrix.tile_scales().map_or(0.0, |s| s.values[row]);
    for (value, code) in out.iter_mut().zip(bytes) {
        *value = scale * f32::from(code.cast_signed());
    }
}

pub(super) fn int4(raw: &[u8; BLOCK_BYTES], out: &mut [f32; BLOCK_LEN]) {
    let (d, zero) = (f16_to_f32([raw[0], raw[1]]), f32::from(raw[2]));
    for j in 0..BLOCK_LEN / 2 {
        let byte = raw[3 + j];
        out[j] = d * (f32::from(byte & 15) - zero);
        out[j + 16] = d * (f32::from(byte >> 4) - zero);
    }
}

/// Writes an Int4 block: scale, zero and 32 codes of 0..16.
///
/// # Panics
/// When `out` is not a block long.
pub fn put_int4(out: &mut [u8], scale: f16, zero: u8, codes: &[u8; BLOCK_LEN]) {
    assert_eq!(out.len(), BLOCK_BYTES, "a block");
    out[..2].copy_from_slice(&scale.to_le_bytes());
    out[2] = zero;
    for (j, byte) in out[3..].iter_mut().enumerate() {
        *byte = codes[j] | (codes[j + BLOCK_LEN / 2] << 4);
    }
}

/// Why a matrix cannot be rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RoundError {
    /// A weight is NaN or infinite.
    #[error("row {row}, column {col} is not a finite number")]
    NotFinite {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
    },
    /// The width is no whole number of blocks.
    #[error("a row has {n_cols} columns, expected a multiple of {block_len}")]
    PartialBlock {
        /// Columns of the matrix.
        n_cols: usize,
        /// Columns of a block.
        block_len: usize,
    },
}

/// The matrix rounded to the nearest values of `format`: [`Format::Int8`], scale = largest
/// magnitude of the row / 127; or [`Format::Int4`], for every 32 columns scale = (most - least) / 15
/// with zero always among the values.
///
/// # Errors
/// [`RoundError`].
///
/// # Panics
/// When `format` is another one.
pub fn round_to(matrix: &Matrix, format: Format) -> Result<Matrix, RoundError> {
    let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
    let Some(row_bytes) = format.row_bytes(n_cols) else {
        let block_len = format.block_len();
        return Err(RoundError::PartialBlock { n_cols, block_len });
    };
    let mut values = vec![0.0; n_cols];
    let mut codes = vec![0; n_cols];
    let mut data = Vec::with_capacity(n_rows * row_bytes);
    let mut scales = Vec::new();
    for row in 0..n_rows {
        decode_row(matrix, row, &mut values);
        if let Some(col) = values.iter().position(|v| !v.is_finite()) {
            return Err(RoundError::NotFinite { row, col });
        }
        match format {
            Format::Int8 => {
                scales.push(int8::round_row(&values, &mut codes));
                data.extend(codes.iter().map(|code| code.cast_unsigned()));
            }
            Format::Int4 => {
                for values in values.as_chunks::<BLOCK_LEN>().0 {
                    let at = data.len();
                    data.resize(at + BLOCK_BYTES, 0);
                    round_int4(values, &mut data[at..]);
                }
            }
            _ => unreachable!("{format} is not rounded to"),
        }
    }
    let tile_scales = (format == Format::Int8).then_some(TileScales {
        tile_rows: 1,
        tile_cols: n_cols,
        values: scales,
    });
    let rounded = Matrix::new(format, n_rows, n_cols, data.into(), tile_scales);
    Ok(rounded.expect("bytes and scales were made for the shape"))
}

fn round_int4(values: &[f32; BLOCK_LEN], out: &mut [u8]) {
    let least = values.iter().fold(0f32, |a, v| a.min(*v));
    let most = values.iter().fold(0f32, |a, v| a.max(*v));
    let scale = f16::from_f32(((most - least) / 15.0).min(f16::MAX.to_f32()));
    let inverse = match scale.to_f32() {
        0.0 => 0.0,
        scale => 1.0 / scale,
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to a nibble"
    )]
    let nibble = |v: f32| v.round_ties_even().clamp(0.0, 15.0) as u8;
    let zero = nibble(-least * inverse);
    let codes = values.map(|v| nibble(v * inverse + f32::from(zero)));
    put_int4(out, scale, zero, &codes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_within_half_a_step_and_keeps_zero() {
        let values = (0..128)
            .map(|i| match i % 11 {
                0 => 0.0,
                _ => (i * 37 % 101) as f32 / 50.0 - 0.7,
            })
            .collect::<Vec<_>>();
        let matrix = Matrix::from_f32(2, 64, &values);
        // Int4: (1.3 + 0.7) / 15 a step, the zero itself rounded; Int8: 1.3 / 127.
        for (format, step) in [(Format::Int4, 2.0 / 15.0), (Format::Int8, 1.3 / 127.0)] {
            let rounded = round_to(&matrix, format).unwrap();
            for row in 0..2 {
                let mut found = [0.0; 64];
                decode_row(&rounded, row, &mut found);
                for (f, v) in found.iter().zip(&values[row * 64..]) {
                    let most = if format == Format::Int4 { 1.0 } else { 0.5 } * step + 1e-3;
                    assert!((f - v).abs() <= most, "{format}: {f} for {v}");
                    assert!(*v != 0.0 || *f == 0.0, "{format}: zero became {f}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_rounded_is_named() {
        let mut values = [1.0; 64];
        values[37] = f32::NAN;
        let error = round_to(&Matrix::from_f32(2, 32, &values), Format::Int8).unwrap_err();
        assert_eq!(error, RoundError::NotFinite { row: 1, col: 5 });
        let error = round_to(&Matrix::from_f32(2, 31, &[1.0; 62]), Format::Int4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a row has 31 columns, expected a multiple of 32"
        );
    }
}
