//! The cases as calls on a backend, with what each of them computes and reads.
//!
//! Operations are those of the algorithm, a multiply-add counts two; bytes are weights, cache and
//! activations, each once. Weights and caches are zeros: they are as much work as anything else.

use dsd_kernels::{
    backend::{
        Activations, AttentionShape, Backend, CacheRows, CacheShape, Expert, ExpertShape, HeadRows,
        HeadView, KvType, RopeLayout, RowView, StepInputs, StepShape, StepSpan, WeightStore,
    },
    cases::{AttentionCase, ExpertsCase, LatentCase, LinearCase, SpeedCase},
    cpu::{CpuBackend, CpuWeight},
    dtype::Format,
    matrix::{Matrix, TileScales},
};

/// Positions in a block of the cache.
const BLOCK_LEN: usize = 32;

/// What a case computes in, hence which ceiling it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    F32,
    /// Pairs of bf16: attention over a bf16 cache with int8 activations.
    Bf16,
    Int8,
}

/// An operation, ready to be called again and again.
pub(crate) struct Op<'a> {
    pub(crate) name: String,
    pub(crate) arithmetic: Arithmetic,
    pub(crate) n_ops: f64,
    pub(crate) n_bytes: f64,
    call: Box<dyn FnMut() + 'a>,
}

impl<'a> Op<'a> {
    /// The case on a backend; `None` where it would repeat what the backend of f32 activations and
    /// f32 cache does.
    pub(crate) fn new(backend: &'a CpuBackend, case: SpeedCase) -> Option<Self> {
        let rounds = backend.config().activations == Activations::Int8;
        let has_short_kv = backend.kv_type() != KvType::F32;
        if has_short_kv && !matches!(case, SpeedCase::Attention(..)) {
            return None;
        }
        let is_block = |format: Format| format.block_len() != 1;
        let mut op = match case {
            SpeedCase::Linear(case) if !rounds || is_block(case.format) => linear(backend, case)?,
            SpeedCase::Mlp(case) if !rounds || is_block(case.format) => mlp(backend, case)?,
            SpeedCase::Experts(case) if !rounds || is_block(case.format) => experts(backend, case)?,
            SpeedCase::Latent(case) if !rounds || !case.joined => latent(backend, case)?,
            SpeedCase::Attention(case, n_sequences)
                if !rounds || backend.kv_type() == KvType::Bf16 =>
            {
                attention(backend, case, n_sequences)
            }
            _ if rounds => return None,
            SpeedCase::RmsNorm { m, k } => rms_norm(backend, m, k),
            SpeedCase::Rope { m, h, d } => rope(backend, m, h, d),
            SpeedCase::Linear(_)
            | SpeedCase::Mlp(_)
            | SpeedCase::Experts(_)
            | SpeedCase::Attention(..)
            | SpeedCase::Latent(_) => return None,
        };
        if rounds {
            op.arithmetic = match case {
                SpeedCase::Attention(..) => Arithmetic::Bf16,
                _ => Arithmetic::Int8,
            };
        }
        op.name = format!("{} {}", op.name, if rounds { "int8" } else { "f32" });
        Some(op)
    }

    pub(crate) fn call(&mut self) {
        (self.call)();
    }
}

/// A matrix of zeros; `None` for shapes the format does not have.
fn zeros(format: Format, n: usize, k: usize) -> Option<Matrix> {
    let scales = (format == Format::F8E4m3).then(|| TileScales {
        tile_rows: 128,
        tile_cols: 128,
        values: vec![1.0; n.div_ceil(128) * k.div_ceil(128)],
    });
    Matrix::new(
        format,
        n,
        k,
        vec![0; n * format.row_bytes(k)?].into(),
        scales,
    )
    .ok()
}

fn weight(backend: &CpuBackend, format: Format, n: usize, k: usize) -> Option<CpuWeight> {
    Some(backend.weight(vec![zeros(format, n, k)?]))
}

fn weight_bytes(format: Format, n: usize, k: usize) -> f64 {
    format.row_bytes(k).map_or(0.0, |row| (row * n) as f64)
}

/// Bytes of so many f32 elements.
fn f32_bytes(n_elements: usize) -> f64 {
    (n_elements * size_of::<f32>()) as f64
}

/// Values that are neither zero nor alike.
fn activations(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 61) as f32 / 61.0 - 0.4).collect()
}

fn reserve(backend: &CpuBackend, m: usize, k: usize, experts: Option<ExpertShape>) {
    backend.reserve(&StepShape {
        n_rows_max: m,
        width_max: k,
        heads_width_max: 0,
        experts,
    });
}

fn linear(backend: &CpuBackend, case: LinearCase) -> Option<Op<'_>> {
    let LinearCase { format, m, n, k } = case;
    let weight = weight(backend, format, n, k)?;
    reserve(backend, m, k, None);
    let x = backend.upload(&activations(m * k));
    let mut out = backend.buffer(m * n);
    Some(Op {
        name: format!("linear {format} m{m} n{n} k{k}"),
        arithmetic: Arithmetic::F32,
        n_ops: 2.0 * (m * n * k) as f64,
        n_bytes: weight_bytes(format, n, k) + f32_bytes(m * (n + k)),
        call: Box::new(move || backend.linear(&x, m, &weight, None, &mut out)),
    })
}

