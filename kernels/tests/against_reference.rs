//! Every instruction set of the CPU backend against the scalar reference, over the table of cases.
#![expect(clippy::unwrap_used, reason = "test helpers")]

use dsd_kernels::{
    backend::{
        Activations, AttentionShape, Backend, CacheRows, CacheShape, Expert, ExpertShape,
        GateGroups, GateShape, GroupScore, HeadRows, HeadView, KvType, RopeLayout, RowView,
        Scoring, StepInputs, StepSpan, WeightStore,
    },
    cases,
    cpu::{CpuBackend, CpuConfig, Isa},
    dtype::Format,
    matrix::{Matrix, TileScales},
    panel,
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
                Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => scale(block, 0, value / 16.0),
                Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => {
                    scale(block, 0, value / 16.0);
                    scale(block, 2, self.unit() / 4.0);
                }
                Format::Q6K => scale(block, 208, value / 512.0),
                Format::Int8 => {}
                Format::Int4 => {
                    scale(block, 0, value / 16.0);
                    block[2] %= 16;
                }
            }
        }
        let tile = match format {
            Format::F8E4m3 => Some((128, 128)),
            Format::Int8 => Some((1, k)),
            _ => None,
        };
        let tile_scales = tile.map(|(tile_rows, tile_cols)| TileScales {
            tile_rows,
            tile_cols,
            values: (0..n.div_ceil(tile_rows) * k.div_ceil(tile_cols))
                .map(|_| self.unit() / 64.0)
                .collect(),
        });
        Matrix::new(format, n, k, data.into(), tile_scales).unwrap()
    }
}

fn backends(activations: Activations) -> Vec<CpuBackend> {
    backends_with(activations, KvType::F32)
}

