//! A caller, and what its requests hold until they are over.
//!
//! Invariant: what a [`Lease`] took is given back exactly once, whatever becomes of the request.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Member, Tenant,
    caps::{Cap, CapState, Caps, Left, OverCap, Want},
    digest, digest_whole,
    keys::KeyDigest,
    second,
    usage::{Refused, Usage, Work},
};
use crate::{
    flow::{Account, CacheOwner, Class},
    runtime::clock,
};

/// Tokens that a choice is expected to write before one of the tenant's has ended.
const OUTPUT_TOKENS_DEFAULT: f64 = 256.0;
/// Weight of the newest choice in the mean output.
const OUTPUT_GAIN: f64 = 1.0 / 16.0;

/// Counts of a tenant.
#[derive(Debug)]
pub(super) struct Ledger {
    label: Arc<str>,
    /// Guards a few additions at a time.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    caps: CapState,
    usage: Usage,
    /// Mean tokens of a choice.
    output_mean: f64,
}

impl Ledger {
    pub(super) fn new(label: Arc<str>, now: Instant) -> Self {
        let state = State {
            caps: CapState::new(now),
            usage: Usage::default(),
            output_mean: OUTPUT_TOKENS_DEFAULT,
        };
        Self {
            label,
            state: Mutex::new(state),
        }
    }

    pub(super) fn usage(&self) -> Usage {
        self.lock().usage.clone()
    }

    pub(super) fn left(&self, caps: &Caps, now: Instant) -> Left {
        self.lock().caps.left(caps, now)
    }

    pub(super) fn work(&self, second: u64) -> Work {
        self.lock().usage.work(second)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self, why: Refused) {
        self.lock().usage.refused(why);
        let (tenant, reason) = (self.label.to_string(), why.word());
        metrics::counter!("dsd_tenant_refusals_total", "tenant" => tenant, "reason" => reason)
            .increment(1);
    }

    /// Shows what is open; called with the counts that were just set.
    fn show_open(&self, usage: &Usage) {
        let tenant = self.label.to_string();
        metrics::gauge!("dsd_tenant_choices_waiting", "tenant" => tenant.clone())
            .set(usage.n_waiting);
        metrics::gauge!("dsd_tenant_choices_running", "tenant" => tenant).set(usage.n_running);
    }
}

/// Who makes a request: a tenant, as it was when the request came.
#[derive(Debug, Clone)]
pub struct Caller {
    pub(super) member: Arc<Member>,
    /// The key, where each has cached prompts of its own.
    salt: Option<KeyDigest>,
    origin: Instant,
}

impl Caller {
    pub(super) fn new(member: Arc<Member>, salt: Option<KeyDigest>, origin: Instant) -> Self {
        Self {
            member,
            salt,
            origin,
        }
    }

    /// The tenant.
    pub fn tenant(&self) -> &Tenant {
        &self.member.tenant
    }

    /// What a request's work is charged to. `user` is the client's name for whom it asks.
    pub fn account(&self, user: Option<&str>, is_batch: bool) -> Account {
        let tenant = self.tenant();
        let id = tenant.id.to_le_bytes();
        let user = user.filter(|user| !user.is_empty());
        Account {
            tenant: tenant.id,
            user: user.map_or(0, |user| {
                digest("dsd user id", &[&id, user.as_bytes()]).max(1)
            }),
            weight: tenant.weight,
            class: if is_batch { Class::Batch } else { tenant.class },
        }
    }

    /// With whom a request shares cached prompts: its tenant, and within it the user that the client
    /// keeps apart. Everybody's is the same where everybody may call.
    pub fn cache_owner(&self, user_id: Option<&str>) -> CacheOwner {
        let tenant = self.tenant();
        if tenant.id == 0 && user_id.is_none() {
            return CacheOwner::default();
        }
        let salt = self.salt.as_ref().map_or(&[][..], |key| &key.bytes()[..]);
        let user = user_id.unwrap_or("").as_bytes();
        CacheOwner(digest_whole(
            "dsd cache owner",
            &[tenant.name.as_bytes(), salt, user],
        ))
    }

    /// Whether it may use a model.
    pub fn may_use(&self, model: &str) -> bool {
        let models = &self.tenant().models;
        models.as_ref().is_none_or(|models| models.contains(model))
    }

    /// What is left under the tenant's caps.
    pub fn left(&self, now: Instant) -> Left {
        self.member.ledger.left(&self.tenant().caps, now)
    }

    /// Counts a refusal.
    pub fn refused(&self, why: Refused) {
        self.member.ledger.refused(why);
    }

    /// Whether the smallest request would be taken now, to be asked before a body is read.
    ///
    /// # Errors
    /// [`OverCap`], which is counted.
    pub fn check(&self, now: Instant) -> Result<(), OverCap> {
        let least = Want {
            n_choices: 1,
            n_tokens: 1,
        };
        let checked = {
            let mut state = self.member.ledger.lock();
            state.caps.check(&self.tenant().caps, least, now)
        };
        checked.inspect_err(|over| self.refused(reason(over.cap)))
    }

