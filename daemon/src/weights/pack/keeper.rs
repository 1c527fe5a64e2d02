//! Keeps a pack's pages in memory and looks after their bits.
//!
//! One thread of low priority per pack: locks the pages, so that whoever maps them again reads
//! nothing from disk; then reads all tensors at a bounded rate, compares them with the manifest, and
//! does so again at intervals. Reads the pages that compute, through the file and not the mapping, so it
//! sees damage in memory, and on disk once pages come from there, and survives a file that is cut
//! off.
//!
//! Called by whoever serves a pack; stops when dropped.

use std::{
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit};
use tracing::{error, info, warn};

use super::{super::mmap, Pack, rank::Damage, spans};
use crate::runtime::{clock, thread};

/// Bytes locked between two looks at the stop signal.
const LOCK_BYTES: usize = 64 << 20;
/// The nicest there is: the scrub takes only time that nobody wants.
const NICE: i32 = 19;

/// How a pack is looked after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeeperConfig {
    /// From the end of one scrub to the start of the next.
    pub scrub_interval: Duration,
    /// Bytes hashed per second at most.
    pub scrub_bytes_per_s: u64,
}

/// The thread of a pack.
#[derive(Debug)]
pub struct PackKeeper {
    health: Arc<Mutex<PackHealth>>,
    /// Dropped to stop the thread.
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What a keeper knows about its pack.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackHealth {
    /// Bytes that stay in memory.
    pub locked_bytes: u64,
    /// Scrubs to the end.
    pub n_scrubs: u64,
    /// Tensors that are not what was packed.
    pub damaged: Vec<DamagedTensor>,
}

/// A tensor with wrong bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedTensor {
    /// The rank's file.
    pub file: PathBuf,
    /// The tensor.
    pub tensor: String,
}

impl PackKeeper {
    /// Starts to look after the pack that `model` is served from.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(model: &str, pack: Arc<Pack>, config: KeeperConfig) -> io::Result<Self> {
        let health = Arc::default();
        let (stop, stopped) = sync_channel(0);
        let thread = Thread {
            model: model.to_owned(),
            pack,
            config,
            health: Arc::clone(&health),
            stopped,
        };
        Ok(Self {
            health,
            stop: Some(stop),
            thread: Some(thread::spawn("pack-keeper", move || thread.run())?),
        })
    }

    /// What is known now.
    pub fn health(&self) -> PackHealth {
        held(&self.health).clone()
    }
}

impl Drop for PackKeeper {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the keeper of a pack broke off");
        }
    }
}

fn held(health: &Mutex<PackHealth>) -> std::sync::MutexGuard<'_, PackHealth> {
    health.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Thread {
    model: String,
    pack: Arc<Pack>,
    config: KeeperConfig,
    health: Arc<Mutex<PackHealth>>,
    stopped: Receiver<()>,
}

/// The keeper was dropped.
struct Stopped;

impl Thread {
    fn run(&self) {
        // Per thread on Linux; refused nowhere, and the rate bounds the scrub anyway.
        let _ = setpriority_process(Some(rustix::thread::gettid()), NICE);
        let _: Result<(), Stopped> = self.keep();
    }

    fn keep(&self) -> Result<(), Stopped> {
        self.lock()?;
        loop {
            self.scrub()?;
            self.wait(self.config.scrub_interval)?;
        }
    }

    /// Sleeps, unless the keeper is dropped.
    fn wait(&self, duration: Duration) -> Result<(), Stopped> {
        match self.stopped.recv_timeout(duration) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Err(Stopped),
        }
    }

    fn lock(&self) -> Result<(), Stopped> {
        raise_lock_limit();
        let started = clock::now();
        let mut locked = 0;
        for rank in &self.pack.ranks {
            let mapping = rank.mapping();
            for range in slices(mapping.len(), LOCK_BYTES) {
                self.wait(Duration::ZERO)?;
                let n_bytes = range.len() as u64;
                if let Err(e) = mmap::lock(&mapping[range]) {
                    warn!(
                        model = self.model,
                        pack = %self.pack.folder.display(),
                        locked,
                        bytes = self.pack.files().map(|(_, bytes)| bytes).sum::<u64>(),
                        error = %e,
                        "the pack cannot be locked into memory and may be read from disk again; \
                         start dsd with LimitMEMLOCK=infinity (ulimit -l unlimited)"
                    );
                    self.pack
                        .ranks
                        .iter()
                        .for_each(|r| mmap::will_need(r.mapping()));
                    return Ok(());
                }
                locked += n_bytes;
                held(&self.health).locked_bytes = locked;
                self.gauge("dsd_pack_locked_bytes", locked);
            }
        }
        info!(
            model = self.model,
            bytes = locked,
            took_ms = started.elapsed().as_millis(),
            "pack locked into memory"
        );
        Ok(())
    }

    fn scrub(&self) -> Result<(), Stopped> {
        let started = clock::now();
        let mut bytes_done = 0u64;
        let mut damaged = Vec::new();
        for (rank, file) in self.pack.ranks.iter().zip(&self.pack.manifest.ranks) {
            for (tensor, span) in spans(file) {
                let (_, damage) = rank.look_at(span, &mut |n_bytes| {
                    bytes_done += n_bytes as u64;
                    let due_s = bytes_done as f64 / self.config.scrub_bytes_per_s.max(1) as f64;
                    let due = started + Duration::from_secs_f64(due_s);
                    self.wait(due.saturating_duration_since(clock::now()))
                })?;
                if let Some(Damage { expected, found }) = damage {
                    let file = rank.path().to_owned();
                    damaged.push(DamagedTensor { file, tensor });
                    self.report(damaged.last(), &expected, &found, damaged.len());
                }
            }
        }
        self.gauge("dsd_pack_damaged_tensors", damaged.len() as u64);
        metrics::counter!("dsd_pack_scrubs_total", "model" => self.model.clone()).increment(1);
        let n_damaged = damaged.len();
        let n_scrubs = {
            let mut health = held(&self.health);
            health.damaged = damaged;
            health.n_scrubs += 1;
            health.n_scrubs
        };
        info!(
            model = self.model,
            bytes = bytes_done,
            n_damaged,
            n_scrubs,
            took_ms = started.elapsed().as_millis(),
            "pack scrubbed"
        );
        Ok(())
    }

    /// Tells about a damaged tensor at once, unless it is known from an earlier scrub.
    fn report(&self, tensor: Option<&DamagedTensor>, expected: &str, found: &str, n: usize) {
        let Some(damage) = tensor else { return };
        {
            let mut health = held(&self.health);
            if health.damaged.contains(damage) {
                return;
            }
            health.damaged.push(damage.clone());
        }
        self.gauge("dsd_pack_damaged_tensors", n as u64);
        error!(
            model = self.model,
            file = %damage.file.display(),
            tensor = damage.tensor,
            expected,
            found,
            "a tensor of the pack is damaged; pack the checkpoint again and load the model anew"
        );
    }

    fn gauge(&self, name: &'static str, value: u64) {
        metrics::gauge!(name, "model" => self.model.clone()).set(value as f64);
    }
}

/// As much locked memory as this process may allow itself.
fn raise_lock_limit() {
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    if setrlimit(Resource::Memlock, unlimited).is_ok() {
        return;
    }
    let maximum = getrlimit(Resource::Memlock).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    // What is refused here shows when pages are locked.
    let _ = setrlimit(Resource::Memlock, all);
}

fn slices(len: usize, slice_len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(slice_len)
        .map(move |start| start..len.min(start + slice_len))
}
