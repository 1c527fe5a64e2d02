//! Attention over a paged cache of f32, bf16 or int8, one block of positions after the other with a running softmax
//! (Milakov & Gimelshein 2018), for grouped heads and for MLA's latent rows alike. Queries that
//! read the same keys share a pass over them.
//!
//! Invariant: a query walks its blocks in order from position 0 with the same operations whatever
//! queries share its pass, so its result depends on nothing but itself and the cache.

mod pairs;

use std::ptr;

use self::pairs::{QUERY_LEN_MAX, RoundedQuery};
use super::{
    Activations,
    kv_cache::{BlockLayout, CpuCache},
    pool::Pool,
    shared::{SharedOut, area},
    simd::{LANES, Simd},
};
use crate::{
    backend::{AttentionShape, CacheRows, CacheShape, KvType, RowView, StepInputs},
    quant,
};

/// Largest block the scores buffer takes.
pub(super) const BLOCK_LEN_MAX: usize = 64;
/// Blocks that share a softmax, the first of them an even one: fewer sums over lanes and fewer
/// changes of scale.
const STRIPE: usize = 2;
/// A query's scores of a stripe.
type Scores = [f32; STRIPE * BLOCK_LEN_MAX];
/// Positions whose scores are computed together; a block is a multiple.
const CHUNK_LEN: usize = 2 * LANES;
/// Queries that share a pass at most.
const TILE_QUERIES_MAX: usize = 6;
/// Latent rows whose scores are computed together.
const TILE_ROWS: usize = 4;

/// Elements as a cache stores them.
trait Element {
    const BYTES: usize;
    /// Elements `at..at + 16` behind `from`, without their scale.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load<S: Simd>(simd: S, from: *const u8, at: usize) -> S::F;
    /// Element `at` behind `from`.
    ///
    /// # Safety
    /// It is readable.
    unsafe fn one(from: *const u8, at: usize) -> f32;
}

enum F32 {}
impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8, at: usize) -> S::F {
        // SAFETY: promised by the caller.
        unsafe { simd.load(from.add(4 * at).cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8, at: usize) -> f32 {
        // SAFETY: promised by the caller.
        unsafe { from.add(4 * at).cast::<f32>().read_unaligned() }
    }
}

enum Bf16 {}
impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8, at: usize) -> S::F {
        // SAFETY: promised by the caller.
        unsafe { simd.load_bf16(from.add(2 * at)) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8, at: usize) -> f32 {
        // SAFETY: promised by the caller.
        quant::bf16_to_f32(unsafe { from.add(2 * at).cast::<[u8; 2]>().read() })
    }
}

enum Int8 {}
impl Element for Int8 {
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8, at: usize) -> S::F {
        // SAFETY: promised by the caller.
        unsafe { simd.load_i8(from.add(at)) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8, at: usize) -> f32 {
        // SAFETY: promised by the caller.
        f32::from(unsafe { from.add(at).cast::<i8>().read() })
    }
}

/// A [`KvType`] as kernels see it.
trait Stored {
    /// Keys, values and latents.
    type Main: Element;
    /// Rotary keys of latent rows.
    type Rope: Element;
    /// Rows have scales.
    const SCALED: bool;
    /// Queries and weights are rounded to bf16, see [`pairs`].
    const PAIRS: bool;
}

impl Stored for F32 {
    type Main = Self;
    type Rope = Self;
    const SCALED: bool = false;
    const PAIRS: bool = false;
}

impl Stored for Bf16 {
    type Main = Self;
    type Rope = Self;
    const SCALED: bool = false;
    const PAIRS: bool = false;
}

impl Stored for Int8 {
    type Main = Self;
    type Rope = Bf16;
    const SCALED: bool = true;
    const PAIRS: bool = false;
}

/// [`Bf16`] against queries and weights in bf16.
enum Bf16Pairs {}
impl Stored for Bf16Pairs {
    type Main = Bf16;
    type Rope = Bf16;
    const SCALED: bool = false;
    const PAIRS: bool = true;
}

/// Where one KV head's rows lie in a block, in bytes.
#[derive(Debug, Clone, Copy)]
struct KvRows {
    keys: usize,
    /// Values of grouped heads; the latents once more.
    values: usize,
    /// Rotary keys of latent rows.
    rope: usize,
    scales: usize,
    value_scales: usize,
    block_bytes: usize,
    /// Elements of a query.
    key_len: usize,
    /// Elements of a result, and between neighbouring positions' values.
    value_len: usize,
    /// Keys lie one after the other, latent and rotary part apart; otherwise dimension after
    /// dimension.
    keys_in_rows: bool,
}

