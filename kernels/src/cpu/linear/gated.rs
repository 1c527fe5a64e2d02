//! Two layers whose outputs are multiplied, `silu(G x) * U x` (Shazeer 2020).
//!
//! Where the layer behind them takes rounded activations, a group of outputs is rounded by the thread
//! that computed it, as soon as it has it: in f32 they would be more than twice as long, and written,
//! fetched and rounded by whoever comes to it.

use std::{ops::Range, sync::Mutex};

use super::{
    Inputs, Panels, Scratch, Way, matrix_unit, n_panels, panel_of, panel_or, panels_ahead,
    panels_per_piece,
    passes::{PASS_ROWS, expect, pass, passes},
    shares::Cut,
    tiles::{RowSet, SharedTiles},
};
use crate::{
    cpu::{
        pool::Pool,
        shared::{SharedOut, area, lock},
        simd::Simd,
    },
    matrix::{Layout, Matrix},
    panel::{GROUP_LEN, PANEL_ROWS},
};

/// Panels that a group of outputs comes from.
const GROUP_PANELS: usize = GROUP_LEN / PANEL_ROWS;

/// Where products go, row after row of the inputs.
#[derive(Clone, Copy)]
pub(super) enum GatedOut<'a> {
    /// The first to row `first`.
    F32 { out: SharedOut<'a>, first: usize },
    /// Rounded; row `first` of the inputs is the first of the set.
    Int8 {
        tiles: SharedTiles,
        set: RowSet,
        first: usize,
    },
}

/// A thread's room for the groups of a pass.
#[derive(Debug)]
pub(super) struct Groups(Box<[[f32; GROUP_LEN]; PASS_ROWS]>);

impl Default for Groups {
    fn default() -> Self {
        Self(Box::new([[0.0; GROUP_LEN]; PASS_ROWS]))
    }
}

/// Whether [`gated`] takes the pair.
pub(in crate::cpu) fn applies(gate: &Matrix, up: &Matrix) -> bool {
    let in_panels = |m: &Matrix| m.layout() == Layout::Panels;
    in_panels(gate) && in_panels(up) && (gate.n_rows(), gate.n_cols()) == (up.n_rows(), up.n_cols())
}

/// `silu(G x[m]) * U x[m]`, both in panels: to `out[m]`, or rounded to row `m` of `tiles`, in shares
/// as the inputs'.
pub(in crate::cpu) fn gated<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    [gate, up]: [&Matrix; 2],
    way: Way<'_>,
    inputs: &Inputs<'_>,
    out: &mut [f32],
    tiles: Option<SharedTiles>,
) {
    let out = SharedOut::new(&mut out[..area(&[inputs.n_rows, gate.n_rows()])]);
    let rows_per_piece = inputs.share();
    let per_piece = panels_per_piece(2 * inputs.n_cols, rows_per_piece);
    let cut = Cut::new(n_panels(gate), per_piece, pool.n_threads());
    let n_shares = inputs.n_rows.div_ceil(rows_per_piece);
    let n_pieces = n_shares * cut.n_pieces;
    if n_pieces == 0 {
        return;
    }
    for thread in 0..pool.n_threads() {
        let first = cut.piece(pool.share(n_pieces, thread).start % cut.n_pieces);
        let streams = [gate, up].map(|matrix| panel_of(matrix, first.start));
        way.trail.begin(thread, streams);
    }
    pool.run(n_pieces, &|piece, thread| {
        let own = pool.share(n_pieces, thread);
        let end = match n_shares == 1 && own.contains(&piece) {
            true => cut.piece(own.end - 1).end,
            false => n_panels(gate),
        };
        let ahead = |which: usize, index: usize| {
            let beyond = |over| way.beyond(thread, 2 * over + which, gate);
            panel_or([gate, up][which], index, end, beyond)
        };
        let (share, panels) = (piece / cut.n_pieces, cut.piece(piece % cut.n_pieces));
        inputs.ready(simd, share);
        let first = share * rows_per_piece;
        let rows = first..(first + rows_per_piece).min(inputs.n_rows);
        let to = match tiles {
            None => GatedOut::F32 { out, first: 0 },
            Some(tiles) => GatedOut::Int8 {
                tiles,
                set: RowSet::new(first, rows.len(), gate.n_rows()),
                first,
            },
        };
        let scratch = &mut lock(&scratch[thread]);
        gated_panels(simd, scratch, [gate, up], ahead, inputs, panels, rows, to);
    });
}

