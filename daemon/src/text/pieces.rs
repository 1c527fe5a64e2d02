//! Where a text may be cut so that its pieces have the tokens of the whole.
//!
//! The tokenizer library takes hundreds of bytes of memory for a byte of text; encoded in pieces, a
//! text of any length takes what [`PIECE_LEN`] bytes take. Cuts are known for the pre-tokenizers of
//! [`split`]; for another one a text is a single piece.
//!
//! Two kinds of places are cut at, `a` being the character before and `b` the one behind:
//! 1. `a` is a letter or digit that some step takes in a run of its kind, with nothing behind the
//!    run, and `b` is in no such run: the run ends there.
//! 2. `b` is a space and `a` no whitespace: no expression takes a space behind anything but
//!    whitespace, and one always takes a space. Not where only spaces before words are taken.
//!
//! In both cases a match ends at the cut in the whole text, too. What is left of it is cut as
//! before: expressions look ahead only behind whitespace, and `a` is none. What is right of it also:
//! none looks back. NFC leaves `a` alone, or at least what it is, because `b` combines with nothing.
//!
//! Invariant: the pieces' tokens, one after the other, are the whole text's tokens.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

use super::{error::TextError, split, vocab};
use crate::runtime::heap;

/// Bytes of a piece where the text has places to cut.
pub(super) const PIECE_LEN: usize = 8 << 10;
/// Bytes of a piece that has no place to cut. Tokenising it takes 80 MB (measured, SmolLM2).
pub(super) const WHOLE_LEN_MAX: usize = 256 << 10;

/// Held while a piece longer than [`PIECE_LEN`] is encoded: one at a time in the process.
static LONG_PIECE: Mutex<()> = Mutex::new(());

/// What is certain about a tokenizer.
#[derive(Debug)]
pub(super) struct Cuts {
    /// The second kind of places counts.
    before_spaces: bool,
    /// Only ASCII text has as many bytes when it is tokenised as it came with.
    normalizes: bool,
    /// Bytes that have a token. The others are lost on the way.
    keeps: [bool; 256],
    /// Bytes of the longest token, not 0.
    token_len_max: usize,
}

impl Cuts {
    /// What is certain about `plain`, whose longest token has `token_len_max` bytes; `None` when it
    /// has parts of which nothing is known.
    pub(super) fn of(plain: &Tokenizer, token_len_max: usize) -> Option<Self> {
        let ModelWrapper::BPE(bpe) = plain.get_model() else {
            return None;
        };
        let is_empty = |text: &Option<String>| text.as_deref().is_none_or(str::is_empty);
        let is_plain = bpe.dropout.is_none()
            && is_empty(&bpe.continuing_subword_prefix)
            && is_empty(&bpe.end_of_word_suffix);
        let pre_tokenizer = serde_json::to_value(plain.get_pre_tokenizer()?).ok()?;
        let before_spaces = split::takes_spaces(&pre_tokenizer)?;
        let normalizes = match plain.get_normalizer() {
            None => false,
            Some(normalizer) => match serde_json::to_value(normalizer).ok()? {
                Value::Object(json) if json.get("type")? == "NFC" => true,
                Value::Object(json) if json.get("normalizers")?.as_array()?.is_empty() => false,
                _ => return None,
            },
        };
        let mut keeps = [false; 256];
        for (c, byte) in vocab::byte_level_alphabet() {
            let id = plain.token_to_id(c.encode_utf8(&mut [0; 4]));
            keeps[usize::from(byte)] = id.is_some();
        }
        is_plain.then_some(Self {
            before_spaces,
            normalizes,
            keeps,
            token_len_max: token_len_max.max(1),
        })
    }

    /// Bytes of `text` that are surely tokenised.
    pub(super) fn bytes_kept(&self, text: &str) -> usize {
        match self.normalizes && !text.is_ascii() {
            true => 0,
            false => text.bytes().filter(|b| self.keeps[usize::from(*b)]).count(),
        }
    }

    /// Tokens that so many bytes make at least.
    pub(super) fn tokens_min(&self, bytes_kept: usize) -> usize {
        bytes_kept.div_ceil(self.token_len_max)
    }

    /// Length of the first piece of `text`: to the last cut within [`PIECE_LEN`], else to the first
    /// one behind it, else all.
    pub(super) fn piece_len(&self, text: &str) -> usize {
        if text.len() <= PIECE_LEN {
            return text.len();
        }
        let near = text.floor_char_boundary(PIECE_LEN);
        let is_cut = |at: &usize| self.is_cut(text, *at);
        let before = text[..near].char_indices().rev().map(|(at, _)| at);
        let behind = text[near..].char_indices().map(|(at, _)| near + at);
        before
            .take_while(|at| 0 < *at)
            .find(is_cut)
            .or_else(|| behind.into_iter().find(is_cut))
            .unwrap_or(text.len())
    }

    /// True when `text` may be cut at byte `at`, a border of characters.
    pub(super) fn is_cut(&self, text: &str, at: usize) -> bool {
        let (before, behind) = text.split_at(at);
        let (Some(a), Some(b)) = (before.chars().next_back(), behind.chars().next()) else {
            return false;
        };
        let other = b.is_ascii() || matches!(b, '、' | '。' | '，');
        let ends_run = match a {
            '0'..='9' => other && !b.is_ascii_digit(),
            'A'..='Z' | 'a'..='z' => other && !b.is_ascii_alphabetic(),
            'ぁ'..='ゖ' | 'ァ'..='ヺ' | '\u{4E00}'..='\u{9FA5}' => {
                other && !b.is_ascii_alphabetic()
            }
            _ => false,
        };
        ends_run || self.before_spaces && b == ' ' && !a.is_whitespace()
    }
}

/// Leave to encode a long piece. Gives its memory back at the end.
#[derive(Debug)]
pub(super) struct LongPiece {
    _held: MutexGuard<'static, ()>,
}

impl Drop for LongPiece {
    fn drop(&mut self) {
        heap::give_back();
    }
}

/// Leave to encode a piece of `len` bytes; to be held until that is done. Waits while another long
/// one is being encoded.
///
/// # Errors
/// [`TextError::LongWhole`].
pub(super) fn admit(len: usize) -> Result<Option<LongPiece>, TextError> {
    if WHOLE_LEN_MAX < len {
        return Err(TextError::LongWhole {
            len,
            max: WHOLE_LEN_MAX,
        });
    }
    let is_long = PIECE_LEN < len;
    Ok(is_long.then(|| LongPiece {
        _held: LONG_PIECE.lock().unwrap_or_else(PoisonError::into_inner),
    }))
}
