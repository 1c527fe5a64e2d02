//! The envelope of every message: 32 bytes of header, an rkyv archive, a raw tail.
//!
//! Header, little-endian, the same in every release: magic u16, header version u8, flags u8, type
//! u16, type version u16, schema hash u32, epoch u64, body length u32, tail length u32, reserved u32.
//!
//! Invariant: nothing of a body is read, or allocated for, before its header was accepted: lengths,
//! then type, version and hash. rkyv by itself takes the bytes of a newer struct for an older one and
//! yields garbage, so the header has to decide.

use rkyv::{
    api::high::{HighDeserializer, HighSerializer, HighValidator},
    bytecheck::CheckBytes,
    rancor::Failure,
    ser::allocator::ArenaHandle,
    util::AlignedVec,
};

use crate::{
    code::Code,
    ids::Epoch,
    wire::schema::{Class, Kind, Message},
};

/// Bytes of a header.
pub const HEADER_LEN: usize = 32;
/// First two bytes of every frame: "ds".
pub const MAGIC: u16 = u16::from_le_bytes(*b"ds");
/// The one header layout there is.
pub const HEADER_VERSION: u8 = 1;

/// Longest body of any class.
const BODY_LEN_MAX: u32 = Class::Request.body_len_max();

/// What rkyv needs of a type so that it can be written, checked and read as a body.
pub trait Body: Sized {
    /// Appends the archive of `self` to nothing.
    fn to_archive(&self) -> Option<Vec<u8>>;
    /// Checks `bytes` and copies the value out; `None` when they are not an archive of `Self`.
    fn from_archive(bytes: &[u8]) -> Option<Self>;
}

impl<T> Body for T
where
    T: rkyv::Archive
        + for<'a> rkyv::Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Failure>>,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Failure>>
        + rkyv::Deserialize<T, HighDeserializer<Failure>>,
{
    fn to_archive(&self) -> Option<Vec<u8>> {
        rkyv::to_bytes::<Failure>(self)
            .ok()
            .map(AlignedVec::into_vec)
    }

    fn from_archive(bytes: &[u8]) -> Option<Self> {
        let archived = rkyv::access::<T::Archived, Failure>(bytes).ok()?;
        rkyv::deserialize::<T, Failure>(archived).ok()
    }
}

/// A header that was found well-formed; whether its message is welcome is asked of [`Header::kind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type number of the message.
    pub type_id: u16,
    /// Layout version of the type.
    pub version: u16,
    /// Hash of the sender's field list.
    pub schema_hash: u32,
    /// Membership version the message belongs to.
    pub epoch: Epoch,
    /// Bytes of the archive.
    pub body_len: u32,
    /// Bytes after the archive.
    pub tail_len: u32,
}

/// Why bytes are not a frame that may be taken here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Less than a header, or less than the header announced.
    #[error("the frame ends after {found} of {expected} bytes")]
    Truncated {
        /// Bytes there should be.
        expected: usize,
        /// Bytes there are.
        found: usize,
    },
    /// More bytes than the header announced.
    #[error("{n} bytes follow the frame")]
    Trailing {
        /// Bytes too many.
        n: usize,
    },
    /// Not a frame of ours at all.
    #[error("the frame begins with {found:#06x}, expected {MAGIC:#06x}")]
    BadMagic {
        /// What stands there.
        found: u16,
    },
    /// A header layout of a later release.
    #[error("header version {found}, this build speaks {HEADER_VERSION}")]
    BadHeaderVersion {
        /// What stands there.
        found: u8,
    },
    /// Bits that no release has given a meaning.
    #[error("header flags {flags:#04x} and reserved bits {reserved:#010x} must be zero")]
    ReservedBits {
        /// The flags byte.
        flags: u8,
        /// The reserved word.
        reserved: u32,
    },
    /// A length above the limit of its class.
    #[error("the {part} has {found} bytes, at most {max} are allowed")]
    TooLong {
        /// "body" or "tail".
        part: &'static str,
        /// Announced length.
        found: u32,
        /// The limit.
        max: u32,
    },
    /// A type that has no place here.
    #[error("message type {found:#06x} is not expected here")]
    UnknownType {
        /// Announced type.
        found: u16,
    },
    /// A version this build does not speak.
    #[error("{name} comes in version {found}, this build speaks {expected}")]
    WrongVersion {
        /// The message.
        name: &'static str,
        /// Announced version.
        found: u16,
        /// Version of this build.
        expected: u16,
    },
    /// The same version with other fields: a build that is not a release.
    #[error("{name} comes with schema {found:#010x}, this build has {expected:#010x}")]
    WrongSchema {
        /// The message.
        name: &'static str,
        /// Announced hash.
        found: u32,
        /// Hash of this build.
        expected: u32,
    },
    /// The archive is not a value of its type.
    #[error("the body of {name} is damaged")]
    BadBody {
        /// The message.
        name: &'static str,
    },
}

impl FrameError {
    /// The code a peer is answered with.
    pub fn code(&self) -> Code {
        match self {
            Self::Truncated { .. }
            | Self::Trailing { .. }
            | Self::BadMagic { .. }
            | Self::ReservedBits { .. }
            | Self::BadBody { .. } => Code::BadFrame,
            Self::BadHeaderVersion { .. }
            | Self::WrongVersion { .. }
            | Self::WrongSchema { .. } => Code::VersionMismatch,
            Self::TooLong { .. } => Code::PayloadTooLarge,
            Self::UnknownType { .. } => Code::UnknownMessage,
        }
    }
}

