//! The life of a group as a state machine: forming, ready, lost, forming again.
//!
//! Pure: told what happened and what time it is, it says what to do. Knows no process and no socket.
//!
//! Invariant: every formation is a new epoch, and what belongs to an earlier one changes nothing.

use std::time::{Duration, Instant};

/// How long ranks may take to load and produce a token together.
const FORM_LIMIT: Duration = Duration::from_secs(3600);
/// A group that was ready for so long is formed again at once when it is lost, whatever came out.
const PROVEN_AFTER: Duration = Duration::from_secs(10);
/// The wait after the first vain attempt; it doubles from there.
const RETRY_FIRST: Duration = Duration::from_millis(250);
/// The longest wait between attempts.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Why a group was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blame {
    /// The rank at fault.
    pub(super) rank: usize,
    /// What kind of thing happened.
    pub(super) cause: Cause,
    /// What happened, for the log and for `/ready`.
    pub(super) what: String,
}

/// What two losses may have in common. What is said of them has places and times in it that differ
/// from one to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// A process could not be started, or said why it cannot be a rank.
    Start,
    /// What a rank loaded is not what it should be.
    Identity,
    /// A process ended.
    Ended,
    /// A rank did not arrive in a step, or the step took too long.
    Late,
    /// A rank gave no sign of life.
    Silent,
    /// A rank said that it cannot go on.
    Fault,
    /// A rank's socket failed or carried nonsense.
    Socket,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Start the ranks of this epoch.
    Form {
        /// The new epoch.
        epoch: u64,
    },
    /// End the ranks: the group is lost.
    Lose {
        /// The epoch that ends.
        epoch: u64,
        /// Why.
        blame: Blame,
        /// When it forms again.
        retry_in: Duration,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Forms at this moment.
    Waiting { until: Instant },
    /// Ranks load.
    Forming { since: Instant, ready: Vec<bool> },
    /// Tokens come out.
    Ready {
        since: Instant,
        /// The last sign of life of each rank.
        last_signs: Vec<Instant>,
        /// A request got a token.
        has_served: bool,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Life {
    n_ranks: usize,
    /// Silence of a rank of a ready group that counts as a loss.
    silence_max: Duration,
    epoch: u64,
    phase: Phase,
    blame: Option<Blame>,
    /// The rank and the cause of the last loss.
    last_loss: Option<(usize, Cause)>,
    /// Losses in a row that say that forming again may not help: groups that could not be formed, or
    /// that were lost by the same cause as the one before without having served anybody.
    n_vain: u32,
}

impl Life {
    /// A group that forms at once.
    pub(super) fn new(n_ranks: usize, silence_max: Duration, now: Instant) -> Self {
        Self {
            n_ranks,
            silence_max,
            epoch: 0,
            phase: Phase::Waiting { until: now },
            blame: None,
            last_loss: None,
            n_vain: 0,
        }
    }

    /// A rank of `epoch` has all it needs.
    pub(super) fn handle_rank_ready(&mut self, epoch: u64, rank: usize, now: Instant) {
        if epoch != self.epoch {
            return;
        }
        if let Phase::Forming { ready, .. } = &mut self.phase {
            if let Some(ready) = ready.get_mut(rank) {
                *ready = true;
            }
            if ready.iter().all(|r| *r) {
                self.phase = Phase::Ready {
                    since: now,
                    last_signs: vec![now; self.n_ranks],
                    has_served: false,
                };
            }
        }
    }

    /// A request got a token from the group of `epoch`.
    pub(super) fn handle_token(&mut self, epoch: u64) {
        if epoch == self.epoch
            && let Phase::Ready { has_served, .. } = &mut self.phase
        {
            *has_served = true;
        }
    }

    /// A rank of `epoch` said that it is there.
    pub(super) fn handle_sign(&mut self, epoch: u64, rank: usize, now: Instant) {
        if epoch == self.epoch
            && let Phase::Ready { last_signs, .. } = &mut self.phase
            && let Some(last_sign) = last_signs.get_mut(rank)
        {
            *last_sign = now;
        }
    }

    /// A rank of `epoch` ended, cannot go on, or blames another. The first blame of an epoch counts.
    pub(super) fn handle_fault(&mut self, epoch: u64, blame: Blame) {
        let lives = !matches!(self.phase, Phase::Waiting { .. });
        if epoch == self.epoch && lives {
            self.blame.get_or_insert(blame);
        }
    }

    /// What to do; call until there is nothing.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Command> {
        match &self.phase {
            Phase::Waiting { until } if now < *until => None,
            Phase::Waiting { .. } => {
                self.epoch += 1;
                self.phase = Phase::Forming {
                    since: now,
                    ready: vec![false; self.n_ranks],
                };
                Some(Command::Form { epoch: self.epoch })
            }
            Phase::Forming { since, ready } => {
                let late = || {
                    let rank = ready.iter().position(|r| !r).unwrap_or(0);
                    let what = format!("rank {rank} was not ready within {FORM_LIMIT:?}");
                    Blame {
                        rank,
                        cause: Cause::Late,
                        what,
                    }
                };
                let is_late = *since + FORM_LIMIT <= now;
                let blame = self.blame.take().or_else(|| is_late.then(late))?;
                Some(self.lose(blame, true, now))
            }
            Phase::Ready {
                since,
                last_signs,
                has_served,
            } => {
                let silence_max = self.silence_max;
                let is_silent = |sign: &Instant| *sign + silence_max <= now;
                let silent = || {
                    let rank = last_signs.iter().position(is_silent)?;
                    let what = format!("rank {rank} gave no sign for {silence_max:?}");
                    Some(Blame {
                        rank,
                        cause: Cause::Silent,
                        what,
                    })
                };
                let is_proven = *has_served || *since + PROVEN_AFTER <= now;
                let blame = self.blame.take().or_else(silent)?;
                let is_vain = !is_proven && self.last_loss == Some((blame.rank, blame.cause));
                Some(self.lose(blame, is_vain, now))
            }
        }
    }

    fn lose(&mut self, blame: Blame, is_vain: bool, now: Instant) -> Command {
        self.n_vain = if is_vain { self.n_vain + 1 } else { 0 };
        let retry_in = match self.n_vain {
            0 => Duration::ZERO,
            n => (RETRY_FIRST * 2u32.saturating_pow(n - 1)).min(RETRY_MAX),
        };
        self.last_loss = Some((blame.rank, blame.cause));
        self.phase = Phase::Waiting {
            until: now + retry_in,
        };
        Command::Lose {
            epoch: self.epoch,
            blame,
            retry_in,
        }
    }

    /// When to poll again though nothing happened.
    pub(super) fn next_timeout(&self) -> Instant {
        match &self.phase {
            Phase::Waiting { until } => *until,
            Phase::Forming { since, .. } => *since + FORM_LIMIT,
            Phase::Ready {
                since, last_signs, ..
            } => last_signs.iter().min().unwrap_or(since).to_owned() + self.silence_max,
        }
    }

    /// The current epoch, 0 before the first.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// True while tokens come out.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock;

    const SILENCE: Duration = Duration::from_secs(5);

    fn blame(rank: usize) -> Blame {
        Blame {
            rank,
            cause: Cause::Ended,
            what: "died".to_owned(),
        }
    }

    fn ready(life: &mut Life, now: Instant) -> u64 {
        let Some(Command::Form { epoch }) = life.poll(now) else {
            panic!("forms: {life:?}")
        };
        for rank in 0..life.n_ranks {
            assert!(!life.is_ready());
            life.handle_rank_ready(epoch, rank, now);
        }
        assert!(life.is_ready());
        assert_eq!(life.poll(now), None);
        epoch
    }

    #[test]
    fn a_lost_group_forms_again_at_once_in_a_new_epoch() {
        let start = clock::now();
        let mut life = Life::new(2, SILENCE, start);
        assert_eq!(ready(&mut life, start), 1);
        life.handle_fault(1, blame(1));
        life.handle_fault(1, blame(0));
        let lost = Command::Lose {
            epoch: 1,
            blame: blame(1),
            retry_in: Duration::ZERO,
        };
        assert_eq!(life.poll(start), Some(lost));
        assert_eq!(ready(&mut life, start), 2);
    }

    #[test]
    fn what_an_earlier_epoch_says_changes_nothing() {
        let start = clock::now();
        let mut life = Life::new(1, SILENCE, start);
        ready(&mut life, start);
        life.handle_fault(1, blame(0));
        assert!(matches!(life.poll(start), Some(Command::Lose { .. })));
        life.handle_fault(1, blame(0));
        assert_eq!(life.poll(start), Some(Command::Form { epoch: 2 }));
        life.handle_fault(1, blame(0));
        life.handle_rank_ready(1, 0, start);
        assert_eq!(life.poll(start), None);
        assert!(!life.is_ready());
    }

    #[test]
    fn silence_is_a_loss_and_signs_put_it_off() {
        let start = clock::now();
        let mut life = Life::new(1, SILENCE, start);
        let epoch = ready(&mut life, start);
        life.handle_sign(epoch, 0, start + SILENCE / 2);
        assert_eq!(life.poll(start + SILENCE), None);
        assert_eq!(life.next_timeout(), start + SILENCE / 2 + SILENCE);
        assert!(matches!(
            life.poll(start + 2 * SILENCE),
            Some(Command::Lose {
                blame: Blame { rank: 0, .. },
                ..
            })
        ));
    }

    #[test]
    fn attempts_in_a_row_wait_longer_and_longer_and_a_proven_group_forgets_them() {
        let mut now = clock::now();
        let mut life = Life::new(1, SILENCE, now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            let Some(Command::Form { epoch }) = life.poll(now) else {
                panic!("forms: {life:?}")
            };
            life.handle_fault(epoch, blame(0));
            let Some(Command::Lose { retry_in, .. }) = life.poll(now) else {
                panic!("lost: {life:?}")
            };
            waits.push(retry_in);
            assert!(retry_in.is_zero() || life.poll(now).is_none());
            now += retry_in;
        }
        assert_eq!(waits[0], RETRY_FIRST);
        assert!(waits.is_sorted() && waits[11] == RETRY_MAX, "{waits:?}");
        let epoch = ready(&mut life, now);
        now += PROVEN_AFTER;
        life.handle_sign(epoch, 0, now);
        life.handle_fault(epoch, blame(0));
        let Some(Command::Lose { retry_in, .. }) = life.poll(now) else {
            panic!("lost: {life:?}")
        };
        assert_eq!(retry_in, Duration::ZERO);
    }

    #[test]
    fn one_silent_rank_beside_others_that_give_signs_is_blamed() {
        let start = clock::now();
        let mut life = Life::new(3, SILENCE, start);
        let epoch = ready(&mut life, start);
        for rank in [0, 2, 7] {
            life.handle_sign(epoch, rank, start + SILENCE / 2);
        }
        assert_eq!(life.next_timeout(), start + SILENCE);
        let Some(Command::Lose { blame, .. }) = life.poll(start + SILENCE) else {
            panic!("lost: {life:?}")
        };
        assert_eq!((blame.rank, blame.cause), (1, Cause::Silent));
        assert!(blame.what.contains("rank 1 gave no sign for"), "{blame:?}");
    }

    /// How long it waits after each of `losses`: by this cause, and whether it had served.
    fn waits(losses: &[(Cause, bool)]) -> Vec<Duration> {
        let mut now = clock::now();
        let mut life = Life::new(1, SILENCE, now);
        let mut n = 0;
        let wait = |(cause, has_served): &(Cause, bool)| {
            let epoch = ready(&mut life, now);
            if *has_served {
                life.handle_token(epoch);
            }
            n += 1;
            let blame = Blame {
                rank: 0,
                cause: *cause,
                what: format!("at layer {n}"),
            };
            life.handle_fault(epoch, blame);
            let Some(Command::Lose { retry_in, .. }) = life.poll(now) else {
                panic!("lost: {life:?}")
            };
            now += retry_in;
            retry_in
        };
        losses.iter().map(wait).collect()
    }

    /// A group that was killed again and again, though it served each time, used to wait up to 30 s.
    #[test]
    fn a_group_that_served_forms_again_at_once_however_often_it_is_lost() {
        assert_eq!(waits(&[(Cause::Ended, true); 10]), [Duration::ZERO; 10]);
        let causes = [Cause::Ended, Cause::Silent, Cause::Ended];
        let waits = waits(&causes.map(|cause| (cause, false)));
        assert_eq!(waits, [Duration::ZERO; 3], "other causes each time");
    }

    #[test]
    fn a_group_lost_by_the_same_cause_before_it_served_waits_longer_and_longer() {
        let waits = waits(&[(Cause::Late, false); 4]);
        assert_eq!(waits[..2], [Duration::ZERO, RETRY_FIRST]);
        assert_eq!(waits[2..], [RETRY_FIRST * 2, RETRY_FIRST * 4]);
    }
}
