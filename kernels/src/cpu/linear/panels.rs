//! Panels of block-quantized weights against tiles of activations.
//!
//! One lane is one weight row. In int8, the 32 products of a group are summed exactly and each
//! group is added in f32, groups in column order; in f32, every column is one fused multiply-add,
//! columns in order. Neither depends on how many rows of activations share the pass.

use super::{
    tiles::{HALVES_BYTES, ROW_BYTES},
    unpacked::{CODE_BYTES, SCALE_BYTES},
};
use crate::{
    cpu::simd::{LANES, Simd},
    dtype::Format,
    panel::{GROUP_LEN, GROUPS_PER_BLOCK, PANEL_ROWS, PanelLayout},
};

/// How far ahead weights are asked for, into the second-level cache:
/// its outstanding misses are many more than the first level's, and a short distance leaves them
/// idle (12 GB/s at 4 KiB, 28 GB/s at 32 KiB). Experts of 16 rows take 4 % less with 64 KiB than with 32,
/// and more again with 256.
pub(super) const PREFETCH_BYTES: usize = 65_536;
/// Rows of f32 activations that share a pass at most: more addresses than this do not stay in
/// registers.
pub(super) const F32_TILE_TOKENS: usize = 8;
/// Tile lengths, as powers of two.
pub(super) const N_TILE_LENS: usize = 5;

/// What a tile of activations is read from.
#[derive(Debug, Clone, Copy)]
pub(super) enum TileInput {
    /// A tile of [`super::tiles::Int8Tiles`].
    Int8(*const u8),
    /// Rows of f32; those past the tile's length are not read.
    F32([*const f32; F32_TILE_TOKENS]),
}

/// Panels that a pass takes at once at most.
pub(super) const PANELS_MAX: usize = 4;

/// `outs[p][t][r] = row r of panel p . row t of the input` over `n_groups` groups, for up to
/// [`PANELS_MAX`] panels.
///
/// Panels and input must hold that many groups; input and outputs as many rows as the function was
/// made for. `ahead` are panels to ask for meanwhile, or null.
pub(super) type TileFn<S> = unsafe fn(
    S,
    &[*const u8],
    usize,
    &TileInput,
    outs: &[*mut [f32; LANES]; PANELS_MAX],
    ahead: &[*const u8; PANELS_MAX],
);

/// The kernels of a format for tiles of 1, 2, 4, 8 and 16 rows.
pub(super) fn tile_fns<S: Simd>(format: Format, int8: bool) -> [TileFn<S>; N_TILE_LENS] {
    match format {
        Format::Q4_0 => fns::<S, Q4_0>(int8),
        Format::Q4_1 => fns::<S, Q4_1>(int8),
        Format::Q5_0 => fns::<S, Q5_0>(int8),
        Format::Q5_1 => fns::<S, Q5_1>(int8),
        Format::Q8_0 => fns::<S, Q8_0>(int8),
        Format::Q4K => fns::<S, Q4K>(int8),
        Format::Q5K => fns::<S, Q5K>(int8),
        Format::Q6K => fns::<S, Q6K>(int8),
        Format::Int8 => fns::<S, Int8>(int8),
        Format::Int4 => fns::<S, Int4>(int8),
        Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => {
            unreachable!("plain formats are not stored in panels")
        }
    }
}

/// Writes a panel of so many groups where [`super::unpacked`] reads it, in as much room as its
/// [`Unpacked::bytes`](super::unpacked::Unpacked::bytes); the last argument is a panel to ask for
/// meanwhile, or null.
pub(super) type UnpackFn<S> = unsafe fn(S, *const u8, usize, *mut u8, *const u8);

