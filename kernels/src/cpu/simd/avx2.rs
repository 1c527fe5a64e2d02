//! AVX2 with FMA and F16C: two registers of eight lanes.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::Simd;

/// Proof that the processor has what this file uses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, where the processor has the instructions.
    pub(crate) fn probe() -> Option<Self> {
        let present = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn with_features<R>(body: impl FnOnce() -> R) -> R {
    body()
}

type F = [__m256; 2];
type I = [__m256i; 2];

#[inline]
#[target_feature(enable = "avx2")]
fn exp2i(a: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

/// # Safety
/// 16 bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_bf16(from: *const u8) -> __m256 {
    // SAFETY: promised by the caller.
    let wide = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(from.cast()) });
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
}

/// # Safety
/// 8 bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_e4m3(from: *const u8) -> __m256 {
    // SAFETY: promised by the caller.
    let codes = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(from.cast()) });
    let seven = _mm256_set1_epi32(0x7f);
    let low = _mm256_and_si256(codes, seven);
    let sign = _mm256_slli_epi32::<24>(_mm256_andnot_si256(seven, codes));
    let magnitude = _mm256_castsi256_ps(_mm256_slli_epi32::<20>(low));
    let two_120 = _mm256_castsi256_ps(_mm256_set1_epi32((120 + 127) << 23));
    let value = _mm256_castps_si256(_mm256_mul_ps(magnitude, two_120));
    let is_nan = _mm256_cmpeq_epi32(low, seven);
    let value = _mm256_blendv_epi8(value, _mm256_set1_epi32(0x7fc0_0000), is_nan);
    _mm256_castsi256_ps(_mm256_or_si256(value, sign))
}

/// # Safety
/// 8 bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_i8(from: *const u8) -> __m256 {
    // SAFETY: promised by the caller.
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe {
        _mm_loadl_epi64(from.cast())
    }))
}

/// # Safety
/// 8 bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_nibbles(from: *const u8) -> (__m256, __m256) {
    // SAFETY: promised by the caller.
    let wide = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(from.cast()) });
    let low = _mm256_and_si256(wide, _mm256_set1_epi32(15));
    (
        _mm256_cvtepi32_ps(low),
        _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(wide)),
    )
}

/// # Safety
/// 8 bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen_u8(from: *const u8) -> __m256 {
    // SAFETY: promised by the caller.
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unsafe {
        _mm_loadl_epi64(from.cast())
    }))
}

#[inline]
#[target_feature(enable = "avx2")]
fn bit_pairs(a: __m256i, index: usize) -> __m256i {
    let low = match index {
        0 => a,
        1 => _mm256_srli_epi16::<2>(a),
        2 => _mm256_srli_epi16::<4>(a),
        _ => _mm256_srli_epi16::<6>(a),
    };
    _mm256_slli_epi16::<4>(_mm256_and_si256(low, _mm256_set1_epi8(3)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bit(a: __m256i, index: usize) -> __m256i {
    let shifted = match index {
        0 => _mm256_slli_epi16::<4>(a),
        1 => _mm256_slli_epi16::<3>(a),
        2 => _mm256_slli_epi16::<2>(a),
        3 => _mm256_slli_epi16::<1>(a),
        4 => a,
        5 => _mm256_srli_epi16::<1>(a),
        6 => _mm256_srli_epi16::<2>(a),
        _ => _mm256_srli_epi16::<3>(a),
    };
    _mm256_and_si256(shifted, _mm256_set1_epi8(16))
}

#[inline]
#[target_feature(enable = "avx2")]
fn column(a: __m256i, j: usize) -> __m256 {
    let low = match j {
        0 => a,
        1 => _mm256_srli_epi32::<8>(a),
        2 => _mm256_srli_epi32::<16>(a),
        _ => _mm256_srli_epi32::<24>(a),
    };
    _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(255)))
}

/// `sums` + products of the even bytes of `codes` with `even` and of its odd ones with `odd`.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_words(sums: __m256i, codes: __m256i, even: __m256i, odd: __m256i) -> __m256i {
    let low = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), even);
    let high = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), odd);
    _mm256_add_epi32(sums, _mm256_add_epi32(low, high))
}

