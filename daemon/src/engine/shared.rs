//! What the engine thread and its handles share: counters, each a number of its own, and the cost
//! model.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::EngineLimits;
use crate::cost::CostModel;

/// Stands for "never" in the time fields.
const NEVER: u64 = u64::MAX;

/// What an engine is doing. The numbers are read one by one, not at one instant.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineLoad {
    /// Sequences in the running set.
    pub n_running: usize,
    /// Requests waiting for a place: in the mailbox, in the line, or preempted.
    pub n_waiting: usize,
    /// KV blocks in use.
    pub n_blocks_used: usize,
    /// KV blocks for requests.
    pub n_blocks: usize,
    /// Steps since start, canaries not counted.
    pub n_steps: u64,
    /// Prompt tokens computed since start, recomputed ones counted once.
    pub n_prompt_tokens: u64,
    /// Tokens generated since start.
    pub n_output_tokens: u64,
    /// Preemptions since start.
    pub n_preemptions: u64,
    /// Since the last generated token, canaries included.
    pub last_token_age: Option<Duration>,
    /// True when the last canary that ended gave another token than the first.
    pub canary_wrong: bool,
    /// True when the engine's thread panicked: no token comes any more.
    pub is_dead: bool,
}

/// The counters behind [`EngineLoad`], and the admission count.
#[derive(Debug)]
pub(super) struct Shared {
    started_at: Instant,
    n_blocks: usize,
    /// Requests taken that have not run yet; the bound of the waiting line holds on this.
    n_queued: AtomicUsize,
    pub(super) n_preempted_waiting: AtomicUsize,
    pub(super) n_running: AtomicUsize,
    pub(super) n_blocks_used: AtomicUsize,
    pub(super) n_steps: AtomicU64,
    pub(super) n_prompt_tokens: AtomicU64,
    pub(super) n_output_tokens: AtomicU64,
    pub(super) n_preemptions: AtomicU64,
    pub(super) is_canary_wrong: AtomicBool,
    pub(super) is_dead: AtomicBool,
    /// Nanoseconds since `started_at`, or [`NEVER`].
    last_token_at: AtomicU64,
    /// Nanoseconds since `started_at`, or [`NEVER`].
    drain_until: AtomicU64,
    /// When the step under way began: nanoseconds since `started_at`, or [`NEVER`].
    step_began_at: AtomicU64,
    /// How long it was expected to take.
    step_expected: AtomicU64,
    /// Copied in by the engine thread after a step.
    cost: Mutex<CostModel>,
}

impl Shared {
    pub(super) fn new(now: Instant, limits: &EngineLimits) -> Self {
        Self {
            started_at: now,
            n_blocks: limits.n_blocks,
            n_queued: AtomicUsize::new(0),
            n_preempted_waiting: AtomicUsize::new(0),
            n_running: AtomicUsize::new(0),
            n_blocks_used: AtomicUsize::new(0),
            n_steps: AtomicU64::new(0),
            n_prompt_tokens: AtomicU64::new(0),
            n_output_tokens: AtomicU64::new(0),
            n_preemptions: AtomicU64::new(0),
            is_canary_wrong: AtomicBool::new(false),
            is_dead: AtomicBool::new(false),
            last_token_at: AtomicU64::new(NEVER),
            drain_until: AtomicU64::new(NEVER),
            step_began_at: AtomicU64::new(NEVER),
            step_expected: AtomicU64::new(0),
            cost: Mutex::default(),
        }
    }

    /// Counts one more that waits, unless `max` do; the error is how many.
    pub(super) fn reserve_place(&self, max: usize) -> Result<(), usize> {
        let more = |n| (n < max).then_some(n + 1);
        self.n_queued
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .map(|_| ())
    }

    pub(super) fn release_place(&self) {
        let n_before = self.n_queued.fetch_sub(1, Ordering::AcqRel);
        assert!(0 < n_before, "a place is released once");
    }

    /// A step begins that is expected to take so long.
    pub(super) fn begin_step(&self, now: Instant, expected: Duration) {
        self.step_expected.store(nanos(expected), Ordering::Release);
        self.step_began_at
            .store(self.since_start(now), Ordering::Release);
    }

