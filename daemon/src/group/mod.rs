//! A replica as a group of rank processes: started, watched, blamed and formed again.
//!
//! The agent's side is a thread per group ([`supervisor`]) that owns the processes and their sockets
//! and follows a pure state machine ([`life`]). The other side is a process per rank ([`rank`]): the
//! first holds the engine, all hold their part of the weights and the cache.
//!
//! Knows no HTTP, text or catalog.
//!
//! Invariant: a request that was taken gets exactly one end, whatever becomes of ranks: when a group
//! is lost, the next one goes on with it behind the tokens that came out, and by batch invariance
//! and counter-based sampling the rest is the same as it would have been. One that was running in
//! two groups that were lost before another token came out is given up, since it may be what ends them.
//! Invariant: no rank outlives its agent or its epoch.
//!
//! Called by replica and, for its followers, by eval.

mod cost_file;
mod frames;
mod life;
mod messages;
mod process;
mod handle;
mod identity;
mod outbox;
mod supervisor;
pub mod rank;

/// How long a step may take, for those who configure a group.
pub use crate::engine::STEP_TARGET_CPU;
pub use cost_file::CostFile;
pub use frames::SocketError;
pub use handle::{GroupHandle, GroupState, PostError};

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use dsd_kernels::{backend::Activations, cpu::CpuConfig};
use dsd_proto::wire::group::RankStart;
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::{
    collective::{Collective, Op, Segment, SegmentError, Site},
    config::LogConfig,
    cost::CostModel,
    runner::{Budget, StepError},
    runtime::thread,
};
use process::RankProcess;

/// What a group is made of.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// The `dsd` program that runs as the ranks.
    pub program: PathBuf,
    /// How ranks log.
    pub log: LogConfig,
    /// The model's name, for logs and metrics.
    pub model: String,
    /// Checkpoint folder, GGUF file or pack.
    pub path: PathBuf,
    /// Ranks.
    pub n_ranks: usize,
    /// How each rank computes.
    pub cpu: CpuConfig,
    /// Memory of all ranks together.
    pub budget: Budget,
    /// How long a rank may be late in a step before it is lost, at most.
    pub step_timeout: Duration,
    /// How long the agent may be silent before its ranks end.
    pub agent_timeout: Duration,
    /// How long a step may take by prediction.
    pub step_target: Duration,
    /// What is known of step times.
    pub cost: Option<CostModel>,
    /// Where that is kept.
    pub cost_file: Option<CostFile>,
    /// Requests that the engine has room for beside those that run.
    pub waiting_max: usize,
    /// Keep blocks for prompts that begin alike.
    pub prefix_cache: bool,
    /// Token ids from here on are never chosen.
    pub sampleable_len: usize,
    /// How long requests may go on after the last handle was dropped without a stop.
    pub drain_limit: Duration,
    /// Bytes of keys and values, of each rank, that outlive its process; 0: none.
    pub kept_bytes_max: u64,
}

/// Why a group was not formed.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The system refused memory.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The system refused a process, a thread or a socket.
    #[error("cannot start the ranks")]
    Start(#[source] io::Error),
    /// A rank ended before the group was ready.
    #[error("rank {rank}: {what}")]
    Rank {
        /// The rank.
        rank: usize,
        /// What it said or how it ended.
        what: String,
    },
}

/// The program of the running process: what its ranks run, too.
pub fn this_program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

impl GroupConfig {
    /// What rank `rank` is told. Beside those that wait, the engine has room for those that ran in a
    /// lost group.
    fn start(&self, rank: usize, segment: &Path, kept: &[PathBuf]) -> RankStart {
        let n_running = self.budget.step_spans_max;
        let told = |path: &PathBuf| path.display().to_string();
        RankStart {
            rank: rank as u32,
            n_ranks: self.n_ranks as u32,
            model: self.model.clone(),
            path: self.path.display().to_string(),
            segment: segment.display().to_string(),
            kept: kept.get(rank).map(told).unwrap_or_default(),
            kept_of_others: match rank {
                0 => kept.iter().skip(1).map(told).collect(),
                _ => Vec::new(),
            },
            kept_bytes_max: self.kept_bytes_max,
            step_timeout_ms: self.step_timeout.as_millis() as u64,
            agent_timeout_ms: self.agent_timeout.as_millis() as u64,
            n_threads: self.cpu.n_threads as u32,
            isa: self.cpu.isa.name().to_owned(),
            int8_activations: self.cpu.activations == Activations::Int8,
            kv_type: self.cpu.kv_type.name().to_owned(),
            kv_bytes_max: self.budget.kv_bytes_max,
            step_tokens_max: self.budget.step_tokens_max as u32,
            step_spans_max: n_running as u32,
            step_target_us: self.step_target.as_micros() as u64,
            cost: self
                .cost
                .as_ref()
                .map_or_else(Vec::new, CostModel::parameters),
            waiting_max: (self.waiting_max + n_running) as u32,
            prefix_cache: self.prefix_cache,
            sampleable_len: self.sampleable_len as u32,
            drain_limit_ms: self.drain_limit.as_millis() as u64,
            cpus: cpus_of(rank, self.n_ranks),
        }
    }