/// How a format is unpacked for the matrix unit; `None` for formats with halves, whose products are
/// too short for it.
pub(super) fn unpack_fn<S: Simd>(format: Format) -> Option<UnpackFn<S>> {
    match format {
        Format::Q4_0 => Some(unpack::<S, Q4_0, true>),
        Format::Q4_1 => Some(unpack::<S, Q4_1, true>),
        Format::Q5_0 => Some(unpack::<S, Q5_0, true>),
        Format::Q5_1 => Some(unpack::<S, Q5_1, true>),
        Format::Q8_0 => Some(unpack::<S, Q8_0, true>),
        Format::Q4K => Some(unpack::<S, Q4K, true>),
        Format::Q5K => Some(unpack::<S, Q5K, true>),
        Format::Int8 => Some(unpack::<S, Int8, true>),
        Format::Int4 => Some(unpack::<S, Int4, true>),
        Format::Q6K | Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => None,
    }
}

/// How a format whose codes are less than a byte is unpacked for vectors, and the kernels for that:
/// taking it apart anew for every six rows is an eighth of their instructions.
pub(super) fn bytes_fns<S: Simd>(
    format: Format,
) -> Option<(UnpackFn<S>, [TileFn<S>; N_TILE_LENS])> {
    match format {
        Format::Q4_0 => Some((unpack::<S, Q4_0, false>, fns::<S, Bytes<8, false>>(true))),
        Format::Q4_1 => Some((unpack::<S, Q4_1, false>, fns::<S, Bytes<0, true>>(true))),
        Format::Q5_0 => Some((unpack::<S, Q5_0, false>, fns::<S, Bytes<16, false>>(true))),
        Format::Q5_1 => Some((unpack::<S, Q5_1, false>, fns::<S, Bytes<0, true>>(true))),
        Format::Q4K => Some((unpack::<S, Q4K, false>, fns::<S, Bytes<0, true>>(true))),
        Format::Q5K => Some((unpack::<S, Q5K, false>, fns::<S, Bytes<0, true>>(true))),
        Format::Int4 => Some((unpack::<S, Int4, false>, fns::<S, Bytes<0, true>>(true))),
        _ => None,
    }
}

/// Whether a format has minima.
pub(super) fn has_min(format: Format) -> bool {
    matches!(
        format,
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K | Format::Int4
    )
}

fn fns<S: Simd, P: PanelFormat>(int8: bool) -> [TileFn<S>; N_TILE_LENS] {
    if !int8 {
        let four = f32_tiles::<S, P, 4>;
        let most = if S::TILE_TOKENS >= F32_TILE_TOKENS {
            f32_tiles::<S, P, F32_TILE_TOKENS>
        } else {
            four
        };
        return [f32_tiles::<S, P, 1>, f32_tiles::<S, P, 2>, four, most, most];
    }
    let (one, two, four) = (
        int8_tiles::<S, P, 1>,
        int8_tiles::<S, P, 2>,
        int8_tiles::<S, P, 4>,
    );
    if S::TILE_TOKENS >= 16 {
        [
            one,
            two,
            four,
            int8_tiles::<S, P, 8>,
            int8_tiles::<S, P, 16>,
        ]
    } else {
        [one, two, four, four, four]
    }
}

/// The parts of a panel.
#[derive(Debug, Clone, Copy)]
struct Panel {
    codes: *const u8,
    scales: *const u8,
    blocks: *const u8,
    rows: *const u8,
}

/// Scales of a group: `value = scale * (code - ZERO) + min`.
struct Scales<S: Simd> {
    /// Of columns 0..16 and 16..32; the same where the format has no halves.
    scale: [S::F; 2],
    min: S::F,
}

impl<S: Simd> Clone for Scales<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Simd> Copy for Scales<S> {}

