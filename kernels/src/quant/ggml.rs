//! The block formats of GGUF files: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (32 elements) and Q4_K,
//! Q5_K, Q6_K (256).

use super::plain::f16_to_f32;

/// Decodes a row block by block.
pub(super) fn decode_blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (raw, values) in bytes
        .as_chunks::<BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<LEN>().0)
    {
        block(raw, values);
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32([bytes[at], bytes[at + 1]])
}

pub(super) fn q4_0(raw: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(raw, 0);
    for j in 0..16 {
        let byte = raw[2 + j];
        out[j] = d * (f32::from(byte & 15) - 8.0);
        out[j + 16] = d * (f32::from(byte >> 4) - 8.0);
    }
}

pub(super) fn q4_1(raw: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(raw, 0), half_at(raw, 2));
    for j in 0..16 {
        let byte = raw[4 + j];
        out[j] = d * f32::from(byte & 15) + m;
        out[j + 16] = d * f32::from(byte >> 4) + m;
    }
}

/// The fifth bits of a Q5_0 or Q5_1 block, four bytes: bit `k` as 0 or 1.
///
/// # Panics
/// When they are not four bytes.
#[inline]
pub fn fifth_bits(bytes: &[u8]) -> impl Fn(usize) -> u8 {
    let bits = [bytes[0], bytes[1], bytes[2], bytes[3]];
    move |k| bits[k / 8] >> (k % 8) & 1
}

pub(super) fn q5_0(raw: &[u8; 22], out: &mut [f32; 32]) {
    let (d, bit) = (half_at(raw, 0), fifth_bits(&raw[2..6]));
    for j in 0..16 {
        let byte = raw[6 + j];
        out[j] = d * (f32::from(byte & 15 | bit(j) << 4) - 16.0);
        out[j + 16] = d * (f32::from(byte >> 4 | bit(j + 16) << 4) - 16.0);
    }
}

pub(super) fn q5_1(raw: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(raw, 0), half_at(raw, 2));
    let bit = fifth_bits(&raw[4..8]);
    for j in 0..16 {
        let byte = raw[8 + j];
        out[j] = d * f32::from(byte & 15 | bit(j) << 4) + m;
        out[j + 16] = d * f32::from(byte >> 4 | bit(j + 16) << 4) + m;
    }
}

pub(super) fn q8_0(raw: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(raw, 0);
    for j in 0..32 {
        out[j] = d * f32::from(raw[2 + j].cast_signed());
    }
}

/// The 6-bit scale and minimum of sub-block `j` (0..8) of a Q4_K or Q5_K block's 12 packed bytes: the
/// first four pairs sit in the low 6 bits, the others are split over a nibble and two top bits.
#[inline]
pub fn q4k_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        let min = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
        (scale, min)
    }
}

/// d f16, dmin f16, 12 bytes of scales, 128 bytes of nibbles: bytes `32 i..` hold sub-block `2 i`
/// in their low and `2 i + 1` in their high nibbles.
pub(super) fn q4_k(raw: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(raw, 0), half_at(raw, 2));
    let (packed, codes) = (&raw[4..16], &raw[16..]);
    for j in 0..8 {
        let (scale, min) = q4k_scale_min(packed, j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let shift = (j % 2) * 4;
        for l in 0..32 {
            let code = (codes[j / 2 * 32 + l] >> shift) & 15;
            out[j * 32 + l] = scale * f32::from(code) - min;
        }
    }
}

/// d f16, dmin f16, 12 bytes of scales as in Q4_K, 32 bytes of fifth bits, 128 bytes of nibbles.
pub(super) fn q5_k(raw: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(raw, 0), half_at(raw, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = q4k_scale_min(&raw[4..16], j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (value, code) in out.iter_mut().zip(q5k_codes(raw, j)) {
            *value = scale * f32::from(code) - min;
        }
    }
}

/// The 32 codes (0..32) of sub-block `j` (0..8) of a Q5_K block: nibbles as in Q4_K, the fifth bit of
/// element `l` is bit `j` of byte `l` of the high bits.
#[inline(always)]
pub fn q5k_codes(block: &[u8], j: usize) -> [u8; 32] {
    let high = &block[16..48];
    let low = &block[48 + j / 2 * 32..][..32];
    let mut codes = [0; 32];
    for l in 0..32 {
        codes[l] = ((low[l] >> (j % 2 * 4)) & 15) | (((high[l] >> j) & 1) << 4);
    }
    codes
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, d f16. Each half of 128
/// elements takes 64 low bytes, 32 high bytes and 8 scales.
pub(super) fn q6_k(raw: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(raw, 208);
    for (i, value) in out.iter_mut().enumerate() {
        let (part, in_part) = (i / 128, i % 128);
        let (quarter, l) = (in_part / 32, in_part % 32);
        let low = raw[part * 64 + (quarter % 2) * 32 + l] >> (quarter / 2 * 4) & 15;
        let high = raw[128 + part * 32 + l] >> (quarter * 2) & 3;
        let scale = raw[192 + i / 16].cast_signed();
        *value = d * f32::from(scale) * (f32::from(low | (high << 4)) - 32.0);
    }
}

/// The 32 codes (0..64) of sub-block pair `j` (0..8) of a Q6_K block.
#[inline(always)]
pub fn q6k_codes(block: &[u8], j: usize) -> [u8; 32] {
    let (part, quarter) = (j / 4, j % 4);
    let low = &block[part * 64 + (quarter % 2) * 32..][..32];
    let high = &block[128 + part * 32..][..32];
    let mut codes = [0; 32];
    for l in 0..32 {
        codes[l] = ((low[l] >> (quarter / 2 * 4)) & 15) | (((high[l] >> (quarter * 2)) & 3) << 4);
    }
    codes
}
