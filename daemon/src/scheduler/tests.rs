//! Admission, planning and preemption, in tables and as properties.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use crate::{
    cost::{CostModel, StepShape},
    flow::{Account, Class, Siblings},
    kv_cache::BlockKey,
    runner::{LogitRows, StepPlan},
    runtime::clock,
    sampler::philox,
};

use super::*;

fn scheduler(change: impl FnOnce(&mut SchedulerConfig)) -> Scheduler {
    let mut cfg = SchedulerConfig {
        blocks: 0..100,
        block_len: 4,
        context_len_max: 200,
        step_tokens_max: 16,
        step_logits_max: 16,
        step_target: Duration::from_secs(3600),
        running_max: 4,
        waiting_max: 8,
        prefix_cache: false,
        watermark_blocks: 0,
    };
    change(&mut cfg);
    Scheduler::new(cfg)
}

fn spec(n_prompt: usize, n_output_max: usize) -> SequenceSpec {
    SequenceSpec {
        prompt: vec![1; n_prompt],
        output: Vec::new(),
        n_output_max,
        scored_from: None,
        stop_tokens: Arc::new([0]),
        deadline: None,
        root: BlockKey::root(b""),
        account: Account::default(),
        siblings: Siblings::default(),
        arrived_at: start(),
    }
}

/// One moment for all: nobody has waited longer than others.
fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(clock::now)
}

/// Applies a step that took a millisecond.
fn apply(scheduler: &mut Scheduler, sampled: &[Option<u32>], ended: &mut Vec<Ended>) {
    let took = Duration::from_millis(1);
    scheduler.apply(sampled, took, &CostModel::default(), ended);
}

/// Plans and applies a step in which every row gives token 2; returns (serial, first position,
/// tokens).
fn step(scheduler: &mut Scheduler, ended: &mut Vec<Ended>) -> Vec<(u64, usize, usize)> {
    let mut plan = StepPlan::default();
    scheduler.plan(start(), &CostModel::default(), &mut plan, ended);
    apply(scheduler, &vec![Some(2); plan.n_logits()], ended);
    plan.spans
        .iter()
        .map(|s| (s.seq, s.first_pos, s.tokens.len()))
        .collect()
}

#[test]
fn decodes_come_first_and_prefill_fills_the_rest_of_the_budget() {
    let mut scheduler = scheduler(|cfg| cfg.step_tokens_max = 10);
    let mut ended = Vec::new();
    scheduler.enqueue(spec(8, 5)).unwrap();
    scheduler.enqueue(spec(20, 5)).unwrap();
    scheduler.enqueue(spec(3, 5)).unwrap();
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 0, 8), (1, 0, 2)]);
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 8, 1), (1, 2, 9)]);
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 9, 1), (1, 11, 9)]);
    assert_eq!(
        step(&mut scheduler, &mut ended),
        [(0, 10, 1), (1, 20, 1), (2, 0, 3)]
    );
    assert_eq!(ended, []);
}

#[test]
fn the_youngest_is_preempted_keeps_its_tokens_and_comes_back_first() {
    let mut scheduler = scheduler(|cfg| cfg.blocks = 0..4);
    let mut ended = Vec::new();
    let first = scheduler.enqueue(spec(7, 6)).unwrap();
    let second = scheduler.enqueue(spec(7, 6)).unwrap();
    scheduler.enqueue(spec(1, 1)).unwrap();
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 0, 7), (1, 0, 7)]);
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 7, 1), (1, 7, 1)]);
    // Both need a third block, and there is none.
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 8, 1)]);
    assert_eq!(scheduler.n_preemptions(), 1);
    assert_eq!(scheduler.tokens(second), (&[1; 7][..], &[2; 2][..]));
    while ended.is_empty() {
        assert_eq!(
            step(&mut scheduler, &mut ended).len(),
            1,
            "its blocks are not free yet"
        );
    }
    let slot = first;
    assert_eq!(
        ended,
        [Ended {
            slot,
            reason: EndReason::Length
        }]
    );
    assert_eq!(step(&mut scheduler, &mut ended), [(2, 0, 1), (1, 0, 9)]);
}

