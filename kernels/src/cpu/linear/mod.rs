//! Linear layers: what is computed where, and by whom.
//!
//! Weights in rows go to [`rows`], weights in panels to [`panels`]. Work is dealt to the threads in
//! pieces of whole weight rows; an output element is computed by one thread.

mod decode;
mod experts;
mod panels;
mod rows;
mod tiles;

pub(super) use self::{
    experts::{ExpertRun, Slots, applies as experts_apply, experts},
    rows::{Job, Scratch, absorb_head, linear_piece},
    tiles::Int8Tiles,
};

use std::sync::Mutex;

use self::{
    panels::{F32_TILE_TOKENS, TileFn, TileInput, TileOut, tile_fns},
    tiles::{RowSet, SharedTiles, tiles},
};
use super::{
    pool::Pool,
    shared::{SharedOut, area, lock},
    simd::{LANES, Simd},
};
use crate::{
    matrix::{Layout, Matrix},
    panel::{GROUP_LEN, PANEL_ROWS},
};

/// Rows of work in a piece, in units of one group of a panel on one row of activations (about 4
/// ns): enough to amortise handing the piece over, few enough to share out a small layer.
const PIECE_WORK: usize = 1024;
/// Reading and unpacking a group's weights, in the same unit.
const UNPACK_WORK: usize = 2;

/// Activations as the kernels of panels take them.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    x: &'a [f32],
    n_cols: usize,
    n_rows: usize,
    /// Where row `i` is in `x`; row `i` itself where there is no list.
    picked: Option<&'a [usize]>,
    int8: Option<(SharedTiles, RowSet)>,
}

impl<'a> Inputs<'a> {
    /// The first `n_rows` dense rows of `x`.
    pub(super) fn dense(x: &'a [f32], n_rows: usize, n_cols: usize) -> Self {
        assert!(
            area(&[n_rows, n_cols]) <= x.len(),
            "{n_rows} rows of {n_cols}"
        );
        Self {
            x,
            n_cols,
            n_rows,
            picked: None,
            int8: None,
        }
    }

    /// The rows `picked` of `x`.
    pub(super) fn picked(x: &'a [f32], picked: &'a [usize], n_cols: usize) -> Self {
        let n = picked.iter().max().map_or(0, |row| row + 1);
        assert!(area(&[n, n_cols]) <= x.len(), "{n} rows of {n_cols}");
        Self {
            x,
            n_cols,
            n_rows: picked.len(),
            picked: Some(picked),
            int8: None,
        }
    }

    fn row(&self, row: usize) -> &'a [f32] {
        let row = self.picked.map_or(row, |picked| picked[row]);
        &self.x[row * self.n_cols..][..self.n_cols]
    }

    /// Rounds all rows to int8, as one set.
    pub(super) fn round_all<S: Simd>(self, simd: S, pool: &Pool, memory: &mut Int8Tiles) -> Self {
        let tiles = self.round(simd, pool, memory, &|_| (0, self.n_rows));
        self.rounded(tiles, 0)
    }

    /// Rounds all rows to int8; `sets` tells first row and length of a row's set.
    fn round<S: Simd>(
        self,
        simd: S,
        pool: &Pool,
        memory: &mut Int8Tiles,
        sets: &(dyn Fn(usize) -> (usize, usize) + Sync),
    ) -> SharedTiles {
        memory.reserve(self.n_rows, self.n_cols);
        let tiles = memory.shared();
        let n_groups = self.n_cols / GROUP_LEN;
        // About 8 Ki elements a piece.
        let rows_per_piece = (8_192 / self.n_cols.max(1)).max(1);
        pool.run(self.n_rows.div_ceil(rows_per_piece), &|piece, _| {
            let first = piece * rows_per_piece;
            for row in first..(first + rows_per_piece).min(self.n_rows) {
                let (set_first, set_len) = sets(row);
                let set = RowSet {
                    first: set_first,
                    n_rows: set_len,
                    n_groups,
                };
                // SAFETY: the memory was reserved for all rows; each is rounded by one thread.
                unsafe { tiles.round_row(simd, self.row(row), row - set_first, set) };
            }
        });
        tiles
    }

    /// These rows, rounded before as one set behind `first` others.
    fn rounded(mut self, tiles: SharedTiles, first: usize) -> Self {
        let set = RowSet {
            first,
            n_rows: self.n_rows,
            n_groups: self.n_cols / GROUP_LEN,
        };
        self.int8 = Some((tiles, set));
        self
    }

    fn tile(&self, first: usize, len: usize) -> TileInput {
        match self.int8 {
            Some((tiles, set)) => TileInput::Int8(tiles.tile(set, first)),
            None => {
                let mut rows = [self.row(first).as_ptr(); F32_TILE_TOKENS];
                for (i, row) in rows.iter_mut().enumerate().take(len).skip(1) {
                    *row = self.row(first + i).as_ptr();
                }
                TileInput::F32(rows)
            }
        }
    }

    fn tile_len_max<S: Simd>(&self) -> usize {
        match self.int8 {
            Some(_) => S::TILE_TOKENS,
            None => S::TILE_TOKENS.min(F32_TILE_TOKENS),
        }
    }
}

