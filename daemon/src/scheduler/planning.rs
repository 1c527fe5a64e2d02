//! The parts of [`Scheduler::plan`]: who ends, whose turn it is, who loses a place, who gets blocks,
//! who is admitted, and the plan itself.

use std::time::{Duration, Instant};

use crate::{
    cost::{CostModel, StepShape},
    flow::Account,
    runner::{LogitRows, StepPlan},
};

use super::{
    CHUNK_MULTIPLE, Candidate, DISPLACED_MAX, EndReason, Ended, KV_SECONDS, PREFILL_ROWS_MIN,
    Scheduled, Scheduler, SchedulerConfig, Slot, WORK_CHUNK_ROWS, sequence::Sequence,
};

/// What a step computes so far.
#[derive(Debug, Default)]
pub(super) struct Prompts {
    shape: StepShape,
    /// Of it, positions of prompts.
    n_prompt_rows: usize,
    /// What it may take.
    seconds_max: f64,
}

impl Prompts {
    /// A step with nothing but the decodes of these sequences.
    pub(super) fn beside<'a>(
        running: impl Iterator<Item = &'a Sequence>,
        target: Duration,
        cost: &CostModel,
    ) -> Self {
        let decodes = running.filter(|seq| seq.is_decode());
        let shapes = decodes.map(|seq| StepShape::span(seq.n_computed, 1, 1));
        let shape = shapes.fold(StepShape::default(), StepShape::and);
        Self {
            shape,
            n_prompt_rows: 0,
            seconds_max: cost.step_seconds_max(target.as_secs_f64(), shape),
        }
    }

    /// Positions of a sequence that the step's time, tokens and rows of logits leave room for.
    fn rows_for(&self, cfg: &SchedulerConfig, cost: &CostModel, seq: &Sequence) -> usize {
        let n_left = cfg.step_tokens_max - self.shape.n_rows;
        let n_logits_left = cfg.step_logits_max.saturating_sub(self.shape.n_logits);
        let n_max = seq.n_within(seq.n_pending().min(n_left), n_logits_left);
        // Whether its last position is among them makes no difference.
        let span = |n| match seq.logit_rows(n) {
            LogitRows::All => seq.shape_of(n),
            LogitRows::Skip | LogitRows::Last => StepShape::span(seq.n_computed, n, 1),
        };
        let n_fitting = cost.rows_within(self.seconds_max, self.shape, span, n_max);
        let n_floor = PREFILL_ROWS_MIN.saturating_sub(self.n_prompt_rows);
        let n = n_fitting.max(n_floor.min(n_max));
        match CHUNK_MULTIPLE <= n && n < seq.n_pending() {
            true => n - n % CHUNK_MULTIPLE,
            false => n,
        }
    }

    /// A sequence that would have been in the step is displaced: its row of logits is free.
    fn forget(&mut self, seq: &Sequence) {
        self.shape.n_logits -= usize::from(seq.is_decode());
    }

    fn add(&mut self, seq: &Sequence) {
        self.shape = self.shape.and(seq.shape());
        self.n_prompt_rows += seq.n_scheduled;
    }
}

impl Scheduler {
    pub(super) fn end_expired(&mut self, now: Instant, ended: &mut Vec<Ended>) {
        let n_ended_before = ended.len();
        for &slot in self.running.iter().chain(&self.waiting) {
            if self.sequence(slot).is_expired(now) {
                ended.push(Ended {
                    slot: Slot(slot),
                    reason: EndReason::DeadlinePassed,
                });
            }
        }
        for Ended { slot, .. } in &ended[n_ended_before..] {
            self.release(slot.0);
        }
    }

    /// Puts everybody with more than one position to compute into the order of their turns.
    pub(super) fn order_candidates(&mut self, now: Instant, cost: &CostModel) {
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        let running = self.running.iter().map(|slot| (*slot, false));
        let waiting = self.waiting.iter().map(|slot| (*slot, true));
        for (slot, is_waiting) in running.chain(waiting) {
            let seq = self.sequence(slot);
            if !is_waiting && seq.is_decode() {
                continue;
            }
            let waited = now.saturating_duration_since(seq.arrived_at).as_secs_f64();
            let alone = cost.prefill_seconds(seq.n_computed, seq.tokens.len(), WORK_CHUNK_ROWS);
            let work = alone * seq.siblings.n.max(1) as f64;
            candidates.push(Candidate {
                slot,
                is_waiting,
                turn: self.shares.turn(seq.account),
                urgency: (waited + work) / work,
                serial: seq.serial,
            });
        }
        candidates.sort_unstable_by(|a, b| {
            let turns = a.turn.partial_cmp(&b.turn);
            turns
                .unwrap_or(std::cmp::Ordering::Equal)
                .then(b.urgency.total_cmp(&a.urgency))
                .then(a.serial.cmp(&b.serial))
        });
        self.candidates = candidates;
    }