#[test]
fn the_watermark_holds_back_all_but_the_first_sequence() {
    let mut scheduler = scheduler(|cfg| {
        cfg.blocks = 0..5;
        cfg.watermark_blocks = 3;
    });
    let mut ended = Vec::new();
    for _ in 0..2 {
        scheduler.enqueue(spec(12, 2)).unwrap();
    }
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 0, 12)]);
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 12, 1)]);
    assert_eq!(step(&mut scheduler, &mut ended), [(1, 0, 12)]);
}

#[test]
fn what_was_computed_before_is_taken_over_but_for_the_last_position() {
    let mut scheduler = scheduler(|cfg| cfg.prefix_cache = true);
    let mut ended = Vec::new();
    scheduler.enqueue(spec(9, 1)).unwrap();
    assert_eq!(step(&mut scheduler, &mut ended), [(0, 0, 9)]);
    assert_eq!((ended.len(), scheduler.n_blocks_used()), (1, 0));
    // Two full blocks are known; of a prompt that is just as long, its last position is not taken.
    let longer = scheduler.enqueue(spec(11, 1)).unwrap();
    let shorter = scheduler.enqueue(spec(8, 1)).unwrap();
    let other = scheduler.enqueue(SequenceSpec {
        root: BlockKey::root(b"x"),
        ..spec(9, 1)
    });
    let mut plan = StepPlan::default();
    scheduler.plan(start(), &CostModel::default(), &mut plan, &mut ended);
    let firsts = plan
        .spans
        .iter()
        .map(|s| (s.seq, s.first_pos))
        .collect::<Vec<_>>();
    assert_eq!(firsts, [(1, 8), (2, 4), (3, 0)]);
    let n_cached = [longer, shorter, other.unwrap()].map(|slot| scheduler.n_cached(slot));
    assert_eq!(n_cached, [8, 4, 0]);
    apply(&mut scheduler, &[Some(2); 3], &mut ended);
    assert_eq!(scheduler.n_blocks_used(), 0);
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let mut scheduler = scheduler(|cfg| {
        cfg.blocks = 0..5;
        cfg.waiting_max = 1;
    });
    let n_prompt = 20;
    let refused = scheduler.enqueue(spec(n_prompt, 1));
    assert_eq!(refused, Err(EnqueueError::TooLong { n_prompt, max: 19 }));
    assert_eq!(scheduler.enqueue(spec(0, 1)), Err(EnqueueError::Empty));
    assert_eq!(scheduler.enqueue(spec(1, 0)), Err(EnqueueError::Empty));
    assert!(scheduler.enqueue(spec(19, usize::MAX)).is_ok());
    assert_eq!(
        scheduler.enqueue(spec(1, 1)),
        Err(EnqueueError::QueueFull { max: 1 })
    );
    let mut ended = Vec::new();
    while ended.is_empty() {
        step(&mut scheduler, &mut ended);
    }
    assert_eq!(ended[0].reason, EndReason::Length);
}

#[test]
fn a_stop_token_a_missing_token_and_a_failed_step_end_sequences() {
    let check = |sampled: Option<u32>, expected: EndReason| {
        let mut scheduler = scheduler(|_| {});
        let slot = scheduler.enqueue(spec(3, 9)).unwrap();
        let (mut plan, mut ended) = (StepPlan::default(), Vec::new());
        scheduler.plan(start(), &CostModel::default(), &mut plan, &mut ended);
        match expected {
            EndReason::StepFailed => scheduler.fail_step(&mut ended),
            _ => apply(&mut scheduler, &[sampled], &mut ended),
        }
        let reason = expected;
        assert_eq!(ended, [Ended { slot, reason }]);
        assert!(scheduler.is_idle());
        assert_eq!(scheduler.n_blocks_used(), 0);
    };
    check(Some(0), EndReason::Stop);
    check(None, EndReason::NotSampled);
    check(Some(1), EndReason::StepFailed);
}

/// Random numbers of a simulation: a pure function of its seed and the draw's number.
struct Draws {
    seed: u64,
    n: u64,
}

impl Draws {
    fn below(&mut self, n: usize) -> usize {
        self.n += 1;
        (philox::uniform(self.seed, self.n) * n as f64) as usize
    }
}