fn backends_with(activations: Activations, kv_type: KvType) -> Vec<CpuBackend> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        for n_threads in [1, 3] {
            all.push(
                CpuBackend::new(CpuConfig {
                    n_threads,
                    isa,
                    activations,
                    kv_type,
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
        let parts = vec![matrix.clone()];
        Reference.linear(&x, case.m, &parts, Some(&bias), &mut expected);
        for backend in backends(Activations::F32) {
            let mut found = vec![0.0; case.m * case.n];
            let weight = backend.weight(parts.clone());
            backend.linear(&x, case.m, &weight, Some(&bias), &mut found);
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
        let mut rounded = Vec::with_capacity(x.len());
        for group in x.as_chunks::<32>().0 {
            let mut codes = [0; 32];
            let scale = dsd_kernels::quant::int8::round_group(group, &mut codes);
            rounded.extend(codes.map(|code| f32::from(code) * scale));
        }
        for (a, b) in x.iter().zip(&rounded) {
            assert!((a - b).abs() <= 0.5 / 127.0 + 1e-6);
        }
        let mut expected = vec![0.0; case.m * case.n];
        let parts = vec![matrix.clone()];
        Reference.linear(&rounded, case.m, &parts, None, &mut expected);
        for backend in backends(Activations::Int8) {
            let mut found = vec![0.0; case.m * case.n];
            let weight = backend.weight(parts.clone());
            backend.linear(&x, case.m, &weight, None, &mut found);
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
            let (n, k, n_rows) = (70, 512, 77);
            let matrix = random.matrix(format, n, k);
            let x = random.values(n_rows * k);
            for backend in backends(activations) {
                let weight = backend.weight(vec![matrix.clone()]);
                let mut together = vec![0.0; n_rows * n];
                backend.linear(&x, n_rows, &weight, None, &mut together);
                for m in 0..n_rows {
                    let mut alone = vec![0.0; n];
                    backend.linear(&x[m * k..][..k].to_vec(), 1, &weight, None, &mut alone);
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

/// Key and value length of a cache's heads.
fn head_lens(rows: CacheRows) -> (usize, usize) {
    match rows {
        CacheRows::Heads { head_dim, .. } => (head_dim, head_dim),
        CacheRows::Latent {
            latent_len,
            rope_len,
        } => (latent_len + rope_len, latent_len),
    }
}

/// Dense rows of keys and values, or of latents, into a backend's cache.
fn store<B: Backend>(
    backend: &B,
    rows: &B::Buffer,
    cache: &mut B::Cache,
    shape: CacheShape,
    inputs: &StepInputs<'_>,
) {
    let row_len = shape.rows.row_len();
    match shape.rows {
        CacheRows::Heads { .. } => {
            let keys = RowView {
                offset: 0,
                stride: row_len,
                width: row_len / 2,
            };
            let values = RowView {
                offset: row_len / 2,
                ..keys
            };
            backend.store_heads(rows, keys, values, cache, shape, inputs);
        }
        CacheRows::Latent { .. } => {
            backend.store_latent(rows, RowView::dense(row_len), cache, shape, inputs);
        }
    }
}

/// What a cache of this type keeps of a row: the definition, element by element.
fn as_stored(kv_type: KvType, rows: CacheRows, row: &[f32]) -> Vec<f32> {
    let bf16 = |part: &[f32]| {
        let rounded = part.iter().map(|v| half::bf16::from_f32(*v).to_f32());
        rounded.collect::<Vec<_>>()
    };
    let int8 = |part: &[f32]| {
        let largest = part.iter().fold(0f32, |a, v| a.max(v.abs()));
        let code = |v: &f32| (v * (127.0 / largest)).round_ties_even() * (largest / 127.0);
        part.iter().map(code).collect::<Vec<_>>()
    };
    match (kv_type, rows) {
        (KvType::F32, _) => row.to_vec(),
        (KvType::Bf16, _) => bf16(row),
        (KvType::Int8, CacheRows::Heads { head_dim, .. }) => {
            row.chunks_exact(head_dim).flat_map(int8).collect()
        }
        (KvType::Int8, CacheRows::Latent { latent_len, .. }) => {
            [int8(&row[..latent_len]), bf16(&row[latent_len..])].concat()
        }
    }
}

#[test]
fn attention_agrees_for_heads_and_latent_rows_of_every_type() {
    let mut random = Random(4);
    for (case, kv_type) in cases::attention()
        .into_iter()
        .flat_map(|case| KvType::ALL.map(|kv_type| (case, kv_type)))
    {
        let shape = CacheShape {
            rows: case.rows,
            n_blocks: 13,
            block_len: 32,
        };
        let (key_len, value_len) = head_lens(case.rows);
        // All positions go in, those of the new rows among them.
        let n_all = case.n_past + case.n_new;
        let all = Sequence::new(0, n_all, 32, 13);
        let stored = random.values(n_all * case.rows.row_len());
        let rounded = stored
            .chunks_exact(case.rows.row_len())
            .flat_map(|row| as_stored(kv_type, case.rows, row))
            .collect::<Vec<_>>();
        let mut cache = Reference.cache(shape);
        store(&Reference, &rounded, &mut cache, shape, &all.inputs());
        let sequence = Sequence::new(case.n_past, case.n_new, 32, 13);
        let inputs = sequence.inputs();
        let queries = random.values(case.n_new * case.n_heads * key_len);
        let attention = AttentionShape {
            n_heads: case.n_heads,
            scale: 0.7,
        };
        let mut expected = vec![0.0; case.n_new * case.n_heads * value_len];
        let rows = RowView::dense(case.n_heads * key_len);
        Reference.attention(
            &queries,
            rows,
            &cache,
            shape,
            attention,
            &inputs,
            &mut expected,
        );
        for backend in backends_with(Activations::F32, kv_type) {
            let mut cache = backend.cache(shape);
            store(&backend, &stored, &mut cache, shape, &all.inputs());
            let mut found = vec![0.0; expected.len()];
            backend.attention(
                &queries, rows, &cache, shape, attention, &inputs, &mut found,
            );
            check(
                &format!("{case:?} {:?}", backend.config()),
                &found,
                &expected,
                1e-5,
            );
        }
    }
}

/// Rows stored and queried one by one give the bits of all at once: decode equals prefill, and a
/// prefix found in the cache equals one just computed.
#[test]
fn attention_has_the_same_bits_in_any_split() {
    let mut random = Random(12);
    let shapes = [
        (
            6,
            CacheRows::Heads {
                n_kv_heads: 2,
                head_dim: 40,
            },
        ),
        (
            7,
            CacheRows::Latent {
                latent_len: 72,
                rope_len: 20,
            },
        ),
    ];
    let kinds = KvType::ALL.map(|kv_type| (Activations::F32, kv_type));
    // Where queries and weights are rounded as well.
    let kinds = [&kinds[..], &[(Activations::Int8, KvType::Bf16)]].concat();
    for ((n_heads, rows), (activations, kv_type)) in shapes
        .into_iter()
        .flat_map(|shape| kinds.iter().map(move |kind| (shape, *kind)))
    {
        let shape = CacheShape {
            rows,
            n_blocks: 13,
            block_len: 32,
        };
        let (key_len, value_len) = head_lens(rows);
        let (n, row_len) = (70, rows.row_len());
        let stored = random.values(n * row_len);
        let queries = random.values(n * n_heads * key_len);
        let view = RowView::dense(n_heads * key_len);
        let attention = AttentionShape {
            n_heads,
            scale: 0.3,
        };
        for backend in backends_with(activations, kv_type) {
            let all = Sequence::new(0, n, 32, 13);
            let mut cache = backend.cache(shape);
            store(&backend, &stored, &mut cache, shape, &all.inputs());
            let mut together = vec![0.0; n * n_heads * value_len];
            backend.attention(
                &queries,
                view,
                &cache,
                shape,
                attention,
                &all.inputs(),
                &mut together,
            );
            let mut cache = backend.cache(shape);
            for m in 0..n {
                let one = Sequence::new(m, 1, 32, 13);
                let row = stored[m * row_len..][..row_len].to_vec();
                store(&backend, &row, &mut cache, shape, &one.inputs());
                let query = queries[m * view.width..][..view.width].to_vec();
                let mut alone = vec![0.0; n_heads * value_len];
                backend.attention(
                    &query,
                    view,
                    &cache,
                    shape,
                    attention,
                    &one.inputs(),
                    &mut alone,
                );
                let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
                let of_all = &together[m * alone.len()..][..alone.len()];
                let what = format!("{rows:?} {:?} row {m}", backend.config());
                assert_eq!(bits(&alone), bits(of_all), "{what}");
            }
        }
    }
}

/// With int8 activations and a cache in bf16, queries and the softmax' weights are rounded to bf16 too:
/// a weight is off by at most 2^-9 of itself, and so is their sum. Every set with multiply-adds gives
/// the same bits, whether pairs of products are one instruction or two.
#[test]
fn attention_in_pairs_agrees_and_has_the_same_bits_on_every_vector_set() {
    let mut random = Random(17);
    let odd = cases::AttentionCase {
        n_heads: 3,
        rows: CacheRows::Heads {
            n_kv_heads: 3,
            head_dim: 37,
        },
        n_past: 40,
        n_new: 61,
    };
    for case in cases::attention().into_iter().chain([odd]) {
        let shape = CacheShape {
            rows: case.rows,
            n_blocks: 13,
            block_len: 32,
        };
        let (key_len, value_len) = head_lens(case.rows);
        let n_all = case.n_past + case.n_new;
        let all = Sequence::new(0, n_all, 32, 13);
        let stored = random.values(n_all * case.rows.row_len());
        let queries = random.values(case.n_new * case.n_heads * key_len);
        let rounded = |values: &[f32]| as_stored(KvType::Bf16, case.rows, values);
        let sequence = Sequence::new(case.n_past, case.n_new, 32, 13);
        let inputs = sequence.inputs();
        let attention = AttentionShape {
            n_heads: case.n_heads,
            scale: 0.7,
        };
        let view = RowView::dense(case.n_heads * key_len);
        let mut cache = Reference.cache(shape);
        store(
            &Reference,
            &rounded(&stored),
            &mut cache,
            shape,
            &all.inputs(),
        );
        let mut expected = vec![0.0; case.n_new * case.n_heads * value_len];
        Reference.attention(
            &rounded(&queries),
            view,
            &cache,
            shape,
            attention,
            &inputs,
            &mut expected,
        );
        let largest = stored.iter().fold(0f32, |a, v| a.max(v.abs()));
        let mut first: Option<Vec<f32>> = None;
        for backend in backends_with(Activations::Int8, KvType::Bf16) {
            let mut cache = backend.cache(shape);
            store(&backend, &stored, &mut cache, shape, &all.inputs());
            let mut found = vec![0.0; expected.len()];
            backend.attention(
                &queries, view, &cache, shape, attention, &inputs, &mut found,
            );
            let what = format!("{case:?} {:?}", backend.config());
            let tolerance = largest * (2f32.powi(-8) + 1e-5);
            check_within(&what, &found, &expected, tolerance);
            if backend.config().isa == Isa::Portable {
                continue;
            }
            let first = first.get_or_insert_with(|| found.clone());
            for (i, (a, b)) in found.iter().zip(&*first).enumerate() {
                assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i}, {a} and {b}");
            }
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
    let stored = random
        .values(100 * shape.rows.row_len())
        .iter()
        .map(|v| v * 1e3)
        .collect::<Vec<_>>();
    let all = Sequence::new(0, 100, 32, 4);
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
    let mut cache = Reference.cache(shape);
    store(&Reference, &stored, &mut cache, shape, &all.inputs());
    let mut expected = vec![0.0; 16];
    Reference.attention(
        &queries,
        RowView::dense(16),
        &cache,
        shape,
        attention,
        &sequence.inputs(),
        &mut expected,
    );
    for backend in backends(Activations::F32) {
        let mut cache = backend.cache(shape);
        store(&backend, &stored, &mut cache, shape, &all.inputs());
        let mut found = vec![0.0; 16];
        backend.attention(
            &queries,
            RowView::dense(16),
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

            let n = n_rows * width;
            let (mut sum, mut expected_sum) = (x[..n].to_vec(), x[..n].to_vec());
            let y = wide[..n].to_vec();
            backend.add_rms_norm(&mut sum, &y, n_rows, width, &gain, 1e-5, &mut found);
            Reference.add_rms_norm(
                &mut expected_sum,
                &y,
                n_rows,
                width,
                &gain,
                1e-5,
                &mut expected,
            );
            assert_eq!(sum, expected_sum, "sums of {what}");
            check(&format!("add_rms_norm {what}"), &found, &expected, 1e-5);

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
        let parts = vec![matrix.clone()];
        let queries = random.values(n_rows * n_heads * (nope + 8));
        let heads = HeadView {
            offset: 0,
            row_stride: n_heads * (nope + 8),
            n_heads,
            head_stride: nope + 8,
            len: nope,
        };
        let latent = random.values(n_rows * n_heads * rank);
        let values = HeadRows {
            rows_per_head: nope + value,
            first_row: nope,
        };
        let dense = |len| HeadView {
            offset: 0,
            row_stride: n_heads * len,
            n_heads,
            head_stride: len,
            len,
        };
        let stride = rank + 5;
        let mut absorbed = vec![0.0; n_rows * n_heads * stride];
        let mut expanded = vec![0.0; n_rows * n_heads * value];
        Reference.absorb_keys(
            &queries,
            heads,
            &parts,
            nope + value,
            &mut absorbed,
            stride,
            n_rows,
        );
        Reference.per_head_linear(
            &latent,
            dense(rank),
            n_rows,
            &parts,
            values,
            &mut expanded,
            dense(value),
        );
        for backend in backends(Activations::F32) {
            let weight = backend.latent_weight(matrix.clone());
            let mut found = vec![0.0; absorbed.len()];
            backend.absorb_keys(
                &queries,
                heads,
                &weight,
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
            backend.per_head_linear(
                &latent,
                dense(rank),
                n_rows,
                &weight,
                values,
                &mut found,
                dense(value),
            );
            check(
                &format!("expand {format} {:?}", backend.config()),
                &found,
                &expanded,
                2e-5,
            );
        }
    }
}

/// Heads begin and end inside panels; inputs and outputs have room between them.
#[test]
fn layers_of_heads_agree_for_every_format_and_have_the_same_bits_in_any_batch() {
    let mut random = Random(17);
    let (n_heads, n_cols, rows_per_head, n_out, n_rows_max) = (3, 256, 50, 37, 70);
    let rows = HeadRows {
        rows_per_head,
        first_row: 9,
    };
    let view = |len, between, n_heads| HeadView {
        offset: 3,
        row_stride: n_heads * (len + between) + 2,
        n_heads,
        head_stride: len + between,
        len,
    };
    let (from, to) = (view(n_cols, 5, n_heads), view(n_out, 4, n_heads));
    let x = random.values(3 + n_rows_max * from.row_stride);
    for format in Format::ALL {
        let matrix = random.matrix(format, n_heads * rows_per_head, n_cols);
        let parts = vec![matrix.clone()];
        let len = 3 + n_rows_max * to.row_stride;
        let mut expected = vec![7.0; len];
        Reference.per_head_linear(&x, from, n_rows_max, &parts, rows, &mut expected, to);
        for activations in [Activations::F32, Activations::Int8] {
            for backend in backends(activations) {
                let weight = backend.weight(parts.clone());
                let run = |n_rows| {
                    let mut found = vec![7.0; len];
                    backend.per_head_linear(&x, from, n_rows, &weight, rows, &mut found, to);
                    found
                };
                let what = format!("heads {format} {:?}", backend.config());
                let found = run(n_rows_max);
                let tolerance = match activations {
                    Activations::F32 => 2e-5,
                    Activations::Int8 => 1e-2,
                };
                check(&what, &found, &expected, tolerance);
                for n_rows in [1, 2, 5, 16, 33] {
                    let few = run(n_rows);
                    let end = 3 + (n_rows - 1) * to.row_stride + n_heads * to.head_stride - 4;
                    assert!(few[..end] == found[..end], "{what}: {n_rows} rows");
                    assert!(few[end..].iter().all(|v| *v == 7.0), "{what}: beyond");
                }
            }
        }
    }
}

/// The same experts for another backend.
fn experts_for<B: Backend>(backend: &B, experts: &[[Matrix; 3]]) -> Vec<Expert<B::Weight>> {
    let weight = |matrix: &Matrix| backend.weight(vec![matrix.clone()]);
    experts
        .iter()
        .map(|[gate, up, down]| Expert {
            gate: weight(gate),
            up: weight(up),
            down: weight(down),
        })
        .collect()
}

#[test]
fn experts_agree_for_every_router() {
    let mut random = Random(8);
    for ((gate, has_bias), format) in cases::gates()
        .into_iter()
        .flat_map(|gate| [Format::Bf16, Format::Q4_0, Format::Int8].map(|format| (gate, format)))
    {
        let (hidden, inter, n_rows) = (96, 64, 23);
        let logits = random.values(n_rows * gate.n_experts);
        let bias = has_bias.then(|| random.values(gate.n_experts));
        let experts = (0..gate.n_experts)
            .map(|_| {
                [
                    random.matrix(format, inter, hidden),
                    random.matrix(format, inter, hidden),
                    random.matrix(format, hidden, inter),
                ]
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
        let weights = experts_for(&Reference, &experts);
        Reference.experts(&x, n_rows, &weights, &mut routes, &mut expected);
        for activations in [Activations::F32, Activations::Int8] {
            let tolerance = match activations {
                Activations::F32 => 2e-5,
                // Two roundings of the inputs to 8 bits.
                Activations::Int8 => 2e-2,
            };
            for backend in backends(activations) {
                let weights = experts_for(&backend, &experts);
                let mut routes = backend.routes(shape);
                let run = |routes: &mut _, n_rows: usize, first: usize| {
                    let logits = logits[first * gate.n_experts..].to_vec();
                    backend.gate(&logits, n_rows, gate, bias.as_ref(), routes);
                    let mut found = start[first * hidden..][..n_rows * hidden].to_vec();
                    let x = x[first * hidden..].to_vec();
                    backend.experts(&x, n_rows, &weights, routes, &mut found);
                    found
                };
                let found = run(&mut routes, n_rows, 0);
                let what = format!("{gate:?} {format} {:?}", backend.config());
                check(&what, &found, &expected, tolerance);
                for row in 0..n_rows {
                    let alone = run(&mut routes, 1, row);
                    let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
                    let together = &found[row * hidden..][..hidden];
                    assert_eq!(bits(&alone), bits(together), "{what} row {row}");
                }
            }
        }
    }
}

/// With biases of zero nothing is fused.
#[test]
fn mlps_agree_with_and_without_bias_and_are_the_same_fused_or_not() {
    /// Runs `backend`'s on weights of its own.
    fn run<B: Backend<Buffer = Vec<f32>>>(
        backend: &B,
        matrices: &[Matrix; 3],
        biases: Option<&[Vec<f32>; 3]>,
        x: &Vec<f32>,
    ) -> Vec<f32> {
        let [(inter, hidden), ..] = matrices.each_ref().map(|w| (w.n_rows(), w.n_cols()));
        let m = x.len() / hidden;
        let weights = matrices.clone().map(|matrix| backend.weight(vec![matrix]));
        let layers = [0, 1, 2].map(|i| (&weights[i], biases.map(|of| &of[i])));
        let mut inner = [0, 1].map(|_| vec![0.0; m * inter]);
        let mut out = vec![0.0; m * hidden];
        backend.mlp(x, m, layers, inner.each_mut(), &mut out);
        out
    }
    let mut random = Random(9);
    for (format, hidden, inter) in [
        (Format::F32, 64, 70),
        (Format::Q4_0, 64, 96),
        (Format::Q4_1, 64, 160),
        (Format::Q5_0, 64, 96),
        (Format::Q5_1, 64, 160),
        (Format::Q5K, 256, 256),
        (Format::Q6K, 256, 256),
        (Format::Int8, 64, 96),
        (Format::Int4, 64, 96),
    ] {
        let matrices = [(inter, hidden), (inter, hidden), (hidden, inter)]
            .map(|(n, k)| random.matrix(format, n, k));
        let biases = [inter, inter, hidden].map(|n| random.values(n));
        let zeros = biases.each_ref().map(|bias| vec![0.0; bias.len()]);
        for m in [1, 5, 21, 70] {
            let x = random.values(m * hidden);
            let expected = run(&Reference, &matrices, None, &x);
            let expected_biased = run(&Reference, &matrices, Some(&biases), &x);
            for (activations, tolerance) in [(Activations::F32, 2e-5), (Activations::Int8, 3e-2)] {
                for backend in backends(activations) {
                    let what = format!("{format} {m} rows, {:?}", backend.config());
                    let found = run(&backend, &matrices, None, &x);
                    assert_eq!(found, run(&backend, &matrices, Some(&zeros), &x), "{what}");
                    check(&what, &found, &expected, tolerance);
                    let found = run(&backend, &matrices, Some(&biases), &x);
                    check(
                        &format!("{what}, biases"),
                        &found,
                        &expected_biased,
                        tolerance,
                    );
                }
            }
        }
    }
}

#[test]
fn parts_of_a_weight_lie_side_by_side() {
    let mut random = Random(10);
    let k = 256;
    let parts = [
        random.matrix(Format::Q4_0, 33, k),
        random.matrix(Format::Bf16, 7, k),
        random.matrix(Format::Q6K, 50, k),
    ];
    let n = 90;
    let x = random.values(19 * k);
    let bias = random.values(n);
    let mut expected = vec![0.0; 19 * n];
    Reference.linear(&x, 19, &parts.to_vec(), Some(&bias), &mut expected);
    for backend in backends(Activations::F32) {
        let weight = backend.weight(parts.to_vec());
        let mut found = vec![0.0; 19 * n];
        backend.linear(&x, 19, &weight, Some(&bias), &mut found);
        check(&format!("{:?}", backend.config()), &found, &expected, 1e-5);
    }
}

#[test]
fn panels_hold_what_the_rows_held() {
    let mut random = Random(11);
    for format in Format::ALL {
        let matrix = random.matrix(format, 37, 512);
        let Some(len) = panel::bytes(format, 37, 512) else {
            assert_eq!(format.block_len(), 1, "block formats have panels");
            continue;
        };
        let mut data = vec![0; len];
        for (index, out) in data.chunks_exact_mut(len / 3).enumerate() {
            panel::pack(&matrix, index, out);
        }
        let panels = Matrix::from_panels(format, 37, 512, data.into()).unwrap();
        let (mut of_rows, mut of_panels) = (vec![0.0; 512], vec![0.0; 512]);
        for row in 0..37 {
            dsd_kernels::quant::decode_row(&matrix, row, &mut of_rows);
            dsd_kernels::quant::decode_row(&panels, row, &mut of_panels);
            assert_eq!(of_rows, of_panels, "{format} row {row}");
        }
    }
}

#[test]
fn pieces_of_a_matrix_hold_what_the_whole_held() {
    let mut random = Random(13);
    for format in Format::ALL {
        let (n, k) = (37, 768);
        let matrix = random.matrix(format, n, k);
        let unit = format.block_len().max(32);
        for (first, count) in [(0, 2 * unit), (unit, 2 * unit), (2 * unit, unit)] {
            let cols = matrix.cols(first, count).unwrap();
            let rows = cols.rows(5, 30).unwrap();
            let (mut whole, mut piece) = (vec![0.0; k], vec![0.0; count]);
            let x = random.values(count);
            let mut expected = vec![0.0; 30];
            for (row, expected) in expected.iter_mut().enumerate() {
                dsd_kernels::quant::decode_row(&matrix, 5 + row, &mut whole);
                dsd_kernels::quant::decode_row(&rows, row, &mut piece);
                assert_eq!(whole[first..first + count], piece, "{format} row {row}");
                *expected = piece.iter().zip(&x).map(|(w, v)| w * v).sum();
            }
            for backend in backends(Activations::F32) {
                let mut found = vec![0.0; 30];
                let weight = backend.weight(vec![rows.clone()]);
                backend.linear(&x, 1, &weight, None, &mut found);
                let tolerance = 1e-6 * (magnitude(&rows, &x) + 1.0);
                check_within(&format!("{format}"), &found, &expected, tolerance);
            }
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
        let weight = backend.weight(vec![Matrix::from_f32(1, 4, &[1.0; 4])]);
        refused("linear", &|| {
            backend.linear(&x, n_rows, &weight, None, &mut backend.buffer(0));
        });
        let cache_shape = CacheShape {
            rows: CacheRows::Heads {
                n_kv_heads: 1,
                head_dim: 4,
            },
            n_blocks: 1 << 56,
            block_len: 32,
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
        let cache = backend.cache(CacheShape {
            n_blocks: 1,
            ..cache_shape
        });
        refused("attention", &|| {
            let mut out = backend.buffer(4);
            backend.attention(
                &x,
                repeated,
                &cache,
                cache_shape,
                attention,
                &inputs,
                &mut out,
            );
        });
    }
}
