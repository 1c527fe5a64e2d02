//! Scores and sums where queries and weights are rounded to bf16 like the keys and values they meet:
//! two products of a lane are one instruction then, where the processor has a fast one.
//!
//! A query is rounded once, a weight before it counts for anything, the sum of weights included.

use std::mem::MaybeUninit;

use half::bf16;

use super::{Bf16, Block, CHUNK_LEN, Cached, Element, LANES, Query, Scores, Simd, TILE_ROWS};

/// Values of a [`Simd::B`].
const PAIRED: usize = 2 * LANES;
/// Longest query that is rounded.
pub(super) const QUERY_LEN_MAX: usize = 1024;

/// A query in bf16, one value behind the other; behind an odd length comes a zero.
pub(super) struct RoundedQuery([MaybeUninit<[u8; 4]>; QUERY_LEN_MAX / 2]);

impl RoundedQuery {
    pub(super) const EMPTY: Self = Self([MaybeUninit::uninit(); QUERY_LEN_MAX / 2]);

    /// Rounds `query` into this room.
    ///
    /// # Safety
    /// `len` elements are readable, [`QUERY_LEN_MAX`] at most.
    #[inline(always)]
    pub(super) unsafe fn fill<S: Simd>(&mut self, simd: S, query: *const f32, len: usize) {
        debug_assert!(len <= QUERY_LEN_MAX, "a query of {len}");
        let to = self.0.as_mut_ptr().cast::<u8>();
        let whole = len / PAIRED * PAIRED;
        // SAFETY: promised by the caller; an odd length is less than the room's, which is even.
        unsafe {
            for at in (0..whole).step_by(PAIRED) {
                let values = [simd.load(query.add(at)), simd.load(query.add(at + LANES))];
                simd.store_bytes(to.add(2 * at), simd.round_bf16(values));
            }
            for at in whole..len {
                let bits = bf16::from_f32(*query.add(at)).to_bits();
                to.add(2 * at).cast::<u16>().write_unaligned(bits);
            }
            if !len.is_multiple_of(2) {
                to.add(2 * len).cast::<u16>().write_unaligned(0);
            }
        }
    }

    fn bytes(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}

/// Two neighbouring values in every lane.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn pair<S: Simd>(simd: S, from: *const u8) -> S::B {
    // SAFETY: promised by the caller.
    simd.splat_b(unsafe { from.cast::<u32>().read_unaligned() })
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
                let mut key = [[simd.splat_b(0); 2]; N];
                for (key, block) in key.iter_mut().zip(&blocks) {
                    let keys = block.first.add(keys + chunk * Bf16::BYTES);
                    let first = simd.load_bytes(keys.add(d * row_bytes));
                    let second = simd.load_bytes(keys.add(second * row_bytes));
                    *key = simd.interleave(first, second);
                }
                if chunk == 0 {
                    for block in &blocks {
                        block.ask(simd, keys + d * row_bytes, (second + 1 - d) * row_bytes);
                    }
                }
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = pair(simd, query.bytes().add(2 * d));
                    for (sums, key) in sums.iter_mut().zip(&key) {
                        sums[0] = simd.dot2(sums[0], key[0], q);
                        sums[1] = simd.dot2(sums[1], key[1], q);
                    }
                }
            }
            for i in 0..N {
                for (row, sums) in scores.iter_mut().zip(&sums) {
                    let to = row.as_mut_ptr().add(i * block_len + chunk);
                    simd.store(to, simd.mul(sums[i][0], scale));
                    simd.store(to.add(LANES), simd.mul(sums[i][1], scale));
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
        let mut sums = [[simd.splat(0.0); TILE_ROWS]; T];
        let mut rest = [[0.0; TILE_ROWS]; T];
        for (at, len, start) in [
            (0, latent_len, rows.keys),
            (latent_len, rope_len, rows.rope),
        ] {
            let start = start + first * len * Bf16::BYTES;
            block.ask(simd, start, TILE_ROWS * len * Bf16::BYTES);
            let whole = len / PAIRED * PAIRED;
            // SAFETY: promised by the caller.
            unsafe {
                let row = |i: usize, d: usize| block.first.add(start + (i * len + d) * Bf16::BYTES);
                for d in (0..whole).step_by(PAIRED) {
                    let keys = [
                        simd.load_bytes(row(0, d)),
                        simd.load_bytes(row(1, d)),
                        simd.load_bytes(row(2, d)),
                        simd.load_bytes(row(3, d)),
                    ];
                    for (sums, query) in sums.iter_mut().zip(queries) {
                        let q = simd.load_bytes(query.bytes().add((at + d) * Bf16::BYTES));
                        for (sum, key) in sums.iter_mut().zip(keys) {
                            *sum = simd.dot2(*sum, key, q);
                        }
                    }
                }
                for d in whole..len {
                    for (rest, query) in rest.iter_mut().zip(queries) {
                        let q = Bf16::one(query.bytes(), at + d);
                        for (i, rest) in rest.iter_mut().enumerate() {
                            *rest += q * Bf16::one(row(i, d), 0);
                        }
                    }
                }
            }
        }
        for ((row, sums), rest) in scores.iter_mut().zip(&sums).zip(&rest) {
            let to = &mut row[index * cached.block_len + first..][..TILE_ROWS];
            for ((to, sum), rest) in to.iter_mut().zip(sums).zip(rest) {
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
            let rounded = simd.round_bf16(weights);
            let [even, odd] = simd.words(rounded);
            sum = simd.add(simd.add(sum, even), odd);
            simd.store_bytes(row.cast::<u8>().add(2 * at), rounded);
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
                let weights = weights[t].as_ptr().cast::<u8>();
                for (b, block) in blocks.iter().enumerate() {
                    let values = block.first.add(rows.values);
                    for p in 0..block.n_positions {
                        let weight = Bf16::one(weights, b * cached.block_len + p);
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
                sums[0] = simd.mul(simd.load(out), factor);
                sums[1] = simd.mul(simd.load(out.add(LANES)), factor);
            }
        }
        for (b, block) in blocks.iter().enumerate() {
            let values = rows.values + at * Bf16::BYTES;
            for p in (0..block.n_positions).step_by(2) {
                // What meets the zero weight of a position that is not there is the last one.
                let second = (p + 1).min(block.n_positions - 1);
                let mut v = [[simd.splat_b(0); 2]; WIDE];
                for (i, v) in v.iter_mut().enumerate() {
                    let values = block.first.add(values + i * PAIRED * Bf16::BYTES);
                    let first = simd.load_bytes(values.add(p * stride));
                    let second = simd.load_bytes(values.add(second * stride));
                    *v = simd.interleave(first, second);
                }
                if !rows.keys_in_rows {
                    block.ask(simd, values + p * stride, bytes);
                    block.ask(simd, values + second * stride, bytes);
                }
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    let weights = weights.as_ptr().cast::<u8>();
                    let weight = pair(simd, weights.add(2 * (b * cached.block_len + p)));
                    for (sums, v) in sums.iter_mut().zip(&v) {
                        sums[0] = simd.dot2(sums[0], v[0], weight);
                        sums[1] = simd.dot2(sums[1], v[1], weight);
                    }
                }
            }
        }
        // By reference: arrays of vectors taken by value go through memory.
        for (sums, query) in sums.iter().zip(queries) {
            let out = query.out.add(at);
            for (i, sums) in sums.iter().enumerate() {
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
