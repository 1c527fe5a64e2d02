//! Attention over a paged cache, one block of positions after the other with a running softmax
//! (Milakov & Gimelshein 2018), for grouped heads and for MLA's latent rows alike. Queries that
//! read the same keys share a pass over them.
//!
//! Invariant: a query walks its blocks in order from position 0 with the same operations whatever
//! queries share its pass, so its result depends on nothing but itself and the cache.

use super::{
    pool::Pool,
    shared::{SharedOut, area},
    simd::{LANES, Simd},
};
use crate::backend::{AttentionShape, CacheRows, CacheShape, RowView, StepInputs};

/// Largest block the scores buffer takes.
pub(super) const BLOCK_LEN_MAX: usize = 64;
/// Positions whose scores are computed together; a block is a multiple.
const CHUNK_LEN: usize = 2 * LANES;
/// Queries that share a pass at most.
const TILE_QUERIES_MAX: usize = 6;
/// Latent rows whose scores are computed together.
const TILE_ROWS: usize = 4;

/// Where one KV head's rows lie in a block.
#[derive(Debug, Clone, Copy)]
struct KvRows {
    key_offset: usize,
    value_offset: usize,
    /// Elements between neighbouring positions' values, and keys of [`CacheRows::Latent`].
    stride: usize,
    key_len: usize,
    value_len: usize,
    /// Keys lie one after the other; otherwise dimension after dimension.
    keys_in_rows: bool,
}

impl KvRows {
    fn of(shape: CacheShape, kv_head: usize) -> Self {
        match shape.rows {
            CacheRows::Heads {
                n_kv_heads,
                head_dim,
            } => {
                let key_offset = kv_head * shape.block_len * head_dim;
                Self {
                    key_offset,
                    value_offset: key_offset + n_kv_heads * shape.block_len * head_dim,
                    stride: head_dim,
                    key_len: head_dim,
                    value_len: head_dim,
                    keys_in_rows: false,
                }
            }
            CacheRows::Latent {
                latent_len,
                rope_len,
            } => Self {
                key_offset: 0,
                value_offset: 0,
                stride: latent_len + rope_len,
                key_len: latent_len + rope_len,
                value_len: latent_len,
                keys_in_rows: true,
            },
        }
    }
}

/// One query of a pass.
#[derive(Debug, Clone, Copy)]
struct Query {
    /// `key_len` elements.
    query: *const f32,
    /// `value_len` elements.
    out: *mut f32,
    /// Positions it sees.
    n_positions: usize,
}

/// What the queries of a pass read.
#[derive(Debug, Clone, Copy)]
struct Cached<'a> {
    cache: *const f32,
    shape: CacheShape,
    rows: KvRows,
    blocks: &'a [u32],
    scale: f32,
}

