//! The backend that runs on processor cores.
//!
//! The instruction set is chosen once, when the backend is made. Plain and FP8 weights are read
//! where they are mapped; block-quantized ones are laid out in panels, in memory of the backend's.

mod attention;
mod elementwise;
mod kv_cache;
mod linear;
mod memory;
mod pool;
mod routes;
mod shared;
mod simd;

pub use self::{kv_cache::CpuCache, routes::CpuRoutes};

use std::{
    borrow::Borrow,
    io,
    sync::{Arc, Mutex, OnceLock},
};

use self::{
    elementwise::{for_each_head, rms_norm_row, rotate, swiglu_row},
    linear::{Inputs, Int8Tiles, Job, Later, Scratch, Slots, Trail, Trails, Way},
    memory::Arena,
    pool::Pool,
    shared::{SharedBytes, SharedOut, area, lock},
    simd::{Portable, Simd},
};
use crate::{
    backend::{
        Activations, AttentionShape, Backend, CacheShape, Expert, ExpertShape, GateShape, HeadRows,
        HeadView, KvType, RopeLayout, RowView, StepInputs, StepShape, WeightStore, Workers,
    },
    matrix::{Layout, Matrix},
    panel::{self, PANEL_ROWS},
    quant,
    reference::{self, GateScratch},
};

/// Decoding an element on its own, in elements of a vector.
const DECODE_WORK: usize = 16;
/// Rows whose experts are chosen in a piece, about 1 us each.
const GATE_PIECE: usize = 8;

/// An instruction set the kernels are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// [`Isa::Avx512`] and AMX-INT8.
    Amx,
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
            found.extend(simd::Avx512::probe_for(true).map(|_| Self::Amx));
            found.extend(simd::Avx512::probe_for(false).map(|_| Self::Avx512));
            found.extend(simd::Avx2::probe().map(|_| Self::Avx2));
        }
        found.push(Self::Portable);
        found
    }

    /// The one of this name, if this processor has it.
    pub fn named(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }

    /// The name used in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
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
    /// How keys and values are stored.
    pub kv_type: KvType,
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

/// Rows of a share from which the inside of an MLP is rounded where it is computed.
const ROUNDED_ROWS_MIN: usize = 16;

/// Threads, scratch and instruction set.
pub struct CpuBackend {
    config: CpuConfig,
    pool: Arc<Pool>,
    /// One per thread; a lock is never contended.
    scratch: Vec<Mutex<Scratch>>,
    /// Weights in panels.
    arena: Mutex<Arena>,
    /// Rounded activations: what the running layer or the experts take, and what is inside.
    int8: Mutex<[Int8Tiles; 2]>,
    /// Which linear layer ran last.
    trails: Trails,
}

/// Matrices of equal width whose outputs lie side by side.
#[derive(Debug)]
pub struct CpuWeight {
    parts: Vec<Matrix>,
    /// Made when it runs as a layer: the experts of a layer, which may be thousands, have one.
    trail: OnceLock<Arc<Trail>>,
}

impl CpuWeight {
    fn n_cols(&self) -> usize {
        self.parts[0].n_cols()
    }

    fn n_rows(&self) -> usize {
        self.parts.iter().map(Matrix::n_rows).sum()
    }

    /// The matrix of a weight that is one.
    fn single(&self) -> &Matrix {
        assert_eq!(self.parts.len(), 1, "a weight of one matrix");
        &self.parts[0]
    }
}

