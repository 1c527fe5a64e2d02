//! Block-quantized matrices in panels of 16 rows: the layout the integer kernels read from end to
//! end.
//!
//! A panel holds its rows' codes, then their scales, and is padded to [`PANEL_ALIGN`] bytes. Codes
//! of 32 columns form a group: the four codes of columns `4 q..4 q + 4` of all 16 rows lie side by
//! side, 64 bytes in row order, which is one operand of a four-way byte dot product. Codes and
//! scales are those of the source format, bit for bit; rows past the matrix' end are zero.
//!
//! | format | codes of a group | scales |
//! |---|---|---|
//! | Q4_0 | 4 x 64 bytes: quad `q` in low nibbles, quad `q + 4` in high ones | `d` f16 x 16 a group |
//! | Q4_1 | as Q4_0 | `d`, `m` f16 x 16 a group |
//! | Q5_0 | as Q4_0, then 64 bytes of fifth bits: quad `q` in bit `q` | as Q4_0 |
//! | Q5_1 | as Q5_0 | as Q4_1 |
//! | Q8_0 | 8 x 64 bytes, each code + 128 | `d` f16 x 16 a group |
//! | Q4_K | as Q4_0 | scale, minimum u8 x 16 a group; then `d`, `dmin` f16 x 16 per 8 groups |
//! | Q5_K | as Q5_0 | as Q4_K |
//! | Q6_K | low nibbles as Q4_0, then 2 x 64 bytes of bit pairs: quad `4 h + i` in bits `2 i` | two halves' scales i8 x 16 a group; then `d` f16 x 16 per 8 groups |
//! | Int8 | as Q8_0 | f32 x 16 a panel |
//! | Int4 | as Q4_0 | `d` f16, zero u8 x 16 a group |

use crate::{
    dtype::Format,
    matrix::Matrix,
    quant::{f16_to_f32, fifth_bits, q4k_scale_min, q5k_codes, q6k_codes},
};

/// Names the layout of all formats in files that outlive this program: another name, once a byte of a
/// panel moves (a test of `packing` notices).
pub const LAYOUT_NAME: &str = "panels-16x32-1";
/// Rows of a panel.
pub const PANEL_ROWS: usize = 16;
/// Columns of a group.
pub const GROUP_LEN: usize = 32;
/// Bytes a panel is padded to: a cache line.
pub const PANEL_ALIGN: usize = 64;
/// Groups that share a Q4_K, Q5_K or Q6_K block.
pub const GROUPS_PER_BLOCK: usize = 8;
/// Bytes of four columns of a panel.
const QUAD_BYTES: usize = 4 * PANEL_ROWS;
/// Bytes of one f16 for every row.
const HALF_BYTES: usize = 2 * PANEL_ROWS;

/// Sizes of a format's panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PanelLayout {
    /// Bytes of a group's codes.
    pub code_bytes: usize,
    /// Bytes of a group's own scales.
    pub scale_bytes: usize,
    /// Bytes of what [`GROUPS_PER_BLOCK`] groups share.
    pub block_bytes: usize,
    /// Bytes of what all groups share.
    pub row_bytes: usize,
}

impl PanelLayout {
    /// `None` for formats that are not quantized in blocks.
    pub const fn of(format: Format) -> Option<Self> {
        let row_bytes = match format {
            Format::Int8 => 4 * PANEL_ROWS,
            _ => 0,
        };
        let (code_bytes, scale_bytes, block_bytes) = match format {
            Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => return None,
            Format::Q4_0 => (4 * QUAD_BYTES, HALF_BYTES, 0),
            Format::Q4_1 => (4 * QUAD_BYTES, 2 * HALF_BYTES, 0),
            Format::Q5_0 => (5 * QUAD_BYTES, HALF_BYTES, 0),
            Format::Q5_1 => (5 * QUAD_BYTES, 2 * HALF_BYTES, 0),
            Format::Q8_0 => (8 * QUAD_BYTES, HALF_BYTES, 0),
            Format::Q4K => (4 * QUAD_BYTES, 2 * PANEL_ROWS, 2 * HALF_BYTES),
            Format::Q5K => (5 * QUAD_BYTES, 2 * PANEL_ROWS, 2 * HALF_BYTES),
            Format::Q6K => (6 * QUAD_BYTES, 2 * PANEL_ROWS, HALF_BYTES),
            Format::Int8 => (8 * QUAD_BYTES, 0, 0),
            Format::Int4 => (4 * QUAD_BYTES, HALF_BYTES + PANEL_ROWS, 0),
        };
        Some(Self {
            code_bytes,
            scale_bytes,
            block_bytes,
            row_bytes,
        })
    }

