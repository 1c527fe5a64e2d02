//! A stored weight matrix: shape, format and shared bytes, checked to fit each other.
//!
//! Does not know where the bytes come from; a mapped file, a heap buffer and a test vector look
//! alike through [`Bytes`].

use std::ops::Range;

use bytes::Bytes;

use crate::{
    dtype::Format,
    panel::{GROUP_LEN, PANEL_ROWS, PanelLayout},
};

/// The order of a matrix' bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Row after row, as checkpoints store them.
    Rows,
    /// Panels of 16 rows ([`crate::panel`]), as the integer kernels read them.
    Panels,
}

/// A weight matrix `[n_rows, n_cols]` in its stored format. A linear layer computes
/// `y = W x`: `n_rows` outputs from `n_cols` inputs. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Matrix {
    format: Format,
    layout: Layout,
    n_rows: usize,
    n_cols: usize,
    data: Bytes,
    tile_scales: Option<TileScales>,
}

/// One f32 factor per tile of an FP8 matrix, or per row of an Int8 one: `value = code * scale[row / tile_rows][col / tile_cols]`.
/// The last tile of a row or column may be ragged.
#[derive(Debug, Clone, PartialEq)]
pub struct TileScales {
    /// Rows of a tile (128 in every published checkpoint).
    pub tile_rows: usize,
    /// Columns of a tile (128 in every published checkpoint).
    pub tile_cols: usize,
    /// `[ceil(n_rows / tile_rows), ceil(n_cols / tile_cols)]`, row-major.
    pub values: Vec<f32>,
}

