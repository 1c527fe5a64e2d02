//! Shares between accounts: who is served next, and how many places are whose.
//!
//! Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over measured work: a tenant's virtual
//! time grows by the seconds its sequences used, divided by its weight, and the tenant with the
//! least virtual time is served first; inside a tenant its users are treated the same way. Charging
//! what was used, not what was asked for, is what makes it fair for generation, whose length nobody
//! knows before (virtual token counter, Sheng et al., OSDI 2024).
//!
//! Invariant: an account that comes back after a pause is at most [`CREDIT_SECONDS`] behind those
//! that were served meanwhile: idleness is not saved up.
//!
//! Called by the scheduler.

use std::collections::BTreeMap;

use crate::flow::{Account, Class};

/// Seconds of work that an account which comes back may be behind the others.
const CREDIT_SECONDS: f64 = 0.5;
/// A batch tenant's weight is divided by this beside interactive ones.
const BATCH_DIVISOR: f64 = 16.0;
/// Accounts without a sequence that are remembered; beyond, those that used least are forgotten.
const IDLE_ACCOUNTS_MAX: usize = 1024;

type TenantKey = (Class, u64);

/// What is accounted at each level.
#[derive(Debug, Default)]
struct Share {
    /// Weighted seconds used.
    virtual_time: f64,
    /// Sequences, waiting or running.
    n_live: usize,
    /// Of them in the running set.
    n_running: usize,
}

#[derive(Debug)]
struct Tenant {
    share: Share,
    weight: f64,
    users: BTreeMap<u64, Share>,
    n_users_live: usize,
    /// Virtual time of the user served last; what a user starts from when the tenant has no other.
    user_clock: f64,
}

/// Order among accounts: less goes first.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) struct Turn {
    tenant: f64,
    user: f64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Shares {
    tenants: BTreeMap<TenantKey, Tenant>,
    /// Virtual time that a tenant starts from when it is alone.
    clock: f64,
    n_idle: usize,
}

impl Shares {
    /// A sequence of the account arrived.
    pub(super) fn join(&mut self, account: Account) {
        let key = key_of(account);
        let others = self.tenants.iter().filter(|(other, _)| **other != key);
        let live = others.filter(|(_, t)| t.share.n_live > 0);
        let least = live.map(|(_, t)| t.share.virtual_time).reduce(f64::min);
        let start = least.unwrap_or(self.clock);
        let tenant = self.tenants.entry(key).or_insert_with(|| Tenant {
            share: Share::default(),
            weight: 1.0,
            users: BTreeMap::new(),
            n_users_live: 0,
            user_clock: 0.0,
        });
        tenant.weight = weight_of(account);
        let floor = start - CREDIT_SECONDS / tenant.weight;
        if tenant.share.n_live == 0 {
            tenant.share.virtual_time = tenant.share.virtual_time.max(floor);
        }
        tenant.share.n_live += 1;
        let others = tenant
            .users
            .iter()
            .filter(|(user, _)| **user != account.user);
        let live = others.filter(|(_, u)| u.n_live > 0);
        let least = live.map(|(_, u)| u.virtual_time).reduce(f64::min);
        let start = least.unwrap_or(tenant.user_clock);
        let is_known = tenant.users.contains_key(&account.user);
        let user = tenant.users.entry(account.user).or_default();
        if user.n_live == 0 {
            user.virtual_time = user.virtual_time.max(start - CREDIT_SECONDS);
            tenant.n_users_live += 1;
            self.n_idle -= usize::from(is_known);
        }
        user.n_live += 1;
    }

    /// A sequence of the account is gone.
    pub(super) fn leave(&mut self, account: Account) {
        let Some((tenant, user)) = self.entry(account) else {
            unreachable!("an account is left by who joined it");
        };
        tenant.n_live -= 1;
        user.n_live -= 1;
        let is_idle = user.n_live == 0;
        if is_idle {
            self.n_idle += 1;
            if let Some(tenant) = self.tenants.get_mut(&key_of(account)) {
                tenant.n_users_live -= 1;
            }
            self.forget();
        }
    }

    /// A sequence of the account enters the running set, or leaves it.
    pub(super) fn note_running(&mut self, account: Account, runs: bool) {
        let Some((tenant, user)) = self.entry(account) else {
            unreachable!("an account with a sequence is known");
        };
        for share in [tenant, user] {
            share.n_running = match runs {
                true => share.n_running + 1,
                false => share.n_running - 1,
            };
        }
    }

    /// The account's sequences used `seconds`.
    pub(super) fn charge(&mut self, account: Account, seconds: f64) {
        let weight = weight_of(account);
        let Some(tenant) = self.tenants.get_mut(&key_of(account)) else {
            unreachable!("an account with a sequence is known");
        };
        tenant.share.virtual_time += seconds / weight;
        self.clock = self.clock.max(tenant.share.virtual_time);
        if let Some(user) = tenant.users.get_mut(&account.user) {
            user.virtual_time += seconds;
            tenant.user_clock = tenant.user_clock.max(user.virtual_time);
        }
    }

