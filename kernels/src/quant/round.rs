//! Rounding matrices to the nearest values of a format, to compare formats on one model.

use half::{bf16, f16};

use super::{
    decode_row,
    fp8::f32_to_e4m3,
    int8,
    integer::{BLOCK_BYTES, BLOCK_LEN, put_int4},
};
use crate::{
    dtype::Format,
    matrix::{Matrix, TileScales},
};

/// Rows and columns of a tile of FP8.
const TILE: usize = 128;
/// Largest e4m3 number.
const E4M3_MAX: f32 = 448.0;

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
    /// Nothing is rounded to this format here.
    #[error("weights are not rounded to {0}")]
    Format(Format),
}

/// The matrix rounded to the nearest values of `format`: F32; BF16; FP8 in tiles of 128x128, scale
/// = largest magnitude / 448; Int8, scale = largest magnitude of the row / 127; or Int4, for every
/// 32 columns scale = (most - least) / 15 with zero always among the values.
///
/// # Errors
/// [`RoundError`].
pub fn round_to(matrix: &Matrix, format: Format) -> Result<Matrix, RoundError> {
    let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
    let Some(row_bytes) = format.row_bytes(n_cols) else {
        let block_len = format.block_len();
        return Err(RoundError::PartialBlock { n_cols, block_len });
    };
    let mut data = Vec::with_capacity(n_rows * row_bytes);
    let mut scales = Vec::new();
    let mut rows = vec![0.0; TILE * n_cols];
    let mut codes = vec![0; n_cols];
    for first in (0..n_rows).step_by(TILE) {
        let rows = &mut rows[..TILE.min(n_rows - first) * n_cols];
        for (i, values) in rows.chunks_exact_mut(n_cols).enumerate() {
            decode_row(matrix, first + i, values);
            if let Some(col) = values.iter().position(|v| !v.is_finite()) {
                let row = first + i;
                return Err(RoundError::NotFinite { row, col });
            }
        }
        match format {
            Format::F32 => data.extend(rows.iter().flat_map(|v| v.to_le_bytes())),
            Format::Bf16 => data.extend(rows.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
            Format::F8E4m3 => round_tiles(rows, n_cols, &mut data, &mut scales),
            Format::Int8 => {
                for values in rows.chunks_exact(n_cols) {
                    scales.push(int8::round_row(values, &mut codes));
                    data.extend(codes.iter().map(|code| code.cast_unsigned()));
                }
            }
            Format::Int4 => {
                for values in rows.as_chunks::<BLOCK_LEN>().0 {
                    let at = data.len();
                    data.resize(at + BLOCK_BYTES, 0);
                    round_int4(values, &mut data[at..]);
                }
            }
            _ => return Err(RoundError::Format(format)),
        }
    }
    let tile = match format {
        Format::F8E4m3 => Some((TILE, TILE)),
        Format::Int8 => Some((1, n_cols)),
        _ => None,
    };
    let tile_scales = tile.map(|(tile_rows, tile_cols)| TileScales {
        tile_rows,
        tile_cols,
        values: scales,
    });
    let rounded = Matrix::new(format, n_rows, n_cols, data.into(), tile_scales);
    Ok(rounded.expect("bytes and scales were made for the shape"))
}

/// One row of tiles.
fn round_tiles(rows: &[f32], n_cols: usize, data: &mut Vec<u8>, scales: &mut Vec<f32>) {
    let first = scales.len();
    for tile in (0..n_cols).step_by(TILE) {
        let cols = tile..(tile + TILE).min(n_cols);
        let largest = rows
            .chunks_exact(n_cols)
            .flat_map(|row| &row[cols.clone()])
            .fold(0f32, |a, v| a.max(v.abs()));
        scales.push(largest / E4M3_MAX);
    }
    let inverses = scales[first..]
        .iter()
        .map(|scale| if *scale > 0.0 { 1.0 / scale } else { 0.0 })
        .collect::<Vec<_>>();
    for row in rows.chunks_exact(n_cols) {
        let codes = row.iter().enumerate();
        data.extend(codes.map(|(col, v)| f32_to_e4m3(v * inverses[col / TILE])));
    }
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
        let values = (0..2 * 192)
            .map(|i| match i % 11 {
                0 => 0.0,
                _ => (i * 37 % 101) as f32 / 50.0 - 0.7,
            })
            .collect::<Vec<_>>();
        let matrix = Matrix::from_f32(2, 192, &values);
        // The largest magnitude is 1.3. Bf16 has 128 steps between 1 and 2, FP8 has 8 steps between 256 and 512, Int8 127 steps on a
        // side; Int4 has 15 from -0.7 to 1.3, and its zero is rounded too.
        for (format, most) in [
            (Format::F32, 0.0),
            (Format::Bf16, 1.0 / 128.0 / 2.0),
            (Format::F8E4m3, 1.3 / 448.0 * 16.0),
            (Format::Int8, 1.3 / 127.0 / 2.0),
            (Format::Int4, 2.0 / 15.0),
        ] {
            let rounded = round_to(&matrix, format).unwrap();
            for row in 0..2 {
                let mut found = [0.0; 192];
                decode_row(&rounded, row, &mut found);
                for (f, v) in found.iter().zip(&values[row * 192..]) {
                    assert!((f - v).abs() <= most * 1.01, "{format}: {f} for {v}");
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
        let error = round_to(&Matrix::from_f32(2, 32, &[1.0; 64]), Format::Q4_0).unwrap_err();
        assert_eq!(error.to_string(), "weights are not rounded to q4_0");
    }
}
