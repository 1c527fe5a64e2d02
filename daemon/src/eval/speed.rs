//! Tokens per second of a checkpoint, without queue or network.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{EvalError, Model, Ranks, STEP_TOKENS};
use crate::{
    runner::{Budget, KV_BLOCK_LEN, LoadError, LogitRows, StepPlan, kv_bytes_per_token},
    runtime::clock,
    sampler,
    weights::Checkpoint,
};

/// What is timed: `n_sequences` prompts of `n_prompt` tokens at once, each continued by `n_output`.
#[derive(Debug, Clone, Copy)]
pub struct SpeedCase {
    /// Tokens of a prompt.
    pub n_prompt: usize,
    /// Tokens generated per sequence, the first of which the prompt's step yields.
    pub n_output: usize,
    /// Sequences at once.
    pub n_sequences: usize,
}

/// One run's rates.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Prompt tokens per second until every first token is there.
    pub prefill: f64,
    /// Further tokens per second, over all sequences; 0 when there are none.
    pub decode: f64,
    /// Generated tokens per second of the whole run, prompts included.
    pub output: f64,
}

/// A checkpoint with room for a case.
pub struct SpeedTest {
    model: Model,
    case: SpeedCase,
    step_tokens_max: usize,
    plan: StepPlan,
    /// Block table of every sequence.
    tables: Vec<Vec<u32>>,
    /// Tokens of every sequence so far.
    tokens: Vec<Vec<u32>>,
    /// What follows the rows of a step.
    likeliest: Vec<AtomicU32>,
}

impl SpeedTest {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn open(checkpoint: &Checkpoint, ranks: Ranks, case: SpeedCase) -> Result<Self, EvalError> {
        let spec = crate::model::spec_of(checkpoint).map_err(|e| LoadError::Model(e.into()))?;
        let n_tokens = case.n_prompt + case.n_output;
        if case.n_prompt == 0 {
            return Err(EvalError::NoTokens);
        }
        if n_tokens > spec.context_len {
            return Err(EvalError::TooLong {
                n_tokens,
                context_len: spec.context_len,
            });
        }
        let blocks_each = n_tokens.div_ceil(KV_BLOCK_LEN);
        let bytes_per_token = kv_bytes_per_token(checkpoint, ranks.cpu, ranks.n_ranks)?;
        let n_positions = blocks_each * case.n_sequences * KV_BLOCK_LEN;
        let step_tokens_max = (4 * STEP_TOKENS).max(case.n_sequences);
        let budget = Budget {
            kv_bytes_max: n_positions as u64 * bytes_per_token,
            step_tokens_max,
            step_spans_max: case.n_sequences,
        };
        let model = Model::open(checkpoint, ranks, budget)?;
        let tables = (0..case.n_sequences)
            .map(|s| {
                (s * blocks_each..(s + 1) * blocks_each)
                    .filter_map(|b| u32::try_from(b).ok())
                    .collect()
            })
            .collect();
        Ok(Self {
            model,
            case,
            step_tokens_max,
            plan: StepPlan::default(),
            tables,
            tokens: vec![Vec::with_capacity(n_tokens); case.n_sequences],
            likeliest: (0..case.n_sequences).map(|_| AtomicU32::new(0)).collect(),
        })
    }

    /// Runs the case once. Prompts differ between sequences.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn run(&mut self) -> Result<Speed, EvalError> {
        let vocab_len = self.model.executor.limits().vocab_len;
        for (s, tokens) in self.tokens.iter_mut().enumerate() {
            tokens.clear();
            // Spread over the vocabulary by a multiplicative hash.
            let ids = (0..self.case.n_prompt).map(|i| (s * 7919 + i * 2_654_435) % vocab_len);
            tokens.extend(ids.filter_map(|id| u32::try_from(id).ok()));
        }
        let start = clock::now();
        let mut done = vec![0; self.case.n_sequences];
        while done.iter().any(|n| *n < self.case.n_prompt) {
            let mut room = self.step_tokens_max;
            for (s, done) in done.iter_mut().enumerate() {
                let n = (self.case.n_prompt - *done).min(room);
                if n > 0 {
                    self.push(s, *done, *done + n);
                    *done += n;
                    room -= n;
                }
            }
            self.step(vocab_len)?;
        }
        let prefilled = clock::now();
        for i in 1..self.case.n_output {
            let position = self.case.n_prompt + i - 1;
            for s in 0..self.case.n_sequences {
                self.push(s, position, position + 1);
            }
            self.step(vocab_len)?;
        }
        let end = clock::now();
        let sequences = self.case.n_sequences;
        let rate = |n: usize, from, to: std::time::Instant| {
            n as f64 / to.duration_since(from).as_secs_f64().max(1e-9)
        };
        let n_decoded = self.case.n_output.saturating_sub(1);
        Ok(Speed {
            prefill: rate(sequences * self.case.n_prompt, start, prefilled),
            decode: if n_decoded == 0 {
                0.0
            } else {
                rate(sequences * n_decoded, prefilled, end)
            },
            output: rate(sequences * self.case.n_output, start, end),
        })
    }

    /// Positions `from..to` of sequence `s` into the next step.
    fn push(&mut self, s: usize, from: usize, to: usize) {
        let last = to == self.tokens[s].len();
        let logits = if last {
            LogitRows::Last
        } else {
            LogitRows::Skip
        };
        let tokens = &self.tokens[s][from..to];
        self.plan
            .push(s as u64, from, tokens, &self.tables[s], logits);
    }

    /// Runs the step and continues the sequences whose logits it has.
    fn step(&mut self, vocab_len: usize) -> Result<(), EvalError> {
        let executor = &mut self.model.executor;
        let workers = executor.workers();
        let logits = executor.execute(&self.plan)?;
        workers.for_each_row(logits, vocab_len, &|row, _, logits| {
            let next = sampler::likeliest(logits).unwrap_or(0);
            self.likeliest[row].store(next, Relaxed);
        });
        let spans = self.plan.spans.iter();
        let continued = spans.filter(|span| span.logits == LogitRows::Last);
        for (span, next) in continued.zip(&self.likeliest) {
            let sequence = usize::try_from(span.seq).unwrap_or(usize::MAX);
            self.tokens[sequence].push(next.load(Relaxed));
        }
        self.plan.clear();
        Ok(())
    }
}