/// A weight in panels, with the kernels for its format.
#[derive(Clone, Copy)]
struct Panels<'a, S> {
    simd: S,
    weight: &'a Matrix,
    fns: [TileFn<S>; panels::N_TILE_LENS],
}

impl<'a, S: Simd> Panels<'a, S> {
    fn new(simd: S, weight: &'a Matrix, inputs: &Inputs<'_>) -> Self {
        assert_eq!(weight.n_cols(), inputs.n_cols, "the layer's width");
        Self {
            simd,
            weight,
            fns: tile_fns(weight.format(), inputs.int8.is_some()),
        }
    }

    /// Panel `index` on the tile of `len` rows from `first` on.
    fn tile(&self, index: usize, inputs: &Inputs<'_>, first: usize, len: usize, out: &mut TileOut) {
        let kernel = self.fns[len.ilog2() as usize];
        let n_groups = self.weight.n_cols() / GROUP_LEN;
        let panel = self.weight.panel(index);
        // SAFETY: `panel` is checked to hold its matrix' groups when the matrix is made; the
        // input has `len` rows of as many.
        unsafe {
            kernel(
                self.simd,
                panel.as_ptr(),
                n_groups,
                inputs.tile(first, len),
                out,
            )
        };
    }
}

/// Panels of one piece of work on `n_tokens` rows.
fn panels_per_piece(n_cols: usize, n_tokens: usize) -> usize {
    let work = n_cols / GROUP_LEN * (n_tokens + UNPACK_WORK);
    (PIECE_WORK / work.max(1)).max(1)
}

fn n_panels(weight: &Matrix) -> usize {
    weight.n_rows().div_ceil(PANEL_ROWS)
}

/// `out[m] = [W_0 x[m]; W_1 x[m]; ..] + bias`: the outputs of all parts side by side.
pub(super) fn stacked<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    parts: &[Matrix],
    inputs: &Inputs<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let stride = parts.iter().map(Matrix::n_rows).sum::<usize>();
    let out = SharedOut::new(&mut out[..area(&[inputs.n_rows, stride])]);
    let per_piece = panels_per_piece(inputs.n_cols, inputs.n_rows);
    let job = |part: usize, offset: usize| Job {
        weight: &parts[part],
        first_row: 0,
        n_rows: parts[part].n_rows(),
        x: inputs.x,
        x_offset: 0,
        x_stride: inputs.n_cols,
        n_tokens: inputs.n_rows,
        bias: bias.map(|bias| &bias[offset..]),
        out_offset: offset,
        out_stride: stride,
    };
    let n_pieces = |part: usize| match parts[part].layout() {
        Layout::Rows => job(part, 0).n_pieces(),
        Layout::Panels => n_panels(&parts[part]).div_ceil(per_piece),
    };
    pool.run((0..parts.len()).map(n_pieces).sum(), &|piece, thread| {
        let (mut part, mut piece, mut offset) = (0, piece, 0);
        while piece >= n_pieces(part) {
            piece -= n_pieces(part);
            offset += parts[part].n_rows();
            part += 1;
        }
        let weight = &parts[part];
        if weight.layout() == Layout::Rows {
            let mut scratch = lock(&scratch[thread]);
            // SAFETY: pieces cover disjoint weight rows, and `out` holds all of every row's.
            unsafe { linear_piece(simd, &mut scratch, &job(part, offset), piece, out) };
            return;
        }
        let kernels = Panels::new(simd, weight, inputs);
        let panels = piece * per_piece..((piece + 1) * per_piece).min(n_panels(weight));
        let mut sums = [[0.0; LANES]; 16];
        for panel in panels {
            let first_row = panel * PANEL_ROWS;
            let n_valid = PANEL_ROWS.min(weight.n_rows() - first_row);
            let at = offset + first_row;
            for (first, len) in tiles(inputs.n_rows, inputs.tile_len_max::<S>()) {
                kernels.tile(panel, inputs, first, len, &mut sums);
                for (t, sums) in sums.iter_mut().enumerate().take(len) {
                    if let Some(bias) = bias {
                        let bias = &bias[at..at + n_valid];
                        sums.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b);
                    }
                    // SAFETY: this piece owns these outputs, and `out` holds the whole row.
                    unsafe {
                        let to = out.at((first + t) * stride + at);
                        to.copy_from_nonoverlapping(sums.as_ptr(), n_valid);
                    }
                }
            }
        }
    });
}

