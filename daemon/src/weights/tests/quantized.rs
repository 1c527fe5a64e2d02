//! AWQ, GPTQ, W8A8 and W4A16 folders: values against the formats' definitions, element by element, and
//! everything that is refused.

use std::path::Path;

use dsd_kernels::{dtype::Format, matrix::Matrix, quant};
use half::f16;
use serde_json::{Value, json};

use super::{
    super::Checkpoint,
    describe,
    writer::{f32s, safetensors, write_folder},
};

const N_ROWS: usize = 16;
const N_COLS: usize = 128;

/// A pattern without symmetry: outputs, inputs and their neighbours all differ.
fn code(row: usize, col: usize) -> u32 {
    ((row * 7 + col * 3 + row * col) % 16) as u32
}

fn zero(group: usize, row: usize) -> u32 {
    ((group * 5 + row * 3) % 15 + 1) as u32
}

fn scale(group: usize, row: usize) -> f32 {
    f16::from_f32(0.01 + 0.003 * group as f32 + 0.0007 * row as f32).to_f32()
}

fn halves(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values
        .flat_map(|v| f16::from_f32(v).to_le_bytes())
        .collect()
}

fn words(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

/// Eight nibbles, the first lowest.
fn pack(nibbles: impl Fn(usize) -> u32) -> u32 {
    (0..8).fold(0, |word, i| word | (nibbles(i) << (4 * i)))
}

type Tensor = (&'static str, &'static str, Vec<usize>, Vec<u8>);

fn scales(n_groups: usize) -> Tensor {
    let values = (0..n_groups).flat_map(|group| (0..N_ROWS).map(move |row| scale(group, row)));
    ("l.scales", "F16", vec![n_groups, N_ROWS], halves(values))
}

/// What AutoAWQ's GEMM packer writes: word `w` of an input holds outputs `8 w + ORDER[i]`.
fn awq(group_len: usize) -> Vec<Tensor> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let n_groups = N_COLS / group_len;
    let codes = (0..N_COLS)
        .flat_map(|col| (0..N_ROWS / 8).map(move |w| pack(|i| code(8 * w + ORDER[i], col))));
    let zeros = (0..n_groups)
        .flat_map(|group| (0..N_ROWS / 8).map(move |w| pack(|i| zero(group, 8 * w + ORDER[i]))));
    vec![
        ("l.qweight", "I32", vec![N_COLS, N_ROWS / 8], words(codes)),
        ("l.qzeros", "I32", vec![n_groups, N_ROWS / 8], words(zeros)),
        scales(n_groups),
    ]
}

/// What AutoGPTQ's packer writes: a word holds eight inputs of an output.
fn gptq(group_len: usize, zero_offset: u32) -> Vec<Tensor> {
    let n_groups = N_COLS / group_len;
    let codes =
        (0..N_COLS / 8).flat_map(|w| (0..N_ROWS).map(move |row| pack(|i| code(row, 8 * w + i))));
    let zeros = (0..n_groups).flat_map(|group| {
        (0..N_ROWS / 8).map(move |w| pack(|i| zero(group, 8 * w + i) - zero_offset))
    });
    let groups = (0..N_COLS).map(|col| (col / group_len) as u32);
    vec![
        ("l.qweight", "I32", vec![N_COLS / 8, N_ROWS], words(codes)),
        ("l.qzeros", "I32", vec![n_groups, N_ROWS / 8], words(zeros)),
        scales(n_groups),
        ("l.g_idx", "I32", vec![N_COLS], words(groups)),
    ]
}

fn open(folder: &Path, quantization: &Value, tensors: &[Tensor]) -> Checkpoint {
    let config = json!({"model_type": "llama", "quantization_config": quantization});
    let tensors = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (*name, *dtype, shape.as_slice(), data.clone()))
        .collect::<Vec<_>>();
    write_folder(
        folder,
        &config,
        &[("model.safetensors", safetensors(&tensors))],
    );
    Checkpoint::open(folder).unwrap()
}

fn values(matrix: &Matrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.n_rows() * matrix.n_cols()];
    for (row, out) in values.chunks_exact_mut(matrix.n_cols()).enumerate() {
        quant::decode_row(matrix, row, out);
    }
    values
}

