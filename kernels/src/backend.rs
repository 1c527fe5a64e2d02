//! The operations that models are written in, at the level at which they are fused.
//!
//! A backend owns its memory; models see buffers only through it. Everything is f32 unless a
//! weight's format or [`Activations`] says otherwise.
//!
//! Invariant: buffers are made at load time; no operation allocates.
//! Invariant: every output row depends on its own input row, its sequence's cache and the weights,
//! bit for bit; never on the other rows of the call.

use std::sync::Arc;

use crate::matrix::Matrix;

/// How activations enter linear layers with quantized weights (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K,
/// Int8, Int4).
/// Other formats, and [`Backend::latent_weight`], always compute in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// f32 products and sums.
    F32,
    /// Activations rounded to int8 in groups of 32, integer products, f32 sums.
    Int8,
}

/// How keys and values are stored between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// As computed.
    F32,
    /// Rounded to bf16, ties to even.
    Bf16,
    /// Rounded to int8 with an f32 scale for every position's key head, value head or latent; the
    /// rotary part of a latent row stays in bf16, since all heads' scores hang on it.
    Int8,
}

impl KvType {
    /// All types, in the order of the enum.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// The name used in settings and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of one element.
    pub const fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of one element of a latent row's rotary part.
    pub const fn rope_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::Int8 => 2,
        }
    }

    /// Bytes of one scale; 0 for types without.
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Int8 => 4,
        }
    }

    /// Bytes of one position in one layer.
    pub const fn position_bytes(self, rows: CacheRows) -> usize {
        match rows {
            CacheRows::Heads {
                n_kv_heads,
                head_dim,
            } => 2 * n_kv_heads * (head_dim * self.element_bytes() + self.scale_bytes()),
            CacheRows::Latent {
                latent_len,
                rope_len,
            } => {
                latent_len * self.element_bytes()
                    + rope_len * self.rope_bytes()
                    + self.scale_bytes()
            }
        }
    }
}

/// Rows inside a buffer: row `m` is `width` elements from `offset + m * stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowView {
    /// First element of row 0.
    pub offset: usize,
    /// Elements between the starts of neighbouring rows.
    pub stride: usize,
    /// Elements of a row.
    pub width: usize,
}

impl RowView {
    /// Rows of `width` elements, one after the other.
    pub const fn dense(width: usize) -> Self {
        Self {
            offset: 0,
            stride: width,
            width,
        }
    }
}

/// One sequence's rows in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSpan {
    /// First row of the sequence in the step's buffers.
    pub first_row: usize,
    /// Rows of the sequence.
    pub n_rows: usize,
    /// Position of the first row in its sequence.
    pub first_pos: usize,
    /// Where the sequence's block table starts in [`StepInputs::blocks`].
    pub first_block: usize,
}

/// What a step computes on: tokens, their positions and where their keys and values lie.
#[derive(Debug, Clone, Copy)]
pub struct StepInputs<'a> {
    /// Token of every row.
    pub tokens: &'a [u32],
    /// Position of every row in its sequence.
    pub positions: &'a [usize],
    /// Index into `spans` of every row.
    pub span_of_row: &'a [usize],
    /// The sequences of the step.
    pub spans: &'a [StepSpan],
    /// Block tables of all spans, one after the other.
    pub blocks: &'a [u32],
}

impl StepInputs<'_> {
    /// Rows of the step.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// The block table of row `row`'s sequence, from position 0 on.
    pub fn blocks_of_row(&self, row: usize) -> &[u32] {
        let span = &self.spans[self.span_of_row[row]];
        &self.blocks[span.first_block..]
    }
}

/// What a layer caches per position. Backends lay a block of positions out as suits them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheRows {
    /// A key and a value for every KV head.
    Heads {
        /// KV heads.
        n_kv_heads: usize,
        /// Elements of a key, and of a value.
        head_dim: usize,
    },
    /// The latent `c` and the rotated shared key (MLA, DeepSeek-V2 2.1.2).
    Latent {
        /// Elements of the latent, `kv_lora_rank`.
        latent_len: usize,
        /// Elements of the shared rotary key.
        rope_len: usize,
    },
}

impl CacheRows {
    /// Elements of one position in one layer.
    pub const fn row_len(self) -> usize {
        match self {
            Self::Heads {
                n_kv_heads,
                head_dim,
            } => 2 * n_kv_heads * head_dim,
            Self::Latent {
                latent_len,
                rope_len,
            } => latent_len + rope_len,
        }
    }
}

