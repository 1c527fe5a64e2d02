//! Whole models in AWQ, GPTQ, W8A8, W4A16 and FP8 folders against the same models with dequantized weights.
//!
//! The folders are made here from the reference checkpoints: every linear layer is rounded and
//! packed as the format's own tools pack it. What the packed words mean is worked out again from
//! the words, in f64, by the formula that the tools' dequantizers use, and written as an F32 folder;
//! both must give the same logits.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use dsd::{
    eval::{Ranks, Session},
    weights::Checkpoint,
};
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

/// Same weights, other orders of addition.
const LOGITS_TOLERANCE: f32 = 2e-3;
/// AWQ's order of eight outputs in a word.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Method {
    Awq {
        group_len: usize,
    },
    Gptq {
        group_len: usize,
        version: u32,
        symmetric: bool,
    },
    Int8,
    /// compressed-tensors' W4A16.
    Packed {
        group_len: usize,
        symmetric: bool,
    },
    /// compressed-tensors' FP8 with a scale per output.
    Fp8Rows,
}

/// Name to type, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn source(model: &str) -> PathBuf {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data");
    let data = std::env::var_os("DSD_TEST_DATA").map_or(default, PathBuf::from);
    let folder = data.join("reference").join(model);
    assert!(
        folder.is_dir(),
        "{} is missing: run `make test-setup`",
        folder.display()
    );
    folder
}

/// All tensors of a folder in f32.
fn read(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let (halves, _) = view.data().as_chunks::<2>();
            let values = match view.dtype() {
                Dtype::BF16 => halves
                    .iter()
                    .map(|b| bf16::from_le_bytes(*b).to_f32())
                    .collect(),
                Dtype::F16 => halves
                    .iter()
                    .map(|b| f16::from_le_bytes(*b).to_f32())
                    .collect(),
                Dtype::F32 => {
                    let (words, _) = view.data().as_chunks::<4>();
                    words.iter().map(|b| f32::from_le_bytes(*b)).collect()
                }
                other => panic!("{name} is {other:?}"),
            };
            tensors.insert(name, (view.shape().to_vec(), values));
        }
    }
    tensors
}

