//! Which rows go to which expert.

use std::sync::Mutex;

use super::linear::ExpertRun;
use crate::reference::GateScratch;

/// Chosen experts, and the rows of each.
#[derive(Debug)]
pub struct CpuRoutes {
    pub(super) top_k: usize,
    /// `[rows, top_k]`: (expert, weight), ascending expert.
    pub(super) chosen: Vec<(usize, f32)>,
    /// Every thread's.
    pub(super) choice: Vec<Mutex<GateScratch>>,
    /// Slots, sorted by expert: the row of each, and its weight.
    pub(super) runs: Vec<ExpertRun>,
    pub(super) rows: Vec<usize>,
    pub(super) weights: Vec<f32>,
    /// `[rows, hidden]`: inputs of one expert.
    pub(super) x: Vec<f32>,
    /// `[rows * top_k, inter]`.
    pub(super) gate: Vec<f32>,
    /// `[rows, inter]` of one expert.
    pub(super) up: Vec<f32>,
    /// `[rows, hidden]` of one expert.
    pub(super) down: Vec<f32>,
}

impl CpuRoutes {
    /// Sorts the choice of the first `n_rows` rows by expert, rows ascending.
    pub(super) fn sort(&mut self, n_rows: usize, n_experts: usize) {
        let Self {
            chosen,
            runs,
            rows,
            weights,
            top_k,
            ..
        } = self;
        let chosen = &chosen[..n_rows * *top_k];
        runs.clear();
        runs.extend((0..n_experts).map(|expert| ExpertRun {
            expert,
            first: 0,
            n: 0,
        }));
        for (expert, _) in chosen {
            runs[*expert].n += 1;
        }
        let mut first = 0;
        for run in runs.iter_mut() {
            (run.first, first) = (first, first + run.n);
            run.n = 0;
        }
        rows.clear();
        rows.resize(chosen.len(), 0);
        weights.clear();
        weights.resize(chosen.len(), 0.0);
        for (m, of_row) in chosen.chunks_exact(*top_k).enumerate() {
            for (expert, weight) in of_row {
                let run = &mut runs[*expert];
                let slot = run.first + run.n;
                (rows[slot], weights[slot]) = (m, *weight);
                run.n += 1;
            }
        }
        runs.retain(|run| run.n > 0);
    }
}
