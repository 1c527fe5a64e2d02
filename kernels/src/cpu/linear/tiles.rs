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

impl RowSet {
    /// `n_rows` rows of `n_cols` columns behind `first` others.
    pub(super) fn new(first: usize, n_rows: usize, n_cols: usize) -> Self {
        Self {
            first,
            n_rows,
            n_groups: n_cols / GROUP_LEN,
        }
    }
}

impl Int8Tiles {
    /// Bytes for `n_rows` rows of `n_cols` columns.
    pub(in crate::cpu) const fn bytes(n_rows: usize, n_cols: usize) -> usize {
        (n_rows * n_cols.div_ceil(GROUP_LEN) * BYTES).next_multiple_of(64)
    }

    /// Room for `n_rows` rows of `n_cols` columns, for writers of disjoint parts.
    pub(in crate::cpu) fn room(&mut self, n_rows: usize, n_cols: usize) -> SharedTiles {
        self.reserve(n_rows, n_cols);
        SharedTiles {
            first: self.lines.as_mut_ptr().cast(),
            len: self.lines.len() * 64,
        }
    }

    /// Makes room for `n_rows` rows of `n_cols` columns.
    pub(in crate::cpu) fn reserve(&mut self, n_rows: usize, n_cols: usize) {
        let n_lines = Self::bytes(n_rows, n_cols) / 64;
        if self.lines.len() < n_lines {
            self.lines.resize(n_lines, Line::ZERO);
        }
    }
}

/// [`Int8Tiles`] while several threads fill it, and while kernels read it.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct SharedTiles {
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

    /// Rounds groups `groups` of rows `rows` of `set`, of which row `i` begins at `x(i)`.
    ///
    /// # Safety
    /// Those groups of the rows are readable, the set fits the memory and no other thread touches what is
    /// written of it.
    pub(super) unsafe fn round_rows<S: Simd>(
        self,
        simd: S,
        x: impl Fn(usize) -> *const f32,
        rows: Range<usize>,
        set: RowSet,
        groups: &Range<usize>,
    ) {
        let mut row = rows.start;
        while row < rows.end {
            let (first, len) = tile_of(row, set.n_rows, S::TILE_TOKENS);
            let place = Place {
                tile: self.tile(set, first).cast_mut(),
                n_groups: set.n_groups,
            };
            let is_whole = first == row && row + len <= rows.end;
            // SAFETY: passed on from the caller.
            unsafe {
                row += match (is_whole, len) {
                    (true, 16) => place.round_tile::<S, 16>(simd, |t| x(first + t), groups),
                    (true, 8) => place.round_tile::<S, 8>(simd, |t| x(first + t), groups),
                    (true, 4) => place.round_tile::<S, 4>(simd, |t| x(first + t), groups),
                    (true, 2) => place.round_tile::<S, 2>(simd, |t| x(first + t), groups),
                    (true, 1) => place.round_tile::<S, 1>(simd, |t| x(first + t), groups),
                    _ => {
                        place.round_row(simd, x(row), row - first, len, groups.clone());
                        1
                    }
                };
            }
        }
    }
}

/// A tile in memory.
#[derive(Clone, Copy)]
struct Place {
    tile: *mut u8,
    n_groups: usize,
}

impl Place {
    /// Group `group` of a tile of `len` rows, and its sums of halves.
    fn group(self, group: usize, len: usize) -> (*mut u8, *mut i32) {
        let halves = self.n_groups * len * ROW_BYTES + group * len * HALVES_BYTES;
        let block = self.tile.wrapping_add(group * len * ROW_BYTES);
        (block, self.tile.wrapping_add(halves).cast())
    }

