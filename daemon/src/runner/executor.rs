//! The executor that drives a model on a backend.

use dsd_kernels::backend::{Backend, CacheShape, StepInputs, StepSpan};

use super::{ExecutorLimits, LogitRows, MemoryPlan, StepError, StepExecutor, StepPlan};
use crate::model::{Decoder, Workspace};

/// A decoder with its caches and buffers.
pub struct ModelExecutor<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    cache_shape: CacheShape,
    /// One per layer.
    caches: Vec<B::Cache>,
    workspace: Workspace<B>,
    limits: ExecutorLimits,
    rows: StepRows,
}

/// A plan flattened into rows; refilled every step.
#[derive(Debug, Default)]
struct StepRows {
    positions: Vec<usize>,
    span_of_row: Vec<usize>,
    spans: Vec<StepSpan>,
    logit_rows: Vec<usize>,
}

impl StepRows {
    fn fill(&mut self, plan: &StepPlan) {
        let Self {
            positions,
            span_of_row,
            spans,
            logit_rows,
        } = self;
        positions.clear();
        span_of_row.clear();
        spans.clear();
        logit_rows.clear();
        for (index, span) in plan.spans.iter().enumerate() {
            let n_rows = span.tokens.len();
            positions.extend(span.first_pos..span.first_pos + n_rows);
            span_of_row.extend(std::iter::repeat_n(index, n_rows));
            spans.push(StepSpan {
                first_row: span.tokens.start,
                n_rows,
                first_pos: span.first_pos,
                first_block: span.blocks.start,
            });
            match span.logits {
                LogitRows::Skip => {}
                LogitRows::Last => logit_rows.push(span.tokens.end - 1),
                LogitRows::All => logit_rows.extend(span.tokens.clone()),
            }
        }
    }
}

impl<B: Backend> ModelExecutor<B> {
    /// Takes all memory of the plan.
    pub fn new(backend: B, decoder: Decoder<B>, plan: &MemoryPlan) -> Self {
        let spec = decoder.spec();
        let cache_shape = plan.cache_shape(spec);
        let caches = (0..spec.n_layers())
            .map(|_| backend.cache(cache_shape))
            .collect();
        let workspace = Workspace::new(&backend, spec, plan.step_tokens_max, plan.step_logits_max);
        let limits = ExecutorLimits {
            vocab_len: spec.vocab_len,
            block_len: plan.block_len,
            n_blocks: plan.n_blocks,
            step_tokens_max: plan.step_tokens_max,
            step_spans_max: plan.step_logits_max,
            step_logits_max: plan.step_logits_max,
            context_len_max: plan.context_len,
        };
        Self {
            backend,
            decoder,
            cache_shape,
            caches,
            workspace,
            limits,
            rows: StepRows::default(),
        }
    }

    /// Refuses what would not fit the buffers, and what would read outside of them.
    fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        let ExecutorLimits {
            block_len,
            n_blocks,
            vocab_len,
            ..
        } = self.limits;
        let limit = |limit, found, max| {
            if found > max {
                Err(StepError::PlanTooLarge { limit, found, max })
            } else {
                Ok(())
            }
        };
        limit(
            "step_tokens_max",
            plan.tokens.len(),
            self.limits.step_tokens_max,
        )?;
        limit(
            "step_spans_max",
            plan.spans.len(),
            self.limits.step_spans_max,
        )?;
        limit(
            "step_logits_max",
            plan.n_logits(),
            self.limits.step_logits_max,
        )?;
        for span in &plan.spans {
            let end = span.first_pos + span.tokens.len();
            limit("context_len_max", end, self.limits.context_len_max)?;
            limit("block table", end, span.blocks.len() * block_len)?;
        }
        let largest = |values: &[u32]| values.iter().max().map_or(0, |v| *v as usize);
        limit("block id", largest(&plan.blocks), n_blocks - 1)?;
        limit("token id", largest(&plan.tokens), vocab_len - 1)
    }
}

impl<B: Backend> StepExecutor for ModelExecutor<B> {
    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        self.check(plan)?;
        self.rows.fill(plan);
        let inputs = StepInputs {
            tokens: &plan.tokens,
            positions: &self.rows.positions,
            span_of_row: &self.rows.span_of_row,
            spans: &self.rows.spans,
            blocks: &plan.blocks,
        };
        let logits = self.decoder.forward(
            &self.backend,
            &inputs,
            &self.rows.logit_rows,
            self.cache_shape,
            &mut self.caches,
            &mut self.workspace,
        );
        let vocab_len = self.limits.vocab_len;
        let logits = self
            .backend
            .download(logits, self.rows.logit_rows.len() * vocab_len);
        match logits
            .chunks_exact(vocab_len)
            .position(|row| !row.iter().all(|v| v.is_finite()))
        {
            Some(row) => Err(StepError::NotFinite { row }),
            None => Ok(logits),
        }
    }
}
