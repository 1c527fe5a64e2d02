//! One layer's keys and values as bytes: where everything lies in a block, and writing it.
//!
//! A block of `l` positions holds, one after the other, for grouped heads the keys
//! `[head, dim, l]` (scores of a block's positions are sums over whole vectors of positions), the
//! values `[head, l, dim]`, and with int8 the scales of keys `[head, l]` and of values `[head, l]`;
//! for latent rows the latents `[l, latent]`, the rotary keys `[l, rope]`, and with int8 the
//! latents' scales `[l]`. Scales are f32.
//!
//! [`super::attention`] reads what is written here.
//!
//! Invariant: a position's bytes depend on its own row alone.

use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;

use super::{
    memory,
    pool::Pool,
    shared::{SharedBytes, area},
    simd::{LANES, Simd},
};
use crate::{
    backend::{CacheRows, CacheShape, KvType, RowView, StepInputs},
    quant::int8,
};

/// One layer's keys and values.
#[derive(Debug)]
pub struct CpuCache {
    /// f32 for their alignment; read and written as bytes.
    words: Vec<f32>,
    kv_type: KvType,
}

/// Elements of keys and values that a thread writes in one piece of work: neighbouring ones of a key
/// lie in cache lines of their own.
const STORE_PIECE: usize = 512;

/// Byte offsets inside a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockLayout {
    pub(super) block_bytes: usize,
    /// Values of grouped heads, rotary keys of latent rows.
    pub(super) second: usize,
    /// Scales of keys or latents.
    pub(super) scales: usize,
    /// Scales of values; those of latents again.
    pub(super) value_scales: usize,
}

impl BlockLayout {
    pub(super) const fn of(shape: CacheShape, kv_type: KvType) -> Self {
        let (n, block_bytes) = (shape.block_len, shape.block_bytes(kv_type));
        match shape.rows {
            CacheRows::Heads {
                n_kv_heads,
                head_dim,
            } => {
                let second = n * n_kv_heads * head_dim * kv_type.element_bytes();
                Self {
                    block_bytes,
                    second,
                    scales: 2 * second,
                    value_scales: 2 * second + n * n_kv_heads * kv_type.scale_bytes(),
                }
            }
            CacheRows::Latent {
                latent_len,
                rope_len,
            } => {
                let second = n * latent_len * kv_type.element_bytes();
                let scales = second + n * rope_len * kv_type.rope_bytes();
                Self {
                    block_bytes,
                    second,
                    scales,
                    value_scales: scales,
                }
            }
        }
    }
}

impl CpuCache {
    /// Zeroed, resident memory.
    pub(super) fn new(pool: &Pool, shape: CacheShape, kv_type: KvType) -> Self {
        let n_bytes = shape.block_bytes(kv_type) * shape.n_blocks;
        Self {
            words: memory::resident(pool, n_bytes.div_ceil(size_of::<f32>())),
            kv_type,
        }
    }

    pub(super) fn kv_type(&self) -> KvType {
        self.kv_type
    }

    pub(super) fn bytes(&self) -> &[u8] {
        cast_slice(&self.words)
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        cast_slice_mut(&mut self.words)
    }

    /// See [`crate::backend::Backend::store_heads`].
    pub(super) fn store_heads<S: Simd>(
        &mut self,
        simd: S,
        pool: &Pool,
        x: &[f32],
        [keys, values]: [RowView; 2],
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        let CacheRows::Heads {
            n_kv_heads,
            head_dim,
        } = shape.rows
        else {
            unreachable!("keys and values go to a cache of heads")
        };
        let (kv_type, n) = (self.kv_type, shape.block_len);
        let (layout, element) = (BlockLayout::of(shape, kv_type), kv_type.element_bytes());
        self.for_rows(pool, shape, inputs, &|m, t, block| {
            for head in 0..n_kv_heads {
                let row = |view: RowView| {
                    &x[view.offset + m * view.stride + head * head_dim..][..head_dim]
                };
                let scale_at = (head * n + t) * kv_type.scale_bytes();
                let at = head * n * head_dim * element + t * element;
                let place = layout.scales + scale_at;
                // SAFETY: places are the layout's, inside the block.
                unsafe { write(simd, block, row(keys), kv_type, at, n * element, place) };
                let at = layout.second + (head * n + t) * head_dim * element;
                let place = layout.value_scales + scale_at;
                // SAFETY: as above.
                unsafe { write(simd, block, row(values), kv_type, at, element, place) };
            }
        });
    }

