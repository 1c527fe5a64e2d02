//! Token ids to text, piece by piece; never half a character.
//!
//! Pure: ids in, text out.
//!
//! Invariant: the pieces joined are the lossy UTF-8 reading of all bytes, however they are cut.

use std::sync::Arc;

use super::{model::TextModel, tools::ToolMarkup};

/// The text of one token stream.
#[derive(Debug)]
pub struct OutputDecoder {
    model: Arc<TextModel>,
    tools: Option<ToolMarkup>,
    /// Special tokens are text.
    shows_special: bool,
    utf8: Utf8Assembler,
}

impl OutputDecoder {
    /// A decoder at the start of an output. Special tokens that `tools` is made of are text.
    pub fn new(model: Arc<TextModel>, tools: Option<ToolMarkup>) -> Self {
        Self {
            model,
            tools,
            shows_special: false,
            utf8: Utf8Assembler::default(),
        }
    }

    /// A decoder at the start of a prompt, whose special tokens are the text that they are written as.
    pub fn of_prompt(model: Arc<TextModel>) -> Self {
        Self {
            shows_special: true,
            ..Self::new(model, None)
        }
    }

    /// The text that became complete with this token; empty for special tokens, for ids without a
    /// token and while a character is incomplete.
    pub fn push(&mut self, token: u32) -> String {
        let is_mark = |tools: ToolMarkup| tools.is_mark(&self.model.token_text(token));
        let is_shown = self.shows_special || self.tools.is_some_and(is_mark);
        if self.model.is_special(token) && !is_shown {
            return String::new();
        }
        self.utf8
            .push(self.model.token_bytes(token).unwrap_or_default())
    }

    /// U+FFFD if the output ends inside a character, else nothing.
    pub fn finish(&mut self) -> String {
        self.utf8.finish()
    }
}

/// Bytes to characters; holds at most three bytes.
#[derive(Debug, Default)]
struct Utf8Assembler {
    pending: Vec<u8>,
}

impl Utf8Assembler {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut incomplete = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            // Only the last bytes can still become a character.
            let may_go_on = chunks.peek().is_none()
                && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if may_go_on {
                incomplete = invalid.len();
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        drop(chunks);
        let keep_from = self.pending.len() - incomplete;
        self.pending.drain(..keep_from);
        text
    }

    fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Utf8Assembler;

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_reads_like_the_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..4),
                    "\\PC{0,3}".prop_map(String::into_bytes),
                ],
                0..12,
            ),
            cut in 1usize..5,
        ) {
            let whole: Vec<u8> = pieces.concat();
            let mut utf8 = Utf8Assembler::default();
            let mut text: String = whole.chunks(cut).map(|c| utf8.push(c)).collect();
            text += &utf8.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }
    }
}
