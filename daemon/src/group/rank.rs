//! The life of a rank process: told what to be, it loads its part and then follows the first rank,
//! or, being the first, runs the engine for its agent.
//!
//! Invariant: the process does not outlive its agent, from its first instant on: the system kills it
//! when the agent ends, and it ends itself when the agent is silent for too long.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    time::{Duration, Instant},
};

use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuBackend, CpuConfig, Isa},
};
use dsd_proto::wire::group::{
    AgentTick, GroupCancel, GroupEvent, GroupEventKind, GroupEvents, GroupStop, GroupSubmit,
    GroupTick, RankFailed, RankFault, RankReady, RankStart,
};
use rustix::{
    process::{Signal, getpid, getppid, kill_process, set_parent_process_death_signal},
    thread::{CpuSet, sched_setaffinity},
};
use tracing::{info, warn};

use super::{
    frames::{self, Frame, SocketError},
    identity::{Identity, IdentityError, Seen},
    messages,
    outbox::Outbox,
};
use crate::{
    collective::{Collective, Op, Segment, SegmentError, Site},
    cost::CostModel,
    engine::{
        self, EngineConfig, EngineHandle, PostError, StartError, StepError, VocabularySource,
    },
    flow::{EventSink, StreamItem, TokenSink},
    grammar::{GrammarError, Vocabulary},
    runner::{self, Budget, ModelExecutor, StepExecutor, load_cpu, plan_cpu},
    runtime::{clock, thread},
    telemetry::{chain, forward::Collector},
    text::TextModel,
    weights::{Checkpoint, WeightsError},
};

/// How long ranks wait for each other's loading.
const LOAD_LIMIT: Duration = Duration::from_secs(3600);

/// Messages of the agent that wait while the rank loads, at most; it says little before that.
const FRAMES_AHEAD_MAX: usize = 1024;
/// How long the agent may take to say what the rank is to be.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often the agent is told of the cost model.
const COST_INTERVAL: Duration = Duration::from_millis(100);

/// Why a rank process ends before its time.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// The agent's socket is of no use.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Standard input is not a socket of an agent.
    #[error("`dsd rank` is started by a node's agent, with a socket for standard input")]
    NoAgent,
    /// It could not become what it was told to be.
    #[error("rank {rank} cannot be formed")]
    Form {
        /// The rank.
        rank: u32,
        /// Why.
        #[source]
        source: FormError,
    },
    /// The group is lost.
    #[error("the group is lost")]
    Lost(#[source] StepError),
}

/// Why a rank cannot be formed.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Instruction set or type that this build does not know.
    #[error("this processor or build does not have `{0}`")]
    Unknown(String),
    /// It cannot be said what was loaded.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The checkpoint cannot be opened.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// It cannot run here.
    #[error(transparent)]
    Load(#[from] runner::LoadError),
    /// The memory shared with other ranks cannot be used.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// What a lost process of the rank left cannot be read.
    #[error("keys and values that were kept cannot be read")]
    Kept(#[source] io::Error),
    /// Another rank did not arrive.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] StartError),
}

/// Runs this process as the rank that the agent at standard input says.
///
/// # Errors
/// [`RankError`]; the agent was told.
pub fn run(agent_pid: Option<u32>) -> Result<(), RankError> {
    let started = clock::now();
    if !end_with(agent_pid)? {
        // It was gone before this process had begun; there is nobody to tell.
        return Ok(());
    }
    let stdin = io::stdin();
    let socket = stdin
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from)
        .map_err(SocketError::from)?;
    if socket.peer_addr().is_err() {
        return Err(RankError::NoAgent);
    }
    let mut reader = socket.try_clone().map_err(SocketError::from)?;
    // An agent that is frozen before it has said anything would be waited for for ever.
    reader
        .set_read_timeout(Some(START_LIMIT))
        .map_err(SocketError::from)?;
    let Some(frame) = frames::read(&mut reader)? else {
        return Ok(());
    };
    let start = frame.decode::<RankStart>().map_err(SocketError::from)?;
    let agent = Outbox::start(socket, frame.header.epoch.0).map_err(SocketError::from)?;
    let outcome = live(&start, reader, &agent, started);
    if let Err(e) = &outcome {
        match e {
            RankError::Form { source, .. } => agent.send(&RankFailed {
                message: chain(source),
            }),
            RankError::Lost(e) => agent.send(&fault(e)),
            RankError::Socket(_) | RankError::NoAgent => {}
        }
    }
    agent.finish();
    outcome
}