/// Panels `panels` of [`gated`] for rows `rows`. `ahead(which, panel)` says where a panel of the gate, 0,
/// or of `up` lies to ask for, which may be one behind the last.
pub(super) fn gated_panels<S: Simd>(
    simd: S,
    scratch: &mut Scratch,
    [gate, up]: [&Matrix; 2],
    ahead: impl Fn(usize, usize) -> *const u8,
    inputs: &Inputs<'_>,
    panels: Range<usize>,
    rows: Range<usize>,
    to: GatedOut<'_>,
) {
    let inter = gate.n_rows();
    let unit = matrix_unit(simd, inputs);
    let (gate, up) = (
        Panels::new(simd, unit.as_ref(), gate, inputs),
        Panels::new(simd, unit.as_ref(), up, inputs),
    );
    let Scratch {
        unpacked,
        outs,
        groups,
        ..
    } = scratch;
    let (outs, values) = (outs.all(), &mut *groups.0);
    let share_passes = gate.weight.format() == up.weight.format();
    // Two streams at once.
    let distance = panels_ahead(gate.weight).div_ceil(2);
    for index in panels.clone().step_by(GROUP_PANELS) {
        let n = GROUP_PANELS.min(panels.end - index);
        // Gates, then ups.
        let codes = |i: usize| match i.checked_sub(n) {
            None => panel_of(gate.weight, index + i),
            Some(i) => panel_of(up.weight, index + i),
        };
        let ahead = |i: usize| match i.checked_sub(n) {
            None => ahead(0, index + i + distance),
            Some(i) => ahead(1, index + i + distance),
        };
        let (first_set, second_set) = match share_passes {
            true => (gate.set(2 * n, codes, ahead, unpacked), None),
            false => {
                let (of_gate, of_up) = unpacked.split_at_mut(n);
                let ups = up.set(n, |i| codes(n + i), |i| ahead(n + i), of_up);
                (gate.set(n, codes, ahead, of_gate), Some(ups))
            }
        };
        let first_row = index * PANEL_ROWS;
        for (first, len) in passes(rows.clone()) {
            if let GatedOut::F32 { out, first: at } = to {
                let to = out.place((at + first) * inter + first_row);
                expect(simd, n, to, inter, len);
            }
            let is_first = first == rows.start;
            pass(&gate, &first_set, is_first, first, len, outs);
            if let Some(set) = &second_set {
                pass(&up, set, is_first, first, len, &mut outs[n..]);
            }
            let (gates, ups) = outs[..2 * n].split_at(n);
            for (p, (gates, ups)) in gates.iter().zip(ups).enumerate() {
                simd.vectorize(
                    #[inline(always)]
                    || {
                        for ((gate, up), values) in
                            gates.iter().zip(ups).zip(&mut *values).take(len)
                        {
                            // SAFETY: all hold 16 elements, the values from those of a panel on.
                            unsafe {
                                let value = simd.silu(simd.load(gate.as_ptr()));
                                let value = simd.mul(value, simd.load(up.as_ptr()));
                                simd.store(values[p * PANEL_ROWS..].as_mut_ptr(), value);
                            }
                        }
                    },
                );
            }
            match to {
                GatedOut::F32 { out, first: at } => {
                    let at = (at + first) * inter + first_row;
                    let n_valid = (n * PANEL_ROWS).min(inter - first_row);
                    for (t, values) in values.iter().enumerate().take(len) {
                        // SAFETY: this piece owns these outputs.
                        unsafe {
                            let to = out.at(at + t * inter);
                            to.copy_from_nonoverlapping(values.as_ptr(), n_valid);
                        }
                    }
                }
                GatedOut::Int8 {
                    tiles,
                    set,
                    first: at,
                } => {
                    debug_assert_eq!(n, GROUP_PANELS, "rows of whole groups, cut between them");
                    let (group, rows) = (first_row / GROUP_LEN, first - at..first + len - at);
                    let in_front = group * GROUP_LEN;
                    let row =
                        |row: usize| values[row - (first - at)].as_ptr().wrapping_sub(in_front);
                    // SAFETY: a row's group is here; the memory was reserved for the set, of which this
                    // piece owns the group.
                    unsafe { tiles.round_rows(simd, row, rows, set, &(group..group + 1)) };
                }
            }
        }
    }
}
