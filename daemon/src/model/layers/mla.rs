//! Multi-head latent attention (DeepSeek-V2, section 2.1).

use dsd_kernels::backend::{AttentionShape, Backend, HeadRows, HeadView, RowView, WeightStore};

use super::{
    super::{ModelError, spec::MlaSpec, workspace::Workspace},
    Gathered, Linear, Loading, Part, StepContext,
};
use crate::{
    collective::{Collective, Missing, Op},
    weights::{Cut, Role},
};

/// Epsilon of MLA's two inner norms: a constant in the published code, whatever `rms_norm_eps` is.
const MLA_NORM_EPS: f32 = 1e-6;

/// Multi-head latent attention in its absorbed form: the cache holds `kv_lora_rank + rope`
/// elements per position, and `kv_b_proj` is applied to queries and results instead of keys and
/// values (DeepSeek-V2, section 2.1.2). Prefill and decode are the same computation.
pub(in crate::model) struct Mla<B: WeightStore> {
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
    pub(in crate::model) fn load(
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
        let expansion = |name: &str, rows_per_head, n_cols, role| {
            let n_rows = n_heads * rows_per_head;
            let cut = Cut::rows(&per_head(rows_per_head), n_rows);
            let matrix = from.matrix(&format!("{prefix}.{name}"), [n_rows, n_cols], &cut, role)?;
            Ok::<_, ModelError>(match role {
                Role::Linear => from.store.weight(vec![matrix]),
                Role::Latent => from.store.latent_weight(matrix),
            })
        };
        let kv_b = if from.source.contains(&format!("{prefix}.k_b_proj.weight")) {
            KvExpansion::Split {
                keys: expansion("k_b_proj", rank, nope, Role::Linear)?,
                values: expansion("v_b_proj", full.v_head_dim, rank, Role::Linear)?,
            }
        } else {
            let rows_per_head = nope + full.v_head_dim;
            KvExpansion::Joined(expansion("kv_b_proj", rows_per_head, rank, Role::Latent)?)
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
    pub(in crate::model) fn forward(
        &self,
        step: &mut StepContext<'_, B>,
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
            step.spec.rope_layout,
            &ws.angles,
        );
        b.store_latent(
            &ws.qkv,
            rows(q_len, row_len),
            cache,
            step.cache_shape,
            step.inputs,
        );
        step.stored(ws, q_len + row_len);
        let n_rows = step.inputs.n_rows();
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
        b.rope(
            &mut ws.q,
            n_rows,
            rotated,
            step.spec.rope_layout,
            &ws.angles,
        );
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
                let rows = HeadRows {
                    rows_per_head: kv_lora_rank,
                    first_row: 0,
                };
                let absorbed = HeadView {
                    offset: 0,
                    row_stride: n_heads * row_len,
                    n_heads,
                    head_stride: row_len,
                    len: kv_lora_rank,
                };
                b.per_head_linear(
                    &ws.q,
                    plain,
                    n_rows,
                    keys,
                    rows,
                    &mut ws.q_absorbed,
                    absorbed,
                );
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
        let rows = HeadRows {
            rows_per_head,
            first_row,
        };
        let dense = |len| HeadView {
            offset: 0,
            row_stride: n_heads * len,
            n_heads,
            head_stride: len,
            len,
        };
        b.per_head_linear(
            &ws.o_latent,
            dense(kv_lora_rank),
            n_rows,
            kv_b,
            rows,
            &mut ws.o,
            dense(self.spec.v_head_dim),
        );
        self.o.run(b, &ws.o, n_rows, &mut ws.y);
        Ok(())
    }
}
