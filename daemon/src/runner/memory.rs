//! What a replica will take, before it takes it.

use std::fmt;

use dsd_kernels::{
    backend::{Backend, CacheShape},
    dtype::Format,
    panel,
};

use super::available::Available;
use crate::{
    model::{DecoderSpec, Split, TensorRequest, Workspace},
    weights::{Cut, Role},
};

/// Positions in one KV block; attention is split at multiples of it.
pub const KV_BLOCK_LEN: usize = 32;

/// What a rank takes beside its plan: stacks, the engine's tables, the heap's own waste. Of SmolLM2-135M
/// it is 7 MiB; tables grow with the sequences that run at once.
pub const PROCESS_BYTES: u64 = 16 << 20;

/// What the operator allows a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of KV cache at most.
    pub kv_bytes_max: u64,
    /// Tokens of one step at most.
    pub step_tokens_max: usize,
    /// Sequences of one step at most.
    pub step_spans_max: usize,
}

/// Where a rank's weights are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Read where they are mapped.
    pub mapped: u64,
    /// In memory of their own: panels, columns cut out of rows, and repacked rows.
    pub panels: u64,
}

impl WeightBytes {
    /// What a rank takes when it loads these tensors of a checkpoint, stored as `format_of` says.
    pub fn of_checkpoint(
        requests: &[TensorRequest],
        format_of: &dyn Fn(&str) -> Option<Format>,
    ) -> Self {
        let mut bytes = Self::default();
        for request in requests {
            let TensorRequest::Matrix {
                name,
                shape,
                cut,
                role,
            } = request
            else {
                continue;
            };
            let Some(format) = format_of(name) else {
                continue;
            };
            let [rows, cols] = cut.shape_of(*shape);
            let panels = match role {
                Role::Linear => panel::bytes(format, rows, cols),
                Role::Latent => None,
            };
            let in_rows = || (format.row_bytes(cols).unwrap_or(0) * rows) as u64;
            match (panels, cut) {
                (Some(panels), _) => bytes.panels += panels as u64,
                (None, Cut::Cols(_)) => bytes.panels += in_rows(),
                // Repacked in any case: files hold these codes in another order.
                (None, _) if format == Format::Int4 => bytes.panels += in_rows(),
                (None, Cut::Whole | Cut::Rows(_)) => bytes.mapped += in_rows(),
            }
        }
        bytes
    }
}

/// Rows of logits beyond one for each sequence of a step, so that prompts whose tokens are scored go on
/// beside as many decodes as there may be.
const SCORED_ROWS: usize = 16;

/// The part of the KV cache that may outlive a rank's process.
const KEPT_DIVISOR: u64 = 4;

/// Byte-exact plan of one rank's memory, fixed before anything is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weight files, mapped; they live in the page cache.
    pub mapped_bytes: u64,
    /// Weights in panels, made from the files while loading.
    pub panels_bytes: u64,
    /// KV cache.
    pub kv_bytes: u64,
    /// Keys and values of long sequences that outlive the rank's process, at most.
    pub kept_bytes: u64,
    /// Activations and logits of one step.
    pub workspace_bytes: u64,
    /// KV blocks.
    pub n_blocks: usize,
    /// Positions a block holds.
    pub block_len: usize,
    /// Bytes of KV one position takes.
    pub kv_bytes_per_token: u64,
    /// Positions one sequence may have.
    pub context_len: usize,
    /// Rows of the step's buffers.
    pub step_tokens_max: usize,
    /// Sequences of a step.
    pub step_spans_max: usize,
    /// Rows of logits.
    pub step_logits_max: usize,
}

/// Why no plan fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not even one block fits the KV budget.
    #[error(
        "the KV budget of {budget} bytes does not hold one block of {block_len} tokens \
         ({block_bytes} bytes); raise kv_bytes"
    )]
    KvBudgetTooSmall {
        /// Bytes allowed.
        budget: u64,
        /// Bytes of a block.
        block_bytes: u64,
        /// Positions of a block.
        block_len: usize,
    },
    /// The plan exceeds the memory that is free now.
    #[error(
        "the plan takes {needed} bytes beside the mapped weights ({panels} of them for weights in \
         panels), but only {available}; lower kv_bytes or step_tokens"
    )]
    TooLarge {
        /// Panels, KV cache, workspace and processes.
        needed: u64,
        /// Weights in panels.
        panels: u64,
        /// What may be taken.
        available: Available,
    },
}

