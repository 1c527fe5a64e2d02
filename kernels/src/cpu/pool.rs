//! A few threads that share out numbered pieces of work.
//!
//! The caller works too. Idle threads spin briefly (a step has hundreds of short parts), then sleep,
//! so that another program on the core is not starved. Nothing is locked between threads that are
//! awake: a layer of a small model is 10 us of work.
//!
//! Every thread has a run of neighbouring pieces of its own, so that what it asks its cache for ahead
//! of time, and what it wrote in the job before, is its own; one that has none left takes half of
//! another's, so work goes to whichever thread runs.

use std::{
    cell::UnsafeCell,
    io, mem,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
    },
    thread::{Builder, JoinHandle},
};

use super::shared::{SharedOut, lock};
use crate::backend::{RowTask, Workers};

/// Checks of the job number before an idle thread sleeps, about 50 us.
const SPINS_BEFORE_SLEEP: usize = 4_000;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The running job, as the threads see it.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
}

/// A thread's run of pieces: the next one in the high half, the end in the low half.
#[derive(Default)]
struct Run(AtomicU64);

impl Run {
    /// Pieces `start..end`. Whoever takes pieces off a run exchanges it whole, and the pieces of a
    /// job are in a run once, so an exchange never mistakes one run for another.
    fn set(&self, start: u32, end: u32) {
        self.0
            .store(u64::from(start) << 32 | u64::from(end), Relaxed);
    }

    /// Takes pieces `start..end` off the run as `split(start, end)` says: what is left and what is
    /// taken. None when the run is empty.
    fn take(&self, split: impl Fn(u32, u32) -> [(u32, u32); 2]) -> Option<(u32, u32)> {
        let mut seen = self.0.load(Relaxed);
        loop {
            let (start, end) = ((seen >> 32) as u32, seen as u32);
            if start >= end {
                return None;
            }
            let [(left_start, left_end), taken] = split(start, end);
            let left = u64::from(left_start) << 32 | u64::from(left_end);
            match self.0.compare_exchange_weak(seen, left, Relaxed, Relaxed) {
                Ok(_) => return Some(taken),
                Err(now) => seen = now,
            }
        }
    }

    /// The next piece.
    fn first(&self) -> Option<u32> {
        self.take(|start, end| [(start + 1, end), (start, start + 1)])
            .map(|(piece, _)| piece)
    }

    /// The later half, at least one piece.
    fn half(&self) -> Option<(u32, u32)> {
        self.take(|start, end| {
            let middle = start + (end - start) / 2;
            [(start, middle), (middle, end)]
        })
    }
}

/// A cache line of its own, so that threads do not pull it from each other for a neighbour.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// Odd while a job is open; every opening and every closing adds one. What threads watch.
    generation: Line<AtomicUsize>,
    /// What each thread has to do. Written by `Pool::run` while no job is open, then by the threads.
    runs: Box<[Line<Run>]>,
    /// Threads inside the job, or finding out whether there is one.
    n_inside: Line<AtomicUsize>,
    /// Threads that sleep or are about to.
    n_sleeping: Line<AtomicUsize>,
    /// The open job. Written by `Pool::run` while none is open and no thread is inside; read by
    /// threads inside.
    job: UnsafeCell<Option<Job>>,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    /// True from publication to the end of a job.
    is_busy: AtomicBool,
    /// Set when a piece panicked on another thread than the caller's.
    panicked: AtomicBool,
}

