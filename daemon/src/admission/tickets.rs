//! Places promised to those who were refused.
//!
//! A refusal says when to come back, and the answer has to be true: the moment is a place in a line,
//! one for each account, that is as long as the work promised. Whoever comes back with the same
//! request (same account, prompts and length: nothing that a client has to send) at that moment is
//! let in though newcomers are not. One that comes before its time cannot be told from another client
//! with the same words and gets another place, behind.
//!
//! Pure. Called by the admission's decision.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

/// Digest of a request, by which it is known again.
pub(super) type TicketKey = [u8; 16];
/// Digest of an account, whose line it is.
pub(super) type LineKey = (u8, u64, u64);

/// Tickets kept; beyond, those due last are not promised anything.
const TICKETS_MAX: usize = 16_384;
/// Tickets of one and the same request: so many clients may send the same words.
const ALIKE_MAX: usize = 1024;
/// Clocks and networks are not exact: who comes this much early is on time.
const EARLY: Duration = Duration::from_millis(300);
/// How late one may come, beside half of what it was told to wait.
const LATE: Duration = Duration::from_secs(3);
/// Bounds of what a client is told.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// Tickets over which the share of those that come back is averaged.
const TICKETS_REMEMBERED: f64 = 64.0;
/// At least this share of the promised work is expected.
const SHOW_UP_MIN: f64 = 0.02;
/// Lines remembered; those that are over are dropped first.
const LINES_MAX: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Ticket {
    due: Instant,
    expires: Instant,
}

/// How a request that comes stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Without a ticket whose time has come.
    New,
    /// Its time has come.
    Due,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tickets {
    /// By request; the same one may have been sent several times.
    by_key: HashMap<TicketKey, Vec<Ticket>>,
    n: usize,
    /// The end of each account's line.
    lines: HashMap<LineKey, Instant>,
    /// Times at which tickets expire.
    expiries: BTreeMap<(Instant, u64), TicketKey>,
    serial: u64,
    /// Share of the tickets whose holders come back.
    show_up: f64,
    /// What a second of promised work takes of the line.
    scale: f64,
}

impl Default for Tickets {
    fn default() -> Self {
        Self {
            by_key: HashMap::new(),
            n: 0,
            lines: HashMap::new(),
            expiries: BTreeMap::new(),
            serial: 0,
            show_up: 1.0,
            scale: 1.0,
        }
    }
}

impl Tickets {
    /// Drops what is over.
    pub(super) fn tidy(&mut self, now: Instant) {
        while let Some((&(at, serial), _)) = self.expiries.first_key_value() {
            if now < at {
                break;
            }
            let Some(key) = self.expiries.remove(&(at, serial)) else {
                break;
            };
            if let Some(tickets) = self.by_key.get_mut(&key) {
                let before = tickets.len();
                tickets.retain(|t| now < t.expires);
                let n_gone = before - tickets.len();
                if tickets.is_empty() {
                    self.by_key.remove(&key);
                }
                self.n -= n_gone;
                for _ in 0..n_gone {
                    self.note_show_up(false);
                }
            }
        }
        if LINES_MAX < self.lines.len() {
            self.lines.retain(|_, end| now < *end);
        }
    }

    /// How the request stands.
    pub(super) fn standing(&self, now: Instant, key: &TicketKey) -> Standing {
        let tickets = self.by_key.get(key);
        match tickets.and_then(|t| t.iter().map(|t| t.due).min()) {
            Some(due) if due <= now + EARLY => Standing::Due,
            Some(_) | None => Standing::New,
        }
    }

    /// The holder of the request's first ticket was let in.
    pub(super) fn claim(&mut self, key: &TicketKey) {
        if let Some(tickets) = self.by_key.get_mut(key) {
            let first = (0..tickets.len()).min_by_key(|i| tickets[*i].due);
            if let Some(first) = first {
                tickets.swap_remove(first);
                self.n -= 1;
            }
            if tickets.is_empty() {
                self.by_key.remove(key);
            }
            self.note_show_up(true);
        }
    }

