//! Panels whose codes are unpacked to bytes once and used for many rows of activations: signed ones by
//! the matrix unit, as below, unsigned ones by vectors ([`super::panels`]).
//!
//! Invariant: an output has the bits that [`super::panels`] gives it: products of a group are
//! summed exactly, and scales enter in the same operations and the same order.

use std::{mem::MaybeUninit, ptr};

use super::tiles::{Line, ROW_BYTES};
use crate::{
    cpu::simd::{
        LANES, Simd,
        amx::{AmxUnit, N_SLOTS, TILE_LEN},
    },
    panel::{GROUP_LEN, PANEL_ROWS},
};

/// Bytes of a group's codes.
pub(super) const CODE_BYTES: usize = GROUP_LEN * PANEL_ROWS;
/// Bytes of one f32 for every row.
pub(super) const SCALE_BYTES: usize = 4 * PANEL_ROWS;
/// Bytes of a group: codes, scales, minima.
const GROUP_BYTES: usize = CODE_BYTES + 2 * SCALE_BYTES;

/// Memory for one unpacked panel: all groups' codes, then all scales, then all minima.
#[derive(Debug, Default)]
pub(super) struct Unpacked {
    lines: Vec<Line>,
}

impl Unpacked {
    /// Bytes for panels of `n_cols` columns.
    pub(super) const fn bytes(n_cols: usize) -> usize {
        n_cols.div_ceil(GROUP_LEN) * GROUP_BYTES
    }

    /// Makes room for panels of `n_cols` columns.
    pub(super) fn reserve(&mut self, n_cols: usize) {
        let n_lines = Self::bytes(n_cols).div_ceil(size_of::<Line>());
        if self.lines.len() < n_lines {
            self.lines.resize(n_lines, Line::ZERO);
        }
    }

    /// Where an unpacked panel of `n_cols` columns goes.
    pub(super) fn room(&mut self, n_cols: usize) -> *mut u8 {
        self.reserve(n_cols);
        self.lines.as_mut_ptr().cast()
    }
}

/// One unpacked panel against one tile of [`TILE_LEN`] rounded rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    /// Unpacked with as many groups as the tile has.
    pub(super) panel: *const u8,
    /// The tile.
    pub(super) rows: *const u8,
    /// [`TILE_LEN`] rows of 16 sums.
    pub(super) out: *mut [f32; LANES],
}

/// Computes products one after the other, without a pause of the unit between them.
///
/// # Safety
/// Panels and tiles hold `n_groups` groups, and the outputs are writable.
pub(super) unsafe fn multiply<S: Simd, const HAS_MIN: bool>(
    simd: S,
    unit: &AmxUnit,
    n_groups: usize,
    products: &[Product],
) {
    /// Groups between the start of a group's integer product and its writing to memory, and
    /// between that and its addition to the sums. The unit takes a while for a product and so
    /// does the memory for its 16 lines (16 rows, 576 columns, without a wait 650 Gop/s, so 950).
    const LAG: usize = 2;
    let mut integers = MaybeUninit::<Integers>::uninit();
    let integers = integers.as_mut_ptr().cast::<i32>();
    simd.vectorize(
        #[inline(always)]
        move || {
            let n_steps = n_groups * products.len();
            let (mut started, mut added) = (products.iter(), products.iter());
            // The product being started and its next group; likewise the one being added up.
            let (mut rows, mut weights, mut start_group) = (ptr::null(), ptr::null(), n_groups);
            let (mut scales, mut factors, mut add_group) = (ptr::null(), ptr::null(), 0);
            let mut sums = [simd.splat(0.0); TILE_LEN];
            let mut first = 0;
            // SAFETY: the caller promises panels, tiles and outputs; cursors stay inside because
            // each counts its groups.
            unsafe {
                macro_rules! step {
                    ($slot:literal) => {{
                        let step = first + $slot;
                        let integers = integers.add($slot % LAG * TILE_LEN * LANES);
                        if 2 * LAG <= step && step < n_steps + 2 * LAG {
                            if add_group == 0
                                && let Some(product) = added.as_slice().first()
                            {
                                scales = product.panel.add(n_groups * CODE_BYTES).cast::<f32>();
                                factors = product.rows.add(TILE_LEN * GROUP_LEN).cast::<f32>();
                            }
                            let scale = simd.load(scales);
                            for (t, sum) in sums.iter_mut().enumerate() {
                                let integer = simd.to_f(simd.load_i(integers.add(t * LANES)));
                                let scale = simd.mul(scale, simd.splat(*factors.add(t)));
                                *sum = simd.fma(integer, scale, *sum);
                            }
                            if HAS_MIN {
                                let min = simd.load(scales.add(n_groups * LANES));
                                let row_sums = factors.add(3 * TILE_LEN);
                                for (t, sum) in sums.iter_mut().enumerate() {
                                    *sum = simd.fma(min, simd.splat(*row_sums.add(t)), *sum);
                                }
                            }
                            scales = scales.add(LANES);
                            factors = factors.byte_add(TILE_LEN * ROW_BYTES);
                            add_group += 1;
                            if add_group == n_groups
                                && let Some(product) = added.next()
                            {
                                add_group = 0;
                                for (t, sum) in sums.iter_mut().enumerate() {
                                    simd.store(product.out.add(t).cast(), *sum);
                                    *sum = simd.splat(0.0);
                                }
                            }
                        }
                        if LAG <= step && step < n_steps + LAG {
                            const WRITTEN: usize = ($slot + LAG) % N_SLOTS;
                            unit.store::<WRITTEN>(integers);
                        }
                        if step < n_steps {
                            if start_group == n_groups
                                && let Some(product) = started.next()
                            {
                                (rows, weights) = (product.rows, product.panel);
                                start_group = 0;
                            }
                            unit.multiply::<$slot>(rows, weights);
                            rows = rows.add(TILE_LEN * ROW_BYTES);
                            weights = weights.add(CODE_BYTES);
                            start_group += 1;
                        }
                    }};
                }
                while first < n_steps + 2 * LAG {
                    step!(0);
                    step!(1);
                    step!(2);
                    step!(3);
                    first += N_SLOTS;
                }
            }
        },
    );
}

/// Results of the unit on their way to the sums.
#[repr(align(64))]
struct Integers(
    #[expect(dead_code, reason = "written and read by pointer")] [[i32; TILE_LEN * LANES]; 2],
);
