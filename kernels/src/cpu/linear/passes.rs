//! Some panels against some rows at a time.

use std::{ops::Range, ptr};

use super::{
    inputs::Inputs,
    panel_of,
    panels::{self, PANELS_MAX, TileFn, UnpackFn, tile_fns},
    panels_ahead,
    rows::Scratch,
    tiles::tiles,
    unpacked::{self, Product, Unpacked},
};
use crate::{
    cpu::simd::{
        LANES, Simd,
        amx::{Amx, AmxUnit, TILE_LEN},
    },
    matrix::Matrix,
    panel::{GROUP_LEN, PANEL_ROWS},
};

/// A weight in panels, with the kernels for its format.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a, S> {
    simd: S,
    pub(super) weight: &'a Matrix,
    inputs: &'a Inputs<'a>,
    fns: [TileFn<S>; panels::N_TILE_LENS],
    unpack: Unpack<'a, S>,
}

/// What panels are unpacked for.
#[derive(Clone, Copy)]
enum Unpack<'a, S> {
    /// Nothing: kernels take them as they are stored.
    No,
    /// Whole tiles go to the matrix unit.
    Unit(&'a AmxUnit, UnpackFn<S>),
    /// Kernels take bytes.
    Bytes(UnpackFn<S>),
}

/// Panels that share their passes.
/// Pointers beside each other and not structs of them: what is copied right after it was written in
/// smaller parts waits for the memory.
pub(super) struct Set {
    n: usize,
    codes: [*const u8; PANELS_MAX],
    /// Panels to ask for while these are read; null where they were asked for already.
    ahead: [*const u8; PANELS_MAX],
    /// As the matrix unit reads them; null where it takes no part.
    unpacked: [*const u8; PANELS_MAX],
}

/// Rows of activations of one [`pass`] at most: two tiles.
pub(super) const PASS_ROWS: usize = 2 * TILE_LEN;
/// What a pass computes: 16 rows of the weight for every row of activations.
pub(super) type PassOut = [[f32; LANES]; PASS_ROWS];

/// A thread's room for what a pass computes: zeroing it anew for every piece is a tenth of a small
/// one. On lines of its own, so that a row of sums is one line and not parts of two.
#[derive(Debug)]
pub(super) struct PassOuts(Box<AlignedOuts>);

#[derive(Debug)]
#[repr(align(64))]
struct AlignedOuts([PassOut; PANELS_MAX]);

impl Default for PassOuts {
    fn default() -> Self {
        Self(Box::new(AlignedOuts(
            [[[0.0; LANES]; PASS_ROWS]; PANELS_MAX],
        )))
    }
}

impl PassOuts {
    pub(super) fn all(&mut self) -> &mut [PassOut; PANELS_MAX] {
        &mut self.0.0
    }
}

/// Rows from which unpacking a panel for the matrix unit pays: 16 rows take as long without it,
/// 64 take a third longer.
pub(super) const MATRIX_ROWS_MIN: usize = 2 * TILE_LEN;

/// Rows of a share from which unpacking a panel once pays where there is no matrix unit: 256 rows take 11
/// to 13 % less time. With AVX2 taking codes apart is a small part of the work.
const BYTES_ROWS_MIN: usize = 64;

/// Sets the matrix unit of this thread up, if these rows are enough for it.
pub(super) fn matrix_unit<S: Simd>(simd: S, inputs: &Inputs<'_>) -> Option<AmxUnit> {
    if inputs.int8.is_none() || inputs.n_rows < MATRIX_ROWS_MIN {
        return None;
    }
    simd.amx().map(Amx::configure)
}