    pub(super) fn end_step(&self) {
        self.step_began_at.store(NEVER, Ordering::Release);
    }

    /// How long the step under way has been, and how long it was expected to take.
    pub(super) fn step_age(&self, now: Instant) -> (Option<Duration>, Duration) {
        let began_at = self.step_began_at.load(Ordering::Acquire);
        let age = self.since_start(now).saturating_sub(began_at);
        let expected = Duration::from_nanos(self.step_expected.load(Ordering::Acquire));
        let age = (began_at != NEVER).then(|| Duration::from_nanos(age));
        (age, expected)
    }

    pub(super) fn set_cost(&self, cost: &CostModel) {
        let mut shared = self.cost.lock().unwrap_or_else(PoisonError::into_inner);
        shared.clone_from(cost);
    }

    pub(super) fn cost(&self) -> CostModel {
        self.cost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn note_token(&self, now: Instant) {
        self.last_token_at
            .store(self.since_start(now), Ordering::Release);
    }

    /// Sets the end of the drain to `drain` from now, or brings it forward to there.
    pub(super) fn shorten_drain(&self, now: Instant, drain: Duration) {
        let until = self.since_start(now).saturating_add(nanos(drain));
        self.drain_until.fetch_min(until, Ordering::AcqRel);
    }

    pub(super) fn is_drain_over(&self, now: Instant) -> bool {
        self.drain_until.load(Ordering::Acquire) <= self.since_start(now)
    }

    pub(super) fn load(&self, now: Instant) -> EngineLoad {
        let last_token_at = self.last_token_at.load(Ordering::Acquire);
        let age = self.since_start(now).saturating_sub(last_token_at);
        let n_queued = self.n_queued.load(Ordering::Acquire);
        EngineLoad {
            n_running: self.n_running.load(Ordering::Acquire),
            n_waiting: n_queued + self.n_preempted_waiting.load(Ordering::Acquire),
            n_blocks_used: self.n_blocks_used.load(Ordering::Acquire),
            n_blocks: self.n_blocks,
            n_steps: self.n_steps.load(Ordering::Acquire),
            n_prompt_tokens: self.n_prompt_tokens.load(Ordering::Acquire),
            n_output_tokens: self.n_output_tokens.load(Ordering::Acquire),
            n_preemptions: self.n_preemptions.load(Ordering::Acquire),
            last_token_age: (last_token_at != NEVER).then(|| Duration::from_nanos(age)),
            canary_wrong: self.is_canary_wrong.load(Ordering::Acquire),
            is_dead: self.is_dead.load(Ordering::Acquire),
        }
    }

    fn since_start(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.started_at))
    }
}

/// Saturating below [`NEVER`]; 584 years are enough.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos())
        .unwrap_or(NEVER)
        .min(NEVER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> Shared {
        let limits = EngineLimits {
            context_len_max: 1,
            vocab_len: 1,
            sampleable_len: 1,
            waiting_max: 1,
            running_max: 1,
            n_blocks: 1,
            block_len: 1,
        };
        Shared::new(crate::runtime::clock::now(), &limits)
    }

    #[test]
    fn a_drain_is_brought_forward_and_never_put_off() {
        let shared = shared();
        let start = shared.started_at;
        let at = |secs| start + Duration::from_secs(secs);
        assert!(!shared.is_drain_over(at(1_000_000)));
        shared.shorten_drain(start, Duration::MAX);
        assert!(!shared.is_drain_over(at(1_000_000)));
        shared.shorten_drain(start, Duration::from_secs(10));
        shared.shorten_drain(at(5), Duration::from_secs(10));
        assert!(!shared.is_drain_over(at(9)));
        assert!(shared.is_drain_over(at(10)));
    }

    #[test]
    fn places_are_counted_up_to_the_limit() {
        let shared = shared();
        assert_eq!(shared.reserve_place(2), Ok(()));
        assert_eq!(shared.reserve_place(2), Ok(()));
        assert_eq!(shared.reserve_place(2), Err(2));
        shared.release_place();
        assert_eq!(shared.reserve_place(2), Ok(()));
        assert_eq!(shared.load(shared.started_at).n_waiting, 2);
    }
}
