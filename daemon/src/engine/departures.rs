//! How fast a waiting line drains, for `Retry-After`.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::shared::nanos;

/// Bounds of what a refused client is told.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Departures over which the measured rate forgets.
const DEPARTURES_REMEMBERED: u64 = 8;

/// A measured rate. Clones are not wanted: share it.
#[derive(Debug, Default)]
pub struct Departures {
    /// Mean nanoseconds between two departures; 0 before the first.
    interval: AtomicU64,
}

impl Departures {
    /// `n` left the waiting line within `elapsed`.
    pub fn note(&self, n: u64, elapsed: Duration) {
        if n == 0 {
            return;
        }
        let measured = nanos(elapsed) / n;
        let mean = self.interval.load(Ordering::Relaxed);
        let weight = n.min(DEPARTURES_REMEMBERED);
        let next = match mean {
            0 => measured,
            _ => {
                let kept = u128::from(mean) * u128::from(DEPARTURES_REMEMBERED - weight);
                let added = u128::from(measured) * u128::from(weight);
                ((kept + added) / u128::from(DEPARTURES_REMEMBERED)) as u64
            }
        };
        self.interval.store(next.max(1), Ordering::Relaxed);
    }

    /// When a place in the waiting line is expected to be free.
    pub fn retry_after(&self) -> Duration {
        let interval = Duration::from_nanos(self.interval.load(Ordering::Relaxed));
        interval.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_follows_the_measured_drain_rate_within_its_bounds() {
        let line = Departures::default();
        assert_eq!(line.retry_after(), RETRY_AFTER_MIN, "nothing measured yet");
        line.note(1, Duration::from_secs(4));
        assert_eq!(line.retry_after(), Duration::from_secs(4));
        line.note(1, Duration::from_secs(12));
        assert_eq!(line.retry_after(), Duration::from_secs(5));
        line.note(100, Duration::from_secs(200));
        assert_eq!(line.retry_after(), Duration::from_secs(2));
        line.note(0, Duration::from_secs(9));
        assert_eq!(line.retry_after(), Duration::from_secs(2));
        line.note(8, Duration::from_millis(8));
        assert_eq!(line.retry_after(), RETRY_AFTER_MIN);
        line.note(8, Duration::from_secs(8000));
        assert_eq!(line.retry_after(), RETRY_AFTER_MAX);
        line.note(1, Duration::MAX);
        assert_eq!(line.retry_after(), RETRY_AFTER_MAX);
    }
}
