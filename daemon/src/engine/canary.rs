//! A reserved request that shows the executor still computes, and computes the same.

use std::time::{Duration, Instant};

use crate::{
    flow::SamplingParams,
    runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan},
    sampler::{self, SampleContext, Scratch},
};

use super::EngineConfig;

/// Serial of the canary's span, apart from those of sequences.
const CANARY_SERIAL: u64 = u64::MAX;

/// A greedy request of one token over blocks that no sequence gets.
#[derive(Debug)]
pub(super) struct Canary {
    plan: StepPlan,
    sampling: SamplingParams,
    sampleable_len: usize,
    interval: Duration,
    /// What the first run gave.
    expected: Option<u32>,
    last_run_at: Option<Instant>,
}

/// What a run showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Right,
    Wrong { expected: u32, found: u32 },
}

impl Canary {
    /// Takes the pool's last blocks.
    pub(super) fn new(cfg: &EngineConfig, executor: &ExecutorLimits) -> Self {
        let first = executor.n_blocks - cfg.n_canary_blocks(executor);
        let blocks: Vec<u32> = (first..executor.n_blocks).map(|b| b as u32).collect();
        let mut plan = StepPlan::default();
        plan.push(
            CANARY_SERIAL,
            0,
            &cfg.canary_prompt,
            &blocks,
            LogitRows::Last,
        );
        Self {
            plan,
            sampling: SamplingParams::default(),
            sampleable_len: cfg.sampleable_len,
            interval: cfg.canary_interval,
            expected: None,
            last_run_at: None,
        }
    }

    /// What the first run gave.
    pub(super) fn expected(&self) -> Option<u32> {
        self.expected
    }

    /// When it has to run, if no token comes out after `last_token_at`; `None` when that is beyond
    /// time.
    pub(super) fn due_at(&self, last_token_at: Option<Instant>) -> Option<Instant> {
        let silent_since = last_token_at.max(self.last_run_at)?;
        silent_since.checked_add(self.interval)
    }

    /// Runs one step.
    pub(super) fn run(
        &mut self,
        now: Instant,
        executor: &mut dyn StepExecutor,
        scratch: &mut Scratch,
    ) -> Result<Verdict, StepError> {
        self.last_run_at = Some(now);
        let logits = executor.execute(&self.plan)?;
        let ctx = SampleContext {
            params: &self.sampling,
            prompt: &[],
            output: &[],
            top_logprobs: None,
            sampleable_len: self.sampleable_len,
        };
        let sampled = sampler::sample(scratch, logits, &ctx);
        let found = sampled.map_err(|_| StepError::NotFinite { row: 0 })?.token;
        let expected = *self.expected.get_or_insert(found);
        Ok(if found == expected {
            Verdict::Right
        } else {
            Verdict::Wrong { expected, found }
        })
    }
}
