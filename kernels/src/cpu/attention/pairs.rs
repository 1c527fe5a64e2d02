//! Scores and sums where queries and weights are rounded to bf16 like the keys and values they meet:
//! two products of a lane are one instruction then, where the processor has a fast one.
//!
//! A query is rounded once, a weight before it counts for anything, the sum of weights included.

use std::mem::MaybeUninit;

use half::bf16;

use super::{Bf16, Block, CHUNK_LEN, Cached, Element, F32, LANES, Query, Scores, Simd, TILE_ROWS};

/// Values of a [`Simd::B`].
const PAIRED: usize = 2 * LANES;
/// Longest query that is rounded.
pub(super) const QUERY_LEN_MAX: usize = 1024;
/// Queries that share a pass at most where a product of pairs is several instructions: with more of them
/// the compiler keeps sums in memory.
pub(super) const TILE_QUERIES: usize = 4;

/// Rounded values behind a pointer: in bf16, one behind the other, where a product of pairs is one
/// instruction; otherwise in f32, of every [`PAIRED`] the low words of all lanes and then the high ones.
#[derive(Clone, Copy)]
struct Rounded(*const u8);

impl Rounded {
    /// Where value `i` lies, in values.
    #[inline(always)]
    const fn place<S: Simd>(i: usize) -> usize {
        match S::HAS_DOT2 {
            true => i,
            false => i / PAIRED * PAIRED + i % 2 * LANES + i % PAIRED / 2,
        }
    }

    /// Writes values `at..at + PAIRED`, a whole vector's, to `to` and returns their words.
    ///
    /// # Safety
    /// There is room for them.
    #[inline(always)]
    unsafe fn write<S: Simd>(simd: S, to: *mut u8, at: usize, values: [S::F; 2]) -> [S::F; 2] {
        let rounded = simd.round_bf16(values);
        let words = simd.words(rounded);
        // SAFETY: promised by the caller.
        unsafe {
            if S::HAS_DOT2 {
                simd.store_bytes(to.add(at * Bf16::BYTES), rounded);
            } else {
                let to = to.cast::<f32>().add(at);
                simd.store(to, words[0]);
                simd.store(to.add(LANES), words[1]);
            }
        }
        words
    }

    /// Writes value `i`.
    ///
    /// # Safety
    /// There is room for it.
    #[inline(always)]
    unsafe fn write_one<S: Simd>(to: *mut u8, i: usize, value: f32) {
        let (value, i) = (bf16::from_f32(value), Self::place::<S>(i));
        // SAFETY: promised by the caller.
        unsafe {
            match S::HAS_DOT2 {
                true => to.cast::<u16>().add(i).write_unaligned(value.to_bits()),
                false => to.cast::<f32>().add(i).write_unaligned(value.to_f32()),
            }
        }
    }

    /// Value `i`.
    ///
    /// # Safety
    /// It was written.
    #[inline(always)]
    unsafe fn one<S: Simd>(self, i: usize) -> f32 {
        let i = Self::place::<S>(i);
        // SAFETY: promised by the caller.
        unsafe {
            match S::HAS_DOT2 {
                true => Bf16::one(self.0, i),
                false => F32::one(self.0, i),
            }
        }
    }

    /// Values `i` and `i + 1` in every lane.
    ///
    /// # Safety
    /// They were written, in bf16.
    #[inline(always)]
    unsafe fn pair<S: Simd>(self, simd: S, i: usize) -> S::B {
        // SAFETY: promised by the caller.
        simd.splat_b(unsafe { self.0.add(i * Bf16::BYTES).cast::<u32>().read_unaligned() })
    }

    /// Value `i` in every lane.
    ///
    /// # Safety
    /// It was written, in f32.
    #[inline(always)]
    unsafe fn splat<S: Simd>(self, simd: S, i: usize) -> S::F {
        // SAFETY: promised by the caller.
        simd.splat(unsafe { *self.0.cast::<f32>().add(Self::place::<S>(i)) })
    }
}

/// A query, or its latent part and then its rotary part from a place that is whole vectors behind the
/// first; behind an odd length comes a zero.
pub(super) struct RoundedQuery([MaybeUninit<[f32; PAIRED]>; QUERY_LEN_MAX / PAIRED + 1]);

impl RoundedQuery {
    pub(super) const EMPTY: Self = Self([MaybeUninit::uninit(); QUERY_LEN_MAX / PAIRED + 1]);

