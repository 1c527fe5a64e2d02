//! `y = W x` for weights stored in rows, in f32: each output is one chain of fused multiply-adds
//! over sixteen lanes.
//!
//! Few rows of activations: weights are decoded in registers and used at once. Many: a group of
//! weight rows is decoded to f32 once and used for all of them. Both walk the columns in the same
//! order with the same decoded values, so the result does not depend on the number of rows.

use bytemuck::cast_slice;

use super::{
    decode::{self, Decode, GROUP_LEN, WeightRow},
    gated::Groups,
    panels::PANELS_MAX,
    passes::PassOuts,
    unpacked::Unpacked,
};
use crate::{
    cpu::{
        shared::SharedOut,
        simd::{LANES, Simd},
    },
    dtype::Format,
    matrix::Matrix,
    quant,
};

/// Weight rows that share one pass over the activations.
const TILE_ROWS: usize = 4;
/// Activation rows that share one pass over the weights.
const TILE_TOKENS: usize = 4;
/// Up to this many activation rows weights are decoded in registers.
const FUSED_TOKENS_MAX: usize = TILE_TOKENS;
/// Weight rows of one piece of work: enough to amortise handing it over (a piece of a
/// 576-wide layer is about 5 us), few enough to share out a small layer.
const PIECE_ROWS: usize = 32;

/// One thread's buffers.
#[derive(Debug, Default)]
pub(in crate::cpu) struct Scratch {
    /// `TILE_ROWS` decoded rows, padded to whole vectors.
    panel: Vec<f32>,
    /// Rows of activations padded to whole vectors, where the width is not a multiple.
    padded: Vec<f32>,
    /// Panels for the matrix unit.
    pub(super) unpacked: [Unpacked; PANELS_MAX],
    pub(super) outs: PassOuts,
    pub(super) groups: Groups,
}

impl Scratch {
    /// Bytes for `n_tokens` rows of activations of at most `n_cols` columns.
    pub(in crate::cpu) const fn bytes(n_tokens: usize, n_cols: usize) -> usize {
        (TILE_ROWS + n_tokens) * n_cols.next_multiple_of(GROUP_LEN) * size_of::<f32>()
            + PANELS_MAX * Unpacked::bytes(n_cols)
    }

    /// Takes that memory.
    pub(in crate::cpu) fn reserve(&mut self, n_tokens: usize, n_cols: usize) {
        let width = n_cols.next_multiple_of(GROUP_LEN);
        self.panel.resize(TILE_ROWS * width, 0.0);
        self.padded.resize(n_tokens * width, 0.0);
        for unpacked in &mut self.unpacked {
            unpacked.reserve(n_cols);
        }
    }
}

/// Rows `first_row..` of a weight seen as an `n`-row matrix, and where its outputs go: output `n` of
/// token `m` is `out[m * out_stride + out_offset + n]`.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct Job<'a> {
    pub(in crate::cpu) weight: &'a Matrix,
    pub(in crate::cpu) first_row: usize,
    pub(in crate::cpu) n_rows: usize,
    pub(in crate::cpu) x: &'a [f32],
    pub(in crate::cpu) x_offset: usize,
    pub(in crate::cpu) x_stride: usize,
    pub(in crate::cpu) n_tokens: usize,
    pub(in crate::cpu) bias: Option<&'a [f32]>,
    pub(in crate::cpu) out_offset: usize,
    pub(in crate::cpu) out_stride: usize,
}

impl<'a> Job<'a> {
    fn x_row(&self, token: usize) -> &'a [f32] {
        &self.x[self.x_offset + token * self.x_stride..][..self.weight.n_cols()]
    }

    /// Pieces to deal out.
    pub(in crate::cpu) fn n_pieces(&self) -> usize {
        self.n_rows.div_ceil(PIECE_ROWS)
    }
}

/// Piece `piece` of a job.
///
/// # Safety
/// The job's outputs lie inside `out`, and no other thread touches those of this piece.
pub(in crate::cpu) unsafe fn linear_piece<S: Simd>(
    simd: S,
    scratch: &mut Scratch,
    job: &Job<'_>,
    piece: usize,
    out: SharedOut<'_>,
) {
    let rows = piece * PIECE_ROWS..((piece + 1) * PIECE_ROWS).min(job.n_rows);
    macro_rules! with {
        ($decode:ty) => {
            simd.vectorize(
                #[inline(always)]
                || {
                    // SAFETY: passed on from the caller.
                    unsafe { f32_rows::<S, $decode>(simd, scratch, job, rows, out) }
                },
            )
        };
    }
    match job.weight.format() {
        Format::F32 => with!(decode::F32),
        Format::F16 => with!(decode::F16),
        Format::Bf16 => with!(decode::Bf16),
        Format::F8E4m3 => with!(decode::F8E4m3),
        Format::Q4_0 => with!(decode::Q4_0),
        Format::Q4_1 => with!(decode::Q4_1),
        Format::Q5_0 => with!(decode::Q5_0),
        Format::Q5_1 => with!(decode::Q5_1),
        Format::Q8_0 => with!(decode::Q8_0),
        Format::Q4K => with!(decode::Q4K),
        Format::Q5K => with!(decode::Q5K),
        Format::Q6K => with!(decode::Q6K),
        Format::Int8 => with!(decode::Int8),
        Format::Int4 => with!(decode::Int4),
    }
}

