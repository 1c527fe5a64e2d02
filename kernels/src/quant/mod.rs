//! Stored bytes to f32, one file per family of formats; scalar, exact, and the specification of
//! every faster decoder.
//!
//! Does not know matrices' owners or threads. Called by the reference backend, by the loaders of
//! small tensors, and by the CPU backend for shapes its fused kernels do not take.

mod plain;
mod fp8;
mod ggml;
mod integer;
mod round;
pub mod int8;

use crate::{
    dtype::Format,
    matrix::{Layout, Matrix},
    panel,
};

pub use fp8::e4m3_to_f32;
pub use ggml::{fifth_bits, q4k_scale_min, q5k_codes, q6k_codes};
pub use integer::put_int4;
pub use plain::{bf16_to_f32, f16_to_f32};
pub use round::{RoundError, round_to};

/// Decodes row `row` of `matrix` into `out`.
///
/// # Panics
/// When `row` is out of range or `out` is not `n_cols` long.
pub fn decode_row(matrix: &Matrix, row: usize, out: &mut [f32]) {
    assert_eq!(out.len(), matrix.n_cols(), "one output per column");
    if matrix.layout() == Layout::Panels {
        return panel::decode_row(matrix, row, out);
    }
    let bytes = matrix.row(row);
    match matrix.format() {
        Format::F32 => plain::decode_f32(bytes, out),
        Format::F16 => plain::decode_f16(bytes, out),
        Format::Bf16 => plain::decode_bf16(bytes, out),
        Format::F8E4m3 => fp8::decode(matrix, row, bytes, out),
        Format::Q4_0 => ggml::decode_blocks(bytes, out, ggml::q4_0),
        Format::Q4_1 => ggml::decode_blocks(bytes, out, ggml::q4_1),
        Format::Q5_0 => ggml::decode_blocks(bytes, out, ggml::q5_0),
        Format::Q5_1 => ggml::decode_blocks(bytes, out, ggml::q5_1),
        Format::Q8_0 => ggml::decode_blocks(bytes, out, ggml::q8_0),
        Format::Q4K => ggml::decode_blocks(bytes, out, ggml::q4_k),
        Format::Q5K => ggml::decode_blocks(bytes, out, ggml::q5_k),
        Format::Q6K => ggml::decode_blocks(bytes, out, ggml::q6_k),
        Format::Int8 => integer::decode_int8(matrix, row, bytes, out),
        Format::Int4 => ggml::decode_blocks(bytes, out, integer::int4),
    }
}
