//! The blocks of a layer: attention and feed-forward parts, with their weights.
//!
//! Each `forward` reads `ws.normed` and leaves the block's output in `ws.y`.

use dsd_kernels::backend::{
    AttentionShape, Backend, CacheShape, Expert, HeadView, RopeLayout, RowView, StepInputs,
    ValueHeads,
};

use super::{
    ModelError,
    spec::{DecoderSpec, GqaSpec, MlaSpec, MoeSpec},
    workspace::Workspace,
};
use crate::weights::{Checkpoint, WeightsError};

/// Epsilon of MLA's two inner norms: a constant in the published code, whatever `rms_norm_eps` is.
const MLA_NORM_EPS: f32 = 1e-6;

/// What every block of a step needs besides its own weights.
pub(super) struct StepContext<'a, B> {
    pub(super) backend: &'a B,
    pub(super) inputs: &'a StepInputs<'a>,
    pub(super) rms_norm_eps: f32,
    pub(super) rope_layout: RopeLayout,
    pub(super) cache_shape: CacheShape,
}

/// A projection with its bias.
pub(super) struct Linear<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Buffer>,
}

impl<B: Backend> Linear<B> {
    /// `{prefix}.{name}.weight` of every part, `[rows, n_cols]` each, as one layer.
    pub(super) fn load(
        checkpoint: &Checkpoint,
        backend: &B,
        prefix: &str,
        parts: &[(&str, usize)],
        n_cols: usize,
        bias: bool,
    ) -> Result<Self, WeightsError> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (name, n_rows) in parts {
            let name = format!("{prefix}.{name}");
            weights.push(checkpoint.matrix(&format!("{name}.weight"), *n_rows, n_cols)?);
            if bias {
                biases.extend(checkpoint.vector(&format!("{name}.bias"), *n_rows)?);
            }
        }
        Ok(Self {
            weight: backend.weight(weights),
            bias: bias.then(|| backend.upload(&biases)),
        })
    }

    fn run(&self, backend: &B, x: &B::Buffer, n_rows: usize, out: &mut B::Buffer) {
        backend.linear(x, n_rows, &self.weight, self.bias.as_ref(), out);
    }

    fn parts(&self) -> (&B::Weight, Option<&B::Buffer>) {
        (&self.weight, self.bias.as_ref())
    }
}

/// A layer's attention.
pub(super) enum Attention<B: Backend> {
    Gqa(Gqa<B>),
    Mla(Mla<B>),
}

/// Grouped-query attention.
pub(super) struct Gqa<B: Backend> {
    spec: GqaSpec,
    /// Queries, keys and values side by side.
    qkv: Linear<B>,
    o: Linear<B>,
    /// Gains of the per-head norms of queries and keys.
    qk_norm: Option<[B::Buffer; 2]>,
}

impl<B: Backend> Gqa<B> {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        backend: &B,
        decoder: &DecoderSpec,
        spec: &GqaSpec,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let hidden = decoder.hidden;
        let (q_len, kv_len) = (
            spec.n_heads * spec.head_dim,
            spec.n_kv_heads * spec.head_dim,
        );
        let norm = |name: &str| {
            let gain = checkpoint.vector(&format!("{prefix}.{name}.weight"), spec.head_dim)?;
            Ok::<_, ModelError>(backend.upload(&gain))
        };
        Ok(Self {
            spec: spec.clone(),
            qkv: Linear::load(
                checkpoint,
                backend,
                prefix,
                &[("q_proj", q_len), ("k_proj", kv_len), ("v_proj", kv_len)],
                hidden,
                spec.qkv_bias,
            )?,
            o: Linear::load(
                checkpoint,
                backend,
                prefix,
                &[("o_proj", hidden)],
                q_len,
                spec.output_bias,
            )?,
            qk_norm: if spec.qk_norm {
                Some([norm("q_norm")?, norm("k_norm")?])
            } else {
                None
            },
        })
    }

    pub(super) fn forward(
        &self,
        step: &StepContext<'_, B>,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
    ) {
        let (b, n_rows, spec) = (step.backend, step.inputs.n_rows(), &self.spec);
        let (q_len, kv_len) = (
            spec.n_heads * spec.head_dim,
            spec.n_kv_heads * spec.head_dim,
        );
        let rows = |offset, width| RowView {
            offset,
            stride: q_len + 2 * kv_len,
            width,
        };
        let (q, k, v) = (
            rows(0, q_len),
            rows(q_len, kv_len),
            rows(q_len + kv_len, kv_len),
        );
        let heads = |of: RowView| HeadView {
            offset: of.offset,
            row_stride: of.stride,
            n_heads: of.width / spec.head_dim,
            head_stride: spec.head_dim,
            len: spec.head_dim,
        };
        self.qkv.run(b, &ws.normed, n_rows, &mut ws.qkv);
        if let Some([q_gain, k_gain]) = &self.qk_norm {
            for (of, gain) in [(q, q_gain), (k, k_gain)] {
                b.rms_norm_heads(&mut ws.qkv, n_rows, heads(of), gain, step.rms_norm_eps);
            }
        }
        for of in [q, k] {
            b.rope(&mut ws.qkv, n_rows, heads(of), step.rope_layout, &ws.angles);
        }
        b.store_heads(&ws.qkv, k, v, cache, step.cache_shape, step.inputs);
        #[expect(
            clippy::cast_precision_loss,
            reason = "head dimensions are far below 2^24"
        )]
        let scale = (spec.head_dim as f32).powf(-0.5);
        let shape = AttentionShape {
            n_heads: spec.n_heads,
            scale,
        };
        b.attention(
            &ws.qkv,
            q,
            cache,
            step.cache_shape,
            shape,
            step.inputs,
            &mut ws.o,
        );
        self.o.run(b, &ws.o, n_rows, &mut ws.y);
    }
}