    /// Rounds the parts of `query`, which are this long, into this room.
    ///
    /// # Safety
    /// They are readable, [`QUERY_LEN_MAX`] elements in all at most.
    #[inline(always)]
    pub(super) unsafe fn fill<S: Simd>(&mut self, simd: S, query: *const f32, parts: [usize; 2]) {
        debug_assert!(parts[0] + parts[1] <= QUERY_LEN_MAX, "a query of {parts:?}");
        let to = self.0.as_mut_ptr().cast::<u8>();
        let (mut query, mut start) = (query, 0);
        for len in parts {
            let whole = len / PAIRED * PAIRED;
            // SAFETY: promised by the caller; the room is for whole vectors of the first part and of
            // both.
            unsafe {
                for at in (0..whole).step_by(PAIRED) {
                    let values = [simd.load(query.add(at)), simd.load(query.add(at + LANES))];
                    Rounded::write(simd, to, start + at, values);
                }
                for at in whole..len {
                    Rounded::write_one::<S>(to, start + at, *query.add(at));
                }
                if !len.is_multiple_of(2) {
                    Rounded::write_one::<S>(to, start + len, 0.0);
                }
                query = query.add(len);
            }
            start = len.next_multiple_of(PAIRED);
        }
    }

    fn values(&self) -> Rounded {
        Rounded(self.0.as_ptr().cast())
    }
}

/// `sums[t][n][i] += a[n][i] . b(t)`, pairs of bf16 in every lane, the high words of `pairs` and `b` and
/// then the low ones. Without an instruction for that it takes `words(1)` and `b_words(t, 1)`, their high
/// words, and likewise the low ones, each for all `t`: half as many registers.
#[inline(always)]
fn multiply<S: Simd, const T: usize, const N: usize>(
    simd: S,
    sums: &mut [[[S::F; 2]; N]; T],
    pairs: impl Fn() -> [[S::B; 2]; N],
    words: impl Fn(usize) -> [[S::F; 2]; N],
    b: impl Fn(usize) -> S::B,
    b_words: impl Fn(usize, usize) -> S::F,
) {
    if S::HAS_DOT2 {
        let a = pairs();
        for (t, sums) in sums.iter_mut().enumerate() {
            let b = b(t);
            for (sums, a) in sums.iter_mut().zip(&a) {
                sums[0] = simd.dot2(sums[0], a[0], b);
                sums[1] = simd.dot2(sums[1], a[1], b);
            }
        }
        return;
    }
    macro_rules! one_word {
        ($word:literal) => {
            let a = words($word);
            for (t, sums) in sums.iter_mut().enumerate() {
                let b = b_words(t, $word);
                for (sums, a) in sums.iter_mut().zip(&a) {
                    sums[0] = simd.fma(a[0], b, sums[0]);
                    sums[1] = simd.fma(a[1], b, sums[1]);
                }
            }
        };
    }
    one_word!(1);
    one_word!(0);
}

/// Sums of [`multiply`] where `words` came from [`Simd::words`] of neighbouring values, in their order:
/// two instructions a row less than widening its halves.
#[inline(always)]
fn in_order<S: Simd>(simd: S, sums: [S::F; 2]) -> [S::F; 2] {
    match S::HAS_DOT2 {
        true => sums,
        false => simd.zip(sums),
    }
}

/// [`super::score_columns`].
///
/// # Safety
/// Blocks and queries hold every dimension.
#[inline(always)]
pub(super) unsafe fn score_columns<S: Simd, const T: usize, const N: usize>(
    simd: S,
    queries: &[RoundedQuery; T],
    blocks: [Block; N],
    cached: &Cached<'_>,
    scores: &mut [Scores; T],
) {
    let scale = simd.splat(cached.scale);
    let (block_len, keys, key_len) = (cached.block_len, cached.rows.keys, cached.rows.key_len);
    let row_bytes = block_len * Bf16::BYTES;
    for chunk in (0..block_len).step_by(CHUNK_LEN) {
        let mut sums = [[[simd.splat(0.0); 2]; N]; T];
        // SAFETY: a block holds whole chunks of every dimension; queries hold every dimension, and a
        // zero behind an odd number of them.
        unsafe {
            for d in (0..key_len).step_by(2) {
                // What meets that zero is the last dimension once more: nothing else is known to be
                // a number.
                let second = (d + 1).min(key_len - 1);
                let at = |n: usize, d: usize| {
                    let keys = blocks[n].first.add(keys + chunk * Bf16::BYTES);
                    keys.add(d * row_bytes)
                };
                if chunk == 0 {
                    for block in &blocks {
                        block.ask(simd, keys + d * row_bytes, (second + 1 - d) * row_bytes);
                    }
                }
                multiply(
                    simd,
                    &mut sums,
                    #[inline(always)]
                    || {
                        let mut key = [[simd.splat_b(0); 2]; N];
                        for (n, key) in key.iter_mut().enumerate() {
                            let [first, second] = [at(n, d), at(n, second)];
                            let [first, second] = [simd.load_bytes(first), simd.load_bytes(second)];
                            *key = simd.interleave(first, second);
                        }
                        key
                    },
                    #[inline(always)]
                    |word| {
                        let mut key = [[simd.splat(0.0); 2]; N];
                        for (n, key) in key.iter_mut().enumerate() {
                            let from = at(n, if word == 1 { second } else { d });
                            *key = simd.words(simd.load_bytes(from));
                        }
                        key
                    },
                    #[inline(always)]
                    |t| queries[t].values().pair(simd, d),
                    #[inline(always)]
                    |t, word| queries[t].values().splat(simd, d + word),
                );
            }
            for i in 0..N {
                for (row, sums) in scores.iter_mut().zip(&sums) {
                    let to = row.as_mut_ptr().add(i * block_len + chunk);
                    let sums = in_order(simd, sums[i]);
                    simd.store(to, simd.mul(sums[0], scale));
                    simd.store(to.add(LANES), simd.mul(sums[1], scale));
                }
            }
        }
    }
}

