//! The only way to a group: requests in, their books, and what is known of the engine.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use dsd_proto::wire::group::GroupLoad;
use rustix::event::{EventfdFlags, eventfd};

use super::{GroupConfig, GroupError, messages::Asked, supervisor::Supervisor};
use crate::{
    cost::CostModel,
    engine::{EngineLimits, EngineLoad},
    flow::{FinishReason, Request, StreamItem, TokenSink},
    runtime::{clock, thread},
};

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The group is stopping.
    #[error("the group is stopping")]
    Stopping,
}

/// What a group is doing as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    /// Its ranks are started.
    Forming,
    /// Steps run.
    Ready,
    /// A rank is silent, or a step takes much too long.
    Stalled {
        /// The silent rank; `None` when it is the step.
        silent: Option<usize>,
    },
}

/// The only way to a group. Dropping it lets what was taken finish within the drain limit.
#[derive(Debug)]
pub struct GroupHandle {
    shared: Arc<Shared>,
    limits: EngineLimits,
    drain_limit: Duration,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What handles and the thread share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Raised when the thread has something to do.
    pub(super) bell: OwnedFd,
}

#[derive(Debug)]
pub(super) struct State {
    /// By request; in the order of their numbers they are asked again.
    pub(super) in_flight: BTreeMap<u64, InFlight>,
    /// Of them, those that never ran.
    pub(super) n_waiting: usize,
    /// Not yet told to the engine.
    pub(super) new: Vec<u64>,
    /// Whose readers left.
    pub(super) cancelled: Vec<u64>,
    pub(super) is_ready: bool,
    pub(super) load: GroupLoad,
    pub(super) load_at: Instant,
    /// What the engine knows of step times.
    pub(super) cost: CostModel,
    /// How long the last formation took.
    pub(super) forming_time: Duration,
    /// The last sign of every rank.
    pub(super) signs: Vec<Sign>,
    /// When what was taken has to be over.
    pub(super) stop_at: Option<Instant>,
    /// Set when `stop_at` changed.
    pub(super) stop_is_news: bool,
}

/// A rank's tick; the first one's says what its engine does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sign {
    pub(super) at: Instant,
    /// How long the engine had been in its step.
    pub(super) step_age: Option<Duration>,
    /// How long the step was expected to take.
    pub(super) expected: Duration,
}

/// Without a tick for so long, three of them, a rank is frozen or starved.
const TICK_LATE: Duration = Duration::from_millis(1_500);
/// A step is not merely slow when it takes this many times what was expected, and at least
/// [`TICK_LATE`].
const STEP_LATE_FACTOR: u32 = 4;

impl Sign {
    /// How long the step under way has been, if there is one.
    pub(super) fn step_age(&self, now: Instant) -> Option<Duration> {
        Some(self.step_age? + now.saturating_duration_since(self.at))
    }

    /// A rank that is there, in no step.
    pub(super) fn of_life(now: Instant) -> Self {
        Self {
            at: now,
            step_age: None,
            expected: Duration::ZERO,
        }
    }

    fn is_silent(&self, now: Instant) -> bool {
        TICK_LATE < now.saturating_duration_since(self.at)
    }

    /// True when the step under way takes much longer than it should.
    fn is_step_late(&self, now: Instant) -> bool {
        let step_max = self
            .expected
            .saturating_mul(STEP_LATE_FACTOR)
            .max(TICK_LATE);
        self.step_age(now).is_some_and(|age| step_max < age)
    }
}

/// A request that was taken and has not ended.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) asked: Asked,
    pub(super) output: Vec<u32>,
    pub(super) sink: TokenSink,
    pub(super) has_started: bool,
    /// Told to the group of this epoch.
    pub(super) epoch: u64,
    /// How much of it was there when a group that ran it was lost last, and how many groups were
    /// lost since that was so.
    pub(super) lost_at: Option<(usize, u32)>,
}