    /// Where the scales of a panel with `n_groups` groups start.
    pub const fn scales_at(self, n_groups: usize) -> usize {
        n_groups * self.code_bytes
    }

    /// Where the shared scales start.
    pub const fn blocks_at(self, n_groups: usize) -> usize {
        n_groups * (self.code_bytes + self.scale_bytes)
    }

    /// Where the scales of whole rows start.
    pub const fn rows_at(self, n_groups: usize) -> usize {
        self.blocks_at(n_groups) + n_groups.div_ceil(GROUPS_PER_BLOCK) * self.block_bytes
    }

    /// Bytes of a panel, `None` on overflow.
    pub fn panel_bytes(self, n_groups: usize) -> Option<usize> {
        let groups = n_groups.checked_mul(self.code_bytes + self.scale_bytes)?;
        let blocks = n_groups
            .div_ceil(GROUPS_PER_BLOCK)
            .checked_mul(self.block_bytes)?;
        groups
            .checked_add(blocks)?
            .checked_add(self.row_bytes)?
            .checked_next_multiple_of(PANEL_ALIGN)
    }
}

/// Bytes of an `[n_rows, n_cols]` matrix in panels; `None` if the format has none, the width is no
/// whole number of blocks, or the size overflows.
pub fn bytes(format: Format, n_rows: usize, n_cols: usize) -> Option<usize> {
    format.row_bytes(n_cols)?;
    PanelLayout::of(format)?
        .panel_bytes(n_cols / GROUP_LEN)?
        .checked_mul(n_rows.div_ceil(PANEL_ROWS))
}

