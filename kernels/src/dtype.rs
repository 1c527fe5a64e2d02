//! The storage formats of weights and how many bytes a run of elements takes in each.

use std::fmt;

/// How the elements of a stored matrix are encoded. A row is a whole number of blocks.
///
/// The `Q*` layouts are those of ggml (`ggml-common.h`), `Int*` are this program's; FP8 is e4m3fn (bias 7, largest 448, no
/// infinities) with one f32 scale per 128x128 tile held beside the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// IEEE single precision, little endian.
    F32,
    /// IEEE half precision, little endian.
    F16,
    /// The upper half of an f32, little endian.
    Bf16,
    /// FP8 e4m3fn; a matrix in this format carries [`crate::matrix::TileScales`].
    F8E4m3,
    /// 32 elements: f16 scale `d`, 16 bytes of nibbles; value `d * (q - 8)`.
    Q4_0,
    /// 32 elements: f16 scale `d`, f16 minimum `m`, 16 bytes of nibbles; value `d * q + m`.
    Q4_1,
    /// 32 elements: f16 scale `d`, 32 fifth bits (u32, bit `i` of element `i`), 16 bytes of nibbles;
    /// value `d * (q - 16)`.
    Q5_0,
    /// 32 elements: f16 scale `d`, f16 minimum `m`, fifth bits and nibbles as in Q5_0; value
    /// `d * q + m`.
    Q5_1,
    /// 32 elements: f16 scale `d`, 32 signed bytes; value `d * q`.
    Q8_0,
    /// 256 elements in 8 sub-blocks with 6-bit scales and minima; 144 bytes.
    Q4K,
    /// 256 elements in 8 sub-blocks as in Q4K, with a fifth bit each; 176 bytes.
    Q5K,
    /// 256 elements in 16 sub-blocks with 8-bit scales, 6-bit codes; 210 bytes.
    Q6K,
    /// 32 signed bytes; one f32 scale per row, in [`crate::matrix::TileScales`] of one row.
    Int8,
    /// 32 elements: f16 scale `d`, u8 zero (0 to 15), 16 bytes of nibbles as in Q4_0; value
    /// `d * (q - zero)`. AWQ and GPTQ checkpoints become this; their larger groups repeat `d` and
    /// zero.
    Int4,
}

impl Format {
    /// All formats, in the order of the enum.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::F8E4m3,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Int8,
        Self::Int4,
    ];

    /// Elements in one block: 1 for the plain formats.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4m3 => 1,
            Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q8_0
            | Self::Int8
            | Self::Int4 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Int8 => 32,
            Self::Int4 => 19,
        }
    }

    /// Bytes of a row of `n_cols` elements; `None` if it is not a whole number of blocks or the
    /// result does not fit `usize`.
    pub fn row_bytes(self, n_cols: usize) -> Option<usize> {
        if !n_cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name used in messages and in `--json` output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4m3 => "fp8_e4m3",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
