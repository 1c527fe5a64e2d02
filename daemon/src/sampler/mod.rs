//! Logits, parameters, seed and position to a token; pure.
//!
//! The order is the one most clients know from Hugging Face's logits processors and warpers:
//! repetition penalty, then frequency and presence penalties and bias, then temperature, top_k,
//! top_p, min_p. The repetition penalty comes first because it looks at the sign of the model's own
//! logit; the next three only add, so their order does not matter; top_p measures mass among what
//! top_k left, and min_p compares with the likeliest token, which no filter removes.
//!
//! Knows no sequences, text or executor. What is random comes from Philox keyed by the seed and
//! counted by the position, so that a token can be drawn again.
//!
//! Invariant: the result depends on the arguments only, never on what the [`Scratch`] was used for.
//! Invariant: an id at or above `sampleable_len`, or with a NaN logit, is never chosen.
//!
//! Called by the engine once per logits row.

mod filter;
mod penalty;
pub mod philox;
#[cfg(test)]
mod tests;

use crate::flow::{SamplingParams, TokenLogprobs};

use filter::Candidate;

/// Memory that sampling needs; taken once, reused for every token.
#[derive(Debug)]
pub struct Scratch {
    /// Occurrences by token id; all zero between calls.
    occurrences: Vec<u32>,
    /// Ids with a non-zero entry in `occurrences`.
    seen: Vec<u32>,
    candidates: Vec<Candidate>,
    /// The row before penalties, kept when log-probabilities are wanted.
    unmodified: Vec<f32>,
}

impl Scratch {
    /// Room for rows of `vocab_len` logits.
    pub fn new(vocab_len: usize) -> Self {
        Self {
            occurrences: vec![0; vocab_len],
            seen: Vec::with_capacity(vocab_len),
            candidates: Vec::with_capacity(vocab_len),
            unmodified: Vec::with_capacity(vocab_len),
        }
    }
}

/// What a token is drawn for.
#[derive(Debug, Clone, Copy)]
pub struct SampleContext<'a> {
    /// How to choose.
    pub params: &'a SamplingParams,
    /// Tokens that count for the repetition penalty only.
    pub prompt: &'a [u32],
    /// Tokens that count for all penalties.
    pub output: &'a [u32],
    /// `None`: no log-probabilities; `Some(n)`: of the chosen token and the `n` likeliest.
    pub top_logprobs: Option<usize>,
    /// Ids from here on are padding of the vocabulary and never chosen or listed.
    pub sampleable_len: usize,
    /// A bit for each id that may be chosen, the first in the lowest bit of the first word; ids beyond
    /// its end may not. `None`: all may.
    pub allowed: Option<&'a [u32]>,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Vocabulary id.
    pub token: u32,
    /// Under the model's unmodified distribution over the whole row, when asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// Every logit is NaN or minus infinity.
    #[error("none of {n_logits} logits is a number")]
    NoCandidate {
        /// Sampleable logits in the row.
        n_logits: usize,
    },
}

/// Chooses the token that follows `prompt` and `output`. Its position in the sequence is the
/// counter of the generator. Overwrites `logits`.
///
/// # Errors
/// [`SampleError`] when the row holds no number.
pub fn sample(
    scratch: &mut Scratch,
    logits: &mut [f32],
    ctx: &SampleContext<'_>,
) -> Result<Sampled, SampleError> {
    scratch.unmodified.clear();
    if ctx.top_logprobs.is_some() {
        scratch.unmodified.extend_from_slice(logits);
    }
    let n_logits = ctx.sampleable_len.min(logits.len());
    let logits = &mut logits[..n_logits];
    penalty::apply(scratch, logits, ctx);
    if let Some(allowed) = ctx.allowed {
        rule_out(logits, allowed);
    }
    let (best, best_logit) = argmax(logits).ok_or(SampleError::NoCandidate { n_logits })?;

    let token = if 0.0 < ctx.params.temperature {
        let position = ctx.prompt.len() + ctx.output.len();
        let uniform = philox::uniform(ctx.params.seed, position as u64);
        weigh(logits, best_logit, ctx.params.temperature);
        filter::draw(scratch, logits, ctx.params, uniform).unwrap_or(best)
    } else {
        best
    };
    let logprobs = ctx.top_logprobs.map(|n| {
        let row = &scratch.unmodified;
        token_logprobs(&mut scratch.candidates, row, token, n, n_logits)
    });
    Ok(Sampled { token, logprobs })
}

