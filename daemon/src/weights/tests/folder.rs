//! Whole checkpoints, in folders: configuration, index, shards, and what a model may take.

use std::{fs, path::Path};

use dsd_kernels::dtype::Format;
use serde_json::{Value, json};

use super::{
    super::Checkpoint,
    describe,
    writer::{GgufWriter, f32s, safetensors, tiny_gguf, tiny_llama_gguf, write_folder},
};
use crate::runtime::file::tests::for_each_stranger;

fn config() -> Value {
    json!({"model_type": "llama", "eos_token_id": [2, 3]})
}

fn fp8_config() -> Value {
    json!({"model_type": "deepseek_v3", "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [2, 2]}})
}

fn check_open(folder: &Path, expected: &str) {
    let error = Checkpoint::open(folder).expect_err(expected);
    assert_eq!(describe(&error, folder), expected);
}

/// Two shards: `a` in the first, `b` in the second.
fn sharded(folder: &Path, weight_map: &Value) {
    write_folder(
        folder,
        &config(),
        &[
            (
                "1.safetensors",
                safetensors(&[("a", "F32", &[1], f32s(&[1.0]))]),
            ),
            (
                "2.safetensors",
                safetensors(&[("b", "F32", &[1], f32s(&[2.0]))]),
            ),
            (
                "model.safetensors.index.json",
                json!({"metadata": {}, "weight_map": weight_map})
                    .to_string()
                    .into_bytes(),
            ),
        ],
    );
}

#[test]
fn tensors_come_out_as_they_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let half_one = 0x3C00u16.to_le_bytes().repeat(2);
    let weights = safetensors(&[
        ("w", "F32", &[2, 3], f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("norm", "F16", &[2], half_one),
        ("scalar", "F32", &[], f32s(&[7.0])),
    ]);
    write_folder(dir.path(), &config(), &[("model.safetensors", weights)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.architecture(), "llama");
    assert_eq!(checkpoint.eos_token_ids(), [2, 3]);
    assert_eq!(checkpoint.unclaimed(), ["norm", "scalar", "w"]);
    let matrix = checkpoint.matrix("w", 2, 3).unwrap();
    assert_eq!(
        (matrix.format(), matrix.data()),
        (Format::F32, &f32s(&[1., 2., 3., 4., 5., 6.])[..])
    );
    assert_eq!(checkpoint.vector("norm", 2).unwrap(), [1.0, 1.0]);
    assert_eq!(checkpoint.unclaimed(), ["scalar"]);
    drop(checkpoint);
    assert_eq!(
        matrix.row(1),
        f32s(&[4.0, 5.0, 6.0]),
        "the mapping outlives the checkpoint"
    );
}

#[test]
fn what_a_model_cannot_take_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let weights = safetensors(&[
        ("w", "F32", &[2, 3], f32s(&[1.0; 6])),
        ("ids", "I64", &[1, 1], vec![0; 8]),
        ("nan", "F32", &[2], f32s(&[1.0, f32::NAN])),
        ("scaled", "F32", &[2, 2], f32s(&[1.0; 4])),
        ("scaled_scale_inv", "F32", &[1, 1], f32s(&[1.0])),
        ("fp8", "F8_E4M3", &[3, 2], vec![0x38; 6]),
        ("fp8_scale_inv", "F32", &[1, 1], f32s(&[1.0])),
        ("bare", "F8_E4M3", &[2, 2], vec![0x38; 4]),
        ("good", "F8_E4M3", &[3, 2], vec![0x38; 6]),
        ("good_scale_inv", "F32", &[2, 1], f32s(&[1.0, 2.0])),
    ]);
    write_folder(dir.path(), &fp8_config(), &[("model.safetensors", weights)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let check = |name: &str, n_rows, n_cols, expected: &str| {
        let error = checkpoint.matrix(name, n_rows, n_cols).expect_err(expected);
        assert_eq!(describe(&error, dir.path()), expected);
    };
    check("x", 1, 1, "MissingTensor: `@`: tensor `x` is missing");
    check(
        "w",
        3,
        2,
        "TensorShape: `@model.safetensors`: tensor `w` has shape [2, 3], expected [3, 2]",
    );
    check(
        "ids",
        1,
        1,
        "TensorType: `@model.safetensors`: tensor `ids` has type i64, expected a type this version computes with",
    );
    check(
        "scaled",
        2,
        2,
        "UnexpectedScale: `@model.safetensors`: `scaled_scale_inv` scales `scaled`, which is f32, expected fp8_e4m3",
    );
    check(
        "fp8",
        3,
        2,
        "TensorShape: `@model.safetensors`: tensor `fp8_scale_inv` has shape [1, 1], expected [2, 1]",
    );
    check(
        "bare",
        2,
        2,
        "MissingScale: `@model.safetensors`: FP8 tensor `bare` needs `bare_scale_inv`, which is missing",
    );
    let error = checkpoint.vector("nan", 2).unwrap_err();
    assert_eq!(
        describe(&error, dir.path()),
        "NotFinite: `@model.safetensors`: element 1 of tensor `nan` is NaN, expected a finite number"
    );
    let matrix = checkpoint.matrix("good", 3, 2).unwrap();
    assert_eq!(matrix.tile_scales().unwrap().values, [1.0, 2.0]);
}

#[test]
fn fp8_without_a_quantization_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let weights = safetensors(&[
        ("w", "F8_E4M3", &[2, 2], vec![0x38; 4]),
        ("w_scale_inv", "F32", &[1, 1], f32s(&[1.0])),
    ]);
    write_folder(dir.path(), &config(), &[("model.safetensors", weights)]);
    let error = Checkpoint::open(dir.path())
        .unwrap()
        .matrix("w", 2, 2)
        .unwrap_err();
    assert_eq!(
        describe(&error, dir.path()),
        "Field: `@config.json`: quantization_config is missing, expected the tile shape of the FP8 tensors"
    );
}

#[test]
fn quantization_that_is_not_understood_is_refused_by_name() {
    let cases = [
        (
            json!({"quant_method": "bitsandbytes"}),
            "quant_method is \"bitsandbytes\", expected \"fp8\", \"awq\", \"gptq\" or \"compressed-tensors\"",
        ),
        (
            json!({"load_in_8bit": true}),
            "quant_method is null, expected \"fp8\", \"awq\", \"gptq\" or \"compressed-tensors\"",
        ),
        (
            json!({"quant_method": "fp8", "fmt": "e5m2"}),
            "fmt is \"e5m2\", expected \"e4m3\" or none",
        ),
        (
            json!({"quant_method": "fp8", "activation_scheme": "static"}),
            "activation_scheme is \"static\", expected \"dynamic\" or none",
        ),
        (
            json!({"quant_method": "fp8"}),
            "weight_block_size is null, expected two lengths",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128, 0]}),
            "weight_block_size is [128,0], expected two lengths",
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
        check_open(
            dir.path(),
            &format!("Field: `@config.json`: quantization_config.{expected}"),
        );
    }
}

#[test]
fn shards_and_index_must_agree() {
    let good = json!({"a": "1.safetensors", "b": "2.safetensors"});
    let dir = tempfile::tempdir().unwrap();
    sharded(dir.path(), &good);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.vector("a", 1).unwrap(), [1.0]);
    assert_eq!(checkpoint.vector("b", 1).unwrap(), [2.0]);
    assert_eq!(checkpoint.files().len(), 2);

    let cases = [
        (
            json!({"a": "1.safetensors"}),
            // The second shard is not the index's business.
            None,
        ),
        (
            json!({"a": "2.safetensors", "b": "1.safetensors"}),
            Some(
                "NotInIndex: `@1.safetensors`: tensor `a` is here, `@model.safetensors.index.json` expects it in `2.safetensors`",
            ),
        ),
        (
            json!({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}),
            Some(
                "NotInShard: `@2.safetensors`: tensor `c` is missing, `@model.safetensors.index.json` says it is here",
            ),
        ),
        (
            json!({"c": "1.safetensors", "b": "2.safetensors"}),
            Some(
                "NotInIndex: `@1.safetensors`: tensor `a` is here, `@model.safetensors.index.json` expects it in no shard",
            ),
        ),
        (
            json!({"a": "1.safetensors", "b": "3.safetensors"}),
            Some(
                "MissingShard: `@model.safetensors.index.json`: shard `3.safetensors` (of tensor `b`) is missing",
            ),
        ),
        (
            json!({"a": "../1.safetensors"}),
            Some(
                "ShardName: `@model.safetensors.index.json`: tensor `a` is said to be in `../1.safetensors`, expected a plain file name",
            ),
        ),
        (
            json!({"a": "/etc/passwd"}),
            Some(
                "ShardName: `@model.safetensors.index.json`: tensor `a` is said to be in `/etc/passwd`, expected a plain file name",
            ),
        ),
        (
            json!({"a": ""}),
            Some(
                "ShardName: `@model.safetensors.index.json`: tensor `a` is said to be in ``, expected a plain file name",
            ),
        ),
        (
            json!({"a": "x/"}),
            Some(
                "ShardName: `@model.safetensors.index.json`: tensor `a` is said to be in `x/`, expected a plain file name",
            ),
        ),
        (
            json!({"a": 1}),
            Some("Json: `@model.safetensors.index.json` is not valid model.safetensors.index.json"),
        ),
    ];
    for (weight_map, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        sharded(dir.path(), &weight_map);
        match expected {
            None => drop(Checkpoint::open(dir.path()).unwrap()),
            Some(expected) => check_open(dir.path(), expected),
        }
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    sharded(
        dir.path(),
        &json!({"a": "1.safetensors", "b": "2.safetensors"}),
    );
    let both = safetensors(&[
        ("b", "F32", &[1], f32s(&[2.0])),
        ("a", "F32", &[1], f32s(&[9.0])),
    ]);
    fs::write(dir.path().join("2.safetensors"), both).unwrap();
    check_open(
        dir.path(),
        "NotInIndex: `@2.safetensors`: tensor `a` is here, `@model.safetensors.index.json` expects it in `1.safetensors`",
    );
}

#[test]
fn folders_without_one_checkpoint_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let none = |n: usize| {
        format!(
            "NotACheckpoint: `@` holds none of the first two and {n} .gguf files, expected \
             model.safetensors, model.safetensors.index.json or one .gguf file (or all parts of one)"
        )
    };
    check_open(dir.path(), &none(0));
    for name in ["a.gguf", "b.gguf"] {
        fs::write(dir.path().join(name), tiny_llama_gguf().bytes()).unwrap();
    }
    check_open(dir.path(), &none(2));
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(matches!(
        Checkpoint::open(dir.path()),
        Err(super::super::WeightsError::Read { file, .. }) if file.ends_with("config.json")
    ));
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    check_open(
        dir.path(),
        "Field: `@config.json`: model_type is missing, expected the name of an architecture",
    );
    fs::write(dir.path().join("config.json"), "[]").unwrap();
    check_open(dir.path(), "Json: `@config.json` is not valid config.json");
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    check_open(
        dir.path(),
        "NotAFile: `@model.safetensors` is not a regular file",
    );
    let index = json!({"weight_map": {"a": "a.gguf"}}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    check_open(
        dir.path(),
        "NotACheckpoint: `@` holds both, and the index does not name model.safetensors, expected one of model.safetensors and model.safetensors.index.json",
    );
    let missing = dir.path().join("none");
    assert!(matches!(
        Checkpoint::open(&missing),
        Err(super::super::WeightsError::Read { .. })
    ));
}

/// A configuration's end token stopped answers although the generation configuration, where authors
/// mend it, named others.
#[test]
fn end_tokens_of_the_generation_configuration_stand_alone() {
    let check = |config: Value, generation: Value, expected: &[u32]| {
        let dir = tempfile::tempdir().unwrap();
        let one = safetensors(&[("a", "F32", &[1], f32s(&[1.0]))]);
        let files = [
            ("model.safetensors", one),
            (
                "generation_config.json",
                generation.to_string().into_bytes(),
            ),
        ];
        let config = json!({"architectures": ["X"], "eos_token_id": config});
        write_folder(dir.path(), &config, &files);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.architecture(), "X");
        assert_eq!(checkpoint.eos_token_ids(), expected, "{generation}");
        assert_eq!(checkpoint.generation_config(), Some(&generation));
    };
    check(json!(2), json!({"eos_token_id": [3, 7]}), &[3, 7]);
    check(json!([2, 3]), json!({"eos_token_id": 7}), &[7]);
    check(json!([2, 3]), json!({"temperature": 0.6}), &[2, 3]);
    check(json!(2), json!({"eos_token_id": null}), &[2]);
    check(json!(2), json!({"eos_token_id": []}), &[2]);
    check(json!(null), json!({"eos_token_id": 0}), &[0]);
    check(json!(null), json!({}), &[]);
    let dir = tempfile::tempdir().unwrap();
    let negative = json!({"model_type": "x", "eos_token_id": -1});
    let one = safetensors(&[("a", "F32", &[1], f32s(&[1.0]))]);
    write_folder(dir.path(), &negative, &[("model.safetensors", one)]);
    check_open(
        dir.path(),
        "Field: `@config.json`: eos_token_id is -1, expected a token id or a list of them",
    );
}

