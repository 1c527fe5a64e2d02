//! AVX-512 F, BW, VL and VNNI, with or without BF16.
#![cfg(target_arch = "x86_64")]

use std::{arch::x86_64::*, sync::OnceLock};

use super::{LANES, Simd, amx::Amx};

/// Proof that the processor has what this file uses; with `BF16` also of AVX512-BF16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool = false> {
    amx: Option<Amx>,
}

impl Avx512 {
    /// The token, where the processor has the instructions; `with_amx`: and the matrix unit.
    pub(crate) fn probe_for(with_amx: bool) -> Option<Self> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let amx = if with_amx { Some(Amx::probe()?) } else { None };
        present.then_some(Self { amx })
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn with_features<R>(body: impl FnOnce() -> R) -> R {
    body()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
fn with_bf16<R>(body: impl FnOnce() -> R) -> R {
    body()
}

/// Whether the product of bf16 pairs is there and faster than multiply-adds: 470 to 235 Gop/s on a
/// Zen 4 EPYC, 82 to 165 on a core of a Xeon with AMX, so the maker decides.
fn has_fast_bf16() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let vendor = __cpuid(0);
        let amd = *b"AuthenticAMD";
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        is_x86_feature_detected!("avx512bf16") && name.as_flattened() == amd
    })
}

/// See [`Simd::interleave`], for the words from `first` on.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn interleave<const FIRST: i16>(a: __m512i, b: __m512i) -> __m512i {
    let words: [i16; 32] = std::array::from_fn(|i| FIRST + i as i16 / 2 + i as i16 % 2 * 32);
    // SAFETY: 64 bytes.
    let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
    _mm512_permutex2var_epi16(a, words, b)
}

/// Lanes of `a` and `b` by number, those of `b` from 16 on.
#[target_feature(enable = "avx512f")]
#[inline]
fn lanes(a: [__m512; 2], numbers: impl Fn(i32) -> i32) -> __m512 {
    let numbers: [i32; LANES] = std::array::from_fn(|i| numbers(i as i32));
    // SAFETY: 64 bytes.
    let numbers = unsafe { _mm512_loadu_si512(numbers.as_ptr().cast()) };
    _mm512_permutex2var_ps(a[0], numbers, a[1])
}

/// See [`Simd::in_turn`].
#[target_feature(enable = "avx512f")]
#[inline]
fn in_turn(mut a: __m512i) -> __m512i {
    // SAFETY: no instruction at all. It counts as one with effects, which keep their order.
    unsafe {
        std::arch::asm!("/* {} */", inout(zmm_reg) a, options(nomem, nostack, preserves_flags));
    }
    a
}

/// Largest magnitude of lanes `l` and `l + 16` of 32 values.
///
/// # Safety
/// They are readable.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
unsafe fn magnitudes(from: *const f32) -> __m512 {
    // SAFETY: promised by the caller.
    let (low, high) = unsafe { (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))) };
    _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high))
}

/// In every quarter the largest elements of that quarter of each vector, one beside the other.
#[target_feature(enable = "avx512f")]
#[inline]
fn largest_of_4(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    let ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
    _mm512_max_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
}

/// The largest of four quarters' elements, for each vector, one vector after the other.
#[target_feature(enable = "avx512f")]
#[inline]
fn largest_of_quarters(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let two = |a, b| {
        _mm512_max_ps(
            _mm512_shuffle_f32x4::<EVEN>(a, b),
            _mm512_shuffle_f32x4::<ODD>(a, b),
        )
    };
    two(two(a, b), two(c, d))
}

/// Rounds 32 values times `inverse` to the nearest integers, ties to even, and stores them as signed
/// bytes; the sums of every four.
///
/// # Safety
/// Values are readable, bytes writable.
#[target_feature(enable = "avx512f,avx512vl,avx512vnni")]
#[inline]
unsafe fn round_bytes(from: *const f32, inverse: f32, to: *mut i8) -> __m256i {
    let inverse = _mm512_set1_ps(inverse);
    // SAFETY: promised by the caller.
    unsafe {
        let low = _mm512_mul_ps(_mm512_loadu_ps(from), inverse);
        let high = _mm512_mul_ps(_mm512_loadu_ps(from.add(16)), inverse);
        let low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(low));
        let high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(high));
        let codes = _mm256_set_m128i(high, low);
        _mm256_storeu_si256(to.cast(), codes);
        _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), codes)
    }
}