/// What the simulation knows of a live sequence.
struct Model {
    slot: Slot,
    tokens: Vec<u32>,
    n_computed: usize,
    n_prompt: usize,
    /// First token of the prompt that has no score.
    next_scored: usize,
    n_output_max: usize,
    deadline: Option<Instant>,
}

/// Of every beginning of `tokens`.
fn digests(tokens: &[u32]) -> Vec<u64> {
    let mut digest = 0u64;
    let next = |token: &u32| {
        digest = (digest ^ u64::from(*token))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
        digest
    };
    tokens.iter().map(next).collect()
}

/// One engine's life on a virtual clock, against a model of every sequence.
struct Simulation {
    draws: Draws,
    cfg: SchedulerConfig,
    scheduler: Scheduler,
    now: Instant,
    live: BTreeMap<u64, Model>,
    /// Digest of all tokens up to the position last computed there, by block and offset.
    kv: BTreeMap<(u32, usize), u64>,
    n_enqueued: u64,
    n_ended: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut draws = Draws { seed, n: 0 };
        let running_max = 1 + draws.below(6);
        let first_block = draws.below(3) as u32;
        let cfg = SchedulerConfig {
            blocks: first_block..first_block + 1 + draws.below(20) as u32,
            block_len: 1 + draws.below(5),
            context_len_max: 2 + draws.below(60),
            step_tokens_max: running_max + draws.below(20),
            step_logits_max: running_max + draws.below(8),
            step_target: Duration::from_millis(draws.below(20) as u64),
            running_max,
            waiting_max: 1 + draws.below(10),
            prefix_cache: draws.below(2) == 1,
            watermark_blocks: draws.below(4),
        };
        Self {
            scheduler: Scheduler::new(cfg.clone()),
            cfg,
            draws,
            now: clock::now(),
            live: BTreeMap::new(),
            kv: BTreeMap::new(),
            n_enqueued: 0,
            n_ended: 0,
        }
    }

    fn arrive(&mut self) {
        let n_prompt = self.draws.below(self.cfg.context_len_max + 2);
        let n_output_max = self.draws.below(20);
        let scored_from = (self.draws.below(4) == 0).then(|| 1 + self.draws.below(4));
        let deadline = (self.draws.below(6) == 0)
            .then(|| self.now + Duration::from_millis(self.draws.below(40) as u64));
        let serial = self.n_enqueued;
        // Few beginnings, so that many sequences share one, and an end of its own.
        let beginning = 1000 * (1 + self.draws.below(3) as u32);
        let n_shared = self.draws.below(self.cfg.context_len_max);
        let prompt: Vec<u32> = (0..n_prompt)
            .map(|i| beginning + if i < n_shared { 0 } else { 1 + serial as u32 })
            .collect();
        let result = self.scheduler.enqueue(SequenceSpec {
            prompt: prompt.clone(),
            output: Vec::new(),
            n_output_max,
            scored_from,
            stop_tokens: Arc::new([7]),
            deadline,
            root: BlockKey::root(b""),
            account: Account {
                tenant: self.draws.below(3) as u64,
                user: self.draws.below(2) as u64,
                weight: 1 + self.draws.below(3) as u32,
                class: match self.draws.below(4) {
                    0 => Class::Batch,
                    _ => Class::Interactive,
                },
            },
            siblings: Siblings {
                request: self.draws.below(4) as u64,
                n: self.draws.below(3) as u32,
            },
            arrived_at: self.now,
        });
        match result {
            Ok(slot) => {
                let model = Model {
                    slot,
                    tokens: prompt,
                    n_computed: 0,
                    n_prompt,
                    next_scored: scored_from.map_or(n_prompt, |first| first.min(n_prompt)),
                    n_output_max,
                    deadline,
                };
                assert!(
                    self.live.values().all(|m| m.slot != slot),
                    "a slot is used once"
                );
                self.live.insert(serial, model);
                self.n_enqueued += 1;
            }
            Err(EnqueueError::Empty) => {
                assert!(n_prompt == 0 || (n_output_max == 0 && scored_from.is_none()));
            }
            Err(EnqueueError::TooLong { max, .. }) => assert!(max < n_prompt),
            Err(EnqueueError::QueueFull { max }) => assert!(max <= self.live.len()),
        }
    }

    fn cancel(&mut self) {
        let idx = self.draws.below(self.live.len().max(1));
        if let Some(serial) = self.live.keys().nth(idx).copied() {
            let model = self.live.remove(&serial).unwrap();
            self.scheduler.remove(model.slot);
            self.n_ended += 1;
        }
    }

    fn step(&mut self) {
        let (mut plan, mut ended) = (StepPlan::default(), Vec::new());
        self.now += Duration::from_millis(1);
        self.scheduler
            .plan(self.now, &CostModel::default(), &mut plan, &mut ended);
        let n_expired = self
            .live
            .values()
            .filter(|m| m.deadline.is_some_and(|d| d <= self.now));
        assert_eq!(
            ended.len(),
            n_expired.count(),
            "exactly the expired end before a step"
        );
        self.settle(&mut ended);
        self.check_plan(&plan);

        if self.draws.below(40) == 0 {
            let mut expected: Vec<Slot> =
                self.scheduler.scheduled().iter().map(|s| s.slot).collect();
            self.scheduler.fail_step(&mut ended);
            expected.sort_unstable();
            let mut failed: Vec<Slot> = ended.iter().map(|e| e.slot).collect();
            failed.sort_unstable();
            assert_eq!(
                failed, expected,
                "a failed step ends its own sequences only"
            );
        } else {
            self.apply(&plan, &mut ended);
        }
        self.settle(&mut ended);
    }

    fn check_plan(&mut self, plan: &StepPlan) {
        assert!(plan.tokens.len() <= self.cfg.step_tokens_max);
        assert!(plan.spans.len() <= self.cfg.running_max);
        assert!(plan.n_logits() <= self.cfg.step_logits_max);
        let mut written = BTreeSet::new();
        let mut read = BTreeSet::new();
        let mut serials = BTreeSet::new();
        for (span, scheduled) in plan.spans.iter().zip(self.scheduler.scheduled()) {
            assert!(serials.insert(span.seq), "a sequence has one span");
            let model = self
                .live
                .get_mut(&span.seq)
                .expect("only live sequences run");
            assert_eq!(scheduled.slot, model.slot);
            if span.first_pos != model.n_computed {
                // It begins, or begins again, behind what the cache had of it.
                let n_blocks_cached = span.first_pos / self.cfg.block_len;
                assert_eq!(
                    span.first_pos % self.cfg.block_len,
                    0,
                    "whole blocks are taken over"
                );
                assert!(self.cfg.prefix_cache || n_blocks_cached == 0);
                assert!(model.n_computed == 0 || 0 < self.scheduler.n_preemptions());
            }
            let end = span.first_pos + span.tokens.len();
            assert!(!span.tokens.is_empty());
            assert_eq!(
                plan.tokens[span.tokens.clone()],
                model.tokens[span.first_pos..end]
            );
            let is_last = end == model.tokens.len();
            let scored = &scheduled.scored;
            assert_eq!(span.logits == LogitRows::All, !scored.is_empty());
            assert_eq!(span.logits == LogitRows::Last, is_last && scored.is_empty());
            assert_eq!(scheduled.is_sampled, is_last);
            if !scored.is_empty() {
                assert_eq!(scored.start, model.next_scored, "each once, in order");
                assert_eq!(scored.start, span.first_pos + 1, "the row before it");
                assert_eq!(scored.end, model.n_prompt.min(end + 1));
                model.next_scored = scored.end;
            }
            assert!(end < model.next_scored || model.n_prompt == model.next_scored);
            let table = &plan.blocks[span.blocks.clone()];
            assert_eq!(
                table.len(),
                end.div_ceil(self.cfg.block_len),
                "no more than needed"
            );
            assert!(table.iter().all(|block| self.cfg.blocks.contains(block)));
            let (whole, own) = table.split_at(span.first_pos / self.cfg.block_len);
            read.extend(whole);
            for block in own {
                assert!(written.insert(*block), "no two sequences write a block");
            }
            model.n_computed = span.first_pos;
            let digests = digests(&model.tokens);
            let cell = |pos| (table[pos / self.cfg.block_len], pos % self.cfg.block_len);
            for (pos, digest) in digests[..span.first_pos].iter().enumerate() {
                let found = self.kv.get(&cell(pos));
                assert_eq!(found, Some(digest), "what was computed is still there");
            }
            self.kv
                .extend((span.first_pos..end).map(|pos| (cell(pos), digests[pos])));
        }
        assert!(written.is_disjoint(&read), "a shared block is only read");
        assert_eq!(
            plan.spans.is_empty(),
            self.live.is_empty(),
            "somebody progresses in every step"
        );
        let n_prompt_rows: usize = self
            .scheduler
            .scheduled()
            .iter()
            .filter(|s| 1 < s.n_tokens)
            .map(|s| s.n_tokens)
            .sum();
        let cost = CostModel::default();
        let predicted = cost.seconds(self.scheduler.step_shape());
        let scheduled = self.scheduler.scheduled().iter();
        let decodes = scheduled.filter(|s| s.n_tokens == 1).map(|s| s.shape);
        let decodes = decodes.fold(StepShape::default(), StepShape::and);
        let target = self.cfg.step_target.as_secs_f64();
        assert!(
            n_prompt_rows <= 2 * PREFILL_ROWS_MIN
                || predicted <= cost.step_seconds_max(target, decodes) * 1.001,
            "{n_prompt_rows} rows of prompts in a step of {predicted} s"
        );
        for slot in self.scheduler.admitted() {
            assert!(self.live.values().any(|m| m.slot == *slot));
        }
    }

    fn apply(&mut self, plan: &StepPlan, ended: &mut Vec<Ended>) {
        let mut sampled = Vec::new();
        let mut ended_expected = Vec::new();
        for span in &plan.spans {
            let model = self.live.get_mut(&span.seq).unwrap();
            model.n_computed += span.tokens.len();
            if model.n_computed < model.tokens.len() {
                continue;
            }
            if model.n_output_max == 0 {
                sampled.push(None);
                ended_expected.push((model.slot, EndReason::Length));
                continue;
            }
            let token = self.draws.below(50) as u32;
            model.tokens.push(token);
            sampled.push(Some(token));
            let n_max = model.n_prompt + model.n_output_max;
            if token == 7 {
                ended_expected.push((model.slot, EndReason::Stop));
            } else if model.tokens.len() == n_max.min(self.cfg.sequence_len_max()) {
                ended_expected.push((model.slot, EndReason::Length));
            }
        }
        apply(&mut self.scheduler, &sampled, ended);
        let ended: Vec<_> = ended.iter().map(|e| (e.slot, e.reason)).collect();
        assert_eq!(ended, ended_expected);
    }

    fn settle(&mut self, ended: &mut Vec<Ended>) {
        for Ended { slot, .. } in ended.drain(..) {
            let serial = self
                .live
                .iter()
                .find(|(_, m)| m.slot == slot)
                .map(|(&s, _)| s);
            self.live.remove(&serial.expect("a sequence ends once"));
            self.n_ended += 1;
        }
    }

    fn run(mut self) -> u64 {
        for _ in 0..150 {
            match self.draws.below(8) {
                0..3 => self.arrive(),
                3 => self.cancel(),
                _ => self.step(),
            }
        }
        // Somebody progresses in every step, and who is displaced has been ahead of its part: the
        // tokens left bound the steps left.
        let n_left: usize = self
            .live
            .values()
            .map(|m| m.tokens.len() + m.n_output_max)
            .sum();
        let mut n_steps = 0;
        while !self.scheduler.is_idle() {
            assert!(n_steps <= 20 * n_left, "it never ends");
            n_steps += 1;
            self.step();
        }
        self.step();
        assert!(self.live.is_empty(), "every sequence ended");
        assert_eq!(self.n_ended, self.n_enqueued, "exactly once");
        assert_eq!(self.scheduler.n_blocks_used(), 0, "all blocks are free");
        self.scheduler.n_preemptions()
    }
}

