//! Linear layers: what is computed where, and by whom.
//!
//! Weights in rows go to [`rows`], weights in panels to [`panels`] and, for many rows of rounded
//! activations, to [`unpacked`]. Work is dealt to the threads in
//! pieces of whole weight rows; an output element is computed by one thread.

mod decode;
mod experts;
mod panels;
mod rows;
mod tiles;
mod trail;
mod unpacked;

pub(super) use self::{
    experts::{ExpertRun, Slots, applies as experts_apply, experts},
    rows::{Job, Scratch, absorb_head, linear_piece},
    tiles::Int8Tiles,
    trail::{Trail, Trails},
};

use std::{ops::Range, ptr, sync::Mutex};

use self::{
    panels::{F32_TILE_TOKENS, PANELS_MAX, PREFETCH_BYTES, TileFn, TileInput, UnpackFn, tile_fns},
    tiles::{RowSet, SharedTiles, tiles},
    unpacked::{Product, Unpacked},
};
use super::{
    pool::Pool,
    shared::{SharedOut, area, lock},
    simd::{
        LANES, Simd,
        amx::{Amx, AmxUnit, TILE_LEN},
    },
};
use crate::{
    backend::{HeadRows, HeadView},
    matrix::{Layout, Matrix},
    panel::{GROUP_LEN, PANEL_ROWS},
};

/// Rows of work in a piece, in units of one group of a panel on one row of activations (about 4
/// ns): enough to amortise handing the piece over, few enough to share out a small layer.
const PIECE_WORK: usize = 1024;
/// Elements that are rounded in a piece, about 2 us.
const ROUND_PIECE: usize = 8_192;
/// Rows of activations from which a thread unpacks weights for itself: unpacking is a tenth of the
/// work then.
const SHARE_ROWS_MIN: usize = 2 * PASS_ROWS;
/// Reading and unpacking a group's weights, in the unit of [`PIECE_WORK`].
const UNPACK_WORK: usize = 2;

/// Activations as the kernels of panels take them.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    x: &'a [f32],
    n_cols: usize,
    n_rows: usize,
    places: Places<'a>,
    int8: Option<(SharedTiles, RowSet)>,
}

/// Where rows of activations are.
#[derive(Clone, Copy)]
enum Places<'a> {
    /// Row `i` at `first + i * stride`.
    Strided { first: usize, stride: usize },
    /// Row `i` is row `picked[i]` of dense ones.
    Picked(&'a [usize]),
    /// Row `h * n_rows + m` is head `h` of row `m`.
    Heads { view: HeadView, n_rows: usize },
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
            places: Places::Strided {
                first: 0,
                stride: n_cols,
            },
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
            places: Places::Picked(picked),
            int8: None,
        }
    }

    /// The heads of `n_rows` rows of `x`, head after head.
    fn heads(x: &'a [f32], view: HeadView, n_rows: usize) -> Self {
        Self {
            x,
            n_cols: view.len,
            n_rows: area(&[view.n_heads, n_rows]),
            places: Places::Heads { view, n_rows },
            int8: None,
        }
    }

    /// Head `head` of `n_rows` rows of `x`.
    fn head(x: &'a [f32], view: HeadView, n_rows: usize, head: usize) -> Self {
        Self {
            x,
            n_cols: view.len,
            n_rows,
            places: Places::Strided {
                first: view.offset + head * view.head_stride,
                stride: view.row_stride,
            },
            int8: None,
        }
    }

    fn row(&self, row: usize) -> &'a [f32] {
        let start = match self.places {
            Places::Strided { first, stride } => first + row * stride,
            Places::Picked(picked) => picked[row] * self.n_cols,
            Places::Heads { view, n_rows } => {
                let (head, row) = (row / n_rows, row % n_rows);
                view.offset + row * view.row_stride + head * view.head_stride
            }
        };
        &self.x[start..][..self.n_cols]
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
        // A piece is some groups of up to a tile of rows: the groups of a tile are cache lines of
        // their own, its rows are not, and threads that share lines wait for each other (43 ns a
        // group in pieces of rows, 9 so).
        let rows_per_piece = S::TILE_TOKENS.min(self.n_rows).max(1);
        let groups_per_piece = (ROUND_PIECE / (rows_per_piece * GROUP_LEN)).max(1);
        let n_ranges = n_groups.div_ceil(groups_per_piece);
        let groups_per_piece = n_groups.div_ceil(n_ranges.max(1));
        pool.run(
            self.n_rows.div_ceil(rows_per_piece) * n_ranges,
            &|piece, _| {
                let (first, range) = (piece / n_ranges * rows_per_piece, piece % n_ranges);
                let groups =
                    range * groups_per_piece..((range + 1) * groups_per_piece).min(n_groups);
                for row in first..(first + rows_per_piece).min(self.n_rows) {
                    let (set_first, set_len) = sets(row);
                    let set = RowSet {
                        first: set_first,
                        n_rows: set_len,
                        n_groups,
                    };
                    let x = self.row(row);
                    // SAFETY: the memory was reserved for all rows; each group is rounded by one
                    // thread.
                    unsafe { tiles.round_groups(simd, x, row - set_first, set, groups.clone()) };
                }
            },
        );
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
    inputs: &'a Inputs<'a>,
    fns: [TileFn<S>; panels::N_TILE_LENS],
    /// For tiles that go to the matrix unit.
    unpack: Option<(&'a AmxUnit, UnpackFn<S>)>,
}