impl<'a, S: Simd> Panels<'a, S> {
    pub(super) fn new(
        simd: S,
        unit: Option<&'a AmxUnit>,
        weight: &'a Matrix,
        inputs: &'a Inputs<'a>,
    ) -> Self {
        assert_eq!(weight.n_cols(), inputs.n_cols, "the layer's width");
        let is_int8 = inputs.int8.is_some();
        let format = weight.format();
        let takes_bytes =
            is_int8 && unit.is_none() && S::TILE_TOKENS >= 16 && inputs.share() >= BYTES_ROWS_MIN;
        let in_bytes = match takes_bytes {
            true => panels::bytes_fns(format),
            false => None,
        };
        let (fns, unpack) = match (in_bytes, unit.zip(panels::unpack_fn(format))) {
            (Some((unpack, fns)), _) => (fns, Unpack::Bytes(unpack)),
            (None, Some((unit, unpack))) => (tile_fns(format, true), Unpack::Unit(unit, unpack)),
            (None, None) => (tile_fns(format, is_int8), Unpack::No),
        };
        Self {
            simd,
            weight,
            inputs,
            fns,
            unpack,
        }
    }

    /// The panels `codes(0..n)`; `memory` holds what is unpacked of them, until it is used for others.
    /// `ahead(i)` is what the thread will read soon, or null.
    #[inline(always)]
    pub(super) fn set(
        &self,
        n: usize,
        codes: impl Fn(usize) -> *const u8,
        ahead: impl Fn(usize) -> *const u8,
        memory: &mut [Unpacked],
    ) -> Set {
        let mut set = Set {
            n,
            codes: [ptr::null(); PANELS_MAX],
            ahead: [ptr::null(); PANELS_MAX],
            unpacked: [ptr::null(); PANELS_MAX],
        };
        for i in 0..n {
            (set.codes[i], set.ahead[i]) = (codes(i), ahead(i));
        }
        if let Unpack::Unit(_, unpack) | Unpack::Bytes(unpack) = self.unpack {
            let n_cols = self.weight.n_cols();
            for (i, memory) in memory.iter_mut().enumerate().take(n) {
                let room = memory.room(n_cols);
                // SAFETY: `panel` is checked to hold its matrix' groups when the matrix is made, and
                // the room is made for as many.
                unsafe {
                    unpack(
                        self.simd,
                        set.codes[i],
                        n_cols / GROUP_LEN,
                        room,
                        set.ahead[i],
                    )
                };
                set.ahead[i] = ptr::null();
                match self.unpack {
                    Unpack::Bytes(_) => set.codes[i] = room,
                    _ => set.unpacked[i] = room,
                }
            }
        }
        set
    }
}

/// Rows in passes: first row and length.
pub(super) fn passes(rows: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let end = rows.end;
    let starts = rows.step_by(PASS_ROWS);
    starts.map(move |first| (first, PASS_ROWS.min(end - first)))
}

/// Panels that share a pass over `n_rows` rows: what is read of a row is used for all.
pub(super) fn panels_at_once(n_rows: usize) -> usize {
    if n_rows == 1 { PANELS_MAX } else { 2 }
}

/// `outs[p][t]` for rows `first..first + len` of the inputs against the panels of `set`, which are
/// of `of`. Others are asked for in the first pass over them only.
pub(super) fn pass<S: Simd>(
    of: &Panels<'_, S>,
    set: &Set,
    is_first: bool,
    first: usize,
    len: usize,
    outs: &mut [PassOut],
) {
    const NONE: [*const u8; PANELS_MAX] = [ptr::null(); PANELS_MAX];
    let (simd, inputs) = (of.simd, of.inputs);
    let n_groups = of.weight.n_cols() / GROUP_LEN;
    let outs = &mut outs[..set.n];
    let mut done = 0;
    if let (Unpack::Unit(unit, _), Some((tiles, rows))) = (of.unpack, inputs.int8) {
        let none = Product {
            panel: ptr::null(),
            rows: ptr::null(),
            out: ptr::null_mut(),
        };
        let (mut products, mut n) = ([none; PANELS_MAX * PASS_ROWS / TILE_LEN], 0);
        while done + TILE_LEN <= len {
            for (panel, out) in set.unpacked.iter().zip(&mut *outs) {
                products[n] = Product {
                    panel: *panel,
                    rows: inputs.int8_tile(tiles, rows, first + done),
                    out: out[done..].as_mut_ptr(),
                };
                n += 1;
            }
            done += TILE_LEN;
        }
        // SAFETY: where the matrix unit is set up all panels are unpacked; tiles have as many groups,
        // and an output is as long as the pass.
        unsafe {
            if panels::has_min(of.weight.format()) {
                unpacked::multiply::<S, true>(simd, unit, n_groups, &products[..n]);
            } else {
                unpacked::multiply::<S, false>(simd, unit, n_groups, &products[..n]);
            }
        }
    }
    let mut ahead = match is_first {
        true => &set.ahead,
        false => &NONE,
    };
    let mut to = [ptr::null_mut::<[f32; LANES]>(); PANELS_MAX];
    for (start, tile_len) in tiles(len - done, inputs.tile_len_max::<S>()) {
        let start = done + start;
        let kernel = of.fns[tile_len.ilog2() as usize];
        let input = inputs.tile(first + start, tile_len);
        for (to, out) in to.iter_mut().zip(&mut *outs) {
            *to = out[start..].as_mut_ptr();
        }
        // SAFETY: a panel is checked to hold its matrix' groups when the matrix is made, the
        // input has `tile_len` rows of as many, and the outputs are as long as the pass.
        unsafe { kernel(simd, &set.codes[..set.n], n_groups, &input, &to, ahead) };
        ahead = &NONE;
    }
}