    /// Displaces sequences of accounts that hold more than their part of places or blocks, where one
    /// that holds less and used less waits for them, and admits that one before anybody takes what
    /// became free. `step` is what the step computes so far.
    pub(super) fn make_room(&mut self, cost: &CostModel, step: &mut Prompts) {
        let mut n_places = self.cfg.running_max - self.running.len();
        let mut n_blocks = self.pool.n_free();
        let mut n_displaced = 0;
        for idx in 0..self.candidates.len() {
            let Candidate {
                slot, is_waiting, ..
            } = self.candidates[idx];
            if !is_waiting {
                continue;
            }
            let seq = self.sequence(slot);
            let account = seq.account;
            let n_needed = self.pool.blocks_for(seq.tokens.len()) + self.cfg.watermark_blocks;
            let mut has_displaced = false;
            while n_places == 0 || n_blocks < n_needed {
                let may = match n_places {
                    0 => self.has_room(account),
                    _ => self.has_room(account) && self.has_blocks(account, n_needed),
                };
                if !may || DISPLACED_MAX <= n_displaced {
                    break;
                }
                let of_places = n_places == 0;
                let Some(victim) = self.over_its_part(Some(account), of_places, 0) else {
                    break;
                };
                n_blocks += self.sequence(victim).table.blocks().len();
                n_places += 1;
                step.forget(self.sequence(victim));
                self.displace(victim);
                n_displaced += 1;
                has_displaced = true;
            }
            if has_displaced && 0 < n_places && n_needed <= n_blocks {
                self.adopt(slot);
                let n_wanted = step.rows_for(&self.cfg, cost, self.sequence(slot));
                if n_wanted == 0 || !self.admit(slot, n_wanted) {
                    self.drop_blocks(slot);
                    return;
                }
                step.add(self.sequence(slot));
            }
            if DISPLACED_MAX <= n_displaced {
                return;
            }
            n_places = n_places.saturating_sub(1);
            n_blocks = n_blocks.saturating_sub(n_needed);
        }
    }

    /// True when the account's part holds one more place.
    fn has_room(&self, account: Account) -> bool {
        let part = self.shares.part(account) * self.cfg.running_max as f64;
        (self.shares.n_running(account) + 1) as f64 <= part.max(1.0)
    }

    /// True when the account's part holds so many more blocks.
    fn has_blocks(&self, account: Account, n_more: usize) -> bool {
        let part = self.shares.part(account) * self.cfg.blocks.len() as f64;
        (self.n_blocks_of(account) + n_more) as f64 <= part
    }

    /// The youngest running sequence, from `first` in order of arrival on and not scheduled yet, of the
    /// account that holds the most beyond its part of places or of blocks. For an account that takes
    /// them, of others only, and only of those that used more.
    fn over_its_part(
        &self,
        taker: Option<Account>,
        of_places: bool,
        first: usize,
    ) -> Option<usize> {
        let mut most: Option<(f64, usize)> = None;
        for &slot in &self.running[first..] {
            let seq = self.sequence(slot);
            let account = seq.account;
            let is_spared =
                |taker| taker == account || self.shares.turn(account) <= self.shares.turn(taker);
            if 0 < seq.n_scheduled || taker.is_some_and(is_spared) {
                continue;
            }
            let (held, all) = match of_places {
                true => (self.shares.n_running(account), self.cfg.running_max),
                false => (self.n_blocks_of(account), self.cfg.blocks.len()),
            };
            let part = (self.shares.part(account) * all as f64).max(1.0);
            let excess = held as f64 / part;
            // Of equals the youngest: the running set is in order of arrival.
            if 1.0 < excess && most.is_none_or(|(other, _)| other <= excess) {
                most = Some((excess, slot));
            }
        }
        most.map(|(_, slot)| slot)
    }

