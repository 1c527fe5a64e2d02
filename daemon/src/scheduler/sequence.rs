//! One generation as the scheduler keeps it.

use std::{sync::Arc, time::Instant};

use crate::{
    cost::StepShape,
    flow::{Account, Siblings},
    kv_cache::{BlockKey, BlockTable},
    runner::LogitRows,
};

/// What the scheduler has to know of a request.
#[derive(Debug)]
pub struct SequenceSpec {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Tokens that were generated before, elsewhere.
    pub output: Vec<u32>,
    /// Tokens to generate at most, those generated before included; 0 only where the prompt is scored.
    pub n_output_max: usize,
    /// First token of the prompt that is scored, with those behind it; `None`: none are.
    pub scored_from: Option<usize>,
    /// The generation ends after one of these.
    pub stop_tokens: Arc<[u32]>,
    /// The sequence ends at the first step at or after this moment.
    pub deadline: Option<Instant>,
    /// With whom its blocks may be shared.
    pub root: BlockKey,
    /// Who its work is charged to.
    pub account: Account,
    /// The choices that it is one of.
    pub siblings: Siblings,
    /// When its request was submitted.
    pub arrived_at: Instant,
}

/// A sequence, waiting or running.
///
/// Invariant: `n_computed < tokens.len()`; the last token's key and value are always missing.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Order of arrival, never reused.
    pub(super) serial: u64,
    /// Prompt, then output.
    pub(super) tokens: Vec<u32>,
    pub(super) n_prompt: usize,
    /// First token of the prompt that is still to be scored; `n_prompt` where none is.
    pub(super) next_scored: usize,
    /// `tokens` never gets longer: prompt and wanted output, cut to what context and pool hold.
    pub(super) len_max: usize,
    pub(super) stop_tokens: Arc<[u32]>,
    pub(super) deadline: Option<Instant>,
    pub(super) arrived_at: Instant,
    pub(super) account: Account,
    pub(super) siblings: Siblings,
    /// Positions whose keys and values are in `table`'s blocks.
    pub(super) n_computed: usize,
    /// The most `n_computed` ever was: below it a position is computed again after a preemption.
    pub(super) n_computed_ever: usize,
    pub(super) table: BlockTable,
    /// Positions the step being planned computes.
    pub(super) n_scheduled: usize,
    /// Prompt positions that were in the cache when it ran first.
    pub(super) n_cached: usize,
    /// True once it was in the running set.
    pub(super) was_running: bool,
}

impl Sequence {
    /// Positions still to compute before the next token can be sampled.
    pub(super) fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Needs a single position: a decode, or the tail of a prefill, which costs the same.
    pub(super) fn is_decode(&self) -> bool {
        self.n_pending() == 1
    }

    /// Positions before the first row of logits that scores a token; `None` where nothing is left to
    /// score.
    fn n_unscored(&self) -> Option<usize> {
        let is_scored = self.next_scored < self.n_prompt;
        is_scored.then(|| (self.next_scored - 1).saturating_sub(self.n_computed))
    }

    /// Positions that may be taken over: logits of those behind them are wanted.
    pub(super) fn n_adoptable(&self) -> usize {
        let n_scored = self.n_unscored().map(|_| self.next_scored);
        n_scored.unwrap_or(self.tokens.len()) - 1
    }

    /// What of `n` more positions may be computed in one step that has `n_logits_left` rows of logits
    /// left.
    pub(super) fn n_within(&self, n: usize, n_logits_left: usize) -> usize {
        match self.n_unscored() {
            Some(0) => n.min(n_logits_left),
            Some(n_unscored) => n.min(n_unscored),
            None if n_logits_left == 0 => n.min(self.n_pending() - 1),
            None => n,
        }
    }

    /// Rows of logits that a step takes of the next `n` positions.
    pub(super) fn logit_rows(&self, n: usize) -> LogitRows {
        match self.n_unscored() {
            Some(0) => LogitRows::All,
            _ if n == self.n_pending() => LogitRows::Last,
            _ => LogitRows::Skip,
        }
    }

    /// What a step takes to compute the next `n` positions.
    pub(super) fn shape_of(&self, n: usize) -> StepShape {
        let n_logits = match self.logit_rows(n) {
            LogitRows::Skip => 0,
            LogitRows::Last => 1,
            LogitRows::All => n,
        };
        match n {
            0 => StepShape::default(),
            n => StepShape::span(self.n_computed, n, n_logits),
        }
    }

    /// What the step being planned computes of it.
    pub(super) fn shape(&self) -> StepShape {
        self.shape_of(self.n_scheduled)
    }

    pub(super) fn is_expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|d| d <= now)
    }
}
