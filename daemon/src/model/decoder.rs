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

/// What a step computes.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Every row: keys and values of all are stored.
    pub rows: StepInputs<'a>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [usize],
    /// Those rows alone.
    pub last: StepInputs<'a>,
}

impl<B: Backend> Decoder<B> {
    /// Runs a step: stores keys and values of its rows in `caches` (one per layer) and leaves the
    /// logits of `logit_rows` in the workspace, in that order, this rank's columns of each. The
    /// residual stream is the same on every rank; what the halves of a layer add to it is summed over
    /// them. Behind the keys and values of the last layer only rows whose logits are wanted go on.
    ///
    /// # Errors
    /// [`Missing`] when another rank did not arrive.
    pub fn forward<'w>(
        &self,
        backend: &B,
        Step {
            rows,
            logit_rows,
            last,
        }: Step<'_>,
        cache_shape: CacheShape,
        caches: &mut [B::Cache],
        ws: &'w mut Workspace<B>,
        group: &mut Collective,
    ) -> Result<&'w mut B::Buffer, Missing> {
        let spec = &self.spec;
        let mut step = StepContext {
            backend,
            spec,
            inputs: &rows,
            last: None,
            cache_shape,
            layer: 0,
        };
        backend.embed(&self.embedding, self.first_token, rows.tokens, &mut ws.x);
        let x = backend.download(&mut ws.x, rows.n_rows() * spec.hidden);
        group.all_reduce(Site::outside(Op::Embedding), x)?;
        let rope = &spec.rope;
        backend.rope_angles(
            &rope.inverse_frequencies,
            rope.factor,
            &rows,
            &mut ws.angles,
        );
        let eps = spec.rms_norm_eps;
        let (dense, n_rows) = (RowView::dense(spec.hidden), rows.n_rows());
        let gain = &self.layers[0].attention_norm;
        backend.rms_norm(&ws.x, dense, n_rows, gain, eps, &mut ws.normed);
        for (index, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            let next = self.layers.get(index + 1);
            step.layer = index;
            step.last = next.is_none().then_some((logit_rows, &last));
            match &layer.attention {
                Attention::Gqa(attention) => attention.forward(&mut step, cache, ws),
                Attention::Mla(attention) => attention.forward(&mut step, cache, ws, group)?,
            }
            self.add(&step, ws, group, Op::Attention, &layer.ffn_norm)?;
            match &layer.ffn {
                Ffn::Mlp(ffn) => ffn.forward(&step, ws),
                Ffn::Moe(ffn) => ffn.forward(&step, ws, group)?,
            }
            let gain = next.map_or(&self.norm, |l| &l.attention_norm);
            self.add(&step, ws, group, Op::FeedForward, gain)?;
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let n = logit_rows.len();
        backend.linear(&ws.normed, n, head, None, &mut ws.logits);
        Ok(&mut ws.logits)
    }

    /// Adds the ranks' parts of what half a layer computed to the residual stream, and norms that.
    fn add(
        &self,
        step: &StepContext<'_, B>,
        ws: &mut Workspace<B>,
        group: &mut Collective,
        half: Op,
        gain: &B::Buffer,
    ) -> Result<(), Missing> {
        let (b, n_rows, width) = (step.backend, step.inputs.n_rows(), self.spec.hidden);
        let y = b.download(&mut ws.y, n_rows * width);
        group.all_reduce(step.site(half), y)?;
        let (x, eps) = (&mut ws.x, self.spec.rms_norm_eps);
        b.add_rms_norm(x, &ws.y, n_rows, width, gain, eps, &mut ws.normed);
        Ok(())
    }
}
