//! Decides what runs in the next step: order, admission to the running set, how much of prompts
//! rides along, preemption.
//!
//! Pure: the same calls with the same `now` and cost model give the same plans. Knows no logits,
//! sinks, threads or clock.
//!
//! A step is planned like this. Sequences whose deadline passed end. Places and blocks are taken from
//! accounts that hold more than their part where one that holds less waits for them. Every running
//! sequence that needs one position gets it (decodes first); blocks for them are handed out in order
//! of arrival, and a sequence that gets none takes the place of the youngest running one, which drops
//! its blocks, keeps its tokens, and waits to be computed again. What is left of the step's time goes
//! to prompts, running or waiting, cut into chunks: first to the account whose turn it is
//! ([`fair`]), inside an account to the highest response ratio, `(waited + work) / work`, so that
//! short prompts pass long ones and long ones do not starve.
//!
//! Invariant: a step never has more tokens than the budget, it never takes longer by prediction than
//! its target or three times its decodes, and at least [`PREFILL_ROWS_MIN`] positions of prompts go on in
//! every step that has any.
//! Invariant: somebody progresses in every step: the oldest running sequence may displace all others,
//! and alone it fits the pool, because a longer one is refused on arrival.
//! Invariant: every position of a sequence is computed once between two preemptions. Full blocks stay
//! behind when their sequence ends or is displaced; one that begins alike takes them over when it is
//! admitted and computes only what is missing, at least its last position.
//!
//! Called by the engine, in this order: [`Scheduler::enqueue`] and [`Scheduler::remove`] at will,
//! then [`Scheduler::plan`], then exactly one of [`Scheduler::apply`] and [`Scheduler::fail_step`].

mod fair;
mod planning;
mod sequence;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use crate::{
    cost::{CostModel, StepShape},
    kv_cache::{BlockKey, BlockPool, BlockTable},
    runner::StepPlan,
};

use fair::{Shares, Turn};
use planning::Prompts;
use sequence::Sequence;
pub use sequence::SequenceSpec;

/// Positions of prompts that go on in a step however long its decodes take.
const PREFILL_ROWS_MIN: usize = 16;
/// Chunks of prompts are multiples of this where they are longer: kernels work on tiles of rows.
const CHUNK_MULTIPLE: usize = 16;
/// Rows at which a prompt's work is estimated for the response ratio.
const WORK_CHUNK_ROWS: usize = 128;
/// Sequences that lose their place to others' parts in a step, at most.
const DISPLACED_MAX: usize = 4;
/// Seconds of work that a whole pool of KV blocks is worth when it is held for a second.
const KV_SECONDS: f64 = 0.5;

/// What the scheduler may use; fixed at construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Ids of the KV blocks it may hand out.
    pub blocks: Range<u32>,
    /// Positions in a block.
    pub block_len: usize,
    /// Positions of a sequence at most, prompt and output together.
    pub context_len_max: usize,
    /// Tokens of a step at most; not below `running_max`, so that every decode fits.
    pub step_tokens_max: usize,
    /// Rows of logits of a step at most; not below `running_max`, so that every decode has one.
    pub step_logits_max: usize,
    /// How long a step may take by prediction.
    pub step_target: Duration,
    /// Sequences in the running set at most.
    pub running_max: usize,
    /// Sequences that wait for their first step at most.
    pub waiting_max: usize,
    /// Keep full blocks after their sequence and give them to the next one that begins alike.
    pub prefix_cache: bool,
    /// Blocks that stay free when a sequence is admitted beside others, as room for those to grow.
    pub watermark_blocks: usize,
}

impl SchedulerConfig {
    /// Tokens of a sequence at most: what both the context and the whole pool hold.
    pub fn sequence_len_max(&self) -> usize {
        self.context_len_max
            .min(self.blocks.len().saturating_mul(self.block_len))
    }
}

/// Where a sequence is kept; free for another one after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(usize);

