//! Attention over a paged cache, one block of positions after the other with a running softmax
//! (Milakov & Gimelshein 2018), for grouped heads and for MLA's latent rows alike.
//!
//! Invariant: a row's blocks are walked in order from position 0, so the result depends on nothing
//! but the query and the cache.

use super::{
    SharedOut,
    pool::Pool,
    simd::{LANES, Simd},
};
use crate::backend::{AttentionShape, CacheRows, CacheShape, RowView, StepInputs};

/// Query heads that share one reading of the keys.
const HEADS_PER_PIECE: usize = 8;
/// Largest block the scores buffer takes.
pub(super) const BLOCK_LEN_MAX: usize = 64;

/// Where one KV head's rows lie in a block.
#[derive(Debug, Clone, Copy)]
struct KvRows {
    key_offset: usize,
    value_offset: usize,
    stride: usize,
    key_len: usize,
    value_len: usize,
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
            },
        }
    }
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
    let pieces_per_kv_head = group.div_ceil(HEADS_PER_PIECE);
    let pieces_per_row = n_kv_heads * pieces_per_kv_head;
    let lengths = KvRows::of(shape, 0);
    let n_rows = inputs.n_rows();
    assert!(
        shape.block_len <= BLOCK_LEN_MAX,
        "scores of a block fit their buffer"
    );
    assert!(cache.len() >= shape.size(), "the cache has all its blocks");
    let query_len = attention.n_heads * lengths.key_len;
    assert!(
        n_rows == 0
            || queries.len() >= query_rows.offset + (n_rows - 1) * query_rows.stride + query_len,
        "queries of every row"
    );
    assert!(
        out.len() >= n_rows * attention.n_heads * lengths.value_len,
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
    let out = SharedOut::new(out);
    pool.run(n_rows * pieces_per_row, &|piece, _| {
        let (row, in_row) = (piece / pieces_per_row, piece % pieces_per_row);
        let (kv_head, part) = (in_row / pieces_per_kv_head, in_row % pieces_per_kv_head);
        let rows = KvRows::of(shape, kv_head);
        let first = part * HEADS_PER_PIECE;
        for head in kv_head * group + first..kv_head * group + (first + HEADS_PER_PIECE).min(group)
        {
            let at = row * attention.n_heads + head;
            let query = query_rows.offset + row * query_rows.stride + head * rows.key_len;
            // SAFETY: the assertions above bound queries, cache and outputs; a head's outputs
            // belong to this piece alone.
            simd.vectorize(
                #[inline(always)]
                || unsafe {
                    attend(
                        simd,
                        queries.as_ptr().add(query),
                        cache.as_ptr(),
                        shape,
                        rows,
                        inputs.blocks_of_row(row),
                        inputs.positions[row] + 1,
                        attention.scale,
                        out.at(at * rows.value_len),
                    );
                },
            );
        }
    });
}

/// One query against `n_positions` positions.
///
/// # Safety
/// `query` has `key_len` and `out` `value_len` elements; the blocks named lie in the cache.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the innermost kernel; everything is needed"
)]
unsafe fn attend<S: Simd>(
    simd: S,
    query: *const f32,
    cache: *const f32,
    shape: CacheShape,
    rows: KvRows,
    blocks: &[u32],
    n_positions: usize,
    scale: f32,
    out: *mut f32,
) {
    let mut scores = [0f32; BLOCK_LEN_MAX];
    let mut largest = f32::NEG_INFINITY;
    let mut total = 0f32;
    // SAFETY: all offsets below stay inside the block, the query and the output.
    unsafe {
        for i in 0..rows.value_len {
            *out.add(i) = 0.0;
        }
        for (index, block) in blocks.iter().enumerate() {
            let first = index * shape.block_len;
            if n_positions <= first {
                break;
            }
            let n = shape.block_len.min(n_positions - first);
            let base = cache.add(*block as usize * shape.block_size());
            for (t, score) in scores[..n].iter_mut().enumerate() {
                let key = base.add(rows.key_offset + t * rows.stride);
                *score = dot(simd, query, key, rows.key_len) * scale;
            }
            let block_largest = scores[..n].iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let new_largest = largest.max(block_largest);
            // Lanes past `n` hold old scores; their weights are not used.
            for lane in (0..n.next_multiple_of(LANES)).step_by(LANES) {
                let p = scores.as_mut_ptr().add(lane);
                let shifted = simd.sub(simd.load(p), simd.splat(new_largest));
                simd.store(p, simd.exp(shifted));
            }
            let rescale = if largest == f32::NEG_INFINITY {
                0.0
            } else {
                (largest - new_largest).exp()
            };
            total *= rescale;
            for p in &scores[..n] {
                total += p;
            }
            let values = base.add(rows.value_offset);
            accumulate(
                simd,
                &scores[..n],
                values,
                rows.stride,
                rows.value_len,
                rescale,
                out,
            );
            largest = new_largest;
        }
        let inverse = 1.0 / total;
        for i in 0..rows.value_len {
            *out.add(i) *= inverse;
        }
    }
}

/// `a . b`, one chain of FMAs per lane, then the tail element by element.
#[inline(always)]
unsafe fn dot<S: Simd>(simd: S, a: *const f32, b: *const f32, len: usize) -> f32 {
    let whole = len / LANES * LANES;
    let mut sum = simd.splat(0.0);
    // SAFETY: both have `len` elements.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            sum = simd.fma(simd.load(a.add(i)), simd.load(b.add(i)), sum);
        }
        let mut total = simd.sum(sum);
        for i in whole..len {
            total += *a.add(i) * *b.add(i);
        }
        total
    }
}

/// `out = out * rescale + sum_t weights[t] * values[t]`, four vectors of columns at a time.
#[inline(always)]
unsafe fn accumulate<S: Simd>(
    simd: S,
    weights: &[f32],
    values: *const f32,
    stride: usize,
    len: usize,
    rescale: f32,
    out: *mut f32,
) {
    const WIDE: usize = 4;
    let whole = len / LANES * LANES;
    // SAFETY: `values` has a row of `len` elements per weight, `out` has `len`.
    unsafe {
        let mut at = 0;
        while at + WIDE * LANES <= whole {
            let mut sums = [simd.splat(0.0); WIDE];
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul(simd.load(out.add(at + i * LANES)), simd.splat(rescale));
            }
            for (t, weight) in weights.iter().enumerate() {
                let row = values.add(t * stride + at);
                let weight = simd.splat(*weight);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.fma(weight, simd.load(row.add(i * LANES)), *sum);
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                simd.store(out.add(at + i * LANES), sum);
            }
            at += WIDE * LANES;
        }
        while at < whole {
            let mut sum = simd.mul(simd.load(out.add(at)), simd.splat(rescale));
            for (t, weight) in weights.iter().enumerate() {
                sum = simd.fma(
                    simd.splat(*weight),
                    simd.load(values.add(t * stride + at)),
                    sum,
                );
            }
            simd.store(out.add(at), sum);
            at += LANES;
        }
        for i in whole..len {
            let mut sum = *out.add(i) * rescale;
            for (t, weight) in weights.iter().enumerate() {
                sum += weight * *values.add(t * stride + i);
            }
            *out.add(i) = sum;
        }
    }
}
