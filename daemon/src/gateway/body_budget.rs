//! Room for request bodies in flight: one budget of bytes for all of them.
//!
//! Bytes are taken as they arrive and given back when the request has been prepared or refused. The
//! first [`ALLOWANCE_LEN`] of each body are not counted unless it is known to be longer, so that short
//! requests pass whatever long ones do. Knows neither HTTP nor a clock.
//!
//! Older bodies go first. When all that hold bytes wait for more, none would ever end: then the
//! youngest is refused, so the oldest always ends.
//!
//! Invariant: what is held and what is free add up to the budget.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// Bytes of each body that are not counted.
pub(super) const ALLOWANCE_LEN: usize = 16 * 1024;

/// The budget. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct BodyBudget(Arc<Mutex<Ledger>>);

/// One body's part of the budget; gives it back when dropped.
#[derive(Debug)]
pub(super) struct BodyShare {
    budget: BodyBudget,
    id: u64,
    /// Bytes at its beginning that are not counted.
    allowance: usize,
    /// Bytes that came, those not counted included.
    n_arrived: usize,
}

/// The body was given up so that older ones can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GivenUp;

#[derive(Debug)]
struct Ledger {
    free: usize,
    /// By age, the oldest first.
    accounts: BTreeMap<u64, usize>,
    waiting: BTreeMap<u64, Wait>,
    next_id: u64,
    /// Bodies that hold counted bytes.
    n_holders: usize,
    /// Of them, those that wait for more.
    n_holders_waiting: usize,
}

#[derive(Debug)]
struct Wait {
    len: usize,
    decision: oneshot::Sender<Result<(), GivenUp>>,
}

impl BodyBudget {
    /// A budget of `len` bytes.
    pub(super) fn new(len: usize) -> Self {
        Self(Arc::new(Mutex::new(Ledger {
            free: len,
            accounts: BTreeMap::new(),
            waiting: BTreeMap::new(),
            next_id: 0,
            n_holders: 0,
            n_holders_waiting: 0,
        })))
    }

    /// A body begins to arrive, of this length if that is known.
    pub(super) fn open(&self, len: Option<u64>) -> BodyShare {
        let is_long = len.is_some_and(|len| (ALLOWANCE_LEN as u64) < len);
        let mut ledger = self.lock();
        let id = ledger.next_id;
        ledger.next_id += 1;
        ledger.accounts.insert(id, 0);
        BodyShare {
            budget: self.clone(),
            id,
            allowance: if is_long { 0 } else { ALLOWANCE_LEN },
            n_arrived: 0,
        }
    }

    fn is_contended(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Held for a few lines, never while waiting.
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BodyShare {
    /// Takes room for `len` more bytes, or says when it will be known whether there is any.
    pub(super) fn take(&mut self, len: usize) -> Option<Waiting<'_>> {
        let counted = |n: usize| n.saturating_sub(self.allowance);
        let n_new = counted(self.n_arrived + len) - counted(self.n_arrived);
        self.n_arrived += len;
        if n_new == 0 {
            return None;
        }
        let (tx, rx) = oneshot::channel();
        let mut ledger = self.budget.lock();
        ledger.ask(self.id, n_new, tx);
        ledger.settle();
        let is_waiting = ledger.waiting.contains_key(&self.id);
        drop(ledger);
        is_waiting.then_some(Waiting {
            share: self,
            decision: rx,
        })
    }

    /// Whether it holds bytes while others wait for room.
    pub(super) fn is_in_the_way(&self) -> bool {
        self.is_holder() && self.budget.is_contended()
    }

    fn is_holder(&self) -> bool {
        self.allowance < self.n_arrived
    }
}

impl Drop for BodyShare {
    fn drop(&mut self) {
        let mut ledger = self.budget.lock();
        ledger.close(self.id);
        ledger.settle();
    }
}

/// A body that waits for room. Dropped before the decision, it must not take more.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    share: &'a BodyShare,
    decision: oneshot::Receiver<Result<(), GivenUp>>,
}