    fn spawn(
        &self,
        rank: usize,
        segment: &Path,
        kept: &[PathBuf],
        epoch: u64,
    ) -> Result<RankProcess, GroupError> {
        let start = self.start(rank, segment, kept);
        RankProcess::spawn(&self.program, &self.log, &start, epoch).map_err(GroupError::Start)
    }
}

/// The cores of one rank among those this process may use: neighbours, an even share. None for a
/// group of one, which has all of them, and where there are fewer cores than ranks.
fn cpus_of(rank: usize, n_ranks: usize) -> Vec<u32> {
    let Ok(allowed) = sched_getaffinity(None) else {
        return Vec::new();
    };
    let cpus = (0..CpuSet::MAX_CPU)
        .filter(|cpu| allowed.is_set(*cpu))
        .filter_map(|cpu| u32::try_from(cpu).ok())
        .collect::<Vec<_>>();
    if n_ranks == 1 || cpus.len() < n_ranks {
        return Vec::new();
    }
    let n = cpus.len();
    cpus[n * rank / n_ranks..n * (rank + 1) / n_ranks].to_vec()
}

/// The other ranks of a group whose first rank is this process, which runs no engine. They end when
/// this is dropped, which waits for it and kills those that do not.
#[derive(Debug)]
pub struct Followers {
    sockets: Vec<std::os::unix::net::UnixStream>,
    watchers: Vec<std::thread::JoinHandle<()>>,
}

impl Followers {
    /// Starts ranks `1..n_ranks` and returns this process' end of the group.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn start(cfg: &GroupConfig) -> Result<(Collective, Self), GroupError> {
        if cfg.n_ranks < 2 {
            let none = Self {
                sockets: Vec::new(),
                watchers: Vec::new(),
            };
            return Ok((Collective::Solo, none));
        }
        let segment = Segment::create(cfg.n_ranks)?;
        let path = segment.path();
        let (mut sockets, mut watchers) = (Vec::new(), Vec::new());
        for rank in 1..cfg.n_ranks {
            let process = cfg.spawn(rank, &path, &[], 1)?;
            sockets.push(process.socket.try_clone().map_err(GroupError::Start)?);
            let segment = segment.clone();
            let watch = move || watch_follower(rank, process, &segment);
            let watcher = thread::spawn("dsd-follower", watch).map_err(GroupError::Start)?;
            watchers.push(watcher);
        }
        let member = segment.join(0, cfg.step_timeout);
        Ok((Collective::Shm(member), Self { sockets, watchers }))
    }

    /// Waits until all ranks are loaded; `group` is what [`Followers::start`] gave.
    ///
    /// # Errors
    /// [`StepError::Missing`] when one died.
    pub fn meet(group: &mut Collective) -> Result<(), StepError> {
        const LOAD_LIMIT: Duration = Duration::from_secs(3600);
        match group {
            Collective::Solo => Ok(()),
            Collective::Shm(member) => Ok(member.meet(Site::outside(Op::Plan), LOAD_LIMIT)?),
        }
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        for socket in &self.sockets {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        // Whoever asks the system what this program used is then told of all ranks.
        for watcher in self.watchers.drain(..) {
            let _ = watcher.join();
        }
    }
}

/// Tells the others when a follower has ended. One whose socket is closed, on either side, has a while
/// to end by itself and is killed then.
fn watch_follower(rank: usize, process: RankProcess, segment: &Segment) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    const END_LIMIT: Timespec = Timespec {
        tv_sec: 5,
        tv_nsec: 0,
    };
    let pidfd = process.pidfd();
    let mut either = [
        PollFd::new(&pidfd, PollFlags::IN),
        PollFd::new(&process.socket, PollFlags::empty()),
    ];
    while either.iter().all(|fd| fd.revents().is_empty()) {
        let _ = poll(&mut either, None);
    }
    let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&END_LIMIT));
    drop(process);
    segment.mark_dead(rank);
}
