//! Sixteen f32 lanes on three instruction sets, behind one trait that kernels are generic over.
//!
//! A value of [`Avx512`] or [`Avx2`] exists only where the processor was probed for it, which is
//! what makes their methods safe to call. All three keep element `16 i + lane` in lane `lane` and
//! sum lanes in the same tree.

#[cfg_attr(not(target_arch = "x86_64"), path = "amx_absent.rs")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The operations kernels are written in. Pointers need no alignment.
///
/// # Safety
/// Methods that take a pointer read or write [`LANES`] elements of the named width there.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// 64 bytes: four per lane.
    type B: Copy;
    /// Rows of activations that share a pass over a panel of weights at most, a power of two:
    /// as many as there are registers for.
    const TILE_TOKENS: usize;
    /// Queries of grouped heads that share a pass over keys and values, likewise; at most 6.
    const TILE_QUERIES: usize;
    /// Queries that share a pass over latent rows, likewise; at most 6.
    const TILE_LATENT_QUERIES: usize;

    /// Whether [`Self::dot2`] is one instruction.
    const HAS_DOT2: bool = false;
    /// This set with [`Self::dot2`] in one instruction.
    type Bf16Dot: Simd;
    /// That set, where the processor is faster with it.
    fn bf16_dot(self) -> Option<Self::Bf16Dot> {
        None
    }

    /// The processor's matrix unit, where it has one and this set is to use it.
    fn amx(self) -> Option<amx::Amx> {
        None
    }

    /// Runs `body` compiled for this instruction set; kernels start here.
    fn vectorize<R>(self, body: impl FnOnce() -> R) -> R;

    fn splat(self, value: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// `a * b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Nearest integer.
    fn round(self, a: Self::F) -> Self::F;
    /// 2 to the power of an integral value within -126..=127.
    fn exp2i(self, a: Self::F) -> Self::F;
    /// Sum of the lanes: halves added, then quarters, then eighths, then pairs.
    fn sum(self, a: Self::F) -> f32;

    /// The largest lane.
    fn largest(self, a: Self::F) -> f32;

    /// 16 f32.
    unsafe fn load(self, from: *const f32) -> Self::F;
    unsafe fn store(self, to: *mut f32, a: Self::F);
    /// 32 bytes of half precision.
    unsafe fn load_f16(self, from: *const u8) -> Self::F;
    /// 32 bytes of bf16.
    unsafe fn load_bf16(self, from: *const u8) -> Self::F;
    /// 16 bytes of e4m3fn.
    unsafe fn load_e4m3(self, from: *const u8) -> Self::F;
    /// 16 signed bytes.
    unsafe fn load_i8(self, from: *const u8) -> Self::F;
    /// 16 bytes: low nibbles, high nibbles.
    unsafe fn load_nibbles(self, from: *const u8) -> (Self::F, Self::F);
    /// 16 unsigned bytes.
    unsafe fn load_u8(self, from: *const u8) -> Self::F;
    /// Rounds 32 values within -128..=127 to the nearest integers, ties to even, stores them as
    /// signed bytes and returns the sums of the first 16 and of the others.
    unsafe fn round_i8(self, to: *mut i8, a: [Self::F; 2]) -> [i32; 2];
    /// Rounds 32 values as [`crate::quant::int8::round_group`] does and stores their codes; the scale,
    /// and the sums of the first 16 codes and of the others.
    #[inline(always)]
    unsafe fn round_group(self, from: *const f32, codes: *mut i8) -> (f32, [i32; 2]) {
        // SAFETY: promised by the caller.
        unsafe {
            let (low, high) = (self.load(from), self.load(from.add(LANES)));
            let scale = self.largest(self.max(self.abs(low), self.abs(high))) / 127.0;
            let inverse = self.splat(if scale > 0.0 { 1.0 / scale } else { 0.0 });
            let values = [self.mul(low, inverse), self.mul(high, inverse)];
            (scale, self.round_i8(codes, values))
        }
    }
    /// [`Self::round_group`] for 16 groups; lane `i` of what it returns is group `i`'s.
    #[inline(always)]
    unsafe fn round_groups(
        self,
        from: &[*const f32; LANES],
        codes: &[*mut i8; LANES],
    ) -> ([f32; LANES], [[i32; LANES]; 2]) {
        let (mut scales, mut sums) = ([0.0; LANES], [[0; LANES]; 2]);
        for i in 0..LANES {
            // SAFETY: promised by the caller.
            let (scale, halves) = unsafe { self.round_group(from[i], codes[i]) };
            (scales[i], sums[0][i], sums[1][i]) = (scale, halves[0], halves[1]);
        }
        (scales, sums)
    }

    /// Asks for the cache line at `at`, which need not be readable, in the second-level cache.
    fn prefetch(self, at: *const u8);
    /// Asks for the cache line at `at`, likewise, for writing.
    fn prefetch_write(self, _at: *const u8) {}

    /// 64 bytes.
    unsafe fn load_bytes(self, from: *const u8) -> Self::B;
    /// Bits 0..4 of every byte.
    fn low_nibbles(self, a: Self::B) -> Self::B;
    /// Bits 4..8 of every byte.
    fn high_nibbles(self, a: Self::B) -> Self::B;
    /// Bits `2 index..2 index + 2` of every byte as bits 4..6, `index < 4`.
    fn bit_pairs(self, a: Self::B, index: usize) -> Self::B;
    /// Bit `index` of every byte as bit 4, `index < 8`.
    fn fifth_bit(self, a: Self::B, index: usize) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// Byte `j` of every lane, unsigned, `j < 4`.
    fn column(self, a: Self::B, j: usize) -> Self::F;

    /// `a - zero` for every byte, wrapping.
    fn recenter(self, a: Self::B, zero: u8) -> Self::B;
    /// Stores 64 bytes.
    unsafe fn store_bytes(self, to: *mut u8, a: Self::B);

    /// `value` in every lane.
    fn splat_b(self, value: u32) -> Self::B;
    /// Words `i` of `a` and of `b` beside each other in lane `i`, for the first 16 words and for the
    /// others.
    fn interleave(self, a: Self::B, b: Self::B) -> [Self::B; 2];
    /// The low words of all lanes as bf16, and the high ones.
    fn words(self, a: Self::B) -> [Self::F; 2];
    /// Lanes of both in turn, `a[0]` of lane 0 first: the first 16 of them and the others.
    fn zip(self, a: [Self::F; 2]) -> [Self::F; 2];
    /// What [`Self::zip`] undoes.
    fn unzip(self, a: [Self::F; 2]) -> [Self::F; 2];
    /// 32 values rounded to bf16, ties to even, two neighbours in a lane; NaN stays NaN.
    fn round_bf16(self, a: [Self::F; 2]) -> Self::B;
    /// `sums[lane] + a[lane] * b[lane]` for both words of a lane as bf16, the high ones first. Products of
    /// bf16 are exact, so each is rounded once, where it is added. Where it is one instruction, numbers
    /// below 2^-126 count as zero.
    #[inline(always)]
    fn dot2(self, sums: Self::F, a: Self::B, b: Self::B) -> Self::F {
        let ([a_low, a_high], [b_low, b_high]) = (self.words(a), self.words(b));
        self.fma(a_low, b_low, self.fma(a_high, b_high, sums))
    }

    fn splat_i(self, value: i32) -> Self::I;
    /// 16 i32.
    unsafe fn load_i(self, from: *const i32) -> Self::I;
    /// Exact below 2^24.
    fn to_f(self, a: Self::I) -> Self::F;
    /// `a`; where many chains of operations are to run beside each other, those in front of this come
    /// before those behind it also in the machine's code. Left alone, the compiler puts a chain
    /// behind the others to save a register, and everything waits for it.
    #[inline(always)]
    fn in_turn(self, a: Self::I) -> Self::I {
        a
    }
    /// `sums[lane] + sum_j codes[4 lane + j] * values[j]`: unsigned codes, four signed values that
    /// all lanes share.
    unsafe fn dot4(self, sums: Self::I, codes: Self::B, values: *const i8) -> Self::I;

    /// e to the power of each lane within about 2 units in the last place; below -87 the result is
    /// that of -87 (1.6e-38), which is nothing beside the softmax' largest term, 1.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let x = self.min(self.max(x, self.splat(-87.0)), self.splat(88.0));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so that the remainder keeps its low bits (Cody & Waite).
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            0.166_666_65,
            0.5,
        ] {
            p = self.fma(p, r, self.splat(c));
        }
        let r2 = self.mul(r, r);
        let e = self.add(self.fma(p, r2, r), self.splat(1.0));
        self.mul(e, self.exp2i(n))
    }

    /// `x * sigmoid(x)`.
    #[inline(always)]
    fn silu(self, x: Self::F) -> Self::F {
        let one = self.splat(1.0);
        let e = self.exp(self.sub(self.splat(0.0), x));
        self.div(x, self.add(one, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of pairs of 32 values against 32 others, after both were rounded, interleaved with each
    /// other and taken apart again; behind them the values' even and odd ones, and those in turn.
    fn pairs<S: Simd>(simd: S, values: &[f32; 4 * LANES]) -> Vec<u32> {
        let mut found = [[0f32; LANES]; 10];
        simd.vectorize(
            #[inline(always)]
            || {
                // SAFETY: loads and stores are of 16 elements each.
                unsafe {
                    let load = |i: usize| simd.load(values[i * LANES..].as_ptr());
                    let a = simd.round_bf16([load(0), load(1)]);
                    let b = simd.round_bf16([load(2), load(3)]);
                    let [first, second] = simd.interleave(a, b);
                    let sums = simd.dot2(simd.dot2(load(1), a, b), first, second);
                    simd.store(found[0].as_mut_ptr(), sums);
                    let ([low, high], [c, d]) = (simd.words(first), simd.words(second));
                    for (to, v) in found[1..].iter_mut().zip([low, high, c, d]) {
                        simd.store(to.as_mut_ptr(), v);
                    }
                    let three = simd.splat_b(0x4040_4040);
                    simd.store(found[5].as_mut_ptr(), simd.dot2(load(0), a, three));
                    let apart = simd.unzip([load(0), load(1)]);
                    let in_turn = simd.zip(apart);
                    let all = apart.into_iter().chain(in_turn);
                    for (to, v) in found[6..].iter_mut().zip(all) {
                        simd.store(to.as_mut_ptr(), v);
                    }
                }
            },
        );
        found.as_flattened().iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn pairs_of_bf16_have_the_same_bits_on_every_set() {
        let mut state = 7u32;
        for _ in 0..100 {
            let mut values = [0f32; 4 * LANES];
            for value in &mut values {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *value = f32::from((state >> 16) as i16) * 1.7e-4;
            }
            let expected = pairs(Portable, &values);
            let rounded = half::bf16::from_f32(values[0]).to_f32();
            assert_eq!(expected[LANES], rounded.to_bits(), "the first word");
            for (i, value) in values[..2 * LANES].iter().enumerate() {
                let apart = expected[6 * LANES + i % 2 * LANES + i / 2];
                let in_turn = expected[8 * LANES + i];
                assert_eq!([apart, in_turn], [value.to_bits(); 2], "value {i}");
            }
            #[cfg(target_arch = "x86_64")]
            {
                if let Some(set) = Avx2::probe() {
                    assert_eq!(pairs(set, &values), expected, "AVX2");
                }
                if let Some(set) = Avx512::probe_for(false) {
                    assert_eq!(pairs(set, &values), expected, "AVX-512");
                    if let Some(set) = set.bf16_dot() {
                        assert_eq!(pairs(set, &values), expected, "AVX512-BF16");
                    }
                }
            }
        }
    }
}