/// [`super::score_rows`].
///
/// # Safety
/// The block is whole tiles of positions, each `key_len` long as queries are.
#[inline(always)]
pub(super) unsafe fn score_rows<S: Simd, const T: usize>(
    simd: S,
    queries: &[RoundedQuery; T],
    block: Block,
    cached: &Cached<'_>,
    index: usize,
    scores: &mut [Scores; T],
) {
    let rows = cached.rows;
    let (latent_len, rope_len) = (rows.value_len, rows.key_len - rows.value_len);
    for first in (0..block.n_positions).step_by(TILE_ROWS) {
        // Of rows 0 and 1, then 2 and 3.
        let mut sums = [[[simd.splat(0.0); 2]; TILE_ROWS / 2]; T];
        let mut rest = [[0.0; TILE_ROWS]; T];
        for (at, len, start) in [
            (0, latent_len, rows.keys),
            (latent_len.next_multiple_of(PAIRED), rope_len, rows.rope),
        ] {
            let start = start + first * len * Bf16::BYTES;
            block.ask(simd, start, TILE_ROWS * len * Bf16::BYTES);
            let whole = len / PAIRED * PAIRED;
            // SAFETY: promised by the caller.
            unsafe {
                let row = |i: usize, d: usize| block.first.add(start + (i * len + d) * Bf16::BYTES);
                for d in (0..whole).step_by(PAIRED) {
                    let key = |i: usize| simd.load_bytes(row(i, d));
                    multiply(
                        simd,
                        &mut sums,
                        #[inline(always)]
                        || [[key(0), key(1)], [key(2), key(3)]],
                        #[inline(always)]
                        |word| {
                            [
                                [simd.words(key(0))[word], simd.words(key(1))[word]],
                                [simd.words(key(2))[word], simd.words(key(3))[word]],
                            ]
                        },
                        #[inline(always)]
                        |t| simd.load_bytes(queries[t].values().0.add((at + d) * Bf16::BYTES)),
                        #[inline(always)]
                        |t, word| {
                            let words = queries[t].values().0.cast::<f32>();
                            simd.load(words.add(at + d + word * LANES))
                        },
                    );
                }
                for d in whole..len {
                    for (rest, query) in rest.iter_mut().zip(queries) {
                        let q = query.values().one::<S>(at + d);
                        for (i, rest) in rest.iter_mut().enumerate() {
                            *rest += q * Bf16::one(row(i, d), 0);
                        }
                    }
                }
            }
        }
        for ((row, sums), rest) in scores.iter_mut().zip(&sums).zip(&rest) {
            let to = &mut row[index * cached.block_len + first..][..TILE_ROWS];
            for ((to, sum), rest) in to.iter_mut().zip(sums.as_flattened()).zip(rest) {
                *to = (simd.sum(*sum) + rest) * cached.scale;
            }
        }
    }
}

/// Rounds the first `width` weights of `row`, whole chunks, to bf16 at its beginning; returns their
/// sum.
///
/// # Safety
/// `row` holds that many.
#[inline(always)]
pub(super) unsafe fn round_weights<S: Simd>(simd: S, row: &mut Scores, width: usize) -> f32 {
    let mut sum = simd.splat(0.0);
    let row = row.as_mut_ptr();
    // SAFETY: promised by the caller; what is written lies in front of what is still to be read.
    unsafe {
        for at in (0..width).step_by(PAIRED) {
            let weights = [simd.load(row.add(at)), simd.load(row.add(at + LANES))];
            let [even, odd] = Rounded::write(simd, row.cast(), at, weights);
            sum = simd.add(simd.add(sum, even), odd);
        }
    }
    simd.sum(sum)
}

