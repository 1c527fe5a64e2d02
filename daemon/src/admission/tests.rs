//! Admission before a scheduler on a virtual clock: what is promised is kept.

use std::collections::BTreeMap;

use super::*;
use crate::{
    cost::StepShape,
    flow::{self, CacheOwner, RequestId, SamplingParams, Siblings},
    kv_cache::BlockKey,
    runner::StepPlan,
    scheduler::{Ended, Scheduler, SchedulerConfig, SequenceSpec, Slot},
};

const RUNNING_MAX: usize = 32;
const N_PROMPT: usize = 100;
const N_OUTPUT: usize = 32;

/// A number in `[0, 1)` that follows from both: SplitMix64's finalizer.
fn uniform(salt: u64, i: u64) -> f64 {
    let x = (salt << 40 ^ i).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

fn config() -> AdmissionConfig {
    AdmissionConfig {
        ttft_target: Some(Duration::from_secs(2)),
        waiting_max: 128,
        batch_waiting_max: 64,
        running_max: RUNNING_MAX,
        step_target: Duration::from_millis(50),
        n_blocks: 2000,
        block_len: 32,
    }
}

fn account(tenant: u64, weight: u32, class: Class) -> Account {
    Account {
        tenant,
        user: 0,
        weight,
        class,
    }
}

/// What a client asks for.
#[derive(Debug, Clone, Copy)]
struct Wish {
    account: Account,
    n_prompt: usize,
    n_output: usize,
    /// Makes its prompt differ from others'.
    name: u32,
    deadline: Option<Duration>,
}

fn wish(name: u32) -> Wish {
    Wish {
        account: Account::default(),
        n_prompt: N_PROMPT,
        n_output: N_OUTPUT,
        name,
        deadline: None,
    }
}

/// A request in the engine.
struct Live {
    sink: TokenSink,
    _stream: flow::TokenStream,
    submitted_at: Instant,
    name: u32,
    has_first: bool,
}

/// Admission and an engine whose steps take what its cost model says, times `slower`.
struct World {
    admission: Arc<Admission>,
    scheduler: Scheduler,
    cost: CostModel,
    slower: f64,
    start: Instant,
    now: Instant,
    live: BTreeMap<Slot, Live>,
    /// Seconds to the first token, of all requests in the order of their arrival.
    first_tokens: Vec<f64>,
    n_done: usize,
    done: Vec<u32>,
    serial: u64,
}

impl World {
    fn new() -> Self {
        let cfg = SchedulerConfig {
            blocks: 0..2000,
            block_len: 32,
            context_len_max: 8192,
            step_tokens_max: 512,
            step_logits_max: RUNNING_MAX,
            step_target: Duration::from_millis(50),
            running_max: RUNNING_MAX,
            waiting_max: config().engine_capacity(),
            prefix_cache: false,
            watermark_blocks: 0,
        };
        let start = clock::now();
        Self {
            admission: Arc::new(Admission::new("model", config())),
            scheduler: Scheduler::new(cfg),
            cost: CostModel::default(),
            slower: 1.0,
            start,
            now: start,
            live: BTreeMap::new(),
            first_tokens: Vec::new(),
            n_done: 0,
            done: Vec::new(),
            serial: 0,
        }
    }

    fn seconds(&self) -> f64 {
        (self.now - self.start).as_secs_f64()
    }

    fn ask(&mut self, wish: Wish) -> Result<(), Refusal> {
        self.ask_all(vec![wish])
    }

    fn ask_all(&mut self, wishes: Vec<Wish>) -> Result<(), Refusal> {
        let state = EngineState {
            cost: self.cost.clone(),
            n_blocks_used: self.scheduler.n_blocks_used(),
            forming: Duration::ZERO,
        };
        let n = wishes.len() as u32;
        let mut streams = Vec::new();
        let requests = wishes.iter().map(|wish| {
            let (sink, stream) = flow::token_stream(wish.n_output);
            streams.push(stream);
            self.serial += 1;
            Request {
                id: RequestId(self.serial),
                prompt: vec![wish.name; wish.n_prompt],
                output: Vec::new(),
                max_tokens: wish.n_output,
                stop_tokens: Arc::new([]),
                sampling: SamplingParams::default(),
                grammar: None,
                top_logprobs: None,
                scored_from: None,
                deadline: wish.deadline.map(|d| self.now + d),
                cache_owner: CacheOwner::default(),
                account: wish.account,
                siblings: Siblings { request: 1, n },
                sink,
            }
        });
        let requests = requests.collect();
        let taken = self.admission.admit_at(self.now, requests, &state)?;
        for ((request, stream), wish) in taken.into_iter().zip(streams).zip(wishes) {
            let slot = self.scheduler.enqueue(SequenceSpec {
                prompt: request.prompt,
                output: Vec::new(),
                n_output_max: request.max_tokens,
                scored_from: request.scored_from,
                stop_tokens: request.stop_tokens,
                deadline: request.deadline,
                root: BlockKey::root(b""),
                account: request.account,
                siblings: Siblings::default(),
                arrived_at: self.now,
            });
            let live = Live {
                sink: request.sink,
                _stream: stream,
                submitted_at: self.now,
                name: wish.name,
                has_first: false,
            };
            self.live.insert(slot.unwrap(), live);
        }
        Ok(())
    }

    /// Runs a step, or a millisecond of idleness.
    fn step(&mut self) {
        let mut plan = StepPlan::default();
        let mut ended: Vec<Ended> = Vec::new();
        self.scheduler
            .plan(self.now, &self.cost, &mut plan, &mut ended);
        assert!(ended.is_empty(), "nothing expires: {ended:?}");
        if plan.spans.is_empty() {
            self.now += Duration::from_millis(1);
            return;
        }
        for slot in self.scheduler.admitted().to_vec() {
            self.live[&slot].sink.send(StreamItem::Started {
                n_cached: 0,
                at: self.now,
            });
        }
        let seconds = self.slower * self.cost.seconds(self.scheduler.step_shape());
        let took = Duration::from_secs_f64(seconds);
        self.now += took;
        let mut n_sampled = 0;
        for scheduled in self.scheduler.scheduled().to_vec() {
            let live = self.live.get_mut(&scheduled.slot).unwrap();
            if !scheduled.is_sampled {
                let n_computed = scheduled.n_computed;
                live.sink.send(StreamItem::Prefilled { n_computed });
                continue;
            }
            n_sampled += 1;
            if !std::mem::replace(&mut live.has_first, true) {
                let waited = self.now - live.submitted_at;
                self.first_tokens.push(waited.as_secs_f64());
            }
            live.sink.send(StreamItem::Token(flow::TokenEvent {
                index: 0,
                token: 2,
                logprobs: None,
            }));
        }
        self.scheduler
            .apply(&vec![Some(2); n_sampled], took, &self.cost, &mut ended);
        for Ended { slot, .. } in ended {
            let live = self.live.remove(&slot).unwrap();
            live.sink.send(StreamItem::Finished(FinishReason::Length));
            self.n_done += 1;
            self.done.push(live.name);
        }
    }

    fn run_until(&mut self, seconds: f64) {
        while self.seconds() < seconds {
            self.step();
        }
    }
}

/// Requests a second that the engine does when it always has 24 of them.
fn peak() -> f64 {
    let mut world = World::new();
    world.admission = Arc::new(Admission::new(
        "model",
        AdmissionConfig {
            ttft_target: None,
            ..config()
        },
    ));
    let mut name = 0;
    while world.seconds() < 60.0 {
        while world.live.len() < 24 {
            name += 1;
            world.ask(wish(name)).unwrap();
        }
        world.step();
    }
    world.n_done as f64 / world.seconds()
}

fn percentile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * p) as usize]
}

