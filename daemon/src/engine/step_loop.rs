//! The engine thread's state and its loop.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use dsd_kernels::backend::Workers;

use crate::{
    cost::{CostModel, StepShape},
    flow::{FinishReason, RequestId, SamplingParams, StreamItem, TokenEvent, TokenSink},
    grammar::{Allowed, Constraint, GrammarError},
    kv_cache::BlockKey,
    runner::{KeptKey, StepError, StepExecutor, StepPlan},
    runtime::clock,
    sampler::{self, SampleContext, Sampled, Scratch},
    scheduler::{EndReason, Ended, Scheduled, Scheduler, SequenceSpec, Slot},
};

use super::{
    Arrival, EngineConfig, EngineLimits, Outlet, calibration,
    canary::{Canary, Part, Verdict},
    meter::{End, Meter},
    shared::Shared,
};

/// How long an idle engine without a canary to run sleeps at most.
const IDLE_SLEEP_MAX: Duration = Duration::from_secs(3600);

/// A step that takes this many times what was expected, and [`DEADLINE_MORE`], is not merely slow.
const DEADLINE_FACTOR: u32 = 10;
const DEADLINE_MORE: Duration = Duration::from_secs(1);
/// No step has a shorter deadline: a process may well wait that long for a core or a page.
const DEADLINE_MIN: Duration = Duration::from_secs(3);
/// Longer ones are for the collectives' own limit to cut.
const DEADLINE_MAX: Duration = Duration::from_secs(86_400);

/// How long ranks may be late in a step that is expected to take so long.
pub fn step_deadline(expected: Duration) -> Duration {
    let deadline = expected.saturating_mul(DEADLINE_FACTOR) + DEADLINE_MORE;
    deadline.clamp(DEADLINE_MIN, DEADLINE_MAX)
}

/// Everything the engine thread owns. What a step needs is taken here and reused.
pub(super) struct StepLoop {
    executor: Box<dyn StepExecutor>,
    scheduler: Scheduler,
    canary: Canary,
    cost: CostModel,
    /// A step failed: the canary has to show whether others would.
    is_canary_due: bool,
    /// False when nothing was known of step times at the start.
    is_calibrated: bool,
    limits: EngineLimits,
    model: String,
    shared: Arc<Shared>,
    meter: Meter,
    mailbox: Receiver<Arrival>,
    /// By slot.
    clients: Vec<Option<Client>>,
    plan: StepPlan,
    sampled: Vec<Option<u32>>,
    draws: Draws,
    ended: Vec<Ended>,
    is_stopping: bool,
    /// Set when the executor is of no use any more.
    fatal: Option<StepError>,
    /// Told what came of every turn of the loop.
    outlet: Outlet,
    last_token_at: Option<Instant>,
    n_preemptions_counted: u64,
    /// Sequences that filled a block in the last step.
    filled: Vec<Slot>,
    /// What their blocks hold.
    keys: Vec<(u32, KeptKey)>,
}

/// What drawing the tokens of a step takes, by several threads at once.
struct Draws {
    workers: Arc<dyn Workers>,
    /// One per thread; a lock is never contended.
    scratches: Vec<Mutex<Scratch>>,
    /// Whose the rows of logits are, and the token of the prompt that a row scores; `None`: the next
    /// token is drawn from it.
    rows: Vec<(Slot, Option<usize>)>,
    /// What was drawn from them, or stands there already; `None` where the row holds no number.
    tokens: Vec<Mutex<Option<Sampled>>>,
}

impl Draws {
    fn new(workers: Arc<dyn Workers>, vocab_len: usize, n_rows_max: usize) -> Self {
        let scratch = |_| Mutex::new(Scratch::new(vocab_len));
        Self {
            scratches: (0..workers.n_threads()).map(scratch).collect(),
            workers,
            rows: Vec::with_capacity(n_rows_max),
            tokens: (0..n_rows_max).map(|_| Mutex::new(None)).collect(),
        }
    }
}