impl Header {
    /// The header of a message with a body of `body_len` bytes.
    fn of<M: Message>(epoch: Epoch, body_len: u32) -> Self {
        Self {
            type_id: M::TYPE,
            version: M::VERSION,
            schema_hash: M::HASH,
            epoch,
            body_len,
            tail_len: 0,
        }
    }

    /// The 32 bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2] = HEADER_VERSION;
        bytes[4..6].copy_from_slice(&self.type_id.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.schema_hash.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.tail_len.to_le_bytes());
        bytes
    }

    /// Reads a header and checks what can be checked without knowing which messages are welcome.
    ///
    /// # Errors
    /// [`FrameError`]: magic, header version, reserved bits, or lengths above every class.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [m0, m1, header_version, flags, t0, t1, v0, v1, rest @ ..] = *bytes;
        let [h0, h1, h2, h3, e0, e1, e2, e3, e4, e5, e6, e7, rest @ ..] = rest;
        let [b0, b1, b2, b3, l0, l1, l2, l3, r0, r1, r2, r3] = rest;
        let magic = u16::from_le_bytes([m0, m1]);
        if magic != MAGIC {
            return Err(FrameError::BadMagic { found: magic });
        }
        if header_version != HEADER_VERSION {
            return Err(FrameError::BadHeaderVersion {
                found: header_version,
            });
        }
        let reserved = u32::from_le_bytes([r0, r1, r2, r3]);
        if flags != 0 || reserved != 0 {
            return Err(FrameError::ReservedBits { flags, reserved });
        }
        let header = Self {
            type_id: u16::from_le_bytes([t0, t1]),
            version: u16::from_le_bytes([v0, v1]),
            schema_hash: u32::from_le_bytes([h0, h1, h2, h3]),
            epoch: Epoch(u64::from_le_bytes([e0, e1, e2, e3, e4, e5, e6, e7])),
            body_len: u32::from_le_bytes([b0, b1, b2, b3]),
            tail_len: u32::from_le_bytes([l0, l1, l2, l3]),
        };
        check_len("body", header.body_len, BODY_LEN_MAX)?;
        check_len("tail", header.tail_len, Class::Request.tail_len_max())?;
        Ok(header)
    }

    /// Finds the header among the messages that may come here, and holds it to that one's version,
    /// fields and size class.
    ///
    /// # Errors
    /// [`FrameError`]: type, version, hash, or a length above its class.
    pub fn kind<'k>(&self, welcome: &'k [Kind]) -> Result<&'k Kind, FrameError> {
        let kind = welcome
            .iter()
            .find(|kind| kind.type_id == self.type_id)
            .ok_or(FrameError::UnknownType {
                found: self.type_id,
            })?;
        if kind.version != self.version {
            return Err(FrameError::WrongVersion {
                name: kind.name,
                found: self.version,
                expected: kind.version,
            });
        }
        if kind.schema_hash != self.schema_hash {
            return Err(FrameError::WrongSchema {
                name: kind.name,
                found: self.schema_hash,
                expected: kind.schema_hash,
            });
        }
        check_len("body", self.body_len, kind.class.body_len_max())?;
        check_len("tail", self.tail_len, kind.class.tail_len_max())?;
        Ok(kind)
    }
}

/// Header and archive of a message, ready to be sent.
///
/// # Errors
/// [`FrameError::TooLong`] when the message exceeds its class, [`FrameError::BadBody`] when rkyv
/// cannot address it.
pub fn encode<M: Message>(message: &M, epoch: Epoch) -> Result<Vec<u8>, FrameError> {
    let body = message
        .to_archive()
        .ok_or(FrameError::BadBody { name: M::NAME })?;
    let body_len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    check_len("body", body_len, M::CLASS.body_len_max())?;
    let mut frame = Vec::with_capacity(HEADER_LEN + body.len());
    frame.extend_from_slice(&Header::of::<M>(epoch, body_len).to_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The message of a body whose header is at hand.
///
/// # Errors
/// [`FrameError`]; the header is checked again, so that no caller can skip it.
pub fn decode_body<M: Message>(header: &Header, body: &[u8]) -> Result<M, FrameError> {
    header.kind(&[Kind::of::<M>()])?;
    let expected = header.body_len as usize;
    if body.len() < expected {
        return Err(FrameError::Truncated {
            expected,
            found: body.len(),
        });
    }
    if expected < body.len() {
        return Err(FrameError::Trailing {
            n: body.len() - expected,
        });
    }
    M::from_archive(body).ok_or(FrameError::BadBody { name: M::NAME })
}

/// The message of a whole frame.
///
/// # Errors
/// [`FrameError`].
pub fn decode<M: Message>(frame: &[u8]) -> Result<(Header, M), FrameError> {
    let truncated = FrameError::Truncated {
        expected: HEADER_LEN,
        found: frame.len(),
    };
    let (head, body) = frame.split_first_chunk::<HEADER_LEN>().ok_or(truncated)?;
    let header = Header::from_bytes(head)?;
    let message = decode_body(&header, body)?;
    Ok((header, message))
}

fn check_len(part: &'static str, found: u32, max: u32) -> Result<(), FrameError> {
    if max < found {
        return Err(FrameError::TooLong { part, found, max });
    }
    Ok(())
}
