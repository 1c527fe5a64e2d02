//! One model's text side: tokenizer, special tokens, chat template.
//!
//! Encoding a long prompt takes milliseconds; callers keep it off the async threads.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use tokenizers::Tokenizer;

use super::{
    added::{AddedToken, AddedVocabulary, Piece},
    encoding::ChatEncoding,
    error::TextError,
    gguf, load,
    pieces::{self, Cuts},
    template::ChatTemplates,
    vocab::TokenTable,
};
use crate::weights::Checkpoint;

/// Turns text into tokens and back for one model. Shared between threads by `Arc`.
#[derive(Debug)]
pub struct TextModel {
    /// Without added vocabulary: whatever it is given stays ordinary text.
    plain: Tokenizer,
    /// `None`: any text is encoded whole.
    cuts: Option<Cuts>,
    added: AddedVocabulary,
    first_chars: HashSet<char>,
    table: TokenTable,
    special: SpecialTokens,
    templates: Option<ChatTemplates>,
    /// What writes prompts where there is no template.
    encoding: Option<ChatEncoding>,
}

/// Tokens before, between and behind what surrounds a hole: DeepSeek's, Qwen's, StarCoder's.
const HOLE_MARKS: [[&str; 3]; 3] = [
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
];

/// How the prompt of a raw completion is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptForm {
    /// BOS goes in front where the model wants it.
    pub add_special: bool,
    /// What spells an added token is that token: who writes raw prompts templates by itself.
    pub parse_special: bool,
}

impl Default for PromptForm {
    fn default() -> Self {
        Self {
            add_special: true,
            parse_special: true,
        }
    }
}

/// The named tokens of a tokenizer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) pad: Option<String>,
    pub(super) unk: Option<String>,
    /// BOS goes in front of raw text.
    pub(super) add_bos: bool,
}

/// What a loader found; the parts of a [`TextModel`].
pub(super) struct Parts {
    pub(super) file: PathBuf,
    pub(super) plain: Tokenizer,
    pub(super) table: TokenTable,
    pub(super) added: Vec<AddedToken>,
    pub(super) special: SpecialTokens,
    /// Name and source.
    pub(super) templates: Vec<(String, String)>,
    /// The source of the encoder that came with the model.
    pub(super) encoder_source: Option<String>,
}

