//! Every instruction set of the CPU backend against the scalar reference, over the table of cases.
#![expect(clippy::unwrap_used, reason = "test helpers")]

use dsd_kernels::{
    backend::{
        Activations, AttentionShape, Backend, CacheRows, CacheShape, Expert, ExpertShape,
        GateGroups, GateShape, GroupScore, HeadView, RopeLayout, RowView, Scoring, StepInputs,
        StepSpan, ValueHeads,
    },
    cases,
    cpu::{CpuBackend, CpuConfig, Isa},
    dtype::Format,
    matrix::{Matrix, TileScales},
    reference::{GateScratch, Reference, choose_experts},
};

/// A small deterministic generator (SplitMix64), so that a failure repeats.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }

    /// A matrix of random codes with sane scales, in any format.
    fn matrix(&mut self, format: Format, n: usize, k: usize) -> Matrix {
        let n_bytes = format.row_bytes(k).unwrap() * n;
        let mut data = (0..n_bytes).map(|_| self.bits() as u8).collect::<Vec<_>>();
        let scale = |data: &mut [u8], at: usize, value: f32| {
            data[at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
        };
        for block in data.chunks_exact_mut(format.block_bytes()) {
            let value = self.unit();
            match format {
                Format::F32 => block.copy_from_slice(&value.to_le_bytes()),
                Format::F16 => scale(block, 0, value),
                Format::Bf16 => block.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
                Format::F8E4m3 if block[0] & 0x7f == 0x7f => block[0] = 0x7e,
                Format::F8E4m3 => {}
                Format::Q4_0 | Format::Q8_0 => scale(block, 0, value / 16.0),
                Format::Q4_1 | Format::Q4K => {
                    scale(block, 0, value / 16.0);
                    scale(block, 2, self.unit() / 4.0);
                }
                Format::Q6K => scale(block, 208, value / 512.0),
            }
        }
        let tile_scales = (format == Format::F8E4m3).then(|| TileScales {
            tile_rows: 128,
            tile_cols: 128,
            values: (0..n.div_ceil(128) * k.div_ceil(128))
                .map(|_| self.unit() / 64.0)
                .collect(),
        });
        Matrix::new(format, n, k, data.into(), tile_scales).unwrap()
    }
}

fn backends(activations: Activations) -> Vec<CpuBackend> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        for n_threads in [1, 3] {
            all.push(
                CpuBackend::new(CpuConfig {
                    n_threads,
                    isa,
                    activations,
                })
                .unwrap(),
            );
        }
    }
    all
}

/// The largest sum of magnitudes behind an output: what rounding errors of a dot product scale with.
fn magnitude(matrix: &Matrix, x: &[f32]) -> f32 {
    let mut row = vec![0.0; matrix.n_cols()];
    let mut largest = 0f32;
    for n in 0..matrix.n_rows() {
        dsd_kernels::quant::decode_row(matrix, n, &mut row);
        for x in x.chunks_exact(row.len()) {
            largest = largest.max(row.iter().zip(x).map(|(w, v)| (w * v).abs()).sum());
        }
    }
    largest
}

/// `found` within `tolerance` of `expected`, absolutely.
fn check_within(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f - e).abs() <= tolerance,
            "{what}: element {i} is {f}, expected {e} within {tolerance}"
        );
    }
}

/// `found` within `tolerance` of `expected`, relative to the largest expected magnitude.
fn check(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    let size = expected.iter().fold(1e-6f32, |a, v| a.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f - e).abs() <= tolerance * size,
            "{what}: element {i} is {f}, expected {e} within {tolerance}"
        );
    }
}

