//! The engine through its handle: batching, cancel, preemption and drain over a fake model.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics_exporter_prometheus::PrometheusBuilder;
use proptest::prelude::*;

use crate::{
    cost::CostModel,
    engine::{
        ExecutorLimits, StepError, StepPlan,
        fake::{FakeControl, FakeExecutor, PATIENCE, mix, reference},
    },
    flow::{Account, CacheOwner, RequestId, SamplingParams, Siblings, TokenStream, token_stream},
    runtime::{clock, thread},
};

use super::*;

const ROOMY: ExecutorLimits = ExecutorLimits {
    vocab_len: 50,
    block_len: 4,
    n_blocks: 400,
    step_tokens_max: 64,
    step_spans_max: 16,
    step_logits_max: 16,
    context_len_max: 64,
};

/// A replica over a fake executor whose canary stays out of the way.
fn replica(
    limits: ExecutorLimits,
    change: impl FnOnce(&mut EngineConfig),
) -> (Replica, Arc<FakeControl>) {
    let (fake, control) = FakeExecutor::new(limits);
    let mut cfg = EngineConfig::for_executor("fake", &limits);
    cfg.canary_interval = Duration::from_secs(3600);
    // One step at the start, without a part that runs by itself.
    cfg.canary_prompt.truncate(1);
    // Nothing is measured before the first request.
    cfg.cost = Some(CostModel::default());
    change(&mut cfg);
    (Replica::start(fake, cfg).unwrap(), control)
}

fn request(id: u64, n_prompt: usize, max_tokens: usize) -> (Request, TokenStream) {
    let (sink, stream) = token_stream(max_tokens);
    let request = Request {
        id: RequestId(id),
        prompt: (0..n_prompt as u64)
            .map(|i| (mix(id << 32 ^ i) % 50) as u32)
            .collect(),
        output: Vec::new(),
        max_tokens,
        stop_tokens: Arc::new([]),
        sampling: SamplingParams::default(),
        grammar: None,
        top_logprobs: None,
        scored_from: None,
        deadline: None,
        cache_owner: CacheOwner::default(),
        account: Account::default(),
        siblings: Siblings::default(),
        sink,
    };
    (request, stream)
}

/// A request whose every property follows from `id`.
fn mixed_request(id: u64) -> (Request, TokenStream) {
    let r = |salt: u64, n: u64| mix(id ^ salt << 48) % n;
    let (mut request, stream) = request(id, 1 + r(1, 30) as usize, 1 + r(2, 30) as usize);
    request.stop_tokens = Arc::new([r(3, 50) as u32]);
    request.sampling = match r(4, 4) {
        0 => SamplingParams::default(),
        1 => SamplingParams {
            temperature: 1.0,
            seed: id,
            ..SamplingParams::default()
        },
        2 => SamplingParams {
            temperature: 0.7,
            top_k: 10,
            top_p: 0.9,
            min_p: 0.02,
            repetition_penalty: 1.2,
            seed: id,
            ..SamplingParams::default()
        },
        _ => SamplingParams {
            frequency_penalty: 0.5,
            presence_penalty: 0.3,
            logit_bias: vec![(r(5, 50) as u32, 2.0)],
            ..SamplingParams::default()
        },
    };
    (request, stream)
}

/// All tokens and the end; checks that they are numbered and that nothing follows.
fn read_all(mut stream: TokenStream) -> (Vec<u32>, FinishReason) {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_next() {
            Some(StreamItem::Started { .. }) => assert!(tokens.is_empty(), "first of all"),
            Some(StreamItem::Token(event)) => {
                assert_eq!(event.index, tokens.len());
                tokens.push(event.token);
            }
            Some(StreamItem::Finished(reason)) => {
                assert_eq!(stream.blocking_next(), None, "nothing follows the end");
                return (tokens, reason);
            }
            Some(item @ (StreamItem::Prefilled { .. } | StreamItem::Scored { .. })) => {
                panic!("{item:?} was not asked for")
            }
            None => panic!("the stream ended without an end after {tokens:?}"),
        }
    }
}