/// See [`crate::backend::Backend::attention`].
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own, and where to run it"
)]
pub(super) fn attention<S: Simd>(
    simd: S,
    pool: &Pool,
    queries: &[f32],
    query_rows: RowView,
    cache: &[f32],
    shape: CacheShape,
    attention: AttentionShape,
    inputs: &StepInputs<'_>,
    out: &mut [f32],
) {
    let n_kv_heads = match shape.rows {
        CacheRows::Heads { n_kv_heads, .. } => n_kv_heads,
        CacheRows::Latent { .. } => 1,
    };
    let group = attention.n_heads / n_kv_heads;
    let lengths = KvRows::of(shape, 0);
    let n_rows = inputs.n_rows();
    assert!(
        shape.block_len <= BLOCK_LEN_MAX && shape.block_len.is_multiple_of(CHUNK_LEN),
        "blocks are whole chunks and their scores fit the buffer"
    );
    assert!(
        attention.n_heads.is_multiple_of(n_kv_heads),
        "{} query heads share {n_kv_heads} KV heads evenly",
        attention.n_heads
    );
    let row_len = match shape.rows {
        CacheRows::Heads { head_dim, .. } => area(&[2, n_kv_heads, head_dim]),
        CacheRows::Latent { .. } => lengths.key_len,
    };
    assert!(
        cache.len() >= area(&[shape.n_blocks, shape.block_len, row_len]),
        "the cache has all its blocks"
    );
    let query_len = area(&[attention.n_heads, lengths.key_len]);
    let last_query = area(&[n_rows.saturating_sub(1), query_rows.stride])
        .saturating_add(query_rows.offset)
        .saturating_add(query_len);
    assert!(
        n_rows == 0 || queries.len() >= last_query,
        "queries of every row"
    );
    assert!(
        out.len() >= area(&[n_rows, attention.n_heads, lengths.value_len]),
        "room for every row"
    );
    for row in 0..n_rows {
        let n_blocks = inputs.positions[row] / shape.block_len + 1;
        let table = &inputs.blocks_of_row(row)[..n_blocks];
        assert!(
            table.iter().all(|b| (*b as usize) < shape.n_blocks),
            "block ids are of the pool"
        );
    }
    let tile_max = if lengths.keys_in_rows {
        S::TILE_LATENT_QUERIES
    } else {
        S::TILE_QUERIES
    };
    // The queries of a span that share a KV head are its rows' heads of the group, row by row.
    let tiles_of = |span: usize| (inputs.spans[span].n_rows * group).div_ceil(tile_max);
    let n_tiles = (0..inputs.spans.len()).map(tiles_of).sum::<usize>();
    let out = SharedOut::new(out);
    pool.run(n_tiles * n_kv_heads, &|piece, _| {
        let (mut tile, kv_head) = (piece / n_kv_heads, piece % n_kv_heads);
        let mut span = 0;
        while tile >= tiles_of(span) {
            tile -= tiles_of(span);
            span += 1;
        }
        let span = &inputs.spans[span];
        let first = tile * tile_max;
        let n = tile_max.min(span.n_rows * group - first);
        let rows = KvRows::of(shape, kv_head);
        let query = |i: usize| {
            let (row, head) = (
                span.first_row + (first + i) / group,
                kv_head * group + (first + i) % group,
            );
            let from = query_rows.offset + row * query_rows.stride + head * rows.key_len;
            let to = (row * attention.n_heads + head) * rows.value_len;
            // SAFETY: the assertions above bound queries and outputs; a head's outputs belong to
            // this piece alone.
            unsafe {
                Query {
                    query: queries.as_ptr().add(from),
                    out: out.at(to),
                    n_positions: inputs.positions[row] + 1,
                }
            }
        };
        let mut tile = [query(0); TILE_QUERIES_MAX];
        for (i, slot) in tile.iter_mut().enumerate().take(n).skip(1) {
            *slot = query(i);
        }
        let cached = Cached {
            cache: cache.as_ptr(),
            shape,
            rows,
            blocks: &inputs.blocks[span.first_block..],
            scale: attention.scale,
        };
        macro_rules! attend {
            ($n:literal) => {{
                let queries = std::array::from_fn::<_, $n, _>(|i| tile[i]);
                simd.vectorize(
                    #[inline(always)]
                    || {
                        // SAFETY: as above; block ids were checked.
                        unsafe { attend(simd, &queries, &cached) }
                    },
                )
            }};
        }
        match n {
            1 => attend!(1),
            2 => attend!(2),
            3 => attend!(3),
            4 => attend!(4),
            5 => attend!(5),
            _ => attend!(6),
        }
    });
}

