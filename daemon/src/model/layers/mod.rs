//! The blocks of a layer: attention and feed-forward parts, with their weights. Here is what they
//! share: where weights come from, projections, and where ranks meet.
//!
//! Each block's `forward` reads `ws.normed` and leaves this rank's part of its output in `ws.y`.

mod gqa;
mod mla;
mod ffn;

pub(super) use self::{
    ffn::{Mlp, Moe},
    gqa::Gqa,
    mla::Mla,
};

use std::ops::Range;

use dsd_kernels::{
    backend::{Backend, CacheShape, StepInputs, WeightStore},
    matrix::Matrix,
};

use super::{spec::DecoderSpec, split::Split, workspace::Workspace};
use crate::{
    collective::{Collective, Missing, Op, Site},
    weights::{Cut, Role, TensorSource, WeightsError},
};

/// What every block of a step needs besides its own weights.
pub(super) struct StepContext<'a, B> {
    pub(super) backend: &'a B,
    pub(super) spec: &'a DecoderSpec,
    /// The rows that matter from here on.
    pub(super) inputs: &'a StepInputs<'a>,
    /// In the last layer, which of them matter when keys and values are stored.
    pub(super) last: Option<(&'a [usize], &'a StepInputs<'a>)>,
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

impl<B: Backend> StepContext<'_, B> {
    /// Keys and values are stored: leaves the rows that matter behind this, where some do not, in all
    /// that a block goes on with; `ws.qkv` has rows of `qkv_len`.
    fn stored(&mut self, ws: &mut Workspace<B>, qkv_len: usize) {
        let Some((rows, inputs)) = self.last.take() else {
            return;
        };
        if inputs.n_rows() == self.inputs.n_rows() {
            return;
        }
        let hidden = self.spec.hidden;
        for (buffer, width) in [
            (&mut ws.x, hidden),
            (&mut ws.normed, hidden),
            (&mut ws.angles, 2 * self.spec.rope.inverse_frequencies.len()),
            (&mut ws.qkv, qkv_len),
        ] {
            self.backend.keep_rows(buffer, rows, width);
        }
        self.inputs = inputs;
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

/// A layer's feed-forward part.
pub(super) enum Ffn<B: WeightStore> {
    Mlp(Mlp<B>),
    Moe(Moe<B>),
}
