//! Chosen experts whose weights are in panels: all of a layer's in two passes.
//!
//! The (row, expert) pairs of a step are its slots, sorted by expert. First every slot's
//! `silu(G x) * U x`; then every piece of the output adds up its slots, experts in ascending order.

use std::{ops::Range, ptr, sync::Mutex};

use super::{
    Cut, Inputs, Int8Tiles, Panels, Scratch, by_sets,
    gated::{GatedOut, gated_panels},
    matrix_unit, n_panels, panel_of, panel_or, panels_per_piece,
    tiles::RowSet,
    trail::Trail,
};
use crate::{
    backend::Expert,
    cpu::{
        CpuWeight,
        pool::Pool,
        shared::{SharedOut, area, lock},
        simd::Simd,
    },
    matrix::{Layout, Matrix},
    panel::PANEL_ROWS,
};

/// Panels of an expert's output layer in a piece at most.
const DOWN_PANELS_MAX: usize = 16;
/// Pieces of the output layers for every thread, where there are panels for as many.
const PIECES_PER_THREAD: usize = 4;

/// Consecutive slots of one expert.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct ExpertRun {
    /// Index of the expert.
    pub(in crate::cpu) expert: usize,
    /// First slot.
    pub(in crate::cpu) first: usize,
    /// Slots.
    pub(in crate::cpu) n: usize,
}

/// The slots of a step.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Slots<'a> {
    pub(in crate::cpu) runs: &'a [ExpertRun],
    /// Row of every slot.
    pub(in crate::cpu) rows: &'a [usize],
    /// The router's weight of every slot.
    pub(in crate::cpu) weights: &'a [f32],
}

impl Slots<'_> {
    /// First slot and length of the run that holds `slot`.
    fn run_of(&self, slot: usize) -> (usize, usize) {
        let index = self.runs.partition_point(|run| run.first <= slot) - 1;
        (self.runs[index].first, self.runs[index].n)
    }
}

/// Whether [`experts`] takes them: all in panels, one matrix each.
pub(in crate::cpu) fn applies(experts: &[Expert<CpuWeight>]) -> bool {
    experts.iter().all(|e| {
        super::gated_applies(e.gate.single(), e.up.single())
            && e.down.single().layout() == Layout::Panels
    })
}

