//! What a full block holds, in a few bytes.

/// Names the keys and values of a block: all tokens from position 0 to the block's end, and whose
/// they are. 128 bits of BLAKE3, so that nobody can make two beginnings collide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey([u8; 16]);

impl BlockKey {
    /// The empty beginning of one owner. Blocks of different owners are never shared: how fast a
    /// prompt is answered must not tell what others asked.
    pub fn root(owner: &[u8]) -> Self {
        Self::of(blake3::Hasher::new_derive_key("dsd kv block owner").update(owner))
    }

    /// This beginning and `tokens` after it.
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self::of(&hasher)
    }

    /// As bytes, for memory that outlives this process.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// From such bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    fn of(hasher: &blake3::Hasher) -> Self {
        let mut key = [0; 16];
        hasher.finalize_xof().fill(&mut key);
        Self(key)
    }
}
