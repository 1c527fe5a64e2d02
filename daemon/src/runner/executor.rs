//! The executor that drives one rank's part of a model on a backend: the first rank's runs what the
//! engine plans and tells the others, which follow.

use std::{
    io, iter,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use dsd_kernels::backend::{Backend, CacheShape, StepInputs, StepSpan, Workers};

use super::kept::{BlockBytes, KeptBlocks, KeptKey, KeptShape};
use super::{ExecutorLimits, RankPlan, Span, StepError, StepExecutor, StepPlan};
use crate::{
    collective::{Collective, Op, Site, Told},
    model::{Decoder, Step, Workspace},
};

/// One rank's part of a decoder with its caches and buffers.
pub struct ModelExecutor<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    cache_shape: CacheShape,
    /// One per layer.
    caches: Vec<B::Cache>,
    workspace: Workspace<B>,
    limits: ExecutorLimits,
    rows: StepRows,
    group: Collective,
    /// A rank did not arrive: nobody waits for the others any more.
    is_lost: bool,
    /// The vocabulary's columns of every rank.
    columns: Vec<Range<usize>>,
    /// Whole rows of logits, on the first rank of several.
    gathered: Vec<f32>,
    /// The plan as it travels between ranks.
    words: Vec<u32>,
    /// The backend's threads.
    workers: Arc<dyn Workers>,
    /// What outlives this process, and what it found.
    kept: Option<(KeptBlocks, Vec<(u32, KeptKey)>)>,
}

/// The caches of all layers, block by block.
struct Caches<'a, B: Backend> {
    backend: &'a B,
    caches: &'a mut [B::Cache],
    shape: CacheShape,
}

impl<B: Backend> BlockBytes for Caches<'_, B> {
    fn n_layers(&self) -> usize {
        self.caches.len()
    }

    fn block(&self, layer: usize, block: usize) -> &[u8] {
        self.backend
            .cache_block(&self.caches[layer], self.shape, block)
    }

    fn block_mut(&mut self, layer: usize, block: usize) -> &mut [u8] {
        self.backend
            .cache_block_mut(&mut self.caches[layer], self.shape, block)
    }
}

/// A plan flattened into rows; refilled every step.
#[derive(Debug)]
struct StepRows {
    all: Rows,
    /// Those whose logits are wanted.
    last: Rows,
    /// Where they are among all.
    logit_rows: Vec<usize>,
}

/// Rows of a step, as [`StepInputs`] has them.
#[derive(Debug)]
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    span_of_row: Vec<usize>,
    spans: Vec<StepSpan>,
}

impl Rows {
    /// With room for so many.
    fn with_capacity(n_rows: usize, n_spans: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(n_rows),
            positions: Vec::with_capacity(n_rows),
            span_of_row: Vec::with_capacity(n_rows),
            spans: Vec::with_capacity(n_spans),
        }
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.span_of_row.clear();
        self.spans.clear();
    }

    /// Adds the rows of `span` for `tokens` of its own.
    fn push(&mut self, plan: &StepPlan, span: &Span, tokens: Range<usize>) {
        let n_rows = tokens.len();
        if n_rows == 0 {
            return;
        }
        let first_pos = span.first_pos + (tokens.start - span.tokens.start);
        self.span_of_row
            .extend(iter::repeat_n(self.spans.len(), n_rows));
        self.spans.push(StepSpan {
            first_row: self.tokens.len(),
            n_rows,
            first_pos,
            first_block: span.blocks.start,
        });
        self.tokens.extend_from_slice(&plan.tokens[tokens]);
        self.positions.extend(first_pos..first_pos + n_rows);
    }

    fn inputs<'a>(&'a self, plan: &'a StepPlan) -> StepInputs<'a> {
        StepInputs {
            tokens: &self.tokens,
            positions: &self.positions,
            span_of_row: &self.span_of_row,
            spans: &self.spans,
            blocks: &plan.blocks,
        }
    }
}

impl StepRows {
    /// With room for the largest plan.
    fn for_limits(limits: &ExecutorLimits) -> Self {
        let (n_logits, n_spans) = (limits.step_logits_max, limits.step_spans_max);
        Self {
            all: Rows::with_capacity(limits.step_tokens_max, n_spans),
            last: Rows::with_capacity(n_logits, n_spans),
            logit_rows: Vec::with_capacity(n_logits),
        }
    }

    fn fill(&mut self, plan: &StepPlan) {
        self.all.clear();
        self.last.clear();
        self.logit_rows.clear();
        for span in &plan.spans {
            self.all.push(plan, span, span.tokens.clone());
            self.last.push(plan, span, span.logit_tokens());
            self.logit_rows.extend(span.logit_tokens());
        }
    }
}

