//! Turns a [`StepPlan`] into logits; owns the KV memory and the memory plan.
//!
//! Does not know requests, queues or text.
//!
//! Invariant: nothing is allocated after construction; every plan within [`ExecutorLimits`] fits.

use std::sync::Arc;

use dsd_kernels::backend::{CallerOnly, Workers};

use crate::collective::Missing;

pub mod plan;
mod available;
mod memory;
mod executor;
mod kept;
mod load;

pub use available::{Available, MemoryBound};
pub use executor::ModelExecutor;
pub use kept::KeptKey;
pub use load::{
    LoadError, RankPlan, ReplicaPlan, kv_bytes_per_token, load_cpu, plan_cpu, weight_bytes,
};
pub use memory::{Budget, KV_BLOCK_LEN, MemoryPlan, PROCESS_BYTES, PlanError, WeightBytes};
pub use plan::{LogitRows, Span, StepPlan};

/// What one executor can take in a step; fixed at construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecutorLimits {
    /// Width of a logits row.
    pub vocab_len: usize,
    /// Token positions in one KV block.
    pub block_len: usize,
    /// KV blocks in the pool; ids are `0..n_blocks`.
    pub n_blocks: usize,
    /// Tokens over all spans of a step.
    pub step_tokens_max: usize,
    /// Spans of a step.
    pub step_spans_max: usize,
    /// Logits rows of a step.
    pub step_logits_max: usize,
    /// Positions a sequence may have (prompt and output together).
    pub context_len_max: usize,
}

/// Why a step failed; the engine ends the sequences of the step and goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The plan breaks [`ExecutorLimits`]; a bug of the caller, refused before any work.
    #[error("step plan exceeds {limit}: {found} of {max}")]
    PlanTooLarge {
        /// Name of the limit.
        limit: &'static str,
        /// Amount in the plan.
        found: usize,
        /// Amount allowed.
        max: usize,
    },
    /// Another rank of the group did not arrive: the group is of no use any more.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A plan from the first rank that is none.
    #[error("the first rank's plan of {n_words} words is not one")]
    BadPlan {
        /// Its length.
        n_words: usize,
    },
    /// A logits row holds NaN or infinity: damaged weights or a kernel bug.
    #[error("logits row {row} is not finite")]
    NotFinite {
        /// Row of the step's logits.
        row: usize,
    },
}

/// Runs steps. The real one drives a model on a backend; tests of the engine use one that computes
/// logits from a hash of the tokens.
pub trait StepExecutor: Send {
    /// Fixed capacities.
    fn limits(&self) -> ExecutorLimits;

    /// Writes the keys and values of the plan's tokens into their blocks and returns the logits
    /// asked for: `[rows, vocab_len]`, spans in plan order, positions in order within a span.
    ///
    /// # Errors
    /// [`StepError`]; the KV contents of the plan's positions are then undefined.
    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError>;

    /// Blocks that a lost process of this rank left and that hold what their keys say; once.
    fn take_kept(&mut self) -> Vec<(u32, KeptKey)> {
        Vec::new()
    }

    /// Notes what blocks hold that the last step filled, so that they may be kept.
    fn note_keys(&mut self, _keys: &[(u32, KeptKey)]) {}

    /// Threads for what is done with the logits; not for use while a step runs.
    fn workers(&self) -> Arc<dyn Workers> {
        Arc::new(CallerOnly)
    }
}
