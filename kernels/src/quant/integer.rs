//! Int8 with one scale per row, and Int4 in groups with integer zeros: what AWQ, GPTQ and W8A8
//! checkpoints hold.

use half::f16;

use super::plain::f16_to_f32;
use crate::{dtype::Format, matrix::Matrix};

/// Columns of an Int4 block.
pub(super) const BLOCK_LEN: usize = 32;
/// Bytes of an Int4 block.
pub(super) const BLOCK_BYTES: usize = Format::Int4.block_bytes();

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