impl<B: Backend> ModelExecutor<B> {
    /// Takes all memory of the plan.
    pub fn new(backend: B, decoder: Decoder<B>, plan: &RankPlan) -> Self {
        let (spec, split) = (decoder.spec(), &plan.split);
        let plan = &plan.memory;
        let cache_shape = plan.cache_shape(spec);
        let caches = (0..spec.n_layers())
            .map(|_| backend.cache(cache_shape))
            .collect();
        let workspace = Workspace::new(&backend, spec, plan.step_tokens_max, plan.step_logits_max);
        let limits = ExecutorLimits {
            vocab_len: split.full.vocab_len,
            block_len: plan.block_len,
            n_blocks: plan.n_blocks,
            step_tokens_max: plan.step_tokens_max,
            step_spans_max: plan.step_spans_max,
            step_logits_max: plan.step_logits_max,
            context_len_max: plan.context_len,
        };
        Self {
            workers: backend.workers(),
            backend,
            decoder,
            cache_shape,
            caches,
            workspace,
            limits,
            rows: StepRows::for_limits(&limits),
            gathered: match split.of.n_ranks {
                2.. if split.is_first() => vec![0.0; plan.step_logits_max * limits.vocab_len],
                _ => Vec::new(),
            },
            words: Vec::new(),
            columns: split.vocab_of_ranks.clone(),
            group: Collective::Solo,
            is_lost: false,
            kept: None,
        }
    }

    /// The same with a file that keeps blocks beyond this process, at most so many bytes of them; what
    /// it holds by the same weights is put back. The first rank knows the `others`' files.
    ///
    /// # Errors
    /// From the system.
    pub fn keeping(
        mut self,
        path: &Path,
        identity: [u8; 32],
        others: Option<&[PathBuf]>,
        bytes_max: u64,
    ) -> io::Result<Self> {
        let shape = KeptShape {
            n_blocks: self.limits.n_blocks,
            block_len: self.limits.block_len,
            block_bytes: self.caches.len() * self.cache_shape.block_bytes(self.backend.kv_type()),
            bytes_max,
        };
        let mut caches = Caches {
            backend: &self.backend,
            caches: &mut self.caches,
            shape: self.cache_shape,
        };
        self.kept = Some(KeptBlocks::open(
            path,
            shape,
            identity,
            others,
            &mut caches,
        )?);
        Ok(self)
    }

    /// The same in its group, whose ranks have met.
    ///
    /// # Panics
    /// When the group is not the one this part of the model was made for.
    pub fn in_group(mut self, group: Collective) -> Self {
        let n_ranks = match &group {
            Collective::Solo => 1,
            Collective::Shm(member) => member.n_ranks(),
        };
        assert_eq!(
            n_ranks,
            self.columns.len(),
            "ranks of the model and of the group"
        );
        if n_ranks > 1 {
            self.words.reserve_exact(n_words_max(&self.limits));
        }
        self.group = group;
        self
    }

    /// Runs what the first rank says until it says that nothing follows.
    ///
    /// # Errors
    /// [`StepError`]; the group is of no use any more.
    pub fn follow(&mut self) -> Result<(), StepError> {
        let mut plan = StepPlan::default();
        let n_words_max = n_words_max(&self.limits);
        loop {
            let Collective::Shm(member) = &mut self.group else {
                return Ok(());
            };
            let site = Site::outside(Op::Plan);
            match member.receive(0, site, &mut self.words, n_words_max)? {
                Told::End => return Ok(()),
                Told::Message => {}
            }
            let n_words = self.words.len();
            plan.read_words(&self.words)
                .ok_or(StepError::BadPlan { n_words })?;
            self.check(&plan)?;
            self.run(&plan)?;
        }
    }

