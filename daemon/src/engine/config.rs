//! What an engine is told, checked against what its executor can take.

use std::time::Duration;

use super::compiler::VocabularySource;
use crate::{cost::CostModel, runner::ExecutorLimits, scheduler::SchedulerConfig};

/// Share of the pool kept free at admission: one block in 64.
const WATERMARK_DIVISOR: usize = 64;
/// Tokens of the canary's prompt at most.
const CANARY_LEN_MAX: usize = 16;
/// Requests that may wait for each one that may run, when nobody says otherwise.
const WAITING_PER_RUNNING: usize = 4;
/// How long a step may take on processor cores, when nobody says otherwise: short enough that nobody
/// sees running streams pause, long enough that chunks of prompts are computed efficiently.
pub const STEP_TARGET_CPU: Duration = Duration::from_millis(100);

/// How an engine runs.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Label of the metrics and name in logs.
    pub model: String,
    /// Requests that wait for their first step at most, the mailbox included.
    pub waiting_max: usize,
    /// Sequences in the running set at most.
    pub running_max: usize,
    /// Tokens of a step at most.
    pub step_tokens_max: usize,
    /// How long a step may take by prediction.
    pub step_target: Duration,
    /// What is known of step times; `None`: they are measured before the first request.
    pub cost: Option<CostModel>,
    /// Blocks that stay free when a sequence is admitted beside others.
    pub watermark_blocks: usize,
    /// Give the blocks of one sequence to the next that begins alike.
    pub prefix_cache: bool,
    /// Ids from here on are padding of the vocabulary and never chosen.
    pub sampleable_len: usize,
    /// Where the tokens of grammars come from; `None`: requests with a grammar fail.
    pub vocabulary: Option<VocabularySource>,
    /// What the canary is asked; its KV blocks are taken from the pool for good.
    pub canary_prompt: Vec<u32>,
    /// Silence after which the canary runs.
    pub canary_interval: Duration,
    /// How long requests may go on after the last handle was dropped without a stop.
    pub drain_limit: Duration,
}

/// What an engine takes; derived from configuration and executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Tokens of a sequence at most, prompt and output together: what both the context and the KV
    /// pool hold.
    pub context_len_max: usize,
    /// Width of a logits row; prompt tokens are below it.
    pub vocab_len: usize,
    /// Chosen tokens are below it.
    pub sampleable_len: usize,
    /// Requests that wait at most.
    pub waiting_max: usize,
    /// Sequences that run at most.
    pub running_max: usize,
    /// KV blocks for requests: the pool without the canary's.
    pub n_blocks: usize,
    /// Positions in a block.
    pub block_len: usize,
}

/// Why configuration and executor do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit that must be at least 1 is 0.
    #[error("{name} is 0")]
    Zero {
        /// Which.
        name: &'static str,
    },
    /// More than the executor or another setting allows.
    #[error("{name} is {found}, at most {max} is possible")]
    TooLarge {
        /// Which.
        name: &'static str,
        /// Configured.
        found: usize,
        /// Possible.
        max: usize,
    },
    /// The KV pool has no block for requests beside the canary's.
    #[error("the KV pool has {n_blocks} blocks, the canary takes {canary} and requests need one")]
    PoolTooSmall {
        /// Blocks of the executor.
        n_blocks: usize,
        /// Blocks of the canary.
        canary: usize,
    },
}

impl EngineConfig {
    /// Everything the executor can take, with defaults for the rest: four waiting requests for each
    /// running one, the whole vocabulary, a canary after 3 s of silence, 30 s to drain.
    pub fn for_executor(model: impl Into<String>, executor: &ExecutorLimits) -> Self {
        let running_max = executor
            .step_spans_max
            .min(executor.step_logits_max)
            .min(executor.step_tokens_max);
        // One block: enough tokens to meet many rows and experts, few enough to cost little.
        let n_canary = executor
            .block_len
            .min(CANARY_LEN_MAX)
            .min(executor.step_tokens_max)
            .min(executor.context_len_max);
        Self {
            model: model.into(),
            waiting_max: running_max.saturating_mul(WAITING_PER_RUNNING),
            running_max,
            step_tokens_max: executor.step_tokens_max,
            step_target: STEP_TARGET_CPU,
            cost: None,
            watermark_blocks: executor.n_blocks / WATERMARK_DIVISOR,
            prefix_cache: true,
            sampleable_len: executor.vocab_len,
            vocabulary: None,
            canary_prompt: (1..=n_canary)
                .map(|i| (i * executor.vocab_len / (n_canary + 1)) as u32)
                .collect(),
            canary_interval: Duration::from_secs(3),
            drain_limit: Duration::from_secs(30),
        }
    }

