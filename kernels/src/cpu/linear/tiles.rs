//! Rows of activations cut into tiles of 16, 8, 4, 2 or 1, and rounded to int8 in the order the
//! kernels read them.
//!
//! Rounding is that of [`crate::quant::int8::round_group`].

use std::ops::Range;

use crate::{
    cpu::simd::{LANES, Simd},
    panel::GROUP_LEN,
};

/// Bytes of one row of a group: 32 codes, then f32 scale, i32 `-8 sum`, i32 `-128 sum`, f32
/// `scale * sum`, where sum is that of the codes.
pub(super) const ROW_BYTES: usize = GROUP_LEN + 16;
/// Bytes of one row of a group that only formats with halves need, behind all groups of a tile: i32
/// `-32 sum` of either half. Among the others they would be fetched for nothing.
pub(super) const HALVES_BYTES: usize = 8;
/// Bytes of one row of a group in all.
const BYTES: usize = ROW_BYTES + HALVES_BYTES;

/// `n_rows` in tiles of at most `len_max` (a power of two): whole ones first, then the powers of
/// two of what is left. Yields first row and length.
pub(super) fn tiles(n_rows: usize, len_max: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = n_rows - first;
        let len = if left >= len_max {
            len_max
        } else if left > 0 {
            1 << left.ilog2()
        } else {
            return None;
        };
        first += len;
        Some((first - len, len))
    })
}

/// First row and length of the tile that `row` of `n_rows` falls into.
fn tile_of(row: usize, n_rows: usize, len_max: usize) -> (usize, usize) {
    let whole = n_rows / len_max * len_max;
    if row < whole {
        return (row / len_max * len_max, len_max);
    }
    tiles(n_rows - whole, len_max)
        .map(|(first, len)| (whole + first, len))
        .find(|(first, len)| row < first + len)
        .unwrap_or((row, 1))
}

/// A cache line, so that tiles start at one.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(
    #[expect(dead_code, reason = "read through pointers to its bytes")] [u8; 64],
);

impl Line {
    pub(super) const ZERO: Self = Self([0; 64]);
}

/// Memory for rounded rows. A set of rows is in tiles, a tile is group after group, a group is the
/// codes of the tile's rows, then each kind of scale of the tile's rows; behind the groups come the
/// sums of halves, group after group, each kind of the tile's rows.
#[derive(Debug, Default)]
pub(in crate::cpu) struct Int8Tiles {
    lines: Vec<Line>,
}

/// Where a set of rows lies in [`Int8Tiles`].
#[derive(Debug, Clone, Copy)]
pub(super) struct RowSet {
    /// Rows in front of the set.
    pub(super) first: usize,
    pub(super) n_rows: usize,
    pub(super) n_groups: usize,
}

impl Int8Tiles {
    /// Bytes for `n_rows` rows of `n_cols` columns.
    pub(in crate::cpu) const fn bytes(n_rows: usize, n_cols: usize) -> usize {
        (n_rows * n_cols.div_ceil(GROUP_LEN) * BYTES).next_multiple_of(64)
    }

    /// Makes room for `n_rows` rows of `n_cols` columns.
    pub(in crate::cpu) fn reserve(&mut self, n_rows: usize, n_cols: usize) {
        let n_lines = Self::bytes(n_rows, n_cols) / 64;
        if self.lines.len() < n_lines {
            self.lines.resize(n_lines, Line::ZERO);
        }
    }

    /// A pointer for writers of disjoint rows.
    pub(super) fn shared(&mut self) -> SharedTiles {
        SharedTiles {
            first: self.lines.as_mut_ptr().cast(),
            len: self.lines.len() * 64,
        }
    }
}

/// [`Int8Tiles`] while several threads fill it, and while kernels read it.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedTiles {
    first: *mut u8,
    len: usize,
}

// SAFETY: writes go to disjoint rows and end before reads begin; both are unsafe and say so.
unsafe impl Send for SharedTiles {}
// SAFETY: as above.
unsafe impl Sync for SharedTiles {}

impl SharedTiles {
    /// The tile that starts at row `first` of `set`.
    pub(super) fn tile(self, set: RowSet, first: usize) -> *const u8 {
        let at = (set.first + first) * set.n_groups * BYTES;
        debug_assert!(at < self.len.max(1), "tile at {at} of {}", self.len);
        self.first.wrapping_add(at).cast_const()
    }

    /// Rounds groups `groups` of `x` into row `row` of `set`.
    ///
    /// # Safety
    /// The set fits the memory and no other thread touches those groups of the row.
    pub(super) unsafe fn round_groups<S: Simd>(
        self,
        simd: S,
        x: &[f32],
        row: usize,
        set: RowSet,
        groups: Range<usize>,
    ) {
        assert_eq!(x.len(), set.n_groups * GROUP_LEN, "a row of whole groups");
        let (first, len) = tile_of(row, set.n_rows, S::TILE_TOKENS);
        let t = row - first;
        let tile = self.tile(set, first).cast_mut();
        let halves = tile.wrapping_add(set.n_groups * len * ROW_BYTES);
        let values = &x.as_chunks::<GROUP_LEN>().0[groups.clone()];
        simd.vectorize(
            #[inline(always)]
            || {
                for (group, values) in groups.zip(values) {
                    // SAFETY: the caller promises the set's memory.
                    unsafe {
                        let block = tile.add(group * len * ROW_BYTES);
                        let halves = halves.add(group * len * HALVES_BYTES);
                        round_group(simd, values, block, halves.cast(), t, len);
                    }
                }
            },
        );
    }
}

/// # Safety
/// `block` holds a group of a tile of `len` rows and `half_sums` its sums of halves, `t < len`.
#[inline(always)]
#[expect(
    clippy::cast_precision_loss,
    reason = "a sum of 32 integers within -127..=127"
)]
unsafe fn round_group<S: Simd>(
    simd: S,
    values: &[f32; GROUP_LEN],
    block: *mut u8,
    half_sums: *mut i32,
    t: usize,
    len: usize,
) {
    // SAFETY: a group has 32 values and the caller promises the block.
    unsafe {
        let low = simd.load(values.as_ptr());
        let high = simd.load(values.as_ptr().add(LANES));
        let magnitude = simd.max(simd.abs(low), simd.abs(high));
        let scale = simd.largest(magnitude) / 127.0;
        let inverse = simd.splat(if scale > 0.0 { 1.0 / scale } else { 0.0 });
        let codes = block.add(t * GROUP_LEN).cast::<i8>();
        let halves = simd.round_i8(codes, [simd.mul(low, inverse), simd.mul(high, inverse)]);
        let sum = halves[0] + halves[1];
        let scales = block.add(len * GROUP_LEN).cast::<f32>();
        scales.add(t).write_unaligned(scale);
        let sums = scales.cast::<i32>();
        sums.add(len + t).write_unaligned(sum * -8);
        sums.add(2 * len + t).write_unaligned(sum * -128);
        scales.add(3 * len + t).write_unaligned(scale * sum as f32);
        half_sums.add(t).write_unaligned(halves[0] * -32);
        half_sums.add(len + t).write_unaligned(halves[1] * -32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_rows_find_their_tile() {
        for len_max in [1, 4, 16] {
            for n_rows in 0..70 {
                let mut next = 0;
                for (first, len) in tiles(n_rows, len_max) {
                    assert_eq!(first, next);
                    assert!(len <= len_max && len.is_power_of_two());
                    for row in first..first + len {
                        assert_eq!(tile_of(row, n_rows, len_max), (first, len));
                    }
                    next = first + len;
                }
                assert_eq!(next, n_rows);
            }
        }
    }
}