fn write(folder: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(folder).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        let view = TensorView::new(*dtype, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Codes, zeros and scales of `[n, k]` weights in groups of columns: round to nearest.
struct Rounded {
    group_len: usize,
    codes: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f16>,
}

fn round(values: &[f32], k: usize, group_len: usize, symmetric: bool) -> Rounded {
    let (mut codes, mut zeros, mut scales) = (Vec::new(), Vec::new(), Vec::new());
    for group in values
        .chunks_exact(k)
        .flat_map(|row| row.chunks_exact(group_len))
    {
        let least = group.iter().fold(0f32, |a, v| a.min(*v));
        let most = group.iter().fold(0f32, |a, v| a.max(*v));
        let scale = match symmetric {
            true => f16::from_f32(most.max(-least) / 7.5),
            false => f16::from_f32((most - least) / 15.0),
        };
        let step = scale.to_f32();
        // GPTQ's first version cannot store a zero of 0.
        let zero = match symmetric {
            true => 8.0,
            false => (-least / step).round().clamp(1.0, 15.0),
        };
        codes.extend(
            group
                .iter()
                .map(|v| ((v / step).round() + zero).clamp(0.0, 15.0) as u32),
        );
        zeros.push(zero as u32);
        scales.push(scale);
    }
    Rounded {
        group_len,
        codes,
        zeros,
        scales,
    }
}

/// The tensors of a packed layer, and its weights as the words say.
fn pack(method: Method, stem: &str, n: usize, k: usize, values: &[f32]) -> (Tensors, Vec<f32>) {
    let (group_len, symmetric, offset) = match method {
        Method::Awq { group_len } => (group_len, false, 0),
        Method::Gptq {
            group_len,
            version,
            symmetric,
        } => (group_len, symmetric, 2 - version),
        Method::Int8 => return pack_int8(stem, n, k, values),
        Method::Fp8Rows => return pack_fp8(stem, n, k, values),
        Method::Packed {
            group_len,
            symmetric,
        } => {
            let rounded = round(values, k, group_len.min(k), symmetric);
            return pack_rows(stem, n, k, &rounded, symmetric);
        }
    };
    let group_len = group_len.min(k);
    let rounded = round(values, k, group_len, symmetric);
    let n_groups = k / rounded.group_len;
    let code = |row: usize, col: usize| rounded.codes[row * k + col];
    let zero = |row: usize, group: usize| rounded.zeros[row * n_groups + group] - offset;
    let word = |nibble: &dyn Fn(usize) -> u32| (0..8).fold(0, |w, i| w | (nibble(i) << (4 * i)));
    let mut qweight = Vec::new();
    let mut qzeros = Vec::new();
    let (codes_shape, order) = match method {
        Method::Awq { .. } => {
            for col in 0..k {
                qweight.extend((0..n / 8).map(|w| word(&|i| code(8 * w + AWQ_ORDER[i], col))));
            }
            ([k, n / 8], AWQ_ORDER)
        }
        _ => {
            for w in 0..k / 8 {
                qweight.extend((0..n).map(|row| word(&|i| code(row, 8 * w + i))));
            }
            ([k / 8, n], [0, 1, 2, 3, 4, 5, 6, 7])
        }
    };
    for group in 0..n_groups {
        qzeros.extend((0..n / 8).map(|w| word(&|i| zero(8 * w + order[i], group))));
    }
    let scales = (0..n_groups)
        .flat_map(|group| (0..n).map(move |row| (row, group)))
        .map(|(row, group)| rounded.scales[row * n_groups + group])
        .collect::<Vec<_>>();

    // The way back, from the words alone.
    let mut dequantized = vec![0.0; n * k];
    let nibble = |word: u32, i: usize| f64::from((word >> (4 * i)) & 15);
    let place = |row: usize| order.iter().position(|o| *o == row % 8).unwrap();
    for row in 0..n {
        for col in 0..k {
            let group = col / rounded.group_len;
            let code = match method {
                Method::Awq { .. } => nibble(qweight[col * (n / 8) + row / 8], place(row)),
                _ => nibble(qweight[col / 8 * n + row], col % 8),
            };
            let zero = nibble(qzeros[group * (n / 8) + row / 8], place(row)) + f64::from(offset);
            dequantized[row * k + col] = (scales[group * n + row].to_f64() * (code - zero)) as f32;
        }
    }
    let half_bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    let mut tensors = Tensors::from([
        (
            format!("{stem}.qweight"),
            (Dtype::I32, codes_shape.to_vec(), words(&qweight)),
        ),
        (
            format!("{stem}.qzeros"),
            (Dtype::I32, vec![n_groups, n / 8], words(&qzeros)),
        ),
        (
            format!("{stem}.scales"),
            (Dtype::F16, vec![n_groups, n], half_bytes),
        ),
    ]);
    if matches!(method, Method::Gptq { .. }) {
        let groups = (0..k)
            .map(|col| (col / rounded.group_len) as u32)
            .collect::<Vec<_>>();
        let entry = (Dtype::I32, vec![k], words(&groups));
        tensors.insert(format!("{stem}.g_idx"), entry);
    }
    (tensors, dequantized)
}

fn pack_int8(stem: &str, n: usize, k: usize, values: &[f32]) -> (Tensors, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    let mut dequantized = Vec::new();
    for row in values.chunks_exact(k) {
        // Checkpoints of bf16 models keep their scales in bf16.
        let largest = row.iter().fold(0f32, |a, v| a.max(v.abs()));
        let scale = bf16::from_f32(largest / 127.0);
        for v in row {
            let code = (v / scale.to_f32()).round().clamp(-128.0, 127.0) as i8;
            codes.push(code.cast_unsigned());
            dequantized.push((scale.to_f64() * f64::from(code)) as f32);
        }
        scales.extend(scale.to_le_bytes());
    }
    let tensors = Tensors::from([
        (format!("{stem}.weight"), (Dtype::I8, vec![n, k], codes)),
        (
            format!("{stem}.weight_scale"),
            (Dtype::BF16, vec![n, 1], scales),
        ),
    ]);
    (tensors, dequantized)
}

/// What compressed-tensors' `pack_to_int32` writes: eight neighbours in a word, lowest first, each
/// signed code plus 8; zeros along the outputs.
fn pack_rows(
    stem: &str,
    n: usize,
    k: usize,
    rounded: &Rounded,
    symmetric: bool,
) -> (Tensors, Vec<f32>) {
    let n_groups = k / rounded.group_len;
    let packed = rounded
        .codes
        .chunks_exact(8)
        .map(|eight| (0..8).fold(0, |word, i| word | (eight[i] << (4 * i))))
        .collect::<Vec<u32>>();
    let zero_points = (0..n / 8)
        .flat_map(|w| (0..n_groups).map(move |group| (w, group)))
        .map(|(w, group)| {
            let zero = |i: usize| rounded.zeros[(8 * w + i) * n_groups + group];
            (0..8).fold(0, |word, i| word | (zero(i) << (4 * i)))
        })
        .collect::<Vec<u32>>();
    let mut dequantized = vec![0.0; n * k];
    for (i, value) in dequantized.iter_mut().enumerate() {
        let (row, group) = (i / k, i % k / rounded.group_len);
        let signed = |nibble: u32| f64::from(nibble) - 8.0;
        let code = signed((packed[i / 8] >> (4 * (i % 8))) & 15);
        let zero = match symmetric {
            true => 0.0,
            false => signed((zero_points[row / 8 * n_groups + group] >> (4 * (row % 8))) & 15),
        };
        *value = (rounded.scales[row * n_groups + group].to_f64() * (code - zero)) as f32;
    }
    let scales = rounded.scales.iter().flat_map(|s| s.to_le_bytes());
    let shape = [n as i64, k as i64].into_iter().flat_map(i64::to_le_bytes);
    let mut tensors = Tensors::from([
        (
            format!("{stem}.weight_packed"),
            (Dtype::I32, vec![n, k / 8], words(&packed)),
        ),
        (
            format!("{stem}.weight_scale"),
            (Dtype::F16, vec![n, n_groups], scales.collect()),
        ),
        (
            format!("{stem}.weight_shape"),
            (Dtype::I64, vec![2], shape.collect()),
        ),
    ]);
    if !symmetric {
        let entry = (Dtype::I32, vec![n / 8, n_groups], words(&zero_points));
        tensors.insert(format!("{stem}.weight_zero_point"), entry);
    }
    (tensors, dequantized)
}

/// FP8 codes of every row, cut to three bits of mantissa, and bf16 scales.
fn pack_fp8(stem: &str, n: usize, k: usize, values: &[f32]) -> (Tensors, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    let mut dequantized = Vec::new();
    for row in values.chunks_exact(k) {
        let largest = row.iter().fold(0f32, |a, v| a.max(v.abs()));
        let scale = bf16::from_f32(largest / 400.0);
        for v in row {
            // Numbers of e4m3 from 2^-6 on are those of f32 with four exponent bits (bias 7 in place of
            // 127) and three of mantissa; what is smaller becomes zero.
            let bits = (v / scale.to_f32()).to_bits();
            let magnitude = (bits & 0x7fff_ffff) >> 20;
            let code = match magnitude.checked_sub(120 << 3) {
                Some(code) if 8 <= code => code.min(0x7e) as u8,
                _ => 0,
            };
            let value = match code {
                0 => 0.0,
                _ => f64::from(8 + (code & 7)) / 8.0 * f64::from(i32::from(code >> 3) - 7).exp2(),
            };
            let sign = if bits >> 31 == 1 { -1.0 } else { 1.0 };
            codes.push(code | ((bits >> 31) << 7) as u8);
            dequantized.push((scale.to_f64() * sign * value) as f32);
        }
        scales.extend(scale.to_le_bytes());
    }
    let tensors = Tensors::from([
        (
            format!("{stem}.weight"),
            (Dtype::F8_E4M3, vec![n, k], codes),
        ),
        (
            format!("{stem}.weight_scale"),
            (Dtype::BF16, vec![n, 1], scales),
        ),
    ]);
    (tensors, dequantized)
}

fn quantization_config(method: Method) -> Value {
    let ignore = json!(["lm_head", "gate"]);
    match method {
        Method::Awq { group_len } => json!({
            "quant_method": "awq", "bits": 4, "group_size": group_len, "zero_point": true,
            "version": "gemm", "modules_to_not_convert": ignore,
        }),
        Method::Gptq {
            group_len,
            version,
            symmetric,
        } => {
            let group_size = if group_len == usize::MAX {
                -1
            } else {
                group_len as i64
            };
            json!({
                "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": false,
                "sym": symmetric, "lm_head": false,
                "checkpoint_format": if version == 2 { "gptq_v2" } else { "gptq" },
            })
        }
        Method::Int8 => json!({
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "quantization_status": "compressed", "ignore": ignore,
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "int", "symmetric": true,
                                      "dynamic": true, "strategy": "token"},
            }},
        }),
        Method::Packed {
            group_len,
            symmetric,
        } => {
            let (strategy, group_size) = match group_len {
                usize::MAX => ("channel", Value::Null),
                _ => ("group", json!(group_len)),
            };
            json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "quantization_status": "compressed", "ignore": ignore,
                "config_groups": {"group_0": {
                    "targets": ["Linear"], "input_activations": null, "output_activations": null,
                    "weights": {"num_bits": 4, "type": "int", "symmetric": symmetric,
                                "dynamic": false, "actorder": "weight",
                                "strategy": strategy, "group_size": group_size},
                }},
            })
        }
        Method::Fp8Rows => json!({
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "quantization_status": "compressed", "ignore": ignore,
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": true,
                            "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "symmetric": true,
                                      "dynamic": true, "strategy": "token"},
            }},
        }),
    }
}