/// A block format in panels, as [`crate::panel`] describes it.
trait PanelFormat: Sized + 'static {
    const FORMAT: Format;
    /// The code of value 0 before the minimum.
    const ZERO: u8;
    const HAS_MIN: bool;
    const HAS_HALVES: bool;
    /// Bytes of a group's codes.
    const CODE_BYTES: usize = layout::<Self>().code_bytes;

    /// # Safety
    /// `panel` points at a panel of `n_groups` groups.
    #[inline(always)]
    unsafe fn parts(panel: *const u8, n_groups: usize) -> Panel {
        let layout = layout::<Self>();
        // SAFETY: offsets inside the panel.
        unsafe {
            Panel {
                codes: panel,
                scales: panel.add(layout.scales_at(n_groups)),
                blocks: panel.add(layout.blocks_at(n_groups)),
                rows: panel.add(layout.rows_at(n_groups)),
            }
        }
    }
    /// Quad `q` of a group.
    ///
    /// # Safety
    /// `codes` points at a group's, `q < 8`.
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B;
    /// The quads of a group.
    ///
    /// # Safety
    /// `codes` points at a group's.
    #[inline(always)]
    unsafe fn quads<S: Simd>(simd: S, codes: *const u8) -> [S::B; 8] {
        // SAFETY: promised by the caller.
        unsafe {
            [
                Self::quad(simd, codes, 0),
                Self::quad(simd, codes, 1),
                Self::quad(simd, codes, 2),
                Self::quad(simd, codes, 3),
                Self::quad(simd, codes, 4),
                Self::quad(simd, codes, 5),
                Self::quad(simd, codes, 6),
                Self::quad(simd, codes, 7),
            ]
        }
    }
    /// The scales of group `group`.
    ///
    /// # Safety
    /// The panel holds the group.
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S>;
}

/// Quad `q` where the first four are low nibbles and the others the high ones of the same bytes.
///
/// # Safety
/// 256 bytes are readable, `q < 8`.
#[inline(always)]
unsafe fn nibbles<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
    // SAFETY: promised by the caller.
    let bytes = unsafe { simd.load_bytes(codes.add(64 * (q % 4))) };
    match q < 4 {
        true => simd.low_nibbles(bytes),
        false => simd.high_nibbles(bytes),
    }
}

/// Quad `q` where 64 bytes of fifth bits follow the nibbles.
///
/// # Safety
/// 320 bytes are readable, `q < 8`.
#[inline(always)]
unsafe fn five_bits<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
    // SAFETY: promised by the caller.
    unsafe {
        let high = simd.load_bytes(codes.add(256));
        simd.or(nibbles(simd, codes, q), simd.fifth_bit(high, q))
    }
}

/// Quad `q` where a code is a byte.
///
/// # Safety
/// 512 bytes are readable, `q < 8`.
#[inline(always)]
unsafe fn bytes<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
    // SAFETY: promised by the caller.
    unsafe { simd.load_bytes(codes.add(64 * q)) }
}

/// One f16 per row, a group.
#[inline(always)]
unsafe fn one_scale<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
    // SAFETY: promised by the caller.
    let d = unsafe { simd.load_f16(panel.scales.add(group * 2 * LANES)) };
    Scales {
        scale: [d; 2],
        min: simd.splat(0.0),
    }
}

/// `d` and `m` f16 per row, a group.
#[inline(always)]
unsafe fn scale_and_min<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
    // SAFETY: promised by the caller.
    unsafe {
        let at = panel.scales.add(group * 4 * LANES);
        Scales {
            scale: [simd.load_f16(at); 2],
            min: simd.load_f16(at.add(2 * LANES)),
        }
    }
}

/// A scale and a minimum u8 per row, a group, times the `d` and `dmin` f16 of its block.
#[inline(always)]
unsafe fn shared_scale_and_min<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
    // SAFETY: promised by the caller.
    unsafe {
        let own = panel.scales.add(group * 2 * LANES);
        let shared = panel.blocks.add(group / GROUPS_PER_BLOCK * 4 * LANES);
        let scale = simd.mul(simd.load_f16(shared), simd.load_u8(own));
        let min = simd.mul(
            simd.load_f16(shared.add(2 * LANES)),
            simd.load_u8(own.add(LANES)),
        );
        Scales {
            scale: [scale; 2],
            min: simd.sub(simd.splat(0.0), min),
        }
    }
}

enum Q4_0 {}
impl PanelFormat for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const ZERO: u8 = 8;
    const HAS_MIN: bool = false;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { nibbles(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { one_scale(simd, panel, group) }
    }
}

enum Q4_1 {}
impl PanelFormat for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const ZERO: u8 = 0;
    const HAS_MIN: bool = true;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { nibbles(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { scale_and_min(simd, panel, group) }
    }
}

