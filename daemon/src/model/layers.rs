//! The blocks of a layer: attention and feed-forward parts, with their weights.
//!
//! Each `forward` reads `ws.normed` and leaves the block's output in `ws.y`.

use std::ops::Range;

use dsd_kernels::{
    backend::{
        AttentionShape, Backend, CacheShape, Expert, HeadView, RopeLayout, RowView, StepInputs,
        ValueHeads, WeightStore,
    },
    matrix::Matrix,
};

use super::{
    ModelError,
    spec::{GqaSpec, MlaSpec, MoeSpec},
    split::{FfnSplit, Split},
    workspace::Workspace,
};
use crate::{
    collective::{Collective, Missing, Op, Site},
    weights::{Cut, Role, TensorSource, WeightsError},
};

/// Epsilon of MLA's two inner norms: a constant in the published code, whatever `rms_norm_eps` is.
const MLA_NORM_EPS: f32 = 1e-6;

/// What every block of a step needs besides its own weights.
pub(super) struct StepContext<'a, B> {
    pub(super) backend: &'a B,
    pub(super) inputs: &'a StepInputs<'a>,
    pub(super) rms_norm_eps: f32,
    pub(super) rope_layout: RopeLayout,
    pub(super) cache_shape: CacheShape,
    /// The layer, to name where ranks meet.
    pub(super) layer: usize,
}

impl<B> StepContext<'_, B> {
    /// A place in this layer.
    pub(super) fn site(&self, op: Op) -> Site {
        Site {
            layer: self.layer,
            op,
        }
    }
}

/// Where a layer's tensors come from and go to, and which piece of them is this rank's.
pub(super) struct Loading<'a, B> {
    pub(super) source: &'a dyn TensorSource,
    pub(super) store: &'a B,
    pub(super) split: &'a Split,
}

impl<B: WeightStore> Loading<'_, B> {
    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        cut: &Cut,
        role: Role,
    ) -> Result<Matrix, WeightsError> {
        let name = format!("{name}.weight");
        self.source.matrix(&name, shape, cut, role)
    }

    /// A vector that every rank has whole.
    pub(super) fn gain(&self, name: &str, len: usize) -> Result<B::Buffer, WeightsError> {
        let values = self.source.vector(&format!("{name}.weight"), len, 0..len)?;
        Ok(self.store.upload(&values))
    }

    fn weight(&self, name: &str, shape: [usize; 2], cut: &Cut) -> Result<B::Weight, WeightsError> {
        let matrix = self.matrix(name, shape, cut, Role::Linear)?;
        Ok(self.store.weight(vec![matrix]))
    }
}

/// One matrix among the parts of a [`Linear`] that is cut by rows.
struct Part<'a> {
    name: &'a str,
    /// Rows of the whole matrix.
    n_rows: usize,
    /// This rank's.
    rows: Range<usize>,
}

/// A projection with its bias.
pub(super) struct Linear<B: WeightStore> {
    weight: B::Weight,
    bias: Option<B::Buffer>,
}

impl<B: WeightStore> Linear<B> {
    /// This rank's rows of `{prefix}.{name}.weight`, `[n_rows, n_cols]`, of every part, as one layer.
    fn by_rows(
        from: &Loading<'_, B>,
        prefix: &str,
        parts: &[Part<'_>],
        n_cols: usize,
        bias: bool,
    ) -> Result<Self, WeightsError> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for Part { name, n_rows, rows } in parts {
            let name = format!("{prefix}.{name}");
            let cut = Cut::rows(rows, *n_rows);
            weights.push(from.matrix(&name, [*n_rows, n_cols], &cut, Role::Linear)?);
            if bias {
                let name = format!("{name}.bias");
                biases.extend(from.source.vector(&name, *n_rows, rows.clone())?);
            }
        }
        Ok(Self {
            weight: from.store.weight(weights),
            bias: bias.then(|| from.store.upload(&biases)),
        })
    }

    /// This rank's columns of `{name}.weight`, `[n_rows, n_cols]`. The ranks' outputs add up, so the
    /// bias is the first one's.
    fn by_cols(
        from: &Loading<'_, B>,
        name: &str,
        [n_rows, n_cols]: [usize; 2],
        cols: &Range<usize>,
        bias: bool,
    ) -> Result<Self, WeightsError> {
        let weight = from.weight(name, [n_rows, n_cols], &Cut::cols(cols, n_cols))?;
        let values = match bias {
            true => Some(
                from.source
                    .vector(&format!("{name}.bias"), n_rows, 0..n_rows)?,
            ),
            false => None,
        };
        let bias = values.filter(|_| from.split.is_first());
        Ok(Self {
            weight,
            bias: bias.map(|values| from.store.upload(&values)),
        })
    }
}

