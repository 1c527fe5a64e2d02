//! The step loop: drain mailbox, plan, execute, sample, emit.
//!
//! One named thread owns everything: executor, scheduler, sampler memory and the sinks. The only
//! way in is [`EngineHandle`]; the only ways out are the sinks that requests bring along and the
//! counters in [`EngineLoad`]. Knows no text, HTTP or model.
//!
//! Invariant: every request that [`EngineHandle::post`] took gets exactly one end, unless its
//! reader left or the thread panicked, which is logged once and shows as [`EngineLoad::is_dead`].
//! Invariant: a reader that left costs no further step; a waiting one costs none at all.
//! Invariant: a token comes out at least every canary interval as long as the executor works,
//! because a reserved request with reserved blocks runs whenever the engine was silent for so long.
//!
//! Called by replica.

mod calibration;
mod canary;
mod compiler;
mod config;
#[cfg(test)]
pub(crate) mod fake;
mod meter;
mod shared;
mod step_loop;

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::Ordering,
        mpsc::{self, SyncSender, TrySendError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    cost::CostModel,
    flow::{FinishReason, Request, StreamItem},
    grammar::Constraint,
    runtime::{clock, thread},
};

/// What a caller brings to an engine, so that it needs no arrow of its own to the runner.
pub use crate::runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan};
use compiler::Compiler;
pub use compiler::VocabularySource;
pub use config::{ConfigError, EngineConfig, EngineLimits, STEP_TARGET_CPU};
pub use shared::EngineLoad;
use shared::Shared;
use step_loop::StepLoop;
pub use step_loop::step_deadline;

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Configuration and executor do not fit each other.
    #[error("the engine configuration does not fit the executor")]
    Config(#[from] ConfigError),
    /// The system refused a thread.
    #[error("cannot start the engine thread")]
    Thread(#[source] io::Error),
    /// The first canary's step failed: the executor does not work.
    #[error("the first canary step failed")]
    Canary(#[source] StepError),
    /// The engine thread ended before its first token.
    #[error("the engine thread ended before its first token")]
    Died,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// As many requests as may wait do.
    #[error("{waiting} requests wait already, the limit is {max}")]
    QueueFull {
        /// Requests waiting, those still in the mailbox included.
        waiting: usize,
        /// The limit.
        max: usize,
    },
    /// The engine is stopping.
    #[error("the engine is stopping")]
    Stopping,
    /// The engine's thread panicked.
    #[error("the engine is dead")]
    Dead,
}

/// The only way to an engine. Dropping it lets what was taken finish, for at most the configured
/// drain limit, and joins the thread; [`EngineHandle::stop`] says how long to wait.
#[derive(Debug)]
pub struct EngineHandle {
    mailbox: Arc<Mailbox>,
    /// Started by the first request with a grammar; `None` inside once the engine stops.
    compiler: Mutex<Option<Compiler>>,
    vocabulary: Option<VocabularySource>,
    shared: Arc<Shared>,
    limits: EngineLimits,
    canary_token: u32,
    drain_limit: Duration,
    /// Held while joining, so that every caller of `stop` returns after the thread has ended.
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A request on its way to the engine thread.
#[derive(Debug)]
struct Arrival {
    request: Request,
    /// Of a request with a grammar.
    constraint: Option<Constraint>,
    submitted_at: Instant,
}

/// Where requests come in. The sender is taken out when the engine stops, so that no request can slip
/// in behind its last look. Whoever sends holds the lock for one message and never waits.
#[derive(Debug)]
struct Mailbox(RwLock<Option<SyncSender<Arrival>>>);

impl Mailbox {
    /// Gives the request back when the engine is stopping or dead, or there is no room.
    fn send(&self, arrival: Arrival) -> Result<(), Box<Arrival>> {
        let tx = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(tx) = tx.as_ref() else {
            return Err(Box::new(arrival));
        };
        tx.try_send(arrival).map_err(|e| match e {
            TrySendError::Full(arrival) | TrySendError::Disconnected(arrival) => Box::new(arrival),
        })
    }

    fn is_open(&self) -> bool {
        let tx = self.0.read().unwrap_or_else(PoisonError::into_inner);
        tx.is_some()
    }

    fn close(&self) {
        let mut tx = self.0.write().unwrap_or_else(PoisonError::into_inner);
        tx.take();
    }
}

/// Called on the engine's thread after every turn of its loop, behind the events of the turn.
pub type Outlet = Box<dyn FnMut(&EngineLoad, &CostModel) + Send>;

/// Starts an engine and waits for its first canary token.
///
/// # Errors
/// [`StartError`]; no thread is left behind.
pub fn start(
    executor: Box<dyn StepExecutor>,
    cfg: EngineConfig,
) -> Result<EngineHandle, StartError> {
    start_reporting(executor, cfg, Box::new(|_, _| {}), |_| {})
}

/// [`start`], with somebody who is told what comes of every turn, and of an executor that is of no
/// use any more: then the requests taken get no end.
///
/// # Errors
/// [`StartError`]; no thread is left behind.
pub fn start_reporting(
    executor: Box<dyn StepExecutor>,
    cfg: EngineConfig,
    outlet: Outlet,
    on_fatal: impl FnOnce(StepError) + Send + 'static,
) -> Result<EngineHandle, StartError> {
    let limits = cfg.limits(&executor.limits())?;
    let shared = Arc::new(Shared::new(clock::now(), &limits));
    // Messages in the mailbox are counted among those that wait, so it never fills before they do.
    let (tx, rx) = mpsc::sync_channel(limits.waiting_max);
    let drain_limit = cfg.drain_limit;
    let vocabulary = cfg.vocabulary.clone();
    let (ready_tx, ready_rx) = mpsc::sync_channel(1);
    let obituary = Obituary {
        model: cfg.model.clone(),
        shared: Arc::clone(&shared),
    };
    let mut step_loop = StepLoop::new(executor, cfg, limits, Arc::clone(&shared), rx, outlet);
    let is_dead = Arc::clone(&shared);
    let body = move || {
        // Dropped before the loop and its sinks: who misses an end finds the reason.
        let _obituary = obituary;
        let first = step_loop
            .calibrate()
            .and_then(|()| step_loop.run_all_canary());
        let is_ready = first.is_ok();
        let token = step_loop.canary_token().unwrap_or_default();
        // The starter waits for this, so the send cannot block or fail.
        let _ = ready_tx.send(first.map(|()| token));
        if is_ready && let Err(fatal) = step_loop.run() {
            is_dead.is_dead.store(true, Ordering::Release);
            on_fatal(fatal);
        }
    };
    let handle = thread::spawn("dsd-engine", body).map_err(StartError::Thread)?;
    match ready_rx.recv() {
        Ok(Ok(canary_token)) => Ok(EngineHandle {
            mailbox: Arc::new(Mailbox(RwLock::new(Some(tx)))),
            compiler: Mutex::new(None),
            vocabulary,
            shared,
            limits,
            canary_token,
            drain_limit,
            thread: Mutex::new(Some(handle)),
        }),
        Ok(Err(e)) => {
            join(handle);
            Err(StartError::Canary(e))
        }
        Err(mpsc::RecvError) => {
            join(handle);
            Err(StartError::Died)
        }
    }
}

impl EngineHandle {
    /// Hands a request over without blocking. The request's sink gets its tokens and one end.
    ///
    /// # Errors
    /// [`PostError`]; the sink is dropped unused.
    pub fn post(&self, request: Request) -> Result<(), PostError> {
        if !self.mailbox.is_open() {
            return Err(PostError::Stopping);
        }
        // First, because a dead engine releases no places and would look full for ever.
        if self.shared.is_dead.load(Ordering::Acquire) {
            return Err(PostError::Dead);
        }
        let max = self.limits.waiting_max;
        let full = |waiting| PostError::QueueFull { waiting, max };
        self.shared.reserve_place(max).map_err(full)?;
        let has_grammar = request.grammar.is_some();
        let arrival = Arrival {
            request,
            constraint: None,
            submitted_at: clock::now(),
        };
        let sent = match has_grammar {
            true => self.compile(arrival),
            false => self.mailbox.send(arrival),
        };
        sent.map_err(|_| {
            self.shared.release_place();
            match self.mailbox.is_open() {
                // It has room for all that may wait, so only a panic can have taken the receiver.
                true => PostError::Dead,
                false => PostError::Stopping,
            }
        })
    }

    /// Sends a request to the engine by way of the compiler.
    fn compile(&self, arrival: Arrival) -> Result<(), Box<Arrival>> {
        let mut compiler = self.compiler.lock().unwrap_or_else(PoisonError::into_inner);
        if compiler.is_none()
            && let Some(source) = &self.vocabulary
            && self.mailbox.is_open()
        {
            let (mailbox, shared) = (Arc::clone(&self.mailbox), Arc::clone(&self.shared));
            match Compiler::start(source.clone(), mailbox, shared, self.limits.waiting_max) {
                Ok(started) => *compiler = Some(started),
                Err(e) => tracing::error!(error = %e, "no thread for grammars"),
            }
        }
        match compiler.as_ref() {
            Some(compiler) => compiler.send(arrival),
            None => {
                let reason = "this engine knows no grammars".to_owned();
                self.shared.release_place();
                let failed = StreamItem::Finished(FinishReason::Failed(reason));
                arrival.request.sink.send(failed);
                Ok(())
            }
        }
    }

    /// Takes no more requests, lets those taken go on for at most `drain`, ends the rest with
    /// `Stopped`, and returns when the thread is gone. Blocks: not for an async worker. A second
    /// call can only shorten the drain.
    pub fn stop(&self, drain: Duration) {
        self.shared.shorten_drain(clock::now(), drain);
        // The engine sees a closed mailbox once it has emptied it.
        self.mailbox.close();
        let mut compiler = self.compiler.lock().unwrap_or_else(PoisonError::into_inner);
        drop(compiler.take());
        drop(compiler);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = thread.take() {
            join(handle);
        }
    }

    /// Counters as of the last step.
    pub fn load(&self) -> EngineLoad {
        self.shared.load(clock::now())
    }

    /// How long the step under way has been, `None` when there is none, and how long it was expected
    /// to take.
    pub fn step_age(&self) -> (Option<Duration>, Duration) {
        self.shared.step_age(clock::now())
    }

    /// What is known of step times.
    pub fn cost(&self) -> CostModel {
        self.shared.cost()
    }

    /// The token that the canary gave first.
    pub fn canary_token(&self) -> u32 {
        self.canary_token
    }

    /// What the engine takes.
    pub fn limits(&self) -> EngineLimits {
        self.limits
    }
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        self.stop(self.drain_limit);
    }
}

/// Lives on the engine's thread and says so when a panic ends it.
struct Obituary {
    model: String,
    shared: Arc<Shared>,
}

impl Drop for Obituary {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.is_dead.store(true, Ordering::Release);
            tracing::error!(model = %self.model, "the engine thread panicked");
        }
    }
}

fn join(handle: JoinHandle<()>) {
    // The thread itself has logged its panic.
    drop(handle.join());
}
