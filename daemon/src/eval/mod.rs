//! Offline evaluation: logits, greedy continuation, perplexity and token ids of one checkpoint.
//!
//! Runs the same executor as the server, one sequence at a time, with no queue and no network.
//! Called by the `dsd eval` commands and by tests.

mod speed;
#[cfg(test)]
mod tests;

pub use speed::{Speed, SpeedCase, SpeedTest};

use std::{fs, io, ops::Range, path::Path, time::Duration};

use crate::{
    config::LogConfig,
    group::{self, Followers, GroupConfig, GroupError},
    runner::{Available, StepExecutor, kv_bytes_per_token, load_cpu, plan_cpu, weight_bytes},
    runner::{Budget, KV_BLOCK_LEN, LoadError, LogitRows, StepError, StepPlan},
    sampler,
    weights::{Checkpoint, WeightsError},
};
use dsd_kernels::cpu::CpuConfig;

/// Tokens of one step.
const STEP_TOKENS: usize = 128;
/// Rows of logits of one step.
const STEP_LOGITS: usize = 32;

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The checkpoint cannot be opened.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The checkpoint cannot run.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The other ranks cannot be started.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// No tokens were given.
    #[error("no tokens were given")]
    NoTokens,
    /// Too few tokens to predict one from another.
    #[error("the text has {0} tokens, perplexity needs at least 2")]
    TextTooShort(usize),
    /// A token is not in the vocabulary.
    #[error("token id {token} is not below the vocabulary size {vocab_len}")]
    TokenOutOfRange {
        /// The offending id.
        token: u32,
        /// Rows of the embedding.
        vocab_len: usize,
    },
    /// More positions than the model or its KV cache takes.
    #[error("{n_tokens} positions are asked for, the model takes {context_len}")]
    TooLong {
        /// Positions asked for.
        n_tokens: usize,
        /// Positions possible.
        context_len: usize,
    },
    /// The result cannot be written.
    #[error("cannot write `{path}`")]
    Write {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Who computes.
#[derive(Debug, Clone, Copy)]
pub struct Ranks {
    /// How each rank computes.
    pub cpu: CpuConfig,
    /// Ranks; this process is the first, and starts the others.
    pub n_ranks: usize,
}

impl Ranks {
    /// This process alone.
    pub const fn solo(cpu: CpuConfig) -> Self {
        Self { cpu, n_ranks: 1 }
    }
}

/// A model that computes, with the other ranks of its group.
struct Model {
    executor: Box<dyn StepExecutor>,
    /// Dropped after the executor has let them go.
    _followers: Followers,
}

/// How long a rank may be late in a step.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);

impl Model {
    /// A model within `budget`.
    fn open(checkpoint: &Checkpoint, ranks: Ranks, budget: Budget) -> Result<Self, EvalError> {
        let Ranks { cpu, n_ranks } = ranks;
        let plan = plan_cpu(checkpoint, cpu, n_ranks, budget, Available::now())?;
        let group = GroupConfig {
            program: group::this_program(),
            log: LogConfig::default(),
            model: "eval".to_owned(),
            path: checkpoint.path().to_owned(),
            n_ranks,
            cpu,
            budget,
            step_timeout: STEP_TIMEOUT,
            // Nobody ticks here; the system ends followers with this process.
            agent_timeout: Duration::from_secs(365 * 86_400),
            step_target: group::STEP_TARGET_CPU,
            cost: None,
            cost_file: None,
            waiting_max: 1,
            prefix_cache: false,
            sampleable_len: plan.spec.vocab_len,
            drain_limit: Duration::ZERO,
            kept_bytes_max: 0,
        };
        let (mut collective, followers) = Followers::start(&group)?;
        let executor = load_cpu(checkpoint, cpu, &plan.ranks[0])?;
        Followers::meet(&mut collective)?;
        Ok(Self {
            executor: Box::new(executor.in_group(collective)),
            _followers: followers,
        })
    }
}

/// One checkpoint with room for one sequence.
pub struct Session {
    model: Model,
    vocab_len: usize,
    context_len: usize,
    plan: StepPlan,
    blocks: Vec<u32>,
}

impl Session {
    /// Loads a checkpoint with KV room for `n_tokens` positions.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn open(checkpoint: &Checkpoint, ranks: Ranks, n_tokens: usize) -> Result<Self, EvalError> {
        let spec = crate::model::spec_of(checkpoint).map_err(|e| LoadError::Model(e.into()))?;
        let context_len = spec.context_len;
        if n_tokens > context_len {
            return Err(EvalError::TooLong {
                n_tokens,
                context_len,
            });
        }
        let n_blocks = n_tokens.div_ceil(KV_BLOCK_LEN).max(1);
        let bytes_per_token = kv_bytes_per_token(checkpoint, ranks.cpu, ranks.n_ranks)?;
        let budget = Budget {
            kv_bytes_max: (n_blocks * KV_BLOCK_LEN) as u64 * bytes_per_token,
            step_tokens_max: STEP_TOKENS,
            step_spans_max: STEP_LOGITS,
        };
        let model = Model::open(checkpoint, ranks, budget)?;
        let limits = model.executor.limits();
        let blocks = (0..limits.n_blocks)
            .filter_map(|b| u32::try_from(b).ok())
            .collect();
        Ok(Self {
            model,
            vocab_len: spec.vocab_len,
            context_len: limits.context_len_max,
            plan: StepPlan::default(),
            blocks,
        })
    }

    /// Width of a logits row.
    pub fn vocab_len(&self) -> usize {
        self.vocab_len
    }

    /// Logits of every position, `[tokens, vocab_len]`, handed to `row(position, logits)`.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn logits(
        &mut self,
        tokens: &[u32],
        mut row: impl FnMut(usize, &[f32]),
    ) -> Result<(), EvalError> {
        self.check(tokens, tokens.len())?;
        for span in chunks(0..tokens.len(), STEP_LOGITS) {
            let (vocab_len, first) = (self.vocab_len, span.start);
            let logits = self.step(first, &tokens[span], LogitRows::All)?;
            for (i, values) in logits.chunks_exact(vocab_len).enumerate() {
                row(first + i, values);
            }
        }
        Ok(())
    }

    /// The `n_new` likeliest tokens after `tokens`, one after the other, out of all rows of the
    /// embedding. End-of-text tokens do not end it.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn greedy(&mut self, tokens: &[u32], n_new: usize) -> Result<Vec<u32>, EvalError> {
        self.check(tokens, tokens.len() + n_new)?;
        let mut next = None;
        for span in chunks(0..tokens.len(), STEP_TOKENS) {
            let wanted = if span.end == tokens.len() {
                LogitRows::Last
            } else {
                LogitRows::Skip
            };
            let logits = self.step(span.start, &tokens[span], wanted)?;
            next = sampler::likeliest(logits);
        }
        let mut output = Vec::with_capacity(n_new);
        while let Some(token) = next
            && output.len() < n_new
        {
            output.push(token);
            if output.len() < n_new {
                let position = tokens.len() + output.len() - 1;
                let logits = self.step(position, &[token], LogitRows::Last)?;
                next = sampler::likeliest(logits);
            }
        }
        Ok(output)
    }

    /// Mean negative log-likelihood (nats) of every token given those before it, in consecutive
    /// windows of `window` tokens; the first of a window is not scored. Also the number scored.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn mean_nll(&mut self, tokens: &[u32], window: usize) -> Result<(f64, usize), EvalError> {
        if tokens.len() < 2 {
            return Err(EvalError::TextTooShort(tokens.len()));
        }
        let (mut total, mut n) = (0f64, 0);
        for window in tokens.chunks(window.max(2)).filter(|w| w.len() > 1) {
            self.logits(window, |position, logits| {
                if let Some(next) = window.get(position + 1) {
                    total -= sampler::log_probability(logits, *next);
                    n += 1;
                }
            })?;
        }
        Ok((total / f64::from(u32::try_from(n).unwrap_or(u32::MAX)), n))
    }

    fn check(&self, tokens: &[u32], n_positions: usize) -> Result<(), EvalError> {
        if tokens.is_empty() {
            return Err(EvalError::NoTokens);
        }
        let vocab_len = self.vocab_len;
        if let Some(token) = tokens.iter().copied().find(|t| vocab_len <= *t as usize) {
            return Err(EvalError::TokenOutOfRange { token, vocab_len });
        }
        if n_positions > self.context_len {
            let context_len = self.context_len;
            return Err(EvalError::TooLong {
                n_tokens: n_positions,
                context_len,
            });
        }
        Ok(())
    }

    fn step(
        &mut self,
        first_pos: usize,
        tokens: &[u32],
        logits: LogitRows,
    ) -> Result<&[f32], StepError> {
        self.plan.clear();
        self.plan.push(0, first_pos, tokens, &self.blocks, logits);
        Ok(self.model.executor.execute(&self.plan)?)
    }
}