#[test]
fn random_lives_keep_every_promise() {
    let mut n_preemptions = 0;
    for seed in 0..1500 {
        // A failure is found again by its seed.
        let life = std::panic::catch_unwind(|| Simulation::new(seed).run());
        n_preemptions += life.unwrap_or_else(|_| panic!("the life of seed {seed} failed"));
    }
    assert!(
        1000 < n_preemptions,
        "the pools were tiny enough: {n_preemptions}"
    );
}

#[test]
fn the_same_calls_give_the_same_plans() {
    let now = clock::now();
    let run = || {
        let mut scheduler = scheduler(|cfg| cfg.blocks = 0..9);
        let (mut plans, mut ended) = (Vec::new(), Vec::new());
        for n in 1..6 {
            scheduler.enqueue(spec(3 * n, 9)).unwrap();
        }
        while !scheduler.is_idle() {
            let mut plan = StepPlan::default();
            scheduler.plan(now, &CostModel::default(), &mut plan, &mut ended);
            apply(&mut scheduler, &vec![Some(2); plan.n_logits()], &mut ended);
            plans.push(plan);
        }
        plans
    };
    assert_eq!(run(), run());
}

/// An engine on a virtual clock: steps take what the cost model says, every row gives token 2.
struct Engine {
    scheduler: Scheduler,
    cost: CostModel,
    now: Instant,
    ended: Vec<Ended>,
    /// Seconds of the last step.
    step_seconds: f64,
}

