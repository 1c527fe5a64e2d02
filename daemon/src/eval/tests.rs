//! Made models: the same weights in different files give the same logits.

use std::{collections::BTreeMap, fs, path::Path};

use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};
use serde_json::{Value, json};
use tempfile::tempdir;

use super::{Ranks, Session, Sizes};
use crate::weights::{
    Checkpoint,
    tests::writer::{GgufWriter, f32s, safetensors, write_folder},
};

const TOKENS: [u32; 40] = {
    let mut tokens = [0; 40];
    let mut i = 0;
    while i < 40 {
        tokens[i] = (i * i * 7 + 3) as u32 % VOCAB as u32;
        i += 1;
    }
    tokens
};
const VOCAB: usize = 48;
const HIDDEN: usize = 32;
const HEADS: usize = 3;
const RANK: usize = 24;
const ROPE: usize = 8;
const Q_RANK: usize = 20;
const EXPERTS: usize = 4;
const INTER: usize = 16;
const DENSE_INTER: usize = 40;
/// The first is dense.
const LAYERS: usize = 2;

/// Hugging Face name to shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

struct Latent {
    v3: bool,
    compressed_query: bool,
    nope: usize,
    v: usize,
}

impl Latent {
    fn config(&self) -> Value {
        json!({
            "model_type": if self.v3 { "deepseek_v3" } else { "deepseek_v2" },
            "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS,
            "intermediate_size": DENSE_INTER, "moe_intermediate_size": INTER,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
            "num_attention_heads": HEADS, "q_lora_rank": self.compressed_query.then_some(Q_RANK),
            "kv_lora_rank": RANK, "qk_nope_head_dim": self.nope, "qk_rope_head_dim": ROPE,
            "v_head_dim": self.v, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
            "topk_method": if self.v3 { "noaux_tc" } else { "group_limited_greedy" },
            "norm_topk_prob": self.v3, "routed_scaling_factor": 2.5, "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn", "factor": 4, "original_max_position_embeddings": 32,
                "mscale": 0.707, "mscale_all_dim": 0.707,
            },
        })
    }

    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::new();
        let mut state = 1u64;
        let mut add = |name: String, shape: &[usize]| {
            let is_norm = name.ends_with("norm.weight");
            let spread = if is_norm { 0.2 } else { 1.7 } / (shape[shape.len() - 1] as f32).sqrt();
            let values = (0..shape.iter().product::<usize>()).map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                if is_norm {
                    1.0 + unit * spread
                } else {
                    unit * spread * 1.7
                }
            });
            tensors.insert(name, (shape.to_vec(), values.collect()));
        };
        add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
        add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
        add("model.norm.weight".into(), &[HIDDEN]);
        let q_len = HEADS * (self.nope + ROPE);
        for layer in 0..LAYERS {
            let mut add = |name: &str, shape: &[usize]| {
                add(format!("model.layers.{layer}.{name}.weight"), shape);
            };
            add("input_layernorm", &[HIDDEN]);
            add("post_attention_layernorm", &[HIDDEN]);
            if self.compressed_query {
                add("self_attn.q_a_proj", &[Q_RANK, HIDDEN]);
                add("self_attn.q_a_layernorm", &[Q_RANK]);
                add("self_attn.q_b_proj", &[q_len, Q_RANK]);
            } else {
                add("self_attn.q_proj", &[q_len, HIDDEN]);
            }
            add("self_attn.kv_a_proj_with_mqa", &[RANK + ROPE, HIDDEN]);
            add("self_attn.kv_a_layernorm", &[RANK]);
            add("self_attn.kv_b_proj", &[HEADS * (self.nope + self.v), RANK]);
            add("self_attn.o_proj", &[HIDDEN, HEADS * self.v]);
            let mut mlp = |prefix: &str, inter: usize| {
                add(&format!("{prefix}.gate_proj"), &[inter, HIDDEN]);
                add(&format!("{prefix}.up_proj"), &[inter, HIDDEN]);
                add(&format!("{prefix}.down_proj"), &[HIDDEN, inter]);
            };
            if layer == 0 {
                mlp("mlp", DENSE_INTER);
                continue;
            }
            mlp("mlp.shared_experts", INTER);
            for expert in 0..EXPERTS {
                mlp(&format!("mlp.experts.{expert}"), INTER);
            }
            add("mlp.gate", &[EXPERTS, HIDDEN]);
        }
        if self.v3 {
            let name = "model.layers.1.mlp.gate.e_score_correction_bias".to_owned();
            tensors.insert(name, (vec![EXPERTS], vec![0.1, -0.2, 0.3, -0.1]));
        }
        tensors
    }

    /// What llama.cpp's converter makes of it, with `kv_b_proj` whole (until 2025) or split.
    fn gguf(&self, split: bool) -> GgufWriter {
        let key = |suffix: &str| format!("deepseek2.{suffix}");
        let (key_len, heads) = (self.nope + ROPE, HEADS as u32);
        let mut writer = GgufWriter::new().string("general.architecture", "deepseek2");
        for (suffix, value) in [
            ("block_count", LAYERS),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", DENSE_INTER),
            ("context_length", 128),
            ("leading_dense_block_count", 1),
            ("attention.kv_lora_rank", RANK),
            ("rope.dimension_count", ROPE),
            ("expert_feed_forward_length", INTER),
            ("expert_count", EXPERTS),
            ("expert_used_count", 2),
            ("expert_shared_count", 1),
            ("expert_group_count", 2),
            ("expert_group_used_count", 1),
            ("rope.scaling.original_context_length", 32),
        ] {
            writer = writer.u32(&key(suffix), value as u32);
        }
        writer = writer
            .u32(&key("attention.head_count"), heads)
            .f32(&key("attention.layer_norm_rms_epsilon"), 1e-6)
            .f32(&key("rope.freq_base"), 10000.0)
            .f32(&key("expert_weights_scale"), 2.5)
            .bool(&key("expert_weights_norm"), self.v3)
            .string(&key("rope.scaling.type"), "yarn")
            .f32(&key("rope.scaling.factor"), 4.0)
            .f32(&key("rope.scaling.yarn_log_multiplier"), 0.0707);
        if self.compressed_query {
            writer = writer.u32(&key("attention.q_lora_rank"), Q_RANK as u32);
        }
        if self.v3 {
            writer = writer.u32(&key("expert_gating_func"), 2);
        }
        writer = if split {
            writer
                .u32(&key("attention.head_count_kv"), 1)
                .u32(&key("attention.key_length"), (RANK + ROPE) as u32)
                .u32(&key("attention.value_length"), RANK as u32)
                .u32(&key("attention.key_length_mla"), key_len as u32)
                .u32(&key("attention.value_length_mla"), self.v as u32)
        } else {
            writer
                .u32(&key("attention.head_count_kv"), heads)
                .u32(&key("attention.key_length"), key_len as u32)
                .u32(&key("attention.value_length"), self.v as u32)
        };
        self.tensors()
            .iter()
            .fold(writer, |writer, (name, tensor)| {
                self.gguf_tensor(writer, name, tensor, split)
            })
    }

    fn gguf_tensor(
        &self,
        writer: GgufWriter,
        name: &str,
        (shape, values): &(Vec<usize>, Vec<f32>),
        split: bool,
    ) -> GgufWriter {
        let dims = |shape: &[usize]| shape.iter().rev().map(|d| *d as u64).collect::<Vec<_>>();
        let Some((layer, part)) = name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.'))
        else {
            let gguf_name = match name {
                "model.embed_tokens.weight" => "token_embd.weight",
                "model.norm.weight" => "output_norm.weight",
                _ => "output.weight",
            };
            return writer.tensor(gguf_name, &dims(shape), 0, f32s(values));
        };
        let blk = |part: &str| format!("blk.{layer}.{part}");
        if let Some(part) = part.strip_prefix("mlp.experts.") {
            // All experts of a projection at once, when the first comes by.
            let Some(projection) = part.strip_prefix("0.") else {
                return writer;
            };
            let tensors = self.tensors();
            let stacked = (0..EXPERTS)
                .flat_map(|e| {
                    tensors[&format!("model.layers.{layer}.mlp.experts.{e}.{projection}")]
                        .1
                        .clone()
                })
                .collect::<Vec<_>>();
            let kind = projection.split('_').next().unwrap();
            let name = blk(&format!("ffn_{kind}_exps.weight"));
            return writer.tensor(
                &name,
                &dims(&[EXPERTS, shape[0], shape[1]]),
                0,
                f32s(&stacked),
            );
        }
        if split && part == "self_attn.kv_b_proj.weight" {
            let (mut keys, mut head_values) = (Vec::new(), Vec::new());
            for head in values.chunks_exact((self.nope + self.v) * RANK) {
                for r in 0..RANK {
                    keys.extend((0..self.nope).map(|d| head[d * RANK + r]));
                }
                head_values.extend_from_slice(&head[self.nope * RANK..]);
            }
            let (k_shape, v_shape) = ([HEADS, RANK, self.nope], [HEADS, self.v, RANK]);
            return writer
                .tensor(&blk("attn_k_b.weight"), &dims(&k_shape), 0, f32s(&keys))
                .tensor(
                    &blk("attn_v_b.weight"),
                    &dims(&v_shape),
                    0,
                    f32s(&head_values),
                );
        }
        let gguf_part = match part {
            "input_layernorm.weight" => "attn_norm.weight",
            "post_attention_layernorm.weight" => "ffn_norm.weight",
            "self_attn.q_proj.weight" => "attn_q.weight",
            "self_attn.q_a_proj.weight" => "attn_q_a.weight",
            "self_attn.q_a_layernorm.weight" => "attn_q_a_norm.weight",
            "self_attn.q_b_proj.weight" => "attn_q_b.weight",
            "self_attn.kv_a_proj_with_mqa.weight" => "attn_kv_a_mqa.weight",
            "self_attn.kv_a_layernorm.weight" => "attn_kv_a_norm.weight",
            "self_attn.kv_b_proj.weight" => "attn_kv_b.weight",
            "self_attn.o_proj.weight" => "attn_output.weight",
            "mlp.gate.weight" => "ffn_gate_inp.weight",
            "mlp.gate.e_score_correction_bias" => "exp_probs_b.bias",
            "mlp.gate_proj.weight" => "ffn_gate.weight",
            "mlp.up_proj.weight" => "ffn_up.weight",
            "mlp.down_proj.weight" => "ffn_down.weight",
            "mlp.shared_experts.gate_proj.weight" => "ffn_gate_shexp.weight",
            "mlp.shared_experts.up_proj.weight" => "ffn_up_shexp.weight",
            "mlp.shared_experts.down_proj.weight" => "ffn_down_shexp.weight",
            other => panic!("no GGUF name for {other}"),
        };
        writer.tensor(&blk(gguf_part), &dims(shape), 0, f32s(values))
    }
}

