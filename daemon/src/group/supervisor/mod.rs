//! The agent's side of a group: one thread that owns the rank processes, their sockets and the
//! [`Life`], and passes on what handles ask for and what ranks say.
//!
//! The thread sleeps in `poll` on the ranks' sockets and pidfds and on an event that handles raise.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    sync::{Arc, mpsc::SyncSender},
    time::{Duration, Instant},
};

use dsd_proto::wire::group::{
    AgentTick, GroupCancel, GroupEvent, GroupEvents, GroupLoad, GroupStop, GroupTick, RankFailed,
    RankFault, RankReady,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
};
use tracing::{error, info, warn};

use super::{
    CostFile, GroupConfig, GroupError,
    frames::{self, Frame, SocketError},
    handle::{InFlight, Shared, Sign},
    life::{Blame, Cause, Command, Life},
    messages,
    process::RankProcess,
};
use crate::{
    collective::Segment,
    cost::CostModel,
    engine::{self, EngineLimits},
    flow::{FinishReason, StreamItem},
    runtime::clock,
    telemetry::{chain, forward::Delivery},
};

/// Ranks tick twice a second; a group of which one was silent for so long is lost.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// How often ranks are told that their agent is there: a few times within the shortest
/// `engine.agent_timeout_s`, which is 2 s.
const TICK_INTERVAL: Duration = Duration::from_millis(500);
/// What a stop may take beyond the drain before ranks are killed.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Groups that may be lost in a row while they ran a request without a new token before it is given
/// up: it may be what ends them.
const LOSSES_MAX: u32 = 2;
/// Ranks that wait for each other find the one to blame within the step's deadline; the agent steps in
/// so much later.
const STEP_GRACE: Duration = Duration::from_secs(1);

/// The thread's own state.
pub(super) struct Supervisor {
    cfg: GroupConfig,
    shared: Arc<Shared>,
    life: Life,
    ranks: Vec<RankProcess>,
    segment: Option<Segment>,
    /// Keys and values that outlive the ranks, a file for each.
    kept: Vec<File>,
    /// Who waits for the first formation.
    first: Option<SyncSender<Result<EngineLimits, GroupError>>>,
    /// The first formation succeeded.
    has_formed: bool,
    /// What the first group's canary gave, or that of the first group with the weights of now.
    canary_token: Option<u32>,
    /// What the first group had loaded: digests of weights and of text.
    identity: Option<(String, String)>,
    /// What the ranks of this epoch have loaded, where one has said so.
    identity_of_epoch: Option<(String, String)>,
    metrics: Delivery,
    formed_at: Instant,
    ticked_at: Instant,
}

impl Supervisor {
    /// A group that is not formed yet; `first` learns of the first formation.
    pub(super) fn new(
        cfg: GroupConfig,
        shared: Arc<Shared>,
        first: SyncSender<Result<EngineLimits, GroupError>>,
        now: Instant,
    ) -> Self {
        Self {
            life: Life::new(cfg.n_ranks, SILENCE_MAX, now),
            cfg,
            shared,
            ranks: Vec::new(),
            segment: None,
            kept: Vec::new(),
            first: Some(first),
            has_formed: false,
            canary_token: None,
            identity: None,
            identity_of_epoch: None,
            metrics: Delivery::default(),
            formed_at: now,
            ticked_at: now,
        }
    }

    /// Runs until the group is stopped, or cannot be formed a first time.
    pub(super) fn run(&mut self) {
        self.cfg.cost = self.cfg.cost_file.as_ref().and_then(CostFile::load);
        if let Some(cost) = &self.cfg.cost {
            self.shared.lock().cost = cost.clone();
        }
        self.keep_running();
        if let (Some(file), Some(cost)) = (&self.cfg.cost_file, &self.cfg.cost) {
            file.save(cost);
        }
    }

