//! The loops that make requests: closed and open.
//!
//! Invariant: at most [`OPEN_REQUESTS_MAX`] requests are under way, whatever the rate.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::sleep_until};

use crate::{
    bench::{
        http::{Outcome, Target},
        schedule::Arrivals,
    },
    cli::BenchArgs,
    clock,
    progress::Bar,
};

/// Requests under way in an open loop; those above are counted as failed and not sent, because a
/// generator without a limit measures its own memory.
pub(super) const OPEN_REQUESTS_MAX: usize = 8192;

/// What to run, checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub(super) model: String,
    pub(super) mode: Mode,
    pub(super) is_chat: bool,
    pub(super) prompt_len: u32,
    pub(super) output_len: u32,
    pub(super) ignore_eos: bool,
    pub(super) reconnect: bool,
    pub(super) seed: u64,
    pub(super) request_timeout: Duration,
}

/// How requests follow each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Mode {
    /// The next one starts when one is done.
    Closed { concurrency: u32, n_requests: u32 },
    /// They come as they come.
    Open { rate: f64, duration: Duration },
}

impl Plan {
    /// The plan that the flags describe.
    pub(super) fn new(args: &BenchArgs, model: String) -> Self {
        let mode = match args.rate {
            Some(rate) => Mode::Open {
                rate,
                duration: args.duration,
            },
            None => Mode::Closed {
                concurrency: args.concurrency,
                n_requests: args.requests,
            },
        };
        Self {
            model,
            mode,
            is_chat: args.chat,
            prompt_len: args.prompt_len,
            output_len: args.output_len,
            ignore_eos: args.ignore_eos,
            reconnect: args.reconnect,
            seed: args.seed,
            request_timeout: args.request_timeout,
        }
    }

    /// Requests that it makes when nothing cuts it short.
    pub(super) fn n_requests(&self) -> u64 {
        match self.mode {
            Mode::Closed { n_requests, .. } => u64::from(n_requests),
            Mode::Open { rate, duration } => {
                Arrivals::new(rate, duration, self.seed).count() as u64
            }
        }
    }
}

/// What came of the requests that are done.
struct Done<'a> {
    outcomes: Vec<Outcome>,
    bar: &'a Bar,
}

impl Done<'_> {
    fn push(&mut self, outcome: Outcome) {
        self.outcomes.push(outcome);
        self.bar.advance(1);
    }
}

/// Runs the plan; true when Ctrl-C cut it short, with what was measured until then.
pub(super) async fn run(target: Target, plan: &Plan, bar: &Bar) -> (Vec<Outcome>, bool) {
    let mut done = Done {
        outcomes: Vec::new(),
        bar,
    };
    let target = Arc::new(target);
    let shared = Arc::new(plan.clone());
    let is_interrupted = tokio::select! {
        () = async {
            match plan.mode {
                Mode::Closed { concurrency, n_requests } => {
                    closed(&target, &shared, concurrency, n_requests, &mut done).await;
                }
                Mode::Open { rate, duration } => {
                    let arrivals = Arrivals::new(rate, duration, plan.seed);
                    open(&target, &shared, arrivals, &mut done).await;
                }
            }
        } => false,
        _ = tokio::signal::ctrl_c() => true,
    };
    (done.outcomes, is_interrupted)
}

async fn closed(
    target: &Arc<Target>,
    plan: &Arc<Plan>,
    concurrency: u32,
    n_requests: u32,
    done: &mut Done<'_>,
) {
    let mut under_way = JoinSet::new();
    for idx in 0..n_requests {
        if concurrency as usize <= under_way.len() {
            collect(under_way.join_next().await, done);
        }
        start(&mut under_way, target, plan, u64::from(idx));
    }
    while let Some(joined) = under_way.join_next().await {
        collect(Some(joined), done);
    }
}

async fn open(target: &Arc<Target>, plan: &Arc<Plan>, arrivals: Arrivals, done: &mut Done<'_>) {
    let started: Instant = clock::now();
    let mut under_way = JoinSet::new();
    for (idx, at) in arrivals.enumerate() {
        let arrival = sleep_until((started + at).into());
        tokio::pin!(arrival);
        loop {
            tokio::select! {
                biased;
                () = &mut arrival => break,
                Some(joined) = under_way.join_next() => collect(Some(joined), done),
            }
        }
        if OPEN_REQUESTS_MAX <= under_way.len() {
            done.push(Outcome::failed("client_saturated"));
            continue;
        }
        start(&mut under_way, target, plan, idx as u64);
    }
    while let Some(joined) = under_way.join_next().await {
        collect(Some(joined), done);
    }
}

fn start(under_way: &mut JoinSet<Outcome>, target: &Arc<Target>, plan: &Arc<Plan>, idx: u64) {
    let (target, plan) = (Arc::clone(target), Arc::clone(plan));
    under_way.spawn(async move { target.complete(&plan, idx).await });
}

fn collect(joined: Option<Result<Outcome, tokio::task::JoinError>>, done: &mut Done<'_>) {
    match joined {
        Some(Ok(outcome)) => done.push(outcome),
        Some(Err(_)) => done.push(Outcome::failed("client_bug")),
        None => {}
    }
}