fn gguf(writer: &GgufWriter) -> Checkpoint {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    fs::write(&file, writer.bytes()).unwrap();
    Checkpoint::open(&file).unwrap()
}

/// A file whose end token was that of a text, not of a turn, never stopped.
#[test]
fn control_tokens_that_end_turns_stop_whatever_the_keys_say() {
    let tokens = [
        "a",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|im_start|>",
        "<|im_end|>",
    ];
    let check = |types: &[i32], eos: u32, expected: &[u32]| {
        let writer = tiny_llama_gguf()
            .strings("tokenizer.ggml.tokens", &tokens)
            .i32s("tokenizer.ggml.token_type", types)
            .u32("tokenizer.ggml.eos_token_id", eos);
        assert_eq!(gguf(&writer).eos_token_ids(), expected, "{types:?} {eos}");
    };
    check(&[1, 3, 3, 3, 3], 1, &[1, 2, 4]);
    check(&[1, 3, 3, 3, 3], 4, &[4, 1, 2]);
    // Whoever writes these letters in a text has not ended a turn.
    check(&[1, 1, 3, 3, 4], 1, &[1, 2]);
    check(&[1, 3, 1, 3, 3], 3, &[3, 1, 4]);
    for (token, ends) in [
        ("<end_of_turn>", true),
        ("<\u{FF5C}end\u{2581}of\u{2581}sentence\u{FF5C}>", true),
        ("<|eom_id|>", true),
        ("<|file_sep|>", true),
        ("<|fim_prefix|>", false),
        ("<|start_header_id|>", false),
    ] {
        let writer = tiny_llama_gguf()
            .strings("tokenizer.ggml.tokens", &[token])
            .i32s("tokenizer.ggml.token_type", &[3]);
        let expected: &[u32] = if ends { &[0] } else { &[] };
        assert_eq!(gguf(&writer).eos_token_ids(), expected, "{token}");
    }
}

