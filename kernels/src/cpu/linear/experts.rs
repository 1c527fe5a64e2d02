//! Chosen experts whose weights are in panels: all of a layer's in two passes.
//!
//! The (row, expert) pairs of a step are its slots, sorted by expert. First every slot's
//! `silu(G x) * U x`; then every piece of the output adds up its slots, experts in ascending order.

use std::sync::Mutex;

use super::{
    Inputs, Int8Tiles, Panels, Scratch, gated_panels, matrix_unit, n_panels, panels_per_piece,
    pass, passes,
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
/// a row of the experts' width per slot.
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
    let n_rows = slots.rows.iter().max().map_or(0, |row| row + 1);
    let out = &mut out[..area(&[n_rows, of(run).down.n_rows()])];
    {
        let per_piece = panels_per_piece(2 * hidden, slots.rows.len() / slots.runs.len());
        let panels = n_panels(of(run).gate.single());
        let pieces_per_run = panels.div_ceil(per_piece);
        let inner = SharedOut::new(inner);
        pool.run(slots.runs.len() * pieces_per_run, &|piece, thread| {
            let run = &slots.runs[piece / pieces_per_run];
            let first = piece % pieces_per_run * per_piece;
            let mut inputs = Inputs::picked(x, &slots.rows[run.first..run.first + run.n], hidden);
            if let Some(tiles) = tiles_x {
                inputs = inputs.rounded(tiles, run.first);
            }
            let panels = first..(first + per_piece).min(panels);
            let (gate, up) = (of(run).gate.single(), of(run).up.single());
            let scratch = &mut lock(&scratch[thread]);
            gated_panels(simd, scratch, gate, up, &inputs, panels, run.first, inner);
        });
    }
    let inner = &*inner;
    let tiles_inner = int8
        .as_mut()
        .map(|m| Inputs::dense(inner, slots.rows.len(), inter).round(simd, pool, &mut m[1], &sets));
    let per_piece = panels_per_piece(inter, slots.rows.len());
    let panels = n_panels(of(run).down.single());
    let out = SharedOut::new(out);
    pool.run(panels.div_ceil(per_piece), &|piece, thread| {
        let first = piece * per_piece;
        let scratch = &mut lock(&scratch[thread]);
        for panel in first..(first + per_piece).min(panels) {
            for run in slots.runs {
                let mut inputs = Inputs::dense(&inner[run.first * inter..], run.n, inter);
                if let Some(tiles) = tiles_inner {
                    inputs = inputs.rounded(tiles, run.first);
                }
                let down = of(run).down.single();
                add_panel(simd, scratch, down, panel, &inputs, slots, run, out);
            }
        }
    });
}

/// Panel `panel` of an expert's output layer, weighted and added to the rows of its slots.
fn add_panel<S: Simd>(
    simd: S,
    scratch: &mut Scratch,
    down: &Matrix,
    panel: usize,
    inputs: &Inputs<'_>,
    slots: Slots<'_>,
    run: &ExpertRun,
    out: SharedOut<'_>,
) {
    let hidden = down.n_rows();
    let unit = matrix_unit(simd, inputs);
    let kernels = Panels::new(simd, unit.as_ref(), down, inputs);
    let Scratch { unpacked, outs, .. } = scratch;
    let (weights, outs) = ([kernels.panel(panel, &mut unpacked[0])], &mut *outs.0);
    let first_row = panel * PANEL_ROWS;
    let n_valid = PANEL_ROWS.min(hidden - first_row);
    for (first, len) in passes(run.n) {
        pass(&weights, first, len, outs);
        for (t, sums) in outs[0].iter().enumerate().take(len) {
            let slot = run.first + first + t;
            let at = slots.rows[slot] * hidden + first_row;
            // SAFETY: this piece owns these columns of every row.
            let to = unsafe { std::slice::from_raw_parts_mut(out.at(at), n_valid) };
            let weight = slots.weights[slot];
            to.iter_mut()
                .zip(sums)
                .for_each(|(o, sum)| *o += weight * sum);
        }
    }
}