impl Engine {
    fn new(change: impl FnOnce(&mut SchedulerConfig)) -> Self {
        let mut cfg = SchedulerConfig {
            blocks: 0..1000,
            block_len: 32,
            context_len_max: 8192,
            step_tokens_max: 512,
            step_logits_max: 32,
            step_target: Duration::from_millis(50),
            running_max: 32,
            waiting_max: 1000,
            prefix_cache: false,
            watermark_blocks: 0,
        };
        change(&mut cfg);
        Self {
            scheduler: Scheduler::new(cfg),
            cost: CostModel::default(),
            now: start(),
            ended: Vec::new(),
            step_seconds: 0.0,
        }
    }

    fn ask(&mut self, tenant: u64, weight: u32, n_prompt: usize, n_output: usize) -> Slot {
        let spec = SequenceSpec {
            account: Account {
                tenant,
                weight,
                ..Account::default()
            },
            arrived_at: self.now,
            ..spec(n_prompt, n_output)
        };
        self.scheduler.enqueue(spec).unwrap()
    }

    /// Runs a step; the slots that got a token.
    fn step(&mut self) -> Vec<Slot> {
        let mut plan = StepPlan::default();
        self.scheduler
            .plan(self.now, &self.cost, &mut plan, &mut self.ended);
        self.step_seconds = self.cost.seconds(self.scheduler.step_shape());
        let took = Duration::from_secs_f64(self.step_seconds);
        self.now += took.max(Duration::from_micros(10));
        let sampled = self.scheduler.scheduled().iter().filter(|s| s.is_sampled);
        let slots = sampled.map(|s| s.slot).collect::<Vec<_>>();
        let tokens = vec![Some(2); slots.len()];
        self.scheduler
            .apply(&tokens, took, &self.cost, &mut self.ended);
        slots
    }