/// Loads, and does the rank's work until its end.
fn live(
    start: &RankStart,
    reader: UnixStream,
    agent: &Outbox,
    started: Instant,
) -> Result<(), RankError> {
    let rank = start.rank;
    let failed = |source: FormError| RankError::Form { rank, source };
    let silence = Duration::from_millis(start.agent_timeout_ms.max(1));
    reader
        .set_read_timeout(Some(silence))
        .map_err(SocketError::from)?;
    // From now on, so that the end of the agent is noticed while this one loads or waits for others.
    let (heard_tx, heard) = mpsc::sync_channel(FRAMES_AHEAD_MAX);
    let is_ending = Arc::new(AtomicBool::new(false));
    let is_listened_to = Arc::new(AtomicBool::new(false));
    let flags = (Arc::clone(&is_ending), Arc::clone(&is_listened_to));
    thread::spawn("dsd-agent", move || {
        watch_agent(reader, &heard_tx, &flags.0, &flags.1)
    })
    .map_err(SocketError::from)?;
    let (executor, identity) = form(start).map_err(failed)?;
    let ready = |limits| RankReady {
        took_ms: started.elapsed().as_millis() as u64,
        disk_bytes_read: disk_bytes_read(),
        limits,
        weights_digest: identity.weights.clone(),
        text_digest: identity.text.clone(),
    };
    if rank == 0 {
        let engine = Engine::start(start, executor, agent, &is_ending).map_err(failed)?;
        let limits =
            messages::limits_message(&engine.handle.limits(), engine.handle.canary_token());
        agent.send(&ready(Some(limits)));
        let handle = Arc::clone(&engine.handle);
        agent
            .start_ticking(move || Some(tick(&handle)))
            .map_err(SocketError::from)?;
        return engine.serve(&heard, agent);
    }
    agent.send(&ready(None));
    let sign = GroupTick {
        step_age_us: None,
        expected_us: 0,
    };
    // `dsd eval` ticks for nobody, and never reads.
    agent
        .start_ticking(move || is_listened_to.load(Ordering::Acquire).then(|| sign.clone()))
        .map_err(SocketError::from)?;
    let outcome = follow(executor);
    is_ending.store(true, Ordering::Release);
    outcome
}

/// Makes the end of the agent this process' end, from its first instant on; false when it has ended.
fn end_with(agent_pid: Option<u32>) -> Result<bool, RankError> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| SocketError::from(io::Error::from(e)))?;
    // An agent that ended before that has left this process to somebody else already.
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get().cast_unsigned());
    Ok(agent_pid.is_none_or(|agent| parent == Some(agent)))
}

fn tick(engine: &EngineHandle) -> GroupTick {
    let (age, expected) = engine.step_age();
    GroupTick {
        step_age_us: age.map(|age| age.as_micros() as u64),
        expected_us: expected.as_micros() as u64,
    }
}