#[test]
fn linear_agrees_for_every_format_and_shape() {
    let mut random = Random(1);
    for case in cases::linear() {
        let matrix = random.matrix(case.format, case.n, case.k);
        let x = random.values(case.m * case.k);
        let bias = random.values(case.n);
        let mut expected = vec![0.0; case.m * case.n];
        Reference.linear(&x, case.m, &matrix, Some(&bias), &mut expected);
        for backend in backends(Activations::F32) {
            let mut found = vec![0.0; case.m * case.n];
            backend.linear(&x, case.m, &matrix, Some(&bias), &mut found);
            let tolerance = 1e-6 * (magnitude(&matrix, &x) + 1.0);
            let what = format!("{case:?} {:?}", backend.config());
            check_within(&what, &found, &expected, tolerance);
        }
    }
}

#[test]
fn int8_activations_agree_with_the_reference_on_the_rounded_inputs() {
    let mut random = Random(2);
    for case in cases::linear() {
        if case.format.block_len() == 1 {
            continue;
        }
        let matrix = random.matrix(case.format, case.n, case.k);
        let x = random.values(case.m * case.k);
        let mut rows = dsd_kernels::quant::int8::Int8Rows::default();
        rows.quantize(&x, case.k);
        let rounded = rows
            .codes
            .iter()
            .enumerate()
            .map(|(i, code)| f32::from(*code) * rows.scales[i / 32])
            .collect::<Vec<_>>();
        for (a, b) in x.iter().zip(&rounded) {
            assert!((a - b).abs() <= 0.5 / 127.0 + 1e-6);
        }
        let mut expected = vec![0.0; case.m * case.n];
        Reference.linear(&rounded, case.m, &matrix, None, &mut expected);
        for backend in backends(Activations::Int8) {
            let mut found = vec![0.0; case.m * case.n];
            backend.linear(&x, case.m, &matrix, None, &mut found);
            let tolerance = 1e-6 * (magnitude(&matrix, &rounded) + 1.0);
            let what = format!("{case:?} {:?}", backend.config());
            check_within(&what, &found, &expected, tolerance);
        }
    }
}

#[test]
fn a_row_of_a_linear_layer_has_the_same_bits_in_any_batch() {
    let mut random = Random(3);
    for activations in [Activations::F32, Activations::Int8] {
        for format in Format::ALL {
            let (n, k) = (70, 512);
            let matrix = random.matrix(format, n, k);
            let x = random.values(9 * k);
            for backend in backends(activations) {
                let mut together = vec![0.0; 9 * n];
                backend.linear(&x, 9, &matrix, None, &mut together);
                for m in 0..9 {
                    let mut alone = vec![0.0; n];
                    backend.linear(&x[m * k..][..k].to_vec(), 1, &matrix, None, &mut alone);
                    let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
                    assert_eq!(
                        bits(&alone),
                        bits(&together[m * n..][..n]),
                        "{format} row {m}"
                    );
                }
            }
        }
    }
}

/// One sequence whose blocks are scattered over the pool.
struct Sequence {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    span_of_row: Vec<usize>,
    spans: Vec<StepSpan>,
    blocks: Vec<u32>,
}

impl Sequence {
    fn new(n_past: usize, n_new: usize, block_len: usize, n_blocks: usize) -> Self {
        let n = (n_past + n_new).div_ceil(block_len);
        Self {
            tokens: vec![0; n_new],
            positions: (n_past..n_past + n_new).collect(),
            span_of_row: vec![0; n_new],
            spans: vec![StepSpan {
                first_row: 0,
                n_rows: n_new,
                first_pos: n_past,
                first_block: 0,
            }],
            blocks: (0..n).map(|i| ((i * 5 + 3) % n_blocks) as u32).collect(),
        }
    }

    fn inputs(&self) -> StepInputs<'_> {
        StepInputs {
            tokens: &self.tokens,
            positions: &self.positions,
            span_of_row: &self.span_of_row,
            spans: &self.spans,
            blocks: &self.blocks,
        }
    }
}

