//! API keys: made, digested, compared.
//!
//! Invariant: a key itself is in memory only while it is made or compared; what is kept is its
//! digest.

use std::{fmt, io, time::Instant};

/// Visible ASCII characters of a key.
pub(super) const KEY_LENS: std::ops::RangeInclusive<usize> = 16..=256;
/// How a digest begins in a file, so that another function can come beside it one day.
const PREFIX: &str = "blake3:";
/// Random bytes of a new key; nobody guesses one of 2^256.
const KEY_BYTES: usize = 32;

/// Digest of a key. Unkeyed and without salt: keys are long and random, so that there is no list to
/// try, and an operator can make one with `b3sum`. Compared in constant time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyDigest(blake3::Hash);

/// A key that is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// What is known of it.
    pub digest: KeyDigest,
    /// After this moment it is refused; `None` for a key that was not replaced.
    pub until: Option<Instant>,
}

impl KeyDigest {
    /// Of a key as a client sends it.
    pub fn of(key: &str) -> Self {
        Self(blake3::hash(key.as_bytes()))
    }

    /// Reads what [`fmt::Display`] writes: `blake3:` and 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix(PREFIX)?;
        blake3::Hash::from_hex(hex).ok().map(Self)
    }

    /// The digest's bytes, to derive other secrets from.
    pub(super) fn bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
}

impl fmt::Display for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0.to_hex())
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A new key from the system's generator.
///
/// # Errors
/// When the system gives no random bytes.
pub(super) fn fresh() -> io::Result<String> {
    let mut bytes = [0; KEY_BYTES];
    let mut n_filled = 0;
    while n_filled < KEY_BYTES {
        let flags = rustix::rand::GetRandomFlags::empty();
        n_filled += rustix::rand::getrandom(&mut bytes[n_filled..], flags)?;
    }
    Ok(format!("sk-{}", blake3::Hash::from_bytes(bytes).to_hex()))
}

/// Whether a text may be a key at all.
pub(super) fn is_key(text: &str) -> bool {
    KEY_LENS.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_keys_are_keys_and_differ() {
        let (a, b) = (fresh().unwrap(), fresh().unwrap());
        assert!(is_key(&a) && is_key(&b), "{a} {b}");
        assert_ne!(a, b);
        assert_eq!(a.len(), 3 + 64);
    }

    #[test]
    fn digests_are_read_as_they_are_written_and_nothing_else_is() {
        let digest = KeyDigest::of("sk-0123456789abcdef");
        let text = digest.to_string();
        assert_eq!(KeyDigest::parse(&text), Some(digest));
        for bad in [
            "",
            "blake3:",
            &text[..text.len() - 1],
            &format!("{text}0"),
            &text.replace("blake3", "sha256"),
            &text[7..],
            &format!("blake3:{}", "g".repeat(64)),
        ] {
            assert_eq!(KeyDigest::parse(bad), None, "{bad}");
        }
    }
}
