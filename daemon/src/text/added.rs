//! Finds added tokens (special ones included) in text by the rules of tokenizer.json.
//!
//! Done here and not by the tokenizer library so that marked text (see `guard`) can be told from
//! the template's own.

use std::collections::HashSet;

/// One entry of a tokenizer's added vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    /// Left out of decoded text.
    pub(super) special: bool,
    /// Takes the whitespace before it along.
    pub(super) lstrip: bool,
    /// Takes the whitespace behind it along.
    pub(super) rstrip: bool,
    /// Matches only between word borders.
    pub(super) single_word: bool,
    /// Found after those that are not.
    pub(super) normalized: bool,
}

impl AddedToken {
    /// A special token that matches as it reads.
    pub(super) fn special(id: u32, content: &str) -> Self {
        Self {
            id,
            content: content.to_owned(),
            special: true,
            lstrip: false,
            rstrip: false,
            single_word: false,
            normalized: false,
        }
    }
}

/// A tokenizer's added vocabulary.
#[derive(Debug)]
pub(super) struct AddedVocabulary {
    tokens: Vec<AddedToken>,
    /// The library looks for tokens that are not normalized first, then for the others in what
    /// is left.
    passes: [Trie; 2],
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Ordinary text.
    Text(&'a str),
    /// An added token.
    Token(u32),
}

impl AddedVocabulary {
    pub(super) fn new(tokens: Vec<AddedToken>) -> Self {
        let trie = |normalized: bool| {
            let mut trie = Trie::new();
            for (i, token) in tokens.iter().enumerate() {
                if token.normalized == normalized && !token.content.is_empty() {
                    trie.insert(token.content.as_bytes(), i);
                }
            }
            trie
        };
        let passes = [trie(false), trie(true)];
        Self { tokens, passes }
    }

    pub(super) fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }

    /// The id of the token that reads exactly so.
    pub(super) fn id_of(&self, content: &str) -> Option<u32> {
        self.tokens
            .iter()
            .find(|t| t.content == content)
            .map(|t| t.id)
    }

    /// The characters that begin tokens which text must not be able to forge. Runs of plain
    /// whitespace are left out: they carry no meaning to forge, and templates trim them.
    pub(super) fn first_chars(&self) -> HashSet<char> {
        let forgeable = self.tokens.iter().filter(|t| !t.content.trim().is_empty());
        forgeable.filter_map(|t| t.content.chars().next()).collect()
    }

    /// Cuts `text` at added tokens. A match right before `mark` is none: the mark stands behind
    /// the first character of everything that text could forge.
    pub(super) fn split<'a>(&self, text: &'a str, mark: Option<char>) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut refined = Vec::new();
        self.split_pass(&self.passes[0], text, mark, &mut pieces);
        for piece in pieces {
            match piece {
                Piece::Token(_) => refined.push(piece),
                Piece::Text(text) => self.split_pass(&self.passes[1], text, mark, &mut refined),
            }
        }
        refined
    }

    fn split_pass<'a>(
        &self,
        trie: &Trie,
        text: &'a str,
        mark: Option<char>,
        pieces: &mut Vec<Piece<'a>>,
    ) {
        let bytes = text.as_bytes();
        let mut at = 0;
        let mut text_start = 0;
        while at < bytes.len() {
            let Some((len, token)) = trie.longest(&bytes[at..]) else {
                at += 1;
                continue;
            };
            let token = &self.tokens[token];
            // Contents are whole characters, so these are character borders.
            let (before, behind) = (&text[text_start..at], &text[at + len..]);
            at += len;
            let marked = mark.is_some_and(|mark| behind.starts_with(mark));
            if marked || (token.single_word && !stands_alone(&text[..at - len], behind)) {
                continue;
            }
            let before = if token.lstrip {
                before.trim_end()
            } else {
                before
            };
            if token.rstrip {
                at += behind.len() - behind.trim_start().len();
            }
            if !before.is_empty() {
                pieces.push(Piece::Text(before));
            }
            pieces.push(Piece::Token(token.id));
            text_start = at;
        }
        if text_start < text.len() {
            pieces.push(Piece::Text(&text[text_start..]));
        }
    }
}

fn stands_alone(before: &str, behind: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    !before.chars().next_back().is_some_and(word) && !behind.chars().next().is_some_and(word)
}

/// A byte trie: the longest match costs its length, however many tokens begin alike (V4 has 1283
/// that begin with `<`).
#[derive(Debug)]
struct Trie {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    /// Sorted by byte.
    children: Vec<(u8, usize)>,
    token: Option<usize>,
}

impl Trie {
    fn new() -> Self {
        Self {
            nodes: vec![Node::default()],
        }
    }

    fn insert(&mut self, content: &[u8], token: usize) {
        let mut at = 0;
        for byte in content {
            let found = self.nodes[at].children.binary_search_by_key(byte, |c| c.0);
            at = match found {
                Ok(i) => self.nodes[at].children[i].1,
                Err(i) => {
                    let node = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].children.insert(i, (*byte, node));
                    node
                }
            };
        }
        self.nodes[at].token = Some(token);
    }

    /// Length and token of the longest entry that `bytes` begins with.
    fn longest(&self, bytes: &[u8]) -> Option<(usize, usize)> {
        let mut node = &self.nodes[0];
        let mut longest = None;
        for (i, byte) in bytes.iter().enumerate() {
            let Ok(child) = node.children.binary_search_by_key(byte, |c| c.0) else {
                break;
            };
            node = &self.nodes[node.children[child].1];
            if let Some(token) = node.token {
                longest = Some((i + 1, token));
            }
        }
        longest
    }
}