/// A panel, ready for its inputs.
#[derive(Clone, Copy)]
struct Panel<'a, S> {
    of: &'a Panels<'a, S>,
    codes: *const u8,
    unpacked: Option<(&'a AmxUnit, *const u8)>,
    /// A panel to ask for while this one is read; null where it was asked for already.
    ahead: *const u8,
}

/// Rows of activations of one [`pass`] at most: two tiles.
const PASS_ROWS: usize = 2 * TILE_LEN;
/// What a pass computes: 16 rows of the weight for every row of activations.
type PassOut = [[f32; LANES]; PASS_ROWS];

/// A thread's room for what a pass computes: zeroing it anew for every piece is a tenth of a small
/// one. On lines of its own, so that a row of sums is one line and not parts of two.
#[derive(Debug)]
struct PassOuts(Box<AlignedOuts>);

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
    fn all(&mut self) -> &mut [PassOut; PANELS_MAX] {
        &mut self.0.0
    }
}

/// Rows from which unpacking a panel for the matrix unit pays: 16 rows take as long without it,
/// 64 take a third longer.
const MATRIX_ROWS_MIN: usize = 2 * TILE_LEN;

/// Sets the matrix unit of this thread up, if these rows are enough for it.
fn matrix_unit<S: Simd>(simd: S, inputs: &Inputs<'_>) -> Option<AmxUnit> {
    if inputs.int8.is_none() || inputs.n_rows < MATRIX_ROWS_MIN {
        return None;
    }
    simd.amx().map(Amx::configure)
}

impl<'a, S: Simd> Panels<'a, S> {
    fn new(simd: S, unit: Option<&'a AmxUnit>, weight: &'a Matrix, inputs: &'a Inputs<'a>) -> Self {
        assert_eq!(weight.n_cols(), inputs.n_cols, "the layer's width");
        let is_int8 = inputs.int8.is_some();
        Self {
            simd,
            weight,
            inputs,
            fns: tile_fns(weight.format(), is_int8),
            unpack: unit.zip(panels::unpack_fn(weight.format())),
        }
    }

    /// Panel `index`; `memory` holds what is unpacked of it, until it is used for another. `ahead` is
    /// what the thread will read soon.
    fn panel(&self, index: usize, memory: &mut Unpacked, ahead: *const u8) -> Panel<'_, S> {
        let codes = panel_of(self.weight, index);
        let unpacked = self.unpack.map(|(unit, unpack)| {
            let n_cols = self.weight.n_cols();
            let room = memory.room(n_cols);
            // SAFETY: `panel` is checked to hold its matrix' groups when the matrix is made, and
            // the room is made for as many.
            unsafe { unpack(self.simd, codes, n_cols / GROUP_LEN, room, ahead) };
            (unit, room.cast_const())
        });
        Panel {
            of: self,
            codes,
            unpacked,
            ahead: match unpacked {
                Some(_) => ptr::null(),
                None => ahead,
            },
        }
    }
}

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

