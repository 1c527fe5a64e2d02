//! The shapes that correctness tests and benchmarks walk, one table per operation.
//!
//! Sizes are those of real layers and of awkward ones: one row, ragged tiles, widths that are no
//! multiple of a vector.

use crate::{
    backend::{CacheRows, GateGroups, GateShape, GroupScore, Scoring},
    dtype::Format,
};

/// A linear layer: `m` rows of `k` inputs to `n` outputs.
#[derive(Debug, Clone, Copy)]
pub struct LinearCase {
    /// Weight format.
    pub format: Format,
    /// Rows of activations.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// Attention of `n_new` rows behind `n_past` cached positions.
#[derive(Debug, Clone, Copy)]
pub struct AttentionCase {
    /// Query heads.
    pub n_heads: usize,
    /// What a position caches.
    pub rows: CacheRows,
    /// Positions already cached.
    pub n_past: usize,
    /// New rows.
    pub n_new: usize,
}

/// Every format over decode and prefill row counts and awkward widths.
pub fn linear() -> Vec<LinearCase> {
    let mut cases = Vec::new();
    for format in Format::ALL {
        // A block is up to 256 columns; plain formats also get widths that are no whole vectors.
        let widths: &[usize] = match format.block_len() {
            1 => &[1, 15, 40, 64, 100, 576],
            32 => &[32, 96, 576],
            _ => &[256, 768],
        };
        for &k in widths {
            for (m, n) in [
                (1, 1),
                (1, 67),
                (2, 33),
                (3, 5),
                (4, 64),
                (5, 130),
                (17, 40),
            ] {
                cases.push(LinearCase { format, m, n, k });
            }
        }
    }
    cases
}

/// Grouped heads and latent rows, across block borders.
pub fn attention() -> Vec<AttentionCase> {
    let heads = |n_kv_heads, head_dim| CacheRows::Heads {
        n_kv_heads,
        head_dim,
    };
    let latent = |latent_len, rope_len| CacheRows::Latent {
        latent_len,
        rope_len,
    };
    let shapes = [
        (9, heads(3, 64)),
        (4, heads(4, 20)),
        (32, heads(2, 128)),
        (5, latent(64, 32)),
        (11, latent(40, 12)),
    ];
    let spans = [(0, 1), (31, 1), (32, 1), (95, 3), (0, 70)];
    shapes
        .into_iter()
        .flat_map(|(n_heads, rows)| {
            spans.map(|(n_past, n_new)| AttentionCase {
                n_heads,
                rows,
                n_past,
                n_new,
            })
        })
        .collect()
}

/// Routers of the published models, and small ones.
pub fn gates() -> Vec<(GateShape, bool)> {
    let gate = |n_experts, top_k, scoring, groups, normalize, scale| GateShape {
        n_experts,
        top_k,
        scoring,
        groups,
        normalize,
        scale,
    };
    let groups = |n_groups, top_groups, group_score| {
        Some(GateGroups {
            n_groups,
            top_groups,
            group_score,
        })
    };
    vec![
        (gate(64, 6, Scoring::Softmax, None, false, 1.0), false),
        (
            gate(
                160,
                6,
                Scoring::Softmax,
                groups(8, 3, GroupScore::Max),
                false,
                16.0,
            ),
            false,
        ),
        (
            gate(
                256,
                8,
                Scoring::Sigmoid,
                groups(8, 4, GroupScore::TopTwoSum),
                true,
                2.5,
            ),
            true,
        ),
        (
            gate(
                12,
                4,
                Scoring::Sigmoid,
                groups(12, 12, GroupScore::TopTwoSum),
                true,
                2.5,
            ),
            true,
        ),
        (gate(10, 3, Scoring::Softmax, None, true, 1.0), false),
    ]
}

/// Widths for elementwise and row-wise operations.
pub const WIDTHS: [usize; 7] = [2, 16, 30, 64, 100, 576, 2048];

/// An operation at the size of a layer, for benchmarks.
#[derive(Debug, Clone, Copy)]
pub enum SpeedCase {
    /// A linear layer.
    Linear(LinearCase),
    /// A SwiGLU MLP: two matrices of the case's size and one that leads back.
    Mlp(LinearCase),
    /// Attention of `n_sequences` sequences alike.
    Attention(AttentionCase, usize),
    /// MLA's key absorption and value expansion.
    Latent(LatentCase),
    /// The choice of experts and the experts.
    Experts(ExpertsCase),
    /// RMSNorm of `m` rows of `k`.
    RmsNorm {
        /// Rows.
        m: usize,
        /// Width.
        k: usize,
    },
    /// Rotation of `h` heads of `d` in `m` rows.
    Rope {
        /// Rows.
        m: usize,
        /// Heads.
        h: usize,
        /// Elements of a head.
        d: usize,
    },
}

/// `m` rows through keys and values of `kv_b_proj`.
#[derive(Debug, Clone, Copy)]
pub struct LatentCase {
    /// Weight format.
    pub format: Format,
    /// Rows of activations.
    pub m: usize,
    /// Query heads.
    pub h: usize,
    /// Elements of a head's part that is not rotated, and of its value.
    pub d: usize,
    /// Elements of the latent.
    pub latent_len: usize,
    /// Keys and values in one matrix, as published, instead of two.
    pub joined: bool,
}

/// `m` rows through a layer of experts.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsCase {
    /// Weight format.
    pub format: Format,
    /// Rows of activations.
    pub m: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside an expert.
    pub inter: usize,
    /// The router.
    pub gate: GateShape,
}

