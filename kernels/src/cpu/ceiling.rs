//! Work that is nothing but what the processor is fastest at, for benchmarks to compare kernels with.
//!
//! Knows no clock: a benchmark times the calls. Runs on the backend's threads and instruction set,
//! so that a ceiling is one for the kernels that are measured beside it.

use std::hint::black_box;

use super::{
    CpuBackend, Isa, simd,
    simd::{
        Simd,
        amx::{N_SLOTS, TILE_COLS, TILE_LEN},
    },
};
use crate::cpu::Portable;

/// Turns of the innermost loops in one piece of work, about a millisecond.
const TURNS: usize = 1 << 18;
/// Vectors of codes that the integer loop goes around in: they stay in the first-level cache.
const N_CODES: usize = 16;

impl CpuBackend {
    /// f32 multiply-adds in registers, `n_pieces` pieces of them dealt to the threads.
    /// Returns the operations done, two for a multiply-add.
    pub fn peak_f32(&self, n_pieces: usize) -> u64 {
        let per_turn = match self.config.isa {
            Isa::Avx512 | Isa::Amx => 12,
            Isa::Avx2 | Isa::Portable => 6,
        } * simd::LANES;
        self.pool.run(n_pieces, &|_, _| {
            dispatch!(self, s => match self.config.isa {
                Isa::Avx512 | Isa::Amx => s.vectorize(|| multiply_add::<_, 12>(s)),
                Isa::Avx2 | Isa::Portable => s.vectorize(|| multiply_add::<_, 6>(s)),
            });
        });
        (n_pieces * TURNS * per_turn * 2) as u64
    }

    /// The same of the int8 dot product that kernels use, operands in registers or the nearest cache.
    pub fn peak_int8(&self, n_pieces: usize) -> u64 {
        let per_turn = match self.config.isa {
            Isa::Avx512 | Isa::Amx => 12,
            Isa::Avx2 | Isa::Portable => 4,
        } * simd::LANES
            * 4;
        self.pool.run(n_pieces, &|_, _| {
            dispatch!(self, s => match self.config.isa {
                Isa::Avx512 | Isa::Amx => s.vectorize(|| dot_products::<_, 12>(s)),
                Isa::Avx2 | Isa::Portable => s.vectorize(|| dot_products::<_, 4>(s)),
            });
        });
        (n_pieces * TURNS * per_turn * 2) as u64
    }

    /// The same of products of bf16 pairs, as attention over a bf16 cache computes them.
    pub fn peak_bf16(&self, n_pieces: usize) -> u64 {
        let per_turn = match self.config.isa {
            Isa::Avx512 | Isa::Amx => 12,
            Isa::Avx2 | Isa::Portable => 4,
        } * simd::LANES
            * 2;
        self.pool.run(n_pieces, &|_, _| {
            dispatch!(self, s => match (self.config.isa, s.bf16_dot()) {
                (Isa::Avx512 | Isa::Amx, Some(s)) => s.vectorize(|| pairs::<_, 12>(s)),
                (Isa::Avx512 | Isa::Amx, None) => s.vectorize(|| pairs::<_, 12>(s)),
                (Isa::Avx2 | Isa::Portable, _) => s.vectorize(|| pairs::<_, 4>(s)),
            });
        });
        (n_pieces * TURNS * per_turn * 2) as u64
    }

    /// The same of the matrix unit; `None` without one.
    pub fn peak_matrix_unit(&self, n_pieces: usize) -> Option<u64> {
        if self.config.isa != Isa::Amx {
            return None;
        }
        self.pool.run(n_pieces, &|_, _| {
            dispatch!(self, s => if let Some(amx) = s.amx() {
                amx.configure().spin(TURNS);
            });
        });
        let per_product = TILE_LEN * TILE_LEN * TILE_COLS;
        Some((n_pieces * TURNS * N_SLOTS * per_product * 2) as u64)
    }