/// A factor without a type was passed over; llama.cpp takes it for a linear one.
#[test]
fn a_rope_factor_without_a_type_is_linear() {
    let check = |edit: &dyn Fn(GgufWriter) -> GgufWriter, expected: Value| {
        let checkpoint = gguf(&edit(tiny_llama_gguf()));
        assert_eq!(checkpoint.config()["rope_scaling"], expected);
    };
    let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
    let (kind, factor) = ("llama.rope.scaling.type", "llama.rope.scaling.factor");
    let old = "llama.rope.scale_linear";
    check(&|g| g, json!(null));
    check(&|g| g.f32(factor, 4.0), linear(4.0));
    check(&|g| g.f32(old, 2.0), linear(2.0));
    check(&|g| g.f32(old, 2.0).f32(factor, 4.0), linear(4.0));
    check(&|g| g.f32(old, 2.0).string(kind, "linear"), linear(2.0));
    check(&|g| g.f32(factor, 4.0).string(kind, "none"), json!(null));
    check(&|g| g.f32(factor, 1.0), json!(null));
    check(&|g| g.f32(factor, 0.0), json!(null));
    check(&|g| g.string(kind, "linear"), json!(null));
}

#[test]
fn gguf_speaks_hugging_face() {
    let dir = tempfile::tempdir().unwrap();
    let writer = tiny_llama_gguf()
        .tensor_f32("rope_freqs.weight", &[8], 1.0)
        .u32("tokenizer.ggml.eos_token_id", 5)
        .u32("tokenizer.ggml.eot_token_id", 6)
        .string("llama.rope.scaling.type", "yarn")
        .f32("llama.rope.scaling.factor", 4.0)
        .u32("llama.rope.scaling.original_context_length", 32);
    fs::write(dir.path().join("m.gguf"), writer.bytes()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.rope_interleaved_qk());
    assert_eq!(checkpoint.eos_token_ids(), [5, 6]);
    let expected = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "vocab_size": 48, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "eos_token_id": 5,
    });
    assert_eq!(checkpoint.config(), &expected);
    checkpoint
        .matrix("model.embed_tokens.weight", 48, 32)
        .unwrap();
    checkpoint.vector("model.norm.weight", 32).unwrap();
    for (name, n_rows, n_cols) in [
        ("self_attn.q_proj", 32, 32),
        ("self_attn.k_proj", 16, 32),
        ("self_attn.v_proj", 16, 32),
        ("self_attn.o_proj", 32, 32),
        ("mlp.gate_proj", 64, 32),
        ("mlp.up_proj", 64, 32),
        ("mlp.down_proj", 32, 64),
    ] {
        let name = format!("model.layers.0.{name}.weight");
        checkpoint.matrix(&name, n_rows, n_cols).unwrap();
    }
    checkpoint
        .vector("model.layers.0.input_layernorm.weight", 32)
        .unwrap();
    checkpoint
        .vector("model.layers.0.post_attention_layernorm.weight", 32)
        .unwrap();
    assert_eq!(checkpoint.unclaimed(), ["rope_freqs.weight"]);
}

