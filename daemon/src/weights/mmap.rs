//! Read-only file mappings as shared bytes.
//!
//! Does not know what is in a file.
//!
//! Invariant: the mapping lives until the last `Bytes` cut from it is dropped.
//! Invariant: no byte of a mapping is read here, nor by anybody who opens a file: whoever only looks,
//! reads through [`MappedFile::file`], where a file that was cut off is an error and no signal.

use std::{fs::File, io, path::Path};

use bytes::Bytes;
use memmap2::Mmap;

use super::error::{WeightsError, file_error};
use crate::runtime::file;

/// A file with its mapping.
#[derive(Debug)]
pub(super) struct MappedFile {
    /// For those who look at it.
    pub(super) file: File,
    /// For those who compute with it. Reading where the file ends by now is the end of the process.
    pub(super) mapping: Bytes,
}

impl MappedFile {
    /// Where in the file a piece of the mapping begins.
    pub(super) fn offset_of(&self, piece: &Bytes) -> u64 {
        let offset = piece.as_ptr().addr() - self.mapping.as_ptr().addr();
        assert!(offset + piece.len() <= self.mapping.len(), "a piece of it");
        offset as u64
    }
}

/// Opens and maps a whole file. An empty file gives empty bytes.
///
/// # Errors
/// [`WeightsError::Read`] or [`WeightsError::NotAFile`].
pub(super) fn map_file(path: &Path) -> Result<MappedFile, WeightsError> {
    let read_error = |source| WeightsError::Read {
        file: path.to_owned(),
        source,
    };
    let file = file::open(path).map_err(|e| file_error(path, e))?;
    if file.metadata().map_err(read_error)?.len() == 0 {
        let mapping = Bytes::new();
        return Ok(MappedFile { file, mapping });
    }
    // SAFETY: the mapping is read-only and private to this process. That no other process shortens
    // or rewrites the file while it is mapped is the operator's side of the contract, as for every
    // program that maps its weights: checkpoints are replaced by rename, never edited in place.
    let mapping = unsafe { Mmap::map(&file) }.map_err(read_error)?;
    let mapping = Bytes::from_owner(mapping);
    Ok(MappedFile { file, mapping })
}

/// Tells the system that the whole pages of a piece of a mapping are not needed now. The mapping
/// stays, and reading it again reads the file.
pub(super) fn release(piece: &Bytes) {
    // SAFETY: no memory is touched.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Ok(page) = usize::try_from(page) else {
        return;
    };
    let start = piece.as_ptr().addr().next_multiple_of(page);
    let end = (piece.as_ptr().addr() + piece.len()) / page * page;
    if start < end {
        let first = piece.as_ptr().wrapping_add(start - piece.as_ptr().addr());
        // SAFETY: whole pages of a read-only file mapping that `piece` keeps alive: dropped pages
        // come back from the file. Advice that the system refuses changes nothing.
        unsafe { libc::madvise(first.cast_mut().cast(), end - start, libc::MADV_DONTNEED) };
    }
}

/// Keeps a piece of a mapping in memory until its mapping ends. Waits until it is read.
///
/// # Errors
/// When the system refuses, most often over the limit of locked memory.
pub(super) fn lock(piece: &[u8]) -> io::Result<()> {
    // SAFETY: a valid range; locking changes no content.
    match unsafe { libc::mlock(piece.as_ptr().cast(), piece.len()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asks for huge pages: those of the file that are not cached yet are then read into such.
pub(super) fn prefer_huge(mapping: &Bytes) {
    // SAFETY: a whole mapping, which begins at a page. Advice changes no content, and where it is
    // refused everything works in small pages.
    unsafe {
        let first = mapping.as_ptr().cast_mut().cast();
        libc::madvise(first, mapping.len(), libc::MADV_HUGEPAGE);
    }
}

/// Asks for a mapping to be read ahead; whoever reads it before that waits.
pub(super) fn will_need(mapping: &Bytes) {
    // SAFETY: a whole mapping, which begins at a page. Advice changes no content, and where it is
    // refused everything still works.
    unsafe {
        let first = mapping.as_ptr().cast_mut().cast();
        libc::madvise(first, mapping.len(), libc::MADV_WILLNEED);
    }
}