/// Size of one layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layout of a block.
    pub rows: CacheRows,
    /// Blocks in the pool.
    pub n_blocks: usize,
    /// Positions in a block, a multiple of 32 and at most 64; attention is split at multiples of
    /// it.
    pub block_len: usize,
}

impl CacheShape {
    /// Elements of one block.
    pub const fn block_size(&self) -> usize {
        self.rows.row_len() * self.block_len
    }

    /// Elements of the layer's cache.
    pub const fn size(&self) -> usize {
        self.block_size() * self.n_blocks
    }

    /// Bytes of one block.
    pub const fn block_bytes(&self, kv_type: KvType) -> usize {
        kv_type.position_bytes(self.rows) * self.block_len
    }
}

/// Which elements of a head are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(x[i], x[i + d/2])`: Hugging Face Llama and Qwen.
    Halves,
    /// `(x[2i], x[2i + 1])`: DeepSeek MLA, and Llama rows as GGUF stores them.
    Pairs,
}

/// Heads inside rows: head `h` of row `m` is `len` elements from
/// `offset + m * row_stride + h * head_stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadView {
    /// Start of head 0 in row 0.
    pub offset: usize,
    /// Elements between rows.
    pub row_stride: usize,
    /// Heads of a row.
    pub n_heads: usize,
    /// Elements between heads.
    pub head_stride: usize,
    /// Elements of a head that are meant.
    pub len: usize,
}

/// Attention over the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of the cache's KV heads.
    pub n_heads: usize,
    /// Factor on scores before the softmax.
    pub scale: f32,
}

/// How a layer chooses experts (DeepSeek-V2 section 2.2, DeepSeek-V3 section 2.1.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateShape {
    /// Routed experts.
    pub n_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Scores from logits.
    pub scoring: Scoring,
    /// Restriction of the choice to groups of experts.
    pub groups: Option<GateGroups>,
    /// Divide the chosen weights by their sum.
    pub normalize: bool,
    /// Factor on the weights, after normalisation.
    pub scale: f32,
}

/// Scores of experts from the gate's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Logistic function of each logit.
    Sigmoid,
}

/// Group-limited choice: only experts of the best groups compete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateGroups {
    /// Groups; experts are dealt to them in runs.
    pub n_groups: usize,
    /// Groups that stay in the choice.
    pub top_groups: usize,
    /// What makes a group good.
    pub group_score: GroupScore,
}

/// What a group of experts is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (V2 `group_limited_greedy`).
    Max,
    /// The sum of its two best, bias included (V3 `noaux_tc`).
    TopTwoSum,
}

/// One expert's three matrices.
#[derive(Debug)]
pub struct Expert<W> {
    /// `[inter, hidden]`.
    pub gate: W,
    /// `[inter, hidden]`.
    pub up: W,
    /// `[hidden, inter]`.
    pub down: W,
}

/// Capacities of the scratch for a model's expert layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertShape {
    /// Rows of a step at most.
    pub n_rows_max: usize,
    /// Routed experts.
    pub n_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside an expert.
    pub inter: usize,
}

/// The largest step, for [`Backend::reserve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of a step at most.
    pub n_rows_max: usize,
    /// Inputs of the widest linear layer.
    pub width_max: usize,
    /// Inputs of all heads of a row, for [`Backend::per_head_linear`]; 0 where there is none.
    pub heads_width_max: usize,
    /// The expert layers.
    pub experts: Option<ExpertShape>,
}

impl ExpertShape {
    /// Elements of [`Backend::routes`] with this shape.
    pub const fn n_elements(&self) -> usize {
        self.n_rows_max * (2 * self.hidden + (self.top_k + 1) * self.inter)
    }
}

/// Takes a model's weights over: all that building a model needs of a backend.
pub trait WeightStore {
    /// f32 elements in the store's memory.
    type Buffer: Send;
    /// A weight matrix ready for [`Backend::linear`].
    type Weight: Send;