/// Waits until a request runs; returns the positions it found in the cache.
fn started(stream: &mut TokenStream) -> usize {
    match stream.blocking_next() {
        Some(StreamItem::Started { n_cached, .. }) => n_cached,
        other => panic!("{other:?} before the start"),
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = clock::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what} never happened");
        std::thread::yield_now();
    }
}

fn wait_until_empty(replica: &Replica) {
    wait_until("an empty engine", || {
        let load = replica.load();
        load.n_running == 0 && load.n_waiting == 0 && load.n_blocks_used == 0
    });
}

fn check_outputs_equal_reference(
    limits: ExecutorLimits,
    change: impl FnOnce(&mut EngineConfig),
) -> LoadReport {
    let (replica, control) = replica(limits, |cfg| {
        cfg.waiting_max = 64;
        change(cfg);
    });
    control.permit(0);
    let mut expected = Vec::new();
    let mut streams = Vec::new();
    for id in 0..60 {
        let (request, stream) = mixed_request(id);
        expected.push(reference(&request, &limits));
        streams.push(stream);
        replica.submit(request).unwrap();
    }
    control.open();
    for (id, (stream, expected)) in streams.into_iter().zip(expected).enumerate() {
        assert_eq!(read_all(stream), expected, "request {id}");
    }
    wait_until_empty(&replica);
    replica.load()
}

#[test]
fn outputs_are_the_same_alone_and_batched() {
    check_outputs_equal_reference(ROOMY, |cfg| cfg.running_max = 1);
    let load = check_outputs_equal_reference(ROOMY, |_| {});
    assert_eq!(load.n_preemptions, 0);
}

#[test]
fn a_prompt_asked_again_is_found_in_the_cache_by_its_owner_and_gives_the_same_tokens() {
    for (prefix_cache, n_cached_expected) in [(true, 24), (false, 0)] {
        let (replica, _) = replica(ROOMY, |cfg| cfg.prefix_cache = prefix_cache);
        assert_eq!(
            replica.limits().block_len,
            4,
            "the numbers below count in blocks of 4"
        );
        let ask = |owner: u8| {
            let (mut request, mut stream) = request(3, 27, 9);
            request.cache_owner = CacheOwner([owner; 32]);
            let expected = reference(&request, &ROOMY);
            replica.submit(request).unwrap();
            let n_cached = started(&mut stream);
            assert_eq!(read_all(stream), expected);
            n_cached
        };
        assert_eq!(ask(1), 0);
        assert_eq!(ask(1), n_cached_expected);
        assert_eq!(ask(2), 0, "another owner finds nothing");
        assert_eq!(ask(1), n_cached_expected);
    }
}

#[test]
fn outputs_are_the_same_when_beginnings_are_shared_and_forgotten() {
    for n_blocks in [12, 20, 200] {
        let limits = ExecutorLimits {
            n_blocks,
            context_len_max: 40,
            ..ROOMY
        };
        let (replica, control) = replica(limits, |cfg| {
            cfg.waiting_max = 300;
            cfg.watermark_blocks = 0;
        });
        control.permit(0);
        let mut kept = Vec::new();
        for id in 0..300 {
            let (mut request, stream) = request(id, 1, 1 + (mix(id) % 12) as usize);
            // One of three beginnings, cut anywhere, and an end of its own.
            let n_shared = mix(id ^ 77) % 24;
            request.prompt = (0..n_shared)
                .map(|i| (mix(id % 3 * 100 + i) % 50) as u32)
                .collect();
            request.prompt.push((id % 50) as u32);
            kept.push((stream, reference(&request, &limits)));
            replica.submit(request).unwrap();
        }
        control.open();
        for (stream, expected) in kept {
            assert_eq!(read_all(stream), expected);
        }
        wait_until_empty(&replica);
    }
}

#[test]
fn outputs_are_the_same_when_prefill_is_chunked() {
    for step_tokens_max in [1, 3, 7] {
        check_outputs_equal_reference(ROOMY, |cfg| {
            cfg.step_tokens_max = step_tokens_max;
            cfg.running_max = step_tokens_max;
            cfg.canary_prompt = vec![5];
        });
    }
}