/// Log-probabilities of a token that stands in a text, of which `logits` are the row before it, and of
/// the `n_top` likeliest below `sampleable_len`.
pub fn score(
    scratch: &mut Scratch,
    logits: &[f32],
    token: u32,
    n_top: usize,
    sampleable_len: usize,
) -> TokenLogprobs {
    let candidates = &mut scratch.candidates;
    token_logprobs(candidates, logits, token, n_top, sampleable_len)
}

/// The natural logarithm of a token's probability, over the whole row.
pub fn log_probability(logits: &[f32], token: u32) -> f64 {
    let log_sum = log_sum_exp(logits);
    (logits.get(token as usize)).map_or(f64::NEG_INFINITY, |&logit| f64::from(logit) - log_sum)
}

/// Leaves those whose bit is set.
fn rule_out(logits: &mut [f32], allowed: &[u32]) {
    let words = allowed.iter().copied().chain(std::iter::repeat(0));
    for (part, word) in logits.chunks_mut(32).zip(words) {
        if word == u32::MAX {
            continue;
        }
        for (bit, logit) in part.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// The id of the largest logit that is a number, the smallest id among equals.
pub fn likeliest(logits: &[f32]) -> Option<u32> {
    argmax(logits).map(|(id, _)| id)
}

/// The largest logit that is a number, and the smallest id that has it.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    /// Independent maxima, which is what makes a vector of them.
    const LANES: usize = 32;
    // False for NaN.
    let larger = |best: f32, logit: f32| if best < logit { logit } else { best };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (best, logit) in lanes.iter_mut().zip(chunk) {
            *best = larger(*best, *logit);
        }
    }
    let best = lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, larger);
    if best == f32::NEG_INFINITY {
        return None;
    }
    let has_best = |chunk: &[f32]| {
        chunk
            .iter()
            .fold(false, |has, logit| has | (*logit == best))
    };
    let first = chunks
        .iter()
        .position(|chunk| has_best(chunk))
        .unwrap_or(chunks.len())
        * LANES;
    let id = first + logits[first..].iter().position(|logit| *logit == best)?;
    Some((id as u32, logits[id]))
}

/// Replaces logits by softmax weights relative to the likeliest token, whose weight becomes 1.
fn weigh(logits: &mut [f32], best_logit: f32, temperature: f32) {
    for logit in logits {
        // Subtract first: `best / temperature` may overflow.
        let exponent = (*logit - best_logit) / temperature;
        let weight = exp(exponent);
        *logit = if *logit == best_logit { 1.0 } else { weight };
    }
}

/// `e^x` for `x <= 0` to 2 units in the last place; 0 below -87, where `e^x` is no normal number, and
/// for NaN. Without a branch, so that a vector of them is computed at once.
fn exp(x: f32) -> f32 {
    /// `ln 2` in two parts, the first of which times a small integer is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// Adding and subtracting it rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let inside = if x > -87.0 { x } else { -87.0 };
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN_2[0] - n * LN_2[1];
    // Cephes' expf polynomial.
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let value = p * r * r + r + 1.0;
    // 2^n, as the bits of a float; `shifted` has n in its last bits.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let scale = f32::from_bits(n.wrapping_add(127) << 23);
    if x > -87.0 { value * scale } else { 0.0 }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row
        .iter()
        .filter(|l| !l.is_nan())
        .map(|&l| f64::from((l - max).exp()))
        .sum();
    f64::from(max) + sum.ln()
}

fn token_logprobs(
    candidates: &mut Vec<Candidate>,
    row: &[f32],
    token: u32,
    n_top: usize,
    sampleable_len: usize,
) -> TokenLogprobs {
    let log_sum = log_sum_exp(row);
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;

    candidates.clear();
    if 0 < n_top {
        candidates.extend(filter::candidates(&row[..sampleable_len.min(row.len())]));
        filter::keep_first(candidates, n_top);
    }
    TokenLogprobs {
        chosen: row
            .get(token as usize)
            .map_or(f32::NEG_INFINITY, |&l| logprob(l)),
        top: candidates
            .iter()
            .map(|c| (c.id, logprob(c.weight)))
            .collect(),
    }
}
