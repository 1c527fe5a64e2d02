//! One generation as the scheduler keeps it.

use std::{sync::Arc, time::Instant};

use crate::{
    cost::StepShape,
    flow::{Account, Siblings},
    kv_cache::{BlockKey, BlockTable},
};

/// What the scheduler has to know of a request.
#[derive(Debug)]
pub struct SequenceSpec {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Tokens that were generated before, elsewhere.
    pub output: Vec<u32>,
    /// Tokens to generate at most, those generated before included.
    pub n_output_max: usize,
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

    /// What the step being planned computes of it, with a row of logits where that is all there is.
    pub(super) fn shape(&self) -> StepShape {
        let is_sampled = 0 < self.n_scheduled && self.n_scheduled == self.n_pending();
        match self.n_scheduled {
            0 => StepShape::default(),
            n => StepShape::span(self.n_computed, n, usize::from(is_sampled)),
        }
    }

    pub(super) fn is_expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|d| d <= now)
    }
}