fn check_int4(quantization: &Value, tensors: &[Tensor], group_len: usize) {
    check_packed(quantization, tensors, group_len, zero);
}

fn check_packed(
    quantization: &Value,
    tensors: &[Tensor],
    group_len: usize,
    zero: impl Fn(usize, usize) -> u32,
) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(dir.path(), quantization, tensors);
    assert!(checkpoint.contains("l.weight"));
    assert_eq!(checkpoint.format("l.weight"), Some(Format::Int4));
    let matrix = checkpoint.matrix("l.weight", N_ROWS, N_COLS).unwrap();
    assert!(checkpoint.unclaimed().is_empty());
    for (i, found) in values(&matrix).into_iter().enumerate() {
        let (row, col) = (i / N_COLS, i % N_COLS);
        let group = col / group_len;
        let code = f64::from(code(row, col)) - f64::from(zero(group, row));
        let expected = f64::from(scale(group, row)) * code;
        assert_eq!(f64::from(found), expected, "row {row} column {col}");
    }
}

#[test]
fn awq_values_are_those_of_the_definition() {
    for group_len in [32, 64, 128] {
        let config = json!({
            "quant_method": "awq", "bits": 4, "group_size": group_len, "zero_point": true,
            "version": "gemm", "modules_to_not_convert": ["lm_head"],
        });
        check_int4(&config, &awq(group_len), group_len);
    }
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": -1});
    check_int4(&config, &awq(N_COLS), N_COLS);
}

#[test]
fn gptq_values_are_those_of_the_definition_in_both_versions() {
    for (format, zero_offset) in [(json!(null), 1), (json!("gptq"), 1), (json!("gptq_v2"), 0)] {
        for group_len in [32, 64, 128] {
            let mut config = json!({
                "quant_method": "gptq", "bits": 4, "group_size": group_len, "sym": false,
                "desc_act": false, "checkpoint_format": format,
            });
            check_int4(&config, &gptq(group_len, zero_offset), group_len);
            // Old files have no g_idx; files with desc_act may still be in order.
            config["desc_act"] = json!(true);
            check_int4(&config, &gptq(group_len, zero_offset), group_len);
            check_int4(&config, &gptq(group_len, zero_offset)[..3], group_len);
        }
    }
    let config = json!({"quant_method": "gptq", "bits": 4, "group_size": -1});
    check_int4(&config, &gptq(N_COLS, 1), N_COLS);
}

/// Files say one version and hold the zeros of the other, and every weight was off by its scale: the
/// zeros of a symmetric layer can only be 8.
#[test]
fn zeros_of_symmetric_gptq_layers_tell_their_version() {
    /// Value of the code in row 3, column 5, of a layer whose zeros are all stored as `stored`.
    fn code_less_zero(sym: &Value, format: &str, stored: impl Fn(usize) -> u32) -> f32 {
        let mut tensors = gptq(128, 1);
        let zeros = (0..N_ROWS / 8).map(|w| pack(|i| stored(8 * w + i)));
        tensors[1].3 = words(zeros);
        let config = json!({
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": sym,
            "checkpoint_format": format,
        });
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = open(dir.path(), &config, &tensors);
        let matrix = checkpoint.matrix("l.weight", N_ROWS, N_COLS).unwrap();
        code(3, 5) as f32 - values(&matrix)[3 * N_COLS + 5] / scale(0, 3)
    }
    let check = |sym: Value, format: &str, stored: u32, expected: f32| {
        let found = code_less_zero(&sym, format, |_| stored);
        assert!(
            (found - expected).abs() < 1e-3,
            "{sym} {format} {stored}: {found}"
        );
    };
    for sym in [json!(true), json!(null)] {
        for format in ["gptq", "gptq_v2"] {
            check(sym.clone(), format, 7, 8.0);
            check(sym.clone(), format, 8, 8.0);
        }
        check(sym.clone(), "gptq", 6, 7.0);
        check(sym, "gptq_v2", 6, 6.0);
    }
    check(json!(false), "gptq", 8, 9.0);
    check(json!(false), "gptq_v2", 7, 7.0);
    // Zeros that differ are of no symmetric layer.
    let mixed = code_less_zero(&json!(true), "gptq", |row| 8 - (row as u32 & 1));
    assert!((mixed - 8.0).abs() < 1e-3, "{mixed}");
}

