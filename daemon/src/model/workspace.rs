//! The activations of one step, sized once for the largest step.

use dsd_kernels::backend::{Backend, ExpertShape, StepShape};

use super::spec::{AttentionSpec, DecoderSpec, FfnSpec};

/// Buffers of a step. Names are those of the formulas in the layers.
pub struct Workspace<B: Backend> {
    /// Residual stream `[m, hidden]`.
    pub(super) x: B::Buffer,
    /// Normalised input of a block `[m, hidden]`.
    pub(super) normed: B::Buffer,
    /// A block's output `[m, hidden]`.
    pub(super) y: B::Buffer,
    /// Rotation of every row.
    pub(super) angles: B::Buffer,
    /// Queries, keys and values side by side; MLA: compressed query and `[c | rope key]`.
    pub(super) qkv: B::Buffer,
    /// MLA: queries `[m, heads, nope + rope]`.
    pub(super) q: B::Buffer,
    /// MLA: normalised latent `[m, kv_lora_rank]`.
    pub(super) latent: B::Buffer,
    /// Attention's result before the output projection.
    pub(super) o: B::Buffer,
    /// MLA: normalised compressed query `[m, q_lora_rank]`.
    pub(super) q_a: B::Buffer,
    /// MLA: absorbed queries `[m, heads, kv_lora_rank + rope]`.
    pub(super) q_absorbed: B::Buffer,
    /// MLA: attention's latent result `[m, heads, kv_lora_rank]`.
    pub(super) o_latent: B::Buffer,
    /// MLP: gate branch `[m, inter]`.
    pub(super) gate: B::Buffer,
    /// MLP: up branch `[m, inter]`.
    pub(super) up: B::Buffer,
    /// Gate logits `[m, experts]`.
    pub(super) gate_logits: B::Buffer,
    /// Chosen experts, for models that have some.
    pub(super) routes: Option<B::Routes>,
    /// `[l, vocab]`.
    pub(super) logits: B::Buffer,
}

/// Elements per buffer, in one place so that the memory plan and the buffers cannot disagree.
struct Sizes {
    qkv: usize,
    q: usize,
    latent: usize,
    o: usize,
    q_a: usize,
    q_absorbed: usize,
    o_latent: usize,
    inter: usize,
    n_experts: usize,
    experts: Option<ExpertShape>,
}

impl Sizes {
    /// Per row of the step.
    fn of(spec: &DecoderSpec, n_rows_max: usize) -> Self {
        let mut sizes = match &spec.attention {
            AttentionSpec::Gqa(a) => Self {
                qkv: (a.n_heads + 2 * a.n_kv_heads) * a.head_dim,
                q: 0,
                latent: 0,
                o: a.n_heads * a.head_dim,
                q_a: 0,
                q_absorbed: 0,
                o_latent: 0,
                inter: 0,
                n_experts: 0,
                experts: None,
            },
            AttentionSpec::Mla(a) => Self {
                qkv: a.q_lora_rank.unwrap_or(0) + a.kv_lora_rank + a.qk_rope_head_dim,
                q: a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim),
                latent: a.kv_lora_rank,
                o: a.n_heads * a.v_head_dim,
                q_a: a.q_lora_rank.unwrap_or(0),
                q_absorbed: a.n_heads * (a.kv_lora_rank + a.qk_rope_head_dim),
                o_latent: a.n_heads * a.kv_lora_rank,
                inter: 0,
                n_experts: 0,
                experts: None,
            },
        };
        for ffn in &spec.ffns {
            match ffn {
                FfnSpec::Mlp { inter, .. } => sizes.inter = sizes.inter.max(*inter),
                FfnSpec::Moe(moe) => {
                    sizes.inter = sizes.inter.max(moe.shared_inter.unwrap_or(0));
                    sizes.n_experts = moe.gate.n_experts;
                    sizes.experts = Some(ExpertShape {
                        n_rows_max,
                        n_experts: moe.gate.n_experts,
                        top_k: moe.gate.top_k,
                        hidden: spec.hidden,
                        inter: moe.inter,
                    });
                }
            }
        }
        sizes
    }

    fn step(&self, spec: &DecoderSpec, n_rows_max: usize) -> StepShape {
        StepShape {
            n_rows_max,
            width_max: self.width_max(spec.hidden),
            heads_width_max: self.q.max(self.o_latent),
            experts: self.experts,
        }
    }

    /// The widest input of a linear layer.
    fn width_max(&self, hidden: usize) -> usize {
        hidden
            .max(self.o)
            .max(self.q_a)
            .max(self.latent)
            .max(self.inter)
            .max(self.experts.map_or(0, |experts| experts.inter))
    }

    fn per_row(&self) -> usize {
        self.qkv
            + self.q
            + self.latent
            + self.o
            + self.q_a
            + self.q_absorbed
            + self.o_latent
            + 2 * self.inter
            + self.n_experts
    }
}

impl<B: Backend> Workspace<B> {
    /// Buffers for steps of `n_rows_max` tokens and `n_logits_max` rows of logits.
    pub fn new(backend: &B, spec: &DecoderSpec, n_rows_max: usize, n_logits_max: usize) -> Self {
        let sizes = Sizes::of(spec, n_rows_max);
        let rows = |width: usize| backend.buffer(n_rows_max * width);
        backend.reserve(&sizes.step(spec, n_rows_max));
        Self {
            x: rows(spec.hidden),
            normed: rows(spec.hidden),
            y: rows(spec.hidden),
            angles: rows(2 * spec.rope.inverse_frequencies.len()),
            qkv: rows(sizes.qkv),
            q: rows(sizes.q),
            latent: rows(sizes.latent),
            o: rows(sizes.o),
            q_a: rows(sizes.q_a),
            q_absorbed: rows(sizes.q_absorbed),
            o_latent: rows(sizes.o_latent),
            gate: rows(sizes.inter),
            up: rows(sizes.inter),
            gate_logits: rows(sizes.n_experts),
            routes: sizes.experts.map(|shape| backend.routes(shape)),
            logits: backend.buffer(n_logits_max * spec.vocab_len),
        }
    }

    /// Where a step's logits are.
    pub fn logits(&mut self) -> &mut B::Buffer {
        &mut self.logits
    }

    /// Bytes that [`Workspace::new`] takes with these arguments, and the backend beside it.
    pub fn bytes(backend: &B, spec: &DecoderSpec, n_rows_max: usize, n_logits_max: usize) -> usize {
        let sizes = Sizes::of(spec, n_rows_max);
        let row = 3 * spec.hidden + 2 * spec.rope.inverse_frequencies.len() + sizes.per_row();
        let experts = sizes.experts.as_ref().map_or(0, ExpertShape::n_elements);
        let elements = n_rows_max * row + experts + n_logits_max * spec.vocab_len;
        elements * size_of::<f32>() + backend.scratch_bytes(&sizes.step(spec, n_rows_max))
    }
}
