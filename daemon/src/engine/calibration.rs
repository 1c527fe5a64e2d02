//! Measures an executor's step times before its first request, where nothing is known of them.

use std::time::Duration;

use crate::{
    cost::{CostModel, StepShape},
    runner::{ExecutorLimits, LogitRows, StepError, StepExecutor, StepPlan},
    runtime::clock,
};

/// Serial of the steps' spans, apart from those of sequences.
const SERIAL: u64 = u64::MAX - 1;
/// Positions of the steps, one after the other.
const STEPS: [usize; 6] = [1, 1, 16, 16, 64, 64];
/// No step is begun after so long: a start does not wait for a slow machine's longer steps.
const TIME_MAX: Duration = Duration::from_millis(500);

/// What a few steps over `n_blocks` blocks that nobody uses yet tell. What they leave in the blocks is
/// nobody's.
///
/// # Errors
/// [`StepError`] of the first step that fails.
pub(super) fn run(
    executor: &mut dyn StepExecutor,
    limits: &ExecutorLimits,
    n_blocks: usize,
) -> Result<CostModel, StepError> {
    let mut cost = CostModel::default();
    let begun_at = clock::now();
    let n_max = limits
        .step_tokens_max
        .min(limits.context_len_max)
        .min(n_blocks * limits.block_len);
    for n in STEPS.into_iter().filter(|n| *n <= n_max) {
        let now = clock::now();
        if TIME_MAX < now.saturating_duration_since(begun_at) {
            break;
        }
        let tokens: Vec<u32> = (0..n).map(|i| (i % limits.vocab_len) as u32).collect();
        let blocks: Vec<u32> = (0..n.div_ceil(limits.block_len) as u32).collect();
        let mut plan = StepPlan::default();
        plan.push(SERIAL, 0, &tokens, &blocks, LogitRows::Last);
        executor.execute(&plan)?;
        let took = clock::now().saturating_duration_since(now);
        cost.observe(StepShape::span(0, n, 1), took.as_secs_f64());
    }
    Ok(cost)
}