    /// When it is the account's turn.
    pub(super) fn turn(&self, account: Account) -> Turn {
        let tenant = self.tenants.get(&key_of(account));
        let user = tenant.and_then(|t| t.users.get(&account.user));
        Turn {
            tenant: tenant.map_or(0.0, |t| t.share.virtual_time),
            user: user.map_or(0.0, |u| u.virtual_time),
        }
    }

    /// The part of what is shared, between 0 and 1, that is the account's while those live now are.
    pub(super) fn part(&self, account: Account) -> f64 {
        let live = self.tenants.values().filter(|t| t.share.n_live > 0);
        let all: f64 = live.map(|t| t.weight).sum();
        let n_users = self
            .tenants
            .get(&key_of(account))
            .map_or(1, |t| t.n_users_live.max(1));
        weight_of(account) / all.max(weight_of(account)) / n_users as f64
    }

    /// Sequences of the account in the running set.
    pub(super) fn n_running(&self, account: Account) -> usize {
        let tenant = self.tenants.get(&key_of(account));
        let user = tenant.and_then(|t| t.users.get(&account.user));
        user.map_or(0, |u| u.n_running)
    }

    fn entry(&mut self, account: Account) -> Option<(&mut Share, &mut Share)> {
        let tenant = self.tenants.get_mut(&key_of(account))?;
        let user = tenant.users.get_mut(&account.user)?;
        Some((&mut tenant.share, user))
    }

    /// Keeps the number of accounts without sequences bounded.
    fn forget(&mut self) {
        if self.n_idle <= IDLE_ACCOUNTS_MAX {
            return;
        }
        let idle = self.tenants.iter().flat_map(|(key, tenant)| {
            let users = tenant.users.iter().filter(|(_, u)| u.n_live == 0);
            users.map(|(user, share)| (*key, *user, share.virtual_time))
        });
        let least = idle.min_by(|a, b| a.2.total_cmp(&b.2));
        let Some((key, user, _)) = least else { return };
        self.n_idle -= 1;
        if let Some(tenant) = self.tenants.get_mut(&key) {
            tenant.users.remove(&user);
            if tenant.users.is_empty() {
                self.tenants.remove(&key);
            }
        }
    }
}

fn key_of(account: Account) -> TenantKey {
    (account.class, account.tenant)
}

fn weight_of(account: Account) -> f64 {
    let weight = f64::from(account.weight.max(1));
    match account.class {
        Class::Interactive => weight,
        Class::Batch => weight / BATCH_DIVISOR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(tenant: u64, user: u64, weight: u32) -> Account {
        Account {
            tenant,
            user,
            weight,
            class: Class::Interactive,
        }
    }

    #[test]
    fn virtual_time_follows_weights_and_idleness_is_not_saved_up() {
        let (a, b) = (account(1, 0, 3), account(2, 0, 1));
        let mut shares = Shares::default();
        shares.join(a);
        for _ in 0..300 {
            shares.charge(a, 1.0);
        }
        shares.join(b);
        assert!(shares.turn(b) < shares.turn(a), "a newcomer is first");
        let mut used = [0.0f64; 2];
        for _ in 0..4000 {
            let i = usize::from(shares.turn(b) < shares.turn(a));
            shares.charge([a, b][i], 0.1);
            used[i] += 0.1;
        }
        let ratio = used[0] / used[1];
        assert!((ratio - 3.0).abs() < 0.05, "{ratio}");
        assert!((shares.part(a) - 0.75).abs() < 1e-9 && (shares.part(b) - 0.25).abs() < 1e-9);
        shares.leave(b);
        assert!((shares.part(a) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn users_share_what_is_their_tenants() {
        let mut shares = Shares::default();
        let users = [account(1, 1, 1), account(1, 2, 1), account(2, 9, 1)];
        for user in users {
            shares.join(user);
        }
        let mut used = [0.0f64; 3];
        for _ in 0..4000 {
            let next = (0..3).min_by(|i, k| {
                let turns = (shares.turn(users[*i]), shares.turn(users[*k]));
                turns.0.partial_cmp(&turns.1).unwrap()
            });
            shares.charge(users[next.unwrap()], 0.1);
            used[next.unwrap()] += 0.1;
        }
        assert!((used[0] / 100.0 - 1.0).abs() < 0.02, "{used:?}");
        assert!((used[2] / 200.0 - 1.0).abs() < 0.02, "{used:?}");
        assert!((shares.part(users[0]) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn accounts_that_went_away_are_few() {
        let mut shares = Shares::default();
        for user in 0..5000 {
            shares.join(account(user % 7, user, 1));
            shares.charge(account(user % 7, user, 1), 0.1);
            shares.leave(account(user % 7, user, 1));
        }
        let n: usize = shares.tenants.values().map(|t| t.users.len()).sum();
        assert_eq!(n, IDLE_ACCOUNTS_MAX);
        assert_eq!(shares.n_idle, n);
    }
}
