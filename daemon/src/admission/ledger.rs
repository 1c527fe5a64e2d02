//! The books of what an engine has been given, and when the first token of one more would come.
//!
//! Pure: told what was taken and what became of it, it predicts. The prediction is a fluid picture of
//! what the scheduler does with the same cost model: accounts share what time of a step decodes leave
//! to prompts, in proportion to their weights; inside an account short prompts pass long ones.
//!
//! Called by the admission's decision.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::AdmissionConfig;
use crate::{
    cost::{CostModel, StepShape},
    flow::{Account, Class},
};

/// A batch tenant's weight is divided by this, as in the scheduler.
const BATCH_DIVISOR: f64 = 16.0;
/// Sequences over which a token's cost is shared where a request's whole work is estimated.
const TYPICAL_BATCH: usize = 8;
/// Ended requests over which the share of their allowed output that they used is averaged.
const OUTPUTS_REMEMBERED: f64 = 32.0;
/// Rows of a step in which prompts are computed alone.
const ALONE_CHUNK_ROWS: usize = 512;
/// Share of a step's time below which prompts are not squeezed, for the prediction.
const PROMPT_SHARE_MIN: f64 = 0.05;

/// One choice in flight.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) account: Account,
    pub(super) n_prompt: usize,
    pub(super) n_computed: usize,
    pub(super) n_output: usize,
    pub(super) n_output_max: usize,
    pub(super) has_started: bool,
    pub(super) taken_at: Instant,
    /// When its first token was predicted to come, after `taken_at`.
    pub(super) predicted: Duration,
}

impl Entry {
    fn is_waiting_for_first(&self) -> bool {
        self.n_output == 0
    }
}

/// What is asked for: choices that are taken together or not at all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) account: Account,
    /// Prompt lengths of all choices.
    pub(super) prompts: &'a [usize],
    /// True when all choices have the same prompt, which is computed once.
    pub(super) is_one_prompt: bool,
    /// Tokens to generate at most, each.
    pub(super) n_output_max: usize,
}

/// What the engine says of itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct EngineView {
    pub(super) n_blocks_used: usize,
    /// Until steps run, where none does now.
    pub(super) forming: Duration,
}

/// What is predicted of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Prediction {
    /// Seconds to its first token.
    pub(super) first_token: f64,
    /// The same with nobody waiting for a first token before it.
    pub(super) unqueued: f64,
    /// Beside the decodes that run now, until its prompt is computed and the step is over.
    pub(super) computing: f64,
    /// A step.
    pub(super) step: f64,
    /// Seconds of the engine's time that it takes in all.
    pub(super) work: f64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    cfg: AdmissionConfig,
    entries: HashMap<u64, Entry>,
    /// Choices without a first token.
    n_pending: usize,
    /// Since when there are any.
    pending_since: Option<Instant>,
    /// Mean share of the allowed output that ended requests used.
    output_share: f64,
    /// Mean of seen over predicted times to the first token.
    bias: f64,
}

type FlowKey = (Class, u64, u64);

fn flow_of(account: Account) -> FlowKey {
    (account.class, account.tenant, account.user)
}

impl Ledger {
    pub(super) fn new(cfg: AdmissionConfig) -> Self {
        Self {
            cfg,
            entries: HashMap::new(),
            n_pending: 0,
            pending_since: None,
            output_share: 1.0,
            bias: 1.0,
        }
    }

    /// Choices in flight.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Choices of the account in flight, and those of them that wait for their first token.
    pub(super) fn n_own(&self, account: Account) -> (usize, usize) {
        let own = self.entries.values();
        let own = own.filter(|e| flow_of(e.account) == flow_of(account));
        own.fold((0, 0), |(n, n_pending), e| {
            (n + 1, n_pending + usize::from(e.is_waiting_for_first()))
        })
    }

    /// Since when somebody waits for a first token.
    pub(super) fn pending_since(&self) -> Option<Instant> {
        self.pending_since
    }

    /// Choices that have not left the waiting line: of the account, of its class, and of all.
    pub(super) fn n_waiting(&self, account: Account) -> (usize, usize, usize) {
        let mut counts = (0, 0, 0);
        for entry in self.entries.values().filter(|e| !e.has_started) {
            counts.2 += 1;
            counts.1 += usize::from(entry.account.class == account.class);
            counts.0 += usize::from(flow_of(entry.account) == flow_of(account));
        }
        counts
    }

    pub(super) fn take(&mut self, id: u64, entry: Entry) {
        if self.n_pending == 0 {
            self.pending_since = Some(entry.taken_at);
        }
        self.n_pending += 1;
        let former = self.entries.insert(id, entry);
        assert!(former.is_none(), "what is taken has a number of its own");
    }

