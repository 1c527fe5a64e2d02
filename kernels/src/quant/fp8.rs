//! FP8 e4m3fn with one f32 scale per tile (DeepSeek-V3 `weight_scale_inv`, which multiplies
//! despite its name).

use crate::matrix::Matrix;

pub(super) fn decode(matrix: &Matrix, row: usize, bytes: &[u8], out: &mut [f32]) {
    let Some(scales) = matrix.tile_scales() else {
        return;
    };
    let grid_cols = matrix.n_cols().div_ceil(scales.tile_cols);
    let row_scales = &scales.values[row / scales.tile_rows * grid_cols..][..grid_cols];
    for (col, (value, code)) in out.iter_mut().zip(bytes).enumerate() {
        *value = e4m3_to_f32(*code) * row_scales[col / scales.tile_cols];
    }
}

/// e4m3fn to f32, exact: bias 7, no infinities, 0x7F and 0xFF are NaN, subnormal step 2^-9.
#[inline]
pub fn e4m3_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    if code & 0x7f == 0x7f {
        return f32::from_bits(sign | 0x7fc0_0000);
    }
    // The 7 bits below the sign land on f32's exponent and mantissa; 2^120 moves bias 7 to 127 and
    // turns f32 subnormals into the e4m3 ones.
    let magnitude =
        f32::from_bits(u32::from(code & 0x7f) << 20) * f32::from_bits((120 + 127) << 23);
    f32::from_bits(magnitude.to_bits() | sign)
}

/// The nearest e4m3fn code, ties to even; magnitudes above 448 become 448.
pub(super) fn f32_to_e4m3(value: f32) -> u8 {
    let magnitude = value.abs().min(448.0);
    // From 2^e on neighbours are 2^(e - 3) apart, below 2^-6 as there.
    let exponent = (magnitude.to_bits() >> 23).max(127 - 6);
    let step = f32::from_bits((exponent - 3) << 23);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most 16 steps of at most 14 exponents"
    )]
    // A carry out of the mantissa lands in the exponent, where it belongs.
    let code = (exponent - (127 - 6)) as u8 * 8 + (magnitude / step).round_ties_even() as u8;
    code | (u8::from(value.is_sign_negative()) << 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_the_nearest_code() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(f32_to_e4m3(e4m3_to_f32(code)), code, "code {code:#x}");
        }
        for (value, expected) in [(1e9, 448.0), (-449.0, -448.0), (17.0, 16.0), (19.0, 20.0)] {
            assert_eq!(e4m3_to_f32(f32_to_e4m3(value)), expected, "{value}");
        }
        for i in 0..10_000 {
            let value = (i as f32 - 5000.0) / 11.0;
            let found = e4m3_to_f32(f32_to_e4m3(value));
            let nearest = (0..=255u8)
                .map(e4m3_to_f32)
                .filter(|v| v.is_finite())
                .fold(f32::MAX, |a, v| a.min((v - value).abs()));
            assert_eq!((found - value).abs(), nearest, "{value}");
        }
    }

    #[test]
    fn every_code_has_the_value_of_the_definition() {
        for code in 0..=255u8 {
            let (sign, exponent, mantissa) = (code >> 7, (code >> 3) & 15, code & 7);
            let magnitude = if exponent == 0 {
                f32::from(mantissa) / 8.0 * 2f32.powi(-6)
            } else {
                (1.0 + f32::from(mantissa) / 8.0) * 2f32.powi(i32::from(exponent) - 7)
            };
            let expected = if sign == 1 { -magnitude } else { magnitude };
            let found = e4m3_to_f32(code);
            if code & 0x7f == 0x7f {
                assert!(found.is_nan());
            } else {
                assert_eq!(found.to_bits(), expected.to_bits(), "code {code:#x}");
            }
        }
    }
}