#[test]
fn outputs_are_the_same_when_sequences_are_preempted() {
    for (block_len, n_blocks) in [(4, 18), (1, 67), (7, 15), (16, 6)] {
        let tiny = ExecutorLimits {
            block_len,
            n_blocks,
            ..ROOMY
        };
        let load = check_outputs_equal_reference(tiny, |cfg| cfg.watermark_blocks = 0);
        assert!(
            0 < load.n_preemptions,
            "{n_blocks} blocks of {block_len} were enough"
        );
    }
}

#[test]
fn outputs_are_the_same_with_a_canary_after_every_step() {
    let tiny = ExecutorLimits {
        n_blocks: 18,
        ..ROOMY
    };
    check_outputs_equal_reference(tiny, |cfg| cfg.canary_interval = Duration::ZERO);
}

#[test]
fn a_sequence_ends_where_the_pool_ends() {
    let limits = ExecutorLimits {
        n_blocks: 6,
        ..ROOMY
    };
    let (replica, _) = replica(limits, |_| {});
    // One of six blocks is the canary's.
    assert_eq!(replica.limits().context_len_max, 20);
    let (request, stream) = request(1, 15, 1000);
    replica.submit(request).unwrap();
    let (tokens, reason) = read_all(stream);
    assert_eq!((tokens.len(), reason), (5, FinishReason::Length));
}

#[test]
fn a_thousand_requests_with_random_departures_leave_nothing_behind() {
    let limits = ExecutorLimits {
        n_blocks: 40,
        ..ROOMY
    };
    let (replica, _) = replica(limits, |cfg| cfg.waiting_max = 32);
    let mut kept: Vec<(TokenStream, (Vec<u32>, FinishReason))> = Vec::new();
    for id in 0..1000 {
        let (first, mut stream) = mixed_request(id);
        let expected = reference(&first, &limits);
        let mut pending = Some((first, None));
        while let Some((request, retry)) = pending.take() {
            match replica.submit(request) {
                Ok(()) => stream = retry.unwrap_or(stream),
                Err(SubmitError::Refused(Refusal::QueueFull { retry_after, .. })) => {
                    assert!(Duration::from_secs(1) <= retry_after);
                    if let Some((oldest, expected)) = kept.pop() {
                        assert_eq!(read_all(oldest), expected);
                    }
                    std::thread::yield_now();
                    let (again, stream) = mixed_request(id);
                    pending = Some((again, Some(stream)));
                }
                Err(e) => panic!("{e}"),
            }
        }
        match mix(id) % 4 {
            0 => drop(stream),
            1 => {
                // Leaves after a token, if there is more than one.
                started(&mut stream);
                let first = stream.blocking_next();
                assert!(matches!(first, Some(StreamItem::Token(_))), "{first:?}");
            }
            _ => kept.push((stream, expected)),
        }
    }
    for (stream, expected) in kept {
        assert_eq!(read_all(stream), expected);
    }
    wait_until_empty(&replica);
    replica.stop(Duration::ZERO);
}

#[test]
fn cancelled_request_frees_its_blocks_within_one_step() {
    let (replica, control) = replica(ROOMY, |_| {});
    control.permit(0);
    let (request, stream) = request(1, 10, 30);
    replica.submit(request).unwrap();
    control.permit(1);
    // The canary, the prefill, and a decode that is held up.
    control.wait_begun(3);
    assert_eq!(replica.load().n_blocks_used, 3);
    drop(stream);
    control.open();
    wait_until_empty(&replica);
    assert_eq!(control.n_begun(), 3, "no step after the reader left");
}

#[test]
fn a_waiting_request_whose_reader_left_is_never_computed() {
    let (replica, control) = replica(ROOMY, |_| {});
    control.permit(0);
    let (first, first_stream) = request(1, 10, 3);
    let (second, second_stream) = request(2, 10, 3);
    let (third, third_stream) = request(3, 10, 3);
    replica.submit(first).unwrap();
    control.wait_begun(2);
    replica.submit(second).unwrap();
    replica.submit(third).unwrap();
    drop(second_stream);
    control.open();
    read_all(first_stream);
    read_all(third_stream);
    wait_until_empty(&replica);
    assert!(!control.has_computed(1));
    assert!(control.has_computed(0) && control.has_computed(2));
}