/// Writes panel `index` of a matrix stored in rows.
///
/// # Panics
/// When the format has no panels, the panel is not of the matrix, or `out` is not its size.
pub fn pack(matrix: &Matrix, index: usize, out: &mut [u8]) {
    let format = matrix.format();
    let n_groups = matrix.n_cols() / GROUP_LEN;
    let layout = PanelLayout::of(format).expect("a format with panels");
    assert_eq!(
        Some(out.len()),
        layout.panel_bytes(n_groups),
        "a panel's size"
    );
    out.fill(0);
    let first = index * PANEL_ROWS;
    assert!(first < matrix.n_rows(), "panel {index} is of the matrix");
    let n_rows = PANEL_ROWS.min(matrix.n_rows() - first);
    let (codes, rest) = out.split_at_mut(layout.scales_at(n_groups));
    let (scales, blocks) = rest.split_at_mut(n_groups * layout.scale_bytes);
    for r in 0..n_rows {
        let row = matrix.row(first + r);
        if format == Format::Int8
            && let Some(scales) = matrix.tile_scales()
        {
            let scale = scales.values[first + r].to_le_bytes();
            blocks[4 * r..][..4].copy_from_slice(&scale);
        }
        for group in 0..n_groups {
            let codes = &mut codes[group * layout.code_bytes..][..layout.code_bytes];
            let scales = &mut scales[group * layout.scale_bytes..][..layout.scale_bytes];
            let half = |to: &mut [u8], at: usize, from: &[u8]| {
                to[at * HALF_BYTES + 2 * r..][..2].copy_from_slice(from);
            };
            match format {
                Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => {}
                Format::Q4_0 => {
                    let block = &row[group * 18..][..18];
                    half(scales, 0, &block[..2]);
                    put_nibbles(codes, r, &block[2..]);
                }
                Format::Q4_1 => {
                    let block = &row[group * 20..][..20];
                    half(scales, 0, &block[..2]);
                    half(scales, 1, &block[2..4]);
                    put_nibbles(codes, r, &block[4..]);
                }
                Format::Q5_0 => {
                    let block = &row[group * 22..][..22];
                    half(scales, 0, &block[..2]);
                    put_nibbles(codes, r, &block[6..]);
                    put_fifth_bits(codes, r, fifth_bits(&block[2..6]));
                }
                Format::Q5_1 => {
                    let block = &row[group * 24..][..24];
                    half(scales, 0, &block[..2]);
                    half(scales, 1, &block[2..4]);
                    put_nibbles(codes, r, &block[8..]);
                    put_fifth_bits(codes, r, fifth_bits(&block[4..8]));
                }
                Format::Q8_0 => {
                    let block = &row[group * 34..][..34];
                    half(scales, 0, &block[..2]);
                    for (k, byte) in block[2..].iter().enumerate() {
                        codes[place(k, r)] = byte ^ 0x80;
                    }
                }
                Format::Int8 => {
                    for (k, byte) in row[group * 32..][..32].iter().enumerate() {
                        codes[place(k, r)] = byte ^ 0x80;
                    }
                }
                Format::Int4 => {
                    let block = &row[group * 19..][..19];
                    half(scales, 0, &block[..2]);
                    scales[HALF_BYTES + r] = block[2];
                    put_nibbles(codes, r, &block[3..]);
                }
                Format::Q4K | Format::Q5K => {
                    let (index, j) = (group / GROUPS_PER_BLOCK, group % GROUPS_PER_BLOCK);
                    let block_bytes = format.block_bytes();
                    let block = &row[index * block_bytes..][..block_bytes];
                    if j == 0 {
                        let shared = &mut blocks[index * layout.block_bytes..];
                        half(shared, 0, &block[..2]);
                        half(shared, 1, &block[2..4]);
                    }
                    let (scale, min) = q4k_scale_min(&block[4..16], j);
                    scales[r] = scale;
                    scales[PANEL_ROWS + r] = min;
                    if format == Format::Q5K {
                        let values = q5k_codes(block, j);
                        put_codes(codes, r, |k| values[k] & 15);
                        put_fifth_bits(codes, r, |k| values[k] >> 4);
                    } else {
                        let (bytes, shift) = (&block[16 + j / 2 * 32..][..32], j % 2 * 4);
                        put_codes(codes, r, |k| (bytes[k] >> shift) & 15);
                    }
                }
                Format::Q6K => {
                    let (index, j) = (group / GROUPS_PER_BLOCK, group % GROUPS_PER_BLOCK);
                    let block = &row[index * 210..][..210];
                    if j == 0 {
                        half(&mut blocks[index * layout.block_bytes..], 0, &block[208..]);
                    }
                    scales[r] = block[192 + 2 * j];
                    scales[PANEL_ROWS + r] = block[192 + 2 * j + 1];
                    let values = q6k_codes(block, j);
                    put_codes(codes, r, |k| values[k] & 15);
                    for (k, value) in values.iter().enumerate() {
                        let (quad, j) = (k / 4, k % 4);
                        let at = (4 + quad / 4) * QUAD_BYTES + r * 4 + j;
                        codes[at] |= (value >> 4) << (quad % 4 * 2);
                    }
                }
            }
        }
    }
}

/// Where column `k` of a group lies among quads, for row `r`.
const fn place(k: usize, r: usize) -> usize {
    k / 4 * QUAD_BYTES + r * 4 + k % 4
}

/// 16 bytes whose low nibbles are columns 0..16 and whose high ones are columns 16..32.
fn put_nibbles(codes: &mut [u8], r: usize, bytes: &[u8]) {
    for (k, byte) in bytes.iter().enumerate() {
        codes[place(k, r)] = *byte;
    }
}