    /// Seconds until the slot gets its first token.
    fn first_token(&mut self, slot: Slot) -> f64 {
        let begun = self.now;
        while !self.step().contains(&slot) {}
        (self.now - begun).as_secs_f64()
    }
}

/// Tenants that always have 40 requests in flight get their weights' shares of the engine's time.
#[test]
fn greedy_tenants_share_the_engine_by_their_weights() {
    for (n_prompt, n_output, weights) in [
        (200, 40, [3, 1]),
        (1000, 20, [3, 1]),
        (50, 300, [3, 1]),
        (200, 40, [1, 1]),
        (100, 100, [7, 2]),
    ] {
        let mut engine = Engine::new(|_| {});
        let mut n_live = [0; 2];
        let mut owner = BTreeMap::new();
        let mut seconds = [0.0; 2];
        while engine.now < start() + Duration::from_secs(60) {
            for tenant in 0..2 {
                // The second one's are twice as long: shares are of work, not of requests.
                while n_live[tenant] < 40 {
                    let n_prompt = n_prompt * (1 + tenant);
                    let slot = engine.ask(tenant as u64 + 1, weights[tenant], n_prompt, n_output);
                    owner.insert(slot, tenant);
                    n_live[tenant] += 1;
                }
            }
            engine.step();
            let last = engine.scheduler.scheduled().to_vec();
            assert!(last.is_empty());
            for ended in std::mem::take(&mut engine.ended) {
                let tenant = owner[&ended.slot];
                n_live[tenant] -= 1;
                let cost = &engine.cost;
                let n = n_prompt * (1 + tenant);
                let prompt = cost.prefill_seconds(0, n, 64);
                let token = cost.share(StepShape::span(n + n_output / 2, 1, 1), 32);
                seconds[tenant] += prompt + token * n_output as f64;
            }
        }
        let ratio = seconds[0] / seconds[1];
        let expected = f64::from(weights[0]) / f64::from(weights[1]);
        let error = (ratio / expected - 1.0).abs();
        assert!(error < 0.12, "{n_prompt} {n_output} {weights:?}: {ratio}");
    }
}