fn int8_config() -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "quantization_status": "compressed", "kv_cache_scheme": null, "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "output_activations": null,
            "weights": {"num_bits": 8, "type": "int", "symmetric": true, "dynamic": false,
                        "strategy": "channel", "group_size": null},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": true,
                                  "dynamic": true, "strategy": "token"},
        }},
    })
}

#[test]
fn int8_values_are_those_of_the_definition() {
    for scale_shape in [vec![N_ROWS], vec![N_ROWS, 1]] {
        let dir = tempfile::tempdir().unwrap();
        let code = |i: usize| ((i * 37 + i / 128 * 11) % 256) as u8;
        let scale = |row: usize| 0.001 + 0.0003 * row as f32;
        let tensors = [
            (
                "l.weight",
                "I8",
                vec![N_ROWS, N_COLS],
                (0..N_ROWS * N_COLS).map(code).collect(),
            ),
            (
                "l.weight_scale",
                "F32",
                scale_shape,
                f32s(&(0..N_ROWS).map(scale).collect::<Vec<_>>()),
            ),
            ("lm_head.weight", "F32", vec![2, 2], f32s(&[1.0; 4])),
        ];
        let checkpoint = open(dir.path(), &int8_config(), &tensors);
        assert_eq!(checkpoint.format("l.weight"), Some(Format::Int8));
        assert_eq!(checkpoint.format("lm_head.weight"), Some(Format::F32));
        let matrix = checkpoint.matrix("l.weight", N_ROWS, N_COLS).unwrap();
        for (i, found) in values(&matrix).into_iter().enumerate() {
            let expected = scale(i / N_COLS) * f32::from(code(i).cast_signed());
            assert_eq!(found, expected, "element {i}");
        }
        checkpoint.matrix("lm_head.weight", 2, 2).unwrap();
        assert!(checkpoint.unclaimed().is_empty());
    }
}

/// What compressed-tensors writes of four-bit codes: `pack_to_int32` along the inputs, zeros along the
/// outputs, both plus 8.
fn packed_rows(group_len: usize, symmetric: bool) -> Vec<Tensor> {
    let n_groups = N_COLS / group_len;
    let codes =
        (0..N_ROWS).flat_map(|row| (0..N_COLS / 8).map(move |w| pack(|i| code(row, 8 * w + i))));
    let scales = (0..N_ROWS).flat_map(|row| (0..n_groups).map(move |group| scale(group, row)));
    let shape = [N_ROWS, N_COLS].map(|n| (n as u64).to_le_bytes());
    let mut tensors = vec![
        (
            "l.weight_packed",
            "I32",
            vec![N_ROWS, N_COLS / 8],
            words(codes),
        ),
        (
            "l.weight_scale",
            "F16",
            vec![N_ROWS, n_groups],
            halves(scales),
        ),
        ("l.weight_shape", "I64", vec![2], shape.concat()),
    ];
    if !symmetric {
        let zeros = (0..N_ROWS / 8)
            .flat_map(|w| (0..n_groups).map(move |group| pack(|i| zero(group, 8 * w + i))));
        let shape = vec![N_ROWS / 8, n_groups];
        tensors.push(("l.weight_zero_point", "I32", shape, words(zeros)));
    }
    tensors
}

/// W4A16 as compressed-tensors writes it.
fn packed_config(group_len: Option<usize>, symmetric: bool) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "kv_cache_scheme": null, "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "output_activations": null, "input_activations": null,
            "weights": {"num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": false,
                        "strategy": if group_len.is_some() { "group" } else { "channel" },
                        "group_size": group_len, "actorder": null, "observer": "minmax"},
        }},
    })
}

#[test]
fn w4a16_values_are_those_of_the_definition() {
    for symmetric in [true, false] {
        for group_len in [32, 64, 128] {
            let config = packed_config(Some(group_len), symmetric);
            let tensors = packed_rows(group_len, symmetric);
            match symmetric {
                false => check_int4(&config, &tensors, group_len),
                true => check_packed(&config, &tensors, group_len, |_, _| 8),
            }
        }
    }
    check_int4(
        &packed_config(None, false),
        &packed_rows(N_COLS, false),
        N_COLS,
    );
}

