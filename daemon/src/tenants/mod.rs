//! Who may call, for how much, and what each used.
//!
//! Holds the tenants that the operator's file names, told apart by their API keys, and swaps them as
//! a whole when the file changes. Knows no HTTP and no engine; the edge asks it who a key is, takes a
//! [`Lease`] for each request, and what the request's work is charged to comes from [`Caller`].
//!
//! Invariant: a set of tenants is valid as a whole or not there; a file that became wrong leaves the
//! old set in place.
//! Invariant: what a client can choose never leads into another tenant's cache, caps or counts.

mod caps;
mod edit;
mod file;
mod keys;
mod lease;
mod usage;

#[cfg(test)]
mod tests;

pub use caps::{Cap, Caps, Left, OverCap, Want};
pub use edit::{Change, EditError, Patch};
pub use file::{GRACE_MAX, MODELS_MAX, NAME_LEN_MAX, Now, TENANTS_MAX, TenantsError, WEIGHT_MAX};
pub use keys::{Key, KeyDigest};
pub use lease::{Caller, Lease};
pub use usage::{Refused, Usage, Work};

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use crate::{flow::Class, telemetry};
use lease::Ledger;

/// Tenants that ever were labels in metrics; those that come later share one. The exporter keeps a
/// label until the process ends, whatever becomes of the tenant.
const LABELS_MAX: usize = 4 * TENANTS_MAX;
/// The label of those.
const LABEL_OTHER: &str = "other";
/// Whom everybody is where no keys are configured.
const ANONYMOUS: &str = "anonymous";
/// Whose the keys of a file of bare keys are.
const DEFAULT: &str = "default";

/// One who may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tenant {
    /// As the operator calls it.
    pub name: Arc<str>,
    /// Digest of the name, never 0 but for everybody where no keys are configured.
    pub id: u64,
    /// Its share against others', at least 1.
    pub weight: u32,
    /// What its requests expect unless they say `flex`.
    pub class: Class,
    /// What it may have.
    pub caps: Caps,
    /// Models it may use; `None` for all.
    pub models: Option<BTreeSet<String>>,
    /// Its keys.
    pub keys: Vec<Key>,
    /// Whether its keys share no cached prompts, as those of a file of bare keys.
    pub isolates_keys: bool,
}

impl Tenant {
    /// A tenant of weight 1 without caps and keys.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            id: id_of(name),
            weight: 1,
            class: Class::Interactive,
            caps: Caps::default(),
            models: None,
            keys: Vec::new(),
            isolates_keys: false,
        }
    }
}

/// The digest of a tenant's name by which work is charged.
fn id_of(name: &str) -> u64 {
    digest("dsd tenant id", &[name.as_bytes()]).max(1)
}

/// The first bytes of a digest of `parts` for one `purpose`.
fn digest(purpose: &str, parts: &[&[u8]]) -> u64 {
    let whole = digest_whole(purpose, parts);
    whole
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A digest of `parts` that no other purpose and no other division into parts shares.
fn digest_whole(purpose: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(purpose);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// Where tenants come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: everybody may call.
    Open,
    /// A file of bare keys, all of one tenant.
    Keys(PathBuf),
    /// A file of tenants.
    File(PathBuf),
}

/// Why a caller is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No key.
    #[error("an API key is needed: `Authorization: Bearer KEY`")]
    Missing,
    /// A key of nobody.
    #[error("the API key is not known")]
    Unknown,
}

/// What a reload changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Tenants now.
    pub n_tenants: usize,
    /// Of them new.
    pub n_added: usize,
    /// Gone.
    pub n_removed: usize,
}

/// A tenant as it is now, for people and programs.
#[derive(Debug, Clone)]
pub struct TenantReport {
    /// What the file says.
    pub tenant: Tenant,
    /// Keys that are let in now.
    pub n_keys: usize,
    /// What it used.
    pub usage: Usage,
    /// What is left under its caps.
    pub left: Left,
    /// Its part of all tenants' work of the last minute, 0 to 1.
    pub share: f64,
}