impl MemoryPlan {
    /// Plans the ranks of a replica within `budget`, which they share; `available` is the memory
    /// free now, when known. All ranks have the same KV blocks.
    ///
    /// # Errors
    /// [`PlanError`], with the numbers.
    pub fn new<B: Backend>(
        backend: &B,
        ranks: &[(Split, WeightBytes)],
        budget: Budget,
        available: Option<Available>,
    ) -> Result<Vec<Self>, PlanError> {
        let bytes_per_token =
            |split: &Split| split.local.cache_bytes_per_token(backend.kv_type()) as u64;
        let block_bytes =
            ranks.iter().map(|(s, _)| bytes_per_token(s)).sum::<u64>() * KV_BLOCK_LEN as u64;
        let context_len = ranks.first().map_or(0, |(split, _)| split.full.context_len);
        // More blocks than all sequences and the engine's canary can fill would be waste.
        let useful = context_len.div_ceil(KV_BLOCK_LEN) * budget.step_spans_max + 1;
        let affordable =
            usize::try_from(budget.kv_bytes_max / block_bytes.max(1)).unwrap_or(usize::MAX);
        let n_blocks = useful.min(affordable);
        if n_blocks == 0 {
            return Err(PlanError::KvBudgetTooSmall {
                budget: budget.kv_bytes_max,
                block_bytes,
                block_len: KV_BLOCK_LEN,
            });
        }
        let step_logits_max = budget.step_spans_max + SCORED_ROWS;
        let plan = |(split, weights): &(Split, WeightBytes)| {
            let spec = &split.local;
            let workspace =
                Workspace::bytes(backend, spec, budget.step_tokens_max, step_logits_max);
            // The first rank of several has room for whole rows of logits besides its own columns.
            let gathered = match split.of.n_ranks {
                1 => 0,
                _ if !split.is_first() => 0,
                _ => step_logits_max * split.full.vocab_len,
            };
            Self {
                mapped_bytes: weights.mapped,
                panels_bytes: weights.panels,
                kv_bytes: bytes_per_token(split) * (KV_BLOCK_LEN * n_blocks) as u64,
                kept_bytes: bytes_per_token(split) * (KV_BLOCK_LEN * n_blocks) as u64
                    / KEPT_DIVISOR,
                workspace_bytes: workspace as u64 + (gathered * size_of::<f32>()) as u64,
                n_blocks,
                block_len: KV_BLOCK_LEN,
                kv_bytes_per_token: bytes_per_token(split),
                context_len: context_len.min(n_blocks * KV_BLOCK_LEN),
                step_tokens_max: budget.step_tokens_max,
                step_spans_max: budget.step_spans_max,
                step_logits_max,
            }
        };
        let plans = ranks.iter().map(plan).collect::<Vec<_>>();
        let panels = plans.iter().map(|p| p.panels_bytes).sum();
        let needed = plans.iter().map(Self::bytes_of_its_own).sum();
        match available {
            Some(available) if available.bytes < needed => Err(PlanError::TooLarge {
                needed,
                panels,
                available,
            }),
            _ => Ok(plans),
        }
    }

    /// What the rank takes beside the mapped weights: panels, KV cache, what of it is kept, workspace and
    /// what any process of ours takes.
    pub const fn bytes_of_its_own(&self) -> u64 {
        self.panels_bytes + self.kv_bytes + self.kept_bytes + self.workspace_bytes + PROCESS_BYTES
    }

    /// The cache of one layer of a rank's part.
    pub fn cache_shape(&self, spec: &DecoderSpec) -> CacheShape {
        CacheShape {
            rows: spec.cache_rows(),
            n_blocks: self.n_blocks,
            block_len: self.block_len,
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let tokens = self.n_blocks * self.block_len;
        writeln!(f, "memory plan")?;
        writeln!(
            f,
            "  weights    {:>12}  mapped from files",
            mib(self.mapped_bytes)
        )?;
        if self.panels_bytes > 0 {
            writeln!(
                f,
                "  panels     {:>12}  made from files, in place of them",
                mib(self.panels_bytes)
            )?;
        }
        writeln!(
            f,
            "  kv cache   {:>12}  {tokens} tokens in {} blocks, {} bytes a token",
            mib(self.kv_bytes),
            self.n_blocks,
            self.kv_bytes_per_token
        )?;
        writeln!(
            f,
            "  kept       {:>12}  of it, of long sequences, beyond the rank's process",
            mib(self.kept_bytes)
        )?;
        writeln!(
            f,
            "  workspace  {:>12}  steps of {} tokens, {} rows of logits",
            mib(self.workspace_bytes),
            self.step_tokens_max,
            self.step_logits_max
        )?;
        write!(
            f,
            "  process    {:>12}  allowed for the rest",
            mib(PROCESS_BYTES)
        )
    }
}