/// Whether groups of [`GROUP_LEN`] columns can be decoded one by one: rows are whole groups and no
/// group straddles two scale tiles.
fn has_whole_groups(weight: &Matrix) -> bool {
    weight.n_cols().is_multiple_of(GROUP_LEN)
        && weight
            .tile_scales()
            .is_none_or(|s| s.tile_cols.is_multiple_of(GROUP_LEN))
}

#[inline(always)]
unsafe fn f32_rows<S: Simd, D: Decode>(
    simd: S,
    scratch: &mut Scratch,
    job: &Job<'_>,
    rows: std::ops::Range<usize>,
    out: SharedOut<'_>,
) {
    let whole_groups = has_whole_groups(job.weight);
    if whole_groups && job.n_tokens <= FUSED_TOKENS_MAX {
        for tile in tiles(rows, TILE_ROWS) {
            let weight_rows = |i: usize| WeightRow::of(job.weight, job.first_row + tile.start + i);
            // SAFETY: rows are whole groups; outputs as promised by the caller.
            unsafe {
                tile_of_rows::<S, D>(simd, tile.len(), &weight_rows, job, None, tile.start, out);
            }
        }
        return;
    }
    let k = job.weight.n_cols();
    let k_padded = k.next_multiple_of(GROUP_LEN);
    let Scratch { panel, padded, .. } = scratch;
    panel.resize(TILE_ROWS * k_padded, 0.0);
    let padded = (k != k_padded).then(|| {
        padded.clear();
        padded.resize(job.n_tokens * k_padded, 0.0);
        for (token, row) in padded.chunks_exact_mut(k_padded).enumerate() {
            row[..k].copy_from_slice(job.x_row(token));
        }
        padded.as_slice()
    });
    for tile in tiles(rows, TILE_ROWS) {
        for (i, row) in panel
            .chunks_exact_mut(k_padded)
            .take(tile.len())
            .enumerate()
        {
            let index = job.first_row + tile.start + i;
            if whole_groups {
                let weight_row = WeightRow::of(job.weight, index);
                for group in 0..k / GROUP_LEN {
                    // SAFETY: the row has whole groups; `row` is `k` long.
                    unsafe {
                        let values = D::group(simd, &weight_row, group);
                        let to = row.as_mut_ptr().add(group * GROUP_LEN);
                        simd.store(to, values[0]);
                        simd.store(to.add(LANES), values[1]);
                    }
                }
            } else {
                quant::decode_row(job.weight, index, &mut row[..k]);
                row[k..].fill(0.0);
            }
        }
        let panel = &*panel;
        let weight_rows = |i: usize| WeightRow {
            bytes: cast_slice(&panel[i * k_padded..][..k_padded]),
            scales: &[],
            tile_cols: 1,
        };
        // SAFETY: panel rows are whole groups; outputs as promised by the caller.
        unsafe {
            tile_of_rows::<S, decode::F32>(
                simd,
                tile.len(),
                &weight_rows,
                job,
                padded,
                tile.start,
                out,
            );
        }
    }
}

/// `range` in runs of at most `len`.
fn tiles(
    range: std::ops::Range<usize>,
    len: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = range.end;
    range
        .step_by(len)
        .map(move |start| start..(start + len).min(end))
}

