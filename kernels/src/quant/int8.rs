//! Activations, keys and values as signed bytes with an f32 scale; activations in groups of 32, as
//! the integer kernels take them.

/// Elements that share a scale.
pub const GROUP_LEN: usize = 32;

/// Rounds a group: [`round_row`] of its values.
pub fn round_group(values: &[f32; GROUP_LEN], codes: &mut [i8; GROUP_LEN]) -> f32 {
    round_row(values, codes)
}

/// Rounds a row: the scale is its largest magnitude / 127, codes are nearest (ties to even). A row
/// of zeros has scale 0.
pub fn round_row(values: &[f32], codes: &mut [i8]) -> f32 {
    let (scale, rounded) = rounded_row(values);
    codes
        .iter_mut()
        .zip(rounded)
        .for_each(|(to, code)| *to = code);
    scale
}

/// [`round_row`] without a place for the codes: the scale, and the codes one after the other.
pub fn rounded_row(values: &[f32]) -> (f32, impl Iterator<Item = i8>) {
    let largest = values.iter().fold(0f32, |a, v| a.max(v.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "within -127..=127 by construction of the scale"
    )]
    let code = move |value: &f32| (value * inverse).round_ties_even() as i8;
    (scale, values.iter().map(code))
}