/// Locks, whatever became of an earlier holder: what is inside is overwritten before it is read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the scheduler does not need to know of a request.
struct Client {
    id: RequestId,
    slot: Slot,
    sampling: SamplingParams,
    /// Locked by the thread that draws for it.
    constraint: Option<Mutex<Constraint>>,
    top_logprobs: Option<usize>,
    /// False where only the prompt's log-probabilities are wanted.
    wants_tokens: bool,
    sink: TokenSink,
    submitted_at: Instant,
    /// When its first step began.
    started_at: Option<Instant>,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
    n_prompt: usize,
    n_cached: usize,
    /// Tokens that an engine before this one gave.
    n_given_before: usize,
    n_emitted: usize,
    /// Holds a place in the waiting line's count.
    is_queued: bool,
}

impl StepLoop {
    pub(super) fn new(
        executor: Box<dyn StepExecutor>,
        cfg: EngineConfig,
        limits: EngineLimits,
        shared: Arc<Shared>,
        mailbox: Receiver<Arrival>,
        outlet: Outlet,
    ) -> Self {
        let executor_limits = executor.limits();
        let scheduler = Scheduler::new(cfg.scheduler(&executor_limits));
        let meter = Meter::new(&cfg.model);
        meter.kv_blocks.set(limits.n_blocks as f64);
        Self {
            canary: Canary::new(&cfg, &executor_limits),
            clients: (0..scheduler.n_slots()).map(|_| None).collect(),
            plan: StepPlan {
                // The canary may be among them.
                spans: Vec::with_capacity(limits.running_max + 1),
                tokens: Vec::with_capacity(cfg.step_tokens_max),
                blocks: Vec::with_capacity(limits.n_blocks),
                deadline_ms: 0,
            },
            sampled: Vec::with_capacity(limits.running_max),
            ended: Vec::with_capacity(scheduler.n_slots()),
            draws: Draws::new(
                executor.workers(),
                limits.vocab_len,
                executor_limits.step_logits_max,
            ),
            is_canary_due: false,
            is_calibrated: cfg.cost.is_some(),
            cost: cfg.cost.unwrap_or_default(),
            model: cfg.model,
            is_stopping: false,
            fatal: None,
            outlet,
            last_token_at: None,
            n_preemptions_counted: 0,
            filled: Vec::with_capacity(limits.running_max),
            keys: Vec::with_capacity(limits.n_blocks),
            executor,
            scheduler,
            limits,
            shared,
            meter,
            mailbox,
        }
    }

    /// Steps until the mailbox is closed and everything taken has ended, or until the executor is of
    /// no use any more: then nothing taken gets an end, and the reason is returned.
    pub(super) fn run(&mut self) -> Result<(), StepError> {
        loop {
            self.gather();
            let now = clock::now();
            self.drop_cancelled();
            if self.is_stopping && self.shared.is_drain_over(now) {
                self.end_rest();
            }
            if self.scheduler.is_idle() {
                self.publish();
                self.report();
                if self.is_stopping {
                    return Ok(());
                }
                self.sleep(now);
            } else {
                self.step(now);
                self.publish();
                self.report();
            }
            if let Some(fatal) = self.fatal.take() {
                return Err(fatal);
            }
            let now = clock::now();
            let is_silent = self
                .canary
                .due_at(self.last_token_at)
                .is_some_and(|due| due <= now);
            let is_suspect = std::mem::take(&mut self.is_canary_due);
            if self.is_stopping {
                continue;
            }
            // The failure is logged and counted; the next silence brings the next try.
            let outcome = match (is_silent || is_suspect, self.canary.due_when_busy(now)) {
                (true, _) => self.run_all_canary(),
                (false, Some(part)) => self.run_canary(part),
                (false, None) => continue,
            };
            if let Err(e @ StepError::Missing(_)) = outcome {
                return Err(e);
            }
            self.report();
        }
    }

    fn report(&mut self) {
        (self.outlet)(&self.shared.load(clock::now()), &self.cost);
    }

