//! What a supervisor does with its ranks' news, without processes.

use std::sync::mpsc;

use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};

use super::*;
use crate::{
    config::LogConfig,
    flow::{self, Account, CacheOwner, SamplingParams, Siblings, TokenStream},
    group::messages::Asked,
    runner::Budget,
};

const N_RANKS: usize = 2;

/// A supervisor without processes: the test says what its ranks would.
fn supervisor() -> (
    Supervisor,
    mpsc::Receiver<Result<EngineLimits, GroupError>>,
    Instant,
) {
    let hour = Duration::from_secs(3600);
    let cfg = GroupConfig {
        program: PathBuf::new(),
        log: LogConfig::default(),
        model: "tiny".to_owned(),
        path: PathBuf::new(),
        n_ranks: N_RANKS,
        cpu: CpuConfig {
            n_threads: 1,
            isa: Isa::available()[0],
            activations: Activations::F32,
            kv_type: KvType::F32,
        },
        budget: Budget {
            kv_bytes_max: 1,
            step_tokens_max: 1,
            step_spans_max: 1,
        },
        step_timeout: hour,
        agent_timeout: hour,
        step_target: hour,
        cost: None,
        cost_file: None,
        waiting_max: 1,
        prefix_cache: false,
        sampleable_len: 1,
        drain_limit: hour,
        kept_bytes_max: 0,
    };
    let (first_tx, first_rx) = mpsc::sync_channel(1);
    let now = clock::now();
    let shared = Arc::new(Shared::new(now).unwrap());
    (Supervisor::new(cfg, shared, first_tx, now), first_rx, now)
}

/// What a rank says that has loaded these weights and this text; the canary's token is told by the
/// weights.
fn ready(rank: usize, weights: &str, text: &str) -> RankReady {
    let limits = EngineLimits {
        context_len_max: 10,
        vocab_len: 10,
        sampleable_len: 10,
        waiting_max: 1,
        running_max: 1,
        n_blocks: 1,
        block_len: 16,
    };
    let token = weights.len() as u32;
    RankReady {
        took_ms: 1,
        disk_bytes_read: 0,
        limits: (rank == 0).then(|| messages::limits_message(&limits, token)),
        weights_digest: weights.to_owned(),
        text_digest: text.to_owned(),
    }
}

impl Supervisor {
    /// Carries out what is due; the epoch that forms, if one does.
    fn step(&mut self, now: Instant) -> Option<u64> {
        match self.life.poll(now)? {
            Command::Form { epoch } => {
                self.identity_of_epoch = None;
                Some(epoch)
            }
            Command::Lose {
                epoch,
                blame,
                retry_in,
            } => {
                self.lose(epoch, &blame, retry_in);
                None
            }
        }
    }

    fn hear_ready(&mut self, rank: usize, weights: &str, text: &str, now: Instant) {
        let epoch = self.life.epoch();
        self.rank_ready(epoch, rank, &ready(rank, weights, text), now);
    }
}

/// A stream of a request that runs and got `output`.
fn begun(supervisor: &Supervisor, id: u64, output: Vec<u32>) -> TokenStream {
    let (sink, stream) = flow::token_stream(9);
    let in_flight = InFlight {
        asked: Asked {
            id,
            prompt: vec![1],
            max_tokens: 9,
            stop_tokens: Arc::new([]),
            sampling: SamplingParams::default(),
            grammar: None,
            top_logprobs: None,
            scored_from: None,
            deadline: None,
            cache_owner: CacheOwner::default(),
            account: Account::default(),
            siblings: Siblings::default(),
        },
        output,
        sink,
        has_started: true,
        epoch: supervisor.life.epoch(),
        lost_at: None,
    };
    supervisor.shared.lock().in_flight.insert(id, in_flight);
    stream
}

/// Such a stream has come to its end.
fn must_have_ended(mut stream: TokenStream) {
    let end = StreamItem::Finished(FinishReason::InsufficientResources);
    assert_eq!(stream.blocking_next(), Some(end));
    assert_eq!(stream.blocking_next(), None);
}

#[test]
fn other_weights_end_streams_that_have_begun_and_are_served_from_then_on() {
    let (mut supervisor, first, now) = supervisor();
    assert_eq!(supervisor.step(now), Some(1));
    supervisor.hear_ready(1, "old", "text", now);
    supervisor.hear_ready(0, "old", "text", now);
    assert!(first.recv().unwrap().is_ok());
    let with_output = begun(&supervisor, 1, vec![5]);
    let _without = begun(&supervisor, 2, Vec::new());
    supervisor.blame(0, Cause::Ended, "died".to_owned());
    assert_eq!(supervisor.step(now), None);

    assert_eq!(supervisor.step(now), Some(2));
    supervisor.hear_ready(1, "newer", "text", now);
    must_have_ended(with_output);
    // A loss before the first rank is ready used to be taken for a first formation that failed: the
    // thread ended, and the model never came back.
    supervisor.blame(0, Cause::Ended, "died".to_owned());
    assert_eq!(supervisor.step(now), None);
    assert!(!supervisor.has_failed_at_first());

    let later = now + Duration::from_secs(60);
    assert_eq!(supervisor.step(later), Some(3));
    supervisor.hear_ready(0, "newer", "text", later);
    supervisor.hear_ready(1, "newer", "text", later);
    assert!(supervisor.life.is_ready());
    let state = supervisor.shared.lock();
    assert_eq!(state.in_flight.keys().collect::<Vec<_>>(), [&2]);
    assert_eq!(state.new, [2]);
}