/// Passes on what the agent says, and ends the process with it, or when it was silent for too long:
/// an agent that is frozen holds no streams, and its service manager will start another one.
fn watch_agent(
    mut socket: UnixStream,
    heard: &SyncSender<Frame>,
    is_ending: &AtomicBool,
    is_listened_to: &AtomicBool,
) {
    loop {
        match frames::read(&mut socket) {
            // Who ticks listens for ticks.
            Ok(Some(frame)) if frame.is::<AgentTick>() => {
                is_listened_to.store(true, Ordering::Release);
            }
            // Nobody takes it once the engine has ended; then the process is about to.
            Ok(Some(frame)) => drop(heard.send(frame)),
            Ok(None) if is_ending.load(Ordering::Acquire) => return,
            Ok(None) => die(),
            Err(e) => {
                warn!(error = %e, "the agent is silent or says what cannot be read; the rank ends");
                die();
            }
        }
    }
}

/// There is nobody to answer to and nothing to save.
fn die() {
    let _ = kill_process(getpid(), Signal::KILL);
}

/// Loads this rank's part, says of what, and meets the others.
fn form(start: &RankStart) -> Result<(ModelExecutor<CpuBackend>, Identity), FormError> {
    pin(&start.cpus);
    let isa = Isa::named(&start.isa).ok_or_else(|| FormError::Unknown(start.isa.clone()))?;
    let kv_type = KvType::ALL
        .into_iter()
        .find(|kv_type| kv_type.name() == start.kv_type)
        .ok_or_else(|| FormError::Unknown(start.kv_type.clone()))?;
    let cpu = CpuConfig {
        n_threads: start.n_threads as usize,
        isa,
        activations: match start.int8_activations {
            true => Activations::Int8,
            false => Activations::F32,
        },
        kv_type,
    };
    let budget = Budget {
        kv_bytes_max: start.kv_bytes_max,
        step_tokens_max: start.step_tokens_max as usize,
        step_spans_max: start.step_spans_max as usize,
    };
    let (rank, n_ranks) = (start.rank as usize, start.n_ranks as usize);
    let seen = Seen::look(Path::new(&start.path))?;
    let checkpoint = Checkpoint::reopen(Path::new(&start.path))?;
    // The agent has planned the same and found that it fits.
    let plan = plan_cpu(&checkpoint, cpu, n_ranks, budget, None)?;
    let mut group = match n_ranks {
        0 | 1 => Collective::Solo,
        _ => {
            let segment = Segment::open(Path::new(&start.segment), n_ranks)?;
            let timeout = Duration::from_millis(start.step_timeout_ms);
            Collective::Shm(segment.join(rank, timeout))
        }
    };
    let executor = load_cpu(&checkpoint, cpu, &plan.ranks[rank])?;
    let identity = seen.identity(&checkpoint)?;
    if let Collective::Shm(member) = &mut group {
        let site = Site::outside(Op::Plan);
        member.meet(site, LOAD_LIMIT).map_err(StepError::from)?;
    }
    let mut executor = executor.in_group(group);
    // Without the first rank's nothing is taken over, so that one may do without; another that could not
    // read its own would compute from an empty cache.
    let is_there = || File::open(&start.kept).inspect_err(told_missing).is_ok();
    if !start.kept.is_empty() && (rank != 0 || is_there()) {
        let name = format!("{} {} {}", identity.weights, start.kv_type, start.n_ranks);
        let whose = blake3::hash(name.as_bytes()).into();
        let others: Vec<PathBuf> = start.kept_of_others.iter().map(PathBuf::from).collect();
        let others = (rank == 0).then_some(&others[..]);
        executor = executor
            .keeping(Path::new(&start.kept), whose, others, start.kept_bytes_max)
            .map_err(FormError::Kept)?;
    }
    Ok((executor, identity))
}

fn told_missing(e: &io::Error) {
    warn!(error = %e, "keys and values are not kept for a lost rank");
}

/// Keeps the process, and all threads it will start, on these cores.
fn pin(cpus: &[u32]) {
    if cpus.is_empty() {
        return;
    }
    let mut set = CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| (**cpu as usize) < CpuSet::MAX_CPU) {
        set.set(*cpu as usize);
    }
    if let Err(e) = sched_setaffinity(None, &set) {
        warn!(?cpus, error = %e, "cannot pin the rank to its cores");
    }
}

