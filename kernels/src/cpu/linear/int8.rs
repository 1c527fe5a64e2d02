//! Block-quantized weights on int8 activations: integer products within a group, f32 sums over
//! groups in column order.

use std::ops::Range;

use super::{
    super::SharedOut,
    Job,
    decode::{GROUP_LEN, q6k_codes},
};
use crate::{
    cpu::simd::Simd,
    dtype::Format,
    quant::{f16_to_f32, int8::Int8Rows, q4k_scale_min},
};

/// Tokens that share one decoding of a weight row.
const TOKENS: usize = 8;

/// 32 weights as unsigned codes: `value = scale * code + min`, per half of 16.
struct Group {
    codes: [u8; GROUP_LEN],
    scale: [f32; 2],
    min: [f32; 2],
}

/// Whether the format has integer codes to multiply.
pub(crate) fn applies(format: Format) -> bool {
    match format {
        Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => false,
        Format::Q4_0 | Format::Q4_1 | Format::Q8_0 | Format::Q4K | Format::Q6K => true,
    }
}

/// Outputs `rows` of the job for all its tokens.
///
/// # Safety
/// The job's outputs lie inside `out`.
#[inline(always)]
pub(super) unsafe fn rows<S: Simd>(
    simd: S,
    x: &Int8Rows,
    job: &Job<'_>,
    rows: Range<usize>,
    out: SharedOut<'_>,
) {
    let n_groups = job.weight.n_cols() / GROUP_LEN;
    for output in rows {
        let bytes = job.weight.row(job.first_row + output);
        let bias = job.bias.map_or(0.0, |b| b[output]);
        for tokens in super::tiles(0..job.n_tokens, TOKENS) {
            let mut totals = [0f32; TOKENS];
            for group in 0..n_groups {
                let weights = decode(job.weight.format(), bytes, group);
                for (total, token) in totals.iter_mut().zip(tokens.clone()) {
                    let codes = &x.row_codes(token)[group * GROUP_LEN..][..GROUP_LEN];
                    let sums = &x.row_half_sums(token)[group * 2..][..2];
                    // SAFETY: both are 32 long.
                    let dots = unsafe { simd.dot_u8_i8(weights.codes.as_ptr(), codes.as_ptr()) };
                    let value =
                        half(&weights, 0, dots.0, sums[0]) + half(&weights, 1, dots.1, sums[1]);
                    *total += x.row_scales(token)[group] * value;
                }
            }
            for (total, token) in totals.iter().zip(tokens) {
                let at = token * job.out_stride + job.out_offset + output;
                // SAFETY: the caller bounds the job's outputs.
                unsafe { out.write(at, total + bias) };
            }
        }
    }
}

#[inline(always)]
#[expect(
    clippy::cast_precision_loss,
    reason = "16 products of 8 bits are far below 2^24"
)]
fn half(weights: &Group, i: usize, dot: i32, sum: i32) -> f32 {
    weights.scale[i] * dot as f32 + weights.min[i] * sum as f32
}

#[inline(always)]
fn decode(format: Format, row: &[u8], group: usize) -> Group {
    match format {
        Format::Q4_0 => {
            let block = &row[group * 18..][..18];
            let d = f16_to_f32([block[0], block[1]]);
            uniform(nibbles(&block[2..18]), d, -8.0 * d)
        }
        Format::Q4_1 => {
            let block = &row[group * 20..][..20];
            let d = f16_to_f32([block[0], block[1]]);
            uniform(nibbles(&block[4..20]), d, f16_to_f32([block[2], block[3]]))
        }
        Format::Q8_0 => {
            let block = &row[group * 34..][..34];
            let d = f16_to_f32([block[0], block[1]]);
            let mut codes = [0; GROUP_LEN];
            for (code, byte) in codes.iter_mut().zip(&block[2..]) {
                *code = byte ^ 0x80;
            }
            uniform(codes, d, -128.0 * d)
        }
        Format::Q4K => {
            let (block, j) = (&row[group / 8 * 144..][..144], group % 8);
            let (scale, min) = q4k_scale_min(&block[4..16], j);
            let codes = &block[16 + j / 2 * 32..][..GROUP_LEN];
            let shift = j % 2 * 4;
            let mut unpacked = [0; GROUP_LEN];
            for (code, byte) in unpacked.iter_mut().zip(codes) {
                *code = (byte >> shift) & 15;
            }
            uniform(
                unpacked,
                f16_to_f32([block[0], block[1]]) * f32::from(scale),
                -f16_to_f32([block[2], block[3]]) * f32::from(min),
            )
        }
        Format::Q6K => {
            let (block, j) = (&row[group / 8 * 210..][..210], group % 8);
            let d = f16_to_f32([block[208], block[209]]);
            let scale_of = |i: usize| d * f32::from(block[192 + j * 2 + i].cast_signed());
            let scale = [scale_of(0), scale_of(1)];
            Group {
                codes: q6k_codes(block, j),
                scale,
                min: [-32.0 * scale[0], -32.0 * scale[1]],
            }
        }
        Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => {
            unreachable!("`applies` keeps formats without codes away")
        }
    }
}

#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; GROUP_LEN] {
    std::array::from_fn(|i| {
        if i < 16 {
            bytes[i] & 15
        } else {
            bytes[i - 16] >> 4
        }
    })
}

#[inline(always)]
fn uniform(codes: [u8; GROUP_LEN], scale: f32, min: f32) -> Group {
    Group {
        codes,
        scale: [scale; 2],
        min: [min; 2],
    }
}