/// One short request at a time beside a tenant that takes all it can get.
#[test]
fn a_light_tenant_is_answered_at_once_beside_heavy_ones() {
    for (n_heavy, n_prompt, n_output) in [(64, 1300, 256), (40, 50, 2000), (200, 100, 32)] {
        let mut engine = Engine::new(|cfg| cfg.blocks = 0..600);
        let alone = {
            let slot = engine.ask(2, 1, 100, 8);
            engine.first_token(slot)
        };
        let mut n_live = 0;
        let mut worst: f64 = 0.0;
        for round in 0..60 {
            while n_live < n_heavy {
                engine.ask(1, 1, n_prompt, n_output);
                n_live += 1;
            }
            for _ in 0..20 {
                engine.step();
                n_live -= std::mem::take(&mut engine.ended).len();
            }
            let slot = engine.ask(2, 1, 100, 8);
            let took = engine.first_token(slot);
            while !engine.ended.iter().any(|e| e.slot == slot) {
                engine.step();
            }
            n_live -= std::mem::take(&mut engine.ended).len() - 1;
            if 2 < round {
                worst = worst.max(took);
            }
        }
        assert!(
            worst < 4.0 * alone + 0.05,
            "{n_heavy} of {n_prompt} + {n_output}: {worst} s, alone {alone} s"
        );
    }
}

#[test]
fn a_short_prompt_passes_long_ones_of_its_own_tenant_and_they_do_not_starve() {
    let mut engine = Engine::new(|_| {});
    let long: Vec<Slot> = (0..8).map(|_| engine.ask(1, 1, 3900, 4)).collect();
    for _ in 0..6 {
        engine.step();
    }
    let short = engine.ask(1, 1, 60, 4);
    let took = engine.first_token(short);
    assert!(took < 0.25, "{took}");
    // Short ones keep coming, at most of what the engine does; the long ones end all the same.
    let mut left: BTreeSet<Slot> = long.into_iter().collect();
    let begun = engine.now;
    while !left.is_empty() {
        if engine.scheduler.n_waiting() < 40 {
            engine.ask(1, 1, 60, 2);
        }
        engine.step();
        for ended in std::mem::take(&mut engine.ended) {
            left.remove(&ended.slot);
        }
        assert!(engine.now < begun + Duration::from_secs(200), "starved");
    }
}

#[test]
fn steps_keep_to_their_target_whatever_arrives() {
    let mut engine = Engine::new(|_| {});
    let stream = engine.ask(1, 1, 20, 4000);
    engine.first_token(stream);
    for (n, n_prompt) in [(8, 1400), (8, 3800), (30, 100)] {
        for _ in 0..n {
            engine.ask(1, 1, n_prompt, 3);
        }
        for _ in 0..100 {
            let sampled = engine.step();
            assert!(
                sampled.contains(&stream),
                "a running stream gets a token in every step"
            );
            assert!(engine.step_seconds <= 0.0501, "{}", engine.step_seconds);
        }
    }
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    let mut engine = Engine::new(|cfg| cfg.prefix_cache = true);
    let mut n_computed = 0;
    for _ in 0..8 {
        let spec = SequenceSpec {
            siblings: Siblings { request: 5, n: 8 },
            ..spec(640, 3)
        };
        engine.scheduler.enqueue(spec).unwrap();
    }
    while !engine.scheduler.is_idle() {
        let mut plan = StepPlan::default();
        engine
            .scheduler
            .plan(engine.now, &engine.cost, &mut plan, &mut engine.ended);
        n_computed += plan.tokens.len();
        let tokens = vec![Some(2); plan.n_logits()];
        apply(&mut engine.scheduler, &tokens, &mut engine.ended);
    }
    // The whole prompt once, its last block by every other choice, two decodes each.
    assert_eq!(n_computed, 640 + 7 * 32 + 8 * 2);
}

