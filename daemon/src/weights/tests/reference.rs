//! Checkpoints that others wrote.

use dsd_kernels::dtype::Format;

use super::{super::Checkpoint, super::verify, test_data};

#[test]
fn smollm2_opens_from_gguf() {
    let file = test_data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let checkpoint = Checkpoint::open(&file).unwrap();
    assert_eq!(checkpoint.architecture(), "llama");
    assert!(checkpoint.rope_interleaved_qk());
    assert_eq!(checkpoint.bytes_mapped(), 98_362_432);
    // Its key names 2; 0 is <|endoftext|>, 4 ends a file in a filled hole.
    assert_eq!(checkpoint.eos_token_ids(), [2, 0, 4]);
    let config = checkpoint.config();
    for (key, expected) in [
        ("hidden_size", 576),
        ("num_hidden_layers", 30),
        ("intermediate_size", 1536),
        ("num_attention_heads", 9),
        ("num_key_value_heads", 3),
        ("head_dim", 64),
        ("max_position_embeddings", 8192),
        ("vocab_size", 49152),
    ] {
        assert_eq!(config[key], expected, "{key}");
    }
    assert_eq!(config["rope_theta"], 100_000.0);
    assert_eq!(config["rms_norm_eps"], 1e-5);
    assert_eq!(config["tie_word_embeddings"], true);
    let embedding = checkpoint
        .matrix("model.embed_tokens.weight", 49152, 576)
        .unwrap();
    assert_eq!(embedding.format(), Format::Q8_0);
    let q_proj = checkpoint
        .matrix("model.layers.29.self_attn.q_proj.weight", 576, 576)
        .unwrap();
    assert_eq!(q_proj.format(), Format::Q4_1);
    checkpoint.vector("model.norm.weight", 576).unwrap();
    assert_eq!(checkpoint.unclaimed().len(), 272 - 3);
}

#[test]
fn every_reference_checkpoint_opens_and_verifies() {
    for (model, n_files) in [
        ("llama", 1),
        ("qwen2", 1),
        ("qwen3", 1),
        ("qwen3_moe", 1),
        ("deepseek_v2", 1),
        ("deepseek_v2_lite", 2),
        ("deepseek_v3", 2),
        ("deepseek_v3_fp8", 1),
    ] {
        let folder = test_data().join("reference").join(model);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!(checkpoint.files().len(), n_files, "{model}");
        let report = verify(&folder, None, |_| ()).unwrap();
        assert!(report.is_good(), "{model}: {:?}", report.findings);
        assert_eq!(report.tensors.len(), checkpoint.names().count(), "{model}");
    }
}

#[test]
fn fp8_matrices_carry_their_ragged_scales() {
    let folder = test_data().join("reference/deepseek_v3_fp8");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let matrix = checkpoint.matrix(name, 320, 224).unwrap();
    assert_eq!(matrix.format(), Format::F8E4m3);
    assert_eq!(matrix.tile_scales().unwrap().values.len(), 3 * 2);
    assert!(
        !checkpoint
            .unclaimed()
            .contains(&format!("{name}_scale_inv"))
    );
}