fn mlp(backend: &CpuBackend, case: LinearCase) -> Option<Op<'_>> {
    let LinearCase { format, m, n, k } = case;
    let (gate, up, down) = (
        weight(backend, format, n, k)?,
        weight(backend, format, n, k)?,
        weight(backend, format, k, n)?,
    );
    reserve(backend, m, k.max(n), None);
    let x = backend.upload(&activations(m * k));
    let [mut inner, mut ups, mut out] = [m * n, m * n, m * k].map(|len| backend.buffer(len));
    Some(Op {
        name: format!("mlp {format} m{m} n{n} k{k}"),
        arithmetic: Arithmetic::F32,
        n_ops: 6.0 * (m * n * k) as f64,
        n_bytes: 3.0 * weight_bytes(format, n, k) + 2.0 * f32_bytes(m * k),
        call: Box::new(move || {
            let layers = [&gate, &up, &down].map(|weight| (weight, None));
            backend.mlp(&x, m, layers, [&mut inner, &mut ups], &mut out);
        }),
    })
}

/// The rows of sequences alike, one after the other, each with blocks of its own.
struct Step {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    span_of_row: Vec<usize>,
    spans: Vec<StepSpan>,
    blocks: Vec<u32>,
}

impl Step {
    fn new(n_past: usize, n_new: usize, n_sequences: usize) -> Self {
        let blocks_each = (n_past + n_new).div_ceil(BLOCK_LEN);
        let span = |s| StepSpan {
            first_row: s * n_new,
            n_rows: n_new,
            first_pos: n_past,
            first_block: s * blocks_each,
        };
        let n_rows = n_new * n_sequences;
        Self {
            tokens: vec![0; n_rows],
            positions: (0..n_rows).map(|row| n_past + row % n_new).collect(),
            span_of_row: (0..n_rows).map(|row| row / n_new).collect(),
            spans: (0..n_sequences).map(span).collect(),
            blocks: (0..).take(blocks_each * n_sequences).collect(),
        }
    }

    fn inputs(&self) -> StepInputs<'_> {
        StepInputs {
            tokens: &self.tokens,
            positions: &self.positions,
            span_of_row: &self.span_of_row,
            spans: &self.spans,
            blocks: &self.blocks,
        }
    }
}

fn attention(backend: &CpuBackend, case: AttentionCase, n_sequences: usize) -> Op<'_> {
    let AttentionCase {
        n_heads,
        rows,
        n_past,
        n_new,
    } = case;
    let (kind, key, value) = match rows {
        CacheRows::Heads { head_dim, .. } => ("heads", head_dim, head_dim),
        CacheRows::Latent {
            latent_len,
            rope_len,
        } => ("latent", latent_len + rope_len, latent_len),
    };
    let step = Step::new(n_past, n_new, n_sequences);
    let shape = CacheShape {
        rows,
        n_blocks: step.blocks.len(),
        block_len: BLOCK_LEN,
    };
    let cache = backend.cache(shape);
    let m = n_new * n_sequences;
    let queries = backend.upload(&activations(m * n_heads * key));
    let mut out = backend.buffer(m * n_heads * value);
    let shape_of_attention = AttentionShape {
        n_heads,
        scale: 0.1,
    };
    // Every row looks at the positions before it and at itself.
    let n_seen = n_sequences * (n_new * n_past + n_new * (n_new + 1) / 2);
    let n_positions = n_sequences * (n_past + n_new);
    Op {
        name: format!(
            "attention {kind} h{n_heads} d{key} past{n_past} m{n_new} x{n_sequences} kv-{}",
            backend.kv_type().name()
        ),
        arithmetic: Arithmetic::F32,
        n_ops: 2.0 * (n_seen * n_heads * (key + value)) as f64,
        n_bytes: (n_positions * backend.kv_type().position_bytes(rows)) as f64
            + f32_bytes(m * n_heads * (key + value)),
        call: Box::new(move || {
            backend.attention(
                &queries,
                RowView::dense(n_heads * key),
                &cache,
                shape,
                shape_of_attention,
                &step.inputs(),
                &mut out,
            );
        }),
    }
}

