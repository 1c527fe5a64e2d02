//! What comes after a linear layer: where each thread will read first in the layer that followed
//! last time, so that the end of one layer asks for the beginning of the next.
//!
//! A step runs the same layers in the same order as the one before it, so the layer that followed
//! last time is learned, not told. A wrong guess costs a few lines that nobody reads.

use std::{
    ptr,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicPtr, Ordering::Relaxed},
    },
};

use crate::cpu::shared::lock;

/// Streams that a layer reads at once at most: gate and up.
const STREAMS_MAX: usize = 2;

/// A layer in the order of layers.
#[derive(Debug)]
pub(in crate::cpu) struct Trail {
    /// For every thread, where each of its streams began last time; null for none.
    starts: Box<[[AtomicPtr<u8>; STREAMS_MAX]]>,
    next: Mutex<Weak<Self>>,
}

impl Trail {
    /// For so many threads.
    pub(in crate::cpu) fn new(n_threads: usize) -> Arc<Self> {
        Arc::new(Self {
            starts: (0..n_threads).map(|_| Default::default()).collect(),
            next: Mutex::default(),
        })
    }

    /// Keeps where a thread's streams begin. Writes only what is new: the threads that read it keep
    /// their lines.
    pub(super) fn begin(&self, thread: usize, streams: [*const u8; STREAMS_MAX]) {
        for (start, stream) in self.starts[thread].iter().zip(streams) {
            if start.load(Relaxed).cast_const() != stream {
                start.store(stream.cast_mut(), Relaxed);
            }
        }
    }

    /// Where `thread` reads its `unit`th run of `unit_bytes` from the beginning; null if unknown.
    /// Only to ask for: what lay there may be gone.
    pub(super) fn place(&self, thread: usize, unit: usize, unit_bytes: usize) -> *const u8 {
        let [first, second] = &self.starts[thread];
        let (first, second) = (first.load(Relaxed), second.load(Relaxed));
        let (start, unit) = match (second.is_null(), unit % 2) {
            (true, _) => (first, unit),
            (false, 0) => (first, unit / 2),
            (false, _) => (second, unit / 2),
        };
        match start.is_null() {
            true => ptr::null(),
            false => start.wrapping_add(unit * unit_bytes).cast_const(),
        }
    }
}

/// The layer that ran last.
#[derive(Debug, Default)]
pub(in crate::cpu) struct Trails(Mutex<Weak<Trail>>);

impl Trails {
    /// Notes that `trail` runs now; the layer that followed it last time.
    pub(in crate::cpu) fn enter(&self, trail: &Arc<Trail>) -> Option<Arc<Trail>> {
        let this = Arc::downgrade(trail);
        let before = std::mem::replace(&mut *lock(&self.0), Weak::clone(&this));
        if let Some(before) = before.upgrade() {
            *lock(&before.next) = this;
        }
        lock(&trail.next).upgrade()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_that_followed_last_time_is_expected_and_units_alternate_between_streams() {
        let (a, b, c) = (Trail::new(2), Trail::new(2), Trail::new(2));
        let trails = Trails::default();
        assert!(trails.enter(&a).is_none());
        assert!(trails.enter(&b).is_none());
        assert!(Arc::ptr_eq(&trails.enter(&a).unwrap(), &b));
        assert!(trails.enter(&c).is_none());
        let after_a = trails.enter(&a).unwrap();
        assert!(Arc::ptr_eq(&after_a, &c), "the last time counts");
        assert!(c.place(1, 0, 10).is_null(), "nothing is known of it");

        let at = |n: usize| ptr::without_provenance::<u8>(n);
        c.begin(1, [at(1000), ptr::null()]);
        assert_eq!(
            [0, 1, 2].map(|k| c.place(1, k, 10)),
            [1000, 1010, 1020].map(at)
        );
        c.begin(1, [at(1000), at(5000)]);
        assert_eq!(
            [0, 1, 2, 3].map(|k| c.place(1, k, 10)),
            [1000, 5000, 1010, 5010].map(at)
        );
        assert!(trails.enter(&c).is_some());
        drop((c, after_a));
        assert!(
            trails.enter(&a).is_none(),
            "a layer that is gone follows none"
        );
    }
}