impl Slot {
    /// Below [`Scheduler::n_slots`], for tables beside the scheduler's.
    pub fn idx(self) -> usize {
        self.0
    }
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnqueueError {
    /// The waiting line is full.
    #[error("{max} sequences wait already")]
    QueueFull {
        /// The limit.
        max: usize,
    },
    /// No prompt, or nothing to generate.
    #[error("a sequence needs a prompt and at least one token to generate or to score")]
    Empty,
    /// Prompt and one new token do not fit the context or the whole pool.
    #[error("the prompt has {n_prompt} tokens, at most {max} fit")]
    TooLong {
        /// Tokens of the prompt.
        n_prompt: usize,
        /// Longest prompt that leaves room for one new token.
        max: usize,
    },
}

/// A sequence that is gone from the scheduler; its blocks are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Where it was.
    pub slot: Slot,
    /// Why.
    pub reason: EndReason,
}

/// Why a sequence ended, unless the engine removed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// A stop token came out.
    Stop,
    /// The wanted length, the context or the pool is full.
    Length,
    /// Its deadline passed, waiting or running.
    DeadlinePassed,
    /// [`Scheduler::apply`] got no token for its row.
    NotSampled,
    /// It was in a step that failed.
    StepFailed,
}

/// A sequence in the planned step.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheduled {
    /// Which.
    pub slot: Slot,
    /// Positions computed.
    pub n_tokens: usize,
    /// Of these, prompt positions computed for the first time.
    pub n_prompt_tokens: usize,
    /// Of these, positions that were lost to a preemption.
    pub n_recomputed: usize,
    /// Positions computed when the step is done, those before it included.
    pub n_computed: usize,
    /// What it adds to the step's time.
    pub shape: StepShape,
    /// Tokens of the prompt that the step yields a logits row for, each the row before it.
    pub scored: Range<usize>,
    /// True when the step yields a logits row for its next token, behind those.
    pub is_sampled: bool,
}

/// A sequence with more than one position to compute.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    slot: usize,
    is_waiting: bool,
    turn: Turn,
    /// The response ratio.
    urgency: f64,
    serial: u64,
}

/// Waiting line, running set and KV blocks of one engine.
#[derive(Debug)]
pub struct Scheduler {
    cfg: SchedulerConfig,
    pool: BlockPool,
    shares: Shares,
    slots: Vec<Option<Sequence>>,
    free_slots: Vec<usize>,
    /// In no order.
    waiting: Vec<usize>,
    /// Of `waiting`, those that never ran.
    n_waiting_new: usize,
    /// In order of arrival.
    running: Vec<usize>,
    /// Who may get what is left of the step's time, first come first.
    candidates: Vec<Candidate>,
    scheduled: Vec<Scheduled>,
    admitted: Vec<Slot>,
    serial_next: u64,
    n_preemptions: u64,
}

impl Scheduler {
    /// An empty scheduler; allocates all its tables.
    ///
    /// # Panics
    /// When a limit is 0, or the budget is too small for one token per running sequence.
    pub fn new(cfg: SchedulerConfig) -> Self {
        assert!(
            0 < cfg.waiting_max && 0 < cfg.running_max,
            "room for a sequence"
        );
        assert!(
            cfg.running_max <= cfg.step_tokens_max,
            "every decode fits the budget"
        );
        assert!(
            cfg.running_max <= cfg.step_logits_max,
            "every decode has a row of logits"
        );
        assert!(0 < cfg.sequence_len_max(), "room for a position");
        // Those that ran and were displaced wait again beside as many new ones as may wait; they are
        // no more than ran before, since a place that is taken away is taken by somebody.
        let n_slots = cfg.waiting_max.saturating_add(2 * cfg.running_max);
        Self {
            pool: BlockPool::new(cfg.blocks.clone(), cfg.block_len),
            slots: (0..n_slots).map(|_| None).collect(),
            free_slots: (0..n_slots).rev().collect(),
            shares: Shares::default(),
            waiting: Vec::with_capacity(n_slots),
            candidates: Vec::with_capacity(n_slots),
            n_waiting_new: 0,
            running: Vec::with_capacity(cfg.running_max),
            scheduled: Vec::with_capacity(cfg.running_max),
            admitted: Vec::with_capacity(cfg.running_max),
            serial_next: 0,
            n_preemptions: 0,
            cfg,
        }
    }