    /// Measures step times where nothing is known of them.
    pub(super) fn calibrate(&mut self) -> Result<(), StepError> {
        let kept = self.executor.take_kept();
        if self.is_calibrated {
            let of_requests = |(id, _): &(u32, KeptKey)| (*id as usize) < self.limits.n_blocks;
            let kept = kept.into_iter().filter(of_requests);
            let kept: Vec<_> = kept
                .map(|(id, key)| (id, BlockKey::from_bytes(key)))
                .collect();
            tracing::debug!(model = %self.model, n_blocks = kept.len(), "blocks kept");
            self.scheduler.seed(&kept);
        } else {
            // Measuring writes over what was kept.
            let n_blocks = self.limits.n_blocks;
            let limits = self.executor.limits();
            self.cost = calibration::run(&mut *self.executor, &limits, n_blocks)?;
            self.is_calibrated = true;
        }
        self.shared.set_cost(&self.cost);
        Ok(())
    }

    /// The token that the canary has to give.
    pub(super) fn canary_token(&self) -> Option<u32> {
        self.canary.expected()
    }

    /// Runs every part of the canary; the first time that learns what they have to give.
    pub(super) fn run_all_canary(&mut self) -> Result<(), StepError> {
        self.canary
            .parts()
            .try_for_each(|part| self.run_canary(part))
    }

    /// Runs a part of the canary and notes what it showed.
    fn run_canary(&mut self, part: Part) -> Result<(), StepError> {
        let now = clock::now();
        let expected = self.cost.seconds(self.canary.shape(part));
        let expected = Duration::try_from_secs_f64(expected).unwrap_or(Duration::MAX);
        // The first one of all may read weights from a disk.
        let deadline = (self.canary.has_run(part)).then(|| step_deadline(expected));
        self.shared
            .begin_step(now, deadline.map_or(DEADLINE_MAX, |_| expected));
        let verdict = self.canary.run(
            part,
            now,
            deadline,
            &mut *self.executor,
            &mut lock(&self.draws.scratches[0]),
        );
        self.shared.end_step();
        self.canary.note_end(part, clock::now());
        self.note_verdict(&verdict);
        verdict?;
        self.note_token(clock::now());
        Ok(())
    }

    fn note_verdict(&self, verdict: &Result<Verdict, StepError>) {
        self.shared
            .is_canary_wrong
            .store(self.canary.is_wrong(), Ordering::Release);
        match verdict {
            Ok(Verdict::Right) => self.meter.canaries_right.increment(1),
            Ok(Verdict::Wrong { expected, found }) => {
                self.meter.canaries_wrong.increment(1);
                // The token may be the same still: all logits have to be.
                tracing::error!(model = %self.model, expected, found, "the canary's logits changed");
            }
            Err(e) => {
                self.meter.canaries_failed.increment(1);
                tracing::error!(model = %self.model, error = %e, "the canary step failed");
            }
        }
    }

    /// True when the canary joins the step that is planned.
    fn has_canary(&mut self, now: Instant) -> bool {
        let (plan, most) = (&mut self.plan, self.executor.limits());
        let n_spans = plan.spans.len();
        let has_room = n_spans < most.step_spans_max
            && plan.n_logits() < most.step_logits_max
            && plan.tokens.len() < most.step_tokens_max;
        has_room && self.canary.join(now, plan)
    }