#[test]
fn fp8_with_a_scale_per_output_is_read() {
    let dir = tempfile::tempdir().unwrap();
    // Every code but the two NaN.
    let code =
        |i: usize| ((i * 37 + i / 128 * 11) % 127) as u8 | (u8::from(i.is_multiple_of(3)) << 7);
    let scale = |row: usize| 0.001 + 0.0003 * row as f32;
    let codes = (0..N_ROWS * N_COLS).map(code).collect::<Vec<_>>();
    let scales = f32s(&(0..N_ROWS).map(scale).collect::<Vec<_>>());
    let tensors = [
        ("l.weight", "F8_E4M3", vec![N_ROWS, N_COLS], codes),
        ("l.weight_scale", "F32", vec![N_ROWS, 1], scales),
    ];
    let checkpoint = open(dir.path(), &fp8_rows_config(), &tensors);
    assert_eq!(checkpoint.format("l.weight"), Some(Format::F8E4m3));
    let matrix = checkpoint.matrix("l.weight", N_ROWS, N_COLS).unwrap();
    assert!(checkpoint.unclaimed().is_empty());
    for (i, found) in values(&matrix).into_iter().enumerate() {
        let expected = scale(i / N_COLS) * quant::e4m3_to_f32(code(i));
        assert_eq!(found, expected, "element {i}");
    }
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(dir.path(), &fp8_rows_config(), &tensors[..1]);
    let error = checkpoint.matrix("l.weight", N_ROWS, N_COLS).unwrap_err();
    assert_eq!(
        describe(&error, dir.path()),
        "MissingTensor: `@`: tensor `l.weight_scale` is missing"
    );
}

fn fp8_rows_config() -> Value {
    let mut config = int8_config();
    config["format"] = json!("float-quantized");
    for part in ["weights", "input_activations"] {
        config["config_groups"]["group_0"][part]["type"] = json!("float");
    }
    config
}

#[test]
fn plain_linear_layers_are_rounded_on_request_and_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let weights = f32s(
        &(0..64)
            .map(|i| (i as f32 - 20.0) / 50.0)
            .collect::<Vec<_>>(),
    );
    let names = [
        "a.q_proj.weight",
        "a.kv_b_proj.weight",
        "mlp.gate.weight",
        "lm_head.weight",
    ];
    let tensors = names.map(|name| (name, "F32", &[2usize, 32][..], weights.clone()));
    let config = json!({"model_type": "llama"});
    write_folder(
        dir.path(),
        &config,
        &[("model.safetensors", safetensors(&tensors))],
    );
    for format in [Format::Int8, Format::Int4] {
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.round_weights(format);
        for (name, expected) in
            names
                .into_iter()
                .zip([format, Format::F32, Format::F32, Format::F32])
        {
            assert_eq!(checkpoint.format(name), Some(expected), "{name}");
            assert_eq!(
                checkpoint.matrix(name, 2, 32).unwrap().format(),
                expected,
                "{name}"
            );
        }
    }
}