    /// Takes what a request of `n_choices` choices needs under the caps. `max_tokens` is the longest
    /// output of a choice; shorter ones are expected if the tenant's were shorter so far.
    ///
    /// # Errors
    /// [`OverCap`], which is counted.
    pub fn take(
        &self,
        n_choices: u32,
        n_prompt_tokens: u64,
        max_tokens: Option<u64>,
        now: Instant,
    ) -> Result<Lease, OverCap> {
        let ledger = &self.member.ledger;
        let taken = {
            let mut state = ledger.lock();
            let n_output = as_u64(state.output_mean.ceil()).min(max_tokens.unwrap_or(u64::MAX));
            let want = Want {
                n_choices,
                n_tokens: n_prompt_tokens + u64::from(n_choices) * n_output,
            };
            state
                .caps
                .take(&self.tenant().caps, want, now)
                .inspect(|()| {
                    state.usage.n_waiting += n_choices;
                    ledger.show_open(&state.usage);
                })
                .map(|()| want)
        };
        let want = taken.inspect_err(|over| self.refused(reason(over.cap)))?;
        Ok(Lease {
            ledger: Arc::clone(ledger),
            want,
            taken_at: now,
            started_at: None,
            is_void: false,
            n_prompt: 0,
            n_cached: 0,
            n_output: 0,
            seconds: 0.0,
            origin: self.origin,
        })
    }
}

/// What a request holds until it is over; dropping it gives back.
#[derive(Debug)]
pub struct Lease {
    ledger: Arc<Ledger>,
    want: Want,
    taken_at: Instant,
    started_at: Option<Instant>,
    is_void: bool,
    n_prompt: u64,
    n_cached: u64,
    n_output: u64,
    seconds: f64,
    origin: Instant,
}

impl Lease {
    /// The request left the queue. Only the first call counts.
    pub fn started(&mut self, now: Instant) {
        if self.started_at.is_some() {
            return;
        }
        self.started_at = Some(now);
        let queued = now.saturating_duration_since(self.taken_at);
        let mut state = self.ledger.lock();
        state.usage.queued(queued);
        let n = self.want.n_choices;
        state.usage.n_waiting = state.usage.n_waiting.saturating_sub(n);
        state.usage.n_running += n;
        self.ledger.show_open(&state.usage);
        let tenant = self.ledger.label.to_string();
        metrics::histogram!("dsd_tenant_queue_seconds", "tenant" => tenant).record(queued);
    }

    /// What was really used, `seconds` of the engine's time among it; the last call counts.
    pub fn used(&mut self, n_prompt: usize, n_cached: usize, n_output: usize, seconds: f64) {
        self.seconds = seconds;
        self.n_prompt = n_prompt as u64;
        self.n_cached = n_cached as u64;
        self.n_output = n_output as u64;
    }

    /// The node did not take the request after all: it counts against no cap.
    pub fn void(mut self) {
        self.is_void = true;
    }

    fn end(&mut self, now: Instant) {
        let n = self.want.n_choices;
        let mut state = self.ledger.lock();
        if self.started_at.is_some() {
            state.usage.n_running = state.usage.n_running.saturating_sub(n);
        } else {
            state.usage.n_waiting = state.usage.n_waiting.saturating_sub(n);
        }
        self.ledger.show_open(&state.usage);
        if self.is_void {
            state.caps.undo(self.want);
            return;
        }
        let held = now.saturating_duration_since(self.taken_at);
        self.settle(&mut state, held, second(self.origin, now));
    }

    /// Corrects the caps by what was used, and counts it.
    fn settle(&self, state: &mut State, held: Duration, second: u64) {
        let n_used = if self.started_at.is_some() {
            self.n_prompt + self.n_output
        } else {
            0
        };
        state.caps.give_back(self.want, n_used, held);
        state.usage.n_requests += 1;
        let counter = |kind: &'static str, n: u64| {
            let tenant = self.ledger.label.to_string();
            metrics::counter!("dsd_tenant_tokens_total", "tenant" => tenant, "kind" => kind)
                .increment(n);
        };
        let tenant = self.ledger.label.to_string();
        metrics::counter!("dsd_tenant_requests_total", "tenant" => tenant).increment(1);
        if self.started_at.is_none() {
            return;
        }
        let n_choices = f64::from(self.want.n_choices.max(1));
        let output = as_f64(self.n_output);
        state.output_mean += (output / n_choices - state.output_mean) * OUTPUT_GAIN;
        state.usage.n_prompt_tokens += self.n_prompt;
        state.usage.n_cached_tokens += self.n_cached;
        state.usage.n_output_tokens += self.n_output;
        counter("prompt", self.n_prompt);
        counter("cached", self.n_cached);
        counter("output", self.n_output);
        let work = Work {
            tokens: as_f64(self.n_prompt + self.n_output),
            seconds: self.seconds,
        };
        state.usage.worked(work, second);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.end(clock::now());
    }
}

fn reason(cap: Cap) -> Refused {
    match cap {
        Cap::Concurrency => Refused::Concurrency,
        Cap::Requests => Refused::Requests,
        Cap::Tokens => Refused::Tokens,
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
    reason = "a mean of counts is at least 0, and the cast saturates"
)]
fn as_u64(mean: f64) -> u64 {
    mean as u64
}