/// Rows of a step: one stream, some, a batch, a chunk of a prompt.
const STEPS: [usize; 4] = [1, 16, 64, 512];

/// Layers of SmolLM2-135M and of a small DeepSeek-V3 in decode, batched decode and prefill.
pub fn speed() -> Vec<SpeedCase> {
    let mut cases = Vec::new();
    // A layer that stays in the nearest caches, and a head that does not.
    for (n, k) in [(1536, 576), (49_152, 1024)] {
        for format in [
            Format::Q4_0,
            Format::Q8_0,
            Format::Q6K,
            Format::Bf16,
            Format::F8E4m3,
        ] {
            let fits = k % format.block_len() == 0;
            // Logits are wanted of one row per sequence.
            let steps = STEPS.into_iter().filter(|m| fits && m * n <= 1 << 22);
            cases.extend(steps.map(|m| SpeedCase::Linear(LinearCase { format, m, n, k })));
        }
    }
    let (n, k) = (1536, 576);
    let format = Format::Q4_0;
    cases.extend(STEPS.map(|m| SpeedCase::Mlp(LinearCase { format, m, n, k })));
    let heads = CacheRows::Heads {
        n_kv_heads: 3,
        head_dim: 64,
    };
    let latent = CacheRows::Latent {
        latent_len: 512,
        rope_len: 64,
    };
    for (n_heads, rows) in [(9, heads), (8, latent)] {
        for (n_past, n_new, n_sequences) in [
            (64, 1, 1),
            (2048, 1, 1),
            (64, 1, 16),
            (1024, 1, 16),
            (0, 512, 1),
        ] {
            let case = AttentionCase {
                n_heads,
                rows,
                n_past,
                n_new,
            };
            cases.push(SpeedCase::Attention(case, n_sequences));
        }
    }
    for (format, joined) in [(format, false), (Format::F8E4m3, true)] {
        for m in STEPS {
            cases.push(SpeedCase::Latent(LatentCase {
                format,
                m,
                h: 8,
                d: 128,
                latent_len: 512,
                joined,
            }));
        }
    }
    let gate = GateShape {
        n_experts: 64,
        top_k: 6,
        scoring: Scoring::Sigmoid,
        groups: Some(GateGroups {
            n_groups: 8,
            top_groups: 4,
            group_score: GroupScore::TopTwoSum,
        }),
        normalize: true,
        scale: 2.5,
    };
    for m in STEPS {
        cases.push(SpeedCase::Experts(ExpertsCase {
            format,
            m,
            hidden: 1024,
            inter: 512,
            gate,
        }));
    }
    for m in [1, 512] {
        cases.push(SpeedCase::RmsNorm { m, k: 576 });
        cases.push(SpeedCase::RmsNorm { m, k: 1024 });
        cases.push(SpeedCase::Rope { m, h: 9, d: 64 });
    }
    cases
}