#[test]
fn attention_agrees_for_heads_and_latent_rows() {
    let mut random = Random(4);
    for case in cases::attention() {
        let shape = CacheShape {
            rows: case.rows,
            n_blocks: 13,
            block_len: 32,
        };
        let (key_len, value_len) = match case.rows {
            CacheRows::Heads { head_dim, .. } => (head_dim, head_dim),
            CacheRows::Latent {
                latent_len,
                rope_len,
            } => (latent_len + rope_len, latent_len),
        };
        let mut cache = random.values(shape.size());
        let sequence = Sequence::new(case.n_past, case.n_new, 32, 13);
        let inputs = sequence.inputs();
        let stored = random.values(case.n_new * case.rows.row_len());
        match case.rows {
            CacheRows::Heads { .. } => {
                let (keys, values) = stored.split_at(stored.len() / 2);
                let (keys, values) = (keys.to_vec(), values.to_vec());
                Reference.store_heads(&keys, &values, &mut cache, shape, &inputs);
            }
            CacheRows::Latent { .. } => {
                let view = RowView::dense(case.rows.row_len());
                Reference.store_latent(&stored, view, &mut cache, shape, &inputs);
            }
        }
        let queries = random.values(case.n_new * case.n_heads * key_len);
        let attention = AttentionShape {
            n_heads: case.n_heads,
            scale: 0.7,
        };
        let mut expected = vec![0.0; case.n_new * case.n_heads * value_len];
        Reference.attention(&queries, &cache, shape, attention, &inputs, &mut expected);
        for backend in backends(Activations::F32) {
            let mut found = vec![0.0; expected.len()];
            backend.attention(&queries, &cache, shape, attention, &inputs, &mut found);
            check(
                &format!("{case:?} {:?}", backend.config()),
                &found,
                &expected,
                1e-5,
            );
        }
    }
}

#[test]
fn attention_takes_scores_far_apart() {
    let shape = CacheShape {
        rows: CacheRows::Heads {
            n_kv_heads: 1,
            head_dim: 16,
        },
        n_blocks: 4,
        block_len: 32,
    };
    let mut random = Random(5);
    let cache = random
        .values(shape.size())
        .iter()
        .map(|v| v * 1e3)
        .collect::<Vec<_>>();
    let sequence = Sequence::new(99, 1, 32, 4);
    let queries = random
        .values(16)
        .iter()
        .map(|v| v * 1e3)
        .collect::<Vec<_>>();
    let attention = AttentionShape {
        n_heads: 1,
        scale: 1.0,
    };
    let mut expected = vec![0.0; 16];
    Reference.attention(
        &queries,
        &cache,
        shape,
        attention,
        &sequence.inputs(),
        &mut expected,
    );
    for backend in backends(Activations::F32) {
        let mut found = vec![0.0; 16];
        backend.attention(
            &queries,
            &cache,
            shape,
            attention,
            &sequence.inputs(),
            &mut found,
        );
        check(&format!("{:?}", backend.config()), &found, &expected, 1e-5);
    }
}

