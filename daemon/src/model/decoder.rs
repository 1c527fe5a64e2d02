//! The forward pass: embedding, layers, and logits of the rows that are wanted.

use dsd_kernels::backend::{Backend, CacheShape, RowView, StepInputs, WeightStore};

use super::{
    layers::{Attention, Ffn, StepContext},
    spec::DecoderSpec,
    workspace::Workspace,
};
use crate::collective::{Collective, Missing, Op, Site};

/// One rank's part of a model's weights in a backend's hands.
pub struct Decoder<B: WeightStore> {
    /// This rank's sizes.
    pub(super) spec: DecoderSpec,
    /// This rank's rows of the embedding.
    pub(super) embedding: B::Weight,
    /// The token of its first row.
    pub(super) first_token: usize,
    pub(super) layers: Vec<Layer<B>>,
    /// Gain of the last norm.
    pub(super) norm: B::Buffer,
    /// Output layer; `None` where it is the embedding.
    pub(super) head: Option<B::Weight>,
}

/// `x += attention(norm x); x += ffn(norm x)`.
pub(super) struct Layer<B: WeightStore> {
    pub(super) attention_norm: B::Buffer,
    pub(super) attention: Attention<B>,
    pub(super) ffn_norm: B::Buffer,
    pub(super) ffn: Ffn<B>,
}

impl<B: WeightStore> Decoder<B> {
    /// What this rank's part is made of.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }
}

impl<B: Backend> Decoder<B> {
    /// Runs a step: stores keys and values of its rows in `caches` (one per layer) and leaves the
    /// logits of `logit_rows` in the workspace, in that order, this rank's columns of each. The
    /// residual stream is the same on every rank; what the halves of a layer add to it is summed over
    /// them.
    ///
    /// # Errors
    /// [`Missing`] when another rank did not arrive.
    pub fn forward<'w>(
        &self,
        backend: &B,
        inputs: &StepInputs<'_>,
        logit_rows: &[usize],
        cache_shape: CacheShape,
        caches: &mut [B::Cache],
        ws: &'w mut Workspace<B>,
        group: &mut Collective,
    ) -> Result<&'w mut B::Buffer, Missing> {
        let (spec, n_rows) = (&self.spec, inputs.n_rows());
        let dense = RowView::dense(spec.hidden);
        let mut step = StepContext {
            backend,
            inputs,
            rms_norm_eps: spec.rms_norm_eps,
            rope_layout: spec.rope_layout,
            cache_shape,
            layer: 0,
        };
        let n_elements = n_rows * spec.hidden;
        backend.embed(&self.embedding, self.first_token, inputs.tokens, &mut ws.x);
        let x = backend.download(&mut ws.x, n_elements);
        group.all_reduce(Site::outside(Op::Embedding), x)?;
        let rope = &spec.rope;
        backend.rope_angles(
            &rope.inverse_frequencies,
            rope.factor,
            inputs,
            &mut ws.angles,
        );
        let eps = spec.rms_norm_eps;
        let first = self
            .layers
            .first()
            .map_or(&self.norm, |l| &l.attention_norm);
        backend.rms_norm(&ws.x, dense, n_rows, first, eps, &mut ws.normed);
        let add_and_norm = |ws: &mut Workspace<B>, gain: &B::Buffer| {
            let (x, y) = (&mut ws.x, &ws.y);
            backend.add_rms_norm(x, y, n_rows, spec.hidden, gain, eps, &mut ws.normed);
        };
        for (index, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            step.layer = index;
            match &layer.attention {
                Attention::Gqa(attention) => attention.forward(&step, cache, ws),
                Attention::Mla(attention) => attention.forward(&step, cache, ws, group)?,
            }
            let y = backend.download(&mut ws.y, n_elements);
            group.all_reduce(step.site(Op::Attention), y)?;
            add_and_norm(ws, &layer.ffn_norm);
            match &layer.ffn {
                Ffn::Mlp(ffn) => ffn.forward(&step, ws),
                Ffn::Moe(ffn) => ffn.forward(&step, ws, group)?,
            }
            let y = backend.download(&mut ws.y, n_elements);
            group.all_reduce(step.site(Op::FeedForward), y)?;
            // Behind the last layer that norms rows whose logits nobody wants, too: cheaper than one pass
            // more over the others.
            let next = self.layers.get(index + 1);
            add_and_norm(ws, next.map_or(&self.norm, |l| &l.attention_norm));
        }
        let n = logit_rows.len();
        backend.gather_rows(&ws.normed, logit_rows, spec.hidden, &mut ws.last);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        backend.linear(&ws.last, n, head, None, &mut ws.logits);
        Ok(&mut ws.logits)
    }
}