#[test]
fn ranks_that_loaded_different_files_are_no_group() {
    let (mut supervisor, first, now) = supervisor();
    assert_eq!(supervisor.step(now), Some(1));
    supervisor.hear_ready(1, "old", "text", now);
    supervisor.hear_ready(0, "newer", "text", now);
    assert_eq!(supervisor.step(now), None);
    let error = first.recv().unwrap().unwrap_err().to_string();
    assert!(error.contains("other files than another rank"), "{error}");
    assert!(supervisor.has_failed_at_first());
}

/// Requests used to wait for their deadline, though no group could come.
#[test]
fn another_tokenizer_forms_no_group_and_ends_what_was_taken() {
    let (mut supervisor, first, now) = supervisor();
    assert_eq!(supervisor.step(now), Some(1));
    supervisor.hear_ready(0, "old", "text", now);
    supervisor.hear_ready(1, "old", "text", now);
    assert!(first.recv().unwrap().is_ok());
    let streams = [vec![], vec![5]].map(|output| {
        let id = output.len() as u64;
        begun(&supervisor, id, output)
    });
    supervisor.blame(1, Cause::Ended, "died".to_owned());
    assert_eq!(supervisor.step(now), None);
    assert_eq!(supervisor.step(now), Some(2));
    supervisor.hear_ready(1, "old", "another text", now);
    streams.into_iter().for_each(must_have_ended);
    assert_eq!(supervisor.step(now), None);
    assert!(!supervisor.life.is_ready() && !supervisor.has_failed_at_first());
}

#[test]
fn a_rank_that_is_lost_while_the_group_drains_costs_nobody_its_answer() {
    let (mut supervisor, first, now) = supervisor();
    assert_eq!(supervisor.step(now), Some(1));
    supervisor.hear_ready(0, "old", "text", now);
    supervisor.hear_ready(1, "old", "text", now);
    assert!(first.recv().unwrap().is_ok());
    let _stream = begun(&supervisor, 1, vec![5]);
    supervisor.shared.lock().stop_at = Some(now + Duration::from_secs(3600));
    assert!(!supervisor.obey_handles());
    supervisor.rank_ended(0, "died");
    assert_eq!(supervisor.step(now), None);
    assert!(!supervisor.obey_handles(), "somebody waits for it");
    assert_eq!(supervisor.step(now), Some(2));
    supervisor.hear_ready(0, "old", "text", now);
    supervisor.hear_ready(1, "old", "text", now);
    let mut state = supervisor.shared.lock();
    assert!(state.stop_is_news, "the new ranks have to drain too");
    assert_eq!(std::mem::take(&mut state.new), [1]);
    state.remove(1);
    drop(state);
    supervisor.rank_ended(0, "exited");
    assert!(supervisor.obey_handles(), "nothing is left to wait for");
}

/// A request that came further between two losses is not what ends groups.
#[test]
fn a_request_is_given_up_only_when_nothing_came_out_between_two_losses() {
    let (mut supervisor, first, mut now) = supervisor();
    let lose = |supervisor: &mut Supervisor, now: &mut Instant| {
        assert!(supervisor.step(*now).is_some());
        supervisor.hear_ready(0, "old", "text", *now);
        supervisor.hear_ready(1, "old", "text", *now);
        let epoch = supervisor.life.epoch();
        if let Some(in_flight) = supervisor.shared.lock().in_flight.get_mut(&1) {
            in_flight.epoch = epoch;
        }
        supervisor.blame(0, Cause::Ended, "died".to_owned());
        assert_eq!(supervisor.step(*now), None);
        *now += Duration::from_secs(60);
    };
    let stream = begun(&supervisor, 1, Vec::new());
    for token in 0..5 {
        lose(&mut supervisor, &mut now);
        let mut state = supervisor.shared.lock();
        state.in_flight.get_mut(&1).unwrap().output.push(token);
    }
    assert!(first.recv().unwrap().is_ok());
    lose(&mut supervisor, &mut now);
    assert_eq!(supervisor.shared.lock().in_flight.len(), 1);
    lose(&mut supervisor, &mut now);
    must_have_ended(stream);
}

/// What a rank computed wrongly must not be taken over by the next one.
#[test]
fn a_group_that_computed_wrongly_keeps_nothing() {
    for (cause, canary_wrong, kept) in [
        (Cause::Ended, false, 1),
        (Cause::Ended, true, 0),
        (Cause::Fault, false, 0),
    ] {
        let (mut supervisor, _first, now) = supervisor();
        assert_eq!(supervisor.step(now), Some(1));
        supervisor.hear_ready(0, "old", "text", now);
        supervisor.hear_ready(1, "old", "text", now);
        supervisor.kept = vec![tempfile::tempfile().unwrap()];
        supervisor.shared.lock().load.canary_wrong = canary_wrong;
        supervisor.blame(0, cause, "died".to_owned());
        assert_eq!(supervisor.step(now), None);
        assert_eq!(supervisor.kept.len(), kept, "{cause:?} {canary_wrong}");
    }
}