#[test]
fn rows_and_heads_agree() {
    let mut random = Random(6);
    for width in cases::WIDTHS {
        let (n_rows, n_heads) = (3, 2);
        let view = RowView {
            offset: 1,
            stride: width + 3,
            width,
        };
        let x = random.values(n_rows * (width + 3) + 1);
        let gain = random.values(width);
        let heads = HeadView {
            offset: 1,
            row_stride: n_heads * (width + 1),
            n_heads,
            head_stride: width + 1,
            len: width,
        };
        let wide = random.values(n_rows * n_heads * (width + 1) + 1);
        let frequencies = (0..width / 2)
            .map(|i| 1.0 / (1.0 + i as f64))
            .collect::<Vec<_>>();
        let sequence = Sequence::new(40, n_rows, 32, 13);
        let mut angles = vec![0.0; n_rows * width];
        Reference.rope_angles(&frequencies, 1.25, &sequence.inputs(), &mut angles);
        for backend in backends(Activations::F32) {
            let what = format!("width {width} {:?}", backend.config());
            let (mut found, mut expected) = (vec![0.0; n_rows * width], vec![0.0; n_rows * width]);
            backend.rms_norm(&x, view, n_rows, &gain, 1e-5, &mut found);
            Reference.rms_norm(&x, view, n_rows, &gain, 1e-5, &mut expected);
            check(&format!("rms_norm {what}"), &found, &expected, 1e-5);

            let up = random.values(n_rows * width);
            let (mut found, mut expected) =
                (x[..n_rows * width].to_vec(), x[..n_rows * width].to_vec());
            backend.swiglu(&mut found, &up, n_rows, width);
            Reference.swiglu(&mut expected, &up, n_rows, width);
            check(&format!("swiglu {what}"), &found, &expected, 1e-5);

            let (mut found, mut expected) = (wide.clone(), wide.clone());
            backend.rms_norm_heads(&mut found, n_rows, heads, &gain, 1e-5);
            Reference.rms_norm_heads(&mut expected, n_rows, heads, &gain, 1e-5);
            check(&format!("rms_norm_heads {what}"), &found, &expected, 1e-5);
            for layout in [RopeLayout::Halves, RopeLayout::Pairs] {
                backend.rope(&mut found, n_rows, heads, layout, &angles);
                Reference.rope(&mut expected, n_rows, heads, layout, &angles);
                check(&format!("rope {layout:?} {what}"), &found, &expected, 1e-5);
            }
        }
    }
}

#[test]
fn latent_projections_agree_for_every_format() {
    let mut random = Random(7);
    for format in Format::ALL {
        let (n_heads, nope, value, rank, n_rows) = (3, 24, 40, 256, 6);
        let matrix = random.matrix(format, n_heads * (nope + value), rank);
        let queries = random.values(n_rows * n_heads * (nope + 8));
        let heads = HeadView {
            offset: 0,
            row_stride: n_heads * (nope + 8),
            n_heads,
            head_stride: nope + 8,
            len: nope,
        };
        let latent = random.values(n_rows * n_heads * rank);
        let values = ValueHeads {
            n_heads,
            rows_per_head: nope + value,
            first_row: nope,
            head_dim: value,
        };
        let stride = rank + 5;
        let mut absorbed = vec![0.0; n_rows * n_heads * stride];
        let mut expanded = vec![0.0; n_rows * n_heads * value];
        Reference.absorb_keys(
            &queries,
            heads,
            &matrix,
            nope + value,
            &mut absorbed,
            stride,
            n_rows,
        );
        Reference.expand_values(&latent, &matrix, values, &mut expanded, n_rows);
        for backend in backends(Activations::F32) {
            let mut found = vec![0.0; absorbed.len()];
            backend.absorb_keys(
                &queries,
                heads,
                &matrix,
                nope + value,
                &mut found,
                stride,
                n_rows,
            );
            check(
                &format!("absorb {format} {:?}", backend.config()),
                &found,
                &absorbed,
                2e-5,
            );
            let mut found = vec![0.0; expanded.len()];
            backend.expand_values(&latent, &matrix, values, &mut found, n_rows);
            check(
                &format!("expand {format} {:?}", backend.config()),
                &found,
                &expanded,
                2e-5,
            );
        }
    }
}

#[test]
fn experts_agree_for_every_router() {
    let mut random = Random(8);
    for (gate, has_bias) in cases::gates() {
        let (hidden, inter, n_rows) = (32, 16, 9);
        let logits = random.values(n_rows * gate.n_experts);
        let bias = has_bias.then(|| random.values(gate.n_experts));
        let experts = (0..gate.n_experts)
            .map(|_| Expert {
                gate: random.matrix(Format::Bf16, inter, hidden),
                up: random.matrix(Format::Bf16, inter, hidden),
                down: random.matrix(Format::Bf16, hidden, inter),
            })
            .collect::<Vec<_>>();
        let x = random.values(n_rows * hidden);
        let start = random.values(n_rows * hidden);
        let shape = ExpertShape {
            n_rows_max: n_rows,
            n_experts: gate.n_experts,
            top_k: gate.top_k,
            hidden,
            inter,
        };
        let mut routes = Reference.routes(shape);
        Reference.gate(&logits, n_rows, gate, bias.as_ref(), &mut routes);
        for chosen in &routes.chosen {
            assert!(
                chosen.windows(2).all(|w| w[0].0 < w[1].0),
                "ascending and distinct"
            );
        }
        let mut expected = start.clone();
        Reference.experts(&x, n_rows, &experts, &mut routes, &mut expected);
        for backend in backends(Activations::F32) {
            let mut routes = backend.routes(shape);
            backend.gate(&logits, n_rows, gate, bias.as_ref(), &mut routes);
            let mut found = start.clone();
            backend.experts(&x, n_rows, &experts, &mut routes, &mut found);
            check(
                &format!("{gate:?} {:?}", backend.config()),
                &found,
                &expected,
                2e-5,
            );
        }
    }
}

