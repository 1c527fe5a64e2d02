//! Linear layers: what is computed where, and by whom.
//!
//! Weights in rows go to [`rows`], weights in panels to [`panels`] and, for many rows of rounded
//! activations, to [`unpacked`]. Work is dealt to the threads in
//! pieces of whole weight rows; an output element is computed by one thread.

mod decode;
mod experts;
mod gated;
mod inputs;
mod panels;
mod passes;
mod rows;
mod shares;
mod tiles;
mod trail;
mod unpacked;

pub(super) use self::{
    experts::{ExpertRun, Slots, applies as experts_apply, experts},
    gated::{applies as gated_applies, gated},
    inputs::{Inputs, Later},
    rows::{Job, Scratch, absorb_head, linear_piece},
    shares::rows_per_piece,
    tiles::Int8Tiles,
    trail::{Trail, Trails},
};

use std::{ptr, sync::Mutex};

use self::{
    panels::PREFETCH_BYTES,
    passes::{Panels, by_sets, expect, matrix_unit, put},
    shares::{Cut, panels_per_piece},
};
use super::{
    pool::Pool,
    shared::{SharedOut, area, lock},
    simd::{LANES, Simd},
};
use crate::{
    backend::{HeadRows, HeadView},
    matrix::{Layout, Matrix},
    panel::PANEL_ROWS,
};

fn panel_of(weight: &Matrix, index: usize) -> *const u8 {
    weight.panel(index).as_ptr()
}

/// How many panels ahead of the one it computes with a thread asks for.
fn panels_ahead(weight: &Matrix) -> usize {
    PREFETCH_BYTES.div_ceil(weight.panel(0).len().max(1))
}

/// Panel `index`, if it lies in front of panel `end`; otherwise what `beyond` says of so many panels
/// further.
fn panel_or(
    weight: &Matrix,
    index: usize,
    end: usize,
    beyond: impl FnOnce(usize) -> *const u8,
) -> *const u8 {
    match index.checked_sub(end) {
        None => panel_of(weight, index),
        Some(over) => beyond(over),
    }
}

fn n_panels(weight: &Matrix) -> usize {
    weight.n_rows().div_ceil(PANEL_ROWS)
}

/// A layer among the others that run in a step.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    /// This one.
    pub(super) trail: &'a Trail,
    /// The one that is likely to run after it.
    pub(super) next: Option<&'a Trail>,
}

impl Way<'_> {
    /// What `thread` reads in the next layer, see [`Trail::place`].
    fn beyond(&self, thread: usize, unit: usize, weight: &Matrix) -> *const u8 {
        let place = |next: &Trail| next.place(thread, unit, weight.panel(0).len());
        self.next.map_or(ptr::null(), place)
    }
}

/// Where outputs of stacked weights go: output `n` of row `m` is `out[m * stride + offset + n]`, after
/// `bias[offset + n]` was added.
#[derive(Clone, Copy)]
struct Stack<'a> {
    out: SharedOut<'a>,
    stride: usize,
    offset: usize,
    bias: Option<&'a [f32]>,
}

/// `out[m] = [W_0 x[m]; W_1 x[m]; ..] + bias`: the outputs of all parts side by side.
pub(super) fn stacked<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    parts: &[Matrix],
    way: Way<'_>,
    inputs: &Inputs<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let stride = parts.iter().map(Matrix::n_rows).sum::<usize>();
    let mut to = Stack {
        out: SharedOut::new(&mut out[..area(&[inputs.n_rows, stride])]),
        stride,
        offset: 0,
        bias,
    };
    for parts in parts.chunk_by(|a, b| a.layout() == b.layout()) {
        match parts[0].layout() {
            Layout::Rows => stacked_rows(simd, pool, scratch, parts, inputs, to),
            Layout::Panels => stacked_panels(simd, pool, scratch, parts, way, inputs, to),
        }
        to.offset += parts.iter().map(Matrix::n_rows).sum::<usize>();
    }
}

/// [`stacked`] for weights in rows.
fn stacked_rows<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    parts: &[Matrix],
    inputs: &Inputs<'_>,
    to: Stack<'_>,
) {
    let job = |part: usize, offset: usize| Job {
        weight: &parts[part],
        first_row: 0,
        n_rows: parts[part].n_rows(),
        x: inputs.x,
        x_offset: 0,
        x_stride: inputs.n_cols,
        n_tokens: inputs.n_rows,
        bias: to.bias.map(|bias| &bias[offset..]),
        out_offset: offset,
        out_stride: to.stride,
    };
    let n_pieces = |part: usize| job(part, to.offset).n_pieces();
    pool.run((0..parts.len()).map(n_pieces).sum(), &|piece, thread| {
        let (mut part, mut piece, mut offset) = (0, piece, to.offset);
        while let Some(of_next) = piece.checked_sub(n_pieces(part)) {
            (piece, offset) = (of_next, offset + parts[part].n_rows());
            part += 1;
        }
        let mut scratch = lock(&scratch[thread]);
        // SAFETY: pieces cover disjoint weight rows, and `out` holds all of every row's.
        unsafe { linear_piece(simd, &mut scratch, &job(part, offset), piece, to.out) };
    });
}

/// Panel `index` of stacked weights; null behind the last.
fn stacked_panel(parts: &[Matrix], mut index: usize) -> *const u8 {
    for part in parts {
        match index.checked_sub(n_panels(part)) {
            Some(of_next) => index = of_next,
            None => return panel_of(part, index),
        }
    }
    ptr::null()
}