enum Q5_0 {}
impl PanelFormat for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const ZERO: u8 = 16;
    const HAS_MIN: bool = false;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { five_bits(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { one_scale(simd, panel, group) }
    }
}

enum Q5_1 {}
impl PanelFormat for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const ZERO: u8 = 0;
    const HAS_MIN: bool = true;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { five_bits(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { scale_and_min(simd, panel, group) }
    }
}

enum Q8_0 {}
impl PanelFormat for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const ZERO: u8 = 128;
    const HAS_MIN: bool = false;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { bytes(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { one_scale(simd, panel, group) }
    }
}

enum Int8 {}
impl PanelFormat for Int8 {
    const FORMAT: Format = Format::Int8;
    const ZERO: u8 = 128;
    const HAS_MIN: bool = false;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { bytes(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, _group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        let scale = unsafe { simd.load(panel.rows.cast()) };
        Scales {
            scale: [scale; 2],
            min: simd.splat(0.0),
        }
    }
}

enum Int4 {}
impl PanelFormat for Int4 {
    const FORMAT: Format = Format::Int4;
    const ZERO: u8 = 0;
    const HAS_MIN: bool = true;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { nibbles(simd, codes, q) }
    }
    /// The minimum is exact: a scale has 11 significant bits, a zero 5, their product fits f32's 24.
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe {
            let at = panel.scales.add(group * 3 * LANES);
            let (scale, zero) = (simd.load_f16(at), simd.load_u8(at.add(2 * LANES)));
            Scales {
                scale: [scale; 2],
                min: simd.sub(simd.splat(0.0), simd.mul(scale, zero)),
            }
        }
    }
}

enum Q4K {}
impl PanelFormat for Q4K {
    const FORMAT: Format = Format::Q4K;
    const ZERO: u8 = 0;
    const HAS_MIN: bool = true;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { nibbles(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { shared_scale_and_min(simd, panel, group) }
    }
}

enum Q5K {}
impl PanelFormat for Q5K {
    const FORMAT: Format = Format::Q5K;
    const ZERO: u8 = 0;
    const HAS_MIN: bool = true;
    const HAS_HALVES: bool = false;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { five_bits(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe { shared_scale_and_min(simd, panel, group) }
    }
}

enum Q6K {}
impl PanelFormat for Q6K {
    const FORMAT: Format = Format::Q6K;
    const ZERO: u8 = 32;
    const HAS_MIN: bool = false;
    const HAS_HALVES: bool = true;

    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller: 384 bytes.
        unsafe {
            let high = simd.load_bytes(codes.add(256 + 64 * (q / 4)));
            simd.or(nibbles(simd, codes, q), simd.bit_pairs(high, q % 4))
        }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller.
        unsafe {
            let own = panel.scales.add(group * 2 * LANES);
            let d = simd.load_f16(panel.blocks.add(group / GROUPS_PER_BLOCK * 2 * LANES));
            Scales {
                scale: [
                    simd.mul(d, simd.load_i8(own)),
                    simd.mul(d, simd.load_i8(own.add(LANES))),
                ],
                min: simd.splat(0.0),
            }
        }
    }
}

/// Any format with codes of less than a byte, unpacked ([`super::unpacked`]) and not recentered.
enum Bytes<const ZERO: u8, const HAS_MIN: bool> {}
impl<const ZERO: u8, const HAS_MIN: bool> PanelFormat for Bytes<ZERO, HAS_MIN> {
    /// Of the panels to ask for, and nobody asks: that was done while these were unpacked.
    const FORMAT: Format = Format::Q8_0;
    const ZERO: u8 = ZERO;
    const HAS_MIN: bool = HAS_MIN;
    const HAS_HALVES: bool = false;
    const CODE_BYTES: usize = CODE_BYTES;

