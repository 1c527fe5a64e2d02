//! A few threads that share out numbered pieces of work.
//!
//! The caller works too. Idle threads spin briefly (a step has hundreds of short parts), then sleep,
//! so that another program on the core is not starved; work goes to whichever thread runs.

use std::{
    io, mem,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{Builder, JoinHandle},
};

/// Checks of the job number before an idle thread sleeps, about 20 us.
const SPINS_BEFORE_SLEEP: usize = 4_000;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The running job, as the threads see it.
struct Job {
    task: *const Task<'static>,
    n_tasks: usize,
}

// SAFETY: the pointer is dereferenced only between publication and the end of `Pool::run`, which
// keeps the closure alive; the closure is Sync.
unsafe impl Send for Job {}

struct Shared {
    /// Counts publications and closings of jobs: what waiting threads watch.
    generation: AtomicUsize,
    /// The next piece of work.
    next: AtomicUsize,
    /// Threads inside the job.
    n_inside: AtomicUsize,
    /// The job; locked to enter and to publish.
    job: Mutex<Option<Job>>,
    wake: Condvar,
    stop: AtomicBool,
    /// True from publication to the end of a job.
    is_busy: AtomicBool,
    /// Set when a piece panicked on another thread than the caller's.
    panicked: AtomicBool,
}

/// Owns the threads; dropping it joins them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool in which `n_threads` work at once, the caller included.
    pub(crate) fn new(n_threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            generation: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            n_inside: AtomicUsize::new(0),
            job: Mutex::new(None),
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

    /// Calls `task(piece, thread)` once for every piece `0..n_tasks`; returns when all are done.
    /// No two calls with the same `thread` overlap.
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
        let was_busy = shared.is_busy.swap(true, Ordering::Acquire);
        assert!(!was_busy, "a pool runs one job at a time");
        // SAFETY: only the lifetime changes; `run` does not return before the job is closed and
        // no thread is inside it.
        let erased = unsafe { mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        {
            let mut job = lock(&shared.job);
            shared.next.store(0, Ordering::Relaxed);
            *job = Some(Job {
                task: erased,
                n_tasks,
            });
            shared.generation.fetch_add(1, Ordering::Release);
        }
        let open = Open(shared);
        shared.wake.notify_all();
        drain(shared, task, n_tasks, 0);
        drop(open);
        assert!(
            !shared.panicked.load(Ordering::Acquire),
            "a piece of work panicked on its thread"
        );
    }
}

/// A published job; dropping it, also while unwinding, closes it and waits for those inside.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        // Closing under the lock: after this nobody enters, and those inside are counted.
        *lock(&shared.job) = None;
        shared.generation.fetch_add(1, Ordering::Release);
        let mut spins = 0usize;
        while shared.n_inside.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(SPINS_BEFORE_SLEEP) {
                // The other thread was preempted inside its piece: give it this core.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        shared.is_busy.store(false, Ordering::Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _job = lock(&self.shared.job);
            self.shared.stop.store(true, Ordering::Release);
            self.shared.generation.fetch_add(2, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A panicked worker has already printed why.
            drop(thread.join());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn drain(shared: &Shared, task: &Task<'_>, n_tasks: usize, thread: usize) {
    loop {
        let piece = shared.next.fetch_add(1, Ordering::Relaxed);
        if piece >= n_tasks {
            return;
        }
        task(piece, thread);
    }
}

/// Leaves the job even when a piece panics, so that the caller does not wait for ever.
struct Inside<'a>(&'a Shared);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Ordering::Release);
        }
        self.0.n_inside.fetch_sub(1, Ordering::Release);
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.generation.load(Ordering::Acquire) == seen && spins < SPINS_BEFORE_SLEEP {
            std::hint::spin_loop();
            spins += 1;
        }
        let entered = {
            let mut job = lock(&shared.job);
            while shared.generation.load(Ordering::Acquire) == seen {
                job = shared
                    .wake
                    .wait(job)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            seen = shared.generation.load(Ordering::Acquire);
            job.as_ref().map(|open| {
                shared.n_inside.fetch_add(1, Ordering::Acquire);
                (open.task, open.n_tasks, Inside(shared))
            })
        };
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        if let Some((task, n_tasks, _inside)) = entered {
            // SAFETY: the job was open under the lock and this thread is counted inside, so `run`
            // waits for it and the closure is alive.
            let task = unsafe { &*task };
            drain(shared, task, n_tasks, thread);
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
            for n_tasks in [0, 1, 2, 7, 1000] {
                let done = (0..n_tasks)
                    .map(|_| AtomicUsize::new(0))
                    .collect::<Vec<_>>();
                pool.run(n_tasks, &|piece, thread| {
                    assert!(thread < n_threads);
                    done[piece].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
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
            n_refused.fetch_add(usize::from(refusal.is_err()), Ordering::Relaxed);
        });
        assert_eq!(n_refused.load(Ordering::Relaxed), 2);
        pool.run(2, &|_, _| {});
    }

    #[test]
    fn many_short_jobs_in_a_row_end() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(4, &|_, _| {
                total.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(total.load(Ordering::Relaxed), 80_000);
    }
}