    /// Gives every running sequence that needs one position a block for it, where it needs one: those
    /// within their part first, each group in order of arrival. False when somebody went without, or
    /// somebody was displaced.
    pub(super) fn schedule_decodes(&mut self) -> bool {
        let n_preemptions = self.n_preemptions;
        let is_tight = self.pool.n_free() < self.running.len();
        let mut is_short = false;
        for within_part in [true, false] {
            let mut idx = 0;
            while idx < self.running.len() {
                let seq = self.sequence(self.running[idx]);
                let is_due = seq.is_decode() && seq.n_scheduled == 0;
                let is_within = !is_tight || {
                    let part = self.shares.part(seq.account) * self.cfg.blocks.len() as f64;
                    self.n_blocks_of(seq.account) as f64 <= part
                };
                if is_due && is_within == within_part {
                    is_short |= self.schedule(idx, 1) == 0;
                }
                // The running set shrinks behind it only.
                idx += 1;
            }
        }
        !is_short && self.n_preemptions == n_preemptions
    }

    fn n_blocks_of(&self, account: Account) -> usize {
        let seqs = self.running.iter().map(|slot| self.sequence(*slot));
        let own = seqs.filter(|seq| seq.account == account);
        own.map(|seq| seq.table.blocks().len()).sum()
    }

    /// Gives the rest of the step's time, and places, to prompts in their order.
    pub(super) fn schedule_prompts(
        &mut self,
        cost: &CostModel,
        step: &mut Prompts,
        may_admit: bool,
    ) {
        let mut is_blocked = !may_admit;
        for idx in 0..self.candidates.len() {
            let Candidate {
                slot, is_waiting, ..
            } = self.candidates[idx];
            // Admitted or displaced since it became a candidate.
            if 0 < self.sequence(slot).n_scheduled || is_waiting == self.running.contains(&slot) {
                continue;
            }
            // A choice waits for the first of its prompt and takes over what that one computed.
            if is_waiting && self.cfg.prefix_cache && self.is_sibling_under_way(slot) {
                continue;
            }
            // Whoever has nothing running may pass one that waits for blocks.
            let has_none = self.shares.n_running(self.sequence(slot).account) == 0;
            let is_full = self.running.len() == self.cfg.running_max;
            if is_waiting && (is_full || !may_admit || (is_blocked && !has_none)) {
                continue;
            }
            if is_waiting {
                self.adopt(slot);
            }
            let n_wanted = step.rows_for(&self.cfg, cost, self.sequence(slot));
            let n_pending = self.sequence(slot).n_pending();
            let n_got = match is_waiting {
                true if n_wanted == 0 || !self.admit(slot, n_wanted) => {
                    self.drop_blocks(slot);
                    0
                }
                true => n_wanted,
                false => self.grow_within(slot, n_wanted),
            };
            // Whoever is admitted now would take the blocks that this one goes without.
            is_blocked |= n_got < n_wanted;
            step.add(self.sequence(slot));
            if n_wanted < n_pending && PREFILL_ROWS_MIN <= step.n_prompt_rows {
                // The step's time is used up.
                return;
            }
        }
    }

    /// True when another choice of the same request is about to compute the prompt.
    fn is_sibling_under_way(&self, slot: usize) -> bool {
        let siblings = self.sequence(slot).siblings;
        let is_one = |other: &usize| {
            let other = self.sequence(*other);
            other.siblings.request == siblings.request && other.n_computed < other.n_prompt
        };
        1 < siblings.n && self.running.iter().any(is_one)
    }

    /// Finds blocks for up to `n_wanted` more positions of the running sequence at `idx`, displacing
    /// one behind it rather than giving none: of an account beyond its part of blocks, or of its own.
    /// Notes how many it got.
    pub(super) fn schedule(&mut self, idx: usize, n_wanted: usize) -> usize {
        let slot = self.running[idx];
        loop {
            let n_free = self.pool.n_free() * self.pool.block_len();
            let seq = self.sequence(slot);
            let n_room = seq.table.n_positions(&self.pool) + n_free - seq.n_computed;
            let n_got = n_wanted.min(n_room);
            if 0 < n_got || n_wanted == 0 {
                self.grow_by(slot, n_got);
                return n_got;
            }
            let account = self.sequence(slot).account;
            let is_own = |s: &&usize| {
                let seq = self.sequence(**s);
                seq.n_scheduled == 0 && seq.account == account
            };
            let own = || self.running[idx + 1..].iter().rfind(is_own).copied();
            let Some(victim) = self.over_its_part(None, false, idx + 1).or_else(own) else {
                return 0;
            };
            self.displace(victim);
        }
    }