    #[inline(always)]
    unsafe fn parts(panel: *const u8, n_groups: usize) -> Panel {
        // SAFETY: offsets inside the panel.
        unsafe {
            let scales = panel.add(n_groups * CODE_BYTES);
            Panel {
                codes: panel,
                scales,
                blocks: scales.add(n_groups * SCALE_BYTES),
                rows: panel,
            }
        }
    }
    #[inline(always)]
    unsafe fn quad<S: Simd>(simd: S, codes: *const u8, q: usize) -> S::B {
        // SAFETY: promised by the caller.
        unsafe { bytes(simd, codes, q) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(simd: S, panel: &Panel, group: usize) -> Scales<S> {
        // SAFETY: promised by the caller; minima are there where the format has some.
        unsafe {
            let at = group * SCALE_BYTES;
            Scales {
                scale: [simd.load(panel.scales.add(at).cast()); 2],
                min: match HAS_MIN {
                    true => simd.load(panel.blocks.add(at).cast()),
                    false => simd.splat(0.0),
                },
            }
        }
    }
}

/// Asks for group `group`'s share of the panel `ahead`, which may be null: every `PARTS`th line of it
/// from line `PART` on.
#[inline(always)]
fn ask<S: Simd, const PART: usize, const PARTS: usize>(
    simd: S,
    ahead: *const u8,
    group: usize,
    layout: PanelLayout,
) {
    if ahead.is_null() {
        return;
    }
    let bytes = layout.code_bytes + layout.scale_bytes;
    for line in (PART * 64..bytes).step_by(PARTS * 64) {
        simd.prefetch(ahead.wrapping_add(group * bytes + line));
    }
}

const fn layout<P: PanelFormat>() -> PanelLayout {
    match PanelLayout::of(P::FORMAT) {
        Some(layout) => layout,
        None => unreachable!(),
    }
}

/// See [`TileFn`].
unsafe fn int8_tiles<S: Simd, P: PanelFormat, const T: usize>(
    simd: S,
    panels: &[*const u8],
    n_groups: usize,
    input: &TileInput,
    outs: &[*mut [f32; LANES]; PANELS_MAX],
    ahead: &[*const u8; PANELS_MAX],
) {
    let &TileInput::Int8(x) = input else {
        unreachable!("int8 kernels get int8 tiles")
    };
    let mut first = 0;
    // SAFETY: passed on from the caller; `first` counts panels.
    unsafe {
        while first < panels.len() {
            let (panels, outs, ahead) = (&panels[first..], &outs[first..], &ahead[first..]);
            // What two panels read of a row is used for both, and chains of products run beside each
            // other. As many rows as leave registers for sums, products and weights: 77 % of the dot
            // products' peak with 6 rows of two panels, 75 with 8 rows of one, 74 with 4 of two, 57
            // with 4 of one.
            let two = S::TILE_TOKENS >= 16 && panels.len() >= 2;
            macro_rules! pass {
                ($n:literal, $parts:literal: $($part:literal: $first:literal + $rows:expr),+) => {{
                    $(
                        int8_pass::<S, P, T, { $rows }, $n, $part, $parts>(
                            simd, panels, n_groups, x, $first, outs, ahead,
                        );
                    )+
                    $n
                }};
            }
            first += match T {
                1 if panels.len() >= 4 => pass!(4, 1: 0: 0 + T),
                1 | 2 if panels.len() >= 2 => pass!(2, 1: 0: 0 + T),
                4 if two => pass!(2, 1: 0: 0 + T),
                16 if two => pass!(2, 3: 0: 0 + 6, 1: 6 + 6, 2: 12 + 4),
                16 => pass!(1, 2: 0: 0 + 8, 1: 8 + 8),
                _ => pass!(1, 1: 0: 0 + T),
            };
        }
    }
}

/// `N` panels against rows `first..first + R` of a tile of `T`.
///
/// # Safety
/// As [`TileFn`]; `panels`, `outs` and `ahead` are `N` or more.
#[inline(always)]
unsafe fn int8_pass<
    S: Simd,
    P: PanelFormat,
    const T: usize,
    const R: usize,
    const N: usize,
    const PART: usize,
    const PARTS: usize,
>(
    simd: S,
    panels: &[*const u8],
    n_groups: usize,
    mut x: *const u8,
    first: usize,
    outs: &[*mut [f32; LANES]],
    ahead: &[*const u8],
) {
    simd.vectorize(
        #[inline(always)]
        move || {
            // SAFETY: the caller promises panels and tile.
            unsafe {
                let layout = layout::<P>();
                // Arrays, so that a loop over them is none in the machine's code and the sums stay in
                // registers.
                let panels = std::array::from_fn::<_, N, _>(|n| P::parts(panels[n], n_groups));
                let ahead = std::array::from_fn::<_, N, _>(|n| ahead[n]);
                let mut sums = [[simd.splat(0.0); R]; N];
                let mut half_sums = x.add(n_groups * T * ROW_BYTES).cast::<i32>().add(first);
                for group in 0..n_groups {
                    let x_scales = x.add(T * GROUP_LEN).cast::<f32>().add(first);
                    let x_sums = x_scales.cast::<i32>();
                    // `-ZERO` times the sum of the codes of row `t` in a half, or in all.
                    let start = |half: usize, t: usize| match (P::HAS_HALVES, P::ZERO) {
                        (true, 32) => half_sums.add(half * T + t).read_unaligned(),
                        (false, 8) => x_sums.add(T + t).read_unaligned(),
                        (false, 16) => 2 * x_sums.add(T + t).read_unaligned(),
                        (false, 128) => x_sums.add(2 * T + t).read_unaligned(),
                        (false, 0) => 0,
                        _ => unreachable!("a format's zero has its sums in the tile"),
                    };
                    let x_scale = |t: usize| simd.splat(x_scales.add(t).read_unaligned());
                    let mut scales = [P::scales(simd, &panels[0], group); N];
                    for n in 0..N {
                        scales[n] = P::scales(simd, &panels[n], group);
                        ask::<S, PART, PARTS>(simd, ahead[n], group, layout);
                    }
                    let codes = x.add(first * GROUP_LEN);
                    let at = group * P::CODE_BYTES;
                    // Products with quads of one scale, in chains that start at `start`.
                    macro_rules! chains {
                        ($half:literal: $($q:literal),+) => {
                            let mut products = [[simd.splat_i(0); R]; N];
                            for t in 0..R {
                                let start = simd.splat_i(start($half, t));
                                products.iter_mut().for_each(|products| products[t] = start);
                            }
                            $(add_quad::<S, P, R, N>(simd, &panels, at, $q, codes, &mut products);)+
                            for t in 0..R {
                                for n in 0..N {
                                    let scale = simd.mul(scales[n].scale[$half], x_scale(t));
                                    let product = simd.to_f(products[n][t]);
                                    sums[n][t] = simd.fma(product, scale, sums[n][t]);
                                }
                            }
                        };
                    }
                    if P::HAS_HALVES {
                        chains!(0: 0, 1, 2, 3);
                        chains!(1: 4, 5, 6, 7);
                    } else if N == 1 {
                        chains!(0: 0, 1, 2, 3, 4, 5, 6, 7);
                    } else {
                        // Quads of the same bytes one after the other, where a format has such: fewer
                        // registers.
                        chains!(0: 0, 4, 1, 5, 2, 6, 3, 7);
                    }
                    if P::HAS_MIN {
                        for t in 0..R {
                            let x_sum = simd.splat(x_scales.add(3 * T + t).read_unaligned());
                            for (sums, scales) in sums.iter_mut().zip(&scales) {
                                sums[t] = simd.fma(scales.min, x_sum, sums[t]);
                            }
                        }
                    }
                    x = x.add(T * ROW_BYTES);
                    half_sums = half_sums.byte_add(T * HALVES_BYTES);
                }
                for (sums, out) in sums.into_iter().zip(outs) {
                    for (t, sum) in sums.into_iter().enumerate() {
                        simd.store(out.add(first + t).cast(), sum);
                    }
                }
            }
        },
    );
}

/// Adds to `products[n][t]` those of quad `q` of the group at `at` of panel `n` with row `t` of a tile
/// whose codes start at `x`.
///
/// # Safety
/// The panels hold the group and `x` `R` rows' codes.
#[inline(always)]
unsafe fn add_quad<S: Simd, P: PanelFormat, const R: usize, const N: usize>(
    simd: S,
    panels: &[Panel; N],
    at: usize,
    q: usize,
    x: *const u8,
    products: &mut [[S::I; R]; N],
) {
    // SAFETY: promised by the caller.
    unsafe {
        for (panel, products) in panels.iter().zip(&mut *products) {
            let quad = P::quad(simd, panel.codes.add(at), q);
            for (t, product) in products.iter_mut().enumerate() {
                let codes = x.add(t * GROUP_LEN + 4 * q);
                *product = simd.dot4(*product, quad, codes.cast());
            }
        }
    }
    for products in products {
        for product in products {
            *product = simd.in_turn(*product);
        }
    }
}

/// See [`UnpackFn`]. With `SIGNED`, codes less the format's zero.
unsafe fn unpack<S: Simd, P: PanelFormat, const SIGNED: bool>(
    simd: S,
    panel: *const u8,
    n_groups: usize,
    to: *mut u8,
    ahead: *const u8,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            // SAFETY: the caller promises the panel and the room.
            unsafe {
                let layout = layout::<P>();
                let panel = P::parts(panel, n_groups);
                let scales = to.add(n_groups * CODE_BYTES);
                let minima = scales.add(n_groups * SCALE_BYTES);
                for group in 0..n_groups {
                    ask::<S, 0, 1>(simd, ahead, group, layout);
                    let w = P::quads(simd, panel.codes.add(group * P::CODE_BYTES));
                    for (q, quad) in w.into_iter().enumerate() {
                        let quad = match SIGNED {
                            true => simd.recenter(quad, P::ZERO),
                            false => quad,
                        };
                        simd.store_bytes(to.add(group * CODE_BYTES + q * 4 * PANEL_ROWS), quad);
                    }
                    let s = P::scales(simd, &panel, group);
                    simd.store(scales.add(group * SCALE_BYTES).cast(), s.scale[0]);
                    if P::HAS_MIN {
                        simd.store(minima.add(group * SCALE_BYTES).cast(), s.min);
                    }
                }
            }
        },
    );
}

/// See [`TileFn`].
unsafe fn f32_tiles<S: Simd, P: PanelFormat, const T: usize>(
    simd: S,
    panels: &[*const u8],
    n_groups: usize,
    input: &TileInput,
    outs: &[*mut [f32; LANES]; PANELS_MAX],
    _ahead: &[*const u8; PANELS_MAX],
) {
    let TileInput::F32(x) = input else {
        unreachable!("f32 kernels get f32 rows")
    };
    for (panel, out) in panels.iter().zip(outs) {
        // SAFETY: passed on from the caller.
        unsafe { f32_pass::<S, P, T>(simd, *panel, n_groups, x, *out) };
    }
}

/// One panel against `T` rows.
///
/// # Safety
/// As [`TileFn`].
unsafe fn f32_pass<S: Simd, P: PanelFormat, const T: usize>(
    simd: S,
    panel: *const u8,
    n_groups: usize,
    x: &[*const f32; F32_TILE_TOKENS],
    out: *mut [f32; LANES],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            // SAFETY: the caller promises panel and rows.
            unsafe {
                let panel = P::parts(panel, n_groups);
                let zero = simd.splat(f32::from(P::ZERO));
                let mut sums = [simd.splat(0.0); T];
                for group in 0..n_groups {
                    let w = P::quads(simd, panel.codes.add(group * P::CODE_BYTES));
                    let s = P::scales(simd, &panel, group);
                    for (q, quad) in w.iter().enumerate() {
                        for j in 0..4 {
                            let code = simd.column(*quad, j);
                            let weight = if P::HAS_MIN {
                                simd.fma(s.scale[0], code, s.min)
                            } else {
                                simd.mul(s.scale[q / 4], simd.sub(code, zero))
                            };
                            let column = group * GROUP_LEN + 4 * q + j;
                            for (sum, row) in sums.iter_mut().zip(x) {
                                let value = simd.splat(*row.add(column));
                                *sum = simd.fma(weight, value, *sum);
                            }
                        }
                    }
                }
                for (t, sum) in sums.into_iter().enumerate() {
                    simd.store(out.add(t).cast(), sum);
                }
            }
        },
    );
}
