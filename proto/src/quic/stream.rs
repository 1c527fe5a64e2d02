//! Frames on QUIC streams.
//!
//! Does not know what the messages mean.

use quinn::{ConnectionError, ReadError, ReadExactError, RecvStream};

use crate::wire::{
    frame::{FrameError, HEADER_LEN, Header},
    schema::Kind,
};

/// Stop and reset code for "not wanted any more".
pub(super) const CODE_CANCELLED: u32 = 1;
/// Close code of a server that goes down.
pub(super) const CODE_SHUTDOWN: u32 = 2;
/// Close code for a peer whose certificate names another cluster, or nobody.
pub(super) const CODE_FORBIDDEN: u32 = 3;
/// The server has as many connections as it may.
pub(super) const CODE_FULL: u32 = 4;

/// A body is grown by this much at a time, so that an announced length alone takes no memory.
const READ_CHUNK: usize = 64 << 10;

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadFrameError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the stream was reset")]
    Reset,
    #[error("the connection was lost")]
    Connection(#[source] ConnectionError),
}

/// Reads one frame of a welcome kind; `None` when the stream ended before its first byte.
pub(super) async fn read_frame(
    recv: &mut RecvStream,
    welcome: &[Kind],
) -> Result<Option<(Header, Vec<u8>)>, ReadFrameError> {
    let mut head = [0; HEADER_LEN];
    match recv.read_exact(&mut head).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(read_error(e, HEADER_LEN, 0)),
    }
    let header = Header::from_bytes(&head)?;
    header.kind(welcome)?;
    let body_len = header.body_len as usize;
    let mut body = Vec::new();
    while body.len() < body_len {
        let start = body.len();
        body.resize(body_len.min(start + READ_CHUNK), 0);
        if let Err(e) = recv.read_exact(&mut body[start..]).await {
            return Err(read_error(e, HEADER_LEN + body_len, HEADER_LEN + start));
        }
    }
    Ok(Some((header, body)))
}

/// Reads to the end of a stream that must have nothing more on it.
pub(super) async fn read_end(recv: &mut RecvStream) -> Result<(), ReadFrameError> {
    match recv.read_chunk(READ_CHUNK, true).await {
        Ok(None) => Ok(()),
        Ok(Some(chunk)) => Err(FrameError::Trailing {
            n: chunk.bytes.len(),
        }
        .into()),
        Err(e) => Err(from_read_error(e)),
    }
}

fn read_error(error: ReadExactError, expected: usize, before: usize) -> ReadFrameError {
    match error {
        ReadExactError::FinishedEarly(n) => FrameError::Truncated {
            expected,
            found: before + n,
        }
        .into(),
        ReadExactError::ReadError(e) => from_read_error(e),
    }
}

fn from_read_error(error: ReadError) -> ReadFrameError {
    match error {
        ReadError::ConnectionLost(e) => ReadFrameError::Connection(e),
        ReadError::Reset(_)
        | ReadError::ClosedStream
        | ReadError::IllegalOrderedRead
        | ReadError::ZeroRttRejected => ReadFrameError::Reset,
    }
}