    fn keep_running(&mut self) {
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
            self.tick();
            self.sleep();
            self.hear();
        }
    }

    /// Starts the ranks of an epoch.
    fn form(&mut self, epoch: u64) {
        self.identity_of_epoch = None;
        self.formed_at = clock::now();
        if self.kept.is_empty() && self.cfg.prefix_cache && 0 < self.cfg.kept_bytes_max {
            let file = |_| memfd_create("dsd-kept", MemfdFlags::CLOEXEC).map(File::from);
            let files = (0..self.cfg.n_ranks).map(file).collect::<Result<_, _>>();
            self.kept = files.unwrap_or_else(|e| {
                warn!(error = %io::Error::from(e), "keys and values are not kept for a lost rank");
                Vec::new()
            });
        }
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
                self.blame(0, Cause::Start, chain(&e));
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
        let kept: Vec<PathBuf> = self.kept.iter().map(path_of).collect();
        let ranks = (0..n_ranks)
            .map(|rank| self.cfg.spawn(rank, &path, &kept, epoch))
            .collect::<Result<_, _>>()?;
        Ok((ranks, segment))
    }

    /// Ends the ranks of a lost epoch and puts what ran on them back in line.
    fn lose(&mut self, epoch: u64, blame: &Blame, retry_in: Duration) {
        // Killed and reaped: none of them can touch what the next epoch uses. All are killed before one
        // is waited for, since taking down the memory of each takes a while.
        self.ranks.iter().for_each(RankProcess::kill);
        self.ranks.clear();
        self.segment = None;
        let mut state = self.shared.lock();
        if matches!(blame.cause, Cause::Start | Cause::Identity | Cause::Fault)
            || state.load.canary_wrong
        {
            // What computed wrongly has kept what it computed; what cannot start may be stopped by it.
            self.kept.clear();
        }
        state.is_ready = false;
        let mut given_up = Vec::new();
        for (id, in_flight) in &mut state.in_flight {
            if in_flight.epoch == epoch && in_flight.has_started {
                let n_had = in_flight.output.len() + in_flight.asked.scored_from.unwrap_or(0);
                let n_losses = match in_flight.lost_at {
                    Some((at, n)) if at == n_had => n + 1,
                    _ => 1,
                };
                in_flight.lost_at = Some((n_had, n_losses));
                if LOSSES_MAX <= n_losses {
                    given_up.push(*id);
                }
            }
        }
        for id in &given_up {
            state.end(*id, FinishReason::InsufficientResources);
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
        self.has_formed |= outcome.is_ok();
        if let Some(first) = self.first.take() {
            // The starter waits for this.
            let _ = first.send(outcome);
        }
    }

    /// True when the first formation failed: then there is no second.
    fn has_failed_at_first(&self) -> bool {
        self.first.is_none() && !self.has_formed
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
                let Some(in_flight) = state.in_flight.get_mut(&id) else {
                    continue;
                };
                in_flight.epoch = epoch;
                let message = in_flight.asked.submit(&in_flight.output, now);
                match frames::encode(&message, epoch) {
                    Ok(frame) => frames.push(Ok(frame)),
                    Err(e) => state.end(id, FinishReason::Failed(e.to_string())),
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
        // While some are left, a group that forms again goes on with them.
        let is_done = !is_ready && state.in_flight.is_empty();
        let is_over = stop_at.is_some_and(|at| is_done || at + STOP_GRACE <= now);
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
                    // Both are a few bytes; requests were looked at above.
                    Err(e) => warn!(error = %e, "a message to the engine is too long"),
                }
            }
            if let Err(e) = rank.flush() {
                let what = format!("its socket failed: {e}");
                self.blame(0, Cause::Socket, what);
            }
        }
        false
    }

    /// Tells the ranks that their agent is there, and looks after the step that they are in.
    fn tick(&mut self) {
        let now = clock::now();
        if now.saturating_duration_since(self.ticked_at) < TICK_INTERVAL {
            return;
        }
        self.ticked_at = now;
        let epoch = self.life.epoch();
        let Ok(frame) = frames::encode(&AgentTick {}, epoch) else {
            unreachable!("a tick is a few bytes");
        };
        let mut failed = Vec::new();
        for (rank, process) in self.ranks.iter_mut().enumerate() {
            // One that reads nothing for long has bytes enough.
            if process.outgoing.is_empty() {
                process.outgoing.extend(&frame);
            }
            failed.extend(process.flush().err().map(|e| (rank, e)));
        }
        for (rank, e) in failed {
            self.blame(rank, Cause::Socket, format!("its socket failed: {e}"));
        }
        let Some(sign) = self.shared.lock().signs.first().copied() else {
            return;
        };
        let limit = engine::step_deadline(sign.expected).min(self.cfg.step_timeout) + STEP_GRACE;
        if self.life.is_ready() && sign.step_age(now).is_some_and(|age| limit < age) {
            let what = format!(
                "rank 0 is in a step that should take {:?} and is not over after {limit:?}",
                sign.expected
            );
            self.blame(0, Cause::Late, what);
        }
    }

    /// Sleeps until a rank or a handle has something, or time is up.
    fn sleep(&self) {
        let now = clock::now();
        let mut timeout = self.life.next_timeout().saturating_duration_since(now);
        if let Some(at) = self.shared.lock().stop_at {
            timeout = timeout.min((at + STOP_GRACE).saturating_duration_since(now));
        }
        let next_tick = (self.ticked_at + TICK_INTERVAL).saturating_duration_since(now);
        let timeout = timeout.min(next_tick);
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
                self.blame(rank, Cause::Socket, chain(&e));
            }
            if let Some(how) = ended {
                self.rank_ended(rank, &how);
            }
        }
    }

    fn rank_ended(&mut self, rank: usize, how: &str) {
        let mut state = self.shared.lock();
        if state.stop_at.is_some() && state.in_flight.is_empty() {
            // The first rank ends when it has drained; there is nothing left to wait for.
            state.stop_at = Some(clock::now() - STOP_GRACE);
            return;
        }
        drop(state);
        let what = match &self.segment {
            None => format!("rank {rank} {how}"),
            Some(segment) => format!("rank {rank} {how} at {}", segment.last_site(rank)),
        };
        self.blame(rank, Cause::Ended, what);
    }

    /// Says why this epoch's group is lost.
    fn blame(&mut self, rank: usize, cause: Cause, what: String) {
        let blame = Blame { rank, cause, what };
        self.life.handle_fault(self.life.epoch(), blame);
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
            self.life.handle_sign(epoch, rank, now);
            self.metrics.apply(events.series, &events.metrics);
            if let Some(cost) = CostModel::from_parameters(&events.cost) {
                if let Some(file) = &mut self.cfg.cost_file {
                    file.save_now_and_then(&cost, now);
                }
                self.cfg.cost = Some(cost.clone());
                self.shared.lock().cost = cost;
            }
            self.apply(events.events, events.load, now);
        } else if frame.is::<GroupTick>() {
            let tick = frame.decode::<GroupTick>()?;
            self.life.handle_sign(epoch, rank, now);
            if let Some(sign) = self.shared.lock().signs.get_mut(rank) {
                *sign = Sign {
                    at: now,
                    step_age: tick.step_age_us.map(Duration::from_micros),
                    expected: Duration::from_micros(tick.expected_us),
                };
            }
        } else if frame.is::<RankReady>() {
            let ready = frame.decode::<RankReady>()?;
            self.rank_ready(epoch, rank, &ready, now);
        } else if frame.is::<RankFailed>() {
            let what = frame.decode::<RankFailed>()?.message;
            self.blame(rank, Cause::Start, what);
        } else if frame.is::<RankFault>() {
            let fault = frame.decode::<RankFault>()?;
            let (rank, cause) = match fault.blamed {
                Some(blamed) => (blamed as usize, Cause::Late),
                None => (rank, Cause::Fault),
            };
            self.blame(rank, cause, fault.message);
        } else {
            warn!(
                kind = frame.header.type_id,
                "unexpected message from a rank"
            );
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
        if let Err(what) = self.check_identity(ready) {
            self.blame(rank, Cause::Identity, what);
            return;
        }
        if let Some(limits) = &ready.limits {
            let found = limits.canary_token;
            let expected = *self.canary_token.get_or_insert(found);
            if found != expected {
                let what = format!(
                    "the canary token is {found}, it was {expected} before: the weights or the \
                     processor are damaged"
                );
                self.blame(rank, Cause::Identity, what);
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

    /// Holds what a rank has loaded against what the other ranks and the first group have. Other weights
    /// than the first group's are served, but to nobody who got tokens of those.
    fn check_identity(&mut self, ready: &RankReady) -> Result<(), String> {
        let found = (ready.weights_digest.clone(), ready.text_digest.clone());
        let of_epoch = self.identity_of_epoch.get_or_insert_with(|| found.clone());
        if *of_epoch != found {
            return Err("it has loaded other files than another rank of its group".to_owned());
        }
        let (weights, text) = self.identity.get_or_insert_with(|| found.clone());
        if *text != found.1 {
            // Whoever waits would wait for nothing: no group is formed with what is on disk now.
            self.shared.lock().end_all();
            return Err(
                "configuration or tokenizer changed since the model was loaded; unload and load it again"
                    .to_owned(),
            );
        }
        if *weights == found.0 {
            return Ok(());
        }
        error!(
            model = %self.cfg.model,
            before = %weights,
            now = %found.0,
            "the weights on disk are not those that were loaded before; running streams end"
        );
        *weights = found.0;
        // Its first token is another one, rightly.
        self.canary_token = None;
        let mut state = self.shared.lock();
        let has_begun = state.in_flight.iter().filter(|(_, f)| !f.output.is_empty());
        let ids = has_begun.map(|(id, _)| *id).collect::<Vec<_>>();
        for id in ids {
            state.end(id, FinishReason::InsufficientResources);
        }
        Ok(())
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
        state.stop_is_news = state.stop_at.is_some();
        state.signs = vec![Sign::of_life(clock::now()); self.cfg.n_ranks];
        // In the order of arrival, those that ran before included.
        state.new = state.in_flight.keys().copied().collect();
        let n_resumed = state.new.len();
        let took = clock::now().saturating_duration_since(self.formed_at);
        state.forming_time = took;
        drop(state);
        let took_ms = took.as_millis() as u64;
        let epoch = self.life.epoch();
        info!(model = %self.cfg.model, epoch, took_ms, n_resumed, "group ready");
    }

    /// Hands events to the readers.
    fn apply(&mut self, events: Vec<GroupEvent>, load: GroupLoad, now: Instant) {
        let mut state = self.shared.lock();
        state.load = load;
        state.load_at = now;
        let mut has_served = false;
        for GroupEvent { id, what } in events {
            let Some(in_flight) = state.in_flight.get_mut(&id) else {
                continue;
            };
            let Some(item) = messages::item_of(what) else {
                // Asked again: after a step the engine has dropped what was cancelled before it.
                state.new.push(id);
                continue;
            };
            match item {
                StreamItem::Started { n_cached, at } => {
                    if in_flight.has_started {
                        // Started before, in a lost group: its reader knows.
                        continue;
                    }
                    in_flight.has_started = true;
                    in_flight.sink.send(StreamItem::Started { n_cached, at });
                    state.n_waiting -= 1;
                }
                item @ StreamItem::Prefilled { .. } => {
                    in_flight.sink.send(item);
                }
                StreamItem::Scored { first, scores } => {
                    // Those behind it are asked of the next group.
                    if in_flight.asked.scored_from == Some(first) {
                        in_flight.asked.scored_from = Some(first + scores.len());
                        in_flight.sink.send(StreamItem::Scored { first, scores });
                    }
                }
                StreamItem::Token(event) => {
                    if event.index == in_flight.output.len() {
                        has_served = true;
                        in_flight.output.push(event.token);
                        in_flight.sink.send(StreamItem::Token(event));
                    }
                }
                StreamItem::Finished(reason) => state.end(id, reason),
            }
        }
        drop(state);
        if has_served {
            self.life.handle_token(self.life.epoch());
        }
    }
}

/// Where processes of the same user find it while this one lives.
fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    ))
}

#[cfg(test)]
mod tests;
