//! A reserved request that shows the executor still computes, and computes the same.
//!
//! It runs when no token came out for a while, and under load at a small share of the time. In an
//! engine's life the whole row of logits has to be the same bits, which batches do not change; from one
//! engine to the next only the token is compared, since another processor may round otherwise.

use std::time::{Duration, Instant};

use crate::{
    cost::StepShape,
    flow::SamplingParams,
    runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan},
    sampler::{self, SampleContext, Scratch},
};

use super::EngineConfig;

/// Serial of the canary's span, apart from those of sequences.
const CANARY_SERIAL: u64 = u64::MAX;
/// Under load it takes at most this part of the time,
const BUSY_SHARE: u32 = 100;
/// and waits for at least this part of the silence after which it runs otherwise.
const BUSY_DIVISOR: u32 = 3;

/// A greedy request of one token over blocks that no sequence gets.
#[derive(Debug)]
pub(super) struct Canary {
    plan: StepPlan,
    sampling: SamplingParams,
    sampleable_len: usize,
    interval: Duration,
    /// What the first run gave: the token, and the digest of all logits.
    expected: Option<(u32, u64)>,
    last_run_at: Option<Instant>,
    last_took: Duration,
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
            last_took: Duration::ZERO,
        }
    }

    /// What the first run gave.
    pub(super) fn expected(&self) -> Option<u32> {
        self.expected.map(|(token, _)| token)
    }

    /// What its step's time depends on.
    pub(super) fn shape(&self) -> StepShape {
        StepShape::span(0, self.plan.tokens.len(), 1)
    }

    /// The run that began last is over.
    pub(super) fn note_end(&mut self, now: Instant) {
        let began_at = self.last_run_at.unwrap_or(now);
        self.last_took = now.saturating_duration_since(began_at);
    }

    /// When it has to run though tokens come out.
    pub(super) fn due_when_busy_at(&self) -> Option<Instant> {
        let interval = (self.last_took * BUSY_SHARE).max(self.interval / BUSY_DIVISOR);
        self.last_run_at?.checked_add(interval)
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
        deadline: Option<Duration>,
        executor: &mut dyn StepExecutor,
        scratch: &mut Scratch,
    ) -> Result<Verdict, StepError> {
        self.last_run_at = Some(now);
        self.plan.deadline_ms = deadline.map_or(0, |d| d.as_millis() as u32);
        let logits = executor.execute(&self.plan)?;
        let digest = digest_of(logits);
        let ctx = SampleContext {
            params: &self.sampling,
            prompt: &[],
            output: &[],
            top_logprobs: None,
            sampleable_len: self.sampleable_len,
        };
        let sampled = sampler::sample(scratch, logits, &ctx);
        let found = sampled.map_err(|_| StepError::NotFinite { row: 0 })?.token;
        let (expected, digest_expected) = *self.expected.get_or_insert((found, digest));
        Ok(if found == expected && digest == digest_expected {
            Verdict::Right
        } else {
            Verdict::Wrong { expected, found }
        })
    }
}

/// Differs for any two rows of which a bit differs, but by chance; nobody chooses these rows.
fn digest_of(logits: &[f32]) -> u64 {
    let mix = |digest: u64, logit: &f32| {
        let word = digest ^ u64::from(logit.to_bits());
        word.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
    };
    logits.iter().fold(0, mix)
}
