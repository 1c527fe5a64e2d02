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