/// Whether [`gated`] takes the pair.
pub(super) fn gated_applies(gate: &Matrix, up: &Matrix) -> bool {
    let in_panels = |m: &Matrix| m.layout() == Layout::Panels;
    in_panels(gate) && in_panels(up) && (gate.n_rows(), gate.n_cols()) == (up.n_rows(), up.n_cols())
}

/// `out[m] = silu(G x[m]) * U x[m]`, both in panels.
pub(super) fn gated<S: Simd>(
    simd: S,
    pool: &Pool,
    gate: &Matrix,
    up: &Matrix,
    inputs: &Inputs<'_>,
    out: &mut [f32],
) {
    let out = SharedOut::new(&mut out[..area(&[inputs.n_rows, gate.n_rows()])]);
    let per_piece = panels_per_piece(2 * inputs.n_cols, inputs.n_rows);
    pool.run(n_panels(gate).div_ceil(per_piece), &|piece, _| {
        let panels = piece * per_piece..((piece + 1) * per_piece).min(n_panels(gate));
        gated_panels(simd, gate, up, inputs, panels, 0, out);
    });
}

/// Panels `panels` of [`gated`]; row `m` goes to row `first_out + m` of `out`.
fn gated_panels<S: Simd>(
    simd: S,
    gate: &Matrix,
    up: &Matrix,
    inputs: &Inputs<'_>,
    panels: std::ops::Range<usize>,
    first_out: usize,
    out: SharedOut<'_>,
) {
    let inter = gate.n_rows();
    let (gate, up) = (
        Panels::new(simd, gate, inputs),
        Panels::new(simd, up, inputs),
    );
    let (mut gates, mut ups) = ([[0.0; LANES]; 16], [[0.0; LANES]; 16]);
    for panel in panels {
        let first_row = panel * PANEL_ROWS;
        let n_valid = PANEL_ROWS.min(inter - first_row);
        for (first, len) in tiles(inputs.n_rows, inputs.tile_len_max::<S>()) {
            gate.tile(panel, inputs, first, len, &mut gates);
            up.tile(panel, inputs, first, len, &mut ups);
            simd.vectorize(
                #[inline(always)]
                || {
                    for (gate, up) in gates.iter_mut().zip(&ups).take(len) {
                        // SAFETY: both hold 16 elements.
                        unsafe {
                            let value = simd.silu(simd.load(gate.as_ptr()));
                            let value = simd.mul(value, simd.load(up.as_ptr()));
                            simd.store(gate.as_mut_ptr(), value);
                        }
                    }
                },
            );
            for (t, gate) in gates.iter().enumerate().take(len) {
                // SAFETY: this piece owns these outputs.
                unsafe {
                    let to = out.at((first_out + first + t) * inter + first_row);
                    to.copy_from_nonoverlapping(gate.as_ptr(), n_valid);
                }
            }
        }
    }
}
