//! The backend that runs on processor cores.
//!
//! The instruction set is chosen once, when the backend is made. Weights stay where they are: a
//! matrix in a mapped file is read in place.

mod attention;
mod linear;
mod pool;
mod simd;

use std::{
    io,
    marker::PhantomData,
    sync::{Mutex, MutexGuard, PoisonError},
};

use self::{
    linear::Job,
    pool::Pool,
    simd::{LANES, Portable, Simd},
};
use crate::{
    backend::{
        Activations, AttentionShape, Backend, CacheShape, Expert, ExpertShape, GateShape, HeadView,
        RopeLayout, RowView, StepInputs, ValueHeads,
    },
    matrix::Matrix,
    quant::{self, int8::Int8Rows},
    reference::{self, GateScratch},
};

/// An instruction set the kernels are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Whatever the compiler's baseline is.
    Portable,
}

impl Isa {
    /// The sets this processor has, best first; never empty.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(simd::Avx512::probe().map(|_| Self::Avx512));
            found.extend(simd::Avx2::probe().map(|_| Self::Avx2));
        }
        found.push(Self::Portable);
        found
    }

    /// The name used in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// How a [`CpuBackend`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuConfig {
    /// Threads that work at once, at least one.
    pub n_threads: usize,
    /// Instruction set; must be one of [`Isa::available`].
    pub isa: Isa,
    /// Arithmetic of linear layers with block-quantized weights.
    pub activations: Activations,
}

/// Why a CPU backend could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The processor lacks the instruction set.
    #[error("this processor does not have {}", .0.name())]
    IsaMissing(Isa),
    /// The system refused a thread.
    #[error("cannot start a compute thread")]
    Thread(#[source] io::Error),
}

/// A pointer into an output buffer that several threads write disjoint parts of.
#[derive(Debug, Clone, Copy)]
struct SharedOut<'a> {
    first: *mut f32,
    len: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: threads write disjoint elements; every write goes through an unsafe method that says so.
unsafe impl Send for SharedOut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedOut<'_> {}

impl<'a> SharedOut<'a> {
    fn new(out: &'a mut [f32]) -> Self {
        Self {
            first: out.as_mut_ptr(),
            len: out.len(),
            owner: PhantomData,
        }
    }

    /// # Safety
    /// `at` is inside, and no other thread touches that element.
    unsafe fn write(self, at: usize, value: f32) {
        debug_assert!(at < self.len, "output {at} of {}", self.len);
        // SAFETY: promised by the caller.
        unsafe { self.first.add(at).write(value) };
    }

    /// # Safety
    /// `at` is inside.
    unsafe fn at(self, at: usize) -> *mut f32 {
        debug_assert!(at < self.len, "output {at} of {}", self.len);
        // SAFETY: promised by the caller.
        unsafe { self.first.add(at) }
    }
}