    pub(super) fn started(&mut self, id: u64, n_cached: usize) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.has_started = true;
            entry.n_computed = entry.n_computed.max(n_cached).min(entry.n_prompt);
        }
    }

    pub(super) fn prefilled(&mut self, id: u64, n_computed: usize) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.n_computed = n_computed.min(entry.n_prompt);
        }
    }

    /// A token came out; for the first one, how long it took and how long that was predicted to take.
    pub(super) fn token(&mut self, id: u64, now: Instant) -> Option<(Duration, Duration)> {
        let entry = self.entries.get_mut(&id)?;
        entry.n_computed = entry.n_prompt;
        entry.n_output += 1;
        if entry.n_output > 1 {
            return None;
        }
        let seen = now.saturating_duration_since(entry.taken_at);
        let predicted = entry.predicted;
        self.first_came();
        if entry_is_interactive(self.entries.get(&id)) && !predicted.is_zero() {
            let ratio = seen.as_secs_f64() / predicted.as_secs_f64();
            // Asymmetric on purpose: an optimistic prediction breaks a promise.
            let rate = if ratio < self.bias { 0.02 } else { 0.1 };
            self.bias = (self.bias + rate * (ratio.min(4.0) - self.bias)).clamp(0.7, 3.0);
        }
        Some((seen, predicted))
    }

    /// A choice is over. `is_complete` when it was not cut short.
    pub(super) fn end(&mut self, id: u64, is_complete: bool) {
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        if entry.is_waiting_for_first() {
            self.first_came();
        }
        if is_complete && entry.n_output_max > 0 {
            let share = entry.n_output as f64 / entry.n_output_max as f64;
            self.output_share += (share.min(1.0) - self.output_share) / OUTPUTS_REMEMBERED;
        }
    }

    fn first_came(&mut self) {
        self.n_pending -= 1;
        if self.n_pending == 0 {
            self.pending_since = None;
        }
    }

    /// When the first token of `ask` would come.
    pub(super) fn predict(
        &self,
        now: Instant,
        ask: &Ask<'_>,
        cost: &CostModel,
        view: EngineView,
    ) -> Prediction {
        let decodes = self.decodes();
        let target = cost.step_seconds_max(self.cfg.step_target.as_secs_f64(), decodes);
        let chunk = cost
            .rows_within(
                target,
                decodes,
                |n| StepShape::span(0, n, 1),
                ALONE_CHUNK_ROWS,
            )
            .max(1);
        let step = cost.seconds(decodes.and(StepShape::span(0, chunk, 1)));
        let decode_only = cost.seconds(decodes);
        // What a second of the engine's time leaves to prompts.
        let share = ((step - decode_only) / step).max(PROMPT_SHARE_MIN);
        let prompt = |from, to| cost.prefill_seconds(from, to, chunk);

        let first = ask.prompts.iter().copied().min().unwrap_or(0);
        let own = prompt(0, first);
        let group = match ask.is_one_prompt {
            true => own,
            false => ask.prompts.iter().map(|n| prompt(0, *n)).sum(),
        };
        let ahead = self.ahead(now, ask.account, own, group, prompt);
        let under_way = match self.entries.is_empty() {
            true => 0.0,
            false => step / 2.0,
        };
        let place = self.until_room(ask, first, step, view);
        let queued = (ahead / share).max(place);
        // The step that ends the prompt decodes for others as well.
        let computing = own / share
            + if decodes.n_rows == 0 {
                0.0
            } else {
                decode_only
            };
        let unqueued = view.forming.as_secs_f64() + under_way + computing;
        let n_output = (ask.n_output_max as f64 * self.output_share).max(1.0);
        let per_token = cost.share(StepShape::span(first, 1, 1), TYPICAL_BATCH);
        Prediction {
            first_token: (unqueued + queued) * self.bias,
            unqueued: unqueued * self.bias,
            computing: computing * self.bias,
            step: step * self.bias,
            work: group + ask.prompts.len() as f64 * n_output * per_token,
        }
    }

    /// What all running decodes add to a step.
    fn decodes(&self) -> StepShape {
        let running = self.entries.values().filter(|e| !e.is_waiting_for_first());
        let shapes = running.map(|e| StepShape::span(e.n_prompt + e.n_output, 1, 1));
        shapes
            .take(self.cfg.running_max)
            .fold(StepShape::default(), StepShape::and)
    }

    /// Seconds of prompts that are computed before `own` of one that arrives now.
    fn ahead(
        &self,
        now: Instant,
        account: Account,
        own: f64,
        group: f64,
        prompt: impl Fn(usize, usize) -> f64,
    ) -> f64 {
        let mut backlogs: BTreeMap<FlowKey, f64> = BTreeMap::new();
        let mut in_line = 0.0;
        for entry in self.entries.values().filter(|e| e.is_waiting_for_first()) {
            let left = prompt(entry.n_computed, entry.n_prompt);
            *backlogs.entry(flow_of(entry.account)).or_default() += left;
            if flow_of(entry.account) == flow_of(account) {
                let waited = now.saturating_duration_since(entry.taken_at).as_secs_f64();
                in_line += match left <= group {
                    true => left,
                    // A longer one keeps its turn until the response ratios cross.
                    false => left.min(waited * group / (left - group)),
                };
            }
        }
        backlogs.remove(&flow_of(account));
        let mine = self.weight(account);
        let others = backlogs.iter().map(|(key, backlog)| {
            let theirs = self.weight_of_flow(*key, account);
            backlog.min((in_line + own) * theirs / mine)
        });
        in_line + others.sum::<f64>()
    }

    /// Weight of the account, a part of its tenant's, beside those in flight.
    fn weight(&self, account: Account) -> f64 {
        self.weight_of_flow(flow_of(account), account)
    }

    fn weight_of_flow(&self, key: FlowKey, asking: Account) -> f64 {
        let (class, tenant, _) = key;
        let same = |a: Account| a.class == class && a.tenant == tenant;
        let mut users: Vec<u64> = self
            .entries
            .values()
            .filter(|e| same(e.account))
            .map(|e| e.account.user)
            .collect();
        let mut weight = 1;
        if same(asking) {
            users.push(asking.user);
            weight = asking.weight;
        } else if let Some(entry) = self.entries.values().find(|e| same(e.account)) {
            weight = entry.account.weight;
        }
        users.sort_unstable();
        users.dedup();
        let weight = f64::from(weight.max(1)) / users.len().max(1) as f64;
        match class {
            Class::Interactive => weight,
            Class::Batch => weight / BATCH_DIVISOR,
        }
    }

    /// The part of the engine that is the account's while those in flight are.
    pub(super) fn part(&self, account: Account) -> f64 {
        let mut flows: BTreeMap<FlowKey, ()> = BTreeMap::new();
        flows.insert(flow_of(account), ());
        flows.extend(self.entries.values().map(|e| (flow_of(e.account), ())));
        let weights = flows.keys().map(|key| self.weight_of_flow(*key, account));
        self.weight(account) / weights.sum::<f64>().max(f64::MIN_POSITIVE)
    }

    /// Seconds until a place in the running set and blocks for the prompt are free.
    fn until_room(&self, ask: &Ask<'_>, first: usize, step: f64, view: EngineView) -> f64 {
        let cfg = &self.cfg;
        let blocks = |n: usize| n.div_ceil(cfg.block_len.max(1));
        let is_own = |e: &&Entry| flow_of(e.account) == flow_of(ask.account);
        let pending = || self.entries.values().filter(|e| !e.has_started);
        let n_needed = self.entries.len() + 1;
        let n_blocks_pending: usize = pending().map(|e| blocks(e.n_prompt)).sum();
        let n_blocks_needed = view.n_blocks_used + n_blocks_pending + blocks(first + 1);
        let mut n_missing = n_needed.saturating_sub(cfg.running_max);
        let mut n_blocks_missing = n_blocks_needed.saturating_sub(cfg.n_blocks);
        if n_missing == 0 && n_blocks_missing == 0 {
            return 0.0;
        }
        // One that holds less than its part is given room at others' cost.
        let part = self.part(ask.account);
        let own = self.entries.values().filter(is_own);
        let (n_own, n_own_blocks) = own.fold((1, blocks(first + 1)), |(n, b), e| {
            (n + 1, b + blocks(e.n_prompt + e.n_output))
        });
        if n_own as f64 <= (part * cfg.running_max as f64).max(1.0) {
            n_missing = 0;
        }
        if n_own_blocks as f64 <= part * cfg.n_blocks as f64 {
            n_blocks_missing = 0;
        }
        let mut departures: Vec<(f64, usize)> = self
            .entries
            .values()
            .filter(|e| e.has_started)
            .map(|e| {
                let expected = e.n_output_max as f64 * self.output_share;
                let left = expected
                    .max(e.n_output as f64 * 1.25 + 1.0)
                    .min(e.n_output_max as f64);
                let steps = (left - e.n_output as f64).max(1.0);
                (steps * step, blocks(e.n_prompt + e.n_output))
            })
            .collect();
        departures.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let mut until = 0.0;
        for (at, n_blocks) in departures {
            if n_missing == 0 && n_blocks_missing == 0 {
                break;
            }
            until = at;
            n_missing = n_missing.saturating_sub(1);
            n_blocks_missing = n_blocks_missing.saturating_sub(n_blocks);
        }
        until
    }
}

fn entry_is_interactive(entry: Option<&Entry>) -> bool {
    entry.is_some_and(|e| e.account.class == Class::Interactive)
}
