//! Caps of a tenant: how much at once and how much a minute. Pure; `now` is an argument.
//!
//! Knows no keys, no names and no clock.
//!
//! Invariant: time that stands still or goes back gives nothing and takes nothing.

use std::time::{Duration, Instant};

/// Longest wait that is put on top of the time to free room because others were refused before.
const SPREAD_MAX_S: f64 = 30.0;
/// What a request is taken to hold its places for before one has ended.
const HOLD_S_DEFAULT: f64 = 1.0;
/// Weight of the newest request in the mean time that places are held.
const HOLD_GAIN: f64 = 1.0 / 8.0;
/// Rounding of sums of fractions must not refuse who waited exactly as told.
const ROUNDING: f64 = 1e-6;

/// Limits of a tenant; what is `None` is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caps {
    /// Choices running or waiting at once.
    pub concurrency: Option<u32>,
    /// Requests in any minute, on average; as many at once.
    pub requests_per_minute: Option<u32>,
    /// Prompt and output tokens in any minute, on average; as many at once.
    pub tokens_per_minute: Option<u64>,
}

/// Which cap stands in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cap {
    /// [`Caps::concurrency`].
    Concurrency,
    /// [`Caps::requests_per_minute`].
    Requests,
    /// [`Caps::tokens_per_minute`].
    Tokens,
}

/// A request is over a cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverCap {
    /// Which.
    pub cap: Cap,
    /// When there is room for it; `None` for never, as it has more choices than may be open at once.
    pub retry_after: Option<Duration>,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Choices.
    pub n_choices: u32,
    /// Prompt tokens, and those that are expected to come out.
    pub n_tokens: u64,
}

/// What is left under the caps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    /// Choices that may be opened now.
    pub concurrency: Option<u32>,
    /// Requests that may be made now.
    pub requests: Option<u64>,
    /// Tokens that may be asked for now.
    pub tokens: Option<u64>,
}

/// How much of its caps a tenant uses.
#[derive(Debug)]
pub(super) struct CapState {
    n_open: u32,
    /// Mean seconds that a request holds its places.
    hold_s: f64,
    places: Bucket,
    requests: Bucket,
    tokens: Bucket,
}

/// An amount that comes back at a steady rate, a minute for the whole of it.
#[derive(Debug)]
struct Bucket {
    /// Taken and not yet back; above the whole after one request that is larger than it.
    used: f64,
    /// What those refused were told to come back for.
    promised: f64,
    at: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self {
            used: 0.0,
            promised: 0.0,
            at: now,
        }
    }

    /// Gives back what time gave. Without a rate nothing is held against a tenant that gets one later.
    fn advance(&mut self, per_minute: Option<f64>, now: Instant) {
        let Some(per_minute) = per_minute else {
            *self = Self::new(self.at.max(now));
            return;
        };
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        let back = elapsed * per_minute / 60.0;
        self.used = (self.used - back).max(0.0);
        self.promised = (self.promised - back).max(0.0);
        self.at = self.at.max(now);
    }

    /// Seconds until `want` is there; 0 when it is. What is larger than the whole needs the whole.
    fn wait_s(&self, want: f64, per_minute: f64) -> f64 {
        let missing = want.min(per_minute) - (per_minute - self.used);
        if missing <= ROUNDING {
            0.0
        } else {
            missing * 60.0 / per_minute
        }
    }

    /// Seconds by which one more refused client comes later than those refused before it.
    fn promise(&mut self, want: f64, per_minute: f64) -> f64 {
        let later = self.promised * 60.0 / per_minute;
        let most = SPREAD_MAX_S * per_minute / 60.0;
        self.promised = (self.promised + want.min(per_minute)).min(most);
        later
    }
}