fn follow(mut executor: ModelExecutor<CpuBackend>) -> Result<(), RankError> {
    executor.follow().map_err(RankError::Lost)
}

fn fault(error: &StepError) -> RankFault {
    RankFault {
        blamed: match error {
            StepError::Missing(missing) => Some(missing.rank as u32),
            StepError::PlanTooLarge { .. }
            | StepError::BadPlan { .. }
            | StepError::NotFinite { .. } => None,
        },
        message: error.to_string(),
    }
}

/// Events that the next report carries, with when they came.
#[derive(Debug, Clone, Default)]
struct Events(Arc<Mutex<Vec<(Instant, GroupEvent)>>>);

impl Events {
    fn push(&self, event: GroupEvent) {
        self.lock().push((clock::now(), event));
    }

    fn take(&self) -> Vec<GroupEvent> {
        let events = std::mem::take(&mut *self.lock());
        let now = clock::now();
        let aged = |(came_at, mut event): (Instant, GroupEvent)| {
            // A report follows a step, which may take seconds: the step must not count as a wait for it.
            if let GroupEventKind::Started(start) = &mut event.what {
                let held = now.saturating_duration_since(came_at);
                start.age_us += held.as_micros() as u64;
            }
            event
        };
        events.into_iter().map(aged).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, GroupEvent)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's events on their way to the agent.
struct RemoteSink {
    id: u64,
    events: Events,
    is_cancelled: Arc<AtomicBool>,
}

impl EventSink for RemoteSink {
    fn send(&self, item: StreamItem) -> bool {
        let what = messages::event_of(item);
        self.events.push(GroupEvent { id: self.id, what });
        !self.is_cancelled()
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }
}

/// The first rank's engine.
struct Engine {
    handle: Arc<EngineHandle>,
    events: Events,
    /// Set when the engine has told its agent why it ends.
    lost: Arc<Mutex<Option<StepError>>>,
    /// Set when the end of the socket is no end of the agent.
    is_ending: Arc<AtomicBool>,
}

impl Engine {
    fn start(
        start: &RankStart,
        executor: ModelExecutor<CpuBackend>,
        agent: &Outbox,
        is_ending: &Arc<AtomicBool>,
    ) -> Result<Self, FormError> {
        let metrics = Collector::default();
        if let Err(e) = metrics.install() {
            warn!(error = %e, "the rank's metrics go nowhere");
        }
        let mut cfg = EngineConfig::for_executor(&start.model, &executor.limits());
        cfg.waiting_max = start.waiting_max as usize;
        cfg.prefix_cache = start.prefix_cache;
        cfg.sampleable_len = start.sampleable_len as usize;
        cfg.step_target = Duration::from_micros(start.step_target_us);
        cfg.cost = CostModel::from_parameters(&start.cost);
        cfg.drain_limit = Duration::from_millis(start.drain_limit_ms);
        let path = PathBuf::from(&start.path);
        cfg.vocabulary = Some(VocabularySource::new(move || {
            let text = TextModel::open(&path)
                .map_err(|e| GrammarError::Vocabulary { problem: chain(&e) })?;
            Vocabulary::new(&text)
        }));
        let events = Events::default();
        let lost = Arc::<Mutex<Option<StepError>>>::default();
        let outlet = {
            let (agent, events) = (agent.clone(), events.clone());
            let mut sent_at: Option<Instant> = None;
            Box::new(move |load: &engine::EngineLoad, cost: &CostModel| {
                let (series, metrics) = metrics.take();
                let now = clock::now();
                let is_due = |at| COST_INTERVAL <= now.saturating_duration_since(at);
                let cost = match sent_at.is_none_or(is_due) {
                    true => {
                        sent_at = Some(now);
                        cost.parameters()
                    }
                    false => Vec::new(),
                };
                agent.send(&GroupEvents {
                    events: events.take(),
                    load: messages::load_message(load),
                    cost,
                    series,
                    metrics,
                });
            })
        };
        let on_fatal = {
            let (agent, lost) = (agent.clone(), Arc::clone(&lost));
            let is_ending = Arc::clone(is_ending);
            move |e: StepError| {
                // Before the outbox is closed.
                agent.send(&fault(&e));
                is_ending.store(true, Ordering::Release);
                *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                agent.close();
            }
        };
        let handle = engine::start_reporting(Box::new(executor), cfg, outlet, on_fatal)?;
        Ok(Self {
            handle: Arc::new(handle),
            events,
            lost,
            is_ending: Arc::clone(is_ending),
        })
    }

