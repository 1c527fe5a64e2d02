//! Groups of 32 stored weights to two vectors, per format.

use crate::{
    cpu::simd::{LANES, Simd},
    matrix::Matrix,
    quant::{f16_to_f32, fifth_bits, q4k_scale_min, q5k_codes, q6k_codes},
};

/// Columns decoded at once.
pub(super) const GROUP_LEN: usize = 2 * LANES;

/// One stored row.
#[derive(Debug, Clone, Copy)]
pub(super) struct WeightRow<'a> {
    pub(super) bytes: &'a [u8],
    /// Scales of the row's tiles; empty for formats without.
    pub(super) scales: &'a [f32],
    pub(super) tile_cols: usize,
}

impl<'a> WeightRow<'a> {
    pub(super) fn of(matrix: &'a Matrix, row: usize) -> Self {
        let bytes = matrix.row(row);
        match matrix.tile_scales() {
            None => Self {
                bytes,
                scales: &[],
                tile_cols: 1,
            },
            Some(s) => {
                let grid_cols = matrix.n_cols().div_ceil(s.tile_cols);
                let scales = &s.values[row / s.tile_rows * grid_cols..][..grid_cols];
                Self {
                    bytes,
                    scales,
                    tile_cols: s.tile_cols,
                }
            }
        }
    }
}

/// A weight format as the kernels read it.
pub(super) trait Decode {
    /// Elements `32 group..32 group + 32` of the row.
    ///
    /// # Safety
    /// The row holds that group whole.
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2];
}

macro_rules! plain {
    ($name:ident, $bytes:literal, $load:ident, $pointer:ty) => {
        pub(super) enum $name {}
        impl Decode for $name {
            #[inline(always)]
            unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
                // SAFETY: the caller promises the group.
                unsafe {
                    let from = row.bytes.as_ptr().add(group * GROUP_LEN * $bytes);
                    let second = from.add(LANES * $bytes);
                    [
                        simd.$load(from.cast::<$pointer>()),
                        simd.$load(second.cast::<$pointer>()),
                    ]
                }
            }
        }
    };
}
plain!(F32, 4, load, f32);
plain!(F16, 2, load_f16, u8);
plain!(Bf16, 2, load_bf16, u8);

pub(super) enum F8E4m3 {}
impl Decode for F8E4m3 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let scale = simd.splat(row.scales[group * GROUP_LEN / row.tile_cols]);
        // SAFETY: the caller promises the group.
        unsafe {
            let from = row.bytes.as_ptr().add(group * GROUP_LEN);
            let values = [simd.load_e4m3(from), simd.load_e4m3(from.add(LANES))];
            [simd.mul(values[0], scale), simd.mul(values[1], scale)]
        }
    }
}

/// The f16 at `from`.
///
/// # Safety
/// Two bytes are readable.
#[inline(always)]
unsafe fn half_at(from: *const u8) -> f32 {
    // SAFETY: promised by the caller.
    f16_to_f32(unsafe { from.cast::<[u8; 2]>().read() })
}

pub(super) enum Q4_0 {}
impl Decode for Q4_0 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        // SAFETY: the caller promises the group, a block of 18 bytes.
        unsafe {
            let block = row.bytes.as_ptr().add(group * 18);
            let d = simd.splat(half_at(block));
            let (low, high) = simd.load_nibbles(block.add(2));
            let eight = simd.splat(8.0);
            [
                simd.mul(d, simd.sub(low, eight)),
                simd.mul(d, simd.sub(high, eight)),
            ]
        }
    }
}

pub(super) enum Q4_1 {}
impl Decode for Q4_1 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        // SAFETY: the caller promises the group, a block of 20 bytes.
        unsafe {
            let block = row.bytes.as_ptr().add(group * 20);
            let (d, m) = (
                simd.splat(half_at(block)),
                simd.splat(half_at(block.add(2))),
            );
            let (low, high) = simd.load_nibbles(block.add(4));
            [simd.fma(d, low, m), simd.fma(d, high, m)]
        }
    }
}

/// The codes of a Q5_0 or Q5_1 group: nibbles with their fifth bits.
#[inline(always)]
fn five_bits(bits: &[u8], nibbles: &[u8]) -> [u8; GROUP_LEN] {
    let bit = fifth_bits(bits);
    let mut codes = [0; GROUP_LEN];
    for (j, byte) in nibbles.iter().enumerate() {
        codes[j] = byte & 15 | bit(j) << 4;
        codes[j + LANES] = byte >> 4 | bit(j + LANES) << 4;
    }
    codes
}

/// 32 codes as numbers.
#[inline(always)]
fn numbers<S: Simd>(simd: S, codes: &[u8; GROUP_LEN]) -> [S::F; 2] {
    // SAFETY: 32 bytes.
    unsafe {
        [
            simd.load_u8(codes.as_ptr()),
            simd.load_u8(codes[LANES..].as_ptr()),
        ]
    }
}