impl CapState {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            n_open: 0,
            hold_s: HOLD_S_DEFAULT,
            places: Bucket::new(now),
            requests: Bucket::new(now),
            tokens: Bucket::new(now),
        }
    }

    /// Takes what a request wants, or nothing.
    ///
    /// # Errors
    /// [`OverCap`], with the wait for the cap that keeps it out longest.
    pub(super) fn take(&mut self, caps: &Caps, want: Want, now: Instant) -> Result<(), OverCap> {
        self.check(caps, want, now)?;
        self.n_open = self.n_open.saturating_add(want.n_choices);
        self.requests.used += 1.0;
        self.tokens.used += as_f64(want.n_tokens);
        Ok(())
    }

    /// Whether [`Self::take`] would succeed.
    ///
    /// # Errors
    /// [`OverCap`]; who is told a time counts as coming back at it.
    pub(super) fn check(&mut self, caps: &Caps, want: Want, now: Instant) -> Result<(), OverCap> {
        self.advance(caps, now);
        if let Some(max) = caps.concurrency {
            if max < want.n_choices {
                return Err(OverCap {
                    cap: Cap::Concurrency,
                    retry_after: None,
                });
            }
            if max - want.n_choices < self.n_open {
                // One place comes free in every `hold_s / max`.
                let per_minute = self.places_per_minute(max);
                let missing = self.n_open - (max - want.n_choices);
                let own = f64::from(missing) * 60.0 / per_minute;
                let later = self.places.promise(f64::from(want.n_choices), per_minute);
                return Err(over(Cap::Concurrency, own + later));
            }
        }
        let tokens = as_f64(want.n_tokens);
        let rates = [
            (
                Cap::Requests,
                caps.requests_per_minute.map(f64::from),
                &mut self.requests,
                1.0,
            ),
            (
                Cap::Tokens,
                caps.tokens_per_minute.map(as_f64),
                &mut self.tokens,
                tokens,
            ),
        ];
        let waits = rates
            .into_iter()
            .filter_map(|(cap, per_minute, bucket, want)| {
                let per_minute = per_minute?;
                let wait = bucket.wait_s(want, per_minute);
                (0.0 < wait).then(|| (cap, wait + bucket.promise(want, per_minute)))
            });
        match waits.max_by(|a, b| a.1.total_cmp(&b.1)) {
            None => Ok(()),
            Some((cap, wait)) => Err(over(cap, wait)),
        }
    }

    /// The request is over after `held`: its places are free, and tokens count as they were used.
    pub(super) fn give_back(&mut self, want: Want, n_used: u64, held: Duration) {
        self.close(want);
        self.tokens.used = (self.tokens.used + as_f64(n_used)).max(0.0);
        self.hold_s += (held.as_secs_f64() - self.hold_s) * HOLD_GAIN;
    }

    /// The request was refused elsewhere: as if it had not come.
    pub(super) fn undo(&mut self, want: Want) {
        self.close(want);
        self.requests.used = (self.requests.used - 1.0).max(0.0);
    }

    fn close(&mut self, want: Want) {
        debug_assert!(want.n_choices <= self.n_open, "more given back than taken");
        self.n_open = self.n_open.saturating_sub(want.n_choices);
        self.tokens.used = (self.tokens.used - as_f64(want.n_tokens)).max(0.0);
    }

    pub(super) fn left(&mut self, caps: &Caps, now: Instant) -> Left {
        self.advance(caps, now);
        Left {
            concurrency: caps.concurrency.map(|max| max.saturating_sub(self.n_open)),
            requests: caps
                .requests_per_minute
                .map(|max| as_u64(f64::from(max) - self.requests.used)),
            tokens: caps
                .tokens_per_minute
                .map(|max| as_u64(as_f64(max) - self.tokens.used)),
        }
    }

    fn advance(&mut self, caps: &Caps, now: Instant) {
        let places = caps.concurrency.map(|max| self.places_per_minute(max));
        self.places.advance(places, now);
        let (requests, tokens) = (caps.requests_per_minute, caps.tokens_per_minute);
        self.requests.advance(requests.map(f64::from), now);
        self.tokens.advance(tokens.map(as_f64), now);
    }

    fn places_per_minute(&self, max: u32) -> f64 {
        60.0 * f64::from(max.max(1)) / self.hold_s.max(0.001)
    }
}

