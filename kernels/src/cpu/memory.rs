//! Memory in huge pages: streams of weights and KV are bound by page walks in small ones.

use std::{
    alloc::{self, Layout},
    ptr::NonNull,
    sync::Arc,
};

use bytes::Bytes;

use super::{pool::Pool, shared::SharedOut};
use crate::panel::PANEL_ALIGN;

/// Bytes of a huge page, where the system has them.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of the smallest page there is.
const SMALL_PAGE: usize = 4 << 10;
/// Bytes that weights take from the system at a time; what is not written stays untouched.
const CHUNK_BYTES: usize = 64 << 20;

/// Asks for huge pages behind `len` bytes from `first` on.
///
/// Advice only: without it, or where it is refused, everything works in small pages.
fn advise_huge(first: *mut u8, len: usize) {
    let skip = first.align_offset(HUGE_PAGE);
    let whole = len.saturating_sub(skip) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        #[cfg(target_os = "linux")]
        // SAFETY: whole pages inside an allocation of the caller's; the advice changes no content.
        unsafe {
            libc::madvise(first.wrapping_add(skip).cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
}

/// Zeroed, resident f32 elements. All threads of the pool take part: zeroing pages takes most of a
/// start from a pack.
pub(super) fn resident(pool: &Pool, len: usize) -> Vec<f32> {
    const HUGE: usize = HUGE_PAGE / size_of::<f32>();
    let mut values = vec![0.0f32; len];
    let first = values.as_mut_ptr();
    advise_huge(first.cast(), size_of_val(values.as_slice()));
    // The pieces are pages: one in front of the first whole one, then one each.
    let in_front = first.align_offset(HUGE_PAGE).min(len);
    let n_pieces = 1 + (len - in_front).div_ceil(HUGE);
    let shared = SharedOut::new(&mut values);
    pool.run(n_pieces, &|piece, _| {
        let elements = match piece {
            0 => 0..in_front,
            _ => in_front + (piece - 1) * HUGE..(in_front + piece * HUGE).min(len),
        };
        // The system hands out zeroed pages on first touch; touching them now is what keeps a full
        // machine from failing later.
        for element in elements.step_by(SMALL_PAGE / size_of::<f32>()) {
            // SAFETY: inside, and pieces are disjoint; volatile so that the write is not dropped.
            unsafe { std::ptr::write_volatile(shared.at(element), 0.0) };
        }
    });
    values
}

/// An allocation that slices of weights share.
struct Chunk {
    first: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is plain bytes; each range is written once, before it is shared.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(len: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(len, HUGE_PAGE) else {
            unreachable!("{len} bytes are in a file, so they are addressable")
        };
        // SAFETY: `len` is not zero.
        let Some(first) = NonNull::new(unsafe { alloc::alloc(layout) }) else {
            alloc::handle_alloc_error(layout)
        };
        advise_huge(first.as_ptr(), len);
        Self { first, layout }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { alloc::dealloc(self.first.as_ptr(), self.layout) };
    }
}

/// A written range of a chunk.
struct Piece {
    chunk: Arc<Chunk>,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `Arena::write` initialised the range and nobody writes it again.
        unsafe { std::slice::from_raw_parts(self.chunk.first.as_ptr().add(self.start), self.len) }
    }
}

/// Hands out memory for weights; it is freed when the last of its bytes is dropped.
#[derive(Default)]
pub(super) struct Arena {
    chunk: Option<Arc<Chunk>>,
    used: usize,
}

impl Arena {
    /// `len` bytes, aligned for panels, that `fill` writes.
    pub(super) fn write(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> Bytes {
        let full = |chunk: &Arc<Chunk>| chunk.layout.size() - self.used < len;
        if self.chunk.as_ref().is_none_or(full) {
            let chunk_len = len.next_multiple_of(HUGE_PAGE).max(CHUNK_BYTES);
            self.chunk = Some(Arc::new(Chunk::new(chunk_len)));
            self.used = 0;
        }
        let Some(chunk) = &self.chunk else {
            return Bytes::new();
        };
        let (chunk, start) = (Arc::clone(chunk), self.used);
        self.used = (start + len)
            .next_multiple_of(PANEL_ALIGN)
            .min(chunk.layout.size());
        // SAFETY: the range lies in the chunk and is given out once; zeroing initialises it.
        let out = unsafe {
            let first = chunk.first.as_ptr().add(start);
            first.write_bytes(0, len);
            std::slice::from_raw_parts_mut(first, len)
        };
        fill(out);
        Bytes::from_owner(Piece { chunk, start, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_zero_whatever_its_length() {
        let pool = Pool::new(3).unwrap();
        for len in [0, 1, 1024, HUGE_PAGE / 4, 3 * HUGE_PAGE / 4 + 5] {
            let values = resident(&pool, len);
            assert_eq!(values.len(), len);
            assert!(values.iter().all(|v| *v == 0.0));
        }
    }

    #[test]
    fn pieces_keep_what_was_written_and_are_aligned() {
        let mut arena = Arena::default();
        let pieces = [1, 64, 100, CHUNK_BYTES - 100, 3 * CHUNK_BYTES / 2, 7]
            .into_iter()
            .enumerate()
            .map(|(i, len)| {
                let bytes = arena.write(len, |out| {
                    assert!(out.iter().all(|b| *b == 0));
                    out[0] = i as u8 + 1;
                    out[len - 1] = i as u8 + 1;
                });
                (i, len, bytes)
            })
            .collect::<Vec<_>>();
        drop(arena);
        for (i, len, bytes) in pieces {
            assert_eq!(bytes.len(), len);
            assert!(bytes.as_ptr().addr().is_multiple_of(PANEL_ALIGN));
            assert_eq!((bytes[0], bytes[len - 1]), (i as u8 + 1, i as u8 + 1));
        }
    }
}
