//! Grouped-query attention (Ainslie et al. 2023).

use std::ops::Range;

use dsd_kernels::backend::{AttentionShape, Backend, HeadView, RowView, WeightStore};

use super::{
    super::{ModelError, spec::GqaSpec, workspace::Workspace},
    Linear, Loading, Part, StepContext,
};

/// Grouped-query attention.
pub(in crate::model) struct Gqa<B: WeightStore> {
    spec: GqaSpec,
    /// Queries, keys and values side by side.
    qkv: Linear<B>,
    o: Linear<B>,
    /// Gains of the per-head norms of queries and keys.
    qk_norm: Option<[B::Buffer; 2]>,
}

impl<B: WeightStore> Gqa<B> {
    /// This rank's heads; `full` and `local` are the layer's sizes and this rank's.
    pub(in crate::model) fn load(
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
    pub(in crate::model) fn forward(
        &self,
        step: &mut StepContext<'_, B>,
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
                b.rms_norm_heads(&mut ws.qkv, n_rows, heads(of), gain, step.spec.rms_norm_eps);
            }
        }
        // Keys lie behind the queries, head after head.
        let rotated = heads(rows(0, q_len + kv_len));
        b.rope(
            &mut ws.qkv,
            n_rows,
            rotated,
            step.spec.rope_layout,
            &ws.angles,
        );
        b.store_heads(&ws.qkv, k, v, cache, step.cache_shape, step.inputs);
        step.stored(ws, q.stride);
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
        self.o.run(b, &ws.o, step.inputs.n_rows(), &mut ws.y);
    }
}