/// Sorting scores that compare with nothing panicked.
#[test]
fn experts_are_chosen_also_where_logits_are_no_numbers() {
    const N_EXPERTS: usize = 64;
    for (groups, scoring) in [
        (None, Scoring::Softmax),
        (None, Scoring::Sigmoid),
        (Some(GroupScore::TopTwoSum), Scoring::Sigmoid),
        (Some(GroupScore::Max), Scoring::Sigmoid),
    ] {
        let shape = GateShape {
            n_experts: N_EXPERTS,
            top_k: 4,
            scoring,
            groups: groups.map(|group_score| GateGroups {
                n_groups: 32,
                top_groups: 8,
                group_score,
            }),
            normalize: true,
            scale: 1.0,
        };
        for seed in 0..64 {
            let mut logits = Random(seed).values(N_EXPERTS);
            for (i, logit) in logits.iter_mut().enumerate() {
                if (i * 7 + seed as usize).is_multiple_of(3) {
                    *logit = f32::NAN;
                }
            }
            let mut chosen = [(0, 0.0); 4];
            let scratch = &mut GateScratch::new(N_EXPERTS);
            choose_experts(&logits, None, shape, scratch, &mut chosen);
            assert!(chosen.windows(2).all(|pair| pair[0].0 < pair[1].0));
            if scoring == Scoring::Sigmoid && groups.is_none() {
                assert!(chosen.iter().all(|(e, _)| !logits[*e].is_nan()));
            }
        }
    }
}

/// Row counts whose product with the width wraps around to nothing let raw pointers through.
#[test]
fn sizes_beyond_all_buffers_are_refused() {
    for backend in backends(Activations::F32) {
        let refused = |what: &str, op: &dyn Fn()| {
            let refusal = std::panic::catch_unwind(std::panic::AssertUnwindSafe(op));
            assert!(refusal.is_err(), "{what}");
        };
        let (n_rows, width) = (1 << 62, 4);
        let x = backend.buffer(8);
        let repeated = RowView {
            offset: 0,
            stride: 0,
            width,
        };
        refused("rms_norm", &|| {
            backend.rms_norm(&x, repeated, n_rows, &x, 1e-6, &mut backend.buffer(0));
        });
        refused("swiglu", &|| {
            backend.swiglu(&mut backend.buffer(0), &x, n_rows, width);
        });
        let cache_shape = CacheShape {
            rows: CacheRows::Heads {
                n_kv_heads: 1,
                head_dim: 4,
            },
            n_blocks: 1 << 59,
            block_len: 4,
        };
        let inputs = StepInputs {
            tokens: &[0],
            positions: &[0],
            span_of_row: &[0],
            spans: &[StepSpan {
                first_row: 0,
                n_rows: 1,
                first_pos: 0,
                first_block: 0,
            }],
            blocks: &[1 << 30],
        };
        let attention = AttentionShape {
            n_heads: 1,
            scale: 1.0,
        };
        refused("attention", &|| {
            let mut out = backend.buffer(4);
            backend.attention(&x, &x, cache_shape, attention, &inputs, &mut out);
        });
    }
}