    /// Empties the mailbox into the scheduler. At most as much comes as may wait.
    fn gather(&mut self) {
        for _ in 0..self.limits.waiting_max {
            match self.mailbox.try_recv() {
                Ok(arrival) => self.take(arrival),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.is_stopping = true;
                    return;
                }
            }
        }
    }

    fn sleep(&mut self, now: Instant) {
        let due_at = self.canary.due_at(self.last_token_at);
        let nap = due_at.map_or(IDLE_SLEEP_MAX, |due| due.saturating_duration_since(now));
        match self.mailbox.recv_timeout(nap) {
            Ok(arrival) => self.take(arrival),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.is_stopping = true,
        }
    }

    fn take(&mut self, arrival: Arrival) {
        let Arrival {
            request,
            constraint,
            submitted_at,
        } = arrival;
        let (n_prompt, n_emitted) = (request.prompt.len(), request.output.len());
        let spec = SequenceSpec {
            prompt: request.prompt,
            output: request.output,
            n_output_max: request.max_tokens,
            scored_from: request.scored_from,
            stop_tokens: request.stop_tokens,
            deadline: request.deadline,
            root: BlockKey::root(&request.cache_owner.0),
            account: request.account,
            siblings: request.siblings,
            arrived_at: submitted_at,
        };
        match self.scheduler.enqueue(spec) {
            Ok(slot) => {
                let client = Client {
                    id: request.id,
                    slot,
                    sampling: request.sampling,
                    constraint: constraint.map(Mutex::new),
                    top_logprobs: request.top_logprobs,
                    wants_tokens: 0 < request.max_tokens,
                    sink: request.sink,
                    submitted_at,
                    started_at: None,
                    first_token_at: None,
                    last_token_at: None,
                    n_prompt,
                    n_cached: 0,
                    n_given_before: n_emitted,
                    n_emitted,
                    is_queued: true,
                };
                let former = self.clients[slot.idx()].replace(client);
                assert!(former.is_none(), "a slot has one client");
            }
            Err(e) => {
                let id = request.id.0;
                tracing::warn!(model = %self.model, request = id, error = %e, "not queued");
                let reason = FinishReason::Failed(e.to_string());
                self.meter.count_end(End::Failed);
                self.shared.release_place();
                request.sink.send(StreamItem::Finished(reason));
            }
        }
    }

    fn drop_cancelled(&mut self) {
        for idx in 0..self.clients.len() {
            let Some(client) = self.clients[idx].take_if(|c| c.sink.is_cancelled()) else {
                continue;
            };
            self.scheduler.remove(client.slot);
            self.close(&client, End::Cancelled);
        }
    }

    fn end_rest(&mut self) {
        for idx in 0..self.clients.len() {
            let Some(client) = self.clients[idx].take() else {
                continue;
            };
            self.scheduler.remove(client.slot);
            self.finish(&client, FinishReason::Stopped);
        }
        assert!(self.scheduler.is_idle(), "every sequence has a client");
    }

    fn step(&mut self, now: Instant) {
        self.scheduler
            .plan(now, &self.cost, &mut self.plan, &mut self.ended);
        self.settle(None);
        self.note_admissions(now);
        if self.plan.spans.is_empty() {
            return;
        }
        let has_canary = self.has_canary(now);
        let shape = match has_canary {
            true => (self.scheduler.step_shape()).and(self.canary.shape(Part::FirstToken)),
            false => self.scheduler.step_shape(),
        };
        let expected = self.cost.seconds(shape);
        let expected = Duration::try_from_secs_f64(expected).unwrap_or(Duration::MAX);
        self.plan.deadline_ms = step_deadline(expected).as_millis() as u32;
        self.shared.begin_step(now, expected);
        let result = self.executor.execute(&self.plan);
        self.shared.end_step();
        let done_at = clock::now();
        match result {
            Ok(logits) => {
                let n_rows = self.plan.n_logits();
                let vocab_len = self.limits.vocab_len;
                assert_eq!(
                    logits.len(),
                    n_rows * vocab_len,
                    "the executor gives the rows asked for"
                );
                let n_own = n_rows - usize::from(has_canary);
                let (logits, of_canary) = logits.split_at_mut(n_own * vocab_len);
                let verdict = has_canary.then(|| {
                    let scratch = &mut lock(&self.draws.scratches[0]);
                    self.canary.judge(Part::FirstToken, Ok(of_canary), scratch)
                });
                let Draws {
                    workers,
                    scratches,
                    rows,
                    tokens: drawn,
                } = &mut self.draws;
                rows.clear();
                for scheduled in self.scheduler.scheduled() {
                    let scored = scheduled.scored.clone().map(Some);
                    let sampled = scheduled.is_sampled.then_some(None);
                    rows.extend(scored.chain(sampled).map(|row| (scheduled.slot, row)));
                }
                let (clients, scheduler) = (&self.clients, &self.scheduler);
                let sampleable_len = self.limits.sampleable_len;
                workers.for_each_row(logits, vocab_len, &|row, thread, logits| {
                    let (slot, scored) = rows[row];
                    let Some(client) = &clients[slot.idx()] else {
                        unreachable!("a running sequence has a client");
                    };
                    let scratch = &mut lock(&scratches[thread]);
                    let tokens = scheduler.tokens(slot);
                    *lock(&drawn[row]) = match scored {
                        Some(idx) => {
                            Some(client.score(scratch, logits, tokens.0[idx], sampleable_len))
                        }
                        None if !client.wants_tokens => None,
                        None => client.draw(scratch, logits, tokens, sampleable_len),
                    };
                });
                self.sampled.clear();
                let mut drawn = drawn.iter().map(|drawn| lock(drawn).take());
                for scheduled in self.scheduler.scheduled() {
                    let Some(client) = &mut self.clients[scheduled.slot.idx()] else {
                        unreachable!("a running sequence has a client");
                    };
                    let n_scored = scheduled.scored.len();
                    if 0 < n_scored {
                        let scores = drawn.by_ref().take(n_scored);
                        client.send_scores(scheduled.scored.start, scores.flatten());
                    }
                    if scheduled.is_sampled {
                        let token = drawn.next().flatten();
                        self.sampled.push(token.map(|token| client.send(token)));
                    }
                }
                let took = clock::now().saturating_duration_since(now);
                verdict
                    .iter()
                    .for_each(|verdict| self.note_verdict(verdict));
                self.note_step(shape, took);
                self.note_emissions(done_at);
                self.note_prompts();
                self.note_filled();
                self.scheduler
                    .apply(&self.sampled, took, &self.cost, &mut self.ended);
                self.note_keys();
                self.settle(None);
            }
            Err(e @ StepError::Missing(_)) => {
                self.meter.steps_failed.increment(1);
                // Whoever supervises the ranks goes on with these sequences on the next group.
                tracing::error!(model = %self.model, error = %e, "a step failed with its group");
                self.fatal = Some(e);
            }
            Err(e) => {
                self.meter.steps_failed.increment(1);
                let n_sequences = self.plan.spans.len();
                tracing::error!(model = %self.model, n_sequences, error = %e, "a step failed");
                self.scheduler.fail_step(&mut self.ended);
                self.settle(Some(&e));
                // Whether it was these sequences or everything shows at once.
                self.is_canary_due = true;
            }
        }
    }

    /// Tells the clients of ended sequences.
    fn settle(&mut self, step_error: Option<&StepError>) {
        while let Some(Ended { slot, reason }) = self.ended.pop() {
            let Some(client) = self.clients[slot.idx()].take() else {
                unreachable!("an ended sequence has a client");
            };
            let reason = match reason {
                EndReason::Stop => FinishReason::Stop,
                EndReason::Length => FinishReason::Length,
                EndReason::DeadlinePassed => FinishReason::DeadlinePassed,
                EndReason::NotSampled => {
                    FinishReason::Failed("no token could be chosen".to_owned())
                }
                EndReason::StepFailed => {
                    let cause = step_error.map_or_else(String::new, ToString::to_string);
                    FinishReason::Failed(cause)
                }
            };
            self.finish(&client, reason);
        }
    }

    fn finish(&mut self, client: &Client, reason: FinishReason) {
        let end = End::from(&reason);
        // Books first: whoever read the end finds the request gone from them.
        self.close(client, end);
        self.publish();
        client.sink.send(StreamItem::Finished(reason));
    }

    fn close(&self, client: &Client, end: End) {
        if client.is_queued {
            self.shared.release_place();
        }
        self.meter.count_end(end);
        self.note_sequence(client);
        let (request, n_tokens) = (client.id.0, client.n_emitted);
        tracing::debug!(model = %self.model, request, end = end.name(), n_tokens, "request ended");
    }

    /// Times and tokens of a sequence that is over, if it gave a token.
    fn note_sequence(&self, client: &Client) {
        let (Some(started), Some(first), Some(last)) = (
            client.started_at,
            client.first_token_at,
            client.last_token_at,
        ) else {
            return;
        };
        let meter = &self.meter;
        let decoding = last.saturating_duration_since(first);
        meter.decode_seconds.record(decoding);
        meter
            .inference_seconds
            .record(last.saturating_duration_since(started));
        let n_after_first = client.n_emitted - client.n_given_before - 1;
        if 0 < n_after_first {
            let mean = decoding.as_secs_f64() / n_after_first as f64;
            meter.time_per_output_token_seconds.record(mean);
        }
        let n_computed = client.n_prompt.saturating_sub(client.n_cached);
        meter.sequence_prompt_tokens.record(client.n_prompt as f64);
        meter.sequence_computed_tokens.record(n_computed as f64);
        meter.sequence_output_tokens.record(client.n_emitted as f64);
    }

    fn note_admissions(&mut self, now: Instant) {
        let mut n_cached_all = 0;
        for slot in self.scheduler.admitted() {
            let Some(client) = &mut self.clients[slot.idx()] else {
                continue;
            };
            client.is_queued = false;
            let n_cached = self.scheduler.n_cached(*slot);
            client.started_at = Some(now);
            client.n_cached = n_cached;
            client.sink.send(StreamItem::Started { n_cached, at: now });
            n_cached_all += n_cached as u64;
            self.shared.release_place();
            self.meter
                .queue_seconds
                .record(now.saturating_duration_since(client.submitted_at));
        }
        self.meter.cached_tokens.increment(n_cached_all);
    }

    fn note_step(&mut self, shape: StepShape, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        let expected = self.cost.seconds(shape);
        self.meter.step_prediction_ratio.record(seconds / expected);
        self.cost.observe(shape, seconds);
        self.shared.set_cost(&self.cost);
        let scheduled = self.scheduler.scheduled();
        let n_prompt: usize = scheduled.iter().map(|s| s.n_prompt_tokens).sum();
        let n_recomputed: usize = scheduled.iter().map(|s| s.n_recomputed).sum();
        self.meter.step_seconds.record(elapsed);
        self.meter.step_tokens.record(self.plan.tokens.len() as f64);
        self.meter.prompt_tokens.increment(n_prompt as u64);
        self.meter.recomputed_tokens.increment(n_recomputed as u64);
        self.shared.n_steps.fetch_add(1, Ordering::AcqRel);
        self.shared
            .n_prompt_tokens
            .fetch_add(n_prompt as u64, Ordering::AcqRel);
    }

    /// Notes whose blocks the step filled.
    fn note_filled(&mut self) {
        let block_len = self.limits.block_len;
        let fills =
            |s: &&Scheduled| (s.n_computed - s.n_tokens) / block_len < s.n_computed / block_len;
        let filled = self.scheduler.scheduled().iter().filter(fills);
        self.filled.clear();
        self.filled.extend(filled.map(|s| s.slot));
    }

    /// Tells the executor what the blocks hold that the step filled.
    fn note_keys(&mut self) {
        self.keys.clear();
        for slot in &self.filled {
            let labelled = self.scheduler.labelled(*slot);
            self.keys
                .extend(labelled.map(|(id, key)| (id, key.to_bytes())));
        }
        self.executor.note_keys(&self.keys);
    }

    /// Tells how far prompts are.
    fn note_prompts(&self) {
        for scheduled in self.scheduler.scheduled().iter().filter(|s| !s.is_sampled) {
            if let Some(client) = &self.clients[scheduled.slot.idx()] {
                let n_computed = scheduled.n_computed;
                client.sink.send(StreamItem::Prefilled { n_computed });
            }
        }
    }

    /// Times and counts of the tokens that the step gave its clients.
    fn note_emissions(&mut self, now: Instant) {
        let slots = self.scheduler.scheduled().iter().filter(|s| s.is_sampled);
        let mut n_tokens = 0;
        for (scheduled, _) in slots
            .zip(&self.sampled)
            .filter(|(_, token)| token.is_some())
        {
            let Some(client) = &mut self.clients[scheduled.slot.idx()] else {
                continue;
            };
            match client.last_token_at.replace(now) {
                Some(last) => self.meter.inter_token_seconds.record(now - last),
                None => {
                    let waited = now.saturating_duration_since(client.submitted_at);
                    self.meter.time_to_first_token_seconds.record(waited);
                    let started_at = client.started_at.unwrap_or(client.submitted_at);
                    let prefilling = now.saturating_duration_since(started_at);
                    self.meter.prefill_seconds.record(prefilling);
                    client.first_token_at = Some(now);
                }
            }
            n_tokens += 1;
        }
        if 0 < n_tokens {
            self.meter.tokens_generated.increment(n_tokens);
            self.shared
                .n_output_tokens
                .fetch_add(n_tokens, Ordering::AcqRel);
            self.note_token(now);
        }
    }

    fn note_token(&mut self, now: Instant) {
        self.last_token_at = Some(now);
        self.shared.note_token(now);
    }

    /// Writes the gauges and the load report.
    fn publish(&mut self) {
        let scheduler = &self.scheduler;
        let n_preemptions = scheduler.n_preemptions();
        self.shared
            .n_running
            .store(scheduler.n_running(), Ordering::Release);
        self.shared
            .n_preempted_waiting
            .store(scheduler.n_waiting_again(), Ordering::Release);
        self.shared
            .n_blocks_used
            .store(scheduler.n_blocks_used(), Ordering::Release);
        self.shared
            .n_preemptions
            .store(n_preemptions, Ordering::Release);
        let before = self.n_preemptions_counted;
        self.meter.preemptions.increment(n_preemptions - before);
        self.n_preemptions_counted = n_preemptions;
        self.meter
            .sequences_running
            .set(scheduler.n_running() as f64);
        self.meter
            .sequences_waiting
            .set(scheduler.n_waiting() as f64);
        self.meter
            .kv_blocks_used
            .set(scheduler.n_blocks_used() as f64);
    }
}