impl KvRows {
    fn of(shape: CacheShape, kv_type: KvType, kv_head: usize) -> Self {
        let layout = BlockLayout::of(shape, kv_type);
        let (scales, value_scales) = (layout.scales, layout.value_scales);
        let block_bytes = layout.block_bytes;
        match shape.rows {
            CacheRows::Heads { head_dim, .. } => {
                let keys = kv_head * shape.block_len * head_dim * kv_type.element_bytes();
                let scale = kv_head * shape.block_len * kv_type.scale_bytes();
                Self {
                    keys,
                    values: layout.second + keys,
                    rope: 0,
                    scales: scales + scale,
                    value_scales: value_scales + scale,
                    block_bytes,
                    key_len: head_dim,
                    value_len: head_dim,
                    keys_in_rows: false,
                }
            }
            CacheRows::Latent {
                latent_len,
                rope_len,
            } => Self {
                keys: 0,
                values: 0,
                rope: layout.second,
                scales,
                value_scales,
                block_bytes,
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
    cache: *const u8,
    block_len: usize,
    rows: KvRows,
    blocks: &'a [u32],
    scale: f32,
    /// Whether blocks are worth asking for ahead: keys of a row alone are read once, those of many
    /// rows are in the caches after the first.
    asks: bool,
    /// Blocks that the thread reads after these, or null.
    next: [*const u8; STRIPE],
}

impl Cached<'_> {
    /// Block `index` of the sequence.
    fn block(&self, index: usize) -> *const u8 {
        let block = self.blocks[index] as usize;
        self.cache.wrapping_add(block * self.rows.block_bytes)
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
    cache: &CpuCache,
    shape: CacheShape,
    attention: AttentionShape,
    inputs: &StepInputs<'_>,
    activations: Activations,
    out: &mut [f32],
) {
    let n_kv_heads = match shape.rows {
        CacheRows::Heads { n_kv_heads, .. } => n_kv_heads,
        CacheRows::Latent { .. } => 1,
    };
    let group = attention.n_heads / n_kv_heads;
    let kv_type = cache.kv_type();
    let lengths = KvRows::of(shape, kv_type, 0);
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
    let cache = cache.bytes();
    let position_bytes = kv_type.position_bytes(shape.rows);
    assert!(
        cache.len() >= area(&[shape.n_blocks, shape.block_len, position_bytes]),
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
    // Int8 activations are rounded more coarsely than bf16 already.
    let in_pairs = kv_type == KvType::Bf16
        && activations == Activations::Int8
        && lengths.key_len <= QUERY_LEN_MAX;
    let tile_max = match lengths.keys_in_rows {
        true => S::TILE_LATENT_QUERIES,
        false => S::TILE_QUERIES,
    };
    let tile_max = match in_pairs && simd.bf16_dot().is_none() {
        true => tile_max.min(pairs::TILE_QUERIES),
        false => tile_max,
    };
    // The queries of a span that share a KV head are its rows' heads of the group, row by row.
    let tiles_of = |span: usize| (inputs.spans[span].n_rows * group).div_ceil(tile_max);
    let n_tiles = (0..inputs.spans.len()).map(tiles_of).sum::<usize>();
    let out = SharedOut::new(out);
    let n_pieces = n_tiles * n_kv_heads;
    // Span and tile of a piece, and its KV head.
    let place_of = |piece: usize| {
        let (mut tile, kv_head) = (piece / n_kv_heads, piece % n_kv_heads);
        let mut span = 0;
        while tile >= tiles_of(span) {
            tile -= tiles_of(span);
            span += 1;
        }
        (span, tile, kv_head)
    };
    pool.run(n_pieces, &|piece, _| {
        let (span, tile, kv_head) = place_of(piece);
        let n_tiles = tiles_of(span);
        let span = &inputs.spans[span];
        // Even ones: two of four queries take less time than one of six and one of two.
        let [first, end] = [tile, tile + 1].map(|tile| span.n_rows * group * tile / n_tiles);
        let n = end - first;
        let rows = KvRows::of(shape, kv_type, kv_head);
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
        let mut cached = Cached {
            cache: cache.as_ptr(),
            block_len: shape.block_len,
            rows,
            blocks: inputs.blocks_of_row(span.first_row),
            scale: attention.scale,
            asks: span.n_rows == 1,
            next: [ptr::null(); STRIPE],
        };
        if cached.asks && piece + 1 < n_pieces {
            let (span, _, kv_head) = place_of(piece + 1);
            let row = inputs.spans[span].first_row;
            let n_blocks = inputs.positions[row] / shape.block_len + 1;
            // Offsets inside a block will be those of this piece's head.
            let keys = KvRows::of(shape, kv_type, kv_head).keys;
            let shift = keys.wrapping_sub(rows.keys);
            let blocks = &inputs.blocks_of_row(row)[..n_blocks];
            for (to, block) in cached.next.iter_mut().zip(blocks) {
                let at = *block as usize * rows.block_bytes;
                *to = cache.as_ptr().wrapping_add(at).wrapping_add(shift);
            }
        }
        // SAFETY: as above; block ids were checked.
        unsafe {
            match kv_type {
                KvType::Bf16 if in_pairs => match simd.bf16_dot() {
                    Some(simd) => attend_tile::<_, Bf16Pairs>(simd, &tile[..n], &cached),
                    None => attend_tile::<S, Bf16Pairs>(simd, &tile[..n], &cached),
                },
                KvType::F32 => attend_tile::<S, F32>(simd, &tile[..n], &cached),
                KvType::Bf16 => attend_tile::<S, Bf16>(simd, &tile[..n], &cached),
                KvType::Int8 => attend_tile::<S, Int8>(simd, &tile[..n], &cached),
            }
        }
    });
}

/// [`attend`] for 1 to [`TILE_QUERIES_MAX`] queries.
///
/// # Safety
/// As [`attend`].
unsafe fn attend_tile<S: Simd, K: Stored>(simd: S, tile: &[Query], cached: &Cached<'_>) {
    macro_rules! attend {
        ($n:literal) => {{
            let queries = std::array::from_fn::<_, $n, _>(|i| tile[i]);
            simd.vectorize(
                #[inline(always)]
                || {
                    // SAFETY: passed on from the caller.
                    unsafe { attend::<S, K, $n>(simd, &queries, cached) }
                },
            )
        }};
    }
    match tile.len() {
        1 => attend!(1),
        2 => attend!(2),
        3 => attend!(3),
        4 => attend!(4),
        5 => attend!(5),
        _ => attend!(6),
    }
}

/// `T` queries against the positions each sees.
///
/// # Safety
/// Queries and outputs have their lengths; the blocks named lie in the cache.
#[inline(always)]
unsafe fn attend<S: Simd, K: Stored, const T: usize>(
    simd: S,
    queries: &[Query; T],
    cached: &Cached<'_>,
) {
    let Cached {
        block_len, rows, ..
    } = *cached;
    let n_most = queries.iter().fold(0, |n, q| n.max(q.n_positions));
    let n_blocks = n_most.div_ceil(block_len);
    let mut weights: [Scores; T] = [[0f32; STRIPE * BLOCK_LEN_MAX]; T];
    let mut largest = [f32::NEG_INFINITY; T];
    let mut total = [0f32; T];
    let mut rescale = [0f32; T];
    let mut rounded = [const { RoundedQuery::EMPTY }; T];
    // Latent and rotary part.
    let parts = match rows.keys_in_rows {
        true => [rows.value_len, rows.key_len - rows.value_len],
        false => [rows.key_len, 0],
    };
    // SAFETY: all offsets below stay inside the block, the queries and the outputs.
    unsafe {
        for (query, rounded) in queries.iter().zip(&mut rounded) {
            query.out.write_bytes(0, rows.value_len);
            if K::PAIRS {
                rounded.fill(simd, query.query, parts);
            }
        }
        for index in (0..n_blocks).step_by(STRIPE) {
            let first = index * block_len;
            let n_here = STRIPE.min(n_blocks - index);
            let width = n_here * block_len;
            let block = |i: usize| Block {
                first: cached.block(index + i),
                n_positions: block_len.min(n_most - first - i * block_len),
                ahead: match index + STRIPE + i {
                    _ if !cached.asks => ptr::null(),
                    ahead if ahead < n_blocks => cached.block(ahead),
                    _ => cached.next[i],
                },
            };
            let both = [block(0), block(n_here - 1)];
            let blocks = &both[..n_here];
            if K::PAIRS && rows.keys_in_rows {
                for (i, block) in blocks.iter().enumerate() {
                    pairs::score_rows::<S, T>(simd, &rounded, *block, cached, i, &mut weights);
                }
            } else if K::PAIRS && n_here == STRIPE {
                let weights = &mut weights;
                pairs::score_columns::<S, T, STRIPE>(simd, &rounded, both, cached, weights);
            } else if K::PAIRS {
                pairs::score_columns::<S, T, 1>(simd, &rounded, [both[0]], cached, &mut weights);
            } else if rows.keys_in_rows {
                for (i, block) in blocks.iter().enumerate() {
                    score_rows::<S, K, T>(simd, queries, *block, cached, i, &mut weights);
                }
            } else if n_here == STRIPE {
                score_columns::<S, K, T, STRIPE>(simd, queries, both, cached, &mut weights);
            } else {
                score_columns::<S, K, T, 1>(simd, queries, [both[0]], cached, &mut weights);
            }
            for t in 0..T {
                let n = queries[t].n_positions.saturating_sub(first).min(width);
                let scores = &mut weights[t];
                let row = &mut scores[..width];
                if n == 0 {
                    // Zeros in bf16 as well.
                    row.fill(0.0);
                    rescale[t] = 1.0;
                    continue;
                }
                row[n..].fill(f32::NEG_INFINITY);
                let mut most = simd.load(row.as_ptr());
                for at in (LANES..width).step_by(LANES) {
                    most = simd.max(simd.load(row.as_ptr().add(at)), most);
                }
                let new_largest = largest[t].max(simd.largest(most));
                for at in (0..width).step_by(LANES) {
                    let p = row.as_mut_ptr().add(at);
                    let shifted = simd.sub(simd.load(p), simd.splat(new_largest));
                    simd.store(p, simd.exp(shifted));
                }
                row[n..].fill(0.0);
                let sum = match K::PAIRS {
                    true => pairs::round_weights(simd, scores, width),
                    false => {
                        let mut sum = simd.load(row.as_ptr());
                        for at in (LANES..width).step_by(LANES) {
                            sum = simd.add(sum, simd.load(row.as_ptr().add(at)));
                        }
                        simd.sum(sum)
                    }
                };
                // Most stripes bring no larger score, and a call of `exp` costs as much as the rest.
                rescale[t] = if largest[t] == new_largest {
                    1.0
                } else if largest[t] == f32::NEG_INFINITY {
                    0.0
                } else {
                    (largest[t] - new_largest).exp()
                };
                total[t] = total[t] * rescale[t] + sum;
                largest[t] = new_largest;
                if K::SCALED {
                    // A value's scale goes into its weight: codes are added up as they are.
                    for (row, block) in scores.chunks_exact_mut(block_len).zip(blocks) {
                        let scales = block.first.add(rows.value_scales);
                        for at in (0..block_len).step_by(LANES) {
                            let p = row.as_mut_ptr().add(at);
                            let scale = F32::load(simd, scales, at);
                            simd.store(p, simd.mul(simd.load(p), scale));
                        }
                    }
                }
            }
            match K::PAIRS {
                true => pairs::accumulate(simd, queries, &weights, &rescale, blocks, cached),
                false => {
                    accumulate::<S, K::Main, T>(simd, queries, &weights, &rescale, blocks, cached);
                }
            }
        }
        for (query, total) in queries.iter().zip(total) {
            let inverse = 1.0 / total;
            let out = std::slice::from_raw_parts_mut(query.out, rows.value_len);
            out.iter_mut().for_each(|value| *value *= inverse);
        }
    }
}

/// A block under way.
#[derive(Debug, Clone, Copy)]
struct Block {
    first: *const u8,
    /// Positions that a query sees.
    n_positions: usize,
    /// A block to ask for while this one is read, or null.
    ahead: *const u8,
}

impl Block {
    /// Asks for `len` bytes from `at` on of the block ahead.
    #[inline(always)]
    fn ask<S: Simd>(&self, simd: S, at: usize, len: usize) {
        if !self.ahead.is_null() {
            for line in (0..len).step_by(64) {
                simd.prefetch(self.ahead.wrapping_add(at + line));
            }
        }
    }
}

/// Scores where keys lie dimension after dimension: lanes are positions.
#[inline(always)]
unsafe fn score_columns<S: Simd, K: Stored, const T: usize, const N: usize>(
    simd: S,
    queries: &[Query; T],
    blocks: [Block; N],
    cached: &Cached<'_>,
    scores: &mut [Scores; T],
) {
    let scale = simd.splat(cached.scale);
    let (block_len, keys) = (cached.block_len, cached.rows.keys);
    let row_bytes = block_len * K::Main::BYTES;
    for chunk in (0..block_len).step_by(CHUNK_LEN) {
        let mut sums = [[[simd.splat(0.0); 2]; N]; T];
        // SAFETY: a block holds whole chunks of every dimension; queries hold every dimension.
        unsafe {
            for d in 0..cached.rows.key_len {
                let mut key = [[simd.splat(0.0); 2]; N];
                for (key, block) in key.iter_mut().zip(&blocks) {
                    let (keys, at) = (block.first.add(keys), d * block_len + chunk);
                    *key = [
                        K::Main::load(simd, keys, at),
                        K::Main::load(simd, keys, at + LANES),
                    ];
                }
                if chunk == 0 {
                    for block in &blocks {
                        block.ask(simd, keys + d * row_bytes, row_bytes);
                    }
                }
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = simd.splat(*query.query.add(d));
                    for (sums, key) in sums.iter_mut().zip(key) {
                        sums[0] = simd.fma(q, key[0], sums[0]);
                        sums[1] = simd.fma(q, key[1], sums[1]);
                    }
                }
            }
            for (i, block) in blocks.iter().enumerate() {
                let mut factors = [scale; 2];
                if K::SCALED {
                    let scales = block.first.add(cached.rows.scales);
                    for (i, factor) in factors.iter_mut().enumerate() {
                        let of_keys = F32::load(simd, scales, chunk + i * LANES);
                        *factor = simd.mul(*factor, of_keys);
                    }
                }
                for (row, sums) in scores.iter_mut().zip(sums) {
                    let to = row.as_mut_ptr().add(i * block_len + chunk);
                    simd.store(to, simd.mul(sums[i][0], factors[0]));
                    simd.store(to.add(LANES), simd.mul(sums[i][1], factors[1]));
                }
            }
        }
    }
}

/// Scores where keys lie one after the other: lanes are dimensions.
#[inline(always)]
unsafe fn score_rows<S: Simd, K: Stored, const T: usize>(
    simd: S,
    queries: &[Query; T],
    block: Block,
    cached: &Cached<'_>,
    index: usize,
    scores: &mut [Scores; T],
) {
    let (base, n_positions) = (block.first, block.n_positions);
    let rows = cached.rows;
    let (latent_len, rope_len) = (rows.value_len, rows.key_len - rows.value_len);
    for first in (0..n_positions).step_by(TILE_ROWS) {
        let mut sums = [[simd.splat(0.0); TILE_ROWS]; T];
        // SAFETY: blocks are whole tiles of positions, each `key_len` long as queries are.
        unsafe {
            let latent_bytes = latent_len * K::Main::BYTES;
            let rope_bytes = rope_len * K::Rope::BYTES;
            let latents = base.add(rows.keys + first * latent_bytes);
            let rope = base.add(rows.rope + first * rope_bytes);
            block.ask(
                simd,
                rows.keys + first * latent_bytes,
                TILE_ROWS * latent_bytes,
            );
            block.ask(simd, rows.rope + first * rope_bytes, TILE_ROWS * rope_bytes);
            let scale = |i: usize| match K::SCALED {
                true => F32::one(base.add(rows.scales), first + i),
                false => 1.0,
            };
            dot_rows::<S, K::Main, T>(simd, queries, 0, latents, latent_len, &mut sums);
            if K::SCALED {
                for i in 0..TILE_ROWS {
                    let scale = simd.splat(scale(i));
                    sums.iter_mut()
                        .for_each(|sums| sums[i] = simd.mul(sums[i], scale));
                }
            }
            dot_rows::<S, K::Rope, T>(simd, queries, latent_len, rope, rope_len, &mut sums);
            for ((row, sums), query) in scores.iter_mut().zip(sums).zip(queries) {
                for (i, sum) in sums.into_iter().enumerate() {
                    let latent = dot_rest::<K::Main>(query.query, latents, i, latent_len);
                    let rope = dot_rest::<K::Rope>(query.query.add(latent_len), rope, i, rope_len);
                    let total = simd.sum(sum) + latent * scale(i) + rope;
                    row[index * cached.block_len + first + i] = total * cached.scale;
                }
            }
        }
    }
}

/// Adds up whole vectors of [`TILE_ROWS`] neighbouring rows, `len` elements each, against the
/// queries from element `from` on.
///
/// # Safety
/// Rows and queries hold that much.
#[inline(always)]
unsafe fn dot_rows<S: Simd, E: Element, const T: usize>(
    simd: S,
    queries: &[Query; T],
    from: usize,
    rows: *const u8,
    len: usize,
    sums: &mut [[S::F; TILE_ROWS]; T],
) {
    for d in (0..len / LANES * LANES).step_by(LANES) {
        // SAFETY: promised by the caller.
        unsafe {
            let k = [
                E::load(simd, rows, d),
                E::load(simd, rows, len + d),
                E::load(simd, rows, 2 * len + d),
                E::load(simd, rows, 3 * len + d),
            ];
            for (sums, query) in sums.iter_mut().zip(queries) {
                let q = simd.load(query.query.add(from + d));
                for (sum, key) in sums.iter_mut().zip(k) {
                    *sum = simd.fma(q, key, *sum);
                }
            }
        }
    }
}

/// What whole vectors leave of row `row`.
///
/// # Safety
/// `query` and the row are `len` long.
#[inline(always)]
unsafe fn dot_rest<E: Element>(query: *const f32, rows: *const u8, row: usize, len: usize) -> f32 {
    let mut total = 0.0;
    for d in len / LANES * LANES..len {
        // SAFETY: promised by the caller.
        total += unsafe { *query.add(d) * E::one(rows, row * len + d) };
    }
    total
}

/// `out = out * rescale + sum_p weights[p] * values[p]` for every query.
#[inline(always)]
unsafe fn accumulate<S: Simd, E: Element, const T: usize>(
    simd: S,
    queries: &[Query; T],
    weights: &[Scores; T],
    rescale: &[f32; T],
    blocks: &[Block],
    cached: &Cached<'_>,
) {
    const WIDE: usize = 4;
    let rows = cached.rows;
    let whole = rows.value_len / LANES * LANES;
    let mut at = 0;
    // SAFETY: values have a row of `value_len` elements per position, outputs have as many.
    unsafe {
        while at + WIDE * LANES <= whole {
            columns::<S, E, T, WIDE>(simd, queries, weights, rescale, blocks, cached, at);
            at += WIDE * LANES;
        }
        while at < whole {
            columns::<S, E, T, 1>(simd, queries, weights, rescale, blocks, cached, at);
            at += LANES;
        }
        for i in whole..rows.value_len {
            for (t, query) in queries.iter().enumerate() {
                let mut sum = *query.out.add(i) * rescale[t];
                for (block, weights) in blocks.iter().zip(weights[t].chunks(cached.block_len)) {
                    let values = block.first.add(rows.values);
                    for (p, weight) in weights.iter().enumerate().take(block.n_positions) {
                        sum += weight * E::one(values, p * rows.value_len + i);
                    }
                }
                *query.out.add(i) = sum;
            }
        }
    }
}

/// Columns `at..at + WIDE * LANES` of [`accumulate`].
#[inline(always)]
unsafe fn columns<S: Simd, E: Element, const T: usize, const WIDE: usize>(
    simd: S,
    queries: &[Query; T],
    weights: &[Scores; T],
    rescale: &[f32; T],
    blocks: &[Block],
    cached: &Cached<'_>,
    at: usize,
) {
    let rows = cached.rows;
    let (stride, bytes) = (rows.value_len, WIDE * LANES * E::BYTES);
    let mut sums = [[simd.splat(0.0); WIDE]; T];
    // SAFETY: promised by the caller; a block has at most as many positions as `weights`.
    unsafe {
        for ((sums, query), rescale) in sums.iter_mut().zip(queries).zip(rescale) {
            let factor = simd.splat(*rescale);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul(simd.load(query.out.add(at + i * LANES)), factor);
            }
        }
        for (b, block) in blocks.iter().enumerate() {
            let values = block.first.add(rows.values);
            for p in 0..block.n_positions {
                let mut v = [simd.splat(0.0); WIDE];
                for (i, v) in v.iter_mut().enumerate() {
                    *v = E::load(simd, values, p * stride + at + i * LANES);
                }
                if !rows.keys_in_rows {
                    block.ask(simd, rows.values + (p * stride + at) * E::BYTES, bytes);
                }
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    let weight = simd.splat(*weights.as_ptr().add(b * cached.block_len + p));
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = simd.fma(weight, v, *sum);
                    }
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