/// [`stacked`] for weights in panels.
fn stacked_panels<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    parts: &[Matrix],
    way: Way<'_>,
    inputs: &Inputs<'_>,
    to: Stack<'_>,
) {
    let rows_per_piece = inputs.share();
    let per_piece = panels_per_piece(inputs.n_cols, rows_per_piece);
    let n_panels_in_all = parts.iter().map(n_panels).sum();
    let cut = Cut::new(n_panels_in_all, per_piece, pool.n_threads());
    let n_shares = inputs.n_rows.div_ceil(rows_per_piece);
    let n_pieces = n_shares * cut.n_pieces;
    if n_pieces == 0 {
        return;
    }
    for thread in 0..pool.n_threads() {
        let first = pool.share(n_pieces, thread).start % cut.n_pieces;
        let start = stacked_panel(parts, cut.piece(first).start);
        way.trail.begin(thread, [start, ptr::null()]);
    }
    pool.run(n_pieces, &|piece, thread| {
        let own = pool.share(n_pieces, thread);
        let end = match n_shares == 1 && own.contains(&piece) {
            true => cut.piece(own.end - 1).end,
            false => n_panels_in_all,
        };
        let (share, piece) = (piece / cut.n_pieces, cut.piece(piece % cut.n_pieces));
        inputs.ready(simd, share);
        let rows = share * rows_per_piece..((share + 1) * rows_per_piece).min(inputs.n_rows);
        let unit = matrix_unit(simd, inputs);
        let scratch = &mut *lock(&scratch[thread]);
        // Panels and outputs in front of the part.
        let (mut before, mut offset) = (0, to.offset);
        for weight in parts {
            let n = n_panels(weight);
            let panels = piece.start.max(before)..piece.end.min(before + n);
            if !panels.is_empty() {
                let kernels = Panels::new(simd, unit.as_ref(), weight, inputs);
                let ahead = |index: usize| match (before + index).checked_sub(end) {
                    Some(over) => way.beyond(thread, over, weight),
                    None if index < n => panel_of(weight, index),
                    None => stacked_panel(parts, before + index),
                };
                let expect = |index: usize, n: usize, first: usize, len: usize| {
                    let at = first * to.stride + offset + index * PANEL_ROWS;
                    expect(simd, n, to.out.place(at), to.stride, len);
                };
                let write = |index: usize, first: usize, sums: &mut [[f32; LANES]]| {
                    let first_row = index * PANEL_ROWS;
                    let n_valid = PANEL_ROWS.min(weight.n_rows() - first_row);
                    let at = offset + first_row;
                    if let Some(bias) = to.bias {
                        for sums in &mut *sums {
                            let bias = &bias[at..at + n_valid];
                            sums.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b);
                        }
                    }
                    // SAFETY: this piece owns these outputs, and `out` holds all of every row's.
                    unsafe {
                        let place = to.out.at(first * to.stride + at);
                        put(simd, sums, place, to.stride, 0..n_valid);
                    }
                };
                let panels = panels.start - before..panels.end - before;
                by_sets(
                    scratch,
                    &kernels,
                    panels,
                    rows.clone(),
                    ahead,
                    expect,
                    write,
                );
            }
            before += n;
            offset += weight.n_rows();
        }
    });
}

/// `out[m, h, ..] = W[rows of head h] x[m, h]` for a weight in panels; `from` views the inputs and
/// `to` the outputs. With `memory` the inputs are rounded.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own, and where to run it"
)]
pub(super) fn per_head<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    weight: &Matrix,
    rows: HeadRows,
    (x, from): (&[f32], HeadView),
    n_rows: usize,
    memory: Option<&mut Int8Tiles>,
    (out, to): (&mut [f32], HeadView),
) {
    let tiles = memory.map(|memory| {
        let sets = |row: usize| (row / n_rows * n_rows, n_rows);
        Inputs::heads(x, from, n_rows).round(simd, pool, memory, &sets)
    });
    let out = SharedOut::new(out);
    let per_piece = panels_per_piece(from.len, n_rows).next_multiple_of(2);
    // A head's rows may begin and end inside a panel.
    let panels_max = to.len.div_ceil(PANEL_ROWS) + 1;
    let pieces_per_head = panels_max.div_ceil(per_piece);
    pool.run(from.n_heads * pieces_per_head, &|piece, thread| {
        let (head, piece) = (piece / pieces_per_head, piece % pieces_per_head);
        let first_row = rows.first_of(head);
        let end_row = first_row + to.len;
        let end = end_row.div_ceil(PANEL_ROWS);
        let first = first_row / PANEL_ROWS + piece * per_piece;
        let panels = first.min(end)..(first + per_piece).min(end);
        let mut inputs = Inputs::head(x, from, n_rows, head);
        if let Some(tiles) = tiles {
            inputs = inputs.rounded(tiles, head * n_rows);
        }
        let unit = matrix_unit(simd, &inputs);
        let kernels = Panels::new(simd, unit.as_ref(), weight, &inputs);
        let scratch = &mut *lock(&scratch[thread]);
        let ahead = |index| panel_or(weight, index, n_panels(weight), |_| ptr::null());
        let expect = |_, _, _, _| {};
        by_sets(
            scratch,
            &kernels,
            panels,
            0..n_rows,
            ahead,
            expect,
            |index, first, sums| {
                let start = index * PANEL_ROWS;
                let valid = first_row.max(start) - start..end_row.min(start + PANEL_ROWS) - start;
                let at = start + valid.start - first_row;
                let at = to.offset + first * to.row_stride + head * to.head_stride + at;
                // SAFETY: the caller has checked that the outputs lie apart and inside; this piece owns
                // these.
                unsafe { put(simd, sums, out.at(at), to.row_stride, valid) };
            },
        );
    });
}