    /// Rounds groups `groups` of all `LEN` rows of a tile, as many of them at once as a vector has
    /// lanes; returns `LEN`.
    ///
    /// # Safety
    /// Those groups are readable, and the tile's are this thread's.
    unsafe fn round_tile<S: Simd, const LEN: usize>(
        self,
        simd: S,
        x: impl Fn(usize) -> *const f32,
        groups: &Range<usize>,
    ) -> usize {
        let at_once = LANES / LEN;
        let rows = std::array::from_fn::<_, LEN, _>(&x);
        let rest = groups.end - groups.len() % at_once..groups.end;
        simd.vectorize(
            #[inline(always)]
            || {
                for first in (groups.start..rest.start).step_by(at_once) {
                    let (mut from, mut codes) = ([rows[0]; LANES], [self.tile.cast::<i8>(); LANES]);
                    for i in 0..LANES {
                        let (group, t) = (first + i / LEN, i % LEN);
                        from[i] = rows[t].wrapping_add(group * GROUP_LEN);
                        codes[i] = self.group(group, LEN).0.wrapping_add(t * GROUP_LEN).cast();
                    }
                    // SAFETY: promised by the caller.
                    unsafe {
                        let (scales, sums) = simd.round_groups(&from, &codes);
                        for i in 0..at_once {
                            let (block, half_sums) = self.group(first + i, LEN);
                            let of = |sums: &[i32; LANES]| {
                                *sums.as_ptr().add(i * LEN).cast::<[i32; LEN]>()
                            };
                            let halves = [of(&sums[0]), of(&sums[1])];
                            let scales = *scales.as_ptr().add(i * LEN).cast::<[f32; LEN]>();
                            put_scales(&scales, &halves, block, half_sums, 0, LEN);
                        }
                    }
                }
            },
        );
        for (t, row) in rows.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { self.round_row(simd, row, t, LEN, rest.clone()) };
        }
        LEN
    }

    /// Rounds groups `groups` of the row at `x` into row `t` of a tile of `len`.
    ///
    /// # Safety
    /// Those groups are readable, and the tile's are this thread's.
    unsafe fn round_row<S: Simd>(
        self,
        simd: S,
        x: *const f32,
        t: usize,
        len: usize,
        groups: Range<usize>,
    ) {
        simd.vectorize(
            #[inline(always)]
            || {
                for group in groups {
                    let (block, half_sums) = self.group(group, len);
                    let values = x.wrapping_add(group * GROUP_LEN);
                    // SAFETY: the caller promises values and tile.
                    unsafe { round_group(simd, values, block, half_sums, t, len) };
                }
            },
        );
    }
}

/// Writes scales and sums of halves of rows `t..t + N` of a group of a tile of `len` rows.
///
/// # Safety
/// `block` holds the group and `half_sums` its sums of halves, `t + N <= len`.
#[inline(always)]
#[expect(
    clippy::cast_precision_loss,
    reason = "a sum of 32 integers within -127..=127"
)]
unsafe fn put_scales<const N: usize>(
    scales: &[f32; N],
    halves: &[[i32; N]; 2],
    block: *mut u8,
    half_sums: *mut i32,
    t: usize,
    len: usize,
) {
    let mut sums = [0; N];
    let (mut by_8, mut by_128, mut scaled) = ([0; N], [0; N], [0.0; N]);
    let mut by_32 = [[0; N]; 2];
    for i in 0..N {
        sums[i] = halves[0][i] + halves[1][i];
        by_8[i] = sums[i] * -8;
        by_128[i] = sums[i] * -128;
        scaled[i] = scales[i] * sums[i] as f32;
        by_32[0][i] = halves[0][i] * -32;
        by_32[1][i] = halves[1][i] * -32;
    }
    // SAFETY: promised by the caller.
    unsafe {
        let to = block.add(len * GROUP_LEN).cast::<f32>().add(t);
        to.cast::<[f32; N]>().write_unaligned(*scales);
        to.add(len).cast::<[i32; N]>().write_unaligned(by_8);
        to.add(2 * len).cast::<[i32; N]>().write_unaligned(by_128);
        to.add(3 * len).cast::<[f32; N]>().write_unaligned(scaled);
        let to = half_sums.add(t);
        to.cast::<[i32; N]>().write_unaligned(by_32[0]);
        to.add(len).cast::<[i32; N]>().write_unaligned(by_32[1]);
    }
}