/// All tokens against up to [`TILE_ROWS`] weight rows. `padded` replaces the job's activations by
/// rows that are whole groups.
///
/// # Safety
/// Weight rows are whole groups, and so are the activation rows; outputs lie inside `out`.
#[inline(always)]
unsafe fn tile_of_rows<'a, S: Simd, D: Decode>(
    simd: S,
    n_rows: usize,
    weight_rows: &impl Fn(usize) -> WeightRow<'a>,
    job: &Job<'_>,
    padded: Option<&[f32]>,
    first_output: usize,
    out: SharedOut<'_>,
) {
    let k = job.weight.n_cols().next_multiple_of(GROUP_LEN);
    let x_row = |token: usize| match padded {
        Some(padded) => padded[token * k..][..k].as_ptr(),
        None => job.x_row(token).as_ptr(),
    };
    for tokens in tiles(0..job.n_tokens, TILE_TOKENS) {
        let mut sums = [[0f32; TILE_TOKENS]; TILE_ROWS];
        macro_rules! dot {
            ($rows:literal, $tokens:literal) => {{
                let rows = std::array::from_fn::<_, $rows, _>(|i| weight_rows(i));
                let x = std::array::from_fn::<_, $tokens, _>(|i| x_row(tokens.start + i));
                // SAFETY: passed on from the caller.
                let tile = unsafe { dot_tile::<S, D, $rows, $tokens>(simd, &rows, &x, k) };
                for (to, from) in sums.iter_mut().zip(tile) {
                    to[..$tokens].copy_from_slice(&from);
                }
            }};
        }
        match (n_rows, tokens.len()) {
            (4, 4) => dot!(4, 4),
            (4, 3) => dot!(4, 3),
            (4, 2) => dot!(4, 2),
            (4, 1) => dot!(4, 1),
            (rows, n_tokens) => {
                for (i, sums) in sums.iter_mut().enumerate().take(rows) {
                    for (j, to) in sums.iter_mut().enumerate().take(n_tokens) {
                        // SAFETY: passed on from the caller.
                        let sum = unsafe {
                            dot_tile::<S, D, 1, 1>(
                                simd,
                                &[weight_rows(i)],
                                &[x_row(tokens.start + j)],
                                k,
                            )
                        };
                        *to = sum[0][0];
                    }
                }
            }
        }
        for (j, token) in tokens.enumerate() {
            for (i, sum) in sums.iter().take(n_rows).enumerate() {
                let bias = job.bias.map_or(0.0, |b| b[first_output + i]);
                let at = token * job.out_stride + job.out_offset + first_output + i;
                // SAFETY: the caller bounds the job's outputs.
                unsafe { out.write(at, sum[j] + bias) };
            }
        }
    }
}

/// `sums[i][j] = rows[i] . x[j]` over `k` columns, each one chain of FMAs per lane.
///
/// # Safety
/// Rows and `x` hold `k` elements, a multiple of [`GROUP_LEN`].
#[inline(always)]
unsafe fn dot_tile<S: Simd, D: Decode, const ROWS: usize, const TOKENS: usize>(
    simd: S,
    rows: &[WeightRow<'_>; ROWS],
    x: &[*const f32; TOKENS],
    k: usize,
) -> [[f32; TOKENS]; ROWS] {
    let mut sums = [[simd.splat(0.0); TOKENS]; ROWS];
    for group in 0..k / GROUP_LEN {
        let at = group * GROUP_LEN;
        // SAFETY: `at + GROUP_LEN <= k`.
        unsafe {
            let mut low = [simd.splat(0.0); TOKENS];
            let mut high = low;
            for j in 0..TOKENS {
                low[j] = simd.load(x[j].add(at));
                high[j] = simd.load(x[j].add(at + LANES));
            }
            for i in 0..ROWS {
                let w = D::group(simd, &rows[i], group);
                for j in 0..TOKENS {
                    sums[i][j] = simd.fma(w[0], low[j], sums[i][j]);
                    sums[i][j] = simd.fma(w[1], high[j], sums[i][j]);
                }
            }
        }
    }
    let mut totals = [[0f32; TOKENS]; ROWS];
    for i in 0..ROWS {
        for j in 0..TOKENS {
            totals[i][j] = simd.sum(sums[i][j]);
        }
    }
    totals
}

/// `out[m, h, ..] = sum_d q[m, h, d] * W[row(h, d)]`: rows of the weight added up with the queries
/// as factors. Pieces are heads.
///
/// # Safety
/// As [`linear_piece`].
pub(in crate::cpu) unsafe fn absorb_head<S: Simd>(
    simd: S,
    scratch: &mut Scratch,
    weight: &Matrix,
    first_row: usize,
    queries: impl Fn(usize, usize) -> f32,
    n_dims: usize,
    n_tokens: usize,
    out: impl Fn(usize) -> *mut f32,
) {
    let rank = weight.n_cols();
    let Scratch { panel, padded, .. } = scratch;
    panel.resize(TILE_ROWS * rank.next_multiple_of(GROUP_LEN), 0.0);
    padded.clear();
    padded.resize(n_tokens * rank, 0.0);
    for d in 0..n_dims {
        quant::decode_row(weight, first_row + d, &mut panel[..rank]);
        simd.vectorize(
            #[inline(always)]
            || {
                for (token, sums) in padded.chunks_exact_mut(rank).enumerate() {
                    let q = queries(token, d);
                    for (sum, w) in sums.iter_mut().zip(&panel[..rank]) {
                        *sum += q * w;
                    }
                }
            },
        );
    }
    for (token, sums) in padded.chunks_exact(rank).enumerate() {
        // SAFETY: the caller's `out` points at `rank` writable elements of this head.
        unsafe { out(token).copy_from_nonoverlapping(sums.as_ptr(), rank) };
    }
}
