//! The agent's side of a group: one thread that owns the rank processes, their sockets and the
//! [`Life`], and a handle through which requests come in.
//!
//! The thread sleeps in `poll` on the ranks' sockets and pidfds and on an event that handles raise.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        mpsc::{self, SyncSender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use dsd_proto::wire::group::{
    GroupCancel, GroupEvent, GroupEvents, GroupLoad, GroupStop, RankFailed, RankFault, RankReady,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tracing::{error, info, warn};

use super::{
    GroupConfig, GroupError,
    frames::{self, Frame, SocketError},
    life::{Blame, Command, Life},
    messages::{self, Asked},
    process::RankProcess,
};
use crate::{
    collective::Segment,
    engine::{Departures, EngineLimits, EngineLoad},
    flow::{FinishReason, Request, StreamItem, TokenSink},
    runtime::{clock, thread},
    telemetry::{chain, forward::Delivery},
};

/// An idle engine reports after its canary, every 3 s; so much more than a step's deadline is
/// silence.
const SIGN_INTERVAL: Duration = Duration::from_secs(4);
/// What a stop may take beyond the drain before ranks are killed.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Lost groups in which a request may have run before it is given up.
const CRASHES_MAX: u32 = 2;
/// How long the thread sleeps at most.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// As many requests as may wait do.
    #[error("{waiting} requests wait already, the limit is {max}")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
        /// The limit.
        max: usize,
        /// When a place is expected to be free.
        retry_after: Duration,
    },
    /// The group is stopping.
    #[error("the group is stopping")]
    Stopping,
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
struct Shared {
    state: Mutex<State>,
    /// Raised when the thread has something to do.
    bell: OwnedFd,
    waiting_max: usize,
    departures: Departures,
}

#[derive(Debug)]
struct State {
    /// By request; in the order of their numbers they are asked again.
    in_flight: BTreeMap<u64, InFlight>,
    /// Of them, those that never ran.
    n_waiting: usize,
    /// Not yet told to the engine.
    new: Vec<u64>,
    /// Whose readers left.
    cancelled: Vec<u64>,
    is_ready: bool,
    load: GroupLoad,
    load_at: Instant,
    last_departure_at: Option<Instant>,
    /// When what was taken has to be over.
    stop_at: Option<Instant>,
    /// Set when `stop_at` changed.
    stop_is_news: bool,
}

/// A request that was taken and has not ended.
#[derive(Debug)]
struct InFlight {
    asked: Asked,
    output: Vec<u32>,
    sink: TokenSink,
    submitted_at: Instant,
    has_started: bool,
    /// Told to the group of this epoch.
    epoch: u64,
    n_crashes: u32,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
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
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| GroupError::Start(e.into()))?;
        let now = clock::now();
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(now)),
            bell,
            waiting_max: cfg.waiting_max,
            departures: Departures::default(),
        });
        let drain_limit = cfg.drain_limit;
        let (first_tx, first_rx) = mpsc::sync_channel(1);
        let silence_max = cfg.step_timeout + SIGN_INTERVAL;
        let mut supervisor = Supervisor {
            life: Life::new(cfg.n_ranks, silence_max, now),
            cfg,
            shared: Arc::clone(&shared),
            ranks: Vec::new(),
            segment: None,
            first: Some(first_tx),
            canary_token: None,
            metrics: Delivery::default(),
            formed_at: now,
        };
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
        if shared.waiting_max <= state.n_waiting {
            return Err(PostError::QueueFull {
                waiting: state.n_waiting,
                max: shared.waiting_max,
                retry_after: shared.departures.retry_after(),
            });
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
                top_logprobs: request.top_logprobs,
                deadline: request.deadline,
                cache_owner: request.cache_owner,
            },
            output: request.output,
            sink: request.sink,
            submitted_at: clock::now(),
            has_started: false,
            epoch: 0,
            n_crashes: 0,
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

    /// Counters as of the last report, and whether the group is forming again.
    pub fn load(&self) -> (EngineLoad, bool) {
        let state = self.shared.lock();
        let load = &state.load;
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let since = clock::now().saturating_duration_since(state.load_at);
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
        (report, !state.is_ready)
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
            last_departure_at: None,
            stop_at: None,
            stop_is_news: false,
        }
    }

    /// Takes a request out of the books.
    fn remove(&mut self, id: u64) -> Option<InFlight> {
        let in_flight = self.in_flight.remove(&id)?;
        self.n_waiting -= usize::from(!in_flight.has_started);
        Some(in_flight)
    }

    /// Ends a request.
    fn end(&mut self, id: u64, reason: FinishReason) {
        if let Some(in_flight) = self.remove(id) {
            in_flight.sink.send(StreamItem::Finished(reason));
        }
    }
}