// SAFETY: `job` is read only by threads that entered (`Shared::enter`) and written only while none
// is inside, see `Pool::run`; its pointer is dereferenced only inside, while `run` keeps the closure
// alive, and the closure is Sync. Everything else is atomic or locked.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Owns the threads; dropping it joins them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool in which `n_threads` work at once, the caller included.
    pub(crate) fn new(n_threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            generation: Line::default(),
            runs: (0..n_threads.max(1)).map(|_| Line::default()).collect(),
            n_inside: Line::default(),
            n_sleeping: Line::default(),
            job: UnsafeCell::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            is_busy: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let threads = (1..n_threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                Builder::new()
                    .name(format!("dsd-cpu-{index}"))
                    .spawn(move || work(&shared, index))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Threads that can work at once.
    pub(crate) fn n_threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// The pieces of a job of `n_tasks` that `thread` starts with.
    pub(crate) fn share(&self, n_tasks: usize, thread: usize) -> Range<usize> {
        let cut = |thread: usize| n_tasks * thread / self.n_threads();
        cut(thread)..cut(thread + 1)
    }

    /// Calls `task(piece, thread)` once for every piece `0..n_tasks`; returns when all are done.
    /// No two calls with the same `thread` overlap. While nothing is in a thread's way it is dealt
    /// the same share of the pieces in every job, in ascending order.
    ///
    /// # Panics
    /// When a job runs already: two at once would deal out each other's pieces, some of them twice
    /// and at the same time. When a piece panicked.
    pub(crate) fn run(&self, n_tasks: usize, task: &Task<'_>) {
        if n_tasks <= 1 || self.threads.is_empty() {
            (0..n_tasks).for_each(|piece| task(piece, 0));
            return;
        }
        let shared = &*self.shared;
        let was_busy = shared.is_busy.swap(true, Acquire);
        assert!(!was_busy, "a pool runs one job at a time");
        // SAFETY: only the lifetime changes; `run` does not return before the job is closed and
        // no thread is inside it.
        let erased = unsafe { mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        assert!(
            u32::try_from(n_tasks).is_ok(),
            "{n_tasks} pieces of work are fewer than the elements they compute"
        );
        for (thread, run) in shared.runs.iter().enumerate() {
            let share = self.share(n_tasks, thread);
            run.0.set(share.start as u32, share.end as u32);
        }
        // SAFETY: `is_busy` keeps other callers out; the last job was closed and left by all (see
        // `Open`), and a thread that enters now reads nothing before the job is open.
        unsafe {
            *shared.job.get() = Some(Job { task: erased });
        }
        shared.generation.0.fetch_add(1, SeqCst);
        let open = Open(shared);
        // Either a thread on its way to sleep sees the job, or it is counted here.
        if shared.n_sleeping.0.load(SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        drain(shared, task, 0);
        drop(open);
        assert!(
            !shared.panicked.load(Acquire),
            "a piece of work panicked on its thread"
        );
    }
}

impl Workers for Pool {
    fn n_threads(&self) -> usize {
        self.n_threads()
    }

    fn for_each_row(&self, values: &mut [f32], row_len: usize, task: &RowTask<'_>) {
        let n_rows = values.len() / row_len;
        let values = SharedOut::new(values);
        self.run(n_rows, &|row, thread| {
            // SAFETY: rows are disjoint and inside; each is a piece of its own.
            let row_values =
                unsafe { std::slice::from_raw_parts_mut(values.at(row * row_len), row_len) };
            task(row, thread, row_values);
        });
    }
}

/// An open job; dropping it, also while unwinding, closes it and waits for those inside.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        // Either a thread that enters sees the job closed, or it is counted here.
        shared.generation.0.fetch_add(1, SeqCst);
        let mut spins = 0usize;
        while shared.n_inside.0.load(SeqCst) > 0 {
            spins += 1;
            if spins.is_multiple_of(SPINS_BEFORE_SLEEP) {
                // The other thread was preempted inside its piece: give it this core.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        shared.is_busy.store(false, Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A panicked worker has already printed why.
            drop(thread.join());
        }
    }
}

/// Works until no run has a piece left: what is in nobody's run is in the hands of a thread inside.
fn drain(shared: &Shared, task: &Task<'_>, thread: usize) {
    let own = &shared.runs[thread].0;
    let others = || {
        let (before, behind) = shared.runs.split_at(thread);
        behind[1..].iter().chain(before)
    };
    loop {
        while let Some(piece) = own.first() {
            task(piece as usize, thread);
        }
        match others().find_map(|run| run.0.half()) {
            // Nobody takes off an empty run, so it is this thread's to fill.
            Some((start, end)) => own.set(start, end),
            None => return,
        }
    }
}

/// Leaves the job even when a piece panics, so that the caller does not wait for ever.
struct Inside<'a>(&'a Shared);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Release);
        }
        self.0.n_inside.0.fetch_sub(1, Release);
    }
}