impl Waiting<'_> {
    /// Waits until there is room.
    ///
    /// # Errors
    /// When the body was given up.
    pub(super) async fn decided(mut self) -> Result<(), GivenUp> {
        (&mut self.decision).await.unwrap_or(Err(GivenUp))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.share.budget.lock().stop_waiting(self.share.id);
    }
}

impl Ledger {
    fn ask(&mut self, id: u64, len: usize, decision: oneshot::Sender<Result<(), GivenUp>>) {
        self.n_holders_waiting += usize::from(self.holds(id));
        let former = self.waiting.insert(id, Wait { len, decision });
        assert!(former.is_none(), "a body waits for one read at a time");
    }

    fn holds(&self, id: u64) -> bool {
        self.accounts.get(&id).is_some_and(|held| 0 < *held)
    }

    fn stop_waiting(&mut self, id: u64) -> Option<Wait> {
        let wait = self.waiting.remove(&id)?;
        self.n_holders_waiting -= usize::from(self.holds(id));
        Some(wait)
    }

    fn add(&mut self, id: u64, len: usize) {
        if let Some(held) = self.accounts.get_mut(&id) {
            self.n_holders += usize::from(*held == 0);
            *held += len;
            self.free -= len;
        }
    }

    /// Gives back what a body holds.
    fn close(&mut self, id: u64) {
        self.stop_waiting(id);
        if let Some(held) = self.accounts.remove(&id) {
            self.n_holders -= usize::from(0 < held);
            self.free += held;
        }
    }