/// Rows in passes: first row and length.
fn passes(rows: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let end = rows.end;
    let starts = rows.step_by(PASS_ROWS);
    starts.map(move |first| (first, PASS_ROWS.min(end - first)))
}

/// Rows of activations that a piece of work is about, from where the threads' shares are long enough
/// for their own: what a thread wrote is then in its own caches when it goes on with it, instead of
/// in another's.
fn rows_per_piece(pool: &Pool, n_rows: usize) -> usize {
    let share = n_rows.div_ceil(pool.n_threads());
    share
        .next_multiple_of(PASS_ROWS)
        .max(SHARE_ROWS_MIN)
        .min(n_rows.max(1))
}

/// Panels that share a pass over `n_rows` rows: what is read of a row is used for all.
fn panels_at_once(n_rows: usize) -> usize {
    if n_rows == 1 { PANELS_MAX } else { 2 }
}

/// `outs[p][t]` for rows `first..first + len` of the inputs against up to [`PANELS_MAX`] panels, two
/// where they are unpacked. Panels are asked for in the first pass over them only.
fn pass<S: Simd>(
    panels: &[Panel<'_, S>],
    is_first: bool,
    first: usize,
    len: usize,
    outs: &mut [PassOut],
) {
    let Some(&Panel { of, unpacked, .. }) = panels.first() else {
        return;
    };
    let format_of = |panel: &Panel<'_, S>| panel.of.weight.format();
    if panels
        .iter()
        .any(|panel| format_of(panel) != of.weight.format())
    {
        for (panel, out) in panels.chunks(1).zip(outs.chunks_mut(1)) {
            pass(panel, is_first, first, len, out);
        }
        return;
    }
    let (simd, inputs) = (of.simd, of.inputs);
    let n_groups = of.weight.n_cols() / GROUP_LEN;
    let mut to = [ptr::null_mut::<[f32; LANES]>(); PANELS_MAX];
    let mut codes = [ptr::null(); PANELS_MAX];
    let mut ahead = [ptr::null(); PANELS_MAX];
    for (i, (panel, out)) in panels.iter().zip(outs).enumerate() {
        (to[i], codes[i]) = (out.as_mut_ptr(), panel.codes);
        if is_first {
            ahead[i] = panel.ahead;
        }
    }
    let mut done = 0;
    if let (Some((unit, _)), Some((tiles, set))) = (unpacked, inputs.int8) {
        let none = Product {
            panel: ptr::null(),
            rows: ptr::null(),
            out: ptr::null_mut(),
        };
        let (mut products, mut n) = ([none; 2 * PASS_ROWS / TILE_LEN], 0);
        while done + TILE_LEN <= len {
            for (panel, out) in panels.iter().zip(to) {
                products[n] = Product {
                    panel: panel.unpacked.map_or(ptr::null(), |(_, panel)| panel),
                    rows: tiles.tile(set, first + done),
                    out: out.wrapping_add(done),
                };
                n += 1;
            }
            done += TILE_LEN;
        }
        // SAFETY: panels of one format are unpacked or not together; tiles have as many groups,
        // and an output is as long as the pass.
        unsafe {
            if panels::has_min(of.weight.format()) {
                unpacked::multiply::<S, true>(simd, unit, n_groups, &products[..n]);
            } else {
                unpacked::multiply::<S, false>(simd, unit, n_groups, &products[..n]);
            }
        }
    }
    for (start, tile_len) in tiles(len - done, inputs.tile_len_max::<S>()) {
        let start = done + start;
        let kernel = of.fns[tile_len.ilog2() as usize];
        let input = inputs.tile(first + start, tile_len);
        let outs = to.map(|out| out.wrapping_add(start));
        // SAFETY: a panel is checked to hold its matrix' groups when the matrix is made, the
        // input has `tile_len` rows of as many, and the outputs are as long as the pass.
        unsafe { kernel(simd, &codes[..panels.len()], n_groups, input, outs, ahead) };
        ahead = [ptr::null(); PANELS_MAX];
    }
}

/// Asks for the lines that a pass is going to write, rows `stride` apart: outputs of many rows are
/// far from the first-level cache by then, and waiting for them took as long as half the products.
fn expect<S: Simd>(simd: S, n_panels: usize, to: *const f32, stride: usize, n_rows: usize) {
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
unsafe fn put<S: Simd>(
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
    way: Way<'_>,
    inputs: &Inputs<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let stride = parts.iter().map(Matrix::n_rows).sum::<usize>();
    let out = SharedOut::new(&mut out[..area(&[inputs.n_rows, stride])]);
    let rows_per_piece = rows_per_piece(pool, inputs.n_rows);
    // Pairs of panels share what they read of the activations.
    let per_piece = panels_per_piece(inputs.n_cols, rows_per_piece).next_multiple_of(2);
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
    let n_pieces_of_rows = (0..parts.len()).map(n_pieces).sum::<usize>();
    let all_in_panels = parts.iter().all(|p| p.layout() == Layout::Panels);
    let n_shares = match all_in_panels {
        true => inputs.n_rows.div_ceil(rows_per_piece),
        false => 1,
    };
    let n_pieces_in_all = n_shares * n_pieces_of_rows;
    // Part of a piece of rows, the part's first row, and the piece's number inside the part.
    let place_of = |mut piece: usize| {
        let (mut part, mut offset) = (0, 0);
        while piece >= n_pieces(part) {
            piece -= n_pieces(part);
            offset += parts[part].n_rows();
            part += 1;
        }
        (part, offset, piece)
    };
    if all_in_panels && 0 < n_pieces_in_all {
        for thread in 0..pool.n_threads() {
            let first = pool.share(n_pieces_in_all, thread).start % n_pieces_of_rows;
            let (part, _, piece) = place_of(first);
            let start = panel_of(&parts[part], piece * per_piece);
            way.trail.begin(thread, [start, ptr::null()]);
        }
    }
    pool.run(n_pieces_in_all, &|piece, thread| {
        let own = pool.share(n_pieces_in_all, thread);
        let (share, of_rows) = (piece / n_pieces_of_rows, piece % n_pieces_of_rows);
        let (part, offset, piece) = place_of(of_rows);
        let weight = &parts[part];
        if weight.layout() == Layout::Rows {
            let mut scratch = lock(&scratch[thread]);
            // SAFETY: pieces cover disjoint weight rows, and `out` holds all of every row's.
            unsafe { linear_piece(simd, &mut scratch, &job(part, offset), piece, out) };
            return;
        }
        let rows = match n_shares {
            1 => 0..inputs.n_rows,
            _ => share * rows_per_piece..((share + 1) * rows_per_piece).min(inputs.n_rows),
        };
        let panels = piece * per_piece..((piece + 1) * per_piece).min(n_panels(weight));
        let unit = matrix_unit(simd, inputs);
        let kernels = Panels::new(simd, unit.as_ref(), weight, inputs);
        let scratch = &mut *lock(&scratch[thread]);
        let expect = |index: usize, n: usize, first: usize, len: usize| {
            let to = out.place(first * stride + offset + index * PANEL_ROWS);
            expect(simd, n, to, stride, len);
        };
        // Pieces from this part's first to the end of the thread's own.
        let own_pieces = match n_shares == 1 && own.contains(&of_rows) {
            true => own.end - (of_rows - piece),
            false => n_pieces_of_rows,
        };
        let end = n_panels(weight).min(own_pieces * per_piece);
        let beyond = |over: usize| match parts.get(part + 1) {
            Some(next) if n_pieces(part) < own_pieces => match next.layout() {
                Layout::Panels => panel_of(next, over.min(n_panels(next) - 1)),
                Layout::Rows => ptr::null(),
            },
            _ => way.beyond(thread, over, weight),
        };
        let ahead = |index| panel_or(weight, index, end, beyond);
        by_sets(
            scratch,
            &kernels,
            panels,
            rows,
            ahead,
            expect,
            |index, first, sums| {
                let first_row = index * PANEL_ROWS;
                let n_valid = PANEL_ROWS.min(weight.n_rows() - first_row);
                let at = offset + first_row;
                if let Some(bias) = bias {
                    for sums in &mut *sums {
                        let bias = &bias[at..at + n_valid];
                        sums.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b);
                    }
                }
                // SAFETY: this piece owns these outputs, and `out` holds all of every row's.
                unsafe { put(simd, sums, out.at(first * stride + at), stride, 0..n_valid) };
            },
        );
    });
}

/// Panels `panels`, some at once, against rows `rows` of the inputs: before each pass
/// `expect(panel, panels, first row, rows)`, after it `write(panel, first row, sums)` for each panel.
/// `ahead` says where a panel lies to ask for, which may be one behind the last.
fn by_sets<S: Simd>(
    scratch: &mut Scratch,
    kernels: &Panels<'_, S>,
    panels: Range<usize>,
    rows: Range<usize>,
    ahead: impl Fn(usize) -> *const u8,
    expect: impl Fn(usize, usize, usize, usize),
    write: impl Fn(usize, usize, &mut [[f32; LANES]]),
) {
    let Scratch { unpacked, outs, .. } = scratch;
    let distance = panels_ahead(kernels.weight);
    let at_once = panels_at_once(kernels.inputs.n_rows);
    for index in panels.clone().step_by(at_once) {
        let n = at_once.min(panels.end - index);
        let mut panel = |i: usize| {
            let ahead = ahead(index + i + distance);
            kernels.panel(index + i, &mut unpacked[i % unpacked.len()], ahead)
        };
        let mut set = [panel(0); PANELS_MAX];
        for (i, slot) in set.iter_mut().enumerate().take(n).skip(1) {
            *slot = panel(i);
        }
        for (first, len) in passes(rows.clone()) {
            expect(index, n, first, len);
            pass(&set[..n], first == rows.start, first, len, outs.all());
            for (p, outs) in outs.all().iter_mut().enumerate().take(n) {
                write(index + p, first, &mut outs[..len]);
            }
        }
    }
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

/// Whether [`gated`] takes the pair.
pub(super) fn gated_applies(gate: &Matrix, up: &Matrix) -> bool {
    let in_panels = |m: &Matrix| m.layout() == Layout::Panels;
    in_panels(gate) && in_panels(up) && (gate.n_rows(), gate.n_cols()) == (up.n_rows(), up.n_cols())
}

/// `out[m] = silu(G x[m]) * U x[m]`, both in panels.
pub(super) fn gated<S: Simd>(
    simd: S,
    pool: &Pool,
    scratch: &[Mutex<Scratch>],
    [gate, up]: [&Matrix; 2],
    way: Way<'_>,
    inputs: &Inputs<'_>,
    out: &mut [f32],
) {
    let out = SharedOut::new(&mut out[..area(&[inputs.n_rows, gate.n_rows()])]);
    let rows_per_piece = rows_per_piece(pool, inputs.n_rows);
    let per_piece = panels_per_piece(2 * inputs.n_cols, rows_per_piece);
    let n_pieces = n_panels(gate).div_ceil(per_piece);
    let n_shares = inputs.n_rows.div_ceil(rows_per_piece);
    let n_pieces_in_all = n_shares * n_pieces;
    if 0 < n_pieces_in_all {
        for thread in 0..pool.n_threads() {
            let first = pool.share(n_pieces_in_all, thread).start % n_pieces * per_piece;
            way.trail
                .begin(thread, [gate, up].map(|matrix| panel_of(matrix, first)));
        }
    }
    pool.run(n_pieces_in_all, &|piece, thread| {
        let own = pool.share(n_pieces_in_all, thread);
        let end = match n_shares == 1 && own.contains(&piece) {
            true => (own.end * per_piece).min(n_panels(gate)),
            false => n_panels(gate),
        };
        let ahead = |which: usize, index: usize| {
            let beyond = |over| way.beyond(thread, 2 * over + which, gate);
            panel_or([gate, up][which], index, end, beyond)
        };
        let (share, piece) = (piece / n_pieces, piece % n_pieces);
        let rows = share * rows_per_piece..((share + 1) * rows_per_piece).min(inputs.n_rows);
        let panels = piece * per_piece..((piece + 1) * per_piece).min(n_panels(gate));
        let scratch = &mut lock(&scratch[thread]);
        gated_panels(
            simd,
            scratch,
            [gate, up],
            ahead,
            inputs,
            panels,
            rows,
            0,
            out,
        );
    });
}

/// Panels `panels` of [`gated`] for rows `rows`; row `m` goes to row `first_out + m` of `out`.
/// `ahead(which, panel)` says where a panel of the gate, 0, or of `up` lies to ask for, which may be one
/// behind the last.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own, and where to run it"
)]
fn gated_panels<S: Simd>(
    simd: S,
    scratch: &mut Scratch,
    [gate, up]: [&Matrix; 2],
    ahead: impl Fn(usize, usize) -> *const u8,
    inputs: &Inputs<'_>,
    panels: Range<usize>,
    rows: Range<usize>,
    first_out: usize,
    out: SharedOut<'_>,
) {
    let inter = gate.n_rows();
    let unit = matrix_unit(simd, inputs);
    let (gate, up) = (
        Panels::new(simd, unit.as_ref(), gate, inputs),
        Panels::new(simd, unit.as_ref(), up, inputs),
    );
    let Scratch { unpacked, outs, .. } = scratch;
    let ([gate_memory, up_memory], outs) = (unpacked, outs.all());
    // Two streams at once.
    let distance = panels_ahead(gate.weight).div_ceil(2);
    let at_once = panels_at_once(inputs.n_rows) / 2;
    for index in panels.clone().step_by(at_once) {
        let n = at_once.min(panels.end - index);
        let mut pair = |i: usize| {
            let index = index + i;
            [
                gate.panel(index, gate_memory, ahead(0, index + distance)),
                up.panel(index, up_memory, ahead(1, index + distance)),
            ]
        };
        let mut pairs = [pair(0); PANELS_MAX / 2];
        for (i, slot) in pairs.iter_mut().enumerate().take(n).skip(1) {
            *slot = pair(i);
        }
        let first_row = index * PANEL_ROWS;
        for (first, len) in passes(rows.clone()) {
            let to = out.place((first_out + first) * inter + first_row);
            expect(simd, n, to, inter, len);
            let set = pairs[..n].as_flattened();
            pass(set, first == rows.start, first, len, outs);
            let (sums, []) = outs.as_chunks_mut::<2>() else {
                unreachable!("as many gates as ups")
            };
            for (p, [gates, ups]) in sums.iter_mut().enumerate().take(n) {
                simd.vectorize(
                    #[inline(always)]
                    || {
                        for (gate, up) in gates.iter_mut().zip(ups).take(len) {
                            // SAFETY: both hold 16 elements.
                            unsafe {
                                let value = simd.silu(simd.load(gate.as_ptr()));
                                let value = simd.mul(value, simd.load(up.as_ptr()));
                                simd.store(gate.as_mut_ptr(), value);
                            }
                        }
                    },
                );
                let first_row = first_row + p * PANEL_ROWS;
                let n_valid = PANEL_ROWS.min(inter - first_row);
                let at = (first_out + first) * inter + first_row;
                // SAFETY: this piece owns these outputs.
                unsafe { put(simd, &gates[..len], out.at(at), inter, 0..n_valid) };
            }
        }
    }
}