/// Asks for the lines that a pass is going to write, rows `stride` apart: outputs of many rows are
/// far from the first-level cache by then, and waiting for them took as long as half the products.
pub(super) fn expect<S: Simd>(
    simd: S,
    n_panels: usize,
    to: *const f32,
    stride: usize,
    n_rows: usize,
) {
    if n_rows < TILE_LEN {
        return;
    }
    for t in 0..n_rows {
        for p in 0..n_panels {
            simd.prefetch_write(to.wrapping_add(t * stride + p * PANEL_ROWS).cast());
        }
    }
}

/// Writes outputs `valid` of every row of a tile, rows `stride` apart.
///
/// # Safety
/// They lie inside the memory that `to` points into, and no other thread touches them.
pub(super) unsafe fn put<S: Simd>(
    simd: S,
    tile: &[[f32; LANES]],
    to: *mut f32,
    stride: usize,
    valid: Range<usize>,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            for (t, sums) in tile.iter().enumerate() {
                // SAFETY: promised by the caller.
                unsafe {
                    let to = to.add(t * stride);
                    if valid.len() == LANES {
                        simd.store(to, simd.load(sums.as_ptr()));
                    } else {
                        let sums = &sums[valid.clone()];
                        to.copy_from_nonoverlapping(sums.as_ptr(), sums.len());
                    }
                }
            }
        },
    );
}

/// Panels `panels`, some at once, against rows `rows` of the inputs: before each pass
/// `expect(panel, panels, first row, rows)`, after it `write(panel, first row, sums)` for each panel.
/// `ahead` says where a panel lies to ask for, which may be one behind the last.
pub(super) fn by_sets<S: Simd>(
    scratch: &mut Scratch,
    kernels: &Panels<'_, S>,
    panels: Range<usize>,
    rows: Range<usize>,
    ahead: impl Fn(usize) -> *const u8,
    expect: impl Fn(usize, usize, usize, usize),
    write: impl Fn(usize, usize, &mut [[f32; LANES]]),
) {
    let Scratch { unpacked, outs, .. } = scratch;
    let weight = kernels.weight;
    let distance = panels_ahead(weight);
    let at_once = panels_at_once(kernels.inputs.n_rows);
    for index in panels.clone().step_by(at_once) {
        let n = at_once.min(panels.end - index);
        let set = kernels.set(
            n,
            |i| panel_of(weight, index + i),
            |i| ahead(index + i + distance),
            unpacked,
        );
        for (first, len) in passes(rows.clone()) {
            expect(index, n, first, len);
            pass(kernels, &set, first == rows.start, first, len, outs.all());
            for (p, outs) in outs.all().iter_mut().enumerate().take(n) {
                write(index + p, first, &mut outs[..len]);
            }
        }
    }
}
