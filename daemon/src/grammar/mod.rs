//! Which tokens may come next: answers that follow a JSON Schema, a regular expression, a grammar, or
//! the form of calls of tools. The automata are llguidance's.
//!
//! A grammar is a text that agents make ([`write()`]) and check, and that ranks compile for their
//! engine; it covers all of an answer, thoughts and calls included, so its state follows from the
//! answer's tokens alone. Knows no requests and no sampling.
//!
//! Invariant: compiling and every step end within the limits here, whatever the grammar.
//!
//! Called by engine and gateway.

mod vocabulary;
mod write;
mod dsml;

pub use vocabulary::{Allowed, Constraint, Vocabulary};
pub use write::{Answer, Calls, write};

use std::sync::{Arc, OnceLock};

use crate::text::TextModel;

/// Looks at grammars before an engine gets them, so that a bad one is refused. Its vocabulary is made
/// for the first.
#[derive(Debug, Default)]
pub struct Checker(OnceLock<Result<Vocabulary, GrammarError>>);

impl Checker {
    /// Whether the grammar compiles for the model, of which there is one for each checker.
    ///
    /// # Errors
    /// [`GrammarError`].
    pub fn check(&self, text: &TextModel, grammar: &str) -> Result<(), GrammarError> {
        let vocabulary = self.0.get_or_init(|| Vocabulary::new(text));
        let vocabulary = vocabulary.as_ref().map_err(Clone::clone)?;
        let mut constraint = vocabulary.compile(grammar, &Arc::from([]))?;
        constraint.allowed().map(drop)
    }
}

/// Bytes of a grammar.
pub const GRAMMAR_LEN_MAX: usize = 1 << 20;

/// Why a grammar is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It does not compile, or is too large to.
    #[error("{problem}")]
    Compile {
        /// What is wrong.
        problem: String,
    },
    /// The vocabulary cannot be used for grammars.
    #[error("the vocabulary cannot be used for grammars: {problem}")]
    Vocabulary {
        /// What is wrong.
        problem: String,
    },
    /// No token may follow, or one came that may not.
    #[error("the answer cannot go on by its grammar: {problem}")]
    DeadEnd {
        /// What is wrong.
        problem: String,
    },
}