/// See [`Simd::interleave`], for the first eight words or the others.
#[inline]
#[target_feature(enable = "avx2")]
fn interleave(a: __m256i, b: __m256i) -> I {
    let (low, high) = (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
    [
        _mm256_permute2x128_si256::<0x20>(low, high),
        _mm256_permute2x128_si256::<0x31>(low, high),
    ]
}

/// See [`Simd::words`].
#[inline]
#[target_feature(enable = "avx2")]
fn words(a: __m256i) -> F {
    let high = _mm256_and_si256(a, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
    [
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
        _mm256_castsi256_ps(high),
    ]
}

/// See [`Simd::zip`], for eight lanes of both.
#[inline]
#[target_feature(enable = "avx2")]
fn zip(a: __m256, b: __m256) -> F {
    let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    [
        _mm256_permute2f128_ps::<0x20>(low, high),
        _mm256_permute2f128_ps::<0x31>(low, high),
    ]
}

/// See [`Simd::unzip`], for 16 values: the even ones and the odd ones.
#[inline]
#[target_feature(enable = "avx2")]
fn unzip(a: F) -> [__m256; 2] {
    let even = _mm256_shuffle_ps::<0b10_00_10_00>(a[0], a[1]);
    let odd = _mm256_shuffle_ps::<0b11_01_11_01>(a[0], a[1]);
    // Quarters 0 and 2 are of the first eight.
    [even, odd].map(|half| {
        let half = _mm256_castps_pd(half);
        _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(half))
    })
}

/// Eight values in lanes of words, see [`Simd::round_bf16`].
#[inline]
#[target_feature(enable = "avx2")]
fn bf16_bits(a: __m256) -> __m256i {
    let bits = _mm256_castps_si256(a);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
    _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan)
}

/// 16 values, see [`Simd::round_bf16`].
#[inline]
#[target_feature(enable = "avx2")]
fn round_bf16(a: F) -> __m256i {
    let words = _mm256_packus_epi32(bf16_bits(a[0]), bf16_bits(a[1]));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(words)
}

// SAFETY of every unsafe block below: `Avx2` exists only after `probe` saw the features; pointer
// methods pass their caller's promise on.
impl Simd for Avx2 {
    type F = F;
    type I = I;
    type B = I;
    type Bf16Dot = Self;
    const TILE_TOKENS: usize = 4;
    const TILE_QUERIES: usize = 2;
    const TILE_LATENT_QUERIES: usize = 2;