    /// Puts a sequence at the end of the waiting line.
    ///
    /// # Errors
    /// [`EnqueueError`]; nothing has changed then.
    pub fn enqueue(&mut self, spec: SequenceSpec) -> Result<Slot, EnqueueError> {
        let n_prompt = spec.prompt.len();
        let len_max = self.cfg.sequence_len_max();
        let is_scored_only =
            spec.n_output_max == 0 && spec.output.is_empty() && spec.scored_from.is_some();
        if n_prompt == 0 || (spec.n_output_max <= spec.output.len() && !is_scored_only) {
            return Err(EnqueueError::Empty);
        }
        let n_known = n_prompt + spec.output.len();
        if len_max <= n_known {
            return Err(EnqueueError::TooLong {
                n_prompt: n_known,
                max: len_max - 1,
            });
        }
        let mut tokens = spec.prompt;
        tokens.extend(spec.output);
        if self.cfg.waiting_max <= self.n_waiting_new {
            return Err(EnqueueError::QueueFull {
                max: self.cfg.waiting_max,
            });
        }
        let Some(slot) = self.free_slots.pop() else {
            return Err(EnqueueError::QueueFull {
                max: self.slots.len(),
            });
        };
        assert!(self.slots[slot].is_none(), "a free slot is empty");
        self.slots[slot] = Some(Sequence {
            serial: self.serial_next,
            n_prompt,
            next_scored: (spec.scored_from).map_or(n_prompt, |first| first.clamp(1, n_prompt)),
            len_max: n_prompt.saturating_add(spec.n_output_max).min(len_max),
            tokens,
            stop_tokens: spec.stop_tokens,
            deadline: spec.deadline,
            arrived_at: spec.arrived_at,
            account: spec.account,
            siblings: spec.siblings,
            n_computed: 0,
            n_computed_ever: 0,
            table: BlockTable::new(spec.root),
            n_scheduled: 0,
            n_cached: 0,
            was_running: false,
        });
        self.serial_next += 1;
        self.waiting.push(slot);
        self.n_waiting_new += 1;
        self.shares.join(spec.account);
        Ok(Slot(slot))
    }

    /// Takes a sequence out, waiting or running, and frees its blocks. Not between
    /// [`Scheduler::plan`] and [`Scheduler::apply`].
    ///
    /// # Panics
    /// When the slot is empty.
    pub fn remove(&mut self, slot: Slot) {
        assert!(self.scheduled.is_empty(), "no step is under way");
        self.release(slot.0);
    }

    /// Fills `plan` with the next step and names the sequences whose deadline passed. The plan is
    /// empty exactly when no sequence is left.
    pub fn plan(
        &mut self,
        now: Instant,
        cost: &CostModel,
        plan: &mut StepPlan,
        ended: &mut Vec<Ended>,
    ) {
        assert!(self.scheduled.is_empty(), "the last step was applied");
        plan.clear();
        self.admitted.clear();
        self.end_expired(now, ended);
        self.order_candidates(now, cost);
        let running = self.running.iter().map(|slot| self.sequence(*slot));
        let mut step = Prompts::beside(running, self.cfg.step_target, cost);
        self.make_room(cost, &mut step);
        // A sequence admitted now would take the blocks that others just went without.
        let may_admit = self.schedule_decodes();
        self.schedule_prompts(cost, &mut step, may_admit);
        if !self.running.is_empty() && self.is_nothing_scheduled() {
            // Prompts only, and none of them finds a block.
            self.force_oldest();
        }
        self.write_plan(plan);
        self.check(plan);
    }

