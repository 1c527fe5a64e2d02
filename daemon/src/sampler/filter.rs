//! top_k, top_p and min_p by partial selection, and the draw.

use std::cmp::Ordering;

use crate::flow::SamplingParams;

use super::Scratch;

/// A token that may be chosen, with its softmax weight or logit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) weight: f32,
    pub(super) id: u32,
}

/// Draws from `weights` what the filters leave of them; `None` when all weights are 0.
pub(super) fn draw(
    scratch: &mut Scratch,
    weights: &[f32],
    params: &SamplingParams,
    uniform: f64,
) -> Option<u32> {
    let has_top_k = 0 < params.top_k && params.top_k < weights.len();
    let has_top_p = params.top_p < 1.0;
    // The likeliest has weight 1: no min_p drops it.
    let min_p = if 0.0 < params.min_p {
        params.min_p.min(1.0)
    } else {
        0.0
    };
    if !has_top_k && !has_top_p && min_p == 0.0 {
        let all = weights
            .iter()
            .zip(0u32..)
            .map(|(&weight, id)| Candidate { weight, id });
        return pick(all, uniform);
    }

    let kept = &mut scratch.candidates;
    kept.clear();
    // Without a mass to measure, min_p can go first, which leaves less to sort.
    let weight_min = if has_top_p { 0.0 } else { min_p };
    kept.extend(candidates(weights).filter(|c| 0.0 < c.weight && weight_min <= c.weight));
    if has_top_k {
        keep_first(kept, params.top_k);
    }
    if has_top_p {
        keep_mass(kept, f64::from(params.top_p));
        kept.retain(|c| min_p <= c.weight);
    }
    pick(kept.iter().copied(), uniform)
}

/// The numbers in `weights` with their ids.
pub(super) fn candidates(weights: &[f32]) -> impl Iterator<Item = Candidate> {
    let all = weights
        .iter()
        .zip(0u32..)
        .map(|(&weight, id)| Candidate { weight, id });
    all.filter(|c| !c.weight.is_nan())
}

/// Keeps the `n` largest, in descending order.
pub(super) fn keep_first(candidates: &mut Vec<Candidate>, n: usize) {
    if 0 < n && n < candidates.len() {
        candidates.select_nth_unstable_by(n - 1, descending);
    }
    candidates.truncate(n);
    candidates.sort_unstable_by(descending);
}

/// Keeps the fewest largest that hold `share` of the mass, at least one, in descending order. Sorts
/// only as far as needed: most distributions hold it in a few dozen tokens.
fn keep_mass(candidates: &mut Vec<Candidate>, share: f64) {
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let mut mass = 0.0;
    let mut n_sorted = 0;
    let mut n_more = 64;
    while n_sorted < candidates.len() {
        let rest = &mut candidates[n_sorted..];
        let n_chunk = n_more.min(rest.len());
        if n_chunk < rest.len() {
            rest.select_nth_unstable_by(n_chunk - 1, descending);
        }
        rest[..n_chunk].sort_unstable_by(descending);
        for candidate in &rest[..n_chunk] {
            mass += f64::from(candidate.weight);
            n_sorted += 1;
            if share * total <= mass {
                candidates.truncate(n_sorted);
                return;
            }
        }
        n_more *= 4;
    }
}

/// Larger weight first, then smaller id: a total order, so that what is kept never depends on how
/// the selection works.
fn descending(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// The candidate at which the running sum of weights passes `uniform` of their total.
fn pick(candidates: impl Iterator<Item = Candidate> + Clone, uniform: f64) -> Option<u32> {
    let candidates = candidates.filter(|c| 0.0 < c.weight);
    let total: f64 = candidates.clone().map(|c| f64::from(c.weight)).sum();
    let target = uniform * total;
    let mut mass = 0.0;
    let mut last = None;
    for c in candidates {
        mass += f64::from(c.weight);
        last = Some(c.id);
        if target < mass {
            return last;
        }
    }
    // Rounding can leave the sum a hair short of the target.
    last
}