    /// Reads the buffer `n_times`, each thread its own share of it, and does nothing else.
    /// Returns the bytes read.
    pub fn peak_read(&self, buffer: &[f32], n_times: usize) -> u64 {
        let n_threads = self.pool.n_threads();
        // Whole turns of the loop, so that no remainder is left.
        let share = buffer.len() / n_threads / (8 * simd::LANES) * (8 * simd::LANES);
        self.pool.run(n_threads, &|index, _| {
            let share = &buffer[index * share..][..share];
            for _ in 0..n_times {
                dispatch!(self, s => s.vectorize(|| read(s, black_box(share))));
            }
        });
        (n_threads * share * size_of::<f32>() * n_times) as u64
    }
}

#[inline(always)]
fn multiply_add<S: Simd, const N: usize>(s: S) {
    // Converges to a fixed point: no denormal number and no infinity slows it.
    let (factor, term) = (s.splat(black_box(0.5)), s.splat(black_box(1.0)));
    let mut sums = std::array::from_fn::<_, N, _>(|i| s.splat(i as f32));
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = s.fma(*sum, factor, term);
        }
    }
    black_box(sums.map(|sum| s.sum(sum)));
}

#[inline(always)]
fn dot_products<S: Simd, const N: usize>(s: S) {
    let codes = black_box([[3u8; 64]; N_CODES]);
    let values = black_box([[1i8, -1, 2, -2]; N]);
    let mut sums = [s.splat_i(0); N];
    for turn in 0..TURNS {
        // SAFETY: 64 bytes are readable.
        let codes = unsafe { s.load_bytes(codes[turn % N_CODES].as_ptr()) };
        for (sum, values) in sums.iter_mut().zip(&values) {
            // SAFETY: 4 bytes are readable.
            *sum = unsafe { s.dot4(*sum, codes, values.as_ptr()) };
        }
    }
    black_box(sums.map(|sum| s.sum(s.to_f(sum))));
}

#[inline(always)]
fn pairs<S: Simd, const N: usize>(s: S) {
    // A quarter a turn: sums stay numbers like any other.
    let (factor, pair) = (black_box(0x3f00), black_box(0xbf00_3f00));
    let (factor, pair) = (s.splat_b(factor), s.splat_b(pair));
    let mut sums = [s.splat(1.0); N];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = s.dot2(*sum, factor, pair);
        }
    }
    black_box(sums.map(|sum| s.sum(sum)));
}

#[inline(always)]
fn read<S: Simd>(s: S, share: &[f32]) {
    let (turns, []) = share.as_chunks::<{ 8 * simd::LANES }>() else {
        unreachable!("shares are whole turns")
    };
    let zero = s.splat_i(0);
    // SAFETY: as many zeros as a vector has bytes.
    let mut seen = [unsafe { s.load_bytes([0; 64].as_ptr()) }; 8];
    for turn in turns {
        for (i, seen) in seen.iter_mut().enumerate() {
            // SAFETY: 16 elements are 64 bytes.
            let loaded = unsafe { s.load_bytes(turn[i * simd::LANES..].as_ptr().cast()) };
            *seen = s.or(*seen, loaded);
        }
    }
    black_box(seen.map(|seen| {
        // SAFETY: 4 bytes are readable.
        s.sum(s.to_f(unsafe { s.dot4(zero, seen, [1; 4].as_ptr()) }))
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{Activations, Backend, KvType},
        cpu::CpuConfig,
    };

    #[test]
    fn ceilings_count_what_they_do_on_every_instruction_set() {
        for isa in Isa::available() {
            let config = CpuConfig {
                n_threads: 2,
                isa,
                activations: Activations::F32,
                kv_type: KvType::F32,
            };
            let backend = CpuBackend::new(config).unwrap();
            assert!((TURNS * 2) as u64 <= backend.peak_f32(1), "{isa:?}");
            assert_eq!(backend.peak_int8(2), 2 * backend.peak_int8(1), "{isa:?}");
            assert_eq!(backend.peak_bf16(2), 2 * backend.peak_bf16(1), "{isa:?}");
            assert_eq!(backend.peak_matrix_unit(1).is_some(), isa == Isa::Amx);
            // Two shares of 256 elements of four bytes; what does not fill a turn is left out.
            assert_eq!(backend.peak_read(&backend.buffer(600), 3), 3 * 2 * 256 * 4);
        }
    }
}
