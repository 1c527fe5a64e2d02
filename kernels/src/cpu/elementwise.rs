//! Operations on one row or head at a time.

use super::simd::{LANES, Simd};
use crate::{
    backend::{HeadView, RopeLayout},
    reference,
};

pub(super) fn for_each_head(
    x: &mut [f32],
    n_rows: usize,
    heads: HeadView,
    mut body: impl FnMut(usize, &mut [f32]),
) {
    for m in 0..n_rows {
        for h in 0..heads.n_heads {
            let start = heads.offset + m * heads.row_stride + h * heads.head_stride;
            body(m, &mut x[start..][..heads.len]);
        }
    }
}

/// Normalises `row` in place.
pub(super) fn rms_norm_row<S: Simd>(simd: S, row: &mut [f32], gain: &[f32], eps: f32) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (vectors, tail) = row.as_chunks::<LANES>();
            let mut squares = simd.splat(0.0);
            for v in vectors {
                // SAFETY: a chunk holds 16 elements.
                let v = unsafe { simd.load(v.as_ptr()) };
                squares = simd.fma(v, v, squares);
            }
            let sum = simd.sum(squares) + tail.iter().map(|v| v * v).sum::<f32>();
            #[expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
            let scale = 1.0 / (sum / row.len() as f32 + eps).sqrt();
            for (value, g) in row.iter_mut().zip(gain) {
                *value = *value * scale * g;
            }
        },
    );
}

/// Adds `y` to `x` and writes the norm of `x` to `out`.
pub(super) fn add_rms_norm_row<S: Simd>(
    simd: S,
    x: &mut [f32],
    y: &[f32],
    out: &mut [f32],
    gain: &[f32],
    eps: f32,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            for ((x, y), out) in x.iter_mut().zip(y).zip(&mut *out) {
                *x += y;
                *out = *x;
            }
        },
    );
    rms_norm_row(simd, out, gain, eps);
}

pub(super) fn swiglu_row<S: Simd>(simd: S, gate: &mut [f32], up: &[f32]) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (vectors, tail) = gate.as_chunks_mut::<LANES>();
            let (up_vectors, up_tail) = up.as_chunks::<LANES>();
            for (g, u) in vectors.iter_mut().zip(up_vectors) {
                // SAFETY: chunks hold 16 elements.
                unsafe {
                    let value = simd.mul(simd.silu(simd.load(g.as_ptr())), simd.load(u.as_ptr()));
                    simd.store(g.as_mut_ptr(), value);
                }
            }
            for (g, u) in tail.iter_mut().zip(up_tail) {
                *g = reference::silu(*g) * u;
            }
        },
    );
}

/// Rotates a head's pairs by their angles.
#[inline(always)]
pub(super) fn rotate(head: &mut [f32], layout: RopeLayout, cos: &[f32], sin: &[f32]) {
    let angles = cos.iter().zip(sin);
    let turn = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    };
    match layout {
        RopeLayout::Halves => {
            let (low, high) = head.split_at_mut(cos.len());
            for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
                turn(a, b, *cos, *sin);
            }
        }
        RopeLayout::Pairs => {
            for ([a, b], (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                turn(a, b, *cos, *sin);
            }
        }
    }
}