impl Shared {
    /// True when there is a job that is not number `seen`, or the pool ends.
    fn has_news(&self, seen: usize) -> bool {
        let generation = self.generation.0.load(SeqCst);
        (generation % 2 == 1 && generation != seen) || self.stop.load(SeqCst)
    }

    /// Returns when there is news; sleeps when there is none for a while.
    fn wait(&self, seen: usize) {
        for _ in 0..SPINS_BEFORE_SLEEP {
            if self.has_news(seen) {
                return;
            }
            std::hint::spin_loop();
        }
        let guard = lock(&self.sleep);
        self.n_sleeping.0.fetch_add(1, SeqCst);
        let guard = self.wake.wait_while(guard, |()| !self.has_news(seen));
        self.n_sleeping.0.fetch_sub(1, SeqCst);
        drop(guard);
    }

    /// Counts this thread inside; the number of the open job, if there is one.
    fn enter(&self) -> (Inside<'_>, Option<usize>) {
        self.n_inside.0.fetch_add(1, SeqCst);
        let inside = Inside(self);
        let generation = self.generation.0.load(SeqCst);
        (inside, (generation % 2 == 1).then_some(generation))
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        shared.wait(seen);
        if shared.stop.load(SeqCst) {
            return;
        }
        let (_inside, open) = shared.enter();
        let Some(generation) = open else { continue };
        seen = generation;
        // SAFETY: the job was open after this thread was counted inside, so nobody writes it and
        // `run` keeps its closure alive until the thread has left.
        let job = unsafe { *shared.job.get() };
        if let Some(Job { task }) = job {
            // SAFETY: as above.
            let task = unsafe { &*task };
            drain(shared, task, thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_whatever_the_number_of_threads() {
        for n_threads in [1, 2, 5] {
            let pool = Pool::new(n_threads).unwrap();
            for n_tasks in [0, 1, 2, 3, 7, 1000] {
                let done = (0..n_tasks)
                    .map(|_| AtomicUsize::new(0))
                    .collect::<Vec<_>>();
                pool.run(n_tasks, &|piece, thread| {
                    assert!(thread < n_threads);
                    done[piece].fetch_add(1, Relaxed);
                });
                assert!(done.iter().all(|d| d.load(Relaxed) == 1));
            }
        }
    }

    /// Two jobs at once ran pieces twice, on two threads at the same time.
    #[test]
    fn a_second_job_at_the_same_time_is_refused() {
        let pool = Pool::new(2).unwrap();
        let n_refused = AtomicUsize::new(0);
        pool.run(2, &|_, _| {
            let second = || pool.run(2, &|_, _| {});
            let refusal = std::panic::catch_unwind(std::panic::AssertUnwindSafe(second));
            n_refused.fetch_add(usize::from(refusal.is_err()), Relaxed);
        });
        assert_eq!(n_refused.load(Relaxed), 2);
        pool.run(2, &|_, _| {});
    }

    #[test]
    fn many_short_jobs_in_a_row_end() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(4, &|_, _| {
                total.fetch_add(1, Relaxed);
            });
        }
        assert_eq!(total.load(Relaxed), 80_000);
    }
    /// Pauses around the time after which threads sleep: none is missed on its way to sleep.
    #[test]
    fn jobs_after_pauses_of_all_lengths_end_and_find_helpers() {
        let pool = Pool::new(3).unwrap();
        let (total, helped) = (AtomicUsize::new(0), AtomicUsize::new(0));
        for round in 0..2_000u64 {
            pool.run(8, &|_, thread| {
                total.fetch_add(1, Relaxed);
                helped.fetch_add(usize::from(thread > 0), Relaxed);
                for _ in 0..2_000 {
                    std::hint::spin_loop();
                }
            });
            std::thread::sleep(std::time::Duration::from_micros(round % 150));
        }
        assert_eq!(total.load(Relaxed), 16_000);
        assert!(helped.load(Relaxed) > 0, "threads were woken");
    }
}