/// `T` queries against the positions each sees.
///
/// # Safety
/// Queries and outputs have their lengths; the blocks named lie in the cache.
#[inline(always)]
unsafe fn attend<S: Simd, const T: usize>(simd: S, queries: &[Query; T], cached: &Cached<'_>) {
    let Cached {
        shape,
        rows,
        blocks,
        ..
    } = *cached;
    let block_len = shape.block_len;
    let n_most = queries.iter().fold(0, |n, q| n.max(q.n_positions));
    let mut weights = [[0f32; BLOCK_LEN_MAX]; T];
    let mut largest = [f32::NEG_INFINITY; T];
    let mut total = [0f32; T];
    let mut rescale = [0f32; T];
    // SAFETY: all offsets below stay inside the block, the queries and the outputs.
    unsafe {
        for query in queries {
            query.out.write_bytes(0, rows.value_len);
        }
        for (index, block) in blocks.iter().take(n_most.div_ceil(block_len)).enumerate() {
            let first = index * block_len;
            let n_most = block_len.min(n_most - first);
            let base = cached.cache.add(*block as usize * shape.block_size());
            let keys = base.add(rows.key_offset);
            if rows.keys_in_rows {
                score_rows(simd, queries, keys, n_most, cached, &mut weights);
            } else {
                score_columns(simd, queries, keys, n_most, cached, &mut weights);
            }
            for t in 0..T {
                let n = queries[t].n_positions.saturating_sub(first).min(block_len);
                let row = &mut weights[t];
                row[n..].fill(f32::NEG_INFINITY);
                if n == 0 {
                    row.fill(0.0);
                    rescale[t] = 1.0;
                    continue;
                }
                let mut most = simd.load(row.as_ptr());
                for at in (LANES..block_len).step_by(LANES) {
                    most = simd.max(simd.load(row.as_ptr().add(at)), most);
                }
                let new_largest = largest[t].max(simd.largest(most));
                for at in (0..block_len).step_by(LANES) {
                    let p = row.as_mut_ptr().add(at);
                    let shifted = simd.sub(simd.load(p), simd.splat(new_largest));
                    simd.store(p, simd.exp(shifted));
                }
                row[n..].fill(0.0);
                let mut sum = simd.load(row.as_ptr());
                for at in (LANES..block_len).step_by(LANES) {
                    sum = simd.add(sum, simd.load(row.as_ptr().add(at)));
                }
                rescale[t] = if largest[t] == f32::NEG_INFINITY {
                    0.0
                } else {
                    (largest[t] - new_largest).exp()
                };
                total[t] = total[t] * rescale[t] + simd.sum(sum);
                largest[t] = new_largest;
            }
            let values = base.add(rows.value_offset);
            accumulate(simd, queries, &weights, &rescale, values, n_most, rows);
        }
        for (query, total) in queries.iter().zip(total) {
            let inverse = 1.0 / total;
            for i in 0..rows.value_len {
                *query.out.add(i) *= inverse;
            }
        }
    }
}

/// Scores where keys lie dimension after dimension: lanes are positions.
#[inline(always)]
unsafe fn score_columns<S: Simd, const T: usize>(
    simd: S,
    queries: &[Query; T],
    keys: *const f32,
    n_positions: usize,
    cached: &Cached<'_>,
    scores: &mut [[f32; BLOCK_LEN_MAX]; T],
) {
    let scale = simd.splat(cached.scale);
    for chunk in (0..n_positions).step_by(CHUNK_LEN) {
        let mut sums = [[simd.splat(0.0); 2]; T];
        // SAFETY: a block holds whole chunks of every dimension; queries hold every dimension.
        unsafe {
            for d in 0..cached.rows.key_len {
                let key = keys.add(d * cached.shape.block_len + chunk);
                let (low, high) = (simd.load(key), simd.load(key.add(LANES)));
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = simd.splat(*query.query.add(d));
                    sums[0] = simd.fma(q, low, sums[0]);
                    sums[1] = simd.fma(q, high, sums[1]);
                }
            }
            for (row, sums) in scores.iter_mut().zip(sums) {
                let to = row.as_mut_ptr().add(chunk);
                simd.store(to, simd.mul(sums[0], scale));
                simd.store(to.add(LANES), simd.mul(sums[1], scale));
            }
        }
    }
}

