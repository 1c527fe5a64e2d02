//! Rows of activations as the kernels of panels take them: where they are, and rounding them to int8.

use std::sync::Once;

use super::{
    panels::{F32_TILE_TOKENS, TileInput},
    shares::{FEW_THREADS, SHARE_ROWS_MIN},
    tiles::{Int8Tiles, RowSet, SharedTiles},
};
use crate::{
    backend::HeadView,
    cpu::{pool::Pool, shared::area, simd::Simd},
    panel::GROUP_LEN,
};

/// Elements that are rounded in a piece, about 2 us.
const ROUND_PIECE: usize = 8_192;

/// Activations as the kernels of panels take them.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Inputs<'a> {
    pub(super) x: &'a [f32],
    pub(super) n_cols: usize,
    pub(super) n_rows: usize,
    places: Places<'a>,
    pub(super) int8: Option<(SharedTiles, RowSet)>,
    /// Rows whose tiles are their own.
    share: usize,
    /// Where rows are rounded by the thread that needs them first.
    later: Option<&'a Later>,
}

/// Which shares have been rounded.
pub(in crate::cpu) struct Later([Once; FEW_THREADS]);

impl Later {
    pub(in crate::cpu) const fn new() -> Self {
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
    /// Not rounded.
    fn new(x: &'a [f32], n_cols: usize, n_rows: usize, places: Places<'a>) -> Self {
        Self {
            x,
            n_cols,
            n_rows,
            places,
            int8: None,
            share: usize::MAX,
            later: None,
        }
    }

    /// The first `n_rows` dense rows of `x`.
    pub(in crate::cpu) fn dense(x: &'a [f32], n_rows: usize, n_cols: usize) -> Self {
        assert!(
            area(&[n_rows, n_cols]) <= x.len(),
            "{n_rows} rows of {n_cols}"
        );
        let (first, stride) = (0, n_cols);
        Self::new(x, n_cols, n_rows, Places::Strided { first, stride })
    }

    /// `n_rows` rows of `n_cols` columns that were rounded where they were made, behind `first` others.
    pub(super) fn made(tiles: SharedTiles, first: usize, n_rows: usize, n_cols: usize) -> Self {
        Self::new(&[], n_cols, n_rows, Places::Picked(&[])).rounded(tiles, first)
    }

    /// What was made of these rows, `n_cols` columns of each, in the same shares.
    pub(in crate::cpu) fn made_of(&self, tiles: SharedTiles, n_cols: usize) -> Self {
        Self::made(tiles, 0, self.n_rows, n_cols).in_shares(self.share)
    }

    /// The rows `picked` of `x`.
    pub(super) fn picked(x: &'a [f32], picked: &'a [usize], n_cols: usize) -> Self {
        let n = picked.iter().max().map_or(0, |row| row + 1);
        assert!(area(&[n, n_cols]) <= x.len(), "{n} rows of {n_cols}");
        Self::new(x, n_cols, picked.len(), Places::Picked(picked))
    }

    /// The heads of `n_rows` rows of `x`, head after head.
    pub(super) fn heads(x: &'a [f32], view: HeadView, n_rows: usize) -> Self {
        let all = area(&[view.n_heads, n_rows]);
        Self::new(x, view.len, all, Places::Heads { view, n_rows })
    }

    /// Head `head` of `n_rows` rows of `x`.
    pub(super) fn head(x: &'a [f32], view: HeadView, n_rows: usize, head: usize) -> Self {
        let places = Places::Strided {
            first: view.offset + head * view.head_stride,
            stride: view.row_stride,
        };
        Self::new(x, view.len, n_rows, places)
    }

    /// The same rows, cut into shares of so many.
    pub(in crate::cpu) fn in_shares(mut self, n_rows: usize) -> Self {
        self.share = n_rows;
        self
    }

    /// Rows of a share.
    pub(in crate::cpu) fn share(&self) -> usize {
        self.share.min(self.n_rows).max(1)
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
    pub(in crate::cpu) fn round_all<S: Simd>(
        mut self,
        simd: S,
        pool: &Pool,
        memory: &mut Int8Tiles,
        later: &'a Later,
    ) -> Self {
        let share = self.share();
        let tiles = if share < self.n_rows.min(SHARE_ROWS_MIN) {
            self.later = Some(later);
            memory.room(self.n_rows, self.n_cols)
        } else {
            self.round(simd, pool, memory, &|row| {
                let first = row / share * share;
                (first, share.min(self.n_rows - first))
            })
        };
        self.rounded(tiles, 0)
    }

    /// Returns when the rows of share `share` are rounded, if they are to be.
    pub(super) fn ready<S: Simd>(&self, simd: S, share: usize) {
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
            // SAFETY: rows are whole, the memory was reserved for all, and a share is rounded once, by one
            // thread.
            unsafe {
                let row = |row: usize| self.row(first + row).as_ptr();
                tiles.round_rows(simd, row, 0..set.n_rows, set, &groups);
            }
        });
    }

    /// Rounds all rows to int8; `sets` tells first row and length of a row's set.
    pub(super) fn round<S: Simd>(
        self,
        simd: S,
        pool: &Pool,
        memory: &mut Int8Tiles,
        sets: &(dyn Fn(usize) -> (usize, usize) + Sync),
    ) -> SharedTiles {
        let tiles = memory.room(self.n_rows, self.n_cols);
        let n_groups = self.n_cols / GROUP_LEN;
        // A piece is some groups of up to a tile of rows: the groups of a tile are cache lines of
        // their own, its rows are not, and threads that share lines wait for each other (43 ns a
        // group in pieces of rows, 9 so).
        let share = self.share();
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
                    let set = RowSet::new(set_first, set_len, self.n_cols);
                    let rows = row - set_first..end.min(set_first + set_len) - set_first;
                    row += rows.len();
                    // SAFETY: rows are whole, the memory was reserved for all; each group is rounded by one
                    // thread.
                    unsafe {
                        let row = |i: usize| self.row(set_first + i).as_ptr();
                        tiles.round_rows(simd, row, rows, set, &groups);
                    }
                }
            },
        );
        tiles
    }

    /// These rows, rounded before as one set behind `first` others.
    pub(super) fn rounded(mut self, tiles: SharedTiles, first: usize) -> Self {
        let set = RowSet::new(first, self.n_rows, self.n_cols);
        self.int8 = Some((tiles, set));
        self
    }

    /// The rounded tile that starts at row `first`.
    pub(super) fn int8_tile(&self, tiles: SharedTiles, set: RowSet, first: usize) -> *const u8 {
        let in_front = first / self.share * self.share;
        let set = RowSet {
            first: set.first + in_front,
            n_rows: self.share.min(set.n_rows - in_front),
            ..set
        };
        tiles.tile(set, first - in_front)
    }

    pub(super) fn tile(&self, first: usize, len: usize) -> TileInput {
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

    pub(super) fn tile_len_max<S: Simd>(&self) -> usize {
        match self.int8 {
            Some(_) => S::TILE_TOKENS,
            None => S::TILE_TOKENS.min(F32_TILE_TOKENS),
        }
    }
}