impl Shared {
    /// Of a group without requests.
    pub(super) fn new(now: Instant) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State::new(now)),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // A counter that is full is raised already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl GroupHandle {
    /// Starts the ranks and waits until they have produced a token together.
    ///
    /// # Errors
    /// [`GroupError`]; no process is left behind.
    pub fn start(cfg: GroupConfig) -> Result<Self, GroupError> {
        let now = clock::now();
        let shared = Arc::new(Shared::new(now).map_err(GroupError::Start)?);
        let drain_limit = cfg.drain_limit;
        let (first_tx, first_rx) = mpsc::sync_channel(1);
        let mut supervisor = Supervisor::new(cfg, Arc::clone(&shared), first_tx, now);
        let thread =
            thread::spawn("dsd-group", move || supervisor.run()).map_err(GroupError::Start)?;
        let died = || GroupError::Start(io::Error::other("the group's thread ended"));
        match first_rx.recv().unwrap_or_else(|_| Err(died())) {
            Ok(limits) => Ok(Self {
                shared,
                limits,
                drain_limit,
                thread: Mutex::new(Some(thread)),
            }),
            Err(e) => {
                // The thread itself has logged its panic.
                drop(thread.join());
                Err(e)
            }
        }
    }

    /// Hands a request over without blocking. While the group forms again it waits.
    ///
    /// # Errors
    /// [`PostError`]; the sink is dropped unused.
    pub fn post(&self, request: Request) -> Result<(), PostError> {
        let shared = &self.shared;
        let mut state = shared.lock();
        if state.stop_at.is_some() {
            return Err(PostError::Stopping);
        }
        let id = request.id.0;
        let weak: Weak<Shared> = Arc::downgrade(shared);
        request.sink.on_close(move || {
            if let Some(shared) = weak.upgrade() {
                let mut state = shared.lock();
                // Also called when the stream is dropped after its end.
                if state.in_flight.contains_key(&id) {
                    state.cancelled.push(id);
                    drop(state);
                    shared.ring();
                }
            }
        });
        let in_flight = InFlight {
            asked: Asked {
                id,
                prompt: request.prompt,
                max_tokens: request.max_tokens,
                stop_tokens: request.stop_tokens,
                sampling: request.sampling,
                grammar: request.grammar,
                top_logprobs: request.top_logprobs,
                scored_from: request.scored_from,
                deadline: request.deadline,
                cache_owner: request.cache_owner,
                account: request.account,
                siblings: request.siblings,
            },
            output: request.output,
            sink: request.sink,
            has_started: false,
            epoch: 0,
            lost_at: None,
        };
        let former = state.in_flight.insert(id, in_flight);
        assert!(former.is_none(), "request numbers are unique");
        state.n_waiting += 1;
        state.new.push(id);
        drop(state);
        shared.ring();
        Ok(())
    }

    /// Takes no more requests, lets those taken go on for at most `drain`, ends the rest with
    /// `Stopped`, and returns when the ranks are gone. Blocks. A second call can only shorten the
    /// drain.
    pub fn stop(&self, drain: Duration) {
        let now = clock::now();
        let until = now.checked_add(drain);
        {
            let mut state = self.shared.lock();
            let until = until.unwrap_or(now + Duration::from_secs(86_400));
            let sooner = state.stop_at.map_or(until, |at| at.min(until));
            state.stop_at = Some(sooner);
            state.stop_is_news = true;
        }
        self.shared.ring();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // The thread itself has logged its panic.
            drop(thread.join());
        }
    }

    /// Counters as of the last report, and what state the group is in.
    pub fn load(&self) -> (EngineLoad, GroupState) {
        let now = clock::now();
        let state = self.shared.lock();
        let load = &state.load;
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let since = now.saturating_duration_since(state.load_at);
        let age = load
            .last_token_age_us
            .map(|us| Duration::from_micros(us) + since);
        let report = EngineLoad {
            n_running: size(load.n_running),
            n_waiting: state.n_waiting.max(size(load.n_waiting)),
            n_blocks_used: size(load.n_blocks_used),
            n_blocks: size(load.n_blocks),
            n_steps: load.n_steps,
            n_prompt_tokens: load.n_prompt_tokens,
            n_output_tokens: load.n_output_tokens,
            n_preemptions: load.n_preemptions,
            last_token_age: age,
            canary_wrong: load.canary_wrong,
            is_dead: false,
        };
        let silent = state.signs.iter().position(|sign| sign.is_silent(now));
        let is_late = state.signs.iter().any(|sign| sign.is_step_late(now));
        let group = match state.is_ready {
            false => GroupState::Forming,
            true if silent.is_some() || is_late => GroupState::Stalled { silent },
            true => GroupState::Ready,
        };
        (report, group)
    }

    /// What is known of step times, and how long it takes until steps run where none does now.
    pub fn cost(&self) -> (CostModel, Duration) {
        let state = self.shared.lock();
        let forming = match state.is_ready {
            true => Duration::ZERO,
            false => state.forming_time,
        };
        (state.cost.clone(), forming)
    }

    /// What the group takes.
    pub fn limits(&self) -> EngineLimits {
        self.limits
    }
}

impl Drop for GroupHandle {
    fn drop(&mut self) {
        self.stop(self.drain_limit);
    }
}

impl State {
    fn new(now: Instant) -> Self {
        Self {
            in_flight: BTreeMap::new(),
            n_waiting: 0,
            new: Vec::new(),
            cancelled: Vec::new(),
            is_ready: false,
            load: GroupLoad {
                n_running: 0,
                n_waiting: 0,
                n_blocks_used: 0,
                n_blocks: 0,
                n_steps: 0,
                n_prompt_tokens: 0,
                n_output_tokens: 0,
                n_preemptions: 0,
                last_token_age_us: None,
                canary_wrong: false,
            },
            load_at: now,
            cost: CostModel::default(),
            forming_time: Duration::ZERO,
            signs: Vec::new(),
            stop_at: None,
            stop_is_news: false,
        }
    }

    /// Takes a request out of the books.
    pub(super) fn remove(&mut self, id: u64) -> Option<InFlight> {
        let in_flight = self.in_flight.remove(&id)?;
        self.n_waiting -= usize::from(!in_flight.has_started);
        Some(in_flight)
    }

    /// Ends all requests: there will be no group that goes on with them.
    pub(super) fn end_all(&mut self) {
        while let Some((id, _)) = self.in_flight.first_key_value() {
            self.end(*id, FinishReason::InsufficientResources);
        }
    }

    /// Ends a request.
    pub(super) fn end(&mut self, id: u64, reason: FinishReason) {
        if let Some(in_flight) = self.remove(id) {
            in_flight.sink.send(StreamItem::Finished(reason));
        }
    }
}
