//! Activations as signed bytes: groups of 32 with one f32 scale each, as the integer kernels take
//! them.
//!
//! A group's scale is its largest magnitude / 127, codes are rounded to nearest (ties away from
//! zero). A group of zeros has scale 0.

/// Elements that share a scale.
pub const GROUP_LEN: usize = 32;

/// Rows of quantized activations; buffers are reused.
#[derive(Debug, Default, Clone)]
pub struct Int8Rows {
    /// Columns of a row, a multiple of [`GROUP_LEN`].
    pub n_cols: usize,
    /// `[rows, n_cols]`.
    pub codes: Vec<i8>,
    /// `[rows, n_cols / 32]`.
    pub scales: Vec<f32>,
    /// Sum of the codes of every 16 elements: `[rows, n_cols / 16]`.
    pub half_sums: Vec<i32>,
}

impl Int8Rows {
    /// Memory for `n_rows_max` rows of `n_cols_max` columns.
    pub fn with_capacity(n_rows_max: usize, n_cols_max: usize) -> Self {
        let n = n_rows_max * n_cols_max;
        Self {
            n_cols: 0,
            codes: Vec::with_capacity(n),
            scales: Vec::with_capacity(n / GROUP_LEN),
            half_sums: Vec::with_capacity(n / 16),
        }
    }

    /// Replaces the contents by `x`, rows of `n_cols`.
    ///
    /// # Panics
    /// When `n_cols` is not a multiple of [`GROUP_LEN`].
    pub fn quantize(&mut self, x: &[f32], n_cols: usize) {
        assert!(
            n_cols.is_multiple_of(GROUP_LEN),
            "groups do not straddle rows"
        );
        self.n_cols = n_cols;
        self.codes.clear();
        self.scales.clear();
        self.half_sums.clear();
        for group in x.as_chunks::<GROUP_LEN>().0 {
            let largest = group.iter().fold(0f32, |a, v| a.max(v.abs()));
            let scale = largest / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            self.scales.push(scale);
            for part in group.as_chunks::<16>().0 {
                let mut sum = 0i32;
                for v in part {
                    // Rounded values are within -127..=127 by construction of the scale.
                    #[expect(clippy::cast_possible_truncation, reason = "bounded by 127")]
                    let code = (v * inverse).round() as i8;
                    sum += i32::from(code);
                    self.codes.push(code);
                }
                self.half_sums.push(sum);
            }
        }
    }

    /// Codes of row `m`.
    pub fn row_codes(&self, m: usize) -> &[i8] {
        &self.codes[m * self.n_cols..][..self.n_cols]
    }

    /// Group scales of row `m`.
    pub fn row_scales(&self, m: usize) -> &[f32] {
        let n = self.n_cols / GROUP_LEN;
        &self.scales[m * n..][..n]
    }

    /// Half-group sums of row `m`.
    pub fn row_half_sums(&self, m: usize) -> &[i32] {
        let n = self.n_cols / 16;
        &self.half_sums[m * n..][..n]
    }
}
