//! What a tenant used: requests, tokens, refusals, queue times and its share of the work. Pure.
//!
//! Knows no names and no clock; `second` counts from an origin that all tenants share.

use std::time::Duration;

/// Queue times kept for the percentiles.
const QUEUE_TIMES_KEPT: usize = 512;
/// Seconds over which shares are told.
const SHARE_SECONDS: usize = 60;

/// Why a request of a tenant was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Too many choices at once.
    Concurrency,
    /// Too many requests a minute.
    Requests,
    /// Too many tokens a minute.
    Tokens,
    /// A model that is not among the tenant's.
    Model,
    /// The node has no room for it.
    Busy,
}

impl Refused {
    /// Every reason.
    pub const ALL: [Self; 5] = [
        Self::Concurrency,
        Self::Requests,
        Self::Tokens,
        Self::Model,
        Self::Busy,
    ];

    /// The word in metrics and tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Concurrency => "concurrency",
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Model => "model",
            Self::Busy => "busy",
        }
    }
}

/// Counts since the tenant came to be known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// Requests taken.
    pub n_requests: u64,
    /// Choices that wait for their first step.
    pub n_waiting: u32,
    /// Choices under way.
    pub n_running: u32,
    /// Prompt tokens, cached ones included.
    pub n_prompt_tokens: u64,
    /// Of them found in the cache.
    pub n_cached_tokens: u64,
    /// Tokens generated.
    pub n_output_tokens: u64,
    /// Refusals, in the order of [`Refused::ALL`].
    pub n_refused: [u64; Refused::ALL.len()],
    queue_times: Vec<Duration>,
    /// Where the next queue time goes once all places are taken.
    queue_next: usize,
    tokens: LastMinute,
    seconds: LastMinute,
}

/// Work of the last minute, tokens and seconds of the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Tokens, prompt and output.
    pub tokens: f64,
    /// Seconds.
    pub seconds: f64,
}

impl Work {
    /// This work's part of `all`, in seconds where any are known.
    pub fn share_of(self, all: Self) -> f64 {
        let share = |own: f64, all: f64| if 0.0 < all { own / all } else { 0.0 };
        if 0.0 < all.seconds {
            share(self.seconds, all.seconds)
        } else {
            share(self.tokens, all.tokens)
        }
    }
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            seconds: self.seconds + other.seconds,
        }
    }
}

impl Usage {
    /// Counts a refusal.
    pub(super) fn refused(&mut self, why: Refused) {
        self.n_refused[why as usize] += 1;
    }

    /// Notes how long a request waited.
    pub(super) fn queued(&mut self, time: Duration) {
        if self.queue_times.len() < QUEUE_TIMES_KEPT {
            self.queue_times.push(time);
        } else {
            self.queue_times[self.queue_next] = time;
            self.queue_next = (self.queue_next + 1) % QUEUE_TIMES_KEPT;
        }
    }

    /// Adds work that was done in `second`.
    pub(super) fn worked(&mut self, work: Work, second: u64) {
        self.tokens.add(work.tokens, second);
        self.seconds.add(work.seconds, second);
    }

    /// Work of the minute before `second`.
    pub(super) fn work(&self, second: u64) -> Work {
        Work {
            tokens: self.tokens.sum(second),
            seconds: self.seconds.sum(second),
        }
    }

    /// The time that `percent` of the last requests waited at most; `None` before the first.
    pub fn queue_time(&self, percent: usize) -> Option<Duration> {
        let mut times = self.queue_times.clone();
        times.sort_unstable();
        let rank = (times.len() * percent).div_ceil(100).max(1);
        times.get(rank - 1).copied()
    }
}

/// A sum over the last minute, in slots of a second.
#[derive(Debug, Clone, PartialEq)]
struct LastMinute {
    slots: [f64; SHARE_SECONDS],
    /// Second of the newest slot.
    newest: u64,
}

impl Default for LastMinute {
    fn default() -> Self {
        Self {
            slots: [0.0; SHARE_SECONDS],
            newest: 0,
        }
    }
}

impl LastMinute {
    fn add(&mut self, amount: f64, second: u64) {
        let n_passed = second.saturating_sub(self.newest).min(60);
        for passed in 1..=n_passed {
            self.slots[slot(self.newest + passed)] = 0.0;
        }
        self.newest = self.newest.max(second);
        self.slots[slot(self.newest)] += amount;
    }

    fn sum(&self, second: u64) -> f64 {
        let oldest = (second + 1).saturating_sub(SHARE_SECONDS as u64);
        let first_kept = (self.newest + 1).saturating_sub(SHARE_SECONDS as u64);
        (oldest.max(first_kept)..=self.newest)
            .map(|second| self.slots[slot(second)])
            .sum()
    }
}

fn slot(second: u64) -> usize {
    usize::try_from(second % SHARE_SECONDS as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_the_last_minute() {
        let mut usage = Usage::default();
        let tokens = |tokens| Work {
            tokens,
            seconds: 0.0,
        };
        usage.worked(tokens(5.0), 0);
        usage.worked(tokens(7.0), 30);
        assert_eq!(usage.work(30).tokens, 12.0);
        assert_eq!(usage.work(59).tokens, 12.0);
        assert_eq!(usage.work(60).tokens, 7.0);
        assert_eq!(usage.work(90).tokens, 0.0);
        usage.worked(tokens(1.0), 100_000);
        assert_eq!(usage.work(100_000).tokens, 1.0);
        // Late news belongs to the newest second.
        usage.worked(tokens(1.0), 99_990);
        assert_eq!(usage.work(100_000).tokens, 2.0);
    }

    #[test]
    fn seconds_count_before_tokens() {
        let work = |tokens, seconds| Work { tokens, seconds };
        assert_eq!(work(1.0, 0.0).share_of(work(4.0, 0.0)), 0.25);
        assert_eq!(work(1.0, 3.0).share_of(work(4.0, 4.0)), 0.75);
        assert_eq!(work(0.0, 0.0).share_of(work(0.0, 0.0)), 0.0);
    }

    #[test]
    fn percentiles_are_of_the_last_requests() {
        let mut usage = Usage::default();
        assert_eq!(usage.queue_time(50), None);
        for ms in 1..=100 {
            usage.queued(Duration::from_millis(ms));
        }
        assert_eq!(usage.queue_time(50), Some(Duration::from_millis(50)));
        assert_eq!(usage.queue_time(95), Some(Duration::from_millis(95)));
        for _ in 0..QUEUE_TIMES_KEPT {
            usage.queued(Duration::from_secs(1));
        }
        assert_eq!(usage.queue_time(1), Some(Duration::from_secs(1)));
    }

    #[test]
    fn reasons_are_counted_apart() {
        let mut usage = Usage::default();
        for (idx, why) in Refused::ALL.into_iter().enumerate() {
            usage.refused(why);
            assert_eq!(usage.n_refused[idx], 1, "{}", why.word());
        }
    }
}