    /// Lets the oldest have what is free, and makes room where nobody else will.
    fn settle(&mut self) {
        while let Some((&oldest, wait)) = self.waiting.first_key_value() {
            if wait.len <= self.free {
                let len = wait.len;
                let wait = self.stop_waiting(oldest);
                self.add(oldest, len);
                // Whoever does not listen any more gives it back in its drop.
                let _ = wait.map(|wait| wait.decision.send(Ok(())));
                continue;
            }
            if self.n_holders_waiting < self.n_holders {
                // Somebody still receives, or is being prepared, and will end.
                return;
            }
            let mut youngest_first = self.waiting.keys().rev().copied();
            let victim = youngest_first.find(|id| *id != oldest && self.holds(*id));
            let Some(victim) = victim else {
                // A read longer than all there is; the caller's wait has a limit.
                return;
            };
            let wait = self.stop_waiting(victim);
            self.close(victim);
            let _ = wait.map(|wait| wait.decision.send(Err(GivenUp)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1024;

    /// A body of which `len` counted bytes have come.
    fn holder(budget: &BodyBudget, len: usize) -> BodyShare {
        let mut share = budget.open(None);
        assert!(share.take(ALLOWANCE_LEN).is_none());
        assert!(share.take(len).is_none(), "no room for {len}");
        share
    }

    fn free(budget: &BodyBudget) -> usize {
        budget.lock().free
    }

    #[test]
    fn short_bodies_cost_nothing_and_long_ones_what_is_beyond_the_allowance() {
        let budget = BodyBudget::new(32 * KIB);
        let long = holder(&budget, 32 * KIB);
        assert_eq!(free(&budget), 0);
        let mut short = budget.open(None);
        for _ in 0..16 {
            assert!(short.take(KIB).is_none());
        }
        assert!(!short.is_holder() && long.is_holder());
        drop(long);
        assert_eq!(free(&budget), 32 * KIB);
        // Known to be long, it counts from its first byte, so that many of them cannot hold much
        // while they wait.
        let mut known = budget.open(Some(ALLOWANCE_LEN as u64 + 1));
        assert!(known.take(KIB).is_none() && known.is_holder());
        assert_eq!(free(&budget), 31 * KIB);
    }

    #[tokio::test]
    async fn room_that_comes_free_goes_to_the_oldest() {
        let budget = BodyBudget::new(32 * KIB);
        let mut older = holder(&budget, 4 * KIB);
        let mut younger = holder(&budget, 4 * KIB);
        let third = holder(&budget, 24 * KIB);
        let younger_waits = younger.take(8 * KIB).unwrap();
        let older_waits = older.take(20 * KIB).unwrap();
        assert!(budget.is_contended());
        drop(third);
        assert_eq!(older_waits.decided().await, Ok(()));
        assert!(budget.is_contended(), "4 KiB are free, 8 are asked for");
        drop(older);
        assert_eq!(younger_waits.decided().await, Ok(()));
        drop(younger);
        assert_eq!(free(&budget), 32 * KIB);
        assert!(!budget.is_contended());
    }

    /// Two bodies that each hold half and want more would wait for each other for ever.
    #[tokio::test]
    async fn the_youngest_is_given_up_when_all_wait() {
        let budget = BodyBudget::new(32 * KIB);
        let mut older = holder(&budget, 16 * KIB);
        let mut younger = holder(&budget, 16 * KIB);
        let younger_waits = younger.take(KIB).unwrap();
        assert!(older.take(16 * KIB).is_none(), "it has room at once");
        assert_eq!(younger_waits.decided().await, Err(GivenUp));
        // What was given back is not given back again.
        drop(younger);
        assert_eq!(free(&budget), 0);
        drop(older);
        assert_eq!(free(&budget), 32 * KIB);
    }

    #[test]
    fn who_leaves_while_waiting_leaves_nothing_behind() {
        let budget = BodyBudget::new(32 * KIB);
        let mut long = holder(&budget, 32 * KIB);
        let mut leaver = budget.open(None);
        drop(leaver.take(ALLOWANCE_LEN + KIB).unwrap());
        assert!(!budget.is_contended());
        drop(leaver);
        // Alone with the whole budget, more than that never comes; its wait is dropped at its limit.
        drop(long.take(1).unwrap());
        drop(long);
        let ledger = budget.lock();
        assert_eq!((ledger.free, ledger.n_holders), (32 * KIB, 0));
        assert!(ledger.accounts.is_empty() && ledger.waiting.is_empty());
    }

    /// Whatever comes in whatever order, the books balance and the oldest ends.
    #[test]
    fn books_balance_under_any_order_of_events() {
        const BUDGET_LEN: usize = 64 * KIB;
        for seed in 0..200_u64 {
            let budget = BodyBudget::new(BUDGET_LEN);
            let mut ids: Vec<u64> = Vec::new();
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut next = |below: usize| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                usize::try_from(random >> 33).unwrap() % below
            };
            let mut receivers = Vec::new();
            for _ in 0..300 {
                let mut ledger = budget.lock();
                match next(3) {
                    0 => {
                        let id = ledger.next_id;
                        ledger.next_id += 1;
                        ledger.accounts.insert(id, 0);
                        ids.push(id);
                    }
                    1 if !ids.is_empty() => {
                        let id = ids[next(ids.len())];
                        let held = ledger.accounts.get(&id).copied();
                        let len = 1 + next(16 * KIB);
                        let fits = held.is_some_and(|held| held + len <= BUDGET_LEN);
                        if fits && !ledger.waiting.contains_key(&id) {
                            let (tx, rx) = oneshot::channel();
                            ledger.ask(id, len, tx);
                            receivers.push(rx);
                        }
                    }
                    _ if !ids.is_empty() => {
                        let id = ids.swap_remove(next(ids.len()));
                        ledger.close(id);
                    }
                    _ => {}
                }
                ledger.settle();
                let held: usize = ledger.accounts.values().sum();
                assert_eq!(held + ledger.free, BUDGET_LEN, "seed {seed}");
                let is_stuck =
                    !ledger.waiting.is_empty() && ledger.n_holders == ledger.n_holders_waiting;
                assert!(!is_stuck, "seed {seed}: all wait for each other");
            }
        }
    }
}
