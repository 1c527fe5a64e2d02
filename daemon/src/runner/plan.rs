//! What one step runs: flat arrays that are cleared and refilled, never reallocated.

use std::ops::Range;

/// Which positions of a span get a logits row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill chunk that is not the last.
    Skip,
    /// The last position only: decode, or the last prefill chunk.
    Last,
    /// Every position: offline evaluation.
    All,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Sequence slot, stable while the sequence runs; for logs and checks only.
    pub seq: u64,
    /// Position of the first token in its sequence. Positions before it are in the cache already.
    pub first_pos: usize,
    /// The span's tokens, as a range of [`StepPlan::tokens`].
    pub tokens: Range<usize>,
    /// The sequence's block table from position 0 on, as a range of [`StepPlan::blocks`]; it covers
    /// at least `first_pos + tokens.len()` positions.
    pub blocks: Range<usize>,
    /// Logits wanted.
    pub logits: LogitRows,
}

/// One step over all its sequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Sequences of the step.
    pub spans: Vec<Span>,
    /// Tokens of all spans, one after the other.
    pub tokens: Vec<u32>,
    /// Block tables of all spans, one after the other.
    pub blocks: Vec<u32>,
}

impl StepPlan {
    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.tokens.clear();
        self.blocks.clear();
    }

    /// Adds a span by copying its tokens and block table.
    pub fn push(
        &mut self,
        seq: u64,
        first_pos: usize,
        tokens: &[u32],
        blocks: &[u32],
        logits: LogitRows,
    ) {
        let token_start = self.tokens.len();
        let block_start = self.blocks.len();
        self.tokens.extend_from_slice(tokens);
        self.blocks.extend_from_slice(blocks);
        self.spans.push(Span {
            seq,
            first_pos,
            tokens: token_start..self.tokens.len(),
            blocks: block_start..self.blocks.len(),
            logits,
        });
    }

    /// Rows of logits the plan asks for.
    pub fn n_logits(&self) -> usize {
        self.spans
            .iter()
            .map(|s| match s.logits {
                LogitRows::Skip => 0,
                LogitRows::Last => 1,
                LogitRows::All => s.tokens.len(),
            })
            .sum()
    }
}
