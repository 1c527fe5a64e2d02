//! Whole models against logits and greedy tokens computed elsewhere in float32.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{fs, path::PathBuf};

use dsd::{
    eval::{Ranks, Session},
    text::{PromptForm, TextModel},
    weights::Checkpoint,
};
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
    dtype::Format,
};
use safetensors::SafeTensors;
use serde_json::Value;

/// Float32 engines agree to about 1e-4; every known mistake in an architecture moves logits by
/// more than 0.07.
const LOGITS_TOLERANCE: f32 = 2e-3;

fn test_data() -> PathBuf {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data");
    let folder = std::env::var_os("DSD_TEST_DATA").map_or(default, PathBuf::from);
    assert!(
        folder.is_dir(),
        "{} is missing: run `make test-setup`",
        folder.display()
    );
    folder
}

fn cpu(isa: Isa) -> CpuConfig {
    CpuConfig {
        n_threads: 2,
        isa,
        activations: Activations::F32,
        kv_type: KvType::F32,
    }
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|v| u32::try_from(v.as_u64().unwrap()).unwrap())
        .collect()
}

fn check(model: &str) {
    let folder = test_data().join("reference").join(model);
    let golden: Value =
        serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let bytes = fs::read(folder.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for isa in Isa::available() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let mut session = Session::open(&checkpoint, Ranks::solo(cpu(isa)), 512).unwrap();
        for (index, prompt) in golden["prompts"].as_array().unwrap().iter().enumerate() {
            let tokens = ids(&prompt["ids"]);
            let expected = tensors.tensor(&format!("p{index}.logits")).unwrap();
            let expected = expected
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|raw| f32::from_le_bytes(*raw))
                .collect::<Vec<_>>();
            let vocab_len = session.vocab_len();
            // Of long prompts the last positions are kept.
            let n_skipped = tokens.len() - expected.len() / vocab_len;
            session
                .logits(&tokens, |position, row| {
                    let Some(position) = position.checked_sub(n_skipped) else {
                        return;
                    };
                    let expected = &expected[position * vocab_len..][..vocab_len];
                    for (id, (found, expected)) in row.iter().zip(expected).enumerate() {
                        assert!(
                            (found - expected).abs() <= LOGITS_TOLERANCE,
                            "{model} {isa:?} prompt {index} position {position} id {id}: \
                             {found}, expected {expected}"
                        );
                    }
                })
                .unwrap();
            let greedy = ids(&golden["greedy"][index]["tokens"]);
            let found = session.greedy(&tokens, greedy.len()).unwrap();
            assert_eq!(found, greedy, "{model} {isa:?} prompt {index}");
        }
    }
}

#[test]
fn llama_agrees() {
    check("llama");
}

#[test]
fn qwen2_agrees() {
    check("qwen2");
}

#[test]
fn qwen3_agrees() {
    check("qwen3");
}

#[test]
fn qwen3_moe_agrees() {
    check("qwen3_moe");
}

#[test]
fn deepseek_v2_lite_agrees() {
    check("deepseek_v2_lite");
}

#[test]
fn deepseek_v2_agrees() {
    check("deepseek_v2");
}

#[test]
fn deepseek_v3_agrees() {
    check("deepseek_v3");
}

#[test]
fn deepseek_v3_fp8_agrees() {
    check("deepseek_v3_fp8");
}

#[test]
fn smollm2_continues_as_the_reference_does() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/smollm2.json");
    let golden: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
    let file = test_data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let checkpoint = Checkpoint::open(&file).unwrap();
    let mut session =
        Session::open(&checkpoint, Ranks::solo(cpu(Isa::available()[0])), 256).unwrap();
    for prompt in golden["prompts"].as_array().unwrap() {
        let (tokens, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy"]));
        let found = session.greedy(&tokens, greedy.len()).unwrap();
        assert_eq!(found, greedy, "{}", prompt["prompt"]);
        let (nll, _) = session.mean_nll(&tokens, tokens.len()).unwrap();
        assert!(
            (nll - prompt["prompt_mean_nll"].as_f64().unwrap()).abs() < 1e-3,
            "{nll}"
        );
    }
}

/// What rounding costs on a real model and a text it knows: 1 % of perplexity at most, each.
#[test]
fn rounding_costs_at_most_one_percent_of_perplexity() {
    const N_TOKENS: usize = 768;
    let file = test_data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/../LICENSE");
    let text = fs::read_to_string(text).unwrap();
    let exact = cpu(Isa::available()[0]);
    let nll = |cpu: CpuConfig, weights: Option<Format>| {
        let mut checkpoint = Checkpoint::open(&file).unwrap();
        let tokens = TextModel::from_checkpoint(&checkpoint)
            .unwrap()
            .encode_prompt(&text, PromptForm::default(), usize::MAX)
            .unwrap();
        if let Some(format) = weights {
            checkpoint.round_weights(format);
        }
        let mut session = Session::open(&checkpoint, Ranks::solo(cpu), N_TOKENS).unwrap();
        session.mean_nll(&tokens[..N_TOKENS], N_TOKENS).unwrap().0
    };
    let base = nll(exact, None);
    let cases = [
        (
            "int8 activations",
            Some(Activations::Int8),
            KvType::F32,
            None,
        ),
        ("bf16 cache", None, KvType::Bf16, None),
        ("int8 cache", None, KvType::Int8, None),
        ("int8 weights", None, KvType::F32, Some(Format::Int8)),
    ];
    for (what, activations, kv_type, weights) in cases {
        let cpu = CpuConfig {
            activations: activations.unwrap_or(exact.activations),
            kv_type,
            ..exact
        };
        let cost = (nll(cpu, weights) - base).exp() - 1.0;
        assert!(cost <= 0.01, "{what}: perplexity grows by {cost}");
    }
}