/// The thread's own state.
struct Supervisor {
    cfg: GroupConfig,
    shared: Arc<Shared>,
    life: Life,
    ranks: Vec<RankProcess>,
    segment: Option<Segment>,
    /// Who waits for the first formation.
    first: Option<SyncSender<Result<EngineLimits, GroupError>>>,
    /// What the first group's canary gave.
    canary_token: Option<u32>,
    metrics: Delivery,
    formed_at: Instant,
}

impl Supervisor {
    fn run(&mut self) {
        loop {
            while let Some(command) = self.life.poll(clock::now()) {
                match command {
                    Command::Form { epoch } => self.form(epoch),
                    Command::Lose {
                        epoch,
                        blame,
                        retry_in,
                    } => self.lose(epoch, &blame, retry_in),
                }
                if self.has_failed_at_first() {
                    return;
                }
            }
            if self.obey_handles() {
                return;
            }
            self.sleep();
            self.hear();
        }
    }

    /// Starts the ranks of an epoch.
    fn form(&mut self, epoch: u64) {
        self.formed_at = clock::now();
        match self.start_ranks(epoch) {
            Ok((ranks, segment)) => {
                info!(
                    model = %self.cfg.model,
                    epoch,
                    pids = ?ranks.iter().map(RankProcess::pid).collect::<Vec<_>>(),
                    "group forming"
                );
                (self.ranks, self.segment) = (ranks, segment);
            }
            Err(e) => {
                let what = chain(&e);
                self.life.handle_fault(epoch, Blame { rank: 0, what });
            }
        }
    }

    fn start_ranks(&self, epoch: u64) -> Result<(Vec<RankProcess>, Option<Segment>), GroupError> {
        let n_ranks = self.cfg.n_ranks;
        let segment = match n_ranks {
            0 | 1 => None,
            _ => Some(Segment::create(n_ranks)?),
        };
        let path = segment.as_ref().map(Segment::path).unwrap_or_default();
        let ranks = (0..n_ranks)
            .map(|rank| self.cfg.spawn(rank, &path, epoch))
            .collect::<Result<_, _>>()?;
        Ok((ranks, segment))
    }

    /// Ends the ranks of a lost epoch and puts what ran on them back in line.
    fn lose(&mut self, epoch: u64, blame: &Blame, retry_in: Duration) {
        // Killed and reaped: none of them can touch what the next epoch uses.
        self.ranks.clear();
        self.segment = None;
        let mut state = self.shared.lock();
        state.is_ready = false;
        let mut given_up = Vec::new();
        for (id, in_flight) in &mut state.in_flight {
            if in_flight.epoch == epoch && in_flight.has_started {
                in_flight.n_crashes += 1;
                if CRASHES_MAX <= in_flight.n_crashes {
                    given_up.push(*id);
                }
            }
        }
        for id in &given_up {
            let cause = "the model's ranks were lost twice while they answered this".to_owned();
            state.end(*id, FinishReason::Failed(cause));
        }
        let n_kept = state.in_flight.len();
        drop(state);
        if self.first.is_none() {
            metrics::counter!("dsd_group_losses_total", "model" => self.cfg.model.clone())
                .increment(1);
            error!(
                model = %self.cfg.model,
                epoch,
                rank = blame.rank,
                what = blame.what,
                n_kept,
                n_given_up = given_up.len(),
                retry_in_ms = retry_in.as_millis() as u64,
                "group lost"
            );
        } else {
            self.tell_first(Err(GroupError::Rank {
                rank: blame.rank,
                what: blame.what.clone(),
            }));
        }
    }

    fn tell_first(&mut self, outcome: Result<EngineLimits, GroupError>) {
        if let Some(first) = self.first.take() {
            // The starter waits for this.
            let _ = first.send(outcome);
        }
    }

    /// True when the first formation failed: then there is no second.
    fn has_failed_at_first(&self) -> bool {
        self.first.is_none() && self.canary_token.is_none()
    }