fn open(path: &Path, isa: Isa) -> Session {
    let cpu = CpuConfig {
        n_threads: 2,
        isa,
        activations: Activations::F32,
        kv_type: KvType::F32,
    };
    Session::open(
        &Checkpoint::open(path).unwrap(),
        Ranks::solo(cpu),
        2 * TOKENS.len(),
    )
    .unwrap()
}

fn logits(path: &Path, isa: Isa) -> Vec<f32> {
    let mut all = Vec::new();
    open(path, isa)
        .logits(&TOKENS, |_, row| all.extend_from_slice(row))
        .unwrap();
    all
}

fn write_safetensors(model: &Latent, folder: &Path) {
    let tensors = model.tensors();
    let entries = tensors
        .iter()
        .map(|(name, (shape, values))| (name.as_str(), "F32", shape.as_slice(), f32s(values)))
        .collect::<Vec<_>>();
    let files = [("model.safetensors", safetensors(&entries))];
    write_folder(folder, &model.config(), &files);
}

/// A folder without `tokenizer.json` was refused for want of ids to sample from.
#[test]
fn evaluation_needs_no_tokenizer() {
    let model = Latent {
        v3: true,
        compressed_query: true,
        nope: 12,
        v: 20,
    };
    let dir = tempdir().unwrap();
    write_safetensors(&model, dir.path());
    let mut session = open(dir.path(), Isa::available()[0]);
    let continuation = session.greedy(&TOKENS, 8).unwrap();
    assert_eq!(continuation.len(), 8);
    assert!(continuation.iter().all(|id| (*id as usize) < VOCAB));
}