fn latent(backend: &CpuBackend, case: LatentCase) -> Option<Op<'_>> {
    let LatentCase {
        format,
        m,
        h,
        d,
        latent_len,
        joined,
    } = case;
    reserve(backend, m * h, latent_len, None);
    let queries = backend.upload(&activations(m * h * d));
    let dense = |len| HeadView {
        offset: 0,
        row_stride: h * len,
        n_heads: h,
        head_stride: len,
        len,
    };
    let (heads, latents) = (dense(d), dense(latent_len));
    let rows = |rows_per_head, first_row| HeadRows {
        rows_per_head,
        first_row,
    };
    let mut absorbed = backend.buffer(m * h * latent_len);
    let mut expanded = backend.buffer(m * h * d);
    let call: Box<dyn FnMut() + '_> = if joined {
        let weight = backend.latent_weight(zeros(format, 2 * h * d, latent_len)?);
        Box::new(move || {
            let out = &mut absorbed;
            backend.absorb_keys(&queries, heads, &weight, 2 * d, out, latent_len, m);
            let rows = rows(2 * d, d);
            backend.per_head_linear(out, latents, m, &weight, rows, &mut expanded, heads);
        })
    } else {
        let keys = weight(backend, format, h * latent_len, d)?;
        let values = weight(backend, format, h * d, latent_len)?;
        Box::new(move || {
            let (out, rows_of_keys) = (&mut absorbed, rows(latent_len, 0));
            backend.per_head_linear(&queries, heads, m, &keys, rows_of_keys, out, latents);
            let rows = rows(d, 0);
            backend.per_head_linear(out, latents, m, &values, rows, &mut expanded, heads);
        })
    };
    let name = if joined { "latent" } else { "latent split" };
    Some(Op {
        name: format!("{name} {format} m{m} h{h} d{d} k{latent_len}"),
        arithmetic: Arithmetic::F32,
        n_ops: 4.0 * (m * h * d * latent_len) as f64,
        n_bytes: weight_bytes(format, 2 * h * d, latent_len)
            + f32_bytes(2 * m * h * (d + latent_len)),
        call,
    })
}

fn experts(backend: &CpuBackend, case: ExpertsCase) -> Option<Op<'_>> {
    let ExpertsCase {
        format,
        m,
        hidden,
        inter,
        gate,
    } = case;
    let expert = || {
        Some(Expert {
            gate: weight(backend, format, inter, hidden)?,
            up: weight(backend, format, inter, hidden)?,
            down: weight(backend, format, hidden, inter)?,
        })
    };
    let experts = (0..gate.n_experts)
        .map(|_| expert())
        .collect::<Option<Vec<_>>>()?;
    let shape = ExpertShape {
        n_rows_max: m,
        n_experts: gate.n_experts,
        top_k: gate.top_k,
        hidden,
        inter,
    };
    reserve(backend, m, hidden, Some(shape));
    let mut routes = backend.routes(shape);
    // A step of a sequence that runs through all residues spreads rows over all experts.
    let logits = (0..m * gate.n_experts).map(|i| (i * 7919 % 10_007) as f32 / 10_007.0);
    let logits = backend.upload(&logits.collect::<Vec<_>>());
    let x = backend.upload(&activations(m * hidden));
    let mut out = backend.buffer(m * hidden);
    // Rows choose as if independently: an expert is read unless none of them chose it.
    let is_missed = (1.0 - gate.top_k as f64 / gate.n_experts as f64).powi(m as i32);
    let n_read = gate.n_experts as f64 * (1.0 - is_missed);
    let bytes_each =
        2.0 * weight_bytes(format, inter, hidden) + weight_bytes(format, hidden, inter);
    Some(Op {
        name: format!(
            "experts {format} m{m} {}x{inter} k{hidden} top{}",
            gate.n_experts, gate.top_k
        ),
        arithmetic: Arithmetic::F32,
        n_ops: 6.0 * (m * gate.top_k * hidden * inter) as f64,
        n_bytes: n_read * bytes_each + f32_bytes(2 * m * hidden),
        call: Box::new(move || {
            backend.gate(&logits, m, gate, None, &mut routes);
            backend.experts(&x, m, &experts, &mut routes, &mut out);
        }),
    })
}

fn rms_norm(backend: &CpuBackend, m: usize, k: usize) -> Op<'_> {
    let x = backend.upload(&activations(m * k));
    let gain = backend.upload(&vec![1.0; k]);
    let mut out = backend.buffer(m * k);
    Op {
        name: format!("rms_norm m{m} k{k}"),
        arithmetic: Arithmetic::F32,
        n_ops: 4.0 * (m * k) as f64,
        n_bytes: f32_bytes(2 * m * k),
        call: Box::new(move || backend.rms_norm(&x, RowView::dense(k), m, &gain, 1e-6, &mut out)),
    }
}

fn rope(backend: &CpuBackend, m: usize, h: usize, d: usize) -> Op<'_> {
    let mut x = backend.upload(&activations(m * h * d));
    let heads = HeadView {
        offset: 0,
        row_stride: h * d,
        n_heads: h,
        head_stride: d,
        len: d,
    };
    let frequencies = (0..d / 2).map(|i| 1.0 / (1.0 + i as f64));
    let mut angles = backend.buffer(m * d);
    let step = Step::new(0, m, 1);
    backend.rope_angles(
        &frequencies.collect::<Vec<_>>(),
        1.0,
        &step.inputs(),
        &mut angles,
    );
    Op {
        name: format!("rope m{m} h{h} d{d}"),
        arithmetic: Arithmetic::F32,
        n_ops: 3.0 * (m * h * d) as f64,
        n_bytes: f32_bytes(2 * m * h * d + m * d),
        call: Box::new(move || backend.rope(&mut x, m, heads, RopeLayout::Halves, &angles)),
    }
}
