//! Feed-forward parts: SwiGLU MLPs (Shazeer 2020) and routed experts (DeepSeekMoE, Dai et al. 2024).

use std::ops::Range;

use dsd_kernels::backend::{Backend, Expert, WeightStore};

use super::{
    super::{ModelError, spec::MoeSpec, split::FfnSplit, workspace::Workspace},
    Gathered, Linear, Loading, Part, StepContext,
};
use crate::{
    collective::{Collective, Missing, Op},
    weights::Cut,
};

/// `down(silu(gate x) * up x)`.
pub(in crate::model) struct Mlp<B: WeightStore> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: WeightStore> Mlp<B> {
    /// Columns `range` of the `inter` inside.
    pub(in crate::model) fn load(
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
    pub(in crate::model) fn forward(&self, step: &StepContext<'_, B>, ws: &mut Workspace<B>) {
        let (b, n_rows) = (step.backend, step.inputs.n_rows());
        let layers = [&self.gate, &self.up, &self.down].map(Linear::parts);
        let scratch = [&mut ws.gate, &mut ws.up];
        b.mlp(&ws.normed, n_rows, layers, scratch, &mut ws.y);
    }
}

/// Routed experts on top of the shared one.
pub(in crate::model) struct Moe<B: WeightStore> {
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
    pub(in crate::model) fn load(
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
    pub(in crate::model) fn forward(
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