/// [`super::accumulate`] with weights of [`round_weights`].
///
/// # Safety
/// As [`super::accumulate`].
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const T: usize>(
    simd: S,
    queries: &[Query; T],
    weights: &[Scores; T],
    rescale: &[f32; T],
    blocks: &[Block],
    cached: &Cached<'_>,
) {
    const WIDE: usize = 2;
    let rows = cached.rows;
    let whole = rows.value_len / PAIRED * PAIRED;
    let mut at = 0;
    // SAFETY: values have a row of `value_len` elements per position, outputs have as many.
    unsafe {
        while at + WIDE * PAIRED <= whole {
            columns::<S, T, WIDE>(simd, queries, weights, rescale, blocks, cached, at);
            at += WIDE * PAIRED;
        }
        while at < whole {
            columns::<S, T, 1>(simd, queries, weights, rescale, blocks, cached, at);
            at += PAIRED;
        }
        for i in whole..rows.value_len {
            for (t, query) in queries.iter().enumerate() {
                let mut sum = *query.out.add(i) * rescale[t];
                let weights = Rounded(weights[t].as_ptr().cast());
                for (b, block) in blocks.iter().enumerate() {
                    let values = block.first.add(rows.values);
                    for p in 0..block.n_positions {
                        let weight = weights.one::<S>(b * cached.block_len + p);
                        sum += weight * Bf16::one(values, p * rows.value_len + i);
                    }
                }
                *query.out.add(i) = sum;
            }
        }
    }
}

/// Columns `at..at + WIDE * PAIRED` of [`accumulate`].
#[inline(always)]
unsafe fn columns<S: Simd, const T: usize, const WIDE: usize>(
    simd: S,
    queries: &[Query; T],
    weights: &[Scores; T],
    rescale: &[f32; T],
    blocks: &[Block],
    cached: &Cached<'_>,
    at: usize,
) {
    let rows = cached.rows;
    let (stride, bytes) = (rows.value_len * Bf16::BYTES, WIDE * PAIRED * Bf16::BYTES);
    let mut sums = [[[simd.splat(0.0); 2]; WIDE]; T];
    // SAFETY: promised by the caller; a block has at most as many positions as `weights`.
    unsafe {
        for ((sums, query), rescale) in sums.iter_mut().zip(queries).zip(rescale) {
            let (factor, out) = (simd.splat(*rescale), query.out.add(at));
            for (i, sums) in sums.iter_mut().enumerate() {
                let out = out.add(i * PAIRED);
                *sums = [
                    simd.mul(simd.load(out), factor),
                    simd.mul(simd.load(out.add(LANES)), factor),
                ];
                if !S::HAS_DOT2 {
                    *sums = simd.unzip(*sums);
                }
            }
        }
        for (b, block) in blocks.iter().enumerate() {
            let values = rows.values + at * Bf16::BYTES;
            for p in (0..block.n_positions).step_by(2) {
                // What meets the zero weight of a position that is not there is the last one.
                let second = (p + 1).min(block.n_positions - 1);
                if !rows.keys_in_rows {
                    block.ask(simd, values + p * stride, bytes);
                    block.ask(simd, values + second * stride, bytes);
                }
                let at = |p: usize, i: usize| {
                    let values = block.first.add(values + p * stride);
                    values.add(i * PAIRED * Bf16::BYTES)
                };
                multiply(
                    simd,
                    &mut sums,
                    #[inline(always)]
                    || {
                        let mut v = [[simd.splat_b(0); 2]; WIDE];
                        for (i, v) in v.iter_mut().enumerate() {
                            let [first, second] = [at(p, i), at(second, i)];
                            let [first, second] = [simd.load_bytes(first), simd.load_bytes(second)];
                            *v = simd.interleave(first, second);
                        }
                        v
                    },
                    #[inline(always)]
                    |word| {
                        let mut v = [[simd.splat(0.0); 2]; WIDE];
                        for (i, v) in v.iter_mut().enumerate() {
                            let from = at(if word == 1 { second } else { p }, i);
                            *v = simd.words(simd.load_bytes(from));
                        }
                        v
                    },
                    #[inline(always)]
                    |t| {
                        let weights = Rounded(weights[t].as_ptr().cast());
                        weights.pair(simd, b * cached.block_len + p)
                    },
                    #[inline(always)]
                    |t, word| {
                        let weights = Rounded(weights[t].as_ptr().cast());
                        weights.splat(simd, b * cached.block_len + p + word)
                    },
                );
            }
        }
        // By reference: arrays of vectors taken by value go through memory.
        for (sums, query) in sums.iter().zip(queries) {
            let out = query.out.add(at);
            for (i, sums) in sums.iter().enumerate() {
                let sums = in_order(simd, *sums);
                simd.store(out.add(i * PAIRED), sums[0]);
                simd.store(out.add(i * PAIRED + LANES), sums[1]);
            }
        }
    }
}

const _: () = assert!(
    CHUNK_LEN == PAIRED,
    "a row of a chunk is one load, and a block's weights are whole loads"
);
