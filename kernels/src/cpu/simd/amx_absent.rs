//! [`Amx`] on processors that have none.

/// Rows of activations, and rows of weights, of a product.
pub(crate) const TILE_LEN: usize = 16;
/// Columns, bytes each, of a product.
pub(crate) const TILE_COLS: usize = 32;
/// Products that may be under way at once.
pub(crate) const N_SLOTS: usize = 4;

/// There is none.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Amx {}

impl Amx {
    pub(crate) fn configure(self) -> AmxUnit {
        match self {}
    }
}

/// There is none.
pub(crate) enum AmxUnit {}

impl AmxUnit {
    /// # Safety
    /// Never called.
    pub(crate) unsafe fn multiply<const SLOT: usize>(&self, _rows: *const u8, _weights: *const u8) {
        match *self {}
    }

    pub(crate) fn spin(&self, _n: usize) {
        match *self {}
    }

    /// # Safety
    /// Never called.
    pub(crate) unsafe fn store<const SLOT: usize>(&self, _to: *mut i32) {
        match *self {}
    }
}
