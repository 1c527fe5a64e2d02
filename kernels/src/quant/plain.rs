//! F32, F16 and BF16: one element per value, little endian, no alignment assumed.

use half::f16;

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*raw);
    }
}

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = f16_to_f32(*raw);
    }
}

pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = bf16_to_f32(*raw);
    }
}

/// IEEE half precision to single; exact.
#[inline]
pub fn f16_to_f32(raw: [u8; 2]) -> f32 {
    f16::from_le_bytes(raw).to_f32()
}

/// The upper half of an f32; exact.
#[inline]
pub fn bf16_to_f32(raw: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(raw)) << 16)
}