#[test]
fn sizes_count_what_the_cache_holds() {
    let model = Latent {
        v3: true,
        compressed_query: true,
        nope: 12,
        v: 20,
    };
    let dir = tempdir().unwrap();
    write_safetensors(&model, dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let row = RANK + ROPE;
    for (kv_type, bytes) in [
        (KvType::F32, 4 * row),
        (KvType::Bf16, 2 * row),
        // Codes, a scale, and the rotary key in bf16.
        (KvType::Int8, RANK + 4 + 2 * ROPE),
    ] {
        let cpu = CpuConfig {
            n_threads: 1,
            isa: Isa::Portable,
            activations: Activations::F32,
            kv_type,
        };
        let sizes = Sizes::of(&checkpoint, Ranks::solo(cpu)).unwrap();
        assert_eq!(sizes.kv_per_token, (LAYERS * bytes) as u64, "{kv_type:?}");
    }
}

#[test]
fn deepseek2_gguf_files_equal_their_source() {
    for (v3, compressed_query, nope, v) in [
        (true, true, 12, 20),
        (true, false, 20, 12),
        (false, true, 16, 16),
        (false, false, 24, 8),
    ] {
        let model = Latent {
            v3,
            compressed_query,
            nope,
            v,
        };
        for isa in Isa::available() {
            let dir = tempdir().unwrap();
            write_safetensors(&model, dir.path());
            let expected = logits(dir.path(), isa);
            for split in [false, true] {
                let file = dir.path().join("m.gguf");
                fs::write(&file, model.gguf(split).bytes()).unwrap();
                let found = logits(&file, isa);
                assert_eq!(found.len(), expected.len());
                let worst = found
                    .iter()
                    .zip(&expected)
                    .fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
                assert!(
                    worst < 1e-4,
                    "v3 {v3} q_lora {compressed_query} split {split} {isa:?}: {worst}"
                );
            }
        }
    }
}

#[test]
fn deepseek2_gguf_files_that_are_not_understood_are_refused_by_name() {
    let model = Latent {
        v3: true,
        compressed_query: true,
        nope: 12,
        v: 20,
    };
    let refused = |writer: &GgufWriter, expected: &str| {
        let dir = tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        fs::write(&file, writer.bytes()).unwrap();
        let error = Checkpoint::open(&file).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let writer = model.gguf(true);
    refused(
        &writer.clone().u32("deepseek2.expert_gating_func", 3),
        "deepseek2.expert_gating_func is 3, expected 1 (softmax) or 2 (sigmoid)",
    );
    refused(
        &writer.clone().u32("deepseek2.nextn_predict_layers", 1),
        "deepseek2.nextn_predict_layers is 1, expected 0",
    );
    refused(
        &writer.clone().u32("deepseek2.attention.key_length", 40),
        "deepseek2.attention.key_length is 40, expected 32",
    );
    refused(
        &writer.clone().u32("deepseek2.attention.key_length_mla", 4),
        "deepseek2.attention.key_length is 4, expected at least the 8 rotated elements",
    );
    refused(
        &writer.without("deepseek2.attention.kv_lora_rank"),
        "deepseek2.attention.kv_lora_rank is missing, expected an integer",
    );
}

/// Sizes of a file are followed by loops and buffers; experts are stacked, so no tensor has the name
/// of the last one.
#[test]
fn sizes_of_deepseek2_gguf_files_are_held_against_their_tensors() {
    let model = Latent {
        v3: true,
        compressed_query: true,
        nope: 12,
        v: 20,
    };
    let open = |writer: &GgufWriter| {
        let dir = tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        fs::write(&file, writer.bytes()).unwrap();
        let checkpoint = Checkpoint::open(&file).map_err(|e| e.to_string())?;
        let spec = crate::model::spec_of(&checkpoint).map_err(|e| e.to_string());
        spec.map(drop)
    };
    for split in [false, true] {
        let writer = model.gguf(split);
        assert_eq!(open(&writer), Ok(()));
        for suffix in [
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.kv_lora_rank",
            "attention.q_lora_rank",
            "attention.head_count",
            "rope.dimension_count",
            "expert_feed_forward_length",
            "expert_count",
            "expert_used_count",
            "expert_shared_count",
            "expert_group_count",
        ] {
            let key = format!("deepseek2.{suffix}");
            for value in [3_u64, 4096, 16_384, 40_000_000, 1 << 40, u64::MAX] {
                /// The type of an unsigned integer of eight bytes.
                const U64: u32 = 10;
                let changed = writer.clone().without(&key);
                let changed = changed.raw(&key, U64, &value.to_le_bytes());
                let is_right = value == 3 && matches!(suffix, "attention.head_count");
                let outcome = open(&changed);
                assert_eq!(outcome.is_ok(), is_right, "{key} = {value}: {outcome:?}");
            }
        }
    }
}