#[test]
fn exactly_waiting_max_requests_wait_and_the_next_is_refused() {
    let (replica, control) = replica(ROOMY, |cfg| {
        cfg.running_max = 2;
        cfg.waiting_max = 3;
    });
    control.permit(0);
    let submit = |id| {
        let (request, stream) = request(id, 4, 20);
        replica.submit(request).map(|()| stream)
    };
    let mut streams = vec![submit(0).unwrap(), submit(1).unwrap()];
    control.permit(2);
    control.wait_begun(4);
    assert_eq!((replica.load().n_running, replica.load().n_waiting), (2, 0));
    for id in 2..5 {
        streams.push(submit(id).unwrap());
    }
    assert_eq!(replica.load().n_waiting, 3);
    for id in 5..8 {
        let refused = submit(id).map(drop);
        let Err(SubmitError::Refused(Refusal::QueueFull {
            waiting: 3,
            max: 3,
            retry_after,
        })) = refused
        else {
            panic!("{refused:?}");
        };
        assert!(Duration::from_secs(1) <= retry_after);
    }
    control.open();
    for stream in streams {
        assert_eq!(read_all(stream).1, FinishReason::Length);
    }
    // The refused left no trace in the count.
    wait_until_empty(&replica);
    submit(9).unwrap();
}

#[test]
fn a_passed_deadline_ends_a_waiting_and_a_running_request() {
    let (replica, control) = replica(ROOMY, |cfg| cfg.running_max = 1);
    control.permit(0);
    let deadline = clock::now() + Duration::from_millis(50);
    let (mut running, running_stream) = request(1, 4, 20);
    running.deadline = Some(deadline);
    replica.submit(running).unwrap();
    control.permit(1);
    control.wait_begun(3);
    let (mut waiting, waiting_stream) = request(2, 4, 20);
    waiting.deadline = Some(deadline);
    replica.submit(waiting).unwrap();
    wait_until("the deadline", || deadline <= clock::now());
    control.open();
    let (tokens, reason) = read_all(running_stream);
    assert_eq!((tokens.len(), reason), (2, FinishReason::DeadlinePassed));
    assert_eq!(
        read_all(waiting_stream),
        (vec![], FinishReason::DeadlinePassed)
    );
    assert!(!control.has_computed(1));
    wait_until_empty(&replica);
}

#[test]
fn a_failed_step_ends_its_sequences_and_the_engine_goes_on() {
    let (replica, control) = replica(ROOMY, |cfg| cfg.running_max = 2);
    control.permit(0);
    let (first, first_stream) = request(1, 4, 5);
    let (second, second_stream) = request(2, 4, 5);
    let (third, third_stream) = request(3, 4, 5);
    let expected = reference(&third, &ROOMY);
    for request in [first, second, third] {
        replica.submit(request).unwrap();
    }
    control.permit(2);
    control.wait_begun(4);
    control.fail(1);
    control.open();
    for stream in [first_stream, second_stream] {
        let (_, reason) = read_all(stream);
        assert_eq!(
            reason,
            FinishReason::Failed("logits row 0 is not finite".to_owned())
        );
    }
    assert_eq!(read_all(third_stream), expected);
    wait_until_empty(&replica);
}

#[test]
fn a_stop_with_time_lets_all_requests_finish() {
    let (replica, control) = replica(ROOMY, |_| {});
    control.permit(0);
    let streams: Vec<TokenStream> = (0..30)
        .map(|id| {
            let (request, stream) = mixed_request(id);
            replica.submit(request).unwrap();
            stream
        })
        .collect();
    control.open();
    replica.stop(PATIENCE);
    assert_eq!(
        replica.submit(request(99, 1, 1).0),
        Err(SubmitError::Stopping)
    );
    for (id, stream) in (0..).zip(streams) {
        assert_eq!(read_all(stream), reference(&mixed_request(id).0, &ROOMY));
    }
}

