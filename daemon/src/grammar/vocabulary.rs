//! A model's tokens as automata see them, and the automaton of one answer.

use std::{panic::AssertUnwindSafe, sync::Arc};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    panic_utils::catch_unwind,
    toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie},
};

use super::{GRAMMAR_LEN_MAX, GrammarError};
use crate::text::TextModel;

/// Regular expressions' states that one answer may meet, at 1 to 2 KB each.
const LEXER_STATES_MAX: usize = 20_000;
/// Work of reading a grammar, at 50,000 a millisecond.
const INITIAL_FUEL: u64 = 1_000_000;
/// Work of one step, at 14,000 a millisecond.
const STEP_FUEL: u64 = 200_000;
/// Parser items of one step, at 20,000 a millisecond.
const STEP_ITEMS_MAX: usize = 50_000;
/// Symbols of a grammar.
const SYMBOLS_MAX: usize = 200_000;
/// Characters of a problem that are told.
const PROBLEM_LEN_MAX: usize = 400;

/// See the module. A trie of all tokens: megabytes; made once for each model.
pub struct Vocabulary {
    factory: ParserFactory,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Vocabulary")
    }
}

impl Vocabulary {
    /// The tokens of a model. Added tokens are no text: nothing but a grammar that names them has
    /// them.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`].
    pub fn new(text: &TextModel) -> Result<Self, GrammarError> {
        let added = text.added_ids();
        let n = u32::try_from(text.vocab_len()).unwrap_or(u32::MAX);
        let word = |id: u32| {
            let bytes = text.token_bytes(id).unwrap_or_default();
            match added.contains(&id) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                false => bytes.to_vec(),
            }
        };
        let words: Vec<Vec<u8>> = (0..n).map(word).collect();
        let eos = text.eos_id().unwrap_or_default();
        // The library panics where it does not know what to do; nobody else is to end by that.
        let make = || {
            let trie = TokTrie::from(&TokRxInfo::new(n, eos), &words);
            let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&tokens)
        };
        let mut factory =
            catch_unwind(AssertUnwindSafe(make)).map_err(|e| GrammarError::Vocabulary {
                problem: problem(&e.to_string()),
            })?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: LEXER_STATES_MAX,
            initial_lexer_fuel: INITIAL_FUEL,
            step_lexer_fuel: STEP_FUEL,
            step_max_items: STEP_ITEMS_MAX,
            max_grammar_size: SYMBOLS_MAX,
            // Errors are for clients: their own grammar is not repeated to them.
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory })
    }

    /// The automaton of an answer that ends with one of `stop_tokens`.
    ///
    /// # Errors
    /// [`GrammarError::Compile`] with the place or the limit.
    pub fn compile(
        &self,
        grammar: &str,
        stop_tokens: &Arc<[u32]>,
    ) -> Result<Constraint, GrammarError> {
        let failed = |found: String| GrammarError::Compile {
            problem: problem(&found),
        };
        if GRAMMAR_LEN_MAX < grammar.len() {
            let problem = format!(
                "{} bytes long, at most {GRAMMAR_LEN_MAX} are",
                grammar.len()
            );
            return Err(failed(problem));
        }
        let grammar: TopLevelGrammar =
            serde_json::from_str(grammar).map_err(|e| failed(e.to_string()))?;
        let create = || self.factory.create_parser(grammar);
        let parser = catch_unwind(AssertUnwindSafe(create));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(problem) => Err(failed(problem)),
            None => Ok(Constraint {
                matcher,
                stop_tokens: Arc::clone(stop_tokens),
            }),
        }
    }
}

/// The automaton of one answer.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    stop_tokens: Arc<[u32]>,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Constraint")
    }
}

/// Tokens that may come next.
#[derive(Debug)]
pub struct Allowed(SimpleVob);

impl Allowed {
    /// A bit for each token, the first in the lowest bit of the first word.
    pub fn words(&self) -> &[u32] {
        self.0.as_slice()
    }
}

impl Constraint {
    /// Tokens that may come next; an end token where the answer may end.
    ///
    /// # Errors
    /// [`GrammarError::DeadEnd`] where none may, or the limits of a step do not suffice.
    pub fn allowed(&mut self) -> Result<Allowed, GrammarError> {
        let mut mask = self.matcher.compute_mask_or_eos().map_err(dead_end)?;
        let may_end = self.matcher.is_stopped() || self.matcher.is_accepting().map_err(dead_end)?;
        if may_end {
            let n = mask.len();
            let in_vocabulary = self.stop_tokens.iter().filter(|id| (**id as usize) < n);
            in_vocabulary.for_each(|id| mask.allow_token(*id));
        }
        match mask.is_zero() {
            true => Err(GrammarError::DeadEnd {
                problem: "no token may follow".to_owned(),
            }),
            false => Ok(Allowed(mask)),
        }
    }

    /// Goes on by a token.
    ///
    /// # Errors
    /// [`GrammarError::DeadEnd`] when it may not follow.
    pub fn advance(&mut self, token: u32) -> Result<(), GrammarError> {
        if self.stop_tokens.contains(&token) || self.matcher.is_stopped() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(dead_end)
    }

    /// A copy that another thread may use without waiting for this one.
    #[must_use]
    pub fn fresh(&self, stop_tokens: &Arc<[u32]>) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
            stop_tokens: Arc::clone(stop_tokens),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn dead_end(e: impl ToString) -> GrammarError {
    GrammarError::DeadEnd {
        problem: problem(&e.to_string()),
    }
}

/// What is told of the library's words: its first line, since a backtrace may follow.
fn problem(found: &str) -> String {
    let line = found.lines().next().unwrap_or_default();
    line.chars().take(PROBLEM_LEN_MAX).collect()
}