/// Poisson arrivals at `factor` times the peak for a minute, of clients that do not come back.
fn check_overload(factor: f64, slower: f64, goodput_min: f64, ttft_max: f64) {
    let peak = peak() / slower;
    let mut world = World::new();
    world.slower = slower;
    let alone = {
        world.ask(wish(0)).unwrap();
        while world.first_tokens.is_empty() {
            world.step();
        }
        world.first_tokens[0]
    };
    world.run_until(5.0);
    let begun = world.seconds();
    let (mut at, mut i, n_before) = (begun, 0, world.n_done);
    let (mut n_refused, mut n_asked) = (0, 0);
    while at < begun + 60.0 {
        world.run_until(at);
        n_asked += 1;
        match world.ask(wish(1000 + i)) {
            Ok(()) => {}
            Err(Refusal::Busy { retry_after, .. }) => {
                assert!(Duration::from_secs(1) <= retry_after);
                n_refused += 1;
            }
            Err(e) => panic!("{e}"),
        }
        i += 1;
        at += -(1.0 - uniform(3, u64::from(i))).ln() / (factor * peak);
    }
    world.run_until(begun + 60.0);
    let goodput = (world.n_done - n_before) as f64 / 60.0 / peak;
    let p99 = percentile(&world.first_tokens, 0.99);
    let figures = format!(
        "{factor}x slower {slower}: {n_refused} of {n_asked} refused, goodput {goodput:.3}, \
         first token p50 {:.3} p99 {p99:.3}, alone {alone:.3}",
        percentile(&world.first_tokens, 0.5)
    );
    assert!(goodput_min <= goodput, "{figures}");
    assert!(p99 <= ttft_max * alone && p99 <= 2.0, "{figures}");
}