/// Runs `$body` with `$simd` bound to the backend's instruction set.
macro_rules! dispatch {
    ($backend:expr, $simd:ident => $body:expr) => {
        match $backend.config.isa {
            #[cfg(target_arch = "x86_64")]
            isa @ (Isa::Amx | Isa::Avx512) => match simd::Avx512::probe_for(isa == Isa::Amx) {
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

// After the macro, which it uses.
mod ceiling;

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
        let pool = Arc::new(pool);
        let scratch = (0..pool.n_threads()).map(|_| Mutex::default()).collect();
        Ok(Self {
            config,
            pool,
            scratch,
            arena: Mutex::default(),
            int8: Mutex::default(),
            trails: Trails::default(),
        })
    }

    /// How this backend computes.
    pub fn config(&self) -> CpuConfig {
        self.config
    }

    /// Rows and columns that are rounded to int8 at once, in either memory: of a linear layer, in heads
    /// or not, or what experts take; inside a layer, or inside experts.
    fn int8_rows(&self, shape: &StepShape) -> [[(usize, usize); 2]; 2] {
        if self.config.activations == Activations::F32 {
            return [[(0, 0); 2]; 2];
        }
        let (n_rows, width) = (shape.n_rows_max, shape.width_max);
        let slots = shape.experts.map_or(0, |e| e.n_rows_max * e.top_k);
        let (hidden, inter) = shape.experts.map_or((0, 0), |e| (e.hidden, e.inter));
        [
            [(n_rows, width.max(shape.heads_width_max)), (slots, hidden)],
            [(n_rows, width), (slots, inter)],
        ]
    }

    /// The matrix in panels, in memory of the backend's; `None` for formats without panels.
    fn in_panels(&self, matrix: &Matrix) -> Option<Matrix> {
        let (format, n_rows, n_cols) = (matrix.format(), matrix.n_rows(), matrix.n_cols());
        let len = panel::bytes(format, n_rows, n_cols)?;
        let n_panels = n_rows.div_ceil(PANEL_ROWS);
        if matrix.layout() == Layout::Panels || n_panels == 0 {
            return None;
        }
        let panel_len = len / n_panels;
        let data = lock(&self.arena).write(len, |out| {
            let first = SharedBytes(out.as_mut_ptr());
            self.pool.run(n_panels, &|index, _| {
                // SAFETY: panels are disjoint pieces of `out`.
                let out = unsafe { first.slice(index * panel_len, panel_len) };
                panel::pack(matrix, index, out);
            });
        });
        Matrix::from_panels(format, n_rows, n_cols, data).ok()
    }

    /// Whether activations enter these weights rounded.
    fn rounds(&self, parts: &[Matrix]) -> bool {
        self.config.activations == Activations::Int8
            && parts.iter().any(|p| p.layout() == Layout::Panels)
    }

    /// Rows of `x` for a layer of these matrices, dealt to the threads as suits it.
    fn inputs<'a>(&self, x: &'a [f32], n_rows: usize, parts: &[impl Borrow<Matrix>]) -> Inputs<'a> {
        let n_bytes = parts.iter().map(|part| part.borrow().data().len()).sum();
        let share = dispatch!(self, s => linear::rows_per_piece(s, &self.pool, n_rows, n_bytes));
        Inputs::dense(x, n_rows, parts[0].borrow().n_cols()).in_shares(share)
    }

    /// The trail of a layer.
    fn trail_of<'a>(&self, weight: &'a CpuWeight) -> &'a Arc<Trail> {
        let n_threads = self.pool.n_threads();
        weight.trail.get_or_init(|| Trail::new(n_threads))
    }

    /// What is likely to run after this layer, which runs now.
    fn next_after(&self, weight: &CpuWeight) -> Option<Arc<Trail>> {
        let in_panels = |part: &Matrix| part.layout() == Layout::Panels;
        match weight.parts.iter().all(in_panels) {
            true => self.trails.enter(self.trail_of(weight)),
            false => None,
        }
    }

    /// A layer of rows that are rounded already, where they are to be.
    fn stacked(
        &self,
        inputs: &Inputs<'_>,
        weight: &CpuWeight,
        bias: Option<&Vec<f32>>,
        out: &mut [f32],
    ) {
        let bias = bias.map(|bias| &bias[..weight.n_rows()]);
        let next = self.next_after(weight);
        let way = Way {
            trail: self.trail_of(weight),
            next: next.as_deref(),
        };
        dispatch!(self, s => linear::stacked(
            s, &self.pool, &self.scratch, &weight.parts, way, inputs, bias, out,
        ));
    }

    /// `gate[m] = silu(gate[m]) * up[m]`, dense, `width` wide.
    fn swiglu(&self, gate: &mut [f32], up: &[f32], n_rows: usize, width: usize) {
        let n = area(&[n_rows, width]);
        let gate = SharedOut::new(&mut gate[..n]);
        let up = &up[..n];
        self.for_rows(n_rows, width, &|m| {
            // SAFETY: rows are disjoint and inside the slice taken above.
            let row = unsafe { std::slice::from_raw_parts_mut(gate.at(m * width), width) };
            dispatch!(self, s => swiglu_row(s, row, &up[m * width..][..width]));
        });
    }

    /// `body(row)` for rows dealt to the threads in runs.
    fn for_rows(&self, n_rows: usize, row_len: usize, body: &(dyn Fn(usize) + Sync)) {
        // About 16 Ki elements a piece: shorter ones cost more to hand over than to compute.
        let rows_per_piece = (16_384 / row_len.max(1)).max(1);
        // Nor are rows taken from the thread that has them in the linear layers.
        let share = dispatch!(self, s => linear::rows_per_piece(s, &self.pool, n_rows, 0));
        let rows_per_piece = rows_per_piece.min(share);
        self.pool.run(n_rows.div_ceil(rows_per_piece), &|piece, _| {
            let first = piece * rows_per_piece;
            (first..(first + rows_per_piece).min(n_rows)).for_each(body);
        });
    }
}

