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

/// Sums of the lower and of the upper four lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn halves(sums: __m256i) -> (i32, i32) {
    let fold = |v: __m128i| {
        let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_11_10>(v));
        _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_00_01>(v)))
    };
    (
        fold(_mm256_castsi256_si128(sums)),
        fold(_mm256_extracti128_si256::<1>(sums)),
    )
}

type F = [__m256; 2];

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

// SAFETY of every unsafe block below: `Avx2` exists only after `probe` saw the features; pointer
// methods pass their caller's promise on.
impl Simd for Avx2 {
    type F = F;

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
    unsafe fn dot_u8_i8(self, codes: *const u8, values: *const i8) -> (i32, i32) {
        // SAFETY: 32 bytes are readable at both; `self` proves the features.
        unsafe {
            let u = _mm256_loadu_si256(codes.cast());
            let s = _mm256_loadu_si256(values.cast());
            // Widened to 16 bits first: the byte product instruction saturates for codes over 128.
            let low = _mm256_madd_epi16(
                _mm256_cvtepu8_epi16(_mm256_castsi256_si128(u)),
                _mm256_cvtepi8_epi16(_mm256_castsi256_si128(s)),
            );
            let high = _mm256_madd_epi16(
                _mm256_cvtepu8_epi16(_mm256_extracti128_si256::<1>(u)),
                _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(s)),
            );
            let (a, b) = halves(low);
            let (c, d) = halves(high);
            (a + b, c + d)
        }
    }
}
