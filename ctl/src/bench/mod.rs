//! `dsctl bench`: puts load on a node over HTTP and measures its answers.
//!
//! Closed loop: a fixed number of requests under way. Open loop: requests arrive as a Poisson process
//! whether or not earlier ones are done, which is what shows a node's queueing.

// Pure: what is asked when, and what the numbers mean.
mod random;
mod schedule;
mod percentiles;
mod sse;
mod report;

// I/O: requests over HTTP, and the loops that make them.
mod http;
mod load;

use crate::{
    bench::{http::Target, load::Plan},
    cli::BenchArgs,
    clock,
    failure::{Exit, Failure},
    output::Output,
    progress::Bar,
};

/// Runs the load and prints the report. [`Exit::Unhealthy`] when no request succeeded.
pub(crate) async fn run(args: &BenchArgs, out: &mut Output<'_>) -> Result<Exit, Failure> {
    let target = Target::new(&args.http, args.api_key.clone())?;
    // Asked even where it is named: one clear failure instead of as many as there are requests.
    let listed = target
        .models(args.request_timeout, args.reconnect)
        .await?
        .into_iter()
        .next();
    let model = args.model.clone().or(listed).ok_or_else(|| {
        Failure::new(Exit::Unhealthy, "no_model", "the node lists no model")
            .hint("load one with `dsctl model load`, or name one with --model")
    })?;
    let plan = Plan::new(args, model);
    let bar = Bar::counting(out.is_json(), "requests", plan.n_requests());
    let started = clock::now();
    let (outcomes, is_interrupted) = load::run(target, &plan, &bar).await;
    bar.finish();
    let report = report::Report::new(&plan, &outcomes, clock::now() - started, is_interrupted);
    if out.is_json() {
        out.json(&report)?;
    } else {
        report.print(out)?;
    }
    Ok(match (is_interrupted, report.n_ok) {
        (true, _) => Exit::Interrupted,
        (false, 0) => Exit::Unhealthy,
        (false, _) => Exit::Done,
    })
}

#[cfg(test)]
mod tests;