    /// A ticket for a refused request of `work` seconds that could begin after `wait` if it were the
    /// only one; `part` of the engine is its account's. Returns when to come back.
    pub(super) fn issue(
        &mut self,
        now: Instant,
        key: TicketKey,
        line: LineKey,
        wait: Duration,
        work: Duration,
        part: f64,
    ) -> Duration {
        // Whoever had one whose time has come keeps one place, at the beginning of the line.
        let had_one = self.standing(now, &key) == Standing::Due;
        if had_one {
            self.claim(&key);
        }
        let free_at = now + wait;
        let end = self
            .lines
            .get(&line)
            .copied()
            .unwrap_or(free_at)
            .max(free_at);
        let due = if had_one { free_at } else { end };
        if !had_one {
            let share = self.show_up.max(SHOW_UP_MIN) * self.scale / part.clamp(1e-3, 1.0);
            let length = work.mul_f64(share).min(RETRY_AFTER_MAX);
            self.lines
                .insert(line, (end + length).min(now + RETRY_AFTER_MAX));
        }
        let left = due.saturating_duration_since(now);
        let told = whole_seconds(left);
        let n_alike = self.by_key.get(&key).map_or(0, Vec::len);
        if self.n < TICKETS_MAX && n_alike < ALIKE_MAX {
            let expires = now + told + LATE + told / 2;
            let ticket = Ticket { due, expires };
            self.by_key.entry(key).or_default().push(ticket);
            self.n += 1;
            self.serial += 1;
            self.expiries.insert((expires, self.serial), key);
        }
        told
    }

    /// A holder came on time and found the engine with nothing to do, or with too much: lines are
    /// made shorter or longer.
    pub(super) fn note_arrival(&mut self, was_idle: bool, was_late: bool) {
        let factor = match (was_idle, was_late) {
            (true, _) => 0.98,
            (_, true) => 1.02,
            (false, false) => 1.0,
        };
        self.scale = (self.scale * factor).clamp(0.25, 3.0);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.n
    }

    fn note_show_up(&mut self, came: bool) {
        let seen = if came { 1.0 } else { 0.0 };
        self.show_up += (seen - self.show_up) / TICKETS_REMEMBERED;
    }
}

/// Rounded up: coming back early only meets the same refusal.
fn whole_seconds(wait: Duration) -> Duration {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() != 0);
    Duration::from_secs(seconds).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock;

    const LINE: LineKey = (0, 0, 0);
    const SECOND: Duration = Duration::from_secs(1);

    fn key(n: u32) -> TicketKey {
        let mut key = [0; 16];
        key[..4].copy_from_slice(&n.to_le_bytes());
        key
    }

    #[test]
    fn refusals_are_spread_over_the_work_and_each_finds_its_own_time() {
        let now = clock::now();
        let mut tickets = Tickets::default();
        let work = Duration::from_millis(500);
        let told: Vec<u64> = (0..10)
            .map(|n| {
                tickets
                    .issue(now, key(n), LINE, SECOND, work, 1.0)
                    .as_secs()
            })
            .collect();
        assert_eq!(told, [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]);
        let other = tickets.issue(now, key(99), (0, 1, 0), SECOND, work, 1.0);
        assert_eq!(other, SECOND, "another account has its own line");
        assert_eq!(tickets.standing(now, &key(5)), Standing::New);
        assert_eq!(tickets.standing(now + 4 * SECOND, &key(5)), Standing::Due);
        assert_eq!(tickets.standing(now, &key(50)), Standing::New);
        tickets.claim(&key(5));
        assert_eq!(tickets.standing(now + 4 * SECOND, &key(5)), Standing::New);
    }

    #[test]
    fn who_comes_again_keeps_one_place_and_goes_first() {
        let now = clock::now();
        let mut tickets = Tickets::default();
        for n in 0..20 {
            tickets.issue(now, key(n), LINE, Duration::ZERO, SECOND, 1.0);
        }
        let later = now + 3 * SECOND;
        let again = tickets.issue(later, key(3), LINE, SECOND, SECOND, 1.0);
        assert_eq!(again, SECOND);
        assert_eq!(tickets.len(), 20);
    }

    #[test]
    fn tickets_of_those_who_never_come_are_forgotten_and_lines_get_shorter() {
        let mut now = clock::now();
        let mut tickets = Tickets::default();
        for n in 0..50_000 {
            now += Duration::from_millis(10);
            tickets.tidy(now);
            tickets.issue(now, key(n), LINE, Duration::ZERO, SECOND, 1.0);
            assert!(tickets.len() <= TICKETS_MAX);
        }
        assert!(tickets.show_up < 0.05, "{}", tickets.show_up);
        tickets.tidy(now + 3 * RETRY_AFTER_MAX);
        assert_eq!(
            (tickets.len(), tickets.by_key.len(), tickets.expiries.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn clients_with_the_same_words_are_spread_too() {
        let now = clock::now();
        let mut tickets = Tickets::default();
        for n in 1..5 {
            let told = tickets.issue(now, key(1), LINE, SECOND, SECOND, 1.0);
            assert_eq!(told, n * SECOND);
        }
        for n in 1..5 {
            assert_eq!(tickets.standing(now + n * SECOND, &key(1)), Standing::Due);
            tickets.claim(&key(1));
            assert_eq!(tickets.standing(now + n * SECOND, &key(1)), Standing::New);
        }
    }
}