    /// Does what the agent says until it says stop, or until the group is lost.
    fn serve(self, heard: &Receiver<Frame>, agent: &Outbox) -> Result<(), RankError> {
        let mut running = Running::default();
        // Ends when the outbox is closed and wakes the thread that reads.
        while let Ok(frame) = heard.recv() {
            self.obey(&frame, &mut running, agent)?;
        }
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        match lost.clone() {
            Some(e) => Err(RankError::Lost(e)),
            None => Ok(()),
        }
    }

    fn obey(
        &self,
        frame: &Frame,
        running: &mut Running,
        agent: &Outbox,
    ) -> Result<(), SocketError> {
        if frame.is::<GroupSubmit>() {
            let message = frame.decode::<GroupSubmit>()?;
            self.submit(message, running, clock::now());
        } else if frame.is::<GroupCancel>() {
            running.cancel(frame.decode::<GroupCancel>()?.id);
        } else if frame.is::<GroupStop>() {
            let drain = Duration::from_millis(frame.decode::<GroupStop>()?.drain_ms);
            let (handle, agent) = (Arc::clone(&self.handle), agent.clone());
            let is_ending = Arc::clone(&self.is_ending);
            // A second stop can shorten the first, so this thread goes on reading.
            thread::spawn("dsd-stop", move || {
                handle.stop(drain);
                is_ending.store(true, Ordering::Release);
                agent.close();
            })?;
        } else {
            warn!(
                kind = frame.header.type_id,
                "unexpected message from the agent"
            );
        }
        Ok(())
    }

    fn submit(&self, message: GroupSubmit, running: &mut Running, now: Instant) {
        let id = message.id;
        let is_cancelled = running.add(id);
        let sink = TokenSink::to(Arc::new(RemoteSink {
            id,
            events: self.events.clone(),
            is_cancelled,
        }));
        if let Err(e) = self.handle.post(messages::request(message, now, sink)) {
            // The agent counts what waits, but not what left since the engine's last step. A stopping
            // engine ends what it took, and this was not.
            info!(request = id, error = %e, "request not taken by the engine");
            let what = match e {
                PostError::QueueFull { .. } => GroupEventKind::NoRoom,
                PostError::Stopping | PostError::Dead => GroupEventKind::Stopped,
            };
            self.events.push(GroupEvent { id, what });
        }
    }
}

/// The cancel flags of requests that may still run.
#[derive(Debug, Default)]
struct Running(std::collections::HashMap<u64, std::sync::Weak<AtomicBool>>);

/// Entries from which ended requests are swept out.
const SWEEP_AT: usize = 1024;

impl Running {
    fn add(&mut self, id: u64) -> Arc<AtomicBool> {
        if self.0.len() >= SWEEP_AT {
            self.0.retain(|_, flag| flag.strong_count() > 0);
        }
        let flag = Arc::new(AtomicBool::new(false));
        self.0.insert(id, Arc::downgrade(&flag));
        flag
    }

    fn cancel(&mut self, id: u64) {
        if let Some(flag) = self.0.remove(&id).and_then(|flag| flag.upgrade()) {
            flag.store(true, Ordering::Release);
        }
    }
}

/// Bytes this process read from storage so far (`/proc/self/io`).
fn disk_bytes_read() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("read_bytes:"));
    line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
}