    /// Advances every sequence of the planned step. `sampled` holds one token per sampled sequence in
    /// plan order; `None` ends the sequence, as it must where only scores were wanted. `took` is charged to the accounts of its sequences.
    ///
    /// # Panics
    /// When `sampled` has another number of tokens than the plan has sampled sequences.
    pub fn apply(
        &mut self,
        sampled: &[Option<u32>],
        took: Duration,
        cost: &CostModel,
        ended: &mut Vec<Ended>,
    ) {
        self.charge(took, cost);
        let mut rows = sampled.iter();
        for i in 0..self.scheduled.len() {
            let Scheduled {
                slot,
                n_tokens,
                is_sampled,
                ref scored,
                ..
            } = self.scheduled[i];
            let next_scored = scored.end;
            let seq = self.sequence_mut(slot.0);
            seq.next_scored = seq.next_scored.max(next_scored);
            seq.n_computed += n_tokens;
            seq.n_computed_ever = seq.n_computed_ever.max(seq.n_computed);
            seq.n_scheduled = 0;
            self.label(slot.0);
            let seq = self.sequence_mut(slot.0);
            if !is_sampled {
                continue;
            }
            assert_eq!(
                seq.n_computed,
                seq.tokens.len(),
                "a sampled sequence is fully computed"
            );
            let token = rows.next();
            assert!(token.is_some(), "one token per sampled sequence");
            let reason = match token.copied().flatten() {
                _ if seq.len_max <= seq.tokens.len() => Some(EndReason::Length),
                None => Some(EndReason::NotSampled),
                Some(token) => {
                    seq.tokens.push(token);
                    if seq.stop_tokens.contains(&token) {
                        Some(EndReason::Stop)
                    } else {
                        (seq.len_max <= seq.tokens.len()).then_some(EndReason::Length)
                    }
                }
            };
            if let Some(reason) = reason {
                self.release(slot.0);
                ended.push(Ended { slot, reason });
            }
        }
        assert!(rows.next().is_none(), "one token per sampled sequence");
        self.scheduled.clear();
    }

    /// Ends every sequence of the planned step: what it left in the KV memory is undefined.
    pub fn fail_step(&mut self, ended: &mut Vec<Ended>) {
        for i in 0..self.scheduled.len() {
            let slot = self.scheduled[i].slot;
            self.release(slot.0);
            ended.push(Ended {
                slot,
                reason: EndReason::StepFailed,
            });
        }
        self.scheduled.clear();
    }

    /// The planned step's sequences in plan order; their rows of logits come in this order, scored
    /// tokens before the sampled one.
    pub fn scheduled(&self) -> &[Scheduled] {
        &self.scheduled
    }

    fn is_nothing_scheduled(&self) -> bool {
        let mut running = self.running.iter().map(|slot| self.sequence(*slot));
        running.all(|seq| seq.n_scheduled == 0)
    }

    /// What the planned step's time depends on.
    pub fn step_shape(&self) -> StepShape {
        let shapes = self.scheduled.iter().map(|s| s.shape);
        shapes.fold(StepShape::default(), StepShape::and)
    }

    /// Sequences that the last plan ran for the first time.
    pub fn admitted(&self) -> &[Slot] {
        &self.admitted
    }

    /// Prompt and output of a live sequence.
    ///
    /// # Panics
    /// When the slot is empty.
    pub fn tokens(&self, slot: Slot) -> (&[u32], &[u32]) {
        let seq = self.sequence(slot.0);
        seq.tokens.split_at(seq.n_prompt)
    }

    /// Prompt positions of a live sequence that were not computed but found in the cache when it
    /// ran first.
    ///
    /// # Panics
    /// When the slot is empty.
    pub fn n_cached(&self, slot: Slot) -> usize {
        self.sequence(slot.0).n_cached
    }

    /// True when nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences in the running set.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences waiting, preempted ones included.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Of those waiting, the preempted ones.
    pub fn n_waiting_again(&self) -> usize {
        self.waiting.len() - self.n_waiting_new
    }

    /// Notes what free blocks hold.
    ///
    /// # Panics
    /// When one is not free.
    pub fn seed(&mut self, contents: &[(u32, BlockKey)]) {
        if self.cfg.prefix_cache {
            self.pool.seed(contents);
        }
    }

    /// Blocks of a sequence whose contents are known; none of one that has ended.
    pub fn labelled(&self, slot: Slot) -> impl Iterator<Item = (u32, BlockKey)> {
        let seq = self.slots[slot.0].as_ref();
        let blocks = seq.map_or(&[][..], |seq| seq.table.blocks());
        blocks
            .iter()
            .filter_map(|id| Some((*id, self.pool.key_of(*id)?)))
    }

    /// KV blocks in use.
    pub fn n_blocks_used(&self) -> usize {
        self.pool.n_used()
    }

    /// Sequences live at once at most.
    pub fn n_slots(&self) -> usize {
        self.slots.len()
    }

    /// Preemptions since construction.
    pub fn n_preemptions(&self) -> u64 {
        self.n_preemptions
    }
}
