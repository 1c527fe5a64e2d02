//! A reserved request that shows the executor still computes, and computes the same.
//!
//! All of it runs when no token came out for a while. Under load its first token joins a step every
//! second, since it costs what a decode does and meets every matrix of a dense model; it runs by itself
//! where steps have no room, and all of it now and then, both at a small share of the time. In an engine's
//! life the whole row of logits has to be the same bits, which batches do not change; from one engine to
//! the next only the token is compared, since another processor may round otherwise.

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
/// Under load the first token takes at most this part of the time,
const FIRST_TOKEN_SHARE: u32 = 125;
/// and the whole prompt at most this part: 1 % together.
const WHOLE_SHARE: u32 = 500;
/// Under load neither runs before this part of the silence after which the whole runs otherwise.
const BUSY_DIVISOR: u32 = 3;

/// A greedy request of one token over blocks that no sequence gets.
#[derive(Debug)]
pub(super) struct Canary {
    whole: Probe,
    /// Absent where the whole prompt is one token.
    first_token: Option<Probe>,
    sampling: SamplingParams,
    sampleable_len: usize,
    interval: Duration,
}

/// How much of the canary's prompt runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    FirstToken,
}

/// One part of the canary and what is known of it.
#[derive(Debug)]
struct Probe {
    plan: StepPlan,
    /// What the first run gave: the token, and the digest of all logits.
    expected: Option<(u32, u64)>,
    /// The last run gave something else, or no numbers.
    is_wrong: bool,
    last_run_at: Option<Instant>,
    /// Times of the last two runs. The shorter one counts: a run that had to wait for a core says nothing
    /// of what the next one costs.
    took: [Duration; 2],
}

/// What a run showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Right,
    Wrong { expected: u32, found: u32 },
}

impl Probe {
    fn new(prompt: &[u32], blocks: &[u32]) -> Self {
        let mut plan = StepPlan::default();
        plan.push(CANARY_SERIAL, 0, prompt, blocks, LogitRows::Last);
        Self {
            plan,
            expected: None,
            is_wrong: false,
            last_run_at: None,
            took: [Duration::MAX; 2],
        }
    }

    /// When it may run under load, taking at most one part in `share` of the time.
    fn due_when_busy_at(&self, share: u32, interval_min: Duration) -> Option<Instant> {
        let [a, b] = self.took;
        let interval = a.min(b).saturating_mul(share).max(interval_min);
        self.last_run_at?.checked_add(interval)
    }
}

impl Canary {
    /// Takes the pool's last blocks.
    pub(super) fn new(cfg: &EngineConfig, executor: &ExecutorLimits) -> Self {
        let first = executor.n_blocks - cfg.n_canary_blocks(executor);
        let blocks: Vec<u32> = (first..executor.n_blocks).map(|b| b as u32).collect();
        let prompt = &cfg.canary_prompt[..];
        Self {
            whole: Probe::new(prompt, &blocks),
            first_token: (1 < prompt.len()).then(|| Probe::new(&prompt[..1], &blocks[..1])),
            sampling: SamplingParams::default(),
            sampleable_len: cfg.sampleable_len,
            interval: cfg.canary_interval,
        }
    }

