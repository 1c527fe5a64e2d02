//! What this machine does at most, measured on the threads and instruction set of a backend.

use std::time::Instant;

use dsd_kernels::{backend::Backend, cpu::CpuBackend};
use serde_json::{Value, json};

use crate::ops::{Arithmetic, Op};

/// Bytes of the working sets whose reading is timed: from the nearest caches to memory.
const SETS: [usize; 5] = [512 << 10, 4 << 20, 32 << 20, 128 << 20, 512 << 20];
/// Bytes of a timed read.
const READ_BYTES: usize = 1 << 30;
/// Measurements of which the best counts: a ceiling is what can be reached.
const RUNS: usize = 7;
/// Seconds of a steady read.
const STEADY_S: f64 = 1.0;
/// Pieces of work per thread in a measurement of arithmetic.
const PIECES: usize = 16;

pub(crate) struct Ceilings {
    /// Operations per second.
    f32: f64,
    /// Of pairs.
    bf16: f64,
    /// Of vector instructions.
    int8: f64,
    /// Of the matrix unit, where the instruction set has one.
    matrix_unit: Option<f64>,
    /// Working set in bytes, bytes per second.
    read: Vec<(usize, f64)>,
}

impl Ceilings {
    /// Measures; as a test, once and with little work.
    pub(crate) fn measure(backend: &CpuBackend, is_test: bool) -> Self {
        let runs = if is_test { 1 } else { RUNS };
        let n_pieces = if is_test {
            1
        } else {
            PIECES * backend.config().n_threads
        };
        let sets = if is_test { &SETS[..1] } else { &SETS };
        let read = sets.iter().map(|set| {
            let buffer = backend.buffer(set / size_of::<f32>());
            let n_times = if is_test {
                1
            } else {
                (READ_BYTES / set).max(2)
            };
            // The first one also fetches what it reads.
            backend.peak_read(&buffer, 1);
            (*set, best(runs, || backend.peak_read(&buffer, n_times)))
        });
        Self {
            read: read.collect(),
            f32: best(runs, || backend.peak_f32(n_pieces)),
            bf16: best(runs, || backend.peak_bf16(n_pieces)),
            int8: best(runs, || backend.peak_int8(n_pieces)),
            matrix_unit: backend
                .peak_matrix_unit(1)
                .map(|_| best(runs, || backend.peak_matrix_unit(n_pieces).unwrap_or(0))),
        }
    }

    /// The least seconds for the operation, and what sets them: arithmetic or reading.
    pub(crate) fn bound(&self, op: &Op<'_>) -> (f64, &'static str) {
        let (rate, name) = match op.arithmetic {
            Arithmetic::F32 => (self.f32, "f32"),
            Arithmetic::Bf16 => (self.bf16, "bf16"),
            Arithmetic::Int8 => (self.int8.max(self.matrix_unit.unwrap_or(0.0)), "int8"),
        };
        let (compute, read) = (op.n_ops / rate, op.n_bytes / self.read_rate(op.n_bytes));
        if compute < read {
            (read, "read")
        } else {
            (compute, name)
        }
    }

    /// Bytes per second from a working set of this size: between the measured ones by the logarithm
    /// of the size.
    fn read_rate(&self, n_bytes: f64) -> f64 {
        let log = |set: usize| (set as f64).ln();
        let Some(above) = self.read.iter().position(|(set, _)| n_bytes <= *set as f64) else {
            return self.read[self.read.len() - 1].1;
        };
        if above == 0 {
            return self.read[0].1;
        }
        let ((lower, from), (upper, to)) = (self.read[above - 1], self.read[above]);
        let share = (n_bytes.ln() - log(lower)) / (log(upper) - log(lower));
        from + (to - from) * share
    }

    pub(crate) fn print(&self) {
        println!("ceilings, best of {RUNS}");
        println!("  f32 multiply-add  {:8.0} Gop/s", self.f32 / 1e9);
        println!("  bf16 pairs        {:8.0} Gop/s", self.bf16 / 1e9);
        println!("  int8 dot product  {:8.0} Gop/s", self.int8 / 1e9);
        if let Some(rate) = self.matrix_unit {
            println!("  int8 matrix unit  {:8.0} Gop/s", rate / 1e9);
        }
        for (set, rate) in &self.read {
            println!("  reading {:6} KiB {:8.1} GB/s", set >> 10, rate / 1e9);
        }
    }

    pub(crate) fn json(&self) -> Value {
        let read = self.read.iter();
        let read = read.map(|(set, rate)| json!({"bytes": set, "gb_s": rate / 1e9}));
        json!({
            "f32_gop_s": self.f32 / 1e9,
            "bf16_gop_s": self.bf16 / 1e9,
            "int8_gop_s": self.int8 / 1e9,
            "int8_matrix_unit_gop_s": self.matrix_unit.map(|rate| rate / 1e9),
            "read": read.collect::<Vec<_>>(),
        })
    }
}

/// What reading the sets that do not fit the caches gives over [`STEADY_S`], good and bad moments alike.
pub(crate) fn steady(backend: &CpuBackend) -> Value {
    let read = SETS[SETS.len() - 2..].iter().map(|set| {
        let buffer = backend.buffer(set / size_of::<f32>());
        backend.peak_read(&buffer, 1);
        let (start, mut n_bytes) = (Instant::now(), 0);
        while start.elapsed().as_secs_f64() < STEADY_S {
            n_bytes += backend.peak_read(&buffer, 1);
        }
        let rate = n_bytes as f64 / start.elapsed().as_secs_f64();
        json!({"bytes": set, "gb_s": rate / 1e9})
    });
    let read = read.collect::<Vec<_>>();
    json!({"threads": backend.config().n_threads, "read": read})
}

/// The best rate of several runs of work that says how much it was.
fn best(runs: usize, mut work: impl FnMut() -> u64) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            let amount = work();
            amount as f64 / start.elapsed().as_secs_f64()
        })
        .fold(0.0, f64::max)
}