/// What a checkpoint takes up, over all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of the matrices as they are computed with, mapped or in panels.
    pub weights: u64,
    /// Bytes of KV cache of one position.
    pub kv_per_token: u64,
}

impl Sizes {
    /// Of this checkpoint, without loading it.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn of(checkpoint: &Checkpoint, ranks: Ranks) -> Result<Self, EvalError> {
        Ok(Self {
            weights: weight_bytes(checkpoint, ranks.n_ranks)?,
            kv_per_token: kv_bytes_per_token(checkpoint, ranks.cpu, ranks.n_ranks)?,
        })
    }
}

/// Writes the logits of all positions as tensor `logits`, f32 `[tokens, vocab]`.
///
/// # Errors
/// [`EvalError`].
pub fn write_logits(session: &mut Session, tokens: &[u32], out: &Path) -> Result<(), EvalError> {
    let mut bytes = Vec::with_capacity(tokens.len() * session.vocab_len() * 4);
    session.logits(tokens, |_, row| {
        bytes.extend(row.iter().flat_map(|v| v.to_le_bytes()))
    })?;
    let shape = vec![tokens.len(), session.vocab_len()];
    let fail = |source: io::Error| EvalError::Write {
        path: out.display().to_string(),
        source,
    };
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &bytes)
        .map_err(|e| fail(io::Error::other(e)))?;
    let file =
        safetensors::serialize([("logits", view)], None).map_err(|e| fail(io::Error::other(e)))?;
    fs::write(out, file).map_err(fail)
}

/// `range` in runs of at most `len`.
fn chunks(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(len)
        .map(move |start| start..(start + len).min(end))
}