/// Plans and applies a step; returns the tokens scored by sequence, and its rows of logits.
fn scored_step(scheduler: &mut Scheduler, ended: &mut Vec<Ended>) -> (Vec<(usize, usize)>, usize) {
    let mut plan = StepPlan::default();
    scheduler.plan(start(), &CostModel::default(), &mut plan, ended);
    let scheduled = scheduler.scheduled();
    let scored: Vec<_> = scheduled
        .iter()
        .map(|s| (s.scored.start, s.scored.end))
        .collect();
    let sampled: Vec<_> = scheduled.iter().filter(|s| s.is_sampled).collect();
    let n_scored: usize = scored.iter().map(|(first, end)| end - first).sum();
    let n_rows = n_scored + sampled.len();
    assert_eq!(
        n_rows,
        plan.n_logits(),
        "a row for each token scored or sampled"
    );
    let sampled = vec![Some(2); sampled.len()];
    apply(scheduler, &sampled, ended);
    (scored, n_rows)
}

#[test]
fn every_token_behind_the_first_is_scored_once_within_the_rows_of_logits() {
    let mut scheduler = scheduler(|cfg| {
        cfg.step_logits_max = 6;
        cfg.prefix_cache = true;
    });
    let mut ended = Vec::new();
    // What the cache holds of it must not be taken over.
    scheduler.enqueue(spec(20, 1)).unwrap();
    while ended.is_empty() {
        step(&mut scheduler, &mut ended);
    }
    ended.clear();
    scheduler.enqueue(spec(5, 30)).unwrap();
    assert_eq!(scored_step(&mut scheduler, &mut ended), (vec![(0, 0)], 1));
    let scored = SequenceSpec {
        scored_from: Some(1),
        ..spec(20, 3)
    };
    let slot = scheduler.enqueue(scored).unwrap();
    let mut all = Vec::new();
    while all.len() < 19 {
        let (scored, n_rows) = scored_step(&mut scheduler, &mut ended);
        assert!(n_rows <= 6, "{n_rows} rows of logits");
        all.extend(scored.into_iter().flat_map(|(first, end)| first..end));
    }
    assert_eq!(all, (1..20).collect::<Vec<_>>());
    assert_eq!(scheduler.n_cached(slot), 0);
    assert_eq!(
        scheduler.tokens(slot).1,
        [2],
        "its next token comes with the last score"
    );
}

#[test]
fn what_was_scored_before_is_taken_over_and_a_prompt_without_output_ends_by_itself() {
    let mut scheduler = scheduler(|cfg| cfg.prefix_cache = true);
    let mut ended = Vec::new();
    scheduler.enqueue(spec(14, 1)).unwrap();
    while ended.is_empty() {
        step(&mut scheduler, &mut ended);
    }
    ended.clear();
    let scored = |from| SequenceSpec {
        scored_from: Some(from),
        ..spec(14, 0)
    };
    let slot = scheduler.enqueue(scored(10)).unwrap();
    let mut plan = StepPlan::default();
    // Blocks of 4: positions 0 to 7 are taken over, 8 has to be computed again without a row.
    scheduler.plan(start(), &CostModel::default(), &mut plan, &mut ended);
    assert_eq!(scheduler.n_cached(slot), 8);
    assert_eq!(scheduler.scheduled()[0].scored, 0..0);
    apply(&mut scheduler, &[], &mut ended);
    scheduler.plan(start(), &CostModel::default(), &mut plan, &mut ended);
    assert_eq!(scheduler.scheduled()[0].scored, 10..14);
    apply(&mut scheduler, &[None], &mut ended);
    let reason = EndReason::Length;
    assert_eq!(ended, [Ended { slot, reason }]);
    assert!(
        scheduler.enqueue(scored(14)).is_ok(),
        "only the end is missing"
    );
    assert_eq!(scheduler.enqueue(spec(14, 0)), Err(EnqueueError::Empty));
}