/// Where the last of `n_rows` rows of heads ends; a view of no heads or rows ends where it begins.
fn extent(heads: HeadView, n_rows: usize) -> usize {
    let (Some(last_head), Some(last_row)) = (heads.n_heads.checked_sub(1), n_rows.checked_sub(1))
    else {
        return heads.offset;
    };
    area(&[last_head, heads.head_stride])
        .saturating_add(area(&[last_row, heads.row_stride]))
        .saturating_add(heads.offset)
        .saturating_add(heads.len)
}

/// Panics unless rows of heads lie apart and inside a buffer of `len` elements.
fn assert_rows_apart(heads: HeadView, n_rows: usize, len: usize) {
    let row_len = extent(heads, 1) - heads.offset;
    assert!(
        (n_rows <= 1 || row_len <= heads.row_stride) && extent(heads, n_rows) <= len,
        "heads of {n_rows} rows lie apart and inside the buffer"
    );
}

impl WeightStore for CpuBackend {
    type Buffer = Vec<f32>;
    type Weight = CpuWeight;

    fn upload(&self, values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }

    fn weight(&self, parts: Vec<Matrix>) -> CpuWeight {
        assert!(!parts.is_empty(), "a weight has a matrix");
        assert!(
            parts.iter().all(|p| p.n_cols() == parts[0].n_cols()),
            "parts of a weight take the same inputs"
        );
        let parts = parts
            .into_iter()
            .map(|part| self.in_panels(&part).unwrap_or(part))
            .collect();
        CpuWeight {
            parts,
            trail: OnceLock::new(),
        }
    }

    fn latent_weight(&self, matrix: Matrix) -> CpuWeight {
        CpuWeight {
            parts: vec![matrix],
            trail: OnceLock::new(),
        }
    }
}

impl Backend for CpuBackend {
    type Routes = CpuRoutes;
    type Cache = CpuCache;

    fn buffer(&self, len: usize) -> Vec<f32> {
        memory::resident(&self.pool, len)
    }

    fn kv_type(&self) -> KvType {
        self.config.kv_type
    }

    fn cache(&self, shape: CacheShape) -> CpuCache {
        CpuCache::new(&self.pool, shape, self.config.kv_type)
    }