/// Elements of `factors[0] x factors[1] x ..`, checked: sizes guard raw pointers, and a product that
/// wrapped around would guard nothing.
fn area(factors: &[usize]) -> usize {
    let product = factors
        .iter()
        .try_fold(1usize, |area, factor| area.checked_mul(*factor));
    assert!(product.is_some(), "{factors:?} elements are addressable");
    product.unwrap_or(0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads, scratch and instruction set.
pub struct CpuBackend {
    config: CpuConfig,
    pool: Pool,
    /// One per thread; a lock is never contended.
    scratch: Vec<Mutex<linear::Scratch>>,
    /// Quantized activations of the running linear layer.
    int8: Mutex<Int8Rows>,
}

/// Chosen experts, and the rows of each.
#[derive(Debug)]
pub struct CpuRoutes {
    top_k: usize,
    /// `[rows, top_k]`: (expert, weight), ascending expert.
    chosen: Vec<(usize, f32)>,
    choice: GateScratch,
    /// Rows of the expert at hand, and the weight of each.
    rows: Vec<usize>,
    weights: Vec<f32>,
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

/// Runs `$body` with `$simd` bound to the backend's instruction set.
macro_rules! dispatch {
    ($backend:expr, $simd:ident => $body:expr) => {
        match $backend.config.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => match simd::Avx512::probe() {
                Some($simd) => $body,
                None => unreachable!("probed when the backend was made"),
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => match simd::Avx2::probe() {
                Some($simd) => $body,
                None => unreachable!("probed when the backend was made"),
            },
            _ => {
                let $simd = Portable;
                $body
            }
        }
    };
}

impl CpuBackend {
    /// Probes the processor and starts the threads.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn new(config: CpuConfig) -> Result<Self, CpuError> {
        if !Isa::available().contains(&config.isa) {
            return Err(CpuError::IsaMissing(config.isa));
        }
        let pool = Pool::new(config.n_threads.max(1)).map_err(CpuError::Thread)?;
        let scratch = (0..pool.n_threads()).map(|_| Mutex::default()).collect();
        Ok(Self {
            config,
            pool,
            scratch,
            int8: Mutex::default(),
        })
    }

    /// How this backend computes.
    pub fn config(&self) -> CpuConfig {
        self.config
    }

    fn run_linear(&self, job: &Job<'_>, out: &mut [f32]) {
        let k = job.weight.n_cols();
        let with_int8 = self.config.activations == Activations::Int8
            && linear::int8_applies(job.weight.format());
        if with_int8 {
            let mut rows = lock(&self.int8);
            rows.quantize(&job.x[job.x_offset..][..job.n_tokens * k], k);
            dispatch!(self, s => linear::linear(s, &self.pool, &self.scratch, Some(&rows), job, out));
        } else {
            dispatch!(self, s => linear::linear(s, &self.pool, &self.scratch, None, job, out));
        }
    }

    /// `body(row)` for rows dealt to the threads in runs.
    fn for_rows(&self, n_rows: usize, row_len: usize, body: &(dyn Fn(usize) + Sync)) {
        // About 16 Ki elements a piece: shorter ones cost more to hand over than to compute.
        let rows_per_piece = (16_384 / row_len.max(1)).max(1);
        self.pool.run(n_rows.div_ceil(rows_per_piece), &|piece, _| {
            let first = piece * rows_per_piece;
            (first..(first + rows_per_piece).min(n_rows)).for_each(body);
        });
    }
}

impl Backend for CpuBackend {
    type Buffer = Vec<f32>;
    type Weight = Matrix;
    type Routes = CpuRoutes;

    fn buffer(&self, len: usize) -> Vec<f32> {
        let mut values = vec![0.0f32; len];
        // The system hands out zeroed pages on first touch; touching them now is what keeps a full
        // machine from failing later.
        for value in values.iter_mut().step_by(1024) {
            // SAFETY: a plain write through a valid reference, volatile so that it is not dropped.
            unsafe { std::ptr::write_volatile(value, 0.0) };
        }
        values
    }

    fn upload(&self, values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }

    fn download<'a>(&self, buffer: &'a mut Vec<f32>, len: usize) -> &'a mut [f32] {
        &mut buffer[..len]
    }

    fn weight(&self, matrix: Matrix) -> Matrix {
        matrix
    }

    fn routes(&self, shape: ExpertShape) -> CpuRoutes {
        let rows = shape.n_rows_max;
        CpuRoutes {
            top_k: shape.top_k,
            chosen: Vec::with_capacity(rows * shape.top_k),
            choice: GateScratch::new(shape.n_experts),
            rows: Vec::with_capacity(rows),
            weights: Vec::with_capacity(rows),
            x: self.buffer(rows * shape.hidden),
            gate: self.buffer(rows * shape.inter),
            up: self.buffer(rows * shape.inter),
            down: self.buffer(rows * shape.hidden),
        }
    }

    fn embed(&self, table: &Matrix, tokens: &[u32], out: &mut Vec<f32>) {
        for (row, token) in out.chunks_exact_mut(table.n_cols()).zip(tokens) {
            quant::decode_row(table, *token as usize, row);
        }
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &Matrix,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        let (n, k) = (weight.n_rows(), weight.n_cols());
        let x = &x[..area(&[n_rows, k])];
        let bias = bias.map(|bias| &bias[..n]);
        let out = &mut out[..area(&[n_rows, n])];
        self.run_linear(&Job::dense(weight, x, n_rows, bias), out);
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        rows: RowView,
        n_rows: usize,
        gain: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        let out = &mut out[..area(&[n_rows, rows.width])];
        let gain = &gain[..rows.width];
        let out = SharedOut::new(out);
        self.for_rows(n_rows, rows.width, &|m| {
            let row = &x[rows.offset + m * rows.stride..][..rows.width];
            // SAFETY: rows are disjoint and inside the slice taken above.
            let to = unsafe { std::slice::from_raw_parts_mut(out.at(m * rows.width), rows.width) };
            to.copy_from_slice(row);
            dispatch!(self, s => rms_norm_row(s, to, gain, eps));
        });
    }

    fn rms_norm_heads(
        &self,
        x: &mut Vec<f32>,
        n_rows: usize,
        heads: HeadView,
        gain: &Vec<f32>,
        eps: f32,
    ) {
        let gain = &gain[..heads.len];
        for_each_head(x, n_rows, heads, |_, head| {
            dispatch!(self, s => rms_norm_row(s, head, gain, eps));
        });
    }

    fn clear(&self, x: &mut Vec<f32>, len: usize) {
        x[..len].fill(0.0);
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>, n_rows: usize, width: usize) {
        let n = area(&[n_rows, width]);
        let (x, y) = (&mut x[..n], &y[..n]);
        dispatch!(self, s => s.vectorize(#[inline(always)] || x.iter_mut().zip(y).for_each(|(a, b)| *a += b)));
    }

    fn swiglu(&self, gate: &mut Vec<f32>, up: &Vec<f32>, n_rows: usize, width: usize) {
        let n = area(&[n_rows, width]);
        let gate = SharedOut::new(&mut gate[..n]);
        let up = &up[..n];
        self.for_rows(n_rows, width, &|m| {
            // SAFETY: rows are disjoint and inside the slice taken above.
            let row = unsafe { std::slice::from_raw_parts_mut(gate.at(m * width), width) };
            dispatch!(self, s => swiglu_row(s, row, &up[m * width..][..width]));
        });
    }

    fn copy_rows(
        &self,
        from: &Vec<f32>,
        from_rows: RowView,
        to: &mut Vec<f32>,
        to_rows: RowView,
        n_rows: usize,
    ) {
        for m in 0..n_rows {
            let row = &from[from_rows.offset + m * from_rows.stride..][..from_rows.width];
            to[to_rows.offset + m * to_rows.stride..][..to_rows.width].copy_from_slice(row);
        }
    }

    fn gather_rows(&self, from: &Vec<f32>, rows: &[usize], width: usize, to: &mut Vec<f32>) {
        for (out, row) in to.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&from[row * width..][..width]);
        }
    }

    fn rope_angles(
        &self,
        inverse_frequencies: &[f64],
        factor: f64,
        inputs: &StepInputs<'_>,
        angles: &mut Vec<f32>,
    ) {
        reference::rope_angles(inverse_frequencies, factor, inputs.positions, angles);
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        n_rows: usize,
        heads: HeadView,
        layout: RopeLayout,
        angles: &Vec<f32>,
    ) {
        let half = heads.len / 2;
        for_each_head(x, n_rows, heads, |m, head| {
            let (cos, sin) = angles[m * heads.len..][..heads.len].split_at(half);
            dispatch!(self, s => s.vectorize(#[inline(always)] || rotate(head, layout, cos, sin)));
        });
    }

    fn store_heads(
        &self,
        keys: &Vec<f32>,
        values: &Vec<f32>,
        cache: &mut Vec<f32>,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        reference::store_heads(keys, values, cache, shape, inputs);
    }

    fn store_latent(
        &self,
        rows: &Vec<f32>,
        view: RowView,
        cache: &mut Vec<f32>,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        reference::store_latent(rows, view, cache, shape, inputs);
    }

    fn attention(
        &self,
        queries: &Vec<f32>,
        cache: &Vec<f32>,
        cache_shape: CacheShape,
        attention: AttentionShape,
        inputs: &StepInputs<'_>,
        out: &mut Vec<f32>,
    ) {
        dispatch!(self, s => attention::attention(
            s, &self.pool, queries, cache, cache_shape, attention, inputs, out,
        ));
    }

    fn absorb_keys(
        &self,
        queries: &Vec<f32>,
        heads: HeadView,
        weight: &Matrix,
        rows_per_head: usize,
        out: &mut Vec<f32>,
        out_stride: usize,
        n_rows: usize,
    ) {
        assert!(
            out_stride >= weight.n_cols(),
            "a head's result fits its place"
        );
        let out = SharedOut::new(&mut out[..area(&[n_rows, heads.n_heads, out_stride])]);
        self.pool.run(heads.n_heads, &|h, thread| {
            let query =
                |m: usize, d: usize| queries[heads.offset + m * heads.row_stride + h * heads.head_stride + d];
            // SAFETY: heads are disjoint and inside the slice taken above.
            let to = |m: usize| unsafe { out.at((m * heads.n_heads + h) * out_stride) };
            let mut scratch = lock(&self.scratch[thread]);
            let first_row = h * rows_per_head;
            // SAFETY: each head's outputs are its own, `n_cols` wide.
            dispatch!(self, s => unsafe {
                linear::absorb_head(s, &mut scratch, weight, first_row, query, heads.len, n_rows, to);
            });
        });
    }

    fn expand_values(
        &self,
        x: &Vec<f32>,
        weight: &Matrix,
        heads: ValueHeads,
        out: &mut Vec<f32>,
        n_rows: usize,
    ) {
        let rank = weight.n_cols();
        let x = &x[..area(&[n_rows, heads.n_heads, rank])];
        let out = SharedOut::new(&mut out[..area(&[n_rows, heads.n_heads, heads.head_dim])]);
        self.pool.run(heads.n_heads, &|h, thread| {
            let job = Job {
                weight,
                first_row: h * heads.rows_per_head + heads.first_row,
                n_rows: heads.head_dim,
                x,
                x_offset: h * rank,
                x_stride: heads.n_heads * rank,
                n_tokens: n_rows,
                bias: None,
                out_offset: h * heads.head_dim,
                out_stride: heads.n_heads * heads.head_dim,
            };
            let mut scratch = lock(&self.scratch[thread]);
            for piece in 0..job.n_pieces() {
                // SAFETY: heads write disjoint outputs inside the slice taken above.
                dispatch!(self, s => unsafe {
                    linear::linear_piece(s, &mut scratch, None, &job, piece, out);
                });
            }
        });
    }

    fn gate(
        &self,
        logits: &Vec<f32>,
        n_rows: usize,
        shape: GateShape,
        bias: Option<&Vec<f32>>,
        routes: &mut CpuRoutes,
    ) {
        let CpuRoutes { chosen, choice, .. } = routes;
        chosen.clear();
        chosen.resize(n_rows * shape.top_k, (0, 0.0));
        let rows = logits[..area(&[n_rows, shape.n_experts])].chunks_exact(shape.n_experts);
        for (row, chosen) in rows.zip(chosen.chunks_exact_mut(shape.top_k)) {
            reference::choose_experts(row, bias.map(Vec::as_slice), shape, choice, chosen);
        }
    }

    fn experts(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        experts: &[Expert<Matrix>],
        routes: &mut CpuRoutes,
        out: &mut Vec<f32>,
    ) {
        for (index, expert) in experts.iter().enumerate() {
            let (hidden, inter) = (expert.down.n_rows(), expert.gate.n_rows());
            let CpuRoutes {
                top_k,
                chosen,
                rows,
                weights,
                x: gathered,
                gate,
                up,
                down,
                ..
            } = routes;
            rows.clear();
            weights.clear();
            for (m, of_row) in chosen.chunks_exact(*top_k).take(n_rows).enumerate() {
                if let Some((_, weight)) = of_row.iter().find(|(e, _)| *e == index) {
                    rows.push(m);
                    weights.push(*weight);
                }
            }
            if rows.is_empty() {
                continue;
            }
            self.gather_rows(x, rows, hidden, gathered);
            self.linear(gathered, rows.len(), &expert.gate, None, gate);
            self.linear(gathered, rows.len(), &expert.up, None, up);
            self.swiglu(gate, up, rows.len(), inter);
            self.linear(gate, rows.len(), &expert.down, None, down);
            for ((m, weight), y) in rows.iter().zip(&*weights).zip(down.chunks_exact(hidden)) {
                let to = &mut out[m * hidden..][..hidden];
                dispatch!(self, s => s.vectorize(#[inline(always)] || {
                    to.iter_mut().zip(y).for_each(|(o, v)| *o += weight * v);
                }));
            }
        }
    }
}

fn for_each_head(
    x: &mut [f32],
    n_rows: usize,
    heads: HeadView,
    mut body: impl FnMut(usize, &mut [f32]),
) {
    for m in 0..n_rows {
        for h in 0..heads.n_heads {
            let start = heads.offset + m * heads.row_stride + h * heads.head_stride;
            body(m, &mut x[start..][..heads.len]);
        }
    }
}

/// Normalises `row` in place.
fn rms_norm_row<S: Simd>(simd: S, row: &mut [f32], gain: &[f32], eps: f32) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (vectors, tail) = row.as_chunks::<LANES>();
            let mut squares = simd.splat(0.0);
            for v in vectors {
                // SAFETY: a chunk holds 16 elements.
                let v = unsafe { simd.load(v.as_ptr()) };
                squares = simd.fma(v, v, squares);
            }
            let sum = simd.sum(squares) + tail.iter().map(|v| v * v).sum::<f32>();
            #[expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
            let scale = 1.0 / (sum / row.len() as f32 + eps).sqrt();
            for (value, g) in row.iter_mut().zip(gain) {
                *value = *value * scale * g;
            }
        },
    );
}