impl<B: Backend> Linear<B> {
    fn run(&self, backend: &B, x: &B::Buffer, n_rows: usize, out: &mut B::Buffer) {
        backend.linear(x, n_rows, &self.weight, self.bias.as_ref(), out);
    }

    fn parts(&self) -> (&B::Weight, Option<&B::Buffer>) {
        (&self.weight, self.bias.as_ref())
    }
}

/// A projection whose outputs every rank needs: each computes some of them, and they are gathered.
struct Gathered<B: WeightStore> {
    /// This rank's rows.
    linear: Linear<B>,
    /// The rows of every rank; none where this rank computes them all.
    columns: Vec<Range<usize>>,
    /// This rank's number of rows.
    n_own: usize,
}

impl<B: WeightStore> Gathered<B> {
    /// All of `{prefix}.{name}.weight`, `[n_rows, n_cols]`, of every part, as one layer.
    fn load(
        from: &Loading<'_, B>,
        prefix: &str,
        parts: &[(&str, usize)],
        n_cols: usize,
        bias: bool,
    ) -> Result<Self, WeightsError> {
        let n_rows = parts.iter().map(|(_, n_rows)| n_rows).sum::<usize>();
        let columns = from.split.gathered(n_rows);
        let own = match &columns {
            Some(columns) => columns[from.split.of.rank].clone(),
            None => 0..n_rows,
        };
        let mut first = 0;
        let mut pieces = Vec::new();
        for (name, n_rows) in parts {
            let within = |row: usize| row.clamp(first, first + n_rows) - first;
            let rows = within(own.start)..within(own.end);
            first += n_rows;
            if rows.is_empty() {
                let name = format!("{prefix}.{name}.weight");
                from.source.skip(&name, [*n_rows, n_cols])?;
                continue;
            }
            pieces.push(Part {
                name,
                n_rows: *n_rows,
                rows,
            });
        }
        Ok(Self {
            linear: Linear::by_rows(from, prefix, &pieces, n_cols, bias)?,
            columns: columns.unwrap_or_default(),
            n_own: own.len(),
        })
    }
}

impl<B: Backend> Gathered<B> {
    /// `scratch` has room for this rank's outputs.
    fn run(
        &self,
        step: &StepContext<'_, B>,
        x: &B::Buffer,
        scratch: &mut B::Buffer,
        out: &mut B::Buffer,
        group: &mut Collective,
        site: Site,
    ) -> Result<(), Missing> {
        let (b, n_rows) = (step.backend, step.inputs.n_rows());
        let Some(last) = self.columns.last() else {
            self.linear.run(b, x, n_rows, out);
            return Ok(());
        };
        self.linear.run(b, x, n_rows, scratch);
        let local = b.download(scratch, n_rows * self.n_own);
        let out = b.download(out, n_rows * last.end);
        group.gather_columns(site, local, &self.columns, n_rows, Some(out))
    }
}

/// A layer's attention.
pub(super) enum Attention<B: WeightStore> {
    Gqa(Gqa<B>),
    Mla(Mla<B>),
}

/// Grouped-query attention.
pub(super) struct Gqa<B: WeightStore> {
    spec: GqaSpec,
    /// Queries, keys and values side by side.
    qkv: Linear<B>,
    o: Linear<B>,
    /// Gains of the per-head norms of queries and keys.
    qk_norm: Option<[B::Buffer; 2]>,
}

impl<B: WeightStore> Gqa<B> {
    /// This rank's heads; `full` and `local` are the layer's sizes and this rank's.
    pub(super) fn load(
        from: &Loading<'_, B>,
        full: &GqaSpec,
        local: &GqaSpec,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let (hidden, head_dim) = (from.split.full.hidden, full.head_dim);
        let of_heads = |heads: &Range<usize>| heads.start * head_dim..heads.end * head_dim;
        let (q, kv) = (of_heads(&from.split.heads), of_heads(&from.split.kv_heads));
        let (q_len, kv_len) = (full.n_heads * head_dim, full.n_kv_heads * head_dim);
        let part = |name, n_rows, rows: &Range<usize>| Part {
            name,
            n_rows,
            rows: rows.clone(),
        };
        let norm = |name: &str| from.gain(&format!("{prefix}.{name}"), head_dim);
        Ok(Self {
            spec: local.clone(),
            qkv: Linear::by_rows(
                from,
                prefix,
                &[
                    part("q_proj", q_len, &q),
                    part("k_proj", kv_len, &kv),
                    part("v_proj", kv_len, &kv),
                ],
                hidden,
                full.qkv_bias,
            )?,
            o: Linear::by_cols(
                from,
                &format!("{prefix}.o_proj"),
                [hidden, q_len],
                &q,
                full.output_bias,
            )?,
            qk_norm: if full.qk_norm {
                Some([norm("q_norm")?, norm("k_norm")?])
            } else {
                None
            },
        })
    }
}

