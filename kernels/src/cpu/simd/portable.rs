//! Plain arrays: every processor, and what the compiler makes of it.

use half::{bf16, f16};

use super::{LANES, Simd};
use crate::quant;

/// Needs nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; LANES];
type B = [[u8; 4]; LANES];

#[inline(always)]
fn zip(a: F, b: F, op: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| op(a[i], b[i]))
}

/// Bytes `[WIDTH * i..]` of each lane.
#[inline(always)]
unsafe fn lanes<const WIDTH: usize>(from: *const u8, value: impl Fn([u8; WIDTH]) -> f32) -> F {
    // SAFETY: the caller promises LANES elements of WIDTH bytes; arrays of bytes need no alignment.
    let raw = unsafe { from.cast::<[[u8; WIDTH]; LANES]>().read() };
    raw.map(value)
}

// SAFETY of every unsafe block below: pointer methods pass their caller's promise on.
impl Simd for Portable {
    type F = F;
    type I = [i32; LANES];
    type B = B;
    type Bf16Dot = Self;
    const TILE_TOKENS: usize = 4;
    const TILE_QUERIES: usize = 2;
    const TILE_LATENT_QUERIES: usize = 2;

    #[inline(always)]
    fn vectorize<R>(self, body: impl FnOnce() -> R) -> R {
        body()
    }
    #[inline(always)]
    fn splat(self, value: f32) -> F {
        [value; LANES]
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn abs(self, a: F) -> F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // Not `mul_add`: without the instruction that is a library call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within -126..=127"
    )]
    fn exp2i(self, a: F) -> F {
        a.map(|v| f32::from_bits(((v as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        let mut v = a;
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                v[i] += v[i + width];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn largest(self, a: F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        // SAFETY: 16 f32 are readable.
        unsafe { from.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: F) {
        // SAFETY: 16 f32 are writable.
        unsafe { to.cast::<F>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> F {
        // SAFETY: 32 bytes are readable.
        unsafe { lanes::<2>(from, |raw| f16::from_le_bytes(raw).to_f32()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u8) -> F {
        // SAFETY: 32 bytes are readable.
        unsafe { lanes::<2>(from, quant::bf16_to_f32) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> F {
        // SAFETY: 16 bytes are readable.
        unsafe { lanes::<1>(from, |[code]| quant::e4m3_to_f32(code)) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8) -> F {
        // SAFETY: 16 bytes are readable.
        unsafe { lanes::<1>(from, |[code]| f32::from(code.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u8) -> (F, F) {
        // SAFETY: 16 bytes are readable.
        unsafe {
            (
                lanes::<1>(from, |[code]| f32::from(code & 15)),
                lanes::<1>(from, |[code]| f32::from(code >> 4)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> F {
        // SAFETY: 16 bytes are readable.
        unsafe { lanes::<1>(from, |[code]| f32::from(code)) }
    }
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the caller keeps it within a byte"
    )]
    unsafe fn round_i8(self, to: *mut i8, a: [F; 2]) -> [i32; 2] {
        let codes = a.map(|a| a.map(|v| v.round_ties_even() as i8));
        // SAFETY: 32 bytes are writable.
        unsafe { to.cast::<[[i8; LANES]; 2]>().write(codes) };
        codes.map(|half| half.iter().map(|code| i32::from(*code)).sum())
    }
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> B {
        // SAFETY: 64 bytes are readable.
        unsafe { from.cast::<B>().read() }
    }
    #[inline(always)]
    fn low_nibbles(self, a: B) -> B {
        a.map(|lane| lane.map(|byte| byte & 15))
    }
    #[inline(always)]
    fn high_nibbles(self, a: B) -> B {
        a.map(|lane| lane.map(|byte| byte >> 4))
    }
    #[inline(always)]
    fn bit_pairs(self, a: B, index: usize) -> B {
        a.map(|lane| lane.map(|byte| ((byte >> (2 * index)) & 3) << 4))
    }
    #[inline(always)]
    fn fifth_bit(self, a: B, index: usize) -> B {
        a.map(|lane| lane.map(|byte| ((byte >> index) & 1) << 4))
    }
    #[inline(always)]
    fn or(self, a: B, b: B) -> B {
        std::array::from_fn(|i| std::array::from_fn(|j| a[i][j] | b[i][j]))
    }
    #[inline(always)]
    fn column(self, a: B, j: usize) -> F {
        a.map(|lane| f32::from(lane[j]))
    }
    #[inline(always)]
    fn recenter(self, a: B, zero: u8) -> B {
        a.map(|lane| lane.map(|byte| byte.wrapping_sub(zero)))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, a: B) {
        // SAFETY: 64 bytes are writable.
        unsafe { to.cast::<B>().write(a) }
    }
    #[inline(always)]
    unsafe fn load_i(self, from: *const i32) -> [i32; LANES] {
        // SAFETY: 16 i32 are readable.
        unsafe { from.cast::<[i32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    fn splat_b(self, value: u32) -> B {
        [value.to_le_bytes(); LANES]
    }
    #[inline(always)]
    fn interleave(self, a: B, b: B) -> [B; 2] {
        let word = |of: &B, i: usize| [of[i / 2][i % 2 * 2], of[i / 2][i % 2 * 2 + 1]];
        let lane = |i: usize| {
            let ([a, b], [c, d]) = (word(&a, i), word(&b, i));
            [a, b, c, d]
        };
        [0, LANES].map(|first| std::array::from_fn(|i| lane(first + i)))
    }
    #[inline(always)]
    fn words(self, a: B) -> [F; 2] {
        [
            a.map(|lane| quant::bf16_to_f32([lane[0], lane[1]])),
            a.map(|lane| quant::bf16_to_f32([lane[2], lane[3]])),
        ]
    }
    #[inline(always)]
    fn zip(self, a: [F; 2]) -> [F; 2] {
        [0, LANES].map(|first| std::array::from_fn(|i| a[i % 2][(first + i) / 2]))
    }
    #[inline(always)]
    fn unzip(self, a: [F; 2]) -> [F; 2] {
        [0, 1].map(|odd| std::array::from_fn(|i| a.as_flattened()[2 * i + odd]))
    }
    #[inline(always)]
    fn round_bf16(self, a: [F; 2]) -> B {
        let word = |i: usize| bf16::from_f32(a[i / LANES][i % LANES]).to_le_bytes();
        std::array::from_fn(|i| {
            let ([a, b], [c, d]) = (word(2 * i), word(2 * i + 1));
            [a, b, c, d]
        })
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> [i32; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    #[expect(clippy::cast_precision_loss, reason = "sums of a group are below 2^24")]
    fn to_f(self, a: [i32; LANES]) -> F {
        a.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn dot4(self, sums: [i32; LANES], codes: B, values: *const i8) -> [i32; LANES] {
        // SAFETY: 4 bytes are readable.
        let values = unsafe { values.cast::<[i8; 4]>().read() };
        std::array::from_fn(|lane| {
            let products = (0..4).map(|j| i32::from(codes[lane][j]) * i32::from(values[j]));
            sums[lane] + products.sum::<i32>()
        })
    }
}
