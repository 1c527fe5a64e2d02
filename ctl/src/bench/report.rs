//! What a run of requests adds up to.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use crate::{
    bench::{
        http::Outcome,
        load::{Mode, Plan},
        percentiles::Percentiles,
    },
    failure::Failure,
    output::Output,
};

/// The result of a bench. Latencies are of complete answers only, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    model: String,
    mode: &'static str,
    concurrency: Option<u32>,
    rate: Option<f64>,
    prompt_words: u32,
    output_tokens_max: u32,
    seed: u64,
    is_interrupted: bool,
    duration_s: f64,
    n_requests: usize,
    pub(super) n_ok: usize,
    n_failed: usize,
    errors: BTreeMap<String, usize>,
    prompt_tokens: u64,
    completion_tokens: u64,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    ttft_ms: Percentiles,
    itl_ms: Percentiles,
    e2e_ms: Percentiles,
}

impl Report {
    /// Sums up what came of the plan in `took`.
    pub(super) fn new(
        plan: &Plan,
        outcomes: &[Outcome],
        took: Duration,
        is_interrupted: bool,
    ) -> Self {
        let (mode, concurrency, rate) = match plan.mode {
            Mode::Closed { concurrency, .. } => ("closed", Some(concurrency), None),
            Mode::Open { rate, .. } => ("open", None, Some(rate)),
        };
        let mut errors = BTreeMap::new();
        for error in outcomes.iter().filter_map(|o| o.error.clone()) {
            *errors.entry(error).or_insert(0) += 1;
        }
        let complete: Vec<&Outcome> = outcomes.iter().filter(|o| o.error.is_none()).collect();
        let completion_tokens = complete.iter().map(|o| o.n_completion_tokens).sum();
        let duration_s = took.as_secs_f64();
        let per_s = |n: f64| {
            if 0.0 < duration_s {
                n / duration_s
            } else {
                0.0
            }
        };
        let ms = |d: Duration| d.as_secs_f64() * 1000.0;
        Self {
            model: plan.model.clone(),
            mode,
            concurrency,
            rate,
            prompt_words: plan.prompt_len,
            output_tokens_max: plan.output_len,
            seed: plan.seed,
            is_interrupted,
            duration_s,
            n_requests: outcomes.len(),
            n_ok: complete.len(),
            n_failed: outcomes.len() - complete.len(),
            errors,
            prompt_tokens: complete.iter().map(|o| o.n_prompt_tokens).sum(),
            completion_tokens,
            requests_per_s: per_s(complete.len() as f64),
            output_tokens_per_s: per_s(completion_tokens as f64),
            ttft_ms: Percentiles::of(complete.iter().filter_map(|o| o.ttft).map(ms).collect()),
            itl_ms: Percentiles::of(
                complete
                    .iter()
                    .flat_map(|o| &o.gaps)
                    .copied()
                    .map(ms)
                    .collect(),
            ),
            e2e_ms: Percentiles::of(complete.iter().map(|o| ms(o.e2e)).collect()),
        }
    }

    /// For eyes.
    pub(super) fn print(&self, out: &mut Output<'_>) -> Result<(), Failure> {
        let load = match (self.concurrency, self.rate) {
            (Some(n), _) => format!("closed loop, {n} at a time"),
            (None, rate) => format!("open loop, {} per second", rate.unwrap_or_default()),
        };
        out.line(&format!("model       {}", self.model))?;
        out.line(&format!("load        {load}"))?;
        out.line(&format!(
            "requests    {} in {:.2} s, {} complete, {} failed",
            self.n_requests, self.duration_s, self.n_ok, self.n_failed
        ))?;
        out.line(&format!(
            "throughput  {:.2} requests/s, {:.1} output tokens/s",
            self.requests_per_s, self.output_tokens_per_s
        ))?;
        out.line(&format!(
            "tokens      {} prompt, {} output",
            self.prompt_tokens, self.completion_tokens
        ))?;
        out.line("")?;
        let row = |name: &str, p: &Percentiles| {
            let numbers = [p.mean, p.p50, p.p90, p.p95, p.p99, p.max];
            let cells = numbers.iter().map(|x| match p.n {
                0 => "-".to_owned(),
                _ => format!("{x:.2}"),
            });
            [name.to_owned()]
                .into_iter()
                .chain(cells)
                .collect::<Vec<_>>()
        };
        let rows = [
            row("time to first token", &self.ttft_ms),
            row("between tokens", &self.itl_ms),
            row("end to end", &self.e2e_ms),
        ];
        out.table(
            &["MILLISECONDS", "MEAN", "P50", "P90", "P95", "P99", "MAX"],
            &rows,
        )?;
        if !self.errors.is_empty() {
            out.line("")?;
            let rows: Vec<_> = self
                .errors
                .iter()
                .map(|(code, n)| vec![code.clone(), n.to_string()])
                .collect();
            out.table(&["ERROR", "COUNT"], &rows)?;
        }
        Ok(())
    }
}