impl<B: Backend> Gqa<B> {
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
pub(super) struct Mla<B: WeightStore> {
    spec: MlaSpec,
    /// The compressed query, where there is one, then `[c | rope key]`.
    a: Gathered<B>,
    query: MlaQuery<B>,
    kv_a_gain: B::Buffer,
    kv_b: KvExpansion<B>,
    o: Linear<B>,
}

/// `kv_b_proj`: from the latent to every head's keys and values.
enum KvExpansion<B: WeightStore> {
    /// As published: `[heads * (nope + v), rank]`.
    Joined(B::Weight),
    /// As GGUF files split it: keys transposed, `[heads * rank, nope]`, values `[heads * v, rank]`.
    Split { keys: B::Weight, values: B::Weight },
}

enum MlaQuery<B: WeightStore> {
    Direct(Linear<B>),
    Compressed {
        rank: usize,
        gain: B::Buffer,
        b: Linear<B>,
    },
}

impl<B: WeightStore> MlaQuery<B> {
    fn rank(&self) -> usize {
        match self {
            Self::Direct(_) => 0,
            Self::Compressed { rank, .. } => *rank,
        }
    }
}

impl<B: WeightStore> Mla<B> {
    /// This rank's heads; `full` and `local` are the layer's sizes and this rank's. What is before
    /// the heads is the same on every rank.
    pub(super) fn load(
        from: &Loading<'_, B>,
        full: &MlaSpec,
        local: &MlaSpec,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let hidden = from.split.full.hidden;
        let (n_heads, rank, nope) = (full.n_heads, full.kv_lora_rank, full.qk_nope_head_dim);
        let per_head = |len: usize| {
            let heads = &from.split.heads;
            heads.start * len..heads.end * len
        };
        let gain = |name: &str, len| from.gain(&format!("{prefix}.{name}"), len);
        let linear =
            |parts: &[Part<'_>], n_cols, bias| Linear::by_rows(from, prefix, parts, n_cols, bias);
        let q_head = nope + full.qk_rope_head_dim;
        let q = |name| Part {
            name,
            n_rows: n_heads * q_head,
            rows: per_head(q_head),
        };
        let kv_a = ("kv_a_proj_with_mqa", rank + full.qk_rope_head_dim);
        let before =
            |parts: &[(&str, usize)]| Gathered::load(from, prefix, parts, hidden, full.bias);
        let (a, query) = match full.q_lora_rank {
            None => (
                before(&[kv_a])?,
                MlaQuery::Direct(linear(&[q("q_proj")], hidden, false)?),
            ),
            Some(q_rank) => (
                before(&[("q_a_proj", q_rank), kv_a])?,
                MlaQuery::Compressed {
                    rank: q_rank,
                    gain: gain("q_a_layernorm", q_rank)?,
                    b: linear(&[q("q_b_proj")], q_rank, false)?,
                },
            ),
        };
        let expansion = |name: &str, rows_per_head, n_cols| {
            let n_rows = n_heads * rows_per_head;
            let cut = Cut::rows(&per_head(rows_per_head), n_rows);
            let name = format!("{prefix}.{name}");
            let matrix = from.matrix(&name, [n_rows, n_cols], &cut, Role::Latent)?;
            Ok::<_, ModelError>(from.store.latent_weight(matrix))
        };
        let kv_b = if from.source.contains(&format!("{prefix}.k_b_proj.weight")) {
            KvExpansion::Split {
                keys: expansion("k_b_proj", rank, nope)?,
                values: expansion("v_b_proj", full.v_head_dim, rank)?,
            }
        } else {
            KvExpansion::Joined(expansion("kv_b_proj", nope + full.v_head_dim, rank)?)
        };
        Ok(Self {
            spec: local.clone(),
            a,
            query,
            kv_a_gain: gain("kv_a_layernorm", rank)?,
            kv_b,
            o: Linear::by_cols(
                from,
                &format!("{prefix}.o_proj"),
                [hidden, n_heads * full.v_head_dim],
                &per_head(full.v_head_dim),
                full.bias,
            )?,
        })
    }
}

impl<B: Backend> Mla<B> {
    pub(super) fn forward(
        &self,
        step: &StepContext<'_, B>,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
        group: &mut Collective,
    ) -> Result<(), Missing> {
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
        self.a.run(
            step,
            &ws.normed,
            &mut ws.y,
            &mut ws.qkv,
            group,
            step.site(Op::Latent),
        )?;
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
        Ok(())
    }
}

/// A layer's feed-forward part.
pub(super) enum Ffn<B: WeightStore> {
    Mlp(Mlp<B>),
    Moe(Moe<B>),
}

/// `down(silu(gate x) * up x)`.
pub(super) struct Mlp<B: WeightStore> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: WeightStore> Mlp<B> {
    /// Columns `range` of the `inter` inside.
    pub(super) fn load(
        from: &Loading<'_, B>,
        inter: usize,
        range: &Range<usize>,
        bias: bool,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let hidden = from.split.full.hidden;
        let into = |name| {
            let part = Part {
                name,
                n_rows: inter,
                rows: range.clone(),
            };
            Linear::by_rows(from, prefix, &[part], hidden, bias)
        };
        let down = format!("{prefix}.down_proj");
        Ok(Self {
            gate: into("gate_proj")?,
            up: into("up_proj")?,
            down: Linear::by_cols(from, &down, [hidden, inter], range, bias)?,
        })
    }
}

impl<B: Backend> Mlp<B> {
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
pub(super) struct Moe<B: WeightStore> {
    spec: MoeSpec,
    hidden: usize,
    gate: Gathered<B>,
    /// `e_score_correction_bias`.
    gate_bias: Option<B::Buffer>,
    experts: Vec<Expert<B::Weight>>,
    shared: Option<Mlp<B>>,
}

impl<B: WeightStore> Moe<B> {
    /// This rank's part of every expert; `full` and `local` are the layer's sizes and this rank's.
    pub(super) fn load(
        from: &Loading<'_, B>,
        full: &MoeSpec,
        local: &MoeSpec,
        ranges: &FfnSplit,
        prefix: &str,
    ) -> Result<Self, ModelError> {
        let (hidden, n_experts, inter) = (from.split.full.hidden, full.gate.n_experts, full.inter);
        let gate_bias = if full.gate_bias {
            let name = format!("{prefix}.gate.e_score_correction_bias");
            let values = from.source.vector(&name, n_experts, 0..n_experts)?;
            Some(from.store.upload(&values))
        } else {
            None
        };
        let expert = |index: usize| {
            let name = |part: &str| format!("{prefix}.experts.{index}.{part}");
            let rows = Cut::rows(&ranges.inter, inter);
            let cols = Cut::cols(&ranges.inter, inter);
            Ok::<_, ModelError>(Expert {
                gate: from.weight(&name("gate_proj"), [inter, hidden], &rows)?,
                up: from.weight(&name("up_proj"), [inter, hidden], &rows)?,
                down: from.weight(&name("down_proj"), [hidden, inter], &cols)?,
            })
        };
        let shared = full.shared_inter.map(|inter| {
            let prefix = format!("{prefix}.shared_experts");
            Mlp::load(from, inter, &ranges.shared, false, &prefix)
        });
        Ok(Self {
            spec: local.clone(),
            hidden,
            gate: Gathered::load(from, prefix, &[("gate", n_experts)], hidden, false)?,
            gate_bias,
            experts: (0..n_experts).map(expert).collect::<Result<_, _>>()?,
            shared: shared.transpose()?,
        })
    }
}

impl<B: Backend> Moe<B> {
    pub(super) fn forward(
        &self,
        step: &StepContext<'_, B>,
        ws: &mut Workspace<B>,
        group: &mut Collective,
    ) -> Result<(), Missing> {
        let (b, n_rows) = (step.backend, step.inputs.n_rows());
        self.gate.run(
            step,
            &ws.normed,
            &mut ws.y,
            &mut ws.gate_logits,
            group,
            step.site(Op::Gate),
        )?;
        match &self.shared {
            Some(shared) => shared.forward(step, ws),
            None => b.clear(&mut ws.y, n_rows * self.hidden),
        }
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
        Ok(())
    }
}