/// `out[row] += weight * down(silu(gate x[row]) * up x[row])` for every slot; `inner` has room for
/// a row of the experts' width per slot. `next`: the layer that is likely to run after them.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own, and where to run it"
)]
pub(in crate::cpu) fn experts<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    experts: &[Expert<CpuWeight>],
    slots: Slots<'_>,
    next: Option<&Trail>,
    x: &[f32],
    inner: &mut [f32],
    mut int8: Option<&mut [Int8Tiles; 2]>,
    out: &mut [f32],
) {
    let Some(run) = slots.runs.first() else {
        return;
    };
    let of = |run: &ExpertRun| &experts[run.expert];
    let (hidden, inter) = (of(run).gate.n_cols(), of(run).gate.n_rows());
    let sets = |slot| slots.run_of(slot);
    let tiles_x = int8
        .as_mut()
        .map(|m| Inputs::picked(x, slots.rows, hidden).round(simd, pool, &mut m[0], &sets));
    let inner = &mut inner[..area(&[slots.rows.len(), inter])];
    let tiles_inner = int8.as_mut().map(|m| m[1].room(slots.rows.len(), inter));
    let n_rows = slots.rows.iter().max().map_or(0, |row| row + 1);
    let out = &mut out[..area(&[n_rows, of(run).down.n_rows()])];
    {
        let per_piece = panels_per_piece(2 * hidden, slots.rows.len() / slots.runs.len());
        let n_panels = n_panels(of(run).gate.single());
        let cut = Cut::new(n_panels, per_piece, pool.n_threads());
        let inner = SharedOut::new(inner);
        pool.run(slots.runs.len() * cut.n_pieces, &|piece, thread| {
            let (index, panels) = (piece / cut.n_pieces, cut.piece(piece % cut.n_pieces));
            let run = &slots.runs[index];
            let mut inputs = Inputs::picked(x, &slots.rows[run.first..run.first + run.n], hidden);
            if let Some(tiles) = tiles_x {
                inputs = inputs.rounded(tiles, run.first);
            }
            let pair = |run: &ExpertRun| [of(run).gate.single(), of(run).up.single()];
            let next = slots.runs.get(index + 1).map(pair);
            let ahead = |which: usize, index: usize| {
                let beyond = |over: usize| {
                    next.map_or(ptr::null(), |next| {
                        panel_of(next[which], over.min(n_panels - 1))
                    })
                };
                panel_or(pair(run)[which], index, n_panels, beyond)
            };
            let to = match tiles_inner {
                None => GatedOut::F32 {
                    out: inner,
                    first: run.first,
                },
                Some(tiles) => GatedOut::Int8 {
                    tiles,
                    set: RowSet::new(run.first, run.n, inter),
                    first: 0,
                },
            };
            let (rows, scratch) = (0..run.n, &mut lock(&scratch[thread]));
            gated_panels(simd, scratch, pair(run), ahead, &inputs, panels, rows, to);
        });
    }
    let inner = &*inner;
    // Few pieces, so that what is read of an expert at once is long.
    let panels = n_panels(of(run).down.single());
    let n_pieces = panels
        .div_ceil(DOWN_PANELS_MAX)
        .max(PIECES_PER_THREAD * pool.n_threads());
    let per_piece = panels.div_ceil(n_pieces);
    let out = SharedOut::new(out);
    pool.run(panels.div_ceil(per_piece), &|piece, thread| {
        let panels = piece * per_piece..((piece + 1) * per_piece).min(panels);
        let scratch = &mut lock(&scratch[thread]);
        for (index, run) in slots.runs.iter().enumerate() {
            let inputs = match tiles_inner {
                None => Inputs::dense(&inner[run.first * inter..], run.n, inter),
                Some(tiles) => Inputs::made(tiles, run.first, run.n, inter),
            };
            let down = of(run).down.single();
            // What is read after some panels more, of this expert, of another or of the next layer.
            let ahead = |panel: usize| {
                let steps = panel - panels.start;
                let run_ahead = index + steps / panels.len();
                match (slots.runs.get(run_ahead), next) {
                    (Some(run), _) => {
                        panel_of(of(run).down.single(), panels.start + steps % panels.len())
                    }
                    (None, Some(next)) => {
                        let unit = steps - (slots.runs.len() - index) * panels.len();
                        next.place(thread, unit, down.panel(0).len())
                    }
                    (None, None) => ptr::null(),
                }
            };
            let panels = panels.clone();
            add_panels(simd, scratch, down, panels, ahead, &inputs, slots, run, out);
        }
    });
}

/// Panels `panels` of an expert's output layer, weighted and added to the rows of its slots;
/// `ahead(panel)` says where a panel lies to ask for, which may be one behind the last.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own, and where to run it"
)]
fn add_panels<S: Simd>(
    simd: S,
    scratch: &mut Scratch,
    down: &Matrix,
    panels: Range<usize>,
    ahead: impl Fn(usize) -> *const u8,
    inputs: &Inputs<'_>,
    slots: Slots<'_>,
    run: &ExpertRun,
    out: SharedOut<'_>,
) {
    let hidden = down.n_rows();
    let unit = matrix_unit(simd, inputs);
    let kernels = Panels::new(simd, unit.as_ref(), down, inputs);
    let expect = |_, _, _, _| {};
    by_sets(
        scratch,
        &kernels,
        panels,
        0..run.n,
        ahead,
        expect,
        |panel, first, sums| {
            let first_row = panel * PANEL_ROWS;
            let n_valid = PANEL_ROWS.min(hidden - first_row);
            for (t, sums) in sums.iter().enumerate() {
                let slot = run.first + first + t;
                let at = slots.rows[slot] * hidden + first_row;
                // SAFETY: this piece owns these columns of every row.
                let to = unsafe { std::slice::from_raw_parts_mut(out.at(at), n_valid) };
                let weight = slots.weights[slot];
                simd.vectorize(
                    #[inline(always)]
                    || {
                        let sums = to.iter_mut().zip(sums);
                        sums.for_each(|(o, sum)| *o += weight * sum);
                    },
                );
            }
        },
    );
}