#[test]
fn overload_leaves_goodput_and_first_tokens_as_they_are() {
    check_overload(2.0, 1.0, 0.95, 5.0);

    check_overload(10.0, 1.0, 0.93, 5.0);
}

#[test]
fn an_engine_slower_than_predicted_keeps_its_word_too() {
    check_overload(3.0, 1.5, 0.93, 6.0);
}

#[test]
fn moderate_load_is_not_refused() {
    let peak = peak();
    let mut world = World::new();
    let (mut at, mut n_refused, mut n_asked) = (0.0, 0, 0);
    while at < 120.0 {
        world.run_until(at);
        n_asked += 1;
        n_refused += usize::from(world.ask(wish(n_asked)).is_err());
        at += -(1.0 - uniform(5, u64::from(n_asked))).ln() / (0.7 * peak);
    }
    assert!(
        n_refused * 100 <= n_asked as usize,
        "{n_refused} of {n_asked}"
    );
}

#[test]
fn thirty_clients_at_once_are_taken_by_an_idle_engine() {
    let mut world = World::new();
    for name in 0..30 {
        world.ask(wish(name)).unwrap();
    }
}

/// Programs with a fixed number of connections, each of which asks again at once: no overload, also on
/// a machine whose decodes take longer than the step's target.
#[test]
fn sixteen_connections_are_never_refused_and_keep_the_engine_busy() {
    for (base, per_row) in [(2e-3, 4e-4), (3e-3, 4e-3), (0.1, 1e-3)] {
        let mut parameters = vec![1.0, 4e-7, 1e-7, 1e-4, 0.0, 0.0];
        parameters.extend((0..21).map(|i| base + per_row * f64::from(1 << i)));
        let cost = CostModel::from_parameters(&parameters).unwrap();
        let done = |ttft_target| {
            let mut world = World::new();
            world.cost = cost.clone();
            world.admission = Arc::new(Admission::new(
                "model",
                AdmissionConfig {
                    ttft_target,
                    ..config()
                },
            ));
            let mut name = 0;
            while world.seconds() < 60.0 {
                while world.live.len() < 16 {
                    name += 1;
                    let asked = world.ask(wish(name));
                    assert_eq!(asked, Ok(()), "{base} {per_row} at {} s", world.seconds());
                }
                world.step();
            }
            world.n_done
        };
        // The target is large enough for sixteen prompts at once on each of these machines.
        let (with, without) = (done(Some(Duration::from_secs(200))), done(None));
        assert!(without <= with + 1, "{with} of {without}");
    }
}

/// Clients that obey come back at the moment they were told, and find a place.
#[test]
fn clients_that_obey_are_all_answered_after_few_tries() {
    let peak = peak();
    for factor in [2.0, 4.0] {
        let mut world = World::new();
        // Moments at which somebody comes: time, name, tries so far.
        let mut due: BTreeMap<(u64, u32), u32> = BTreeMap::new();
        let micros = |seconds: f64| (seconds * 1e6) as u64;
        let (mut at, mut n) = (0.0, 0);
        while at < 30.0 {
            due.insert((micros(at), n), 0);
            n += 1;
            at += -(1.0 - uniform(7, u64::from(n))).ln() / (factor * peak);
        }
        let mut tries = Vec::new();
        while let Some(((at, name), n_tries)) = due.pop_first() {
            world.run_until(at as f64 / 1e6);
            match world.ask(wish(name)) {
                Ok(()) => tries.push(f64::from(n_tries + 1)),
                Err(Refusal::Busy { retry_after, .. } | Refusal::QueueFull { retry_after, .. }) => {
                    let back = micros(world.seconds() + retry_after.as_secs_f64());
                    due.insert((back, name), n_tries + 1);
                }
                Err(e) => panic!("{e}"),
            }
            assert!(n_tries < 20, "a client came {n_tries} times");
        }
        while world.n_done < n as usize {
            world.step();
        }
        let ideal = f64::from(n) / peak;
        let figures = format!(
            "{factor}x: {} of {ideal:.1} s, tries p50 {} p95 {} max {}",
            world.seconds(),
            percentile(&tries, 0.5),
            percentile(&tries, 0.95),
            percentile(&tries, 1.0),
        );
        assert!(world.seconds() <= 1.25 * ideal, "{figures}");
        assert!(percentile(&tries, 0.95) <= 3.0, "{figures}");
    }
}