#[test]
fn layers_that_do_not_fit_their_scheme_are_refused_by_name() {
    let check = |quantization: &Value, tensors: &[Tensor], expected: &str| {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = open(dir.path(), quantization, tensors);
        let error = checkpoint.matrix("l.weight", N_ROWS, N_COLS).unwrap_err();
        assert_eq!(describe(&error, dir.path()), expected);
    };
    let config = |method: &str, group_len: usize| json!({"quant_method": method, "bits": 4, "group_size": group_len, "desc_act": true});
    check(
        &config("awq", 96),
        &awq(64),
        "Field: `@model.safetensors`: quantization_config.group_size is 96, expected a divisor of the 128 columns of `l.weight`, themselves a multiple of 32",
    );
    check(
        &config("awq", 32),
        &awq(64),
        "TensorShape: `@model.safetensors`: tensor `l.qzeros` has shape [2, 2], expected [4, 2]",
    );
    check(
        &config("gptq", 64),
        &awq(64),
        "TensorShape: `@model.safetensors`: tensor `l.qweight` has shape [128, 2], expected [16, 16]",
    );
    check(
        &config("awq", 64),
        &awq(64)[..2],
        "MissingTensor: `@`: tensor `l.scales` is missing",
    );
    let mut tensors = gptq(64, 1);
    tensors[3].3[4..8].copy_from_slice(&1u32.to_le_bytes());
    check(
        &config("gptq", 64),
        &tensors,
        "Field: `@model.safetensors`: tensor `l.g_idx` (desc_act) is group 1, expected column 1 in group 0, columns in order",
    );
    let mut tensors = awq(128);
    tensors[0].1 = "F32";
    check(
        &config("awq", 128),
        &tensors,
        "TensorType: `@model.safetensors`: tensor `l.qweight` has type f32, expected i32",
    );
    let mut tensors = awq(128);
    tensors[2] = ("l.scales", "F32", vec![1, N_ROWS], f32s(&[0.1; N_ROWS]));
    check(
        &config("awq", 128),
        &tensors,
        "Field: `@model.safetensors`: element 0 of tensor `l.scales` is 0.1, expected a number that f16 holds",
    );
    let codes = (
        "l.weight",
        "I8",
        vec![N_ROWS, N_COLS],
        vec![0; N_ROWS * N_COLS],
    );
    check(
        &int8_config(),
        std::slice::from_ref(&codes),
        "MissingTensor: `@`: tensor `l.weight_scale` is missing",
    );
    let mut tensors = packed_rows(64, true);
    tensors[2].3[8..].copy_from_slice(&64u64.to_le_bytes());
    check(
        &packed_config(Some(64), true),
        &tensors,
        "Field: `@model.safetensors`: tensor `l.weight_shape` is [16, 64], expected [16, 128]",
    );
    check(
        &packed_config(Some(96), true),
        &packed_rows(64, true),
        "Field: `@model.safetensors`: group_size of quantization_config.config_groups is 96, expected a divisor of the 128 columns of `l.weight`, themselves a multiple of 32",
    );
    check(
        &packed_config(Some(64), false),
        &packed_rows(64, true),
        "MissingTensor: `@`: tensor `l.weight_zero_point` is missing",
    );
    check(
        &packed_config(Some(32), true),
        &packed_rows(64, true),
        "TensorShape: `@model.safetensors`: tensor `l.weight_scale` has shape [16, 2], expected [16, 4]",
    );
    let of_groups = (
        "l.weight_scale",
        "F32",
        vec![N_ROWS, 4],
        f32s(&[1.0; 4 * N_ROWS]),
    );
    check(
        &int8_config(),
        &[codes.clone(), of_groups],
        "TensorShape: `@model.safetensors`: tensor `l.weight_scale` has shape [16, 4], expected [16, 1]",
    );
    check(
        &config("awq", 32),
        &[codes],
        "TensorType: `@model.safetensors`: tensor `l.weight` has type i8, expected a type this version computes with",
    );
}