/// Multi-head latent attention in its absorbed form: the cache holds `kv_lora_rank + rope`
/// elements per position, and `kv_b_proj` is applied to queries and results instead of keys and
/// values (DeepSeek-V2, section 2.1.2). Prefill and decode are the same computation.
pub(super) struct Mla<B: Backend> {
    spec: MlaSpec,
    /// The compressed query, where there is one, then `[c | rope key]`.
    a: Linear<B>,
    query: MlaQuery<B>,
    kv_a_gain: B::Buffer,
    kv_b: KvExpansion<B>,
    o: Linear<B>,
}

/// `kv_b_proj`: from the latent to every head's keys and values.
enum KvExpansion<B: Backend> {
    /// As published: `[heads * (nope + v), rank]`.
    Joined(B::Weight),
    /// As GGUF files split it: keys transposed, `[heads * rank, nope]`, values `[heads * v, rank]`.
    Split { keys: B::Weight, values: B::Weight },
}

enum MlaQuery<B: Backend> {
    Direct(Linear<B>),
    Compressed {
        rank: usize,
        gain: B::Buffer,
        b: Linear<B>,
    },
}

impl<B: Backend> MlaQuery<B> {
    fn rank(&self) -> usize {
        match self {
            Self::Direct(_) => 0,
            Self::Compressed { rank, .. } => *rank,
        }
    }
}