fn put_codes(codes: &mut [u8], r: usize, code: impl Fn(usize) -> u8) {
    for k in 0..GROUP_LEN / 2 {
        codes[place(k, r)] = code(k) | (code(k + GROUP_LEN / 2) << 4);
    }
}

/// Behind the nibbles: `bit(k)`, 0 or 1, of column `k`.
fn put_fifth_bits(codes: &mut [u8], r: usize, bit: impl Fn(usize) -> u8) {
    for k in 0..GROUP_LEN {
        codes[4 * QUAD_BYTES + r * 4 + k % 4] |= bit(k) << (k / 4);
    }
}

/// Decodes row `row` of a matrix stored in panels.
pub(crate) fn decode_row(matrix: &Matrix, row: usize, out: &mut [f32]) {
    let format = matrix.format();
    let n_groups = matrix.n_cols() / GROUP_LEN;
    let layout = PanelLayout::of(format).expect("panels are of a block format");
    let (panel, r) = (matrix.panel(row / PANEL_ROWS), row % PANEL_ROWS);
    let half_at = |at: usize| f16_to_f32([panel[at + 2 * r], panel[at + 2 * r + 1]]);
    for (group, values) in out.as_chunks_mut::<GROUP_LEN>().0.iter_mut().enumerate() {
        let codes = &panel[group * layout.code_bytes..][..layout.code_bytes];
        let scales_at = layout.scales_at(n_groups) + group * layout.scale_bytes;
        let scales = &panel[scales_at..][..layout.scale_bytes];
        let block_at = layout.blocks_at(n_groups) + group / GROUPS_PER_BLOCK * layout.block_bytes;
        let nibble = |k: usize| {
            let byte = codes[place(k % (GROUP_LEN / 2), r)];
            if k < GROUP_LEN / 2 {
                byte & 15
            } else {
                byte >> 4
            }
        };
        let five_bits = |k: usize| {
            let bits = codes[4 * QUAD_BYTES + r * 4 + k % 4];
            nibble(k) | ((bits >> (k / 4) & 1) << 4)
        };
        for (k, value) in values.iter_mut().enumerate() {
            *value = match format {
                Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4m3 => 0.0,
                Format::Q4_0 => half_at(scales_at) * (f32::from(nibble(k)) - 8.0),
                Format::Q4_1 => {
                    half_at(scales_at) * f32::from(nibble(k)) + half_at(scales_at + HALF_BYTES)
                }
                Format::Q5_0 => half_at(scales_at) * (f32::from(five_bits(k)) - 16.0),
                Format::Q5_1 => {
                    half_at(scales_at) * f32::from(five_bits(k)) + half_at(scales_at + HALF_BYTES)
                }
                Format::Q8_0 => half_at(scales_at) * (f32::from(codes[place(k, r)]) - 128.0),
                Format::Int8 => {
                    let at = layout.rows_at(n_groups) + 4 * r;
                    let scale = [panel[at], panel[at + 1], panel[at + 2], panel[at + 3]];
                    f32::from_le_bytes(scale) * (f32::from(codes[place(k, r)]) - 128.0)
                }
                Format::Int4 => {
                    let zero = f32::from(scales[HALF_BYTES + r]);
                    half_at(scales_at) * (f32::from(nibble(k)) - zero)
                }
                Format::Q4K | Format::Q5K => {
                    let scale = half_at(block_at) * f32::from(scales[r]);
                    let min = half_at(block_at + HALF_BYTES) * f32::from(scales[PANEL_ROWS + r]);
                    let code = match format {
                        Format::Q5K => five_bits(k),
                        _ => nibble(k),
                    };
                    scale * f32::from(code) - min
                }
                Format::Q6K => {
                    let quad = k / 4;
                    let pairs = codes[(4 + quad / 4) * QUAD_BYTES + r * 4 + k % 4];
                    let code = nibble(k) | (((pairs >> (quad % 4 * 2)) & 3) << 4);
                    let scale = scales[k / 16 * PANEL_ROWS + r].cast_signed();
                    half_at(block_at) * f32::from(scale) * (f32::from(code) - 32.0)
                }
            };
        }
    }
}