    /// Passes on what handles asked for; true when all is over.
    fn obey_handles(&mut self) -> bool {
        let now = clock::now();
        let epoch = self.life.epoch();
        let is_ready = self.life.is_ready();
        let mut frames = Vec::new();
        let mut state = self.shared.lock();
        for id in std::mem::take(&mut state.cancelled) {
            if let Some(in_flight) = state.remove(id)
                && in_flight.epoch == epoch
            {
                frames.push(frames::encode(&GroupCancel { id }, epoch));
            }
        }
        if is_ready && !state.new.is_empty() {
            for id in std::mem::take(&mut state.new) {
                if let Some(in_flight) = state.in_flight.get_mut(&id) {
                    in_flight.epoch = epoch;
                    let message = in_flight.asked.submit(&in_flight.output, now);
                    frames.push(frames::encode(&message, epoch));
                }
            }
        }
        if !is_ready {
            // Nobody else looks at deadlines now.
            let is_over = |f: &InFlight| f.asked.deadline.is_some_and(|d| d <= now);
            let expired = state.in_flight.iter().filter(|(_, f)| is_over(f));
            for id in expired.map(|(id, _)| *id).collect::<Vec<_>>() {
                state.end(id, FinishReason::DeadlinePassed);
            }
        }
        let stop_at = state.stop_at;
        if let Some(at) = stop_at
            && is_ready
            && std::mem::take(&mut state.stop_is_news)
        {
            let drain_ms = at.saturating_duration_since(now).as_millis() as u64;
            frames.push(frames::encode(&GroupStop { drain_ms }, epoch));
        }
        let is_over = stop_at.is_some_and(|at| !is_ready || at + STOP_GRACE <= now);
        if is_over {
            let ids = state.in_flight.keys().copied().collect::<Vec<_>>();
            for id in ids {
                state.end(id, FinishReason::Stopped);
            }
        }
        drop(state);
        if is_over {
            self.ranks.clear();
            self.tell_first(Err(GroupError::Start(io::ErrorKind::Interrupted.into())));
            return true;
        }
        if let Some(rank) = self.ranks.first_mut() {
            for frame in frames {
                match frame {
                    Ok(frame) => rank.outgoing.extend(frame),
                    // Held to its limits when the request was taken.
                    Err(e) => warn!(error = %e, "a message to the engine is too long"),
                }
            }
            if let Err(e) = rank.flush() {
                let what = format!("its socket failed: {e}");
                self.life.handle_fault(epoch, Blame { rank: 0, what });
            }
        }
        false
    }

    /// Sleeps until a rank or a handle has something, or time is up.
    fn sleep(&self) {
        let now = clock::now();
        let mut timeout = self.life.next_timeout().saturating_duration_since(now);
        if let Some(at) = self.shared.lock().stop_at {
            timeout = timeout.min((at + STOP_GRACE).saturating_duration_since(now));
        }
        let timeout = timeout.min(SLEEP_MAX);
        let timeout = Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let pidfds = self
            .ranks
            .iter()
            .map(RankProcess::pidfd)
            .collect::<Vec<_>>();
        let bell = self.shared.bell.as_fd();
        let mut fds = vec![PollFd::new(&bell, PollFlags::IN)];
        for (rank, pidfd) in self.ranks.iter().zip(&pidfds) {
            let wanted = match rank.outgoing.is_empty() {
                true => PollFlags::IN,
                false => PollFlags::IN | PollFlags::OUT,
            };
            fds.push(PollFd::new(&rank.socket, wanted));
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        // Whatever woke it, everything is looked at.
        let _ = poll(&mut fds, Some(&timeout));
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.bell, &mut count);
    }

