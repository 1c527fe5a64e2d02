//! Linear layers over formats and row counts: time, bytes of weights and operations per second.
//!
//! `cargo bench -p dsd-kernels --bench linear -- [--threads N] [FORMAT...]`
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program that times and prints"
)]

use std::time::Instant;

use dsd_kernels::{
    backend::{Activations, Backend, KvType, WeightStore},
    cpu::{CpuBackend, CpuConfig, CpuError, Isa},
    dtype::Format,
    matrix::Matrix,
};

/// Widths and heights: a layer that stays in a cache, and one that does not.
const SHAPES: [(usize, usize); 2] = [(1536, 576), (49_152, 1024)];
/// Rows of activations.
const TOKENS: [usize; 5] = [1, 4, 16, 64, 512];
/// Runs of which the median counts.
const RUNS: usize = 7;
/// Operations that a run takes at least, so that the clock's grain does not matter.
const OPS_MIN: f64 = 2e8;

fn main() -> Result<(), CpuError> {
    let args = std::env::args().skip(1).collect::<Vec<_>>();
    let threads = args
        .iter()
        .position(|a| a == "--threads")
        .and_then(|at| args.get(at + 1)?.parse().ok());
    let wanted = |format: Format| {
        let mut names = args
            .iter()
            .filter(|a| Format::ALL.iter().any(|f| f.name() == *a));
        names.clone().next().is_none() || names.any(|name| name == format.name())
    };
    println!(
        "{:9} {:5} {:>6} {:>6} {:>5} {:>10} {:>8} {:>8}",
        "format", "act", "n", "k", "m", "us", "GB/s", "Gop/s"
    );
    for format in Format::ALL.into_iter().filter(|f| wanted(*f)) {
        for activations in [Activations::F32, Activations::Int8] {
            if format.block_len() == 1 && activations == Activations::Int8 {
                continue;
            }
            let backend = CpuBackend::new(CpuConfig {
                n_threads: threads.unwrap_or(2),
                isa: Isa::available()[0],
                activations,
                kv_type: KvType::F32,
            })?;
            for (n, k) in SHAPES {
                bench(&backend, format, activations, n, k);
            }
        }
    }
    Ok(())
}

fn bench(backend: &CpuBackend, format: Format, activations: Activations, n: usize, k: usize) {
    let Some(row_bytes) = format.row_bytes(k) else {
        return;
    };
    // Zeros are as much work as anything else; FP8 would want scales.
    let Ok(matrix) = Matrix::new(format, n, k, vec![0; n * row_bytes].into(), None) else {
        return;
    };
    let weight = backend.weight(vec![matrix]);
    for m in TOKENS {
        let ops = 2.0 * (m * n * k) as f64;
        if ops > 6e10 {
            continue;
        }
        let x = backend.upload(&vec![0.5; m * k]);
        let mut out = backend.buffer(m * n);
        let repeats = (OPS_MIN / ops).ceil().max(1.0) as usize;
        let mut times = (0..=RUNS)
            .map(|_| {
                let start = Instant::now();
                for _ in 0..repeats {
                    backend.linear(&x, m, &weight, None, &mut out);
                }
                start.elapsed().as_secs_f64() / repeats as f64
            })
            .skip(1)
            .collect::<Vec<_>>();
        times.sort_by(f64::total_cmp);
        let time = times[RUNS / 2];
        println!(
            "{:9} {:5} {n:6} {k:6} {m:5} {:10.1} {:8.1} {:8.1}",
            format.name(),
            match activations {
                Activations::F32 => "f32",
                Activations::Int8 => "int8",
            },
            time * 1e6,
            (n * row_bytes) as f64 / time / 1e9,
            ops / time / 1e9,
        );
    }
}
