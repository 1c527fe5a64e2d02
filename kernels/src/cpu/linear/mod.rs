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

use std::{
    ops::Range,
    ptr,
    sync::{Mutex, Once},
};

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
/// Threads up to which shares may be shorter: each reads all weights for itself, with 8 rows 12 GB/s.
const FEW_THREADS: usize = 4;
/// Short shares are multiples of so many rows, as many as share a kernel's registers.
const SHORT_SHARE_ROWS: usize = 8;
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
    /// Rows whose tiles are their own, see [`rows_per_piece`].
    share: usize,
    /// Where rows are rounded by the thread that needs them first.
    later: Option<&'a Later>,
}

/// Which shares have been rounded.
pub(super) struct Later([Once; FEW_THREADS]);

impl Later {
    pub(super) const fn new() -> Self {
        Self([const { Once::new() }; FEW_THREADS])
    }
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
            share: usize::MAX,
            later: None,
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
            share: usize::MAX,
            later: None,
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
            share: usize::MAX,
            later: None,
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
            share: usize::MAX,
            later: None,
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

    /// Rounds all rows to int8, as one set; short shares when they are [`Self::ready`], which saves a
    /// job that takes longer to hand over than to do.
    pub(super) fn round_all<S: Simd>(
        mut self,
        simd: S,
        pool: &Pool,
        memory: &mut Int8Tiles,
        later: &'a Later,
    ) -> Self {
        let share = rows_per_piece(simd, pool, self.n_rows);
        let tiles = if share < self.n_rows.min(SHARE_ROWS_MIN) {
            self.later = Some(later);
            memory.reserve(self.n_rows, self.n_cols);
            memory.shared()
        } else {
            self.round(simd, pool, memory, &|row| {
                let first = row / share * share;
                (first, share.min(self.n_rows - first))
            })
        };
        let mut rounded = self.rounded(tiles, 0);
        rounded.share = share;
        rounded
    }