pub(super) enum Q5_0 {}
impl Decode for Q5_0 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let block = &row.bytes[group * 22..][..22];
        let d = simd.splat(f16_to_f32([block[0], block[1]]));
        let codes = numbers(simd, &five_bits(&block[2..6], &block[6..]));
        codes.map(|code| simd.mul(d, simd.sub(code, simd.splat(16.0))))
    }
}

pub(super) enum Q5_1 {}
impl Decode for Q5_1 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let block = &row.bytes[group * 24..][..24];
        let half = |at: usize| simd.splat(f16_to_f32([block[at], block[at + 1]]));
        let codes = numbers(simd, &five_bits(&block[4..8], &block[8..]));
        codes.map(|code| simd.fma(half(0), code, half(2)))
    }
}

pub(super) enum Q8_0 {}
impl Decode for Q8_0 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        // SAFETY: the caller promises the group, a block of 34 bytes.
        unsafe {
            let block = row.bytes.as_ptr().add(group * 34);
            let d = simd.splat(half_at(block));
            let values = [
                simd.load_i8(block.add(2)),
                simd.load_i8(block.add(2 + LANES)),
            ];
            [simd.mul(d, values[0]), simd.mul(d, values[1])]
        }
    }
}

pub(super) enum Int8 {}
impl Decode for Int8 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let scale = simd.splat(row.scales[0]);
        // SAFETY: the caller promises the group, 32 bytes.
        unsafe {
            let from = row.bytes.as_ptr().add(group * GROUP_LEN);
            let values = [simd.load_i8(from), simd.load_i8(from.add(LANES))];
            [simd.mul(scale, values[0]), simd.mul(scale, values[1])]
        }
    }
}

pub(super) enum Int4 {}
impl Decode for Int4 {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        // SAFETY: the caller promises the group, a block of 19 bytes.
        unsafe {
            let block = row.bytes.as_ptr().add(group * 19);
            let d = simd.splat(half_at(block));
            let zero = simd.splat(f32::from(*block.add(2)));
            let (low, high) = simd.load_nibbles(block.add(3));
            [
                simd.mul(d, simd.sub(low, zero)),
                simd.mul(d, simd.sub(high, zero)),
            ]
        }
    }
}

pub(super) enum Q4K {}
impl Decode for Q4K {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let (block, j) = (group / 8, group % 8);
        let block = &row.bytes[block * 144..][..144];
        let (scale, min) = q4k_scale_min(&block[4..16], j);
        // SAFETY: the slice holds the block; sub-blocks j and j ^ 1 share 32 bytes of nibbles.
        unsafe {
            let d = half_at(block.as_ptr()) * f32::from(scale);
            let dmin = half_at(block.as_ptr().add(2)) * f32::from(min);
            let codes = block.as_ptr().add(16 + j / 2 * 32);
            let first = simd.load_nibbles(codes);
            let second = simd.load_nibbles(codes.add(LANES));
            let codes = if j % 2 == 0 {
                [first.0, second.0]
            } else {
                [first.1, second.1]
            };
            let (d, m) = (simd.splat(d), simd.splat(-dmin));
            [simd.fma(d, codes[0], m), simd.fma(d, codes[1], m)]
        }
    }
}

pub(super) enum Q5K {}
impl Decode for Q5K {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let (block, j) = (group / 8, group % 8);
        let block = &row.bytes[block * 176..][..176];
        let (scale, min) = q4k_scale_min(&block[4..16], j);
        let d = f16_to_f32([block[0], block[1]]) * f32::from(scale);
        let dmin = f16_to_f32([block[2], block[3]]) * f32::from(min);
        let (d, m) = (simd.splat(d), simd.splat(-dmin));
        numbers(simd, &q5k_codes(block, j)).map(|code| simd.fma(d, code, m))
    }
}

pub(super) enum Q6K {}
impl Decode for Q6K {
    #[inline(always)]
    unsafe fn group<S: Simd>(simd: S, row: &WeightRow<'_>, group: usize) -> [S::F; 2] {
        let (block, j) = (group / 8, group % 8);
        let block = &row.bytes[block * 210..][..210];
        let codes = q6k_codes(block, j);
        // SAFETY: the slice holds the block; `codes` is 32 long.
        unsafe {
            let d = half_at(block.as_ptr().add(208));
            let values = [
                simd.load_i8(codes.as_ptr()),
                simd.load_i8(codes.as_ptr().add(LANES)),
            ];
            let offset = simd.splat(32.0);
            let scales = &block[192 + j * 2..][..2];
            let scale = |i: usize| simd.splat(d * f32::from(scales[i].cast_signed()));
            [
                simd.mul(scale(0), simd.sub(values[0], offset)),
                simd.mul(scale(1), simd.sub(values[1], offset)),
            ]
        }
    }
}
