//! The forward pass: embedding, layers, and logits of the rows that are wanted.

use dsd_kernels::backend::{Backend, CacheShape, RowView, StepInputs};

use super::{
    layers::{Attention, Ffn, StepContext},
    spec::DecoderSpec,
    workspace::Workspace,
};

/// A model's weights in a backend's hands.
pub struct Decoder<B: Backend> {
    pub(super) spec: DecoderSpec,
    pub(super) embedding: B::Weight,
    pub(super) layers: Vec<Layer<B>>,
    /// Gain of the last norm.
    pub(super) norm: B::Buffer,
    /// Output layer; `None` where it is the embedding.
    pub(super) head: Option<B::Weight>,
}

/// `x += attention(norm x); x += ffn(norm x)`.
pub(super) struct Layer<B: Backend> {
    pub(super) attention_norm: B::Buffer,
    pub(super) attention: Attention<B>,
    pub(super) ffn_norm: B::Buffer,
    pub(super) ffn: Ffn<B>,
}

impl<B: Backend> Decoder<B> {
    /// What it is made of.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Runs a step: stores keys and values of its rows in `caches` (one per layer) and leaves the
    /// logits of `logit_rows` in the workspace, in that order.
    pub fn forward<'w>(
        &self,
        backend: &B,
        inputs: &StepInputs<'_>,
        logit_rows: &[usize],
        cache_shape: CacheShape,
        caches: &mut [B::Cache],
        ws: &'w mut Workspace<B>,
    ) -> &'w mut B::Buffer {
        let (spec, n_rows) = (&self.spec, inputs.n_rows());
        let dense = RowView::dense(spec.hidden);
        let step = StepContext {
            backend,
            inputs,
            rms_norm_eps: spec.rms_norm_eps,
            rope_layout: spec.rope_layout,
            cache_shape,
        };
        backend.embed(&self.embedding, inputs.tokens, &mut ws.x);
        let rope = &spec.rope;
        backend.rope_angles(
            &rope.inverse_frequencies,
            rope.factor,
            inputs,
            &mut ws.angles,
        );
        for (layer, cache) in self.layers.iter().zip(caches) {
            let eps = spec.rms_norm_eps;
            backend.rms_norm(
                &ws.x,
                dense,
                n_rows,
                &layer.attention_norm,
                eps,
                &mut ws.normed,
            );
            match &layer.attention {
                Attention::Gqa(attention) => attention.forward(&step, cache, ws),
                Attention::Mla(attention) => attention.forward(&step, cache, ws),
            }
            backend.add(&mut ws.x, &ws.y, n_rows, spec.hidden);
            backend.rms_norm(&ws.x, dense, n_rows, &layer.ffn_norm, eps, &mut ws.normed);
            match &layer.ffn {
                Ffn::Mlp(ffn) => ffn.forward(&step, ws),
                Ffn::Moe(ffn) => ffn.forward(&step, ws),
            }
            backend.add(&mut ws.x, &ws.y, n_rows, spec.hidden);
        }
        let n = logit_rows.len();
        let [raw, normed] = &mut ws.last;
        backend.gather_rows(&ws.x, logit_rows, spec.hidden, raw);
        backend.rms_norm(raw, dense, n, &self.norm, spec.rms_norm_eps, normed);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        backend.linear(normed, n, head, None, &mut ws.logits);
        &mut ws.logits
    }
}
