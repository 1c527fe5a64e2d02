//! Places promised to those who were refused.
//!
//! A refusal says when to come back, and the answer has to be true: the moment is a place in a line,
//! one for each account, that is as long as the work promised to those who are expected to come. Whoever comes back with the same
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
/// How late one may come.
const LATE: Duration = Duration::from_secs(3);
/// Bounds of what a client is told.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// Official clients take no longer one and come back sooner instead. Where a line is longer, more are told
/// the same time than find a place then; those keep the beginning of the line.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Tickets over which the share of those that come back is averaged.
const TICKETS_REMEMBERED: f64 = 32.0;
/// At least this share of the promised work is expected.
const SHOW_UP_MIN: f64 = 0.002;
/// Lines remembered; those that are over are dropped first.
const LINES_MAX: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Ticket {
    line: LineKey,
    due: Instant,
    expires: Instant,
    /// Seconds of the engine's time.
    work: f64,
    /// Its holder had come before, when told.
    is_front: bool,
}

/// The line of an account.
#[derive(Debug)]
struct Line {
    /// Work of the tickets that are out.
    promised: f64,
    /// Of it, at the beginning of the line.
    promised_front: f64,
    n_tickets: usize,
    /// Share of the tickets whose holders come back.
    show_up: f64,
    /// What a second of promised work takes of the line.
    scale: f64,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            promised: 0.0,
            promised_front: 0.0,
            n_tickets: 0,
            show_up: 1.0,
            scale: 1.0,
        }
    }
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
#[derive(Debug, Default)]
pub(super) struct Tickets {
    /// By request; the same one may have been sent several times.
    by_key: HashMap<TicketKey, Vec<Ticket>>,
    n: usize,
    lines: HashMap<LineKey, Line>,
    /// Times at which tickets expire.
    expiries: BTreeMap<(Instant, u64), TicketKey>,
    serial: u64,
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
            let Some(tickets) = self.by_key.get_mut(&key) else {
                continue;
            };
            let (gone, left) = tickets
                .iter()
                .partition::<Vec<Ticket>, _>(|t| t.expires <= now);
            *tickets = left;
            if tickets.is_empty() {
                self.by_key.remove(&key);
            }
            for ticket in gone {
                self.take_out(&ticket, false);
            }
        }
        if LINES_MAX < self.lines.len() {
            self.lines.retain(|_, line| 0 < line.n_tickets);
        }
    }

    /// A ticket is over: its holder came, or did not.
    fn take_out(&mut self, ticket: &Ticket, came: bool) {
        self.n -= 1;
        if let Some(line) = self.lines.get_mut(&ticket.line) {
            line.n_tickets -= 1;
            line.promised = (line.promised - ticket.work).max(0.0);
            if ticket.is_front {
                line.promised_front = (line.promised_front - ticket.work).max(0.0);
            }
            if line.n_tickets == 0 {
                // What rounding left.
                (line.promised, line.promised_front) = (0.0, 0.0);
            }
            let seen = if came { 1.0 } else { 0.0 };
            line.show_up += (seen - line.show_up) / TICKETS_REMEMBERED;
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

    /// The holder of the request's first ticket came.
    pub(super) fn claim(&mut self, key: &TicketKey) {
        let Some(tickets) = self.by_key.get_mut(key) else {
            return;
        };
        let first = (0..tickets.len()).min_by_key(|i| tickets[*i].due);
        let ticket = first.map(|first| tickets.swap_remove(first));
        if tickets.is_empty() {
            self.by_key.remove(key);
        }
        if let Some(ticket) = ticket {
            self.take_out(&ticket, true);
        }
    }

    /// A ticket for a refused request of `work` seconds that could begin after `wait` if it were the
    /// only one; `part` of the engine is its account's. Returns when to come back.
    pub(super) fn issue(
        &mut self,
        now: Instant,
        key: TicketKey,
        line_key: LineKey,
        wait: Duration,
        work: Duration,
        part: f64,
    ) -> Duration {
        // Whoever had one whose time has come keeps one place, at the beginning of the line.
        let had_one = self.standing(now, &key) == Standing::Due;
        if had_one {
            self.claim(&key);
        }
        let n_alike = self.by_key.get(&key).map_or(0, Vec::len);
        let line = self.lines.entry(line_key).or_default();
        let promised = match had_one {
            true => line.promised_front,
            false => line.promised,
        };
        let expected = promised * line.show_up.max(SHOW_UP_MIN);
        let before = expected * line.scale / part.clamp(1e-3, 1.0);
        let left = wait.as_secs_f64() + before;
        let max = RETRY_AFTER_MAX.as_secs_f64();
        let left = match left < max {
            true => left,
            // Spread over the second half, by the golden ratio.
            false => max * (0.5 + 0.5 * (self.serial as f64 * 0.618_033_988_75).fract()),
        };
        let left = Duration::try_from_secs_f64(left).unwrap_or(RETRY_AFTER_MAX);
        let told = whole_seconds(left);
        if self.n < TICKETS_MAX && n_alike < ALIKE_MAX {
            let ticket = Ticket {
                line: line_key,
                due: now + left,
                expires: now + told + LATE,
                work: work.as_secs_f64(),
                is_front: had_one,
            };
            line.promised_front += if had_one { ticket.work } else { 0.0 };
            line.n_tickets += 1;
            line.promised += ticket.work;
            self.by_key.entry(key).or_default().push(ticket);
            self.n += 1;
            self.serial += 1;
            self.expiries.insert((ticket.expires, self.serial), key);
        }
        told
    }

    /// A holder came on time and found the engine with nothing to do, or with too much: the line is
    /// made shorter or longer.
    pub(super) fn note_arrival(&mut self, line: LineKey, was_idle: bool, was_late: bool) {
        let factor = match (was_idle, was_late) {
            (true, _) => 0.98,
            (_, true) => 1.02,
            (false, false) => 1.0,
        };
        if let Some(line) = self.lines.get_mut(&line) {
            line.scale = (line.scale * factor).clamp(0.25, 3.0);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.n
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

    /// Clients that do not wait used to make the line an hour long for those who do.
    #[test]
    fn tickets_of_those_who_never_come_are_forgotten_and_lines_get_shorter() {
        let mut now = clock::now();
        let mut tickets = Tickets::default();
        let mut told = Duration::ZERO;
        for n in 0..6_000 {
            now += Duration::from_millis(10);
            tickets.tidy(now);
            told = tickets.issue(now, key(n), LINE, Duration::ZERO, SECOND, 1.0);
            assert!(tickets.len() <= TICKETS_MAX);
        }
        assert!(told < 30 * SECOND, "{told:?}");
        let other = tickets.issue(now, key(0), (0, 7, 0), Duration::ZERO, SECOND, 1.0);
        assert_eq!(other, SECOND);
        tickets.tidy(now + 3 * RETRY_AFTER_MAX);
        assert_eq!(
            (tickets.len(), tickets.by_key.len(), tickets.expiries.len()),
            (0, 0, 0)
        );
        assert!(tickets.lines.values().all(|line| line.promised == 0.0));
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