#[test]
fn a_stop_without_time_ends_waiting_and_running_requests_as_stopped() {
    let (replica, control) = replica(ROOMY, |cfg| cfg.running_max = 1);
    control.permit(0);
    let (running, running_stream) = request(1, 4, 30);
    let (waiting, waiting_stream) = request(2, 4, 30);
    replica.submit(running).unwrap();
    replica.submit(waiting).unwrap();
    control.permit(1);
    control.wait_begun(3);
    let stopper = replica.clone();
    let stopping = thread::spawn("stopper", move || stopper.stop(Duration::ZERO)).unwrap();
    wait_until("the stop", || {
        replica.submit(request(3, 1, 1).0) == Err(SubmitError::Stopping)
    });
    control.open();
    stopping.join().unwrap();
    assert_eq!(read_all(running_stream).1, FinishReason::Stopped);
    assert_eq!(read_all(waiting_stream), (vec![], FinishReason::Stopped));
    let load = replica.load();
    assert_eq!(
        (load.n_running, load.n_waiting, load.n_blocks_used),
        (0, 0, 0)
    );
}

#[test]
fn dropping_the_last_replica_lets_taken_requests_finish() {
    let (replica, _) = replica(ROOMY, |_| {});
    let (request, stream) = mixed_request(5);
    let expected = reference(&request, &ROOMY);
    replica.submit(request).unwrap();
    drop(replica);
    assert_eq!(read_all(stream), expected);
}

#[test]
fn a_drop_does_not_wait_longer_than_the_drain_limit() {
    let long = ExecutorLimits {
        n_blocks: 600,
        context_len_max: 2000,
        ..ROOMY
    };
    let (replica, control) = replica(long, |cfg| cfg.drain_limit = Duration::ZERO);
    control.permit(0);
    let (request, stream) = request(1, 4, 1990);
    replica.submit(request).unwrap();
    control.wait_begun(2);
    let dropping = thread::spawn("dropper", move || drop(replica)).unwrap();
    // A step per turn until the drop has shown: far fewer than the request has tokens.
    while !dropping.is_finished() {
        control.permit(1);
        std::thread::park_timeout(Duration::from_millis(2));
    }
    dropping.join().unwrap();
    assert_eq!(read_all(stream).1, FinishReason::Stopped);
}

#[test]
fn metrics_tell_what_was_done() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let prometheus = recorder.handle();
    let tiny = ExecutorLimits {
        n_blocks: 18,
        ..ROOMY
    };
    let start = || {
        replica(tiny, |cfg| {
            cfg.canary_interval = Duration::from_millis(5);
        })
    };
    let (replica, control) = metrics::with_local_recorder(&recorder, start);
    let run = |ids: std::ops::Range<u64>| {
        let submit = |id| {
            let (request, stream) = request(id, 20, 10);
            replica.submit(request).unwrap();
            stream
        };
        ids.map(submit)
            .collect::<Vec<_>>()
            .into_iter()
            .map(read_all)
            .collect::<Vec<_>>()
    };
    run(0..12);
    wait_until_empty(&replica);
    let canaries = control.n_begun();
    control.wait_begun(canaries + 2);
    control.set_twist(1);
    wait_until("a wrong canary", || replica.load().canary_wrong);
    control.fail(1);
    control.wait_begun(control.n_begun() + 2);
    replica.stop(Duration::ZERO);

    let text = prometheus.render();
    let value = |name: &str, labels: &str| {
        let line = format!("{name}{{model=\"fake\"{labels}}} ");
        let found = text.lines().find_map(|l| l.strip_prefix(&line));
        let found = found.unwrap_or_else(|| panic!("no {line} in {text}"));
        found.parse::<f64>().unwrap()
    };
    let load = replica.load();
    assert_eq!(value("dsd_prompt_tokens_total", ""), 240.0);
    assert_eq!(value("dsd_tokens_generated_total", ""), 120.0);
    assert_eq!(
        value("dsd_requests_finished_total", ",reason=\"length\""),
        12.0
    );
    assert_eq!(
        value("dsd_requests_finished_total", ",reason=\"cancelled\""),
        0.0
    );
    assert_eq!(
        value("dsd_preemptions_total", ""),
        load.n_preemptions as f64
    );
    assert!(0.0 < value("dsd_recomputed_tokens_total", ""));
    assert_eq!(
        value("dsd_engine_step_seconds_count", ""),
        load.n_steps as f64
    );
    assert_eq!(
        value("dsd_engine_step_tokens_count", ""),
        load.n_steps as f64
    );
    assert_eq!(value("dsd_queue_seconds_count", ""), 12.0);
    assert_eq!(value("dsd_time_to_first_token_seconds_count", ""), 12.0);
    assert_eq!(value("dsd_inter_token_seconds_count", ""), 108.0);
    assert_eq!(value("dsd_engine_steps_failed_total", ""), 0.0);
    assert!(0.0 < value("dsd_canaries_total", ",result=\"right\""));
    assert!(0.0 < value("dsd_canaries_total", ",result=\"wrong\""));
    assert_eq!(value("dsd_canaries_total", ",result=\"failed\""), 1.0);
    assert_eq!(value("dsd_kv_blocks", ""), 17.0);
    for gauge in [
        "dsd_kv_blocks_used",
        "dsd_sequences_running",
        "dsd_sequences_waiting",
    ] {
        assert_eq!(value(gauge, ""), 0.0, "{gauge}");
    }
}