fn logits(folder: &Path, isa: Isa, tokens: &[u32]) -> Vec<f32> {
    let cpu = CpuConfig {
        n_threads: 2,
        isa,
        activations: Activations::F32,
        kv_type: KvType::F32,
    };
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut session = Session::open(&checkpoint, Ranks::solo(cpu), tokens.len()).unwrap();
    let mut all = Vec::new();
    session
        .logits(tokens, |_, row| all.extend_from_slice(row))
        .unwrap();
    all
}

fn check(model: &str, method: Method) {
    let folder = source(model);
    let mut config: Value =
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let (mut packed, mut plain) = (Tensors::new(), Tensors::new());
    let mut n_packed = 0;
    for (name, (shape, values)) in read(&folder) {
        let as_f32 = |values: &[f32]| (Dtype::F32, shape.clone(), f32s(values));
        // Routers, embeddings, output layers and norms stay as they are.
        let linear = name.strip_suffix(".weight").filter(|stem| {
            stem.starts_with("model.layers.") && stem.contains("_proj") && shape.len() == 2
        });
        match (linear, shape.as_slice()) {
            (Some(stem), [n, k]) if n % 8 == 0 => {
                let (tensors, dequantized) = pack(method, stem, *n, *k, &values);
                packed.extend(tensors);
                plain.insert(name, as_f32(&dequantized));
                n_packed += 1;
            }
            _ => {
                packed.insert(name.clone(), as_f32(&values));
                plain.insert(name, as_f32(&values));
            }
        }
    }
    assert!(7 <= n_packed, "{n_packed} layers are packed");
    let dir = tempfile::tempdir().unwrap();
    let (packed_folder, plain_folder) = (dir.path().join("packed"), dir.path().join("plain"));
    write(&plain_folder, &config, &plain);
    config["quantization_config"] = quantization_config(method);
    write(&packed_folder, &config, &packed);
    let tokens = (0..70u32)
        .map(|i| (i * i * 7 + 3) % 370)
        .collect::<Vec<_>>();
    for isa in Isa::available() {
        let expected = logits(&plain_folder, isa, &tokens);
        let found = logits(&packed_folder, isa, &tokens);
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            assert!(
                (f - e).abs() <= LOGITS_TOLERANCE,
                "{model} {method:?} {isa:?} logit {i}: {f}, expected {e}"
            );
        }
    }
}