impl<B: Backend> Mla<B> {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        backend: &B,
        decoder: &DecoderSpec,
        spec: &MlaSpec,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let hidden = decoder.hidden;
        let q_len = spec.n_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim);
        let gain = |name: &str, len| {
            let gain = checkpoint.vector(&format!("{prefix}.{name}.weight"), len)?;
            Ok::<_, ModelError>(backend.upload(&gain))
        };
        let linear = |parts: &[(&str, usize)], cols, bias| {
            Linear::load(checkpoint, backend, prefix, parts, cols, bias)
        };
        let kv_a = (
            "kv_a_proj_with_mqa",
            spec.kv_lora_rank + spec.qk_rope_head_dim,
        );
        let (a, query) = match spec.q_lora_rank {
            None => (
                linear(&[kv_a], hidden, spec.bias)?,
                MlaQuery::Direct(linear(&[("q_proj", q_len)], hidden, false)?),
            ),
            Some(rank) => (
                linear(&[("q_a_proj", rank), kv_a], hidden, spec.bias)?,
                MlaQuery::Compressed {
                    rank,
                    gain: gain("q_a_layernorm", rank)?,
                    b: linear(&[("q_b_proj", q_len)], rank, false)?,
                },
            ),
        };
        let matrix = |name: &str, rows, cols| {
            let name = format!("{prefix}.{name}.weight");
            Ok::<_, ModelError>(backend.latent_weight(checkpoint.matrix(&name, rows, cols)?))
        };
        let (n_heads, rank, nope) = (spec.n_heads, spec.kv_lora_rank, spec.qk_nope_head_dim);
        let kv_b = if checkpoint.contains(&format!("{prefix}.k_b_proj.weight")) {
            KvExpansion::Split {
                keys: matrix("k_b_proj", n_heads * rank, nope)?,
                values: matrix("v_b_proj", n_heads * spec.v_head_dim, rank)?,
            }
        } else {
            let n_rows = n_heads * (nope + spec.v_head_dim);
            KvExpansion::Joined(matrix("kv_b_proj", n_rows, rank)?)
        };
        Ok(Self {
            spec: spec.clone(),
            a,
            query,
            kv_a_gain: gain("kv_a_layernorm", spec.kv_lora_rank)?,
            kv_b,
            o: linear(
                &[("o_proj", hidden)],
                spec.n_heads * spec.v_head_dim,
                spec.bias,
            )?,
        })
    }

    pub(super) fn forward(
        &self,
        step: &StepContext<'_, B>,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
    ) {
        let (b, n_rows) = (step.backend, step.inputs.n_rows());
        let MlaSpec {
            n_heads,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            ..
        } = self.spec;
        let (head_len, row_len) = (
            qk_nope_head_dim + qk_rope_head_dim,
            kv_lora_rank + qk_rope_head_dim,
        );
        self.a.run(b, &ws.normed, n_rows, &mut ws.qkv);
        let q_len = self.query.rank();
        let rows = |offset, width| RowView {
            offset,
            stride: q_len + row_len,
            width,
        };
        let latent = rows(q_len, kv_lora_rank);
        b.rms_norm(
            &ws.qkv,
            latent,
            n_rows,
            &self.kv_a_gain,
            MLA_NORM_EPS,
            &mut ws.latent,
        );
        b.copy_rows(
            &ws.latent,
            RowView::dense(kv_lora_rank),
            &mut ws.qkv,
            latent,
            n_rows,
        );
        let shared_key = HeadView {
            offset: q_len + kv_lora_rank,
            row_stride: q_len + row_len,
            n_heads: 1,
            head_stride: 0,
            len: qk_rope_head_dim,
        };
        b.rope(
            &mut ws.qkv,
            n_rows,
            shared_key,
            step.rope_layout,
            &ws.angles,
        );
        b.store_latent(
            &ws.qkv,
            rows(q_len, row_len),
            cache,
            step.cache_shape,
            step.inputs,
        );
        match &self.query {
            MlaQuery::Direct(q) => q.run(b, &ws.normed, n_rows, &mut ws.q),
            MlaQuery::Compressed { rank, gain, b: q_b } => {
                let compressed = rows(0, *rank);
                b.rms_norm(&ws.qkv, compressed, n_rows, gain, MLA_NORM_EPS, &mut ws.q_a);
                q_b.run(b, &ws.q_a, n_rows, &mut ws.q);
            }
        }
        let rotated = HeadView {
            offset: qk_nope_head_dim,
            row_stride: n_heads * head_len,
            n_heads,
            head_stride: head_len,
            len: qk_rope_head_dim,
        };
        b.rope(&mut ws.q, n_rows, rotated, step.rope_layout, &ws.angles);
        let plain = HeadView {
            offset: 0,
            len: qk_nope_head_dim,
            ..rotated
        };
        let rows_per_head = qk_nope_head_dim + self.spec.v_head_dim;
        match &self.kv_b {
            KvExpansion::Joined(kv_b) => b.absorb_keys(
                &ws.q,
                plain,
                kv_b,
                rows_per_head,
                &mut ws.q_absorbed,
                row_len,
                n_rows,
            ),
            KvExpansion::Split { keys, .. } => {
                // Transposed, a key half is a linear layer of the head's plain part.
                let from = RowView {
                    offset: 0,
                    stride: head_len,
                    width: qk_nope_head_dim,
                };
                let to = RowView::dense(qk_nope_head_dim);
                b.copy_rows(&ws.q, from, &mut ws.o, to, n_rows * n_heads);
                let heads = ValueHeads {
                    n_heads,
                    rows_per_head: kv_lora_rank,
                    first_row: 0,
                    head_dim: kv_lora_rank,
                };
                b.expand_values(&ws.o, keys, heads, &mut ws.o_latent, n_rows);
                let from = RowView::dense(kv_lora_rank);
                let to = RowView {
                    offset: 0,
                    stride: row_len,
                    width: kv_lora_rank,
                };
                b.copy_rows(&ws.o_latent, from, &mut ws.q_absorbed, to, n_rows * n_heads);
            }
        }
        let from = RowView {
            offset: qk_nope_head_dim,
            stride: head_len,
            width: qk_rope_head_dim,
        };
        let to = RowView {
            offset: kv_lora_rank,
            stride: row_len,
            width: qk_rope_head_dim,
        };
        b.copy_rows(&ws.q, from, &mut ws.q_absorbed, to, n_rows * n_heads);

        let shape = AttentionShape {
            n_heads,
            scale: self.spec.softmax_scale,
        };
        b.attention(
            &ws.q_absorbed,
            RowView::dense(n_heads * row_len),
            cache,
            step.cache_shape,
            shape,
            step.inputs,
            &mut ws.o_latent,
        );
        let (kv_b, rows_per_head, first_row) = match &self.kv_b {
            KvExpansion::Joined(kv_b) => (kv_b, rows_per_head, qk_nope_head_dim),
            KvExpansion::Split { values, .. } => (values, self.spec.v_head_dim, 0),
        };
        let values = ValueHeads {
            n_heads,
            rows_per_head,
            first_row,
            head_dim: self.spec.v_head_dim,
        };
        b.expand_values(&ws.o_latent, kv_b, values, &mut ws.o, n_rows);
        self.o.run(b, &ws.o, n_rows, &mut ws.y);
    }
}

