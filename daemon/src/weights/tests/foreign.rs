//! What people have in the place of weights, and what they are told.

use serde_json::{Value, json};

use super::{
    super::Checkpoint,
    describe,
    writer::{f32s, safetensors, write_folder},
};

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
    oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";

fn check(config: &Value, files: &[(&str, Vec<u8>)], expected: &str) {
    let dir = tempfile::tempdir().unwrap();
    write_folder(dir.path(), config, files);
    let error = Checkpoint::open(dir.path()).expect_err(expected);
    assert_eq!(describe(&error, dir.path()), format!("Foreign: {expected}"));
}

fn weights() -> (&'static str, Vec<u8>) {
    let plain = safetensors(&[("a", "F32", &[1], f32s(&[1.0]))]);
    ("model.safetensors", plain)
}

fn llama() -> Value {
    json!({"model_type": "llama"})
}

/// They were called truncated, no JSON and no GGUF.
#[test]
fn a_git_lfs_pointer_is_called_one() {
    let pointer = || POINTER.as_bytes().to_vec();
    let expected = |name: &str| {
        format!(
            "`@{name}` is a Git LFS pointer to a file of 12345 bytes, not the file itself; fetch it \
             with `git lfs pull`"
        )
    };
    for name in ["model.safetensors", "model.gguf"] {
        check(&llama(), &[(name, pointer())], &expected(name));
    }
    for name in [
        "generation_config.json",
        "model.safetensors.index.json",
        "config.json",
    ] {
        check(&llama(), &[weights(), (name, pointer())], &expected(name));
    }
    let dir = tempfile::tempdir().unwrap();
    write_folder(dir.path(), &llama(), &[("model.safetensors", pointer())]);
    let error = super::super::verify(dir.path(), None, |_| ()).unwrap_err();
    assert!(error.to_string().contains("Git LFS pointer"), "{error}");
}

#[test]
fn pickles_are_refused_by_their_name() {
    for name in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        let expected = format!(
            "`@{name}` is a checkpoint of PyTorch pickles, which are programs and never read; \
             convert it to safetensors (load it with transformers and call save_pretrained)"
        );
        check(&llama(), &[(name, vec![1])], &expected);
    }
    // Beside safetensors they do no harm.
    let dir = tempfile::tempdir().unwrap();
    write_folder(
        dir.path(),
        &llama(),
        &[weights(), ("pytorch_model.bin", vec![1])],
    );
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn the_forms_of_other_programs_are_refused_by_their_names() {
    let other = "use the model it was made from, or a form of it in FP8, AWQ, GPTQ or GGUF";
    let mlx = json!({"group_size": 64, "bits": 4});
    let expected = format!("`@config.json` is of a model quantized by MLX to 4 bits; {other}");
    let config = json!({"model_type": "llama", "quantization": mlx});
    check(&config, &[weights()], &expected);
    let config = json!({"model_type": "llama", "quantization": mlx, "quantization_config": mlx});
    check(&config, &[weights()], &expected);

    let expected = format!("`@config.json` is of a model quantized by ModelOpt (NVFP4); {other}");
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    let config = json!({"model_type": "llama", "quantization_config": modelopt});
    check(&config, &[weights()], &expected);
    let described = json!({"producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16}});
    let expected =
        format!("`@hf_quant_config.json` is of a model quantized by ModelOpt (NVFP4); {other}");
    let beside = ("hf_quant_config.json", described.to_string().into_bytes());
    check(&llama(), &[weights(), beside], &expected);
}

/// The first linear layer was called missing.
#[test]
fn packed_weights_whose_configuration_lies_beside_are_refused_with_its_name() {
    let packed = || {
        let words = safetensors(&[("l.qweight", "I32", &[1, 1], vec![0; 4])]);
        ("model.safetensors", words)
    };
    check(
        &llama(),
        &[packed(), ("quantize_config.json", b"{}".to_vec())],
        "`@quantize_config.json` is the description of GPTQ weights, which is read from config.json \
         alone; copy its keys there as `quantization_config`, with \"quant_method\": \"gptq\"",
    );
    check(
        &llama(),
        &[packed(), ("quant_config.json", b"{}".to_vec())],
        "`@quant_config.json` is the description of AWQ weights, which is read from config.json \
         alone; write there, as `quantization_config`: {\"quant_method\": \"awq\", \"bits\": w_bit, \
         \"group_size\": q_group_size, \"zero_point\": zero_point, \"version\": version}",
    );
    check(
        &llama(),
        &[packed()],
        "`@config.json` is without a quantization_config, and the weights are packed; write there \
         how they are packed (quant_method, bits, group_size)",
    );
    // Left over beside plain weights they say nothing.
    let dir = tempfile::tempdir().unwrap();
    let left_over = ("quantize_config.json", b"{}".to_vec());
    write_folder(dir.path(), &llama(), &[weights(), left_over]);
    Checkpoint::open(dir.path()).unwrap();
}
