//! Frames on the Unix socket between an agent and its ranks.

use std::io::{self, Read};

use dsd_proto::{
    ids::Epoch,
    wire::{
        FrameError, Header, Message,
        frame::{self, HEADER_LEN},
    },
};

/// Why a peer's bytes are of no use.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The socket failed.
    #[error("the socket to a rank failed")]
    Io(#[from] io::Error),
    /// The bytes are no frame.
    #[error("a rank's socket carries something else than frames")]
    Frame(#[from] FrameError),
}

/// A message with its header, ready to be written.
///
/// # Errors
/// [`FrameError`] when it is too long.
pub(super) fn encode<M: Message>(message: &M, epoch: u64) -> Result<Vec<u8>, FrameError> {
    frame::encode(message, Epoch(epoch))
}

/// One frame whose message is still to be decoded.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) header: Header,
    body: Vec<u8>,
}

impl Frame {
    /// The message, if it is an `M`.
    pub(super) fn is<M: Message>(&self) -> bool {
        self.header.type_id == M::TYPE
    }

    /// Decodes the message.
    pub(super) fn decode<M: Message>(&self) -> Result<M, FrameError> {
        frame::decode_body(&self.header, &self.body)
    }
}

/// Reads a frame, waiting for it; `None` at the end of the stream.
pub(super) fn read(from: &mut impl Read) -> Result<Option<Frame>, SocketError> {
    let mut head = [0; HEADER_LEN];
    match from.read_exact(&mut head) {
        Ok(()) => {}
        // A peer that was killed may leave bytes unread, which resets the socket.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e.into()),
    }
    let header = Header::from_bytes(&head)?;
    // Bounded: the header was held to the longest body there is.
    let mut body = vec![0; header.body_len as usize];
    from.read_exact(&mut body)?;
    Ok(Some(Frame { header, body }))
}

/// Bytes of a socket that does not block, cut into frames as they become whole.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    bytes: Vec<u8>,
}

/// Bytes read from a socket at once.
const READ_LEN: usize = 64 << 10;

impl Incoming {
    /// Takes what the socket has; false when its other end is closed.
    pub(super) fn fill(&mut self, from: &mut impl Read) -> io::Result<bool> {
        loop {
            let len = self.bytes.len();
            self.bytes.resize(len + READ_LEN, 0);
            let outcome = from.read(&mut self.bytes[len..]);
            self.bytes.truncate(len + *outcome.as_ref().unwrap_or(&0));
            match outcome {
                Ok(0) => return Ok(false),
                Ok(n) if n < READ_LEN => return Ok(true),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next whole frame.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((head, rest)) = self.bytes.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = Header::from_bytes(head)?;
        let Some(body) = rest.get(..header.body_len as usize) else {
            return Ok(None);
        };
        let body = body.to_vec();
        self.bytes.drain(..HEADER_LEN + body.len());
        Ok(Some(Frame { header, body }))
    }
}

#[cfg(test)]
mod tests {
    use dsd_proto::wire::group::{GroupCancel, GroupStop};

    use super::*;

    #[test]
    fn frames_come_out_whole_however_their_bytes_arrive() {
        let mut bytes = encode(&GroupCancel { id: 7 }, 3).unwrap();
        bytes.extend(encode(&GroupStop { drain_ms: 9 }, 3).unwrap());
        for len in 1..bytes.len() {
            let mut incoming = Incoming::default();
            let mut frames = Vec::new();
            for piece in bytes.chunks(len) {
                incoming.fill(&mut &*piece).unwrap();
                while let Some(frame) = incoming.next().unwrap() {
                    frames.push(frame);
                }
            }
            let [cancel, stop] = &frames[..] else {
                panic!("two frames: {frames:?}")
            };
            assert_eq!(cancel.header.epoch, Epoch(3));
            assert_eq!(cancel.decode::<GroupCancel>().unwrap().id, 7);
            assert!(stop.is::<GroupStop>() && !stop.is::<GroupCancel>());
        }
        let mut reader = &*bytes;
        assert!(read(&mut reader).unwrap().unwrap().is::<GroupCancel>());
        assert!(read(&mut reader).unwrap().unwrap().is::<GroupStop>());
        assert!(read(&mut reader).unwrap().is_none());
    }

    #[test]
    fn noise_is_refused() {
        let mut incoming = Incoming::default();
        incoming.fill(&mut &[7u8; 64][..]).unwrap();
        assert!(incoming.next().is_err());
    }
}