    fn cache_block<'a>(&self, cache: &'a CpuCache, shape: CacheShape, block: usize) -> &'a [u8] {
        let n_bytes = shape.block_bytes(self.config.kv_type);
        &cache.bytes()[block * n_bytes..][..n_bytes]
    }

    fn cache_block_mut<'a>(
        &self,
        cache: &'a mut CpuCache,
        shape: CacheShape,
        block: usize,
    ) -> &'a mut [u8] {
        let n_bytes = shape.block_bytes(self.config.kv_type);
        &mut cache.bytes_mut()[block * n_bytes..][..n_bytes]
    }

    fn download<'a>(&self, buffer: &'a mut Vec<f32>, len: usize) -> &'a mut [f32] {
        &mut buffer[..len]
    }

    fn scratch_bytes(&self, shape: &StepShape) -> usize {
        let threads = self.pool.n_threads() * Scratch::bytes(shape.n_rows_max, shape.width_max);
        let bytes = |of: [(usize, usize); 2]| {
            let [a, b] = of.map(|(n_rows, n_cols)| Int8Tiles::bytes(n_rows, n_cols));
            a.max(b)
        };
        threads + self.int8_rows(shape).map(bytes).iter().sum::<usize>()
    }

    fn reserve(&self, shape: &StepShape) {
        let mut memory = lock(&self.int8);
        for (memory, of) in memory.iter_mut().zip(self.int8_rows(shape)) {
            for (n_rows, n_cols) in of {
                memory.reserve(n_rows, n_cols);
            }
        }
        for scratch in &self.scratch {
            lock(scratch).reserve(shape.n_rows_max, shape.width_max);
        }
    }

    fn routes(&self, shape: ExpertShape) -> CpuRoutes {
        let rows = shape.n_rows_max;
        CpuRoutes {
            top_k: shape.top_k,
            chosen: Vec::with_capacity(rows * shape.top_k),
            choice: (0..self.pool.n_threads())
                .map(|_| Mutex::new(GateScratch::new(shape.n_experts)))
                .collect(),
            runs: Vec::with_capacity(shape.n_experts),
            rows: Vec::with_capacity(rows * shape.top_k),
            weights: Vec::with_capacity(rows * shape.top_k),
            x: self.buffer(rows * shape.hidden),
            gate: self.buffer(rows * shape.top_k * shape.inter),
            up: self.buffer(rows * shape.inter),
            down: self.buffer(rows * shape.hidden),
        }
    }

    fn embed(&self, table: &CpuWeight, first: usize, tokens: &[u32], out: &mut Vec<f32>) {
        let table = table.single();
        let width = table.n_cols();
        let out = SharedOut::new(&mut out[..area(&[tokens.len(), width])]);
        // An element is a few operations of its own, not part of a vector's.
        self.for_rows(tokens.len(), DECODE_WORK * width, &|m| {
            // SAFETY: rows are disjoint and inside the slice taken above.
            let row = unsafe { std::slice::from_raw_parts_mut(out.at(m * width), width) };
            match (tokens[m] as usize).checked_sub(first) {
                Some(index) if index < table.n_rows() => quant::decode_row(table, index, row),
                _ => row.fill(0.0),
            }
        });
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &CpuWeight,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        let later = Later::new();
        let mut inputs = self.inputs(x, n_rows, &weight.parts);
        let mut memory = lock(&self.int8);
        if self.rounds(&weight.parts) {
            dispatch!(self, s => {
                inputs = inputs.round_all(s, &self.pool, &mut memory[0], &later);
            });
        }
        self.stacked(&inputs, weight, bias, out);
    }

    fn mlp(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        [gate, up, down]: [(&CpuWeight, Option<&Vec<f32>>); 3],
        [inner, ups]: [&mut Vec<f32>; 2],
        out: &mut Vec<f32>,
    ) {
        let ((gate, gate_bias), (up, up_bias), (down, down_bias)) = (gate, up, down);
        let is_gated = gate_bias.is_none()
            && up_bias.is_none()
            && linear::gated_applies(gate.single(), up.single());
        if !is_gated {
            self.linear(x, n_rows, gate, gate_bias, inner);
            self.linear(x, n_rows, up, up_bias, ups);
            self.swiglu(inner, ups, n_rows, gate.n_rows());
            self.linear(inner, n_rows, down, down_bias, out);
            return;
        }
        let later = Later::new();
        let pair = [gate.single(), up.single()];
        let mut inputs = self.inputs(x, n_rows, &pair);
        let next = self.next_after(gate);
        let way = Way {
            trail: self.trail_of(gate),
            next: next.as_deref(),
        };
        let mut memory = lock(&self.int8);
        let [of_x, of_inner] = &mut *memory;
        let is_rounded = self.rounds(&gate.parts);
        // A group of fewer rows takes longer to round alone than among others.
        let is_fused = is_rounded
            && down.single().layout() == Layout::Panels
            && inputs.share() >= ROUNDED_ROWS_MIN;
        let tiles = is_fused.then(|| of_inner.room(n_rows, gate.n_rows()));
        dispatch!(self, s => {
            if is_rounded {
                inputs = inputs.round_all(s, &self.pool, of_x, &later);
            }
            linear::gated(s, &self.pool, &self.scratch, pair, way, &inputs, inner, tiles);
        });
        let Some(tiles) = tiles else {
            drop(memory);
            self.linear(inner, n_rows, down, down_bias, out);
            return;
        };
        self.stacked(&inputs.made_of(tiles, gate.n_rows()), down, down_bias, out);
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

    fn add_rms_norm(
        &self,
        x: &mut Vec<f32>,
        y: &Vec<f32>,
        n_rows: usize,
        width: usize,
        gain: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        let n = area(&[n_rows, width]);
        let (x, y) = (SharedOut::new(&mut x[..n]), &y[..n]);
        let (gain, out) = (&gain[..width], SharedOut::new(&mut out[..n]));
        self.for_rows(n_rows, 2 * width, &|m| {
            let row = |of: SharedOut<'_>| {
                // SAFETY: rows are disjoint and inside the slices taken above.
                unsafe { std::slice::from_raw_parts_mut(of.at(m * width), width) }
            };
            let (row, to) = (row(x), row(out));
            dispatch!(self, s => elementwise::add_rms_norm_row(s, row, &y[m * width..][..width], to, gain, eps));
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
        let width = from_rows.width;
        assert_eq!(width, to_rows.width, "rows as wide as their copies");
        let as_heads = |rows: RowView| HeadView {
            offset: rows.offset,
            row_stride: rows.stride,
            n_heads: 1,
            head_stride: 0,
            len: rows.width,
        };
        assert!(
            extent(as_heads(from_rows), n_rows) <= from.len(),
            "rows to copy"
        );
        assert_rows_apart(as_heads(to_rows), n_rows, to.len());
        let to = SharedOut::new(to);
        self.for_rows(n_rows, width, &|m| {
            let row = &from[from_rows.offset + m * from_rows.stride..][..width];
            // SAFETY: rows lie apart and inside, as asserted above.
            unsafe {
                let to = to.at(to_rows.offset + m * to_rows.stride);
                to.copy_from_nonoverlapping(row.as_ptr(), width);
            }
        });
    }

    fn keep_rows(&self, x: &mut Vec<f32>, rows: &[usize], width: usize) {
        reference::keep_rows(x, rows, width);
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
        if heads.n_heads == 0 {
            return;
        }
        assert_rows_apart(heads, n_rows, x.len());
        let x = SharedOut::new(x);
        self.for_rows(n_rows, heads.n_heads * heads.len, &|m| {
            let (cos, sin) = angles[m * heads.len..][..heads.len].split_at(half);
            dispatch!(self, s => s.vectorize(#[inline(always)] || {
                for h in 0..heads.n_heads {
                    let at = heads.offset + m * heads.row_stride + h * heads.head_stride;
                    // SAFETY: inside, as asserted above; rows are disjoint.
                    let head = unsafe { std::slice::from_raw_parts_mut(x.at(at), heads.len) };
                    rotate(head, layout, cos, sin);
                }
            }));
        });
    }

    fn store_heads(
        &self,
        x: &Vec<f32>,
        keys: RowView,
        values: RowView,
        cache: &mut CpuCache,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        dispatch!(self, s => cache.store_heads(s, &self.pool, x, [keys, values], shape, inputs));
    }

    fn store_latent(
        &self,
        rows: &Vec<f32>,
        view: RowView,
        cache: &mut CpuCache,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        dispatch!(self, s => cache.store_latent(s, &self.pool, rows, view, shape, inputs));
    }

    fn attention(
        &self,
        queries: &Vec<f32>,
        query_rows: RowView,
        cache: &CpuCache,
        cache_shape: CacheShape,
        attention: AttentionShape,
        inputs: &StepInputs<'_>,
        out: &mut Vec<f32>,
    ) {
        dispatch!(self, s => attention::attention(
            s,
            &self.pool,
            queries,
            query_rows,
            cache,
            cache_shape,
            attention,
            inputs,
            self.config.activations,
            out,
        ));
    }

    fn absorb_keys(
        &self,
        queries: &Vec<f32>,
        heads: HeadView,
        weight: &CpuWeight,
        rows_per_head: usize,
        out: &mut Vec<f32>,
        out_stride: usize,
        n_rows: usize,
    ) {
        let weight = weight.single();
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

    fn per_head_linear(
        &self,
        x: &Vec<f32>,
        from: HeadView,
        n_rows: usize,
        weight: &CpuWeight,
        rows: HeadRows,
        out: &mut Vec<f32>,
        to: HeadView,
    ) {
        let (matrix, n_heads) = (weight.single(), from.n_heads);
        assert_eq!(n_heads, to.n_heads, "heads of inputs and outputs");
        assert_eq!(from.len, matrix.n_cols(), "a head's inputs");
        let Some(last_head) = n_heads.checked_sub(1).filter(|_| n_rows > 0) else {
            return;
        };
        assert!(
            rows.first_of(last_head) + to.len <= matrix.n_rows(),
            "the weight has every head's rows"
        );
        assert!(extent(from, n_rows) <= x.len(), "inputs of every row");
        assert!(
            n_heads == 1 || to.len <= to.head_stride,
            "heads of outputs lie apart"
        );
        assert_rows_apart(to, n_rows, out.len());
        if matrix.layout() == Layout::Panels {
            let mut memory = lock(&self.int8);
            let memory = self.rounds(&weight.parts).then_some(&mut memory[0]);
            let (x, out) = ((&x[..], from), (&mut out[..], to));
            dispatch!(self, s => linear::per_head(
                s, &self.pool, &self.scratch, matrix, rows, x, n_rows, memory, out,
            ));
            return;
        }
        let out = SharedOut::new(out);
        self.pool.run(n_heads, &|h, thread| {
            let job = Job {
                weight: matrix,
                first_row: rows.first_of(h),
                n_rows: to.len,
                x,
                x_offset: from.offset + h * from.head_stride,
                x_stride: from.row_stride,
                n_tokens: n_rows,
                bias: None,
                out_offset: to.offset + h * to.head_stride,
                out_stride: to.row_stride,
            };
            let mut scratch = lock(&self.scratch[thread]);
            for piece in 0..job.n_pieces() {
                // SAFETY: heads write disjoint outputs inside the buffer, as asserted above.
                dispatch!(self, s => unsafe {
                    linear::linear_piece(s, &mut scratch, &job, piece, out);
                });
            }
        });
    }

    fn workers(&self) -> Arc<dyn Workers> {
        Arc::<Pool>::clone(&self.pool)
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
        let (n_experts, top_k) = (shape.n_experts, shape.top_k);
        chosen.clear();
        chosen.resize(n_rows * top_k, (0, 0.0));
        let logits = &logits[..area(&[n_rows, n_experts])];
        let chosen = SharedOut::new(chosen);
        self.pool
            .run(n_rows.div_ceil(GATE_PIECE), &|piece, thread| {
                let choice = &mut lock(&choice[thread]);
                let first = piece * GATE_PIECE;
                for m in first..(first + GATE_PIECE).min(n_rows) {
                    // SAFETY: rows are disjoint, and there are as many as were made above.
                    let to = unsafe { std::slice::from_raw_parts_mut(chosen.at(m * top_k), top_k) };
                    let row = &logits[m * n_experts..][..n_experts];
                    reference::choose_experts(row, bias.map(Vec::as_slice), shape, choice, to);
                }
            });
    }

    fn experts(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        experts: &[Expert<CpuWeight>],
        routes: &mut CpuRoutes,
        out: &mut Vec<f32>,
    ) {
        routes.sort(n_rows, experts.len());
        if linear::experts_apply(experts) {
            let CpuRoutes {
                runs,
                rows,
                weights,
                gate,
                ..
            } = routes;
            let slots = Slots {
                runs,
                rows,
                weights,
            };
            let mut memory = lock(&self.int8);
            let rounds = self.config.activations == Activations::Int8;
            let memory = rounds.then_some(&mut *memory);
            // The first one stands for the layer, whichever are chosen.
            let next = experts.first().and_then(|e| self.next_after(&e.down));
            dispatch!(self, s => linear::experts(
                s, &self.pool, &self.scratch, experts, slots, next.as_deref(), x, gate, memory, out,
            ));
            return;
        }
        let CpuRoutes {
            runs,
            rows,
            weights,
            x: gathered,
            gate,
            up,
            down,
            ..
        } = routes;
        for run in &*runs {
            let expert = &experts[run.expert];
            let (hidden, inter) = (expert.down.n_rows(), expert.gate.n_rows());
            let slots = run.first..run.first + run.n;
            for (to, row) in gathered.chunks_exact_mut(hidden).zip(&rows[slots.clone()]) {
                to.copy_from_slice(&x[row * hidden..][..hidden]);
            }
            self.linear(gathered, run.n, &expert.gate, None, gate);
            self.linear(gathered, run.n, &expert.up, None, up);
            self.swiglu(gate, up, run.n, inter);
            self.linear(gate, run.n, &expert.down, None, down);
            for (slot, y) in slots.zip(down.chunks_exact(hidden)) {
                let weight = weights[slot];
                let to = &mut out[rows[slot] * hidden..][..hidden];
                dispatch!(self, s => s.vectorize(#[inline(always)] || {
                    to.iter_mut().zip(y).for_each(|(o, v)| *o += weight * v);
                }));
            }
        }
    }
}