#[test]
fn a_light_account_is_taken_while_a_heavy_one_is_refused() {
    let mut world = World::new();
    let (heavy, light) = (
        account(1, 1, Class::Interactive),
        account(2, 1, Class::Interactive),
    );
    let (mut n_refused, mut name) = (0, 0);
    for _ in 0..200 {
        for _ in 0..10 {
            name += 1;
            let asked = world.ask(Wish {
                account: heavy,
                n_prompt: 1000,
                n_output: 256,
                ..wish(name)
            });
            n_refused += usize::from(asked.is_err());
        }
        name += 1;
        let asked = world.ask(Wish {
            account: light,
            n_output: 4,
            ..wish(name)
        });
        assert_eq!(asked, Ok(()), "the light one at {} s", world.seconds());
        for _ in 0..8 {
            world.step();
        }
    }
    assert!(1000 < n_refused, "{n_refused}");
}

#[test]
fn batch_requests_wait_in_a_bounded_line() {
    let mut world = World::new();
    let batch = |name| Wish {
        account: account(1, 1, Class::Batch),
        ..wish(name)
    };
    for name in 0..64 {
        assert_eq!(world.ask(batch(name)), Ok(()));
    }
    let refused = world.ask(batch(64));
    assert!(
        matches!(refused, Err(Refusal::QueueFull { max: 64, .. })),
        "{refused:?}"
    );
    // Interactive ones are not behind them.
    assert_eq!(world.ask(wish(100)), Ok(()));
    while world.first_tokens.is_empty() {
        world.step();
    }
    assert!(world.seconds() < 0.3, "{}", world.seconds());
}

#[test]
fn choices_are_taken_together_or_not_at_all() {
    let mut world = World::new();
    assert_eq!(world.ask_all((0..128).map(|_| wish(1)).collect()), Ok(()));
    assert_eq!(world.admission.n_in_flight(), 128);
    let more = world.ask_all((0..64).map(|_| wish(2)).collect());
    assert!(more.is_err());
    assert_eq!(world.admission.n_in_flight(), 128, "none of them");
}

#[test]
fn what_cannot_begin_before_its_deadline_is_refused_on_arrival() {
    let mut world = World::new();
    for name in 0..10 {
        world.ask(wish(name)).unwrap();
    }
    let hasty = |ms| Wish {
        deadline: Some(Duration::from_millis(ms)),
        ..wish(77)
    };
    assert!(matches!(world.ask(hasty(5)), Err(Refusal::TooLate { .. })));
    assert!(matches!(world.ask(hasty(0)), Err(Refusal::TooLate { .. })));
    assert_eq!(world.ask(hasty(60_000)), Ok(()));
}

#[test]
fn a_prompt_longer_than_the_target_is_taken_by_an_idle_engine() {
    let mut world = World::new();
    let long = |name| Wish {
        n_prompt: 7000,
        ..wish(name)
    };
    assert!(2.0 < world.cost.prefill_seconds(0, 7000, 100));
    assert_eq!(world.ask(long(1)), Ok(()));
    let refused = (2..9)
        .filter(|name| world.ask(long(*name)).is_err())
        .count();
    assert!(3 <= refused, "{refused}");
    // A short one is not behind them.
    assert_eq!(world.ask(wish(20)), Ok(()));
}

#[test]
fn readers_that_leave_are_out_of_the_books_at_once() {
    let mut world = World::new();
    for name in 0..100 {
        let _ = world.ask(wish(name));
    }
    assert!(10 < world.admission.n_in_flight());
    let slots: Vec<Slot> = world.live.keys().copied().collect();
    for slot in slots {
        world.live.remove(&slot);
        world.scheduler.remove(slot);
    }
    assert_eq!(world.admission.n_in_flight(), 0);
    assert_eq!(world.ask(wish(101)), Ok(()));
}

#[test]
fn predictions_of_an_idle_engine_are_what_it_does() {
    for n_prompt in [1, 30, 100, 400, 2000] {
        let mut world = World::new();
        let chunk = world.cost.rows_within(
            0.05,
            StepShape::default(),
            |n| StepShape::span(0, n, 1),
            512,
        );
        world
            .ask(Wish {
                n_prompt,
                ..wish(1)
            })
            .unwrap();
        while world.first_tokens.is_empty() {
            world.step();
        }
        let expected = world.cost.prefill_seconds(0, n_prompt, chunk);
        let seen = world.first_tokens[0];
        assert!(
            (seen / expected - 1.0).abs() < 0.15,
            "{n_prompt}: {seen} {expected}"
        );
    }
}