    /// See [`crate::backend::Backend::store_latent`].
    pub(super) fn store_latent<S: Simd>(
        &mut self,
        simd: S,
        pool: &Pool,
        rows: &[f32],
        view: RowView,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        let CacheRows::Latent {
            latent_len,
            rope_len,
        } = shape.rows
        else {
            unreachable!("latent rows go to a cache of latent rows")
        };
        assert_eq!(view.width, latent_len + rope_len, "a whole row");
        let kv_type = self.kv_type;
        let (layout, element) = (BlockLayout::of(shape, kv_type), kv_type.element_bytes());
        let rope_type = match kv_type {
            KvType::F32 => KvType::F32,
            KvType::Bf16 | KvType::Int8 => KvType::Bf16,
        };
        self.for_rows(pool, shape, inputs, &|m, t, block| {
            let row = &rows[view.offset + m * view.stride..][..view.width];
            let (latent, rope) = row.split_at(latent_len);
            let at = t * latent_len * element;
            let place = layout.scales + t * kv_type.scale_bytes();
            // SAFETY: places are the layout's, inside the block.
            unsafe { write(simd, block, latent, kv_type, at, element, place) };
            let element = kv_type.rope_bytes();
            let at = layout.second + t * rope_len * element;
            // SAFETY: as above.
            unsafe { write(simd, block, rope, rope_type, at, element, 0) };
        });
    }

    /// `store(row, position in the block, block)` for every row of the step, dealt to the threads.
    fn for_rows(
        &mut self,
        pool: &Pool,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
        store: &(dyn Fn(usize, usize, *mut u8) + Sync),
    ) {
        let block_bytes = shape.block_bytes(self.kv_type);
        assert!(
            area(&[shape.n_blocks, block_bytes]) <= size_of_val(self.words.as_slice()),
            "the cache has all its blocks"
        );
        let blocks = SharedBytes(self.words.as_mut_ptr().cast());
        let rows_per_piece = (STORE_PIECE / shape.rows.row_len().max(1)).max(1);
        let n_rows = inputs.n_rows();
        pool.run(n_rows.div_ceil(rows_per_piece), &|piece, _| {
            let first = piece * rows_per_piece;
            for m in first..(first + rows_per_piece).min(n_rows) {
                let position = inputs.positions[m];
                let block = inputs.blocks_of_row(m)[position / shape.block_len] as usize;
                assert!(block < shape.n_blocks, "block ids are of the pool");
                // SAFETY: the block is inside, as asserted; rows of a step go to places of their own.
                let block = unsafe { blocks.at(block * block_bytes) };
                store(m, position % shape.block_len, block);
            }
        });
    }
}

/// Writes `values` from byte `at` of a block on, elements `step` bytes apart, and the scale at
/// `scale_at` where the type has one.
///
/// # Safety
/// All that lies inside the block, aligned to its elements, and no other thread touches it.
unsafe fn write<S: Simd>(
    simd: S,
    block: *mut u8,
    values: &[f32],
    kv_type: KvType,
    at: usize,
    step: usize,
    scale_at: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        match kv_type {
            KvType::F32 if step == 4 => {
                let to = block.add(at).cast::<f32>();
                to.copy_from_nonoverlapping(values.as_ptr(), values.len());
            }
            KvType::F32 => {
                for (i, value) in values.iter().enumerate() {
                    block.add(at + i * step).cast::<f32>().write(*value);
                }
            }
            KvType::Bf16 => {
                let to = |i: usize| block.add(at + i * step).cast::<u16>();
                let (vectors, rest) = values.as_chunks::<{ 2 * LANES }>();
                simd.vectorize(
                    #[inline(always)]
                    || {
                        for (v, values) in vectors.iter().enumerate() {
                            let (low, high) = (values.as_ptr(), values[LANES..].as_ptr());
                            let rounded = simd.round_bf16([simd.load(low), simd.load(high)]);
                            let first = v * values.len();
                            if step == 2 {
                                simd.store_bytes(to(first).cast(), rounded);
                                continue;
                            }
                            let mut words = [0u16; 2 * LANES];
                            simd.store_bytes(words.as_mut_ptr().cast(), rounded);
                            for (i, word) in words.into_iter().enumerate() {
                                to(first + i).write(word);
                            }
                        }
                    },
                );
                let first = values.len() - rest.len();
                for (i, value) in rest.iter().enumerate() {
                    to(first + i).write(bf16::from_f32(*value).to_bits());
                }
            }
            KvType::Int8 => {
                let (scale, codes) = int8::rounded_row(values);
                block.add(scale_at).cast::<f32>().write_unaligned(scale);
                for (i, code) in codes.enumerate() {
                    block.add(at + i * step).cast::<i8>().write(code);
                }
            }
        }
    }
}