    /// Refuses what would not fit the buffers, and what would read outside of them.
    fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        let ExecutorLimits {
            block_len,
            n_blocks,
            vocab_len,
            ..
        } = self.limits;
        let limit = |limit, found, max| {
            if found > max {
                Err(StepError::PlanTooLarge { limit, found, max })
            } else {
                Ok(())
            }
        };
        limit(
            "step_tokens_max",
            plan.tokens.len(),
            self.limits.step_tokens_max,
        )?;
        limit(
            "step_spans_max",
            plan.spans.len(),
            self.limits.step_spans_max,
        )?;
        limit(
            "step_logits_max",
            plan.n_logits(),
            self.limits.step_logits_max,
        )?;
        for span in &plan.spans {
            let end = span.first_pos + span.tokens.len();
            limit("context_len_max", end, self.limits.context_len_max)?;
            limit("block table", end, span.blocks.len() * block_len)?;
        }
        let largest = |values: &[u32]| values.iter().max().map_or(0, |v| *v as usize);
        limit("block id", largest(&plan.blocks), n_blocks - 1)?;
        limit("token id", largest(&plan.tokens), vocab_len - 1)
    }

    /// Tells the others the plan and runs this rank's part of it.
    fn lead(&mut self, plan: &StepPlan) -> Result<usize, StepError> {
        if let Collective::Shm(member) = &mut self.group {
            plan.to_words(&mut self.words);
            member.broadcast(Site::outside(Op::Plan), &self.words)?;
        }
        self.run(plan)
    }

    /// This rank's part of a step; the first one's leaves the rows of logits, their number is
    /// returned.
    fn run(&mut self, plan: &StepPlan) -> Result<usize, StepError> {
        if let Collective::Shm(member) = &mut self.group {
            member.set_deadline(match plan.deadline_ms {
                0 => Duration::MAX,
                ms => Duration::from_millis(u64::from(ms)),
            });
        }
        if let Some((kept, _)) = &mut self.kept {
            kept.before_step(plan);
        }
        self.rows.fill(plan);
        let step = Step {
            rows: self.rows.all.inputs(plan),
            logit_rows: &self.rows.logit_rows,
            last: self.rows.last.inputs(plan),
        };
        let logits = self.decoder.forward(
            &self.backend,
            step,
            self.cache_shape,
            &mut self.caches,
            &mut self.workspace,
            &mut self.group,
        )?;
        let n_rows = self.rows.logit_rows.len();
        let local = self
            .backend
            .download(logits, n_rows * self.decoder.spec().vocab_len);
        let whole = Some(self.gathered.as_mut_slice()).filter(|g| !g.is_empty());
        let site = Site::outside(Op::Logits);
        self.group
            .gather_columns(site, local, &self.columns, n_rows, whole)?;
        if let Some((kept, _)) = &mut self.kept {
            let caches = Caches {
                backend: &self.backend,
                caches: &mut self.caches,
                shape: self.cache_shape,
            };
            kept.after_step(plan, &caches);
        }
        Ok(n_rows)
    }
}

/// Words of the longest plan.
fn n_words_max(limits: &ExecutorLimits) -> usize {
    let blocks_per_span = limits.context_len_max.div_ceil(limits.block_len);
    StepPlan::n_words_max(
        limits.step_spans_max,
        limits.step_tokens_max,
        blocks_per_span,
    )
}

impl<B: Backend> Drop for ModelExecutor<B> {
    /// Lets the followers go. Those of a lost group cannot be told: one that is frozen would not listen
    /// before the time of another step is over.
    fn drop(&mut self) {
        if let Collective::Shm(member) = &mut self.group
            && member.rank() == 0
            && !self.is_lost
        {
            // Whoever is missing needs no goodbye.
            let _ = member.broadcast_end(Site::outside(Op::Plan));
        }
    }
}

impl<B: Backend> StepExecutor for ModelExecutor<B> {
    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&mut [f32], StepError> {
        self.check(plan)?;
        let led = self.lead(plan);
        self.is_lost |= matches!(led, Err(StepError::Missing(_)));
        let n_rows = led?;
        let vocab_len = self.limits.vocab_len;
        let logits = match self.group {
            Collective::Solo => self
                .backend
                .download(self.workspace.logits(), n_rows * vocab_len),
            Collective::Shm(_) => &mut self.gathered[..n_rows * vocab_len],
        };
        let first_bad = AtomicUsize::new(usize::MAX);
        self.workers
            .for_each_row(logits, vocab_len, &|row, _, values| {
                if !values.iter().fold(true, |all, v| all & v.is_finite()) {
                    first_bad.fetch_min(row, Relaxed);
                }
            });
        match first_bad.into_inner() {
            usize::MAX => Ok(logits),
            row => Err(StepError::NotFinite { row }),
        }
    }

    fn take_kept(&mut self) -> Vec<(u32, KeptKey)> {
        self.kept
            .as_mut()
            .map_or_else(Vec::new, |(_, found)| std::mem::take(found))
    }

    fn note_keys(&mut self, keys: &[(u32, KeptKey)]) {
        if let Some((kept, _)) = &mut self.kept {
            kept.note_keys(keys.iter().copied());
        }
    }

    fn workers(&self) -> Arc<dyn Workers> {
        Arc::clone(&self.workers)
    }
}