/// A layer's feed-forward part.
pub(super) enum Ffn<B: Backend> {
    Mlp(Mlp<B>),
    Moe(Moe<B>),
}

/// `down(silu(gate x) * up x)`.
pub(super) struct Mlp<B: Backend> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> Mlp<B> {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        backend: &B,
        hidden: usize,
        inter: usize,
        bias: bool,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let linear = |name: &str, rows, cols| {
            Linear::load(checkpoint, backend, prefix, &[(name, rows)], cols, bias)
        };
        Ok(Self {
            gate: linear("gate_proj", inter, hidden)?,
            up: linear("up_proj", inter, hidden)?,
            down: linear("down_proj", hidden, inter)?,
        })
    }

    pub(super) fn forward(&self, step: &StepContext<'_, B>, ws: &mut Workspace<B>) {
        let (b, n_rows) = (step.backend, step.inputs.n_rows());
        b.gated_linear(
            &ws.normed,
            n_rows,
            self.gate.parts(),
            self.up.parts(),
            &mut ws.gate,
            &mut ws.up,
        );
        self.down.run(b, &ws.gate, n_rows, &mut ws.y);
    }
}

/// Routed experts on top of the shared one.
pub(super) struct Moe<B: Backend> {
    spec: MoeSpec,
    hidden: usize,
    gate: Linear<B>,
    /// `e_score_correction_bias`.
    gate_bias: Option<B::Buffer>,
    experts: Vec<Expert<B::Weight>>,
    shared: Option<Mlp<B>>,
}

impl<B: Backend> Moe<B> {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        backend: &B,
        hidden: usize,
        spec: &MoeSpec,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let n_experts = spec.gate.n_experts;
        let gate_bias = if spec.gate_bias {
            let name = format!("{prefix}.gate.e_score_correction_bias");
            Some(backend.upload(&checkpoint.vector(&name, n_experts)?))
        } else {
            None
        };
        let expert = |index: usize| {
            let matrix = |name: &str, rows, cols| {
                let name = format!("{prefix}.experts.{index}.{name}.weight");
                Ok::<_, ModelError>(backend.weight(vec![checkpoint.matrix(&name, rows, cols)?]))
            };
            Ok::<_, ModelError>(Expert {
                gate: matrix("gate_proj", spec.inter, hidden)?,
                up: matrix("up_proj", spec.inter, hidden)?,
                down: matrix("down_proj", hidden, spec.inter)?,
            })
        };
        let shared = spec.shared_inter.map(|inter| {
            let prefix = format!("{prefix}.shared_experts");
            Mlp::load(checkpoint, backend, hidden, inter, false, &prefix)
        });
        Ok(Self {
            spec: spec.clone(),
            hidden,
            gate: Linear::load(
                checkpoint,
                backend,
                prefix,
                &[("gate", n_experts)],
                hidden,
                false,
            )?,
            gate_bias,
            experts: (0..n_experts).map(expert).collect::<Result<_, _>>()?,
            shared: shared.transpose()?,
        })
    }

    pub(super) fn forward(&self, step: &StepContext<'_, B>, ws: &mut Workspace<B>) {
        let (b, n_rows) = (step.backend, step.inputs.n_rows());
        match &self.shared {
            Some(shared) => shared.forward(step, ws),
            None => b.clear(&mut ws.y, n_rows * self.hidden),
        }
        self.gate.run(b, &ws.normed, n_rows, &mut ws.gate_logits);
        if let Some(routes) = &mut ws.routes {
            b.gate(
                &ws.gate_logits,
                n_rows,
                self.spec.gate,
                self.gate_bias.as_ref(),
                routes,
            );
            b.experts(&ws.normed, n_rows, &self.experts, routes, &mut ws.y);
        }
    }
}