impl TextModel {
    /// The text side of an open checkpoint.
    ///
    /// # Errors
    /// [`TextError`] naming the file and the part that cannot be used.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        match checkpoint.gguf_metadata() {
            Some(metadata) => Self::from_parts(gguf::load(metadata)?),
            None => Self::from_parts(load::folder(checkpoint.path())?),
        }
    }

    /// The text side of a folder with `tokenizer.json` (weights are not needed), or of anything
    /// else that [`Checkpoint::open`] opens.
    ///
    /// # Errors
    /// [`TextError`] naming the file and the part that cannot be used.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        if path.join(load::TOKENIZER_NAME).is_file() {
            return Self::from_parts(load::folder(path)?);
        }
        Self::from_checkpoint(&Checkpoint::open(path)?)
    }

    fn from_parts(parts: Parts) -> Result<Self, TextError> {
        let templates = ChatTemplates::compile(&parts.file, parts.templates);
        let added = AddedVocabulary::new(parts.added);
        let has_token = |token: &str| added.id_of(token).is_some();
        let encoding = ChatEncoding::of_vocabulary(has_token, parts.encoder_source.as_deref());
        let mut table = parts.table;
        let cuts = Cuts::of(&parts.plain, table.token_len_max());
        for token in added.tokens() {
            table.insert_added(token);
        }
        Ok(Self {
            plain: parts.plain,
            cuts,
            first_chars: added.first_chars(),
            added,
            table,
            special: parts.special,
            templates,
            encoding,
        })
    }

    /// Encodes text as ordinary text: what spells a special token becomes its characters. BOS goes
    /// in front when asked for and known.
    ///
    /// # Errors
    /// [`TextError::Encode`], [`TextError::LongWhole`].
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, TextError> {
        let mut ids: Vec<u32> = self.bos_id().filter(|_| add_bos).into_iter().collect();
        self.encode_plain(text, usize::MAX, &mut ids)?;
        Ok(ids)
    }

    /// Encodes the prompt of a raw completion. Stops once it is certain that there are more than
    /// `tokens_max` tokens.
    ///
    /// # Errors
    /// [`TextError::TooLong`], [`TextError::Encode`], [`TextError::LongWhole`].
    pub fn encode_prompt(
        &self,
        text: &str,
        form: PromptForm,
        tokens_max: usize,
    ) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        match form.parse_special {
            true => ids = self.encode_marked(text, None, tokens_max)?,
            false => self.encode_plain(text, tokens_max, &mut ids)?,
        }
        // A client that templates by itself may have written it.
        let bos = self
            .bos_id()
            .filter(|_| form.add_special && self.special.add_bos);
        if let Some(bos) = bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Encodes what stands before and behind a hole, in the order that the model was trained to fill it;
    /// `None` where its vocabulary has no tokens for that. What the texts spell stays text.
    ///
    /// # Errors
    /// [`TextError::TooLong`], [`TextError::Encode`], [`TextError::LongWhole`].
    pub fn encode_hole(
        &self,
        before: &str,
        behind: &str,
        tokens_max: usize,
    ) -> Option<Result<Vec<u32>, TextError>> {
        let marks = HOLE_MARKS.iter().find_map(|marks| {
            let [first, second, third] = marks.map(|mark| self.added_id(mark));
            Some([first?, second?, third?])
        });
        let [first, second, third] = marks?;
        let encode = || {
            let bos = self.bos_id().filter(|_| self.special.add_bos);
            let mut ids: Vec<u32> = bos.into_iter().chain([first]).collect();
            self.encode_plain(before, tokens_max, &mut ids)?;
            ids.push(second);
            self.encode_plain(behind, tokens_max, &mut ids)?;
            ids.push(third);
            Ok(ids)
        };
        Some(encode())
    }

    /// Encodes text in which special and added tokens count. For text of our own only; adds no BOS.
    ///
    /// # Errors
    /// [`TextError::Encode`], [`TextError::LongWhole`].
    pub fn encode_trusted(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_marked(text, None, usize::MAX)
    }

    /// Decodes a whole output at once; special tokens are left out when `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let shown = ids
            .iter()
            .filter(|id| !skip_special || !self.is_special(**id));
        let bytes: Vec<u8> = shown
            .flat_map(|id| self.token_bytes(*id).unwrap_or_default())
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// One more than the largest token id. Embeddings may have more rows; those ids are never to be
    /// sampled.
    pub fn vocab_len(&self) -> usize {
        self.table.len()
    }

    /// The bytes of a token; `None` for an id without one. Not always whole characters.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.table.bytes(id)
    }

    /// The text of a token, with U+FFFD for incomplete characters; empty for an id without one.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id).unwrap_or_default()).into_owned()
    }

    /// True for tokens that are left out of decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// The token at the start of a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.added.id_of(self.special.bos.as_deref()?)
    }

    /// The token at the end of a sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.added.id_of(self.special.eos.as_deref()?)
    }

    /// The added token that reads so.
    pub fn added_id(&self, content: &str) -> Option<u32> {
        self.added.id_of(content)
    }

    /// All added tokens, special or not.
    pub fn added_ids(&self) -> HashSet<u32> {
        self.added.tokens().iter().map(|token| token.id).collect()
    }

    /// True when raw prompts start with BOS.
    pub fn adds_bos(&self) -> bool {
        self.special.add_bos
    }

    /// True when [`TextModel::render_chat`] can work.
    pub fn has_chat_template(&self) -> bool {
        self.templates.is_some() || self.encoding.is_some()
    }

    /// The default chat template.
    pub fn chat_template(&self) -> Option<&str> {
        let sources = self.templates.as_ref()?.sources();
        sources.first().map(String::as_str)
    }

    /// Encodes text whose genuine added tokens are those not spoilt by `mark`. Stops once it is
    /// certain that there are more than `tokens_max` tokens.
    pub(super) fn encode_marked(
        &self,
        text: &str,
        mark: Option<char>,
        tokens_max: usize,
    ) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for piece in self.added.split(text, mark) {
            match (piece, mark) {
                (Piece::Token(id), _) => ids.push(id),
                (Piece::Text(text), None) => self.encode_plain(text, tokens_max, &mut ids)?,
                (Piece::Text(text), Some(mark)) => {
                    self.encode_plain(&text.replace(mark, ""), tokens_max, &mut ids)?;
                }
            }
        }
        Ok(ids)
    }

    #[cfg(test)]
    pub(super) fn added(&self) -> &AddedVocabulary {
        &self.added
    }

    pub(super) fn first_chars(&self) -> &HashSet<char> {
        &self.first_chars
    }

    pub(super) fn special(&self) -> &SpecialTokens {
        &self.special
    }

    pub(super) fn templates(&self) -> Option<&ChatTemplates> {
        self.templates.as_ref()
    }

    pub(super) fn encoding(&self) -> Option<ChatEncoding> {
        self.encoding
    }

    #[cfg(test)]
    pub(super) fn cuts(&self) -> Option<&Cuts> {
        self.cuts.as_ref()
    }

    /// Appends the tokens of `text`, piece by piece. Stops once it is certain that `ids` will be
    /// more than `tokens_max`.
    fn encode_plain(
        &self,
        text: &str,
        tokens_max: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let cuts = self.cuts.as_ref();
        let bytes_kept = |text| cuts.map_or(0, |cuts| cuts.bytes_kept(text));
        let mut bytes_left = bytes_kept(text);
        let mut rest = text;
        while !rest.is_empty() {
            let tokens_min = ids.len() + cuts.map_or(0, |cuts| cuts.tokens_min(bytes_left));
            if tokens_max < tokens_min {
                return Err(TextError::TooLong {
                    tokens_min,
                    max: tokens_max,
                });
            }
            let piece_len = cuts.map_or(rest.len(), |cuts| cuts.piece_len(rest));
            let (piece, behind) = rest.split_at(piece_len);
            let _held = pieces::admit(piece.len())?;
            self.encode_piece(piece, ids)?;
            bytes_left -= bytes_kept(piece).min(bytes_left);
            rest = behind;
        }
        Ok(())
    }

    /// Appends the tokens of a piece, however long.
    pub(super) fn encode_piece(&self, piece: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let encoding = self
            .plain
            .encode_fast(piece, false)
            .map_err(|source| TextError::Encode { source })?;
        self.table.append_ordinary(encoding.get_ids(), ids);
        Ok(())
    }
}