    /// The parts there are.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        let first_token = self.first_token.as_ref().map(|_| Part::FirstToken);
        std::iter::once(Part::Whole).chain(first_token)
    }

    fn probe(&self, part: Part) -> &Probe {
        match part {
            Part::Whole => &self.whole,
            Part::FirstToken => self.first_token.as_ref().unwrap_or(&self.whole),
        }
    }

    fn probe_mut(&mut self, part: Part) -> &mut Probe {
        match part {
            Part::Whole => &mut self.whole,
            Part::FirstToken => self.first_token.as_mut().unwrap_or(&mut self.whole),
        }
    }

    /// What the first run of all of it gave.
    pub(super) fn expected(&self) -> Option<u32> {
        self.whole.expected.map(|(token, _)| token)
    }

    /// True when this part has run before.
    pub(super) fn has_run(&self, part: Part) -> bool {
        self.probe(part).expected.is_some()
    }

    /// What the time of a part's step depends on.
    pub(super) fn shape(&self, part: Part) -> StepShape {
        StepShape::span(0, self.probe(part).plan.tokens.len(), 1)
    }

    /// True when the last run of any part gave something else than its first.
    pub(super) fn is_wrong(&self) -> bool {
        self.parts().any(|part| self.probe(part).is_wrong)
    }

    /// The run of a part that began last is over.
    pub(super) fn note_end(&mut self, part: Part, now: Instant) {
        let probe = self.probe_mut(part);
        let began_at = probe.last_run_at.unwrap_or(now);
        probe.took = [probe.took[1], now.saturating_duration_since(began_at)];
    }

    /// What has to run though tokens come out.
    pub(super) fn due_when_busy(&self, now: Instant) -> Option<Part> {
        let interval_min = self.interval / BUSY_DIVISOR;
        self.parts().find(|part| {
            let share = match part {
                Part::Whole => WHOLE_SHARE,
                Part::FirstToken => FIRST_TOKEN_SHARE,
            };
            let due = self.probe(*part).due_when_busy_at(share, interval_min);
            due.is_some_and(|due| due <= now)
        })
    }

    /// When it has to run, if no token comes out after `last_token_at`; `None` when that is beyond
    /// time.
    pub(super) fn due_at(&self, last_token_at: Option<Instant>) -> Option<Instant> {
        let silent_since = last_token_at.max(self.whole.last_run_at)?;
        silent_since.checked_add(self.interval)
    }

    /// Joins a step that has room for one more position and row of logits, when it is time; true when
    /// it did.
    pub(super) fn join(&mut self, now: Instant, plan: &mut StepPlan) -> bool {
        let interval_min = self.interval / BUSY_DIVISOR;
        let probe = self.probe_mut(Part::FirstToken);
        let due_at = probe
            .last_run_at
            .and_then(|at| at.checked_add(interval_min));
        let is_due = due_at.is_some_and(|due| due <= now);
        if !is_due || probe.expected.is_none() || probe.plan.tokens.len() != 1 {
            return false;
        }
        probe.last_run_at = Some(now);
        let StepPlan { tokens, blocks, .. } = &probe.plan;
        plan.push(CANARY_SERIAL, 0, tokens, blocks, LogitRows::Last);
        true
    }

    /// Runs one step.
    pub(super) fn run(
        &mut self,
        part: Part,
        now: Instant,
        deadline: Option<Duration>,
        executor: &mut dyn StepExecutor,
        scratch: &mut Scratch,
    ) -> Result<Verdict, StepError> {
        let probe = self.probe_mut(part);
        probe.last_run_at = Some(now);
        probe.plan.deadline_ms = deadline.map_or(0, |d| d.as_millis() as u32);
        let outcome = executor.execute(&probe.plan);
        self.judge(part, outcome, scratch)
    }

    /// What a part's row of logits shows.
    pub(super) fn judge(
        &mut self,
        part: Part,
        logits: Result<&mut [f32], StepError>,
        scratch: &mut Scratch,
    ) -> Result<Verdict, StepError> {
        let outcome = logits.and_then(|logits| {
            let digest = digest_of(logits);
            let ctx = SampleContext {
                params: &self.sampling,
                prompt: &[],
                output: &[],
                top_logprobs: None,
                sampleable_len: self.sampleable_len,
                allowed: None,
            };
            let sampled = sampler::sample(scratch, logits, &ctx);
            let sampled = sampled.map_err(|_| StepError::NotFinite { row: 0 })?;
            Ok((sampled.token, digest))
        });
        let probe = self.probe_mut(part);
        // A lost group is not this engine's any more; logits that are no numbers are wrong ones.
        let is_lost = matches!(outcome, Err(StepError::Missing(_)));
        probe.is_wrong |= outcome.is_err() && !is_lost;
        let found = outcome?;
        let expected = *probe.expected.get_or_insert(found);
        probe.is_wrong = found != expected;
        Ok(match found == expected {
            true => Verdict::Right,
            false => Verdict::Wrong {
                expected: expected.0,
                found: found.0,
            },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{engine::fake::FakeExecutor, runtime::clock};

    const LIMITS: ExecutorLimits = ExecutorLimits {
        vocab_len: 50,
        block_len: 4,
        n_blocks: 10,
        step_tokens_max: 16,
        step_spans_max: 4,
        step_logits_max: 4,
        context_len_max: 64,
    };

    fn canary() -> Canary {
        Canary::new(&EngineConfig::for_executor("fake", &LIMITS), &LIMITS)
    }

    /// Runs a part that takes so long.
    fn run(
        canary: &mut Canary,
        part: Part,
        executor: &mut FakeExecutor,
        now: &mut Instant,
        took: Duration,
    ) -> Result<Verdict, StepError> {
        let mut scratch = Scratch::new(LIMITS.vocab_len);
        let verdict = canary.run(part, *now, None, executor, &mut scratch);
        *now += took;
        canary.note_end(part, *now);
        verdict
    }

    #[test]
    fn under_load_it_takes_at_most_a_hundredth_of_the_time_and_comes_every_second_where_that_is_less()
     {
        for (first_token_ms, whole_ms) in [(1, 1), (5, 40), (100, 700)] {
            let mut canary = canary();
            let (mut executor, _) = FakeExecutor::new(LIMITS);
            let mut now = clock::now();
            let took = |part| match part {
                Part::Whole => Duration::from_millis(whole_ms),
                Part::FirstToken => Duration::from_millis(first_token_ms),
            };
            for part in canary.parts() {
                run(&mut canary, part, &mut executor, &mut now, took(part)).unwrap();
            }
            let start = now;
            let mut n = [0_u32; 2];
            while now < start + Duration::from_secs(3_600) {
                now += Duration::from_millis(10);
                if let Some(part) = canary.due_when_busy(now) {
                    run(&mut canary, part, &mut executor, &mut now, took(part)).unwrap();
                    n[usize::from(part == Part::FirstToken)] += 1;
                }
            }
            let spent = took(Part::Whole) * n[0] + took(Part::FirstToken) * n[1];
            let share = spent.as_secs_f64() / 3_600.0;
            assert!(share < 0.0101, "{share} of the time");
            let n_expected = 3_600_000 / u64::max(1_000, first_token_ms * 125);
            assert!(n_expected * 95 / 100 < u64::from(n[1]), "{n:?}");
            assert!(0 < n[0], "all of it now and then");
        }
    }

    /// A canary that once had to wait for a core used to stay away for as long as its share then asked.
    #[test]
    fn one_slow_run_does_not_put_off_the_next() {
        let mut canary = canary();
        let (mut executor, _) = FakeExecutor::new(LIMITS);
        let mut now = clock::now();
        for ms in [1, 1, 300] {
            for part in canary.parts() {
                let took = Duration::from_millis(ms);
                run(&mut canary, part, &mut executor, &mut now, took).unwrap();
            }
        }
        assert_eq!(canary.due_when_busy(now), None);
        now += canary.interval / BUSY_DIVISOR;
        assert!(canary.due_when_busy(now).is_some());
    }

    /// A step of its own used to cost a hundredth of the time of a small model.
    #[test]
    fn its_first_token_joins_a_step_when_it_is_time_and_is_judged_there() {
        let mut canary = canary();
        let (mut executor, control) = FakeExecutor::new(LIMITS);
        let mut now = clock::now();
        let mut plan = StepPlan::default();
        assert!(!canary.join(now, &mut plan), "nothing is known of it yet");
        let ms = Duration::from_millis(1);
        for part in canary.parts() {
            run(&mut canary, part, &mut executor, &mut now, ms).unwrap();
        }
        assert!(!canary.join(now, &mut plan), "it has just run");
        let mut scratch = Scratch::new(LIMITS.vocab_len);
        for twist in [0, 1] {
            now += canary.interval / BUSY_DIVISOR;
            plan.clear();
            assert!(canary.join(now, &mut plan));
            assert_eq!(
                (plan.spans.len(), plan.tokens.len(), plan.n_logits()),
                (1, 1, 1)
            );
            assert_ne!(canary.due_when_busy(now), Some(Part::FirstToken));
            control.set_twist(twist);
            let logits = executor.execute(&plan);
            let verdict = canary.judge(Part::FirstToken, logits, &mut scratch);
            assert_eq!(verdict == Ok(Verdict::Right), twist == 0, "{verdict:?}");
            assert_eq!(canary.is_wrong(), twist == 1);
        }
    }

    #[test]
    fn a_part_that_is_right_does_not_hide_one_that_is_wrong() {
        let mut canary = canary();
        let (mut executor, control) = FakeExecutor::new(LIMITS);
        let mut now = clock::now();
        let ms = Duration::from_millis(1);
        for part in canary.parts() {
            let verdict = run(&mut canary, part, &mut executor, &mut now, ms);
            assert_eq!(verdict, Ok(Verdict::Right));
        }
        control.set_twist(1);
        let verdict = run(&mut canary, Part::Whole, &mut executor, &mut now, ms);
        assert!(matches!(verdict, Ok(Verdict::Wrong { .. })), "{verdict:?}");
        control.set_twist(0);
        let verdict = run(&mut canary, Part::FirstToken, &mut executor, &mut now, ms);
        assert_eq!((verdict, canary.is_wrong()), (Ok(Verdict::Right), true));
        run(&mut canary, Part::Whole, &mut executor, &mut now, ms).unwrap();
        assert!(!canary.is_wrong());
        control.fail(1);
        run(&mut canary, Part::FirstToken, &mut executor, &mut now, ms).unwrap_err();
        assert!(canary.is_wrong(), "logits that are no numbers");
    }
}