/// The tenants of a node.
#[derive(Debug)]
pub struct Tenants {
    source: Source,
    set: ArcSwap<Set>,
    /// Held while a set is made from another one, by a reload or an edit of the file.
    changes: Mutex<()>,
    /// Names that are labels in metrics.
    labels: Mutex<BTreeSet<Arc<str>>>,
    /// Where seconds of work are counted from.
    origin: Instant,
}

/// The tenants at one time.
#[derive(Debug, Default)]
struct Set {
    members: Vec<Arc<Member>>,
    /// Everybody's, where no keys are configured.
    everybody: Option<Arc<Member>>,
}

/// A tenant with its counts, which outlive changes of its settings.
#[derive(Debug)]
struct Member {
    tenant: Tenant,
    ledger: Arc<Ledger>,
}

impl Set {
    fn members(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.members.iter().chain(&self.everybody)
    }

    fn named(&self, name: &str) -> Option<&Arc<Member>> {
        self.members().find(|member| &*member.tenant.name == name)
    }
}

impl Tenants {
    /// Everybody may call.
    pub fn open(now: Instant) -> Self {
        let tenants = Self::empty(Source::Open, now);
        let mut everybody = Tenant::new(ANONYMOUS);
        everybody.id = 0;
        let member = tenants.member(everybody, None, now);
        tenants.set.store(Arc::new(Set {
            members: Vec::new(),
            everybody: Some(member),
        }));
        tenants
    }

    /// The tenants of `source`.
    ///
    /// # Errors
    /// [`TenantsError`], on the first thing that is wrong.
    pub fn read(source: Source, now: Now) -> Result<Self, TenantsError> {
        if source == Source::Open {
            return Ok(Self::open(now.instant));
        }
        let tenants = Self::empty(source, now.instant);
        tenants.reload(now)?;
        Ok(tenants)
    }

    fn empty(source: Source, now: Instant) -> Self {
        Self {
            source,
            set: ArcSwap::default(),
            changes: Mutex::default(),
            labels: Mutex::default(),
            origin: now,
        }
    }

    /// Reads the file again. Requests under way go on; a key that is gone is refused from now on.
    ///
    /// # Errors
    /// [`TenantsError`]; the old tenants stay then.
    pub fn reload(&self, now: Now) -> Result<Reloaded, TenantsError> {
        let _changing = self.lock_changes();
        let read = match &self.source {
            Source::Open => {
                return Ok(Reloaded {
                    n_tenants: 1,
                    ..Reloaded::default()
                });
            }
            Source::Keys(path) => {
                let mut tenant = Tenant::new(DEFAULT);
                tenant.keys = file::parse_keys(&file::read_private(path)?, path)?;
                tenant.isolates_keys = true;
                vec![tenant]
            }
            Source::File(path) => file::parse(&file::read_private(path)?, path, now)?,
        };
        Ok(self.replace(read, now.instant))
    }

    /// Puts a new set in place of the old one; `changes` is held.
    fn replace(&self, tenants: Vec<Tenant>, now: Instant) -> Reloaded {
        let old = self.set.load_full();
        let mut n_kept = 0;
        let members = tenants.into_iter().map(|mut tenant| {
            let before = old.named(&tenant.name);
            n_kept += usize::from(before.is_some());
            if let Some(before) = before {
                keep_deadlines(&before.tenant.keys, &mut tenant.keys);
            }
            self.member(tenant, before.map(|member| Arc::clone(&member.ledger)), now)
        });
        let members: Vec<_> = members.collect();
        let reloaded = Reloaded {
            n_tenants: members.len(),
            n_added: members.len() - n_kept,
            n_removed: old.members.len() - n_kept,
        };
        self.set.store(Arc::new(Set {
            members,
            everybody: None,
        }));
        reloaded
    }

    fn member(&self, tenant: Tenant, ledger: Option<Arc<Ledger>>, now: Instant) -> Arc<Member> {
        let ledger = ledger.unwrap_or_else(|| {
            let label = self.label(&tenant.name);
            Arc::new(Ledger::new(label, now))
        });
        Arc::new(Member { tenant, ledger })
    }