#[test]
fn gguf_expert_stacks_are_cut_into_matrices() {
    let dir = tempfile::tempdir().unwrap();
    let stack: Vec<f32> = (0..3 * 4 * 32).map(|i| i as f32).collect();
    let writer = tiny_gguf("qwen3moe")
        .u32("qwen3moe.expert_count", 3)
        .u32("qwen3moe.expert_used_count", 2)
        .u32("qwen3moe.expert_feed_forward_length", 4)
        .tensor("blk.0.ffn_gate_exps.weight", &[32, 4, 3], 0, f32s(&stack));
    let file = dir.path().join("m.gguf");
    fs::write(&file, writer.bytes()).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    assert_eq!(checkpoint.architecture(), "qwen3_moe");
    assert!(!checkpoint.rope_interleaved_qk());
    assert_eq!(checkpoint.config()["norm_topk_prob"], true);
    assert_eq!(checkpoint.config()["num_experts"], 3);
    let expert = "model.layers.0.mlp.experts.1.gate_proj.weight";
    assert_eq!(
        checkpoint.matrix(expert, 4, 32).unwrap().data(),
        f32s(&stack[128..256])
    );
}

#[test]
fn gguf_metadata_that_is_not_understood_is_refused_by_name() {
    let base = tiny_llama_gguf();
    let cases = [
        (
            base.clone().string("general.architecture", "gemma3"),
            "general.architecture is `gemma3`, expected llama, qwen2, qwen3, qwen3moe, deepseek2",
        ),
        (
            base.clone().without("llama.block_count"),
            "llama.block_count is missing, expected an integer",
        ),
        (
            base.clone().string("llama.block_count", "many"),
            "llama.block_count is `many`, expected a non-negative integer",
        ),
        (
            base.clone().u32("llama.attention.head_count", 0),
            "llama.attention.head_count is 0, expected at least 1",
        ),
        (
            base.clone().u32("llama.rope.dimension_count", 8),
            "llama.rope.dimension_count is 8, expected 16",
        ),
        (
            base.clone().u32("llama.expert_count", 8),
            "llama.expert_count is 8, expected 0",
        ),
        (
            base.clone().string("llama.rope.scaling.type", "longrope"),
            "llama.rope.scaling.type is longrope, expected none, linear or yarn",
        ),
        (
            base.clone()
                .f32("llama.attention.layer_norm_rms_epsilon", f32::NAN),
            "llama.attention.layer_norm_rms_epsilon is NaN, expected a finite number",
        ),
        (
            base.string("llama.rope.scaling.type", "yarn"),
            "llama.rope.scaling.factor is missing, expected a number",
        ),
    ];
    for (writer, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("m.gguf"), writer.bytes()).unwrap();
        check_open(dir.path(), &format!("Field: `@m.gguf`: {expected}"));
    }
}

/// What is no regular file is refused at once, wherever a file of a checkpoint belongs.
#[test]
fn strangers_in_the_places_of_files_are_refused() {
    let check = |name: &str, files: &[(&str, Vec<u8>)]| {
        let dir = tempfile::tempdir().unwrap();
        write_folder(dir.path(), &config(), files);
        for_each_stranger(&dir.path().join(name), |what| {
            // A link that leads nowhere is as good as no file, where one may be missing.
            if let Ok(opened) = Checkpoint::open(dir.path()) {
                assert!(what.starts_with("a link to"), "{name}: {what}");
                assert_eq!(opened.path(), dir.path());
            }
        });
    };
    let weights = || safetensors(&[("a", "F32", &[1], f32s(&[1.0]))]);
    let good = [("model.safetensors", weights())];
    check("config.json", &good);
    check("generation_config.json", &good);
    check("model.safetensors", &[]);
    check("model.safetensors.index.json", &[]);
    check("model.gguf", &[]);
}