fn over(cap: Cap, wait_s: f64) -> OverCap {
    OverCap {
        cap,
        retry_after: Some(Duration::try_from_secs_f64(wait_s).unwrap_or(Duration::MAX)),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of tokens are far below 2^53"
)]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is at least 0, and the cast saturates"
)]
fn as_u64(amount: f64) -> u64 {
    (amount + ROUNDING).max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::runtime::clock;

    fn want(n_choices: u32, n_tokens: u64) -> Want {
        Want {
            n_choices,
            n_tokens,
        }
    }

    fn caps(concurrency: u32, requests: u32, tokens: u64) -> Caps {
        Caps {
            concurrency: Some(concurrency),
            requests_per_minute: Some(requests),
            tokens_per_minute: Some(tokens),
        }
    }

    fn wait_of(result: Result<(), OverCap>) -> (Cap, f64) {
        let over = result.expect_err("the cap is reached");
        (over.cap, over.retry_after.unwrap().as_secs_f64())
    }

    #[test]
    fn every_choice_takes_a_place_and_gives_it_back() {
        let now = clock::now();
        let caps = Caps {
            concurrency: Some(4),
            ..Caps::default()
        };
        let mut state = CapState::new(now);
        state.take(&caps, want(3, 10), now).unwrap();
        assert_eq!(
            state.take(&caps, want(2, 10), now).unwrap_err().cap,
            Cap::Concurrency
        );
        state.take(&caps, want(1, 10), now).unwrap();
        assert_eq!(state.left(&caps, now).concurrency, Some(0));
        state.give_back(want(3, 10), 10, Duration::from_secs(8));
        state.take(&caps, want(3, 10), now).unwrap();
        // More than may ever be open: no time helps.
        let never = state.take(&caps, want(5, 10), now).unwrap_err();
        assert_eq!((never.cap, never.retry_after), (Cap::Concurrency, None));
    }

    #[test]
    fn the_wait_for_a_place_follows_how_long_places_are_held() {
        let mut now = clock::now();
        let caps = Caps {
            concurrency: Some(2),
            ..Caps::default()
        };
        let mut state = CapState::new(now);
        for _ in 0..64 {
            state.take(&caps, want(1, 1), now).unwrap();
            now += Duration::from_secs(10);
            state.give_back(want(1, 1), 1, Duration::from_secs(10));
        }
        state.take(&caps, want(2, 1), now).unwrap();
        // Two places held for ten seconds each: one comes free every five.
        let (_, first) = wait_of(state.take(&caps, want(1, 1), now));
        let (_, second) = wait_of(state.take(&caps, want(1, 1), now));
        assert!((4.9..5.1).contains(&first), "{first}");
        assert!((9.9..10.1).contains(&second), "{second}");
    }

    #[test]
    fn a_minutes_requests_may_come_at_once_and_then_at_their_rate() {
        let now = clock::now();
        let caps = Caps {
            requests_per_minute: Some(30),
            ..Caps::default()
        };
        let mut state = CapState::new(now);
        for _ in 0..30 {
            state.take(&caps, want(1, 1), now).unwrap();
        }
        // Those refused are told one after the other, two seconds apart.
        for n in 1..=5 {
            let (cap, wait) = wait_of(state.take(&caps, want(1, 1), now));
            assert_eq!(cap, Cap::Requests);
            assert!((wait - 2.0 * f64::from(n)).abs() < 1e-3, "{n}: {wait}");
        }
        for n in 1..=5 {
            let then = now + Duration::from_secs(2 * n);
            state.take(&caps, want(1, 1), then).unwrap();
            assert!(state.take(&caps, want(1, 1), then).is_err(), "{n}");
        }
    }

    #[test]
    fn tokens_are_corrected_by_what_was_used() {
        let now = clock::now();
        let caps = Caps {
            tokens_per_minute: Some(1000),
            ..Caps::default()
        };
        let mut state = CapState::new(now);
        state.take(&caps, want(1, 900), now).unwrap();
        assert_eq!(
            state.take(&caps, want(1, 200), now).unwrap_err().cap,
            Cap::Tokens
        );
        state.give_back(want(1, 900), 100, Duration::from_secs(1));
        assert_eq!(state.left(&caps, now).tokens, Some(900));
        state.take(&caps, want(1, 800), now).unwrap();
        // More came out than was expected: what follows waits for it.
        state.give_back(want(1, 800), 2000, Duration::from_secs(1));
        let (_, wait) = wait_of(state.take(&caps, want(1, 100), now));
        // 72 s for itself, and 12 s after the one that was told to come back for its 200.
        assert!((wait - 84.0).abs() < 1e-3, "{wait}");
    }

    #[test]
    fn a_request_larger_than_the_minute_waits_for_all_of_it_and_is_paid_off_after() {
        let now = clock::now();
        let caps = Caps {
            tokens_per_minute: Some(600),
            ..Caps::default()
        };
        let mut state = CapState::new(now);
        state.take(&caps, want(1, 10), now).unwrap();
        let (_, wait) = wait_of(state.take(&caps, want(1, 6000), now));
        assert!((wait - 1.0).abs() < 1e-3, "{wait}");
        let then = now + Duration::from_secs(1);
        state.take(&caps, want(1, 6000), then).unwrap();
        let (_, wait) = wait_of(state.check(&caps, want(1, 1), then));
        assert!(540.0 < wait, "{wait}");
    }

    #[test]
    fn a_clock_that_goes_back_changes_nothing() {
        let now = clock::now() + Duration::from_secs(3600);
        let caps = caps(8, 60, 6000);
        let mut state = CapState::new(now);
        for _ in 0..8 {
            state.take(&caps, want(1, 100), now).unwrap();
        }
        let left = state.left(&caps, now);
        assert_eq!(state.left(&caps, now - Duration::from_secs(1800)), left);
        assert_eq!(state.left(&caps, now), left);
    }

    #[test]
    fn what_was_refused_elsewhere_leaves_no_trace() {
        let now = clock::now();
        let caps = caps(2, 3, 100);
        let mut state = CapState::new(now);
        let untouched = state.left(&caps, now);
        state.take(&caps, want(2, 50), now).unwrap();
        state.undo(want(2, 50));
        assert_eq!(state.left(&caps, now), untouched);
    }

    proptest! {
        /// Whatever comes when, a minute never gives more than twice its cap (a full bucket and a
        /// minute of refill), and who comes back alone when told is let in.
        #[test]
        fn rates_hold_and_waits_are_true(gaps_ms in prop::collection::vec(0_u64..4000, 1..200)) {
            let start = clock::now();
            let caps = Caps { requests_per_minute: Some(20), ..Caps::default() };
            let mut state = CapState::new(start);
            let mut now = start;
            let mut taken = Vec::new();
            for gap in gaps_ms {
                now += Duration::from_millis(gap);
                if state.take(&caps, want(1, 1), now).is_ok() {
                    taken.push(now);
                }
            }
            for &from in &taken {
                let until = from + Duration::from_secs(60);
                let n = taken.iter().filter(|t| from <= **t && **t < until).count();
                prop_assert!(n <= 40, "{n}");
            }
            if let Err(over) = state.check(&caps, want(1, 1), now) {
                let then = now + over.retry_after.unwrap();
                prop_assert!(state.take(&caps, want(1, 1), then).is_ok());
            }
        }
    }
}