    /// A buffer with these values.
    fn upload(&self, values: &[f32]) -> Self::Buffer;
    /// Takes matrices of equal width over as one weight, whose outputs are theirs side by side.
    /// Shares their bytes where the backend can read them as they are.
    fn weight(&self, parts: Vec<Matrix>) -> Self::Weight;
    /// Takes a `kv_b_proj` of keys and values over, for [`Backend::absorb_keys`] and
    /// [`Backend::per_head_linear`].
    fn latent_weight(&self, matrix: Matrix) -> Self::Weight;
}

/// Threads of the host that share out rows of work.
pub trait Workers: Send + Sync {
    /// Threads that work at once, at least one.
    fn n_threads(&self) -> usize;
    /// Calls `task(row, thread, values of the row)` once for every whole row of `row_len` values. No
    /// two calls with the same `thread` overlap.
    ///
    /// # Panics
    /// Inside a call of the backend's, or of its own.
    fn for_each_row(&self, values: &mut [f32], row_len: usize, task: &RowTask<'_>);
}

/// What [`Workers`] do.
pub type RowTask<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

/// Workers that are the caller alone.
#[derive(Debug, Clone, Copy)]
pub struct CallerOnly;

impl Workers for CallerOnly {
    fn n_threads(&self) -> usize {
        1
    }

    fn for_each_row(&self, values: &mut [f32], row_len: usize, task: &RowTask<'_>) {
        let rows = values.chunks_exact_mut(row_len).enumerate();
        rows.for_each(|(row, values)| task(row, 0, values));
    }
}

/// Device arithmetic. Rows beyond those of the call are left as they are.
pub trait Backend: WeightStore + Send + 'static {
    /// Chosen experts and their weights per row, and the scratch to run them.
    type Routes: Send;
    /// Keys and values of one layer.
    type Cache: Send;