#[test]
fn awq_models_equal_their_dequantized_weights() {
    check("llama", Method::Awq { group_len: 32 });
    check("qwen3_moe", Method::Awq { group_len: 32 });
    check("deepseek_v3", Method::Awq { group_len: 32 });
}

#[test]
fn gptq_models_equal_their_dequantized_weights() {
    for (version, symmetric, group_len) in [(1, true, 32), (2, false, 32), (1, false, usize::MAX)] {
        let method = Method::Gptq {
            group_len,
            version,
            symmetric,
        };
        check("qwen2", method);
        check("deepseek_v2", method);
    }
}

#[test]
fn w4a16_models_equal_their_dequantized_weights() {
    for (symmetric, group_len) in [
        (true, 32),
        (false, 32),
        (true, usize::MAX),
        (false, usize::MAX),
    ] {
        let method = Method::Packed {
            group_len,
            symmetric,
        };
        check("llama", method);
        check("qwen3_moe", method);
    }
    let method = Method::Packed {
        group_len: 32,
        symmetric: false,
    };
    check("deepseek_v3", method);
}

#[test]
fn fp8_models_with_a_scale_per_output_equal_their_dequantized_weights() {
    check("qwen2", Method::Fp8Rows);
    check("deepseek_v2", Method::Fp8Rows);
}

#[test]
fn int8_models_equal_their_dequantized_weights() {
    check("llama", Method::Int8);
    check("deepseek_v2_lite", Method::Int8);
    check("qwen3_moe", Method::Int8);
}
