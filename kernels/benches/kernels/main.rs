//! Kernels at the sizes of real layers, beside what this machine can do at most.
//!
//! `cargo bench -p dsd-kernels --bench kernels -- [--threads N] [--isa NAME] [--json] [WORD...]` times the
//! cases whose line holds every word. Ceilings are measured first, on the same threads. With
//! `--steady` it only says how fast memory is read, a second each, on average instead of at best. Without
//! cargo's `--bench`, as a test, everything runs once and nothing is said about speed.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program that times and prints"
)]

mod ceilings;
mod ops;

use std::{process::Command, thread, time::Instant};

use dsd_kernels::{
    backend::{Activations, KvType},
    cases,
    cpu::{CpuBackend, CpuConfig, CpuError, Isa},
};
use serde_json::json;

use self::{ceilings::Ceilings, ops::Op};

/// Runs of which the fastest and the median count.
const RUNS: usize = 9;
/// Seconds that a run takes at least, so that the clock's grain does not matter.
const RUN_S_MIN: f64 = 0.002;
/// Seconds for one case; slow ones get fewer runs, but at least three.
const CASE_S_MAX: f64 = 0.5;
const RUNS_MIN: usize = 3;

struct Options {
    n_threads: usize,
    isa: Isa,
    as_json: bool,
    steady: bool,
    /// Once and untimed.
    is_test: bool,
    words: Vec<String>,
}

/// Seconds of one call.
struct Times {
    best: f64,
    median: f64,
}

fn main() -> Result<(), CpuError> {
    let options = options();
    let backend = |activations, kv_type| {
        CpuBackend::new(CpuConfig {
            n_threads: options.n_threads,
            isa: options.isa,
            activations,
            kv_type,
        })
    };
    let float = backend(Activations::F32, KvType::F32)?;
    if options.steady {
        println!("{}", ceilings::steady(&float));
        return Ok(());
    }
    let int8 = backend(Activations::Int8, KvType::F32)?;
    let short_kv = [KvType::Bf16, KvType::Int8].map(|kv_type| backend(Activations::F32, kv_type));
    let [bf16_kv, int8_kv] = short_kv;
    let (bf16_kv, int8_kv) = (bf16_kv?, int8_kv?);
    let pairs = backend(Activations::Int8, KvType::Bf16)?;
    let ceilings = Ceilings::measure(&float, options.is_test);
    if !options.as_json {
        print_header(&options, &ceilings);
    }
    let mut rows = Vec::new();
    for case in cases::speed() {
        for backend in [&int8, &float, &bf16_kv, &int8_kv, &pairs] {
            let Some(mut op) = Op::new(backend, case) else {
                continue;
            };
            let name = op.name.clone();
            if !options.words.iter().all(|word| name.contains(word)) {
                continue;
            }
            if options.is_test {
                op.call();
                continue;
            }
            let times = time(&mut op);
            let (bound_s, bound) = ceilings.bound(&op);
            let row = json!({
                "case": name,
                "us": times.best * 1e6,
                "us_median": times.median * 1e6,
                "gb_s": op.n_bytes / times.best / 1e9,
                "gop_s": op.n_ops / times.best / 1e9,
                "bound_by": bound,
                "percent_of_ceiling": 100.0 * bound_s / times.best,
            });
            if !options.as_json {
                print_row(&op, &times, bound, bound_s);
            }
            rows.push(row);
        }
    }
    if options.as_json {
        let report = json!({
            "commit": commit(),
            "isa": options.isa.name(),
            "threads": options.n_threads,
            "ceilings": ceilings.json(),
            "cases": rows,
        });
        println!("{report}");
    }
    Ok(())
}

fn options() -> Options {
    let args = std::env::args().skip(1).collect::<Vec<_>>();
    let value = |name: &str| {
        let at = args.iter().position(|a| a == name)?;
        args.get(at + 1).cloned()
    };
    let valued = ["--threads", "--isa"];
    let is_value = |at: usize| 0 < at && valued.contains(&args[at - 1].as_str());
    let cores = thread::available_parallelism().map_or(1, Into::into);
    let available = Isa::available();
    let isa = value("--isa").and_then(|name| available.iter().find(|isa| isa.name() == name));
    Options {
        n_threads: value("--threads")
            .and_then(|n| n.parse().ok())
            .unwrap_or(cores),
        isa: *isa.unwrap_or(&available[0]),
        as_json: args.iter().any(|a| a == "--json"),
        steady: args.iter().any(|a| a == "--steady"),
        is_test: !args.iter().any(|a| a == "--bench"),
        words: (0..args.len())
            .filter(|at| !args[*at].starts_with("--") && !is_value(*at))
            .map(|at| args[at].clone())
            .collect(),
    }
}

fn time(op: &mut Op<'_>) -> Times {
    let mut seconds_of = |repeats: usize| {
        let start = Instant::now();
        for _ in 0..repeats {
            op.call();
        }
        start.elapsed().as_secs_f64() / repeats as f64
    };
    seconds_of(1);
    let once = seconds_of(1);
    let repeats = (RUN_S_MIN / once).ceil().clamp(1.0, 1e6) as usize;
    let affordable = CASE_S_MAX / (once * repeats as f64);
    let runs = (affordable as usize).clamp(RUNS_MIN, RUNS);
    let mut times = (0..runs).map(|_| seconds_of(repeats)).collect::<Vec<_>>();
    times.sort_by(f64::total_cmp);
    Times {
        best: times[0],
        median: times[runs / 2],
    }
}

fn print_header(options: &Options, ceilings: &Ceilings) {
    let (isa, n_threads) = (options.isa.name(), options.n_threads);
    println!("commit {}, {isa}, {n_threads} threads", commit());
    ceilings.print();
    println!(
        "\n{:44} {:>10} {:>10} {:>8} {:>8} {:>12}",
        "case (fastest run)", "us", "median", "GB/s", "Gop/s", "% of ceiling"
    );
}

fn print_row(op: &Op<'_>, times: &Times, bound: &str, bound_s: f64) {
    println!(
        "{:44} {:10.1} {:10.1} {:8.1} {:8.1} {:5.0} {bound}",
        op.name,
        times.best * 1e6,
        times.median * 1e6,
        op.n_bytes / times.best / 1e9,
        op.n_ops / times.best / 1e9,
        100.0 * bound_s / times.best,
    );
}

/// Of the tree that is measured, `-dirty` with changes; `unknown` outside of git.
fn commit() -> String {
    let described = Command::new("git")
        .args(["describe", "--always", "--dirty", "--exclude=*"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    described
        .ok()
        .filter(|output| output.status.success())
        .map_or_else(
            || "unknown".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
}
