//! An executor for tests: its logits are a hash of the sequence's tokens as read back from a paged
//! KV memory, so that a wrong block, position or order changes the text. Its speed and its failures
//! are the test's to choose.

use std::{
    collections::BTreeSet,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use crate::{
    flow::{FinishReason, Request},
    runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan},
    sampler::{self, SampleContext, Scratch},
};

/// Longest wait on a condition; a test that waits longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct FakeExecutor {
    limits: ExecutorLimits,
    /// Token and position by `block * block_len + offset`.
    kv: Vec<(u32, usize)>,
    logits: Vec<f32>,
    control: Arc<FakeControl>,
}

/// The test's end.
#[derive(Default)]
pub(crate) struct FakeControl {
    state: Mutex<ControlState>,
    changed: Condvar,
}

#[derive(Default)]
struct ControlState {
    /// Steps that may still begin; `None` is any number.
    n_permits: Option<usize>,
    n_begun: usize,
    n_failures_due: usize,
    /// Changes every logit: another model.
    twist: u64,
    /// Serials of all spans so far.
    serials: Vec<u64>,
}

impl FakeControl {
    /// Lets `n` more steps begin, then blocks the engine inside the next one.
    pub(crate) fn permit(&self, n: usize) {
        let mut state = self.state.lock().unwrap();
        *state.n_permits.get_or_insert(0) += n;
        self.changed.notify_all();
    }

    /// Lets every step begin.
    pub(crate) fn open(&self) {
        self.state.lock().unwrap().n_permits = None;
        self.changed.notify_all();
    }

    /// Lets the next `n` steps fail.
    pub(crate) fn fail(&self, n: usize) {
        self.state.lock().unwrap().n_failures_due = n;
    }

    pub(crate) fn set_twist(&self, twist: u64) {
        self.state.lock().unwrap().twist = twist;
    }

    /// Steps that reached the executor, those blocked included.
    pub(crate) fn n_begun(&self) -> usize {
        self.state.lock().unwrap().n_begun
    }

    pub(crate) fn wait_begun(&self, n: usize) {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, PATIENCE, |s| s.n_begun < n);
        assert!(!waited.unwrap().1.timed_out(), "step {n} never began");
    }

    /// True when a span of the `n`-th sequence was ever computed.
    pub(crate) fn has_computed(&self, serial: u64) -> bool {
        self.state.lock().unwrap().serials.contains(&serial)
    }

    fn begin(&self, plan: &StepPlan) -> Result<u64, StepError> {
        let mut state = self.state.lock().unwrap();
        state.n_begun += 1;
        state.serials.extend(plan.spans.iter().map(|s| s.seq));
        self.changed.notify_all();
        // An abandoned engine goes on after a while, so that a failed test ends.
        let blocked = self
            .changed
            .wait_timeout_while(state, PATIENCE, |s| s.n_permits == Some(0));
        let (mut state, _) = blocked.unwrap();
        state.n_permits = state.n_permits.map(|n| n.saturating_sub(1));
        if 0 < state.n_failures_due {
            state.n_failures_due -= 1;
            return Err(StepError::NotFinite { row: 0 });
        }
        Ok(state.twist)
    }
}

impl FakeExecutor {
    pub(crate) fn new(limits: ExecutorLimits) -> (Box<Self>, Arc<FakeControl>) {
        let control = Arc::new(FakeControl::default());
        let fake = Self {
            limits,
            kv: vec![(u32::MAX, usize::MAX); limits.n_blocks * limits.block_len],
            logits: Vec::new(),
            control: Arc::clone(&control),
        };
        (Box::new(fake), control)
    }
}

impl StepExecutor for FakeExecutor {
    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        let limits = self.limits;
        assert!(!plan.spans.is_empty(), "a step does something");
        assert!(plan.tokens.len() <= limits.step_tokens_max);
        assert!(plan.spans.len() <= limits.step_spans_max);
        assert!(plan.n_logits() <= limits.step_logits_max);
        let (mut read, mut written) = (BTreeSet::new(), BTreeSet::new());
        for span in &plan.spans {
            let table = &plan.blocks[span.blocks.clone()];
            let (whole, own) = table.split_at(span.first_pos / limits.block_len);
            read.extend(whole);
            assert!(
                own.iter().all(|b| written.insert(b)),
                "no two sequences write a block"
            );
        }
        assert!(read.is_disjoint(&written), "a shared block is only read");
        let result = self.control.begin(plan);

        self.logits.clear();
        for span in &plan.spans {
            let table = &plan.blocks[span.blocks.clone()];
            let tokens = &plan.tokens[span.tokens.clone()];
            let cell = |pos: usize| {
                table[pos / limits.block_len] as usize * limits.block_len + pos % limits.block_len
            };
            for (pos, &token) in (span.first_pos..).zip(tokens) {
                assert!((token as usize) < limits.vocab_len && pos < limits.context_len_max);
                // After a failure the contents are undefined; garbage shows who relies on them.
                let is_garbage = result.is_err();
                self.kv[cell(pos)] = if is_garbage {
                    (u32::MAX, 0)
                } else {
                    (token, pos)
                };
            }
            let end = span.first_pos + tokens.len();
            let first_row = match span.logits {
                LogitRows::Skip => end,
                LogitRows::Last => end - 1,
                LogitRows::All => span.first_pos,
            };
            for pos in first_row..end {
                let cells = (0..=pos).map(|p| self.kv[cell(p)]);
                let hash = cells.fold(0, |h, (t, p)| mix(h ^ u64::from(t) << 32 ^ p as u64));
                let twist = result.as_ref().copied().unwrap_or(0);
                extend_logits(&mut self.logits, hash ^ twist, limits.vocab_len);
            }
        }
        result.map(|_| &mut self.logits[..])
    }
}

/// What a request has to get, computed from its tokens alone.
pub(crate) fn reference(request: &Request, limits: &ExecutorLimits) -> (Vec<u32>, FinishReason) {
    let mut scratch = Scratch::new(limits.vocab_len);
    let mut tokens = request.prompt.clone();
    for _ in 0..request.max_tokens {
        let cells = tokens.iter().zip(0u64..);
        let hash = cells.fold(0, |h, (&t, p)| mix(h ^ u64::from(t) << 32 ^ p));
        let mut logits = Vec::new();
        extend_logits(&mut logits, hash, limits.vocab_len);
        let (prompt, output) = tokens.split_at(request.prompt.len());
        let ctx = SampleContext {
            params: &request.sampling,
            prompt,
            output,
            top_logprobs: None,
            allowed: None,
            sampleable_len: limits.vocab_len,
        };
        let token = sampler::sample(&mut scratch, &mut logits, &ctx)
            .unwrap()
            .token;
        tokens.push(token);
        if request.stop_tokens.contains(&token) {
            return (tokens.split_off(request.prompt.len()), FinishReason::Stop);
        }
        if tokens.len() == limits.context_len_max {
            break;
        }
    }
    (tokens.split_off(request.prompt.len()), FinishReason::Length)
}

fn extend_logits(logits: &mut Vec<f32>, hash: u64, vocab_len: usize) {
    let logit = |id: u64| (mix(hash ^ mix(id)) >> 40) as f32 / (1u64 << 21) as f32 - 4.0;
    logits.extend((0..vocab_len as u64).map(logit));
}

/// The finalizer of SplitMix64: every input bit reaches every output bit.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