    /// Computes of the oldest running sequence what one step holds, displacing whoever is in the way.
    pub(super) fn force_oldest(&mut self) {
        let oldest = self.sequence(self.running[0]);
        let n_wanted = oldest.n_pending().min(self.cfg.step_tokens_max);
        let n_wanted = oldest.n_within(n_wanted, self.cfg.step_logits_max);
        while self.schedule(0, n_wanted) == 0 {
            let youngest = self.running.len() - 1;
            assert!(0 < youngest, "the oldest sequence alone fits the pool");
            self.displace(self.running[youngest]);
        }
    }

    /// Takes what free blocks there are for up to `n_wanted` more positions of a running sequence.
    fn grow_within(&mut self, slot: usize, n_wanted: usize) -> usize {
        let n_free = self.pool.n_free() * self.pool.block_len();
        let seq = self.sequence(slot);
        let n_room = seq.table.n_positions(&self.pool) + n_free - seq.n_computed;
        let n_got = n_wanted.min(n_room);
        self.grow_by(slot, n_got);
        n_got
    }

    fn grow_by(&mut self, slot: usize, n_positions: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} is in a line and empty");
        };
        let has_grown = seq
            .table
            .grow_to(seq.n_computed + n_positions, &mut self.pool);
        assert!(has_grown, "the room was counted before");
        seq.n_scheduled = n_positions;
    }

    /// Takes a running sequence's place and blocks away; it waits to be computed again.
    fn displace(&mut self, slot: usize) {
        let account = self.sequence(slot).account;
        self.running.retain(|other| *other != slot);
        self.shares.note_running(account, false);
        self.drop_blocks(slot);
        self.waiting.push(slot);
        self.n_preemptions += 1;
    }

    fn drop_blocks(&mut self, slot: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} is in a line and empty");
        };
        seq.table.release(&mut self.pool);
        seq.n_computed = 0;
        seq.n_scheduled = 0;
    }

    /// Gives a sequence that is about to run what the cache holds of it. Its last position is
    /// always computed, and so are those before tokens to be scored: both hang on their logits.
    fn adopt(&mut self, slot: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} waits and is empty");
        };
        if self.cfg.prefix_cache {
            let known = &seq.tokens[..seq.n_adoptable()];
            seq.n_computed = seq.table.adopt(known, &mut self.pool);
            seq.n_computed_ever = seq.n_computed_ever.max(seq.n_computed);
        }
    }

    /// Leaves the blocks that a sequence has filled to others.
    pub(super) fn label(&mut self, slot: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} ran and is empty");
        };
        if self.cfg.prefix_cache {
            seq.table.label(&seq.tokens, seq.n_computed, &mut self.pool);
        }
    }

    /// Takes a waiting sequence, which has adopted what the cache holds, into the running set with a
    /// chunk of `n_chunk` positions; false when blocks are missing.
    fn admit(&mut self, slot: usize, n_chunk: usize) -> bool {
        let seq = self.sequence(slot);
        let was_running = seq.was_running;
        // A sequence that lost its blocks once comes back when all it needs is free; else it would be
        // computed again and again in vain.
        let n_positions = if was_running {
            seq.tokens.len()
        } else {
            seq.n_computed + n_chunk
        };
        let n_adopted = seq.table.blocks().len();
        let n_blocks = self.pool.blocks_for(n_positions) - n_adopted + self.cfg.watermark_blocks;
        if !self.running.is_empty() && self.pool.n_free() < n_blocks {
            return false;
        }
        let (serial, account) = (seq.serial, seq.account);
        self.waiting.retain(|other| *other != slot);
        let idx = self
            .running
            .partition_point(|other| self.sequence(*other).serial < serial);
        self.running.insert(idx, slot);
        self.shares.note_running(account, true);
        if !was_running {
            self.n_waiting_new -= 1;
            self.admitted.push(Slot(slot));
            self.prepare(slot);
        }
        self.grow_within(slot, n_chunk) == n_chunk
    }

    /// Takes the memory of a sequence that runs for the first time, so that its steps take none.
    fn prepare(&mut self, slot: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} runs and is empty");
        };
        seq.was_running = true;
        seq.n_cached = seq.n_computed.min(seq.n_prompt);
        seq.tokens.reserve_exact(seq.len_max - seq.tokens.len());
        seq.table.reserve(seq.len_max, &self.pool);
    }

    /// Decodes first, then prefill chunks, each in order of arrival.
    pub(super) fn write_plan(&mut self, plan: &mut StepPlan) {
        for is_decode in [true, false] {
            for &slot in &self.running {
                let Some(seq) = &self.slots[slot] else {
                    unreachable!("slot {slot} runs and is empty");
                };
                if seq.n_scheduled == 0 || seq.is_decode() != is_decode {
                    continue;
                }
                let first = seq.n_computed;
                let end = first + seq.n_scheduled;
                let is_sampled = end == seq.tokens.len();
                let logits = seq.logit_rows(seq.n_scheduled);
                let scored = match logits {
                    LogitRows::All => first + 1..seq.n_prompt.min(end + 1),
                    LogitRows::Skip | LogitRows::Last => 0..0,
                };
                plan.push(
                    seq.serial,
                    first,
                    &seq.tokens[first..end],
                    seq.table.blocks(),
                    logits,
                );
                let n_recomputed = end.min(seq.n_computed_ever).saturating_sub(first);
                let n_new_from = first + n_recomputed;
                self.scheduled.push(Scheduled {
                    slot: Slot(slot),
                    n_tokens: seq.n_scheduled,
                    n_prompt_tokens: end.min(seq.n_prompt).saturating_sub(n_new_from),
                    n_recomputed,
                    n_computed: end,
                    shape: seq.shape(),
                    scored,
                    is_sampled,
                });
            }
        }
    }

    /// Charges a step's time to the accounts of its sequences, and the blocks held meanwhile.
    pub(super) fn charge(&mut self, took: Duration, cost: &CostModel) {
        let took = took.as_secs_f64();
        let all = self.step_shape();
        let scale = took / cost.seconds(all).max(f64::MIN_POSITIVE);
        for i in 0..self.scheduled.len() {
            let Scheduled { slot, shape, .. } = self.scheduled[i].clone();
            let seconds = scale * cost.share(shape, all.n_rows);
            self.shares.charge(self.sequence(slot.0).account, seconds);
        }
        let per_block = took * KV_SECONDS / self.cfg.blocks.len().max(1) as f64;
        for i in 0..self.running.len() {
            let seq = self.sequence(self.running[i]);
            let seconds = per_block * seq.table.blocks().len() as f64;
            self.shares.charge(seq.account, seconds);
        }
    }

    /// The invariants that a plan has to keep, in time linear in the running set.
    pub(super) fn check(&self, plan: &StepPlan) {
        assert!(
            plan.tokens.len() <= self.cfg.step_tokens_max,
            "the budget is kept"
        );
        assert_eq!(
            plan.spans.is_empty(),
            self.is_idle(),
            "somebody progresses in every step"
        );
        let serials = || self.running.iter().map(|&s| self.sequence(s).serial);
        assert!(serials().is_sorted(), "running in order of arrival");
        let n_held: usize = self
            .running
            .iter()
            .map(|&s| self.sequence(s).table.blocks().len())
            .sum();
        assert_eq!(
            n_held,
            self.pool.n_references(),
            "every use of a block is a running sequence's"
        );
    }

    /// Takes a sequence out of its line and frees its blocks and slot.
    pub(super) fn release(&mut self, slot: usize) {
        let Some(mut seq) = self.slots[slot].take() else {
            unreachable!("slot {slot} is released and empty");
        };
        seq.table.release(&mut self.pool);
        self.free_slots.push(slot);
        if let Some(idx) = self.running.iter().position(|&s| s == slot) {
            self.running.remove(idx);
            self.shares.note_running(seq.account, false);
        } else {
            let idx = self.waiting.iter().position(|&s| s == slot);
            assert!(idx.is_some(), "a live sequence waits or runs");
            if let Some(idx) = idx {
                self.waiting.swap_remove(idx);
            }
            self.n_waiting_new -= usize::from(!seq.was_running);
        }
        self.shares.leave(seq.account);
    }

    pub(super) fn sequence(&self, slot: usize) -> &Sequence {
        let Some(seq) = &self.slots[slot] else {
            unreachable!("slot {slot} is in use and empty");
        };
        seq
    }

    pub(super) fn sequence_mut(&mut self, slot: usize) -> &mut Sequence {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} is in use and empty");
        };
        seq
    }
}