/// In either half the sums of that half of each vector, one beside the other.
#[target_feature(enable = "avx2")]
#[inline]
fn sums_of_4(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m256i {
    let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
}

/// See [`Simd::round_groups`]: maxima and sums of all groups side by side instead of one by one.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512vnni,avx2")]
#[inline]
unsafe fn round_groups(
    from: &[*const f32; 16],
    codes: &[*mut i8; 16],
) -> ([f32; 16], [[i32; 16]; 2]) {
    let (mut scales, mut inverses, mut sums) = ([0f32; 16], [0f32; 16], [[0i32; 16]; 2]);
    // SAFETY: promised by the caller; arrays are as long as what is stored in them.
    unsafe {
        let quarter = |i: usize| {
            largest_of_4(
                magnitudes(from[i]),
                magnitudes(from[i + 1]),
                magnitudes(from[i + 2]),
                magnitudes(from[i + 3]),
            )
        };
        let largest = largest_of_quarters(quarter(0), quarter(4), quarter(8), quarter(12));
        let scale = _mm512_div_ps(largest, _mm512_set1_ps(127.0));
        let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scale, _mm512_setzero_ps());
        let inverse = _mm512_maskz_div_ps(positive, _mm512_set1_ps(1.0), scale);
        _mm512_storeu_ps(scales.as_mut_ptr(), scale);
        _mm512_storeu_ps(inverses.as_mut_ptr(), inverse);
        for i in (0..16).step_by(4) {
            let of = |i: usize| round_bytes(from[i], inverses[i], codes[i]);
            let both = sums_of_4(of(i), of(i + 1), of(i + 2), of(i + 3));
            let [low, high] = &mut sums;
            _mm_storeu_si128(low[i..].as_mut_ptr().cast(), _mm256_castsi256_si128(both));
            let upper = _mm256_extracti128_si256::<1>(both);
            _mm_storeu_si128(high[i..].as_mut_ptr().cast(), upper);
        }
    }
    (scales, sums)
}

/// 16 values, see [`Simd::round_bf16`].
#[target_feature(enable = "avx512f")]
#[inline]
fn round_bf16(a: __m512) -> __m256i {
    let bits = _mm512_castps_si512(a);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
    let rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
    _mm512_cvtepi32_epi16(rounded)
}

/// [`Simd::round_bf16`] in one instruction.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn round_pairs(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the types are 64 bytes both.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// The product of pairs.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn dot2(sums: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: the types are 64 bytes both.
    let (a, b) = unsafe {
        (
            std::mem::transmute::<__m512i, __m512bh>(a),
            std::mem::transmute::<__m512i, __m512bh>(b),
        )
    };
    _mm512_dpbf16_ps(sums, a, b)
}

