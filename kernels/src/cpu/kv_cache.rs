//! One layer's keys and values as bytes: where everything lies in a block, and writing it.
//!
//! A block of `l` positions holds, one after the other, for grouped heads the keys
//! `[head, dim, l]` (scores of a block's positions are sums over whole vectors of positions), the
//! values `[head, l, dim]`, and with int8 the scales of keys `[head, l]` and of values `[head, l]`;
//! for latent rows the latents `[l, latent]`, the rotary keys `[l, rope]`, and with int8 the
//! latents' scales `[l]`. Scales are f32.
//!
//! Knows nothing of threads. [`super::attention`] reads what is written here.
//!
//! Invariant: a position's bytes depend on its own row alone.

use std::mem;

use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;

use super::memory;
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
    /// Room for one row's codes, so that storing allocates nothing.
    codes: Vec<i8>,
}

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
    pub(super) fn new(shape: CacheShape, kv_type: KvType) -> Self {
        let n_bytes = shape.block_bytes(kv_type) * shape.n_blocks;
        let row_len = match shape.rows {
            CacheRows::Heads { head_dim, .. } => head_dim,
            CacheRows::Latent { latent_len, .. } => latent_len,
        };
        Self {
            words: memory::resident(n_bytes.div_ceil(size_of::<f32>())),
            kv_type,
            codes: vec![0; row_len],
        }
    }

    pub(super) fn kv_type(&self) -> KvType {
        self.kv_type
    }

    pub(super) fn bytes(&self) -> &[u8] {
        cast_slice(&self.words)
    }

    /// See [`crate::backend::Backend::store_heads`].
    pub(super) fn store_heads(
        &mut self,
        x: &[f32],
        keys: RowView,
        values: RowView,
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
        let mut codes = mem::take(&mut self.codes);
        for m in 0..inputs.n_rows() {
            let (block, t) = self.block(shape, layout, inputs, m);
            for head in 0..n_kv_heads {
                let row = |view: RowView| {
                    &x[view.offset + m * view.stride + head * head_dim..][..head_dim]
                };
                let scale_at = (head * n + t) * kv_type.scale_bytes();
                let (at, place) = (head * n * head_dim * element, layout.scales + scale_at);
                write(
                    block,
                    row(keys),
                    kv_type,
                    at + t * element,
                    n * element,
                    place,
                    &mut codes,
                );
                let at = layout.second + (head * n + t) * head_dim * element;
                let place = layout.value_scales + scale_at;
                write(block, row(values), kv_type, at, element, place, &mut codes);
            }
        }
        self.codes = codes;
    }

    /// See [`crate::backend::Backend::store_latent`].
    pub(super) fn store_latent(
        &mut self,
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
        let mut codes = mem::take(&mut self.codes);
        for m in 0..inputs.n_rows() {
            let (block, t) = self.block(shape, layout, inputs, m);
            let row = &rows[view.offset + m * view.stride..][..view.width];
            let (latent, rope) = row.split_at(latent_len);
            let (at, place) = (
                t * latent_len * element,
                layout.scales + t * kv_type.scale_bytes(),
            );
            write(block, latent, kv_type, at, element, place, &mut codes);
            let element = kv_type.rope_bytes();
            let at = layout.second + t * rope_len * element;
            write(block, rope, rope_type, at, element, 0, &mut []);
        }
        self.codes = codes;
    }

    /// The block that row `m` of the step goes to, and its position in there.
    fn block(
        &mut self,
        shape: CacheShape,
        layout: BlockLayout,
        inputs: &StepInputs<'_>,
        m: usize,
    ) -> (&mut [u8], usize) {
        let position = inputs.positions[m];
        let block = inputs.blocks_of_row(m)[position / shape.block_len] as usize;
        let bytes: &mut [u8] = cast_slice_mut(&mut self.words);
        let block = &mut bytes[block * layout.block_bytes..][..layout.block_bytes];
        (block, position % shape.block_len)
    }
}

/// Writes `values` from byte `at` on, elements `step` bytes apart, and the scale at `scale_at` where
/// the type has one. All four are multiples of the element's size.
fn write(
    block: &mut [u8],
    values: &[f32],
    kv_type: KvType,
    at: usize,
    step: usize,
    scale_at: usize,
    codes: &mut [i8],
) {
    match kv_type {
        KvType::F32 => {
            let to: &mut [f32] = cast_slice_mut(block);
            let to = to[at / 4..].iter_mut().step_by(step / 4);
            to.zip(values).for_each(|(to, v)| *to = *v);
        }
        KvType::Bf16 => {
            let to: &mut [u16] = cast_slice_mut(block);
            let to = to[at / 2..].iter_mut().step_by(step / 2);
            to.zip(values)
                .for_each(|(to, v)| *to = bf16::from_f32(*v).to_bits());
        }
        KvType::Int8 => {
            let scale = int8::round_row(values, codes);
            block[scale_at..][..4].copy_from_slice(&scale.to_ne_bytes());
            let to = block[at..].iter_mut().step_by(step);
            to.zip(&*codes)
                .for_each(|(to, code)| *to = code.cast_unsigned());
        }
    }
}