#[test]
fn schemes_that_are_not_read_are_refused_by_key() {
    let edited = |mut config: Value, pointer: &str, value: Value| {
        *config.pointer_mut(pointer).unwrap() = value;
        config
    };
    let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": null, "sym": true,
                      "is_marlin_format": false, "checkpoint_format": "gptq"});
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
                     "zero_point": true, "modules_to_not_convert": null});
    let int8 = int8_config;
    let w4a16 = || packed_config(Some(128), true);
    let weights = "/config_groups/group_0/weights";
    let input = "/config_groups/group_0/input_activations";
    let cases = [
        (
            edited(gptq.clone(), "/bits", json!(3)),
            "bits is 3, expected 4",
        ),
        (
            edited(gptq.clone(), "/bits", json!(8)),
            "bits is 8, expected 4",
        ),
        (
            edited(gptq.clone(), "/group_size", json!(48)),
            "group_size is 48, expected -1 or a multiple of 32 up to 65536",
        ),
        (
            edited(gptq.clone(), "/dynamic", json!({"-:.*down": {}})),
            "dynamic is {\"-:.*down\":{}}, expected no rules for single modules",
        ),
        (
            edited(gptq.clone(), "/is_marlin_format", json!(true)),
            "is_marlin_format is true, expected false",
        ),
        (
            edited(gptq.clone(), "/sym", json!("yes")),
            "sym is \"yes\", expected true or false",
        ),
        (
            edited(gptq, "/checkpoint_format", json!("marlin")),
            "checkpoint_format is \"marlin\", expected \"gptq\" or \"gptq_v2\" or none",
        ),
        (
            edited(awq.clone(), "/bits", json!("4")),
            "bits is \"4\", expected 4",
        ),
        (
            edited(awq.clone(), "/version", json!("gemv")),
            "version is \"gemv\", expected \"gemm\" or \"GEMM\" or none",
        ),
        (
            edited(awq.clone(), "/zero_point", json!(false)),
            "zero_point is false, expected true",
        ),
        (
            edited(awq, "/modules_to_not_convert", json!([1])),
            "modules_to_not_convert is [1], expected a list of names",
        ),
        (
            edited(int8(), "/format", json!("marlin-24")),
            "format is \"marlin-24\", expected \"int-quantized\" or \"pack-quantized\" or \"float-quantized\"",
        ),
        (
            edited(
                fp8_rows_config(),
                &format!("{weights}/strategy"),
                json!("tensor"),
            ),
            "config_groups.group_0.weights.strategy is \"tensor\", expected \"channel\"",
        ),
        (
            edited(fp8_rows_config(), &format!("{input}/dynamic"), json!(false)),
            "config_groups.group_0.input_activations.dynamic is false, expected true",
        ),
        (
            edited(fp8_rows_config(), "/format", json!("int-quantized")),
            "config_groups.group_0.weights.type is \"float\", expected \"int\"",
        ),
        (
            edited(w4a16(), &format!("{weights}/num_bits"), json!(8)),
            "config_groups.group_0.weights.num_bits is 8, expected 4",
        ),
        (
            edited(w4a16(), &format!("{weights}/group_size"), json!(16)),
            "config_groups.group_0.weights.group_size is 16, expected -1 or a multiple of 32 up to 65536",
        ),
        (
            edited(w4a16(), &format!("{weights}/actorder"), json!("group")),
            "config_groups.group_0.weights.actorder is \"group\", expected \"weight\", \"static\" or none",
        ),
        (
            edited(w4a16(), &format!("{weights}/strategy"), json!("block")),
            "config_groups.group_0.weights.strategy is \"block\", expected \"group\" or \"channel\"",
        ),
        (
            edited(w4a16(), &format!("{weights}/type"), json!("float")),
            "config_groups.group_0.weights.type is \"float\", expected \"int\" or none",
        ),
        (
            edited(w4a16(), input, json!({"num_bits": 8})),
            "config_groups.group_0.input_activations is {\"num_bits\":8}, expected none",
        ),
        (
            edited(int8(), "/ignore", json!("lm_head")),
            "ignore is \"lm_head\", expected a list of names",
        ),
        (
            edited(int8(), "/kv_cache_scheme", json!({"num_bits": 8})),
            "kv_cache_scheme is {\"num_bits\":8}, expected none",
        ),
        (
            edited(int8(), "/config_groups", json!({})),
            "config_groups is {}, expected at least one group",
        ),
        (
            edited(int8(), &format!("{weights}/strategy"), json!("group")),
            "config_groups.group_0.weights.strategy is \"group\", expected \"channel\"",
        ),
        (
            edited(int8(), &format!("{weights}/num_bits"), json!(4)),
            "config_groups.group_0.weights.num_bits is 4, expected 8",
        ),
        (
            edited(int8(), &format!("{weights}/symmetric"), json!(false)),
            "config_groups.group_0.weights.symmetric is false, expected true",
        ),
        (
            edited(int8(), &format!("{input}/dynamic"), json!(false)),
            "config_groups.group_0.input_activations.dynamic is false, expected true",
        ),
        (
            edited(int8(), &format!("{input}/type"), json!("float")),
            "config_groups.group_0.input_activations.type is \"float\", expected \"int\"",
        ),
    ];
    for (quantization, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"model_type": "llama", "quantization_config": quantization});
        write_folder(
            dir.path(),
            &config,
            &[("model.safetensors", safetensors(&[]))],
        );
        let error = Checkpoint::open(dir.path()).expect_err(expected);
        assert_eq!(
            describe(&error, dir.path()),
            format!("Field: `@config.json`: quantization_config.{expected}")
        );
    }
}