#[test]
fn the_canary_keeps_the_last_token_young_and_notices_another_model() {
    let (replica, control) = replica(ROOMY, |cfg| {
        cfg.canary_interval = Duration::from_millis(5);
    });
    let first_age = replica.load().last_token_age;
    assert!(
        first_age.is_some(),
        "a token came out before the start returned"
    );
    control.wait_begun(4);
    assert!(!replica.load().canary_wrong);
    control.set_twist(1);
    wait_until("a wrong canary", || replica.load().canary_wrong);
    control.set_twist(0);
    wait_until("a right canary", || !replica.load().canary_wrong);
    assert_eq!(
        replica.load().n_output_tokens,
        0,
        "canaries are nobody's tokens"
    );

    control.fail(usize::MAX);
    wait_until("an old last token", || {
        replica
            .load()
            .last_token_age
            .is_some_and(|age| Duration::from_millis(100) < age)
    });
    control.fail(0);
    wait_until("a young last token", || {
        replica
            .load()
            .last_token_age
            .is_some_and(|age| age < Duration::from_millis(50))
    });
}

#[test]
fn an_executor_that_cannot_run_the_first_canary_does_not_become_a_replica() {
    let (fake, control) = FakeExecutor::new(ROOMY);
    control.fail(1);
    let started = Replica::start(fake, EngineConfig::for_executor("fake", &ROOMY));
    assert!(matches!(started, Err(StartError::Canary(_))), "{started:?}");
}

/// Works once, for the canary.
struct Breaks(Box<FakeExecutor>, usize);

impl StepExecutor for Breaks {
    fn limits(&self) -> ExecutorLimits {
        self.0.limits()
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        self.1 += 1;
        assert!(self.1 < 2, "broken on purpose");
        self.0.execute(plan)
    }
}

#[test]
fn nobody_waits_for_an_engine_that_panicked() {
    let (fake, _) = FakeExecutor::new(ROOMY);
    let mut cfg = EngineConfig::for_executor("fake", &ROOMY);
    cfg.canary_prompt.truncate(1);
    cfg.cost = Some(CostModel::default());
    let replica = Replica::start(Box::new(Breaks(fake, 0)), cfg).unwrap();
    let (first, mut stream) = request(1, 4, 5);
    replica.submit(first).unwrap();
    started(&mut stream);
    assert_eq!(
        stream.blocking_next(),
        None,
        "the stream ends without an end"
    );
    wait_until("a refusal", || {
        replica.submit(request(2, 1, 1).0) == Err(SubmitError::Dead)
    });
    drop(replica);
}