    /// Takes in what ranks sent, and how they ended.
    fn hear(&mut self) {
        let epoch = self.life.epoch();
        for rank in 0..self.ranks.len() {
            let process = &mut self.ranks[rank];
            // Looked at first: what it sent before its end is all there then, and counts, for it may
            // say whose fault it is.
            let ended = process.ended();
            let mut frames = Vec::new();
            let outcome = process
                .incoming
                .fill(&mut process.socket)
                .map_err(SocketError::from);
            let mut outcome = outcome.map(|_| ());
            loop {
                match process.incoming.next() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(e) => {
                        outcome = Err(e.into());
                        break;
                    }
                }
            }
            for frame in frames {
                if let Err(e) = self.take(epoch, rank, &frame) {
                    outcome = Err(e.into());
                }
            }
            if let Err(e) = outcome
                && ended.is_none()
            {
                let what = chain(&e);
                self.life.handle_fault(epoch, Blame { rank, what });
            }
            if let Some(how) = ended {
                self.rank_ended(epoch, rank, how);
            }
        }
    }

    fn rank_ended(&mut self, epoch: u64, rank: usize, how: String) {
        if self.shared.lock().stop_at.is_some() {
            // The first rank ends when it has drained; there is nothing left to wait for.
            let now = clock::now();
            let mut state = self.shared.lock();
            state.stop_at = Some(now - STOP_GRACE);
            return;
        }
        let what = match &self.segment {
            None => format!("rank {rank} {how}"),
            Some(segment) => format!("rank {rank} {how} at {}", segment.last_site(rank)),
        };
        self.life.handle_fault(epoch, Blame { rank, what });
    }

    fn take(
        &mut self,
        epoch: u64,
        rank: usize,
        frame: &Frame,
    ) -> Result<(), dsd_proto::wire::FrameError> {
        let now = clock::now();
        if frame.is::<GroupEvents>() {
            let events = frame.decode::<GroupEvents>()?;
            self.life.handle_sign(epoch, now);
            self.metrics.apply(events.series, &events.metrics);
            self.apply(events.events, events.load, now);
        } else if frame.is::<RankReady>() {
            let ready = frame.decode::<RankReady>()?;
            self.rank_ready(epoch, rank, &ready, now);
        } else if frame.is::<RankFailed>() {
            let what = frame.decode::<RankFailed>()?.message;
            self.life.handle_fault(epoch, Blame { rank, what });
        } else if frame.is::<RankFault>() {
            let fault = frame.decode::<RankFault>()?;
            let rank = fault.blamed.map_or(rank, |rank| rank as usize);
            let what = fault.message;
            self.life.handle_fault(epoch, Blame { rank, what });
        } else {
            warn!(kind = frame.header.type_id, "a message no agent takes");
        }
        Ok(())
    }

    fn rank_ready(&mut self, epoch: u64, rank: usize, ready: &RankReady, now: Instant) {
        info!(
            model = %self.cfg.model,
            epoch,
            rank,
            took_ms = ready.took_ms,
            disk_bytes_read = ready.disk_bytes_read,
            "rank ready"
        );
        if let Some(limits) = &ready.limits {
            let found = limits.canary_token;
            let expected = *self.canary_token.get_or_insert(found);
            if found != expected {
                let what = format!(
                    "the canary token is {found}, it was {expected} before: the weights or the \
                     processor are damaged"
                );
                self.life.handle_fault(epoch, Blame { rank, what });
                return;
            }
            if self.first.is_some() {
                let mut limits = messages::limits_of(limits);
                limits.waiting_max = self.cfg.waiting_max;
                let mut state = self.shared.lock();
                // The canary's token is a moment old.
                state.load.last_token_age_us = Some(0);
                state.load.n_blocks = limits.n_blocks as u64;
                state.load_at = now;
                drop(state);
                self.life.handle_rank_ready(epoch, rank, now);
                self.ready_if_all();
                self.tell_first(Ok(limits));
                return;
            }
        }
        self.life.handle_rank_ready(epoch, rank, now);
        self.ready_if_all();
    }

    /// When the last rank is ready, everything in flight is asked anew.
    fn ready_if_all(&mut self) {
        if !self.life.is_ready() {
            return;
        }
        let mut state = self.shared.lock();
        if state.is_ready {
            return;
        }
        state.is_ready = true;
        // In the order of arrival, those that ran before included.
        state.new = state.in_flight.keys().copied().collect();
        let n_resumed = state.new.len();
        drop(state);
        let took = clock::now().saturating_duration_since(self.formed_at);
        let took_ms = took.as_millis() as u64;
        let epoch = self.life.epoch();
        info!(model = %self.cfg.model, epoch, took_ms, n_resumed, "group ready");
    }

    /// Hands events to the readers.
    fn apply(&self, events: Vec<GroupEvent>, load: GroupLoad, now: Instant) {
        let mut state = self.shared.lock();
        state.load = load;
        state.load_at = now;
        let (mut n_departed, mut oldest) = (0, now);
        for GroupEvent { id, what } in events {
            let Some(in_flight) = state.in_flight.get_mut(&id) else {
                continue;
            };
            match messages::item_of(what) {
                StreamItem::Started { n_cached } => {
                    if in_flight.has_started {
                        // Started before, in a lost group: its reader knows.
                        continue;
                    }
                    in_flight.has_started = true;
                    in_flight.sink.send(StreamItem::Started { n_cached });
                    oldest = oldest.min(in_flight.submitted_at);
                    n_departed += 1;
                    state.n_waiting -= 1;
                }
                StreamItem::Token(event) => {
                    if event.index == in_flight.output.len() {
                        in_flight.output.push(event.token);
                        in_flight.sink.send(StreamItem::Token(event));
                    }
                }
                StreamItem::Finished(reason) => state.end(id, reason),
            }
        }
        if n_departed > 0 {
            let since = state
                .last_departure_at
                .map_or(oldest, |last| last.max(oldest));
            state.last_departure_at = Some(now);
            drop(state);
            let elapsed = now.saturating_duration_since(since);
            self.shared.departures.note(n_departed, elapsed);
        }
    }
}
