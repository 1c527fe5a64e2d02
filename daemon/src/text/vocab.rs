//! The bytes of every token id.

use std::collections::HashMap;

use super::added::AddedToken;

/// Ids above this are refused: no vocabulary is near it, and the table is as long as the largest.
pub(super) const ID_MAX: u32 = (1 << 22) - 1;

/// What each id decodes to; holes decode to nothing.
#[derive(Debug, Default)]
pub(super) struct TokenTable {
    /// All tokens' bytes, one after the other in the order of insertion.
    bytes: Vec<u8>,
    entries: Vec<Option<Entry>>,
    /// The ordinary token of each single byte.
    byte_ids: HashMap<u8, u32>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    start: usize,
    len: usize,
    special: bool,
    forgeable: bool,
}

impl TokenTable {
    /// Sets what `id`, at most [`ID_MAX`], decodes to. `text` is the vocabulary's spelling: byte
    /// level where all its characters are of that alphabet, else itself, as the library decodes.
    pub(super) fn insert(&mut self, id: u32, text: &str, special: bool) {
        assert!(id <= ID_MAX, "ids are checked before they are inserted");
        let start = self.bytes.len();
        let decoded: Option<Vec<u8>> = text.chars().map(byte_of).collect();
        match decoded {
            Some(decoded) => self.bytes.extend(decoded),
            None => self.bytes.extend_from_slice(text.as_bytes()),
        }
        let idx = id as usize;
        if self.entries.len() <= idx {
            self.entries.resize(idx + 1, None);
        }
        if let [byte] = self.bytes[start..] {
            self.byte_ids.entry(byte).or_insert(id);
        }
        self.entries[idx] = Some(Entry {
            start,
            len: self.bytes.len() - start,
            special,
            forgeable: false,
        });
    }

    /// An added token: the tags of reasoning stay visible even where they are declared special,
    /// because the output parser lives by them.
    pub(super) fn insert_added(&mut self, token: &AddedToken) {
        let is_tag = matches!(token.content.as_str(), "<think>" | "</think>");
        self.insert(token.id, &token.content, token.special && !is_tag);
        let entry = self
            .entries
            .get_mut(token.id as usize)
            .and_then(Option::as_mut);
        if let Some(entry) = entry {
            entry.forgeable = 1 < entry.len && !token.content.trim().is_empty();
        }
    }

    /// Appends ids that came of encoding ordinary text. A vocabulary may hold an added token among
    /// the words that merging can make; such a one is spelled out byte by byte instead.
    pub(super) fn append_ordinary(&self, encoded: &[u32], ids: &mut Vec<u32>) {
        for id in encoded {
            match self.entry(*id) {
                Some(entry) if entry.forgeable => {
                    let bytes = &self.bytes[entry.start..entry.start + entry.len];
                    ids.extend(bytes.iter().filter_map(|byte| self.byte_ids.get(byte)));
                }
                _ => ids.push(*id),
            }
        }
    }

    /// One more than the largest id.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of the longest token.
    pub(super) fn token_len_max(&self) -> usize {
        let lens = self.entries.iter().flatten().map(|entry| entry.len);
        lens.max().unwrap_or(0)
    }

    /// The bytes of a token, special ones too; `None` for a hole.
    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let entry = self.entry(id)?;
        Some(&self.bytes[entry.start..entry.start + entry.len])
    }

    /// True for tokens that are left out of decoded text.
    pub(super) fn is_special(&self, id: u32) -> bool {
        self.entry(id).is_some_and(|e| e.special)
    }

    fn entry(&self, id: u32) -> Option<Entry> {
        *self.entries.get(id as usize)?
    }
}

/// The byte-level alphabet and what it stands for.
pub(super) fn byte_level_alphabet() -> impl Iterator<Item = (char, u8)> {
    ('\0'..='\u{143}').filter_map(|c| Some((c, byte_of(c)?)))
}

/// The byte that a character of the byte-level alphabet stands for (GPT-2): printable Latin-1
/// stands for itself, the other 68 bytes are U+0100 onwards in their order.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::byte_of;

    #[test]
    fn the_byte_level_alphabet_covers_every_byte_once() {
        let mut bytes: Vec<u8> = ('\0'..='\u{200}').filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }
}