// SAFETY of every unsafe block below: `Avx512` exists only after `probe` saw the features; pointer
// methods pass their caller's promise on.
impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type Bf16Dot = Avx512<true>;
    const TILE_TOKENS: usize = 16;
    const TILE_QUERIES: usize = 6;
    const TILE_LATENT_QUERIES: usize = 6;
    const HAS_DOT2: bool = BF16;

    #[inline(always)]
    fn amx(self) -> Option<Amx> {
        self.amx
    }
    #[inline(always)]
    fn bf16_dot(self) -> Option<Avx512<true>> {
        has_fast_bf16().then_some(Avx512 { amx: self.amx })
    }
    #[inline(always)]
    fn vectorize<R>(self, body: impl FnOnce() -> R) -> R {
        // SAFETY: `self` proves the features.
        unsafe {
            match BF16 {
                true => with_bf16(body),
                false => with_features(body),
            }
        }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn exp2i(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(a);
            let v = _mm256_add_ps(_mm512_castps512_ps256(a), high);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: 16 f32 are readable; `self` proves the features.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: __m512) {
        // SAFETY: 16 f32 are writable; `self` proves the features.
        unsafe { _mm512_storeu_ps(to, a) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> __m512 {
        // SAFETY: 32 bytes are readable; `self` proves the features.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u8) -> __m512 {
        // SAFETY: 32 bytes are readable; `self` proves the features.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> __m512 {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let low = _mm512_and_si512(codes, _mm512_set1_epi32(0x7f));
            let sign = _mm512_slli_epi32::<24>(_mm512_andnot_si512(_mm512_set1_epi32(0x7f), codes));
            let magnitude = _mm512_castsi512_ps(_mm512_slli_epi32::<20>(low));
            let two_120 = _mm512_castsi512_ps(_mm512_set1_epi32((120 + 127) << 23));
            let value = _mm512_castps_si512(_mm512_mul_ps(magnitude, two_120));
            let nan = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(0x7f));
            let value = _mm512_mask_mov_epi32(value, nan, _mm512_set1_epi32(0x7fc0_0000));
            _mm512_castsi512_ps(_mm512_or_si512(value, sign))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8) -> __m512 {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, from: *const u8) -> (__m512, __m512) {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe {
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let low = _mm512_and_si512(wide, _mm512_set1_epi32(15));
            (
                _mm512_cvtepi32_ps(low),
                _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(wide)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> __m512 {
        // SAFETY: 16 bytes are readable; `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn round_i8(self, to: *mut i8, a: [__m512; 2]) -> [i32; 2] {
        // SAFETY: 32 bytes are writable; `self` proves the features.
        unsafe {
            // The conversion rounds as the control register says, which nobody changes: ties to
            // even.
            let [low, high] = a.map(|a| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
            _mm_storeu_si128(to.cast(), low);
            _mm_storeu_si128(to.add(16).cast(), high);
            let codes = _mm256_set_m128i(high, low);
            let biased = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            let sums = _mm256_sad_epu8(biased, _mm256_setzero_si256());
            let sums = _mm256_add_epi32(sums, _mm256_unpackhi_epi64(sums, sums));
            let high = _mm256_extracti128_si256::<1>(sums);
            [_mm256_castsi256_si128(sums), high].map(|half| _mm_cvtsi128_si32(half) - 16 * 128)
        }
    }
    #[inline(always)]
    unsafe fn round_groups(
        self,
        from: &[*const f32; LANES],
        codes: &[*mut i8; LANES],
    ) -> ([f32; LANES], [[i32; LANES]; 2]) {
        // SAFETY: promised by the caller; `self` proves the features.
        unsafe { round_groups(from, codes) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint, which faults on nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[inline(always)]
    fn prefetch_write(self, at: *const u8) {
        // Assembly, because the intrinsic becomes a prefetch for reading where the compiler was not
        // told of the instruction, which every processor with AVX-512 has.
        // SAFETY: a hint, which faults on nothing.
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> __m512i {
        // SAFETY: 64 bytes are readable; `self` proves the features.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn low_nibbles(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high_nibbles(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn bit_pairs(self, a: __m512i, index: usize) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe {
            let low = match index {
                0 => a,
                1 => _mm512_srli_epi16::<2>(a),
                2 => _mm512_srli_epi16::<4>(a),
                _ => _mm512_srli_epi16::<6>(a),
            };
            _mm512_slli_epi16::<4>(_mm512_and_si512(low, _mm512_set1_epi8(3)))
        }
    }
    #[inline(always)]
    fn fifth_bit(self, a: __m512i, index: usize) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe {
            let shifted = match index {
                0 => _mm512_slli_epi16::<4>(a),
                1 => _mm512_slli_epi16::<3>(a),
                2 => _mm512_slli_epi16::<2>(a),
                3 => _mm512_slli_epi16::<1>(a),
                4 => a,
                5 => _mm512_srli_epi16::<1>(a),
                6 => _mm512_srli_epi16::<2>(a),
                _ => _mm512_srli_epi16::<3>(a),
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(16))
        }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn column(self, a: __m512i, j: usize) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let low = match j {
                0 => a,
                1 => _mm512_srli_epi32::<8>(a),
                2 => _mm512_srli_epi32::<16>(a),
                _ => _mm512_srli_epi32::<24>(a),
            };
            _mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32(255)))
        }
    }
    #[inline(always)]
    fn recenter(self, a: __m512i, zero: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_epi8(a, _mm512_set1_epi8(zero.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, a: __m512i) {
        // SAFETY: 64 bytes are writable; `self` proves the features.
        unsafe { _mm512_storeu_si512(to.cast(), a) }
    }
    #[inline(always)]
    unsafe fn load_i(self, from: *const i32) -> __m512i {
        // SAFETY: 16 i32 are readable; `self` proves the features.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn splat_b(self, value: u32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(value.cast_signed()) }
    }
    #[inline(always)]
    fn interleave(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        // SAFETY: `self` proves the features.
        unsafe { [interleave::<0>(a, b), interleave::<16>(a, b)] }
    }
    #[inline(always)]
    fn words(self, a: __m512i) -> [__m512; 2] {
        // SAFETY: `self` proves the features.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                _mm512_castsi512_ps(_mm512_and_si512(a, high)),
            ]
        }
    }
    #[inline(always)]
    fn zip(self, a: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: `self` proves the features.
        unsafe {
            [
                lanes(a, |i| i / 2 + i % 2 * 16),
                lanes(a, |i| 8 + i / 2 + i % 2 * 16),
            ]
        }
    }
    #[inline(always)]
    fn unzip(self, a: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: `self` proves the features.
        unsafe { [lanes(a, |i| 2 * i), lanes(a, |i| 2 * i + 1)] }
    }
    #[inline(always)]
    fn round_bf16(self, a: [__m512; 2]) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe {
            if BF16 {
                return round_pairs(a[0], a[1]);
            }
            let (low, high) = (round_bf16(a[0]), round_bf16(a[1]));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    }
    #[inline(always)]
    fn dot2(self, sums: __m512, a: __m512i, b: __m512i) -> __m512 {
        if BF16 {
            // SAFETY: `self` proves the features.
            return unsafe { dot2(sums, a, b) };
        }
        let ([a_low, a_high], [b_low, b_high]) = (self.words(a), self.words(b));
        self.fma(a_low, b_low, self.fma(a_high, b_high, sums))
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn to_f(self, a: __m512i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn in_turn(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { in_turn(a) }
    }
    #[inline(always)]
    unsafe fn dot4(self, sums: __m512i, codes: __m512i, values: *const i8) -> __m512i {
        // SAFETY: 4 bytes are readable; `self` proves the features.
        unsafe {
            let values = _mm512_set1_epi32(values.cast::<i32>().read_unaligned());
            _mm512_dpbusd_epi32(sums, codes, values)
        }
    }
}
