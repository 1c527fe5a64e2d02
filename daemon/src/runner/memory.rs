//! What a replica will take, before it takes it.

use std::fmt;

use dsd_kernels::backend::{Backend, CacheShape};

use crate::model::{DecoderSpec, Workspace};

/// Positions in one KV block; attention is split at multiples of it.
pub const KV_BLOCK_LEN: usize = 32;

/// What the operator allows a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of KV cache at most.
    pub kv_bytes_max: u64,
    /// Tokens of one step at most.
    pub step_tokens_max: usize,
    /// Sequences of one step, and rows of logits, at most.
    pub step_spans_max: usize,
}

/// Where a replica's weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// Read where they are mapped.
    pub mapped: u64,
    /// In panels, in memory of their own.
    pub panels: u64,
}

/// Byte-exact plan of a replica's memory, fixed before anything is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weight files, mapped; they live in the page cache.
    pub mapped_bytes: u64,
    /// Weights in panels, made from the files while loading.
    pub panels_bytes: u64,
    /// KV cache.
    pub kv_bytes: u64,
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
    /// Rows of logits.
    pub step_logits_max: usize,
}

/// Why no plan fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not even one block fits the KV budget.
    #[error(
        "the KV budget of {budget} bytes does not hold one block of {block_len} tokens \
         ({block_bytes} bytes); raise engine.kv_bytes"
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
         panels), but only {available} are available; lower engine.kv_bytes or \
         engine.step_tokens"
    )]
    TooLarge {
        /// Panels, KV cache and workspace.
        needed: u64,
        /// Weights in panels.
        panels: u64,
        /// What the system reports.
        available: u64,
    },
}

impl MemoryPlan {
    /// Plans a replica of `spec` within `budget`; `available` is the memory free now, when known.
    ///
    /// # Errors
    /// [`PlanError`], with the numbers.
    pub fn new<B: Backend>(
        backend: &B,
        spec: &DecoderSpec,
        weights: WeightBytes,
        budget: Budget,
        available: Option<u64>,
    ) -> Result<Self, PlanError> {
        let kv_bytes_per_token = spec.cache_bytes_per_token(backend.kv_type()) as u64;
        let block_bytes = kv_bytes_per_token * KV_BLOCK_LEN as u64;
        // More blocks than all sequences and the engine's canary can fill would be waste.
        let useful = spec.context_len.div_ceil(KV_BLOCK_LEN) * budget.step_spans_max + 1;
        let affordable = usize::try_from(budget.kv_bytes_max / block_bytes).unwrap_or(usize::MAX);
        let n_blocks = useful.min(affordable);
        if n_blocks == 0 {
            return Err(PlanError::KvBudgetTooSmall {
                budget: budget.kv_bytes_max,
                block_bytes,
                block_len: KV_BLOCK_LEN,
            });
        }
        let step_logits_max = budget.step_spans_max;
        let workspace = Workspace::bytes(backend, spec, budget.step_tokens_max, step_logits_max);
        let plan = Self {
            mapped_bytes: weights.mapped,
            panels_bytes: weights.panels,
            kv_bytes: block_bytes * n_blocks as u64,
            workspace_bytes: workspace as u64,
            n_blocks,
            block_len: KV_BLOCK_LEN,
            kv_bytes_per_token,
            context_len: spec.context_len.min(n_blocks * KV_BLOCK_LEN),
            step_tokens_max: budget.step_tokens_max,
            step_logits_max,
        };
        let needed = plan.panels_bytes + plan.kv_bytes + plan.workspace_bytes;
        match available {
            Some(available) if available < needed => Err(PlanError::TooLarge {
                needed,
                panels: plan.panels_bytes,
                available,
            }),
            _ => Ok(plan),
        }
    }

    /// The cache of one layer.
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
        write!(
            f,
            "  workspace  {:>12}  steps of {} tokens, {} rows of logits",
            mib(self.workspace_bytes),
            self.step_tokens_max,
            self.step_logits_max
        )
    }
}

/// Memory the system could still give out: `MemAvailable` of `/proc/meminfo`.
pub fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
    kib.checked_mul(1024)
}
