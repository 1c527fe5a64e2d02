//! The parts of [`Scheduler::plan`]: who ends, who gets blocks, who is admitted, and the plan
//! itself.

use std::time::Instant;

use crate::runner::{LogitRows, StepPlan};

use super::{EndReason, Ended, Scheduled, Scheduler, Slot, sequence::Sequence};

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

    /// Finds blocks for up to `n_wanted` more positions of the running sequence at `idx`,
    /// displacing younger ones rather than giving none, and notes how many it got.
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
            if idx + 1 == self.running.len() {
                assert!(0 < idx, "the oldest sequence alone fits the pool");
                return 0;
            }
            self.preempt_youngest();
        }
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

    fn preempt_youngest(&mut self) {
        let Some(slot) = self.running.pop() else {
            return;
        };
        assert_eq!(
            self.sequence(slot).n_scheduled,
            0,
            "blocks go to the older first"
        );
        self.drop_blocks(slot);
        self.waiting.push_front(slot);
        self.n_preemptions += 1;
    }

    fn drop_blocks(&mut self, slot: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} is in a line and empty");
        };
        seq.table.release(&mut self.pool);
        seq.n_computed = 0;
    }

    /// Gives a sequence that is about to run what the cache holds of it. Its last position is
    /// always computed: the next token hangs on its logits.
    fn adopt(&mut self, slot: usize) {
        let Some(seq) = &mut self.slots[slot] else {
            unreachable!("slot {slot} waits and is empty");
        };
        if self.cfg.prefix_cache {
            let known = &seq.tokens[..seq.tokens.len() - 1];
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

    /// Admits from the front of the waiting line while budget, places and blocks last.
    pub(super) fn admit(&mut self, mut prefill_budget: usize) {
        while self.running.len() < self.cfg.running_max && 0 < prefill_budget {
            let Some(&slot) = self.waiting.front() else {
                return;
            };
            if self.running.is_empty() {
                assert_eq!(self.pool.n_used(), 0, "blocks belong to running sequences");
            }
            self.adopt(slot);
            let seq = self.sequence(slot);
            let n_chunk = seq.n_pending().min(prefill_budget);
            let was_running = seq.was_running;
            // A sequence that lost its blocks once comes back when all it needs is free; else it
            // would be computed again and again in vain.
            let n_positions = if was_running {
                seq.tokens.len()
            } else {
                seq.n_computed + n_chunk
            };
            let n_adopted = seq.table.blocks().len();
            let n_blocks =
                self.pool.blocks_for(n_positions) - n_adopted + self.cfg.watermark_blocks;
            if !self.running.is_empty() && self.pool.n_free() < n_blocks {
                self.drop_blocks(slot);
                return;
            }
            self.waiting.pop_front();
            self.running.push(slot);
            if !was_running {
                self.n_waiting_new -= 1;
                self.admitted.push(Slot(slot));
                self.prepare(slot);
            }
            self.grow_by(slot, n_chunk);
            prefill_budget -= n_chunk;
        }
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
                let logits = if is_sampled {
                    LogitRows::Last
                } else {
                    LogitRows::Skip
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
                    is_sampled,
                });
            }
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
        if let (Some(&last), Some(&next)) = (self.running.last(), self.waiting.front()) {
            assert!(
                self.sequence(last).serial < self.sequence(next).serial,
                "first come first"
            );
        }
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
            return;
        }
        let idx = self.waiting.iter().position(|&s| s == slot);
        assert!(idx.is_some(), "a live sequence waits or runs");
        if let Some(idx) = idx {
            self.waiting.remove(idx);
        }
        self.n_waiting_new -= usize::from(!seq.was_running);
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