    fn label(&self, name: &Arc<str>) -> Arc<str> {
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        if labels.len() < LABELS_MAX || labels.contains(name) {
            if labels.insert(Arc::clone(name)) {
                telemetry::declare("tenant", name);
            }
            return Arc::clone(name);
        }
        LABEL_OTHER.into()
    }

    /// Who a key is. Where everybody may call, keys are not looked at.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn admit(&self, key: Option<&str>, now: Instant) -> Result<Caller, KeyError> {
        let set = self.set.load();
        if let Some(everybody) = &set.everybody {
            return Ok(Caller::new(Arc::clone(everybody), None, self.origin));
        }
        let digest = KeyDigest::of(key.ok_or(KeyError::Missing)?);
        // All of them, so that time tells nothing about where a key stands.
        let mut found = None;
        for member in &set.members {
            for key in &member.tenant.keys {
                let is_over = key.until.is_some_and(|until| until <= now);
                if (key.digest == digest) & !is_over {
                    found = Some(member);
                }
            }
        }
        let member = Arc::clone(found.ok_or(KeyError::Unknown)?);
        let salt = member.tenant.isolates_keys.then_some(digest);
        Ok(Caller::new(member, salt, self.origin))
    }

    /// Whether everybody may call.
    pub fn is_open(&self) -> bool {
        self.set.load().everybody.is_some()
    }

    /// All tenants, by name.
    pub fn reports(&self, now: Instant) -> Vec<TenantReport> {
        let set = self.set.load_full();
        let second = self.second(now);
        let works: Vec<Work> = set.members().map(|m| m.ledger.work(second)).collect();
        let all = works.iter().copied().fold(Work::default(), |a, b| a + b);
        let mut reports: Vec<TenantReport> = set
            .members()
            .zip(works)
            .map(|(member, work)| member.report(work.share_of(all), now))
            .collect();
        reports.sort_by(|a, b| a.tenant.name.cmp(&b.tenant.name));
        reports
    }

    /// One tenant.
    pub fn report(&self, name: &str, now: Instant) -> Option<TenantReport> {
        let reports = self.reports(now);
        let mut named = reports.into_iter().filter(|r| &*r.tenant.name == name);
        named.next()
    }

    /// Sets the gauges that change with time alone; call it every few seconds.
    pub fn publish(&self, now: Instant) {
        for report in self.reports(now) {
            let label = self.label(&report.tenant.name);
            metrics::gauge!("dsd_tenant_work_share_ratio", "tenant" => label.to_string())
                .set(report.share);
        }
    }

    fn second(&self, now: Instant) -> u64 {
        second(self.origin, now)
    }

    fn lock_changes(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    fn report(&self, share: f64, now: Instant) -> TenantReport {
        let is_valid = |key: &&Key| key.until.is_none_or(|until| now < until);
        TenantReport {
            tenant: self.tenant.clone(),
            n_keys: self.tenant.keys.iter().filter(is_valid).count(),
            usage: self.ledger.usage(),
            left: self.ledger.left(&self.tenant.caps, now),
            share,
        }
    }
}

fn second(origin: Instant, now: Instant) -> u64 {
    now.saturating_duration_since(origin).as_secs()
}

/// A key that was given an end keeps it when the file is read again: the file's is by the wall
/// clock, which may have been set back.
fn keep_deadlines(old: &[Key], new: &mut [Key]) {
    let ends: BTreeMap<[u8; 32], Instant> = old
        .iter()
        .filter_map(|key| Some((*key.digest.bytes(), key.until?)))
        .collect();
    for key in new {
        if let (Some(until), Some(end)) = (&mut key.until, ends.get(key.digest.bytes())) {
            *until = (*until).min(*end);
        }
    }
}

/// The path of a tenants file, for messages.
fn file_of(source: &Source) -> Option<&Path> {
    match source {
        Source::File(path) => Some(path),
        Source::Open | Source::Keys(_) => None,
    }
}

/// Longest `--grace` as a duration, checked where a number comes from outside.
pub fn grace(seconds: u64) -> Option<Duration> {
    let grace = Duration::from_secs(seconds);
    (grace <= GRACE_MAX).then_some(grace)
}