/// # Safety
/// `values` is a group, `block` one of a tile of `len` rows and `half_sums` its sums of halves, `t < len`.
#[inline(always)]
unsafe fn round_group<S: Simd>(
    simd: S,
    values: *const f32,
    block: *mut u8,
    half_sums: *mut i32,
    t: usize,
    len: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let codes = block.add(t * GROUP_LEN).cast::<i8>();
        let (scale, halves) = simd.round_group(values, codes);
        put_scales(&[scale], &halves.map(|sum| [sum]), block, half_sums, t, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cpu::simd, quant::int8};

    /// All rows of a set, in parts, are what the definition gives, whatever tile they fall into.
    fn check_rounding<S: Simd>(simd: S) {
        let mut state = 1u32;
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from((state >> 16) as i16) / 3e3
        };
        for (n_rows, n_groups) in [(1, 1), (1, 37), (2, 20), (7, 5), (16, 3), (24, 18), (47, 4)] {
            let mut x = (0..n_rows * n_groups * GROUP_LEN)
                .map(|_| value())
                .collect::<Vec<_>>();
            x[..GROUP_LEN].fill(0.0);
            let row = |row: usize| &x[row * n_groups * GROUP_LEN..][..n_groups * GROUP_LEN];
            let mut memory = Int8Tiles::default();
            let tiles = memory.room(n_rows + 3, n_groups * GROUP_LEN);
            let set = RowSet {
                first: 3,
                n_rows,
                n_groups,
            };
            let (rows, groups) = (n_rows / 3 + 1, n_groups / 2);
            for rows in [0..rows, rows..n_rows] {
                for groups in [0..groups, groups..n_groups] {
                    // SAFETY: rows are whole, the memory was reserved for them, and this is the only thread.
                    unsafe {
                        let start = |i| row(i).as_ptr();
                        tiles.round_rows(simd, start, rows.clone(), set, &groups);
                    };
                }
            }
            for (r, group) in (0..n_rows).flat_map(|r| (0..n_groups).map(move |g| (r, g))) {
                let (first, len) = tile_of(r, n_rows, S::TILE_TOKENS);
                let place = Place {
                    tile: tiles.tile(set, first).cast_mut(),
                    n_groups,
                };
                let (block, half_sums) = place.group(group, len);
                let values = &row(r).as_chunks::<GROUP_LEN>().0[group];
                let mut codes = [0; GROUP_LEN];
                let scale = int8::round_group(values, &mut codes);
                let sum = |codes: &[i8]| codes.iter().map(|c| i32::from(*c)).sum::<i32>();
                let (low, high) = codes.split_at(GROUP_LEN / 2);
                let t = r - first;
                // SAFETY: a group of a tile, all of it written.
                unsafe {
                    let found = block.add(t * GROUP_LEN).cast::<[i8; GROUP_LEN]>().read();
                    assert_eq!(found, codes, "{n_rows} rows, row {r}, group {group}");
                    let scales = block.add(len * GROUP_LEN).cast::<f32>();
                    let f32_at = |i: usize| scales.add(i * len + t).read_unaligned();
                    let i32_at = |i: usize| f32_at(i).to_bits().cast_signed();
                    let all = sum(&codes);
                    assert_eq!(f32_at(0).to_bits(), scale.to_bits());
                    assert_eq!((i32_at(1), i32_at(2)), (all * -8, all * -128));
                    assert_eq!(f32_at(3).to_bits(), (scale * all as f32).to_bits());
                    let halves = [0, len].map(|at| half_sums.add(at + t).read_unaligned());
                    assert_eq!(halves, [sum(low) * -32, sum(high) * -32]);
                }
            }
        }
    }

    #[test]
    fn rows_are_rounded_as_the_definition_says_in_every_tile() {
        check_rounding(simd::Portable);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(set) = simd::Avx2::probe() {
                check_rounding(set);
            }
            if let Some(set) = simd::Avx512::probe_for(false) {
                check_rounding(set);
            }
        }
    }

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
