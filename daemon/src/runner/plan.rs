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

impl Span {
    /// Tokens that get a row of logits, as a range of [`StepPlan::tokens`].
    pub fn logit_tokens(&self) -> Range<usize> {
        let Range { start, end } = self.tokens;
        match self.logits {
            LogitRows::Skip => end..end,
            LogitRows::Last => end.saturating_sub(1).max(start)..end,
            LogitRows::All => start..end,
        }
    }
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
    /// How late a rank may be in this step, in milliseconds; 0 for as late as in any.
    pub deadline_ms: u32,
}

impl StepPlan {
    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.tokens.clear();
        self.blocks.clear();
        self.deadline_ms = 0;
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
        self.spans.iter().map(|s| s.logit_tokens().len()).sum()
    }
}

/// Words of a span in [`StepPlan::to_words`].
const SPAN_WORDS: usize = 4;

impl StepPlan {
    /// Words that a plan within these bounds takes at most.
    pub fn n_words_max(n_spans: usize, n_tokens: usize, blocks_per_span: usize) -> usize {
        4 + n_spans * (SPAN_WORDS + blocks_per_span) + n_tokens
    }

    /// Writes what another rank needs to run the step.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "positions and counts of a step are far below 2^32"
    )]
    pub fn to_words(&self, words: &mut Vec<u32>) {
        words.clear();
        let counts = [self.spans.len(), self.tokens.len(), self.blocks.len()];
        words.extend(counts.map(|n| n as u32));
        words.push(self.deadline_ms);
        for span in &self.spans {
            let logits = match span.logits {
                LogitRows::Skip => 0,
                LogitRows::Last => 1,
                LogitRows::All => 2,
            };
            let (n_tokens, n_blocks) = (span.tokens.len(), span.blocks.len());
            words.extend([
                span.first_pos as u32,
                n_tokens as u32,
                n_blocks as u32,
                logits,
            ]);
        }
        words.extend_from_slice(&self.tokens);
        words.extend_from_slice(&self.blocks);
    }

    /// Reads what [`StepPlan::to_words`] wrote; `None` when it is not that. Sequence numbers are not
    /// carried over.
    pub fn read_words(&mut self, words: &[u32]) -> Option<()> {
        self.clear();
        let (head, rest) = words.split_first_chunk::<4>()?;
        let [n_spans, n_tokens, n_blocks, _] = head.map(|n| n as usize);
        self.deadline_ms = head[3];
        let (spans, rest) = rest.split_at_checked(n_spans.checked_mul(SPAN_WORDS)?)?;
        let (tokens, blocks) = rest.split_at_checked(n_tokens)?;
        let (mut token, mut block) = (0, 0);
        for span in spans.as_chunks::<SPAN_WORDS>().0 {
            let [first_pos, n_tokens, n_blocks, logits] = *span;
            let logits = match logits {
                0 => LogitRows::Skip,
                1 => LogitRows::Last,
                2 => LogitRows::All,
                _ => return None,
            };
            let tokens = token..token + n_tokens as usize;
            let blocks = block..block + n_blocks as usize;
            (token, block) = (tokens.end, blocks.end);
            self.spans.push(Span {
                seq: self.spans.len() as u64,
                first_pos: first_pos as usize,
                tokens,
                blocks,
                logits,
            });
        }
        if (token, block, n_blocks) != (tokens.len(), blocks.len(), blocks.len()) {
            return None;
        }
        self.tokens.extend_from_slice(tokens);
        self.blocks.extend_from_slice(blocks);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_in_words_is_the_same_plan_and_anything_else_is_refused() {
        let mut plan = StepPlan::default();
        plan.push(0, 5, &[7, 8, 9], &[1, 2], LogitRows::Last);
        plan.push(1, 0, &[3], &[4], LogitRows::Skip);
        plan.push(2, 1, &[6, 6], &[9], LogitRows::All);
        plan.deadline_ms = 3_500;
        let mut words = Vec::new();
        plan.to_words(&mut words);
        assert!(words.len() <= StepPlan::n_words_max(3, 6, 2));
        let mut read = StepPlan::default();
        read.read_words(&words).unwrap();
        assert_eq!(read, plan);
        for len in 0..words.len() {
            assert_eq!(read.read_words(&words[..len]), None, "cut at {len}");
        }
        words.push(0);
        assert_eq!(read.read_words(&words), None, "longer");
    }
}