    /// What an engine with this configuration takes.
    ///
    /// # Errors
    /// [`ConfigError`] names the setting that does not fit.
    pub fn limits(&self, executor: &ExecutorLimits) -> Result<EngineLimits, ConfigError> {
        let at_least_one = [
            ("waiting_max", self.waiting_max),
            ("running_max", self.running_max),
            ("step_tokens_max", self.step_tokens_max),
            ("sampleable_len", self.sampleable_len),
            ("canary prompt length", self.canary_prompt.len()),
            ("block_len", executor.block_len),
        ];
        if let Some(&(name, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero { name });
        }
        let canary_token_max = self.canary_prompt.iter().copied().max().unwrap_or(0) as usize;
        let bounded = [
            (
                "step_tokens_max",
                self.step_tokens_max,
                executor.step_tokens_max,
            ),
            ("running_max", self.running_max, executor.step_spans_max),
            ("running_max", self.running_max, executor.step_logits_max),
            ("running_max", self.running_max, self.step_tokens_max),
            ("sampleable_len", self.sampleable_len, executor.vocab_len),
            (
                "canary prompt length",
                self.canary_prompt.len(),
                self.step_tokens_max,
            ),
            (
                "canary prompt length",
                self.canary_prompt.len(),
                executor.context_len_max,
            ),
            (
                "canary token",
                canary_token_max,
                executor.vocab_len.saturating_sub(1),
            ),
            ("n_blocks", executor.n_blocks, u32::MAX as usize),
        ];
        if let Some(&(name, found, max)) = bounded.iter().find(|(_, found, max)| max < found) {
            return Err(ConfigError::TooLarge { name, found, max });
        }
        let canary = self.n_canary_blocks(executor);
        if executor.n_blocks <= canary {
            let n_blocks = executor.n_blocks;
            return Err(ConfigError::PoolTooSmall { n_blocks, canary });
        }
        let scheduler = self.scheduler(executor);
        Ok(EngineLimits {
            context_len_max: scheduler.sequence_len_max(),
            vocab_len: executor.vocab_len,
            sampleable_len: self.sampleable_len,
            waiting_max: self.waiting_max,
            running_max: self.running_max,
            n_blocks: scheduler.blocks.len(),
            block_len: executor.block_len,
        })
    }

    /// The scheduler's share: all blocks before the canary's.
    pub(super) fn scheduler(&self, executor: &ExecutorLimits) -> SchedulerConfig {
        let n_blocks = executor
            .n_blocks
            .saturating_sub(self.n_canary_blocks(executor));
        SchedulerConfig {
            blocks: 0..n_blocks as u32,
            block_len: executor.block_len,
            context_len_max: executor.context_len_max,
            step_tokens_max: self.step_tokens_max,
            step_logits_max: executor.step_logits_max,
            step_target: self.step_target,
            running_max: self.running_max,
            waiting_max: self.waiting_max,
            watermark_blocks: self.watermark_blocks,
            prefix_cache: self.prefix_cache,
        }
    }

    /// The canary generates one token, which is never computed, so its prompt is all that is
    /// stored.
    pub(super) fn n_canary_blocks(&self, executor: &ExecutorLimits) -> usize {
        self.canary_prompt.len().div_ceil(executor.block_len)
    }
}

impl EngineLimits {
    /// Longest prompt that leaves room for one new token.
    pub fn prompt_len_max(&self) -> usize {
        self.context_len_max.saturating_sub(1)
    }
}