impl Client {
    /// Chooses the next token; `None` when the row holds no number, or no token may follow.
    fn draw(
        &self,
        scratch: &mut Scratch,
        logits: &mut [f32],
        (prompt, output): (&[u32], &[u32]),
        sampleable_len: usize,
    ) -> Option<Sampled> {
        assert_eq!(self.n_emitted, output.len(), "one event per output token");
        let mut constraint = self.constraint.as_ref().map(lock);
        let told = |e: &GrammarError| {
            tracing::warn!(request = self.id.0, error = %e, "a grammar ends an answer");
        };
        let allowed = match &mut constraint {
            Some(constraint) => Some(constraint.allowed().inspect_err(told).ok()?),
            None => None,
        };
        let ctx = SampleContext {
            params: &self.sampling,
            prompt,
            output,
            top_logprobs: self.top_logprobs,
            sampleable_len,
            allowed: allowed.as_ref().map(Allowed::words),
        };
        let sampled = sampler::sample(scratch, logits, &ctx).ok()?;
        if let Some(constraint) = &mut constraint {
            constraint.advance(sampled.token).inspect_err(told).ok()?;
        }
        Some(sampled)
    }

    /// What the row says of a token that the prompt has.
    fn score(
        &self,
        scratch: &mut Scratch,
        logits: &[f32],
        token: u32,
        sampleable_len: usize,
    ) -> Sampled {
        let n_top = self.top_logprobs.unwrap_or(0);
        let scored = sampler::score(scratch, logits, token, n_top, sampleable_len);
        Sampled {
            token,
            logprobs: Some(scored),
        }
    }

    /// Sends off what was found of tokens of the prompt, `first` and those behind it.
    fn send_scores(&self, first: usize, scores: impl Iterator<Item = Sampled>) {
        let scores = scores.filter_map(|scored| scored.logprobs).collect();
        self.sink.send(StreamItem::Scored { first, scores });
    }

    /// Sends a token off; its id.
    fn send(&mut self, sampled: Sampled) -> u32 {
        let event = TokenEvent {
            index: self.n_emitted,
            token: sampled.token,
            logprobs: sampled.logprobs,
        };
        // A reader that left is found before the next step.
        self.sink.send(StreamItem::Token(event));
        self.n_emitted += 1;
        sampled.token
    }
}