impl TileScales {
    /// The scales of a piece of a matrix with `n_cols` columns. Where the piece begins inside a
    /// tile and ends outside, its tiles are as large as still fit the old ones, and the values
    /// repeat.
    fn cut(&self, rows: Range<usize>, cols: Range<usize>, n_cols: usize) -> Self {
        let side = |tile: usize, piece: &Range<usize>| match piece.start % tile {
            0 => tile,
            inside if inside + piece.len() <= tile => piece.len().max(1),
            inside => gcd(tile, inside),
        };
        let tile_rows = side(self.tile_rows, &rows);
        let tile_cols = side(self.tile_cols, &cols);
        let grid_cols = n_cols.div_ceil(self.tile_cols);
        let mut values = Vec::new();
        for row in rows.step_by(tile_rows) {
            let of_row = &self.values[row / self.tile_rows * grid_cols..][..grid_cols];
            let cols = cols.clone().step_by(tile_cols);
            values.extend(cols.map(|col| of_row[col / self.tile_cols]));
        }
        Self {
            tile_rows,
            tile_cols,
            values,
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Why bytes and shape do not make a matrix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The row length is not a multiple of the format's block, or a size overflows.
    #[error("a row of {n_cols} elements is not a whole number of {format} blocks of {block_len}")]
    PartialBlock {
        /// Stored format.
        format: Format,
        /// Columns asked for.
        n_cols: usize,
        /// Elements in a block of the format.
        block_len: usize,
    },
    /// The byte count does not belong to the shape.
    #[error("{format} [{n_rows}, {n_cols}] needs {expected} bytes, found {found}")]
    WrongLength {
        /// Stored format.
        format: Format,
        /// Rows asked for.
        n_rows: usize,
        /// Columns asked for.
        n_cols: usize,
        /// Bytes the shape needs (`usize::MAX` if the product overflows).
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Panels of a format that has none.
    #[error("{0} is not stored in panels")]
    NoPanels(Format),
    /// FP8 or Int8 without scales, scales on another format, or a scale grid of the wrong size.
    #[error("{format} [{n_rows}, {n_cols}] needs {expected} tile scales, found {found}")]
    WrongScales {
        /// Stored format.
        format: Format,
        /// Rows asked for.
        n_rows: usize,
        /// Columns asked for.
        n_cols: usize,
        /// Scales the shape needs (0 for formats without).
        expected: usize,
        /// Scales given.
        found: usize,
    },
}

impl Matrix {
    /// Joins shape, format and bytes.
    ///
    /// # Errors
    /// [`MatrixError`] when they do not fit each other exactly.
    pub fn new(
        format: Format,
        n_rows: usize,
        n_cols: usize,
        data: Bytes,
        tile_scales: Option<TileScales>,
    ) -> Result<Self, MatrixError> {
        let row_bytes = format
            .row_bytes(n_cols)
            .ok_or_else(|| MatrixError::PartialBlock {
                format,
                n_cols,
                block_len: format.block_len(),
            })?;
        let expected = row_bytes.saturating_mul(n_rows);
        if data.len() != expected {
            let found = data.len();
            return Err(MatrixError::WrongLength {
                format,
                n_rows,
                n_cols,
                expected,
                found,
            });
        }
        let n_scales_expected = match (&tile_scales, format) {
            (Some(s), Format::Int8) if (s.tile_rows, s.tile_cols) != (1, n_cols) => 0,
            (_, Format::Int8) => n_rows,
            (_, f) if f != Format::F8E4m3 => 0,
            (Some(s), _) if s.tile_rows > 0 && s.tile_cols > 0 => {
                n_rows.div_ceil(s.tile_rows) * n_cols.div_ceil(s.tile_cols)
            }
            _ => n_rows.div_ceil(128) * n_cols.div_ceil(128),
        };
        let n_scales = tile_scales.as_ref().map_or(0, |s| s.values.len());
        if n_scales != n_scales_expected {
            return Err(MatrixError::WrongScales {
                format,
                n_rows,
                n_cols,
                expected: n_scales_expected,
                found: n_scales,
            });
        }
        Ok(Self {
            format,
            layout: Layout::Rows,
            n_rows,
            n_cols,
            data,
            tile_scales,
        })
    }

    /// Joins shape, format and bytes that are stored in panels.
    ///
    /// # Errors
    /// [`MatrixError`] when they do not fit each other exactly.
    pub fn from_panels(
        format: Format,
        n_rows: usize,
        n_cols: usize,
        data: Bytes,
    ) -> Result<Self, MatrixError> {
        let layout = PanelLayout::of(format).ok_or(MatrixError::NoPanels(format))?;
        if format.row_bytes(n_cols).is_none() {
            return Err(MatrixError::PartialBlock {
                format,
                n_cols,
                block_len: format.block_len(),
            });
        }
        let expected = layout
            .panel_bytes(n_cols / GROUP_LEN)
            .and_then(|bytes| bytes.checked_mul(n_rows.div_ceil(PANEL_ROWS)))
            .unwrap_or(usize::MAX);
        if data.len() != expected {
            let found = data.len();
            return Err(MatrixError::WrongLength {
                format,
                n_rows,
                n_cols,
                expected,
                found,
            });
        }
        Ok(Self {
            format,
            layout: Layout::Panels,
            n_rows,
            n_cols,
            data,
            tile_scales: None,
        })
    }

    /// A matrix of plain f32 values, for tests and for tensors made at load time.
    ///
    /// # Panics
    /// When `values` is not `n_rows * n_cols` long.
    pub fn from_f32(n_rows: usize, n_cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), n_rows * n_cols, "values fill the shape");
        let data = values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>();
        Self {
            format: Format::F32,
            layout: Layout::Rows,
            n_rows,
            n_cols,
            data: data.into(),
            tile_scales: None,
        }
    }

    /// Rows `first..first + count` as a matrix that shares the bytes; `None` when out of range or
    /// stored in panels.
    pub fn rows(&self, first: usize, count: usize) -> Option<Self> {
        if self.layout != Layout::Rows || first.checked_add(count)? > self.n_rows {
            return None;
        }
        let row_bytes = self.row_bytes();
        let data = self
            .data
            .slice(first * row_bytes..(first + count) * row_bytes);
        let cut = |s: &TileScales| s.cut(first..first + count, 0..self.n_cols, self.n_cols);
        Some(Self {
            n_rows: count,
            data,
            tile_scales: self.tile_scales.as_ref().map(cut),
            ..*self
        })
    }

    /// Columns `first..first + count` as a matrix with bytes of its own; `None` when out of range,
    /// stored in panels, or cut inside a block.
    pub fn cols(&self, first: usize, count: usize) -> Option<Self> {
        let block_len = self.format.block_len();
        let end = first.checked_add(count)?;
        let whole = first.is_multiple_of(block_len) && count.is_multiple_of(block_len);
        if self.layout != Layout::Rows || end > self.n_cols || !whole {
            return None;
        }
        let bytes_of = |n_cols: usize| n_cols / block_len * self.format.block_bytes();
        let mut data = Vec::with_capacity(self.n_rows * bytes_of(count));
        for row in 0..self.n_rows {
            data.extend_from_slice(&self.row(row)[bytes_of(first)..bytes_of(end)]);
        }
        let cut = |s: &TileScales| s.cut(0..self.n_rows, first..end, self.n_cols);
        Some(Self {
            n_cols: count,
            data: data.into(),
            tile_scales: self.tile_scales.as_ref().map(cut),
            ..*self
        })
    }

    /// How the elements are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The order of its bytes.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Outputs of the linear layer.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Inputs of the linear layer.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// The stored bytes, `n_rows * row_bytes`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The scales of an FP8 or Int8 matrix; `None` for other formats, and in panels, which hold
    /// them.
    pub fn tile_scales(&self) -> Option<&TileScales> {
        self.tile_scales.as_ref()
    }

    /// Bytes of one stored row of [`Layout::Rows`].
    pub fn row_bytes(&self) -> usize {
        self.n_cols / self.format.block_len() * self.format.block_bytes()
    }

    /// The stored bytes of row `row`.
    ///
    /// # Panics
    /// When `row` is out of range, or the matrix is stored in panels.
    pub fn row(&self, row: usize) -> &[u8] {
        assert_eq!(self.layout, Layout::Rows, "rows of a matrix in rows");
        &self.data[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// The stored bytes of panel `index`.
    ///
    /// # Panics
    /// When `index` is out of range, or the matrix is stored in rows.
    pub fn panel(&self, index: usize) -> &[u8] {
        assert_eq!(self.layout, Layout::Panels, "panels of a matrix in panels");
        let len = self.data.len() / self.n_rows.div_ceil(PANEL_ROWS).max(1);
        &self.data[index * len..][..len]
    }
}