    /// Returns when the rows of share `share` are rounded, if they are to be.
    fn ready<S: Simd>(&self, simd: S, share: usize) {
        let (Some(later), Some((tiles, set))) = (self.later, self.int8) else {
            return;
        };
        later.0[share].call_once(|| {
            let first = share * self.share;
            let set = RowSet {
                first,
                n_rows: self.share.min(self.n_rows - first),
                ..set
            };
            let groups = 0..set.n_groups;
            // SAFETY: the memory was reserved for all rows, and a share is rounded once, by one thread.
            unsafe {
                let row = |row: usize| self.row(first + row);
                tiles.round_rows(simd, row, 0..set.n_rows, set, &groups);
            }
        });
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
        let share = rows_per_piece(simd, pool, self.n_rows);
        let rows_per_piece = S::TILE_TOKENS.min(share);
        let groups_per_piece = (ROUND_PIECE / (rows_per_piece * GROUP_LEN)).max(1);
        let n_ranges = n_groups.div_ceil(groups_per_piece);
        let groups_per_piece = n_groups.div_ceil(n_ranges.max(1));
        let n_tiles = share.div_ceil(rows_per_piece);
        pool.run(
            self.n_rows.div_ceil(share) * n_tiles * n_ranges,
            &|piece, _| {
                let (tile, range) = (piece / n_ranges, piece % n_ranges);
                let (share_first, tile) = (tile / n_tiles * share, tile % n_tiles);
                let first = share_first + tile * rows_per_piece;
                let end = (first + rows_per_piece)
                    .min(share_first + share)
                    .min(self.n_rows);
                let groups =
                    range * groups_per_piece..((range + 1) * groups_per_piece).min(n_groups);
                let mut row = first;
                while row < end {
                    let (set_first, set_len) = sets(row);
                    let set = RowSet {
                        first: set_first,
                        n_rows: set_len,
                        n_groups,
                    };
                    let rows = row - set_first..end.min(set_first + set_len) - set_first;
                    row += rows.len();
                    // SAFETY: the memory was reserved for all rows; each group is rounded by one
                    // thread.
                    unsafe {
                        tiles.round_rows(simd, |i| self.row(set_first + i), rows, set, &groups);
                    }
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

    /// The rounded tile that starts at row `first`.
    fn int8_tile(&self, tiles: SharedTiles, set: RowSet, first: usize) -> *const u8 {
        let in_front = first / self.share * self.share;
        let set = RowSet {
            first: set.first + in_front,
            n_rows: self.share.min(set.n_rows - in_front),
            ..set
        };
        tiles.tile(set, first - in_front)
    }

    fn tile(&self, first: usize, len: usize) -> TileInput {
        match self.int8 {
            Some((tiles, set)) => TileInput::Int8(self.int8_tile(tiles, set, first)),
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

/// Panels that share their passes: up to [`PANELS_MAX`], [`UNPACKED_MAX`] where they are unpacked.
/// Pointers beside each other and not structs of them: what is copied right after it was written in
/// smaller parts waits for the memory.
struct Set {
    n: usize,
    codes: [*const u8; PANELS_MAX],
    /// Panels to ask for while these are read; null where they were asked for already.
    ahead: [*const u8; PANELS_MAX],
    /// As the matrix unit reads them; null where it takes no part.
    unpacked: [*const u8; UNPACKED_MAX],
}

/// Panels that a thread has unpacked at a time.
const UNPACKED_MAX: usize = 2;

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

    /// The panels `codes(0..n)`; `memory` holds what is unpacked of them, until it is used for others.
    /// `ahead(i)` is what the thread will read soon, or null.
    #[inline(always)]
    fn set(
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
            unpacked: [ptr::null(); UNPACKED_MAX],
        };
        for i in 0..n {
            (set.codes[i], set.ahead[i]) = (codes(i), ahead(i));
        }
        if let Some((_, unpack)) = self.unpack {
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
                (set.unpacked[i], set.ahead[i]) = (room.cast_const(), ptr::null());
            }
        }
        set
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
/// in another's (16 rows of SmolLM2 on two threads: 5 % more tokens, 16 % where the threads' caches
/// seem to be far apart). Panels for the matrix unit are unpacked by every thread, so shares are
/// longer there.
pub(super) fn rows_per_piece<S: Simd>(simd: S, pool: &Pool, n_rows: usize) -> usize {
    let n_threads = pool.n_threads();
    let share = n_rows.div_ceil(n_threads);
    let short = share.next_multiple_of(SHORT_SHARE_ROWS);
    let idle_rows = short * n_threads - n_rows;
    let unpacks = MATRIX_ROWS_MIN <= n_rows && simd.amx().is_some();
    let is_short = short < SHARE_ROWS_MIN && n_threads <= FEW_THREADS && !unpacks;
    let rows = match is_short && 8 * idle_rows <= n_rows {
        true => short,
        false => share.next_multiple_of(PASS_ROWS).max(SHARE_ROWS_MIN),
    };
    rows.clamp(1, n_rows.max(1))
}

/// Panels that share a pass over `n_rows` rows: what is read of a row is used for all.
fn panels_at_once(n_rows: usize) -> usize {
    if n_rows == 1 { PANELS_MAX } else { 2 }
}

/// `outs[p][t]` for rows `first..first + len` of the inputs against the panels of `set`, which are
/// of `of`. Others are asked for in the first pass over them only.
fn pass<S: Simd>(
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
    if let (Some((unit, _)), Some((tiles, rows))) = (of.unpack, inputs.int8) {
        let none = Product {
            panel: ptr::null(),
            rows: ptr::null(),
            out: ptr::null_mut(),
        };
        let (mut products, mut n) = ([none; UNPACKED_MAX * PASS_ROWS / TILE_LEN], 0);
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

/// Panels cut into pieces of the same number of pairs, give or take one, as many for every thread:
/// with pieces as they come a thread did up to a fifth more than its share.
#[derive(Clone, Copy)]
struct Cut {
    n_panels: usize,
    n_pieces: usize,
}

impl Cut {
    /// About `per_piece` panels in a piece.
    fn new(n_panels: usize, per_piece: usize, n_threads: usize) -> Self {
        let n_pieces = n_panels
            .div_ceil(per_piece)
            .next_multiple_of(n_threads)
            .min(n_panels.div_ceil(2));
        Self { n_panels, n_pieces }
    }

    /// The panels of a piece.
    fn piece(self, piece: usize) -> Range<usize> {
        let n_pairs = self.n_panels.div_ceil(2);
        let first = |piece: usize| (2 * (n_pairs * piece / self.n_pieces)).min(self.n_panels);
        first(piece)..first(piece + 1)
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
    let rows_per_piece = rows_per_piece(simd, pool, inputs.n_rows);
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
    let rows_per_piece = rows_per_piece(simd, pool, inputs.n_rows);
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
        let rows = share * rows_per_piece..((share + 1) * rows_per_piece).min(inputs.n_rows);
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
    let outs = outs.all();
    let share_passes = gate.weight.format() == up.weight.format();
    // Two streams at once.
    let distance = panels_ahead(gate.weight).div_ceil(2);
    let at_once = panels_at_once(inputs.n_rows) / 2;
    for index in panels.clone().step_by(at_once) {
        let n = at_once.min(panels.end - index);
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
                let [of_gate, of_up] = unpacked.each_mut().map(std::slice::from_mut);
                let ups = up.set(n, |i| codes(n + i), |i| ahead(n + i), of_up);
                (gate.set(n, codes, ahead, of_gate), Some(ups))
            }
        };
        let first_row = index * PANEL_ROWS;
        for (first, len) in passes(rows.clone()) {
            let to = out.place((first_out + first) * inter + first_row);
            expect(simd, n, to, inter, len);
            let is_first = first == rows.start;
            pass(&gate, &first_set, is_first, first, len, outs);
            if let Some(set) = &second_set {
                pass(&up, set, is_first, first, len, &mut outs[n..]);
            }
            let (gates, ups) = outs[..2 * n].split_at_mut(n);
            for (p, (gates, ups)) in gates.iter_mut().zip(ups).enumerate() {
                simd.vectorize(
                    #[inline(always)]
                    || {
                        for (gate, up) in gates.iter_mut().zip(&*ups).take(len) {
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
