//! Reads stretches of files piece by piece, for whoever checks bytes without computing with them.
//!
//! Invariant: a file that was cut off, or a disk that fails, is an answer; a mapping would make it a
//! signal that ends the process, and with it every request of the node.

use std::{fs::File, io, ops::Range};

use crate::runtime::file;

/// Bytes read at once: fits the cache, and 400 system calls per 400 MB cost nothing.
pub(super) const PIECE_BYTES: usize = 1 << 20;

/// Why a stretch was not read to its end.
#[derive(Debug)]
pub(super) enum PieceError<S> {
    /// The system's word.
    Read(io::Error),
    /// The reader wants no more.
    Stopped(S),
}

/// Hands the bytes of `range` to `each` in pieces of [`PIECE_BYTES`], the last one shorter, and returns
/// how many there were: fewer than asked for where the file ends.
pub(super) fn pieces<S>(
    source: &File,
    range: Range<u64>,
    each: &mut dyn FnMut(&[u8]) -> Result<(), S>,
) -> Result<u64, PieceError<S>> {
    pieces_of(source, range, PIECE_BYTES, each)
}

/// As [`pieces`], of another length.
pub(super) fn pieces_of<S>(
    source: &File,
    range: Range<u64>,
    piece_bytes: usize,
    each: &mut dyn FnMut(&[u8]) -> Result<(), S>,
) -> Result<u64, PieceError<S>> {
    let mut at = range.start;
    let mut buffer = vec![0; piece_bytes];
    while at < range.end {
        let wanted = piece_bytes.min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
        let piece = &mut buffer[..wanted];
        let n_read = file::read_at(source, piece, at).map_err(PieceError::Read)?;
        if 0 < n_read {
            each(&piece[..n_read]).map_err(PieceError::Stopped)?;
        }
        at += n_read as u64;
        if n_read < wanted {
            break;
        }
    }
    Ok(at - range.start)
}