fn swiglu_row<S: Simd>(simd: S, gate: &mut [f32], up: &[f32]) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (vectors, tail) = gate.as_chunks_mut::<LANES>();
            let (up_vectors, up_tail) = up.as_chunks::<LANES>();
            for (g, u) in vectors.iter_mut().zip(up_vectors) {
                // SAFETY: chunks hold 16 elements.
                unsafe {
                    let value = simd.mul(simd.silu(simd.load(g.as_ptr())), simd.load(u.as_ptr()));
                    simd.store(g.as_mut_ptr(), value);
                }
            }
            for (g, u) in tail.iter_mut().zip(up_tail) {
                *g = reference::silu(*g) * u;
            }
        },
    );
}

fn rotate(head: &mut [f32], layout: RopeLayout, cos: &[f32], sin: &[f32]) {
    match layout {
        RopeLayout::Halves => {
            let (low, high) = head.split_at_mut(cos.len());
            for (i, (a, b)) in low.iter_mut().zip(high).enumerate() {
                (*a, *b) = (*a * cos[i] - *b * sin[i], *b * cos[i] + *a * sin[i]);
            }
        }
        RopeLayout::Pairs => {
            for (i, [a, b]) in head.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                (*a, *b) = (*a * cos[i] - *b * sin[i], *b * cos[i] + *a * sin[i]);
            }
        }
    }
}