    #[inline(always)]
    fn vectorize<R>(self, body: impl FnOnce() -> R) -> R {
        // SAFETY: `self` proves the features.
        unsafe { with_features(body) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn abs(self, a: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { a.map(|half| _mm256_andnot_ps(_mm256_set1_ps(-0.0), half)) }
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_round_ps::<MODE>(a[0]), _mm256_round_ps::<MODE>(a[1])] }
    }
    #[inline(always)]
    fn exp2i(self, a: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [exp2i(a[0]), exp2i(a[1])] }
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let v = _mm256_add_ps(a[0], a[1]);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn largest(self, a: F) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let v = _mm256_max_ps(a[0], a[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        // SAFETY: 16 f32 are readable; `self` proves the features.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: F) {
        // SAFETY: 16 f32 are writable; `self` proves the features.
        unsafe {
            _mm256_storeu_ps(to, a[0]);
            _mm256_storeu_ps(to.add(8), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> F {
        // SAFETY: 32 bytes are readable; `self` proves the features.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u8) -> F {
        // SAFETY: 32 bytes are readable; `self` proves the features.
        unsafe { [widen_bf16(from), widen_bf16(from.add(16))] }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> F {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe { [widen_e4m3(from), widen_e4m3(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8) -> F {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe { [widen_i8(from), widen_i8(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u8) -> (F, F) {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe {
            let (low0, high0) = widen_nibbles(from);
            let (low1, high1) = widen_nibbles(from.add(8));
            ([low0, low1], [high0, high1])
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> F {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe { [widen_u8(from), widen_u8(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn round_i8(self, to: *mut i8, a: [F; 2]) -> [i32; 2] {
        // SAFETY: 32 bytes are writable; `self` proves the features.
        unsafe {
            // The conversion rounds as the control register says, which nobody changes: ties to
            // even.
            let [low, high] =
                a.map(|a| _mm256_packs_epi32(_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])));
            // Packing works within 128-bit halves: put the pieces of four codes back in order.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
            _mm256_storeu_si256(to.cast(), codes);
            let biased = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            let sums = _mm256_sad_epu8(biased, _mm256_setzero_si256());
            let sums = _mm256_add_epi32(sums, _mm256_unpackhi_epi64(sums, sums));
            let high = _mm256_extracti128_si256::<1>(sums);
            [_mm256_castsi256_si128(sums), high].map(|half| _mm_cvtsi128_si32(half) - 16 * 128)
        }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint, which faults on nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> I {
        // SAFETY: 64 bytes are readable; `self` proves the features.
        unsafe {
            [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(32).cast()),
            ]
        }
    }
    #[inline(always)]
    fn low_nibbles(self, a: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(a[0], mask), _mm256_and_si256(a[1], mask)]
        }
    }
    #[inline(always)]
    fn high_nibbles(self, a: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe { self.low_nibbles([_mm256_srli_epi16::<4>(a[0]), _mm256_srli_epi16::<4>(a[1])]) }
    }
    #[inline(always)]
    fn bit_pairs(self, a: I, index: usize) -> I {
        // SAFETY: `self` proves the features.
        unsafe { [bit_pairs(a[0], index), bit_pairs(a[1], index)] }
    }
    #[inline(always)]
    fn fifth_bit(self, a: I, index: usize) -> I {
        // SAFETY: `self` proves the features.
        unsafe { [fifth_bit(a[0], index), fifth_bit(a[1], index)] }
    }
    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn column(self, a: I, j: usize) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [column(a[0], j), column(a[1], j)] }
    }
    #[inline(always)]
    fn recenter(self, a: I, zero: u8) -> I {
        // SAFETY: `self` proves the features.
        unsafe {
            let zero = _mm256_set1_epi8(zero.cast_signed());
            a.map(|half| _mm256_sub_epi8(half, zero))
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, a: I) {
        // SAFETY: 64 bytes are writable; `self` proves the features.
        unsafe {
            _mm256_storeu_si256(to.cast(), a[0]);
            _mm256_storeu_si256(to.add(32).cast(), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_i(self, from: *const i32) -> I {
        // SAFETY: 16 i32 are readable; `self` proves the features.
        unsafe {
            [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(8).cast()),
            ]
        }
    }
    #[inline(always)]
    fn splat_b(self, value: u32) -> I {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_set1_epi32(value.cast_signed()); 2] }
    }
    #[inline(always)]
    fn interleave(self, a: I, b: I) -> [I; 2] {
        // SAFETY: `self` proves the features.
        unsafe { [interleave(a[0], b[0]), interleave(a[1], b[1])] }
    }
    #[inline(always)]
    fn words(self, a: I) -> [F; 2] {
        // SAFETY: `self` proves the features.
        unsafe {
            let ([a_low, a_high], [b_low, b_high]) = (words(a[0]), words(a[1]));
            [[a_low, b_low], [a_high, b_high]]
        }
    }
    #[inline(always)]
    fn zip(self, a: [F; 2]) -> [F; 2] {
        // SAFETY: `self` proves the features.
        unsafe { [zip(a[0][0], a[1][0]), zip(a[0][1], a[1][1])] }
    }
    #[inline(always)]
    fn unzip(self, a: [F; 2]) -> [F; 2] {
        // SAFETY: `self` proves the features.
        unsafe {
            let ([a_even, a_odd], [b_even, b_odd]) = (unzip(a[0]), unzip(a[1]));
            [[a_even, b_even], [a_odd, b_odd]]
        }
    }
    #[inline(always)]
    fn round_bf16(self, a: [F; 2]) -> I {
        // SAFETY: `self` proves the features.
        unsafe { [round_bf16(a[0]), round_bf16(a[1])] }
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> I {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    fn to_f(self, a: I) -> F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }
    #[inline(always)]
    unsafe fn dot4(self, sums: I, codes: I, values: *const i8) -> I {
        // SAFETY: 4 bytes are readable; `self` proves the features.
        unsafe {
            let values = _mm256_set1_epi32(values.cast::<i32>().read_unaligned());
            // Even and odd columns as words: the byte product instruction saturates for codes
            // over 128.
            let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(values));
            let odd = _mm256_srai_epi16::<8>(values);
            [
                dot_words(sums[0], codes[0], even, odd),
                dot_words(sums[1], codes[1], even, odd),
            ]
        }
    }
}