#[test]
fn prompts_that_cannot_be_served_are_refused_with_numbers() {
    let (replica, _) = replica(ROOMY, |_| {});
    let submit = |prompt: Vec<u32>| {
        let (mut request, _stream) = request(1, 1, 1);
        request.prompt = prompt;
        replica.submit(request)
    };
    assert_eq!(submit(vec![]), Err(SubmitError::EmptyPrompt));
    let n_prompt = 64;
    assert_eq!(
        submit(vec![1; n_prompt]),
        Err(SubmitError::PromptTooLong { n_prompt, max: 63 })
    );
    let (token, vocab_len) = (50, 50);
    assert_eq!(
        submit(vec![1, token]),
        Err(SubmitError::TokenOutOfRange { token, vocab_len })
    );
    assert_eq!(submit(vec![1; 63]), Ok(()));
}

#[test]
fn a_request_for_no_tokens_ends_at_once() {
    let (replica, _) = replica(ROOMY, |_| {});
    let (mut request, stream) = request(1, 3, 1);
    request.max_tokens = 0;
    replica.submit(request).unwrap();
    assert_eq!(read_all(stream), (vec![], FinishReason::Length));
}

#[test]
fn log_probabilities_come_with_the_tokens_when_asked_for() {
    let (replica, _) = replica(ROOMY, |_| {});
    let (mut request, mut stream) = request(1, 3, 2);
    request.top_logprobs = Some(3);
    replica.submit(request).unwrap();
    started(&mut stream);
    let Some(StreamItem::Token(event)) = stream.blocking_next() else {
        panic!("no token");
    };
    let logprobs = event.logprobs.unwrap();
    assert_eq!(logprobs.top.len(), 3);
    assert_eq!(logprobs.top[0], (event.token, logprobs.chosen));
}

#[test]
fn the_load_report_counts_what_was_done() {
    let (replica, _) = replica(ROOMY, |_| {});
    let started: Instant = clock::now();
    for id in 0..3 {
        let (request, stream) = request(id, 7, 5);
        replica.submit(request).unwrap();
        read_all(stream);
    }
    let load = replica.load();
    assert_eq!(
        (load.n_prompt_tokens, load.n_output_tokens, load.n_steps),
        (21, 15, 15)
    );
    assert_eq!(load.n_blocks, 399);
    assert!(
        load.last_token_age
            .is_some_and(|age| age <= started.elapsed())
    );
}

