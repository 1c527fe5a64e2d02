//! Who computes what: rows and panels cut into pieces of work.

use std::ops::Range;

use super::passes::{MATRIX_ROWS_MIN, PASS_ROWS};
use crate::{
    cpu::{pool::Pool, simd::Simd},
    panel::GROUP_LEN,
};

/// Rows of work in a piece, in units of one group of a panel on one row of activations (about 4
/// ns): enough to amortise handing the piece over, few enough to share out a small layer.
const PIECE_WORK: usize = 1024;
/// Rows of activations from which a thread unpacks weights for itself: unpacking is a tenth of the
/// work then.
pub(super) const SHARE_ROWS_MIN: usize = 2 * PASS_ROWS;
/// Threads up to which shares may be shorter: each reads all weights for itself, with 8 rows 12 GB/s.
pub(super) const FEW_THREADS: usize = 4;
/// Short shares are multiples of so many rows, as many as share a kernel's registers.
const SHORT_SHARE_ROWS: usize = 8;
/// Weights of a layer up to which shares may be shorter. 16 rows took two threads 3.2 ms with an output
/// layer of 30 MB when each read all of it, 2.0 ms when each read its half.
const SHORT_SHARE_BYTES: usize = 4 << 20;
/// Reading and unpacking a group's weights, in the unit of [`PIECE_WORK`].
const UNPACK_WORK: usize = 2;

/// Rows of activations that a piece of work is about, from where the threads' shares are long enough
/// for their own: what a thread wrote is then in its own caches when it goes on with it, instead of
/// in another's (16 rows of SmolLM2 on two threads: 5 % more tokens, 16 % where the threads' caches
/// seem to be far apart). Panels for the matrix unit are unpacked by every thread, so shares are
/// longer there; and weights of [`SHORT_SHARE_BYTES`] and more come from memory that all share, once.
pub(in crate::cpu) fn rows_per_piece<S: Simd>(
    simd: S,
    pool: &Pool,
    n_rows: usize,
    weight_bytes: usize,
) -> usize {
    let n_threads = pool.n_threads();
    let share = n_rows.div_ceil(n_threads);
    let short = share.next_multiple_of(SHORT_SHARE_ROWS);
    let idle_rows = short * n_threads - n_rows;
    let unpacks = MATRIX_ROWS_MIN <= n_rows && simd.amx().is_some();
    let is_read_once = unpacks || weight_bytes >= SHORT_SHARE_BYTES;
    let is_short = short < SHARE_ROWS_MIN && n_threads <= FEW_THREADS && !is_read_once;
    let rows = match is_short && 8 * idle_rows <= n_rows {
        true => short,
        false => share.next_multiple_of(PASS_ROWS).max(SHARE_ROWS_MIN),
    };
    rows.clamp(1, n_rows.max(1))
}

/// Panels of one piece of work on `n_tokens` rows.
pub(super) fn panels_per_piece(n_cols: usize, n_tokens: usize) -> usize {
    let work = n_cols / GROUP_LEN * (n_tokens + UNPACK_WORK);
    (PIECE_WORK / work.max(1)).max(1)
}

/// Panels cut into pieces of the same number of pairs, give or take one, as many for every thread:
/// with pieces as they come a thread did up to a fifth more than its share.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    n_panels: usize,
    pub(super) n_pieces: usize,
}

impl Cut {
    /// About `per_piece` panels in a piece.
    pub(super) fn new(n_panels: usize, per_piece: usize, n_threads: usize) -> Self {
        let n_pieces = n_panels
            .div_ceil(per_piece)
            .next_multiple_of(n_threads)
            .min(n_panels.div_ceil(2));
        Self { n_panels, n_pieces }
    }

    /// The panels of a piece.
    pub(super) fn piece(self, piece: usize) -> Range<usize> {
        let n_pairs = self.n_panels.div_ceil(2);
        let first = |piece: usize| (2 * (n_pairs * piece / self.n_pieces)).min(self.n_panels);
        first(piece)..first(piece + 1)
    }
}