/// Scores where keys lie one after the other: lanes are dimensions.
#[inline(always)]
unsafe fn score_rows<S: Simd, const T: usize>(
    simd: S,
    queries: &[Query; T],
    keys: *const f32,
    n_positions: usize,
    cached: &Cached<'_>,
    scores: &mut [[f32; BLOCK_LEN_MAX]; T],
) {
    let (len, stride) = (cached.rows.key_len, cached.rows.stride);
    let whole = len / LANES * LANES;
    for first in (0..n_positions).step_by(TILE_ROWS) {
        let mut sums = [[simd.splat(0.0); TILE_ROWS]; T];
        // SAFETY: blocks are whole tiles of positions, each `key_len` long as queries are.
        unsafe {
            let tile = keys.add(first * stride);
            for d in (0..whole).step_by(LANES) {
                let k = [
                    simd.load(tile.add(d)),
                    simd.load(tile.add(stride + d)),
                    simd.load(tile.add(2 * stride + d)),
                    simd.load(tile.add(3 * stride + d)),
                ];
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = simd.load(query.query.add(d));
                    for (sum, key) in sums.iter_mut().zip(k) {
                        *sum = simd.fma(q, key, *sum);
                    }
                }
            }
            for ((row, sums), query) in scores.iter_mut().zip(sums).zip(queries) {
                for (i, sum) in sums.into_iter().enumerate() {
                    let key = tile.add(i * stride);
                    let mut total = simd.sum(sum);
                    for d in whole..len {
                        total += *query.query.add(d) * *key.add(d);
                    }
                    row[first + i] = total * cached.scale;
                }
            }
        }
    }
}

/// `out = out * rescale + sum_p weights[p] * values[p]` for every query.
#[inline(always)]
unsafe fn accumulate<S: Simd, const T: usize>(
    simd: S,
    queries: &[Query; T],
    weights: &[[f32; BLOCK_LEN_MAX]; T],
    rescale: &[f32; T],
    values: *const f32,
    n_positions: usize,
    rows: KvRows,
) {
    const WIDE: usize = 4;
    let whole = rows.value_len / LANES * LANES;
    let mut at = 0;
    // SAFETY: `values` has a row of `value_len` elements per position, outputs have as many.
    unsafe {
        while at + WIDE * LANES <= whole {
            columns::<S, T, WIDE>(
                simd,
                queries,
                weights,
                rescale,
                values,
                n_positions,
                rows.stride,
                at,
            );
            at += WIDE * LANES;
        }
        while at < whole {
            columns::<S, T, 1>(
                simd,
                queries,
                weights,
                rescale,
                values,
                n_positions,
                rows.stride,
                at,
            );
            at += LANES;
        }
        for i in whole..rows.value_len {
            for (t, query) in queries.iter().enumerate() {
                let mut sum = *query.out.add(i) * rescale[t];
                for (p, weight) in weights[t].iter().enumerate().take(n_positions) {
                    sum += weight * *values.add(p * rows.stride + i);
                }
                *query.out.add(i) = sum;
            }
        }
    }
}

/// Columns `at..at + WIDE * LANES` of [`accumulate`].
#[inline(always)]
unsafe fn columns<S: Simd, const T: usize, const WIDE: usize>(
    simd: S,
    queries: &[Query; T],
    weights: &[[f32; BLOCK_LEN_MAX]; T],
    rescale: &[f32; T],
    values: *const f32,
    n_positions: usize,
    stride: usize,
    at: usize,
) {
    let mut sums = [[simd.splat(0.0); WIDE]; T];
    // SAFETY: promised by the caller; a block has at most as many positions as `weights`.
    unsafe {
        for ((sums, query), rescale) in sums.iter_mut().zip(queries).zip(rescale) {
            let factor = simd.splat(*rescale);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul(simd.load(query.out.add(at + i * LANES)), factor);
            }
        }
        for p in 0..n_positions {
            let row = values.add(p * stride + at);
            let mut v = [simd.splat(0.0); WIDE];
            for (i, v) in v.iter_mut().enumerate() {
                *v = simd.load(row.add(i * LANES));
            }
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = simd.splat(*weights.as_ptr().add(p));
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum = simd.fma(weight, v, *sum);
                }
            }
        }
        for (sums, query) in sums.into_iter().zip(queries) {
            for (i, sum) in sums.into_iter().enumerate() {
                simd.store(query.out.add(at + i * LANES), sum);
            }
        }
    }
}