    /// Zeroed, resident memory for `len` elements.
    fn buffer(&self, len: usize) -> Self::Buffer;
    /// How keys and values are stored.
    fn kv_type(&self) -> KvType;
    /// Zeroed, resident memory for one layer's keys and values.
    fn cache(&self, shape: CacheShape) -> Self::Cache;
    /// Bytes of one block of a cache.
    fn cache_block<'a>(&self, cache: &'a Self::Cache, shape: CacheShape, block: usize) -> &'a [u8];
    /// The same, to be written.
    fn cache_block_mut<'a>(
        &self,
        cache: &'a mut Self::Cache,
        shape: CacheShape,
        block: usize,
    ) -> &'a mut [u8];
    /// The first `len` elements, in host memory.
    fn download<'a>(&self, buffer: &'a mut Self::Buffer, len: usize) -> &'a mut [f32];
    /// Bytes of scratch that steps of this shape take besides buffers and routes.
    fn scratch_bytes(&self, shape: &StepShape) -> usize;
    /// Takes that scratch; steps beyond the shape may not be run.
    fn reserve(&self, shape: &StepShape);
    /// Room for the routing of one expert layer at a time.
    fn routes(&self, shape: ExpertShape) -> Self::Routes;

    /// `out[m] = table[tokens[m] - first]`, or zeros where the table does not hold the token: a
    /// rank's table begins at token `first` of the vocabulary.
    fn embed(&self, table: &Self::Weight, first: usize, tokens: &[u32], out: &mut Self::Buffer);
    /// `out[m] = W x[m] + bias`; `x` and `out` dense.
    fn linear(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
    );
    /// `out[m] = D (silu(G x[m] + g) * (U x[m] + u)) + d` for layers `(G, g)`, `(U, u)` and `(D, d)`, one
    /// matrix each (Shazeer 2020); `x` and `out` dense, `scratch` with room for what is inside, twice.
    fn mlp(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        layers: [(&Self::Weight, Option<&Self::Buffer>); 3],
        scratch: [&mut Self::Buffer; 2],
        out: &mut Self::Buffer,
    );
    /// `out[m] = x[m] / sqrt(mean(x[m]^2) + eps) * gain` (Zhang & Sennrich 2019).
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        rows: RowView,
        n_rows: usize,
        gain: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    );
    /// [`Backend::rms_norm`] of every head of every row, in place.
    fn rms_norm_heads(
        &self,
        x: &mut Self::Buffer,
        n_rows: usize,
        heads: HeadView,
        gain: &Self::Buffer,
        eps: f32,
    );
    /// Zeroes the first `len` elements.
    fn clear(&self, x: &mut Self::Buffer, len: usize);
    /// `x[m] += y[m]`, then [`Backend::rms_norm`] of `x[m]` to `out[m]`; all dense, `width` wide.
    fn add_rms_norm(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        n_rows: usize,
        width: usize,
        gain: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    );
    /// `to[m] = from[m]`, the views' widths being equal.
    fn copy_rows(
        &self,
        from: &Self::Buffer,
        from_rows: RowView,
        to: &mut Self::Buffer,
        to_rows: RowView,
        n_rows: usize,
    );
    /// `x[i] = x[rows[i]]`, dense rows of `width` elements; `rows` ascend.
    fn keep_rows(&self, x: &mut Self::Buffer, rows: &[usize], width: usize);

    /// `angles[m] = [cos(p f_0).., sin(p f_0)..] * factor` for every row's position `p`.
    fn rope_angles(
        &self,
        inverse_frequencies: &[f64],
        factor: f64,
        inputs: &StepInputs<'_>,
        angles: &mut Self::Buffer,
    );
    /// Rotates heads in place by [`Backend::rope_angles`] (Su et al. 2021).
    fn rope(
        &self,
        x: &mut Self::Buffer,
        n_rows: usize,
        heads: HeadView,
        layout: RopeLayout,
        angles: &Self::Buffer,
    );

    /// Writes rows of keys and values, `n_kv_heads * head_dim` wide each, into the cache. No two rows
    /// of a step have the same place in it.
    fn store_heads(
        &self,
        x: &Self::Buffer,
        keys: RowView,
        values: RowView,
        cache: &mut Self::Cache,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    );
    /// Writes rows of `[c | rope key]` into the cache, likewise.
    fn store_latent(
        &self,
        rows: &Self::Buffer,
        view: RowView,
        cache: &mut Self::Cache,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    );
    /// Causal attention of every row over its sequence's cache. Rows of queries are
    /// `[n_heads, key]`, the result is `[m, n_heads, value]`: key and value are `head_dim` for [`CacheRows::Heads`],
    /// `latent_len + rope_len` and `latent_len` for [`CacheRows::Latent`].
    fn attention(
        &self,
        queries: &Self::Buffer,
        query_rows: RowView,
        cache: &Self::Cache,
        cache_shape: CacheShape,
        attention: AttentionShape,
        inputs: &StepInputs<'_>,
        out: &mut Self::Buffer,
    );

    /// MLA's key absorption: `out[m, h, ..R] = sum_d q[m, h, d] * W[h * rows_per_head + d]` for
    /// `d < head.len`; `heads` views the queries, head `h` of `out` starts at `h * out_stride`.
    fn absorb_keys(
        &self,
        queries: &Self::Buffer,
        heads: HeadView,
        weight: &Self::Weight,
        rows_per_head: usize,
        out: &mut Self::Buffer,
        out_stride: usize,
        n_rows: usize,
    );
    /// A linear layer for every head: `out[m, h] = W[rows of head h] x[m, h]`, where `from` views the
    /// inputs and `to` the outputs, which lie apart. Activations are rounded as in
    /// [`Backend::linear`].
    fn per_head_linear(
        &self,
        x: &Self::Buffer,
        from: HeadView,
        n_rows: usize,
        weight: &Self::Weight,
        rows: HeadRows,
        out: &mut Self::Buffer,
        to: HeadView,
    );

    /// Threads for what the host does between two calls.
    fn workers(&self) -> Arc<dyn Workers> {
        Arc::new(CallerOnly)
    }

    /// Chooses experts for every row from gate logits `[m, n_experts]`.
    fn gate(
        &self,
        logits: &Self::Buffer,
        n_rows: usize,
        shape: GateShape,
        bias: Option<&Self::Buffer>,
        routes: &mut Self::Routes,
    );
    /// `out[m] += sum over chosen experts of weight * expert(x[m])`, experts in ascending order.
    fn experts(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        experts: &[Expert<Self::Weight>],
        routes: &mut Self::Routes,
        out: &mut Self::Buffer,
    );
}

/// Which rows of a weight are a head's; how many, the view of the outputs tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRows {
    /// Rows of the weight per head.
    pub rows_per_head: usize,
    /// The first of them that is meant: with keys in front of values, `qk_nope_head_dim`.
    pub first_row: usize,
}

impl HeadRows {
    /// The first row that is meant of head `head`.
    pub const fn first_of(&self, head: usize) -> usize {
        head * self.rows_per_head + self.first_row
    }
}