#[test]
fn a_configuration_that_does_not_fit_the_executor_is_refused() {
    let check = |change: &dyn Fn(&mut EngineConfig), expected: &str| {
        let (fake, _) = FakeExecutor::new(ROOMY);
        let mut cfg = EngineConfig::for_executor("fake", &ROOMY);
        change(&mut cfg);
        match Replica::start(fake, cfg) {
            Err(StartError::Config(e)) => assert_eq!(e.to_string(), expected),
            other => panic!("{expected}: {other:?}"),
        }
    };
    check(&|cfg| cfg.waiting_max = 0, "waiting_max is 0");
    check(
        &|cfg| cfg.canary_prompt.clear(),
        "canary prompt length is 0",
    );
    check(
        &|cfg| cfg.running_max = 17,
        "running_max is 17, at most 16 is possible",
    );
    check(
        &|cfg| cfg.step_tokens_max = 65,
        "step_tokens_max is 65, at most 64 is possible",
    );
    check(
        &|cfg| cfg.sampleable_len = 51,
        "sampleable_len is 51, at most 50 is possible",
    );
    check(
        &|cfg| cfg.canary_prompt = vec![50],
        "canary token is 50, at most 49 is possible",
    );
    let (fake, _) = FakeExecutor::new(ExecutorLimits {
        n_blocks: 1,
        ..ROOMY
    });
    let cfg = EngineConfig::for_executor("fake", &ROOMY);
    let refused = Replica::start(fake, cfg).unwrap_err();
    assert!(matches!(refused, StartError::Config(_)), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn outputs_do_not_depend_on_pool_budget_or_company(
        block_len in 1usize..9,
        n_blocks_more in 0usize..20,
        step_tokens_max in 1usize..40,
        running_share in 1usize..40,
        watermark_blocks in 0usize..4,
        ids in prop::collection::vec(any::<u32>(), 1..20),
    ) {
        let limits = ExecutorLimits {
            block_len,
            // The longest of these requests fits, beside a canary of one token.
            n_blocks: 64usize.div_ceil(block_len) + 1 + n_blocks_more,
            ..ROOMY
        };
        let (replica, control) = replica(limits, |cfg| {
            cfg.step_tokens_max = step_tokens_max;
            cfg.running_max = running_share.min(step_tokens_max).min(16);
            cfg.waiting_max = 64;
            cfg.watermark_blocks = watermark_blocks;
            cfg.canary_prompt = vec![1];
        });
        control.permit(0);
        let mut expected = Vec::new();
        for id in ids {
            let (request, stream) = mixed_request(u64::from(id));
            expected.push((stream, reference(&request, &limits)));
            replica.submit(request).unwrap();
        }
        control.open();
        for (stream, expected) in expected {
            prop_assert_eq!(read_all(stream), expected);
        }
        wait_until_empty(&replica);
    }
}

/// A token's log-probability, and the likeliest tokens' beside it.
type Score = (f32, Vec<(u32, f32)>);

/// Scores of a whole prompt in their order, the number of tokens behind them, and the end.
fn read_scores(mut stream: TokenStream) -> (Vec<Score>, usize, FinishReason) {
    let (mut all, mut n_tokens) = (Vec::new(), 0);
    loop {
        match stream.blocking_next() {
            Some(StreamItem::Scored { first, scores }) => {
                assert_eq!(
                    (first, n_tokens),
                    (all.len() + 1, 0),
                    "in order, before all tokens"
                );
                all.extend(scores.into_iter().map(|s| (s.chosen, s.top)));
            }
            Some(StreamItem::Token(_)) => n_tokens += 1,
            Some(StreamItem::Finished(reason)) => return (all, n_tokens, reason),
            Some(StreamItem::Started { .. } | StreamItem::Prefilled { .. }) => {}
            None => panic!("the stream ended without an end"),
        }
    }
}

/// The same prompts in every way there is to compute them: alone, in a crowd that shares blocks, with
/// too little room for all, and in steps of few rows.
#[test]
fn scores_of_a_prompt_are_the_same_however_it_is_computed() {
    let tight = ExecutorLimits {
        n_blocks: 40,
        ..ROOMY
    };
    let narrow = ExecutorLimits {
        step_tokens_max: 16,
        ..ROOMY
    };
    let scored = |id: u64, max_tokens| {
        // Every second one begins like the one before.
        let (mut request, _) = request(id / 2, 8 + id as usize, max_tokens);
        let (sink, stream) = token_stream(64);
        request.id = RequestId(id);
        request.scored_from = Some(1);
        request.top_logprobs = Some(2);
        request.sink = sink;
        (request, stream)
    };
    let n_wanted = |id: u64| (id % 3) as usize * 10;
    let mut expected = Vec::new();
    for id in 0..12 {
        let (replica, _) = replica(ROOMY, |cfg| cfg.prefix_cache = false);
        let (request, stream) = scored(id, n_wanted(id));
        replica.submit(request).unwrap();
        let (scores, n_tokens, reason) = read_scores(stream);
        assert_eq!((scores.len(), n_tokens), (7 + id as usize, n_wanted(id)));
        assert_eq!(reason, FinishReason::Length);
        assert!(
            scores
                .iter()
                .all(|(chosen, top)| *chosen < 0.0 && top.len() == 2)
        );
        expected.push(scores);
    }
    for limits in [ROOMY, tight, narrow] {
        let (replica, _) = replica(limits, |_| {});
        for _ in 0..2 {
            let streams: Vec<_> = (0..12)
                .map(|id| {
                    let (request, stream) = scored(id, n_wanted(id));
                    replica.submit(request).unwrap();
                    stream
                })
                .collect();
            for (id, stream) in streams.into_iter().enumerate() {
                let (scores, n_tokens, _) = read_scores(stream);
                assert_eq!(scores, expected[id], "prompt {id}");
                assert_eq!(n_tokens, n_wanted(id as u64));
            }
        }
    }
}
