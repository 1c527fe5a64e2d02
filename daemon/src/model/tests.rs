//! Configurations as they are found in the wild, all of which mean the same.

use dsd_kernels::backend::{GateGroups, GroupScore};
use serde_json::{Map, Value, json};
use tempfile::tempdir;

use super::{
    DecoderSpec,
    build::refuse_extra_tensors,
    spec::{FfnSpec, spec_as_configured},
};
use crate::weights::{
    Checkpoint,
    tests::writer::{f32s, safetensors, write_folder},
};

fn spec(config: &Value) -> Result<DecoderSpec, String> {
    with_tensors(config, &["any"], |checkpoint| {
        spec_as_configured(checkpoint).map_err(|e| e.to_string())
    })
}

/// A checkpoint with tensors of these names.
fn with_tensors<T>(config: &Value, names: &[&str], look: impl FnOnce(&Checkpoint) -> T) -> T {
    let dir = tempdir().unwrap();
    let tensors: Vec<_> = names
        .iter()
        .map(|name| (*name, "F32", &[1usize][..], f32s(&[1.0])))
        .collect();
    let file = ("model.safetensors", safetensors(&tensors));
    write_folder(dir.path(), config, &[file]);
    look(&Checkpoint::open(dir.path()).unwrap())
}

/// A configuration as published before transformers 5.
fn published(model_type: &str) -> Map<String, Value> {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 48, "vocab_size": 96, "num_hidden_layers": 3,
        "intermediate_size": 40, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
        "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu",
        "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "bfloat16",
        "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128},
    });
    let more = match model_type {
        "qwen3_moe" => json!({
            "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": true,
            "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }),
        "deepseek_v2" | "deepseek_v3" => json!({
            "q_lora_rank": null, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
            "qk_rope_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": if model_type == "deepseek_v3" { 1 } else { 0 },
        }),
        _ => json!({}),
    };
    let object = config.as_object_mut().unwrap();
    object.extend(more.as_object().unwrap().clone());
    object.clone()
}

/// The same as transformers 5 saves it.
fn resaved(mut config: Map<String, Value>) -> Map<String, Value> {
    let mut rope = config.remove("rope_scaling").unwrap();
    let rope = rope.as_object_mut().unwrap();
    let rope_type = rope.remove("type").unwrap();
    rope.insert("rope_type".to_owned(), rope_type);
    rope.insert(
        "rope_theta".to_owned(),
        config.remove("rope_theta").unwrap(),
    );
    config.insert("rope_parameters".to_owned(), json!(rope));
    for (published, saved) in [
        ("torch_dtype", "dtype"),
        ("num_experts", "num_local_experts"),
        ("n_routed_experts", "num_local_experts"),
        ("num_nextn_predict_layers", "num_mtp_layers"),
    ] {
        if let Some(value) = config.remove(published) {
            config.insert(saved.to_owned(), value);
        }
    }
    config
}

const LINES: [&str; 6] = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
];

/// Qwen3-MoE saved by transformers 5.23 was refused: `num_experts` had become
/// `num_local_experts`.
#[test]
fn both_spellings_of_a_configuration_mean_the_same() {
    for line in LINES {
        let published = published(line);
        let expected = spec(&json!(published)).unwrap();
        assert_eq!(expected.n_extra_layers, usize::from(line == "deepseek_v3"));
        assert_eq!(spec(&json!(resaved(published))), Ok(expected), "{line}");
    }
}

/// Configurations without `rope_theta` were refused; every implementation takes 10000.
#[test]
fn optional_keys_may_be_null_or_absent() {
    for line in LINES {
        let full = published(line);
        let expected = spec(&json!(full)).unwrap();
        for key in [
            "rope_theta",
            "tie_word_embeddings",
            "attention_bias",
            "hidden_act",
            "torch_dtype",
            "moe_layer_freq",
            "n_group",
            "topk_group",
            "decoder_sparse_step",
            "mlp_only_layers",
        ] {
            let mut config = full.clone();
            if config.insert(key.to_owned(), Value::Null).is_some() {
                assert_eq!(spec(&json!(config)).as_ref(), Ok(&expected), "{line} {key}");
            }
            config.remove(key);
            // V3's have defaults, which no key says away but these.
            if (line, key) != ("deepseek_v3", "n_group") {
                assert_eq!(spec(&json!(config)).as_ref(), Ok(&expected), "{line} {key}");
            }
        }
    }
}

#[test]
fn required_keys_are_asked_for_by_name() {
    for (line, key) in [
        ("llama", "hidden_size"),
        ("qwen3_moe", "num_experts"),
        ("deepseek_v2", "n_routed_experts"),
        ("deepseek_v3", "q_lora_rank"),
    ] {
        let mut config = published(line);
        config.remove(key);
        let expected = format!("config key `{key}` is missing");
        assert_eq!(spec(&json!(config)), Err(expected), "{line}");
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (line, key, value, expected) in [
        (
            "qwen2",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
            "config key `layer_types` is `\"sliding_attention\"`, which is not supported; \
             only full_attention is",
        ),
        (
            "qwen3",
            "use_sliding_window",
            json!(true),
            "config key `use_sliding_window` is `true`, which is not supported; \
             only full attention is",
        ),
        (
            "llama",
            "rope_scaling",
            json!({"rope_type": "dynamic", "factor": 2.0}),
            "config key `rope_scaling.type` is `dynamic`, which is not supported; \
             default, linear, llama3 and yarn are",
        ),
        (
            "deepseek_v2",
            "norm_topk_prob",
            json!(true),
            "config key `norm_topk_prob` is `true`, which is not supported; \
             false is, for deepseek_v2",
        ),
        (
            "deepseek_v3",
            "num_experts_per_tok",
            json!(9),
            "config is contradictory: num_experts_per_tok 9 exceeds the 8 experts that can be \
             chosen",
        ),
    ] {
        let mut config = published(line);
        config.insert(key.to_owned(), value);
        assert_eq!(spec(&json!(config)), Err(expected.to_owned()), "{line}");
    }
}

/// A configuration that training had trimmed to what differs from transformers' defaults was read
/// with other ones: V3's weights of experts were off by 2.5.
#[test]
fn absent_keys_of_deepseek_mean_what_transformers_takes_them_for() {
    let trimmed = |line: &str, keys: &[&str]| {
        let mut config = published(line);
        config.insert("num_hidden_layers".to_owned(), json!(5));
        config.insert("n_routed_experts".to_owned(), json!(32));
        keys.iter().for_each(|key| drop(config.remove(*key)));
        config
    };
    let all = [
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "n_shared_experts",
        "norm_topk_prob",
    ];
    let n_dense = |spec: &DecoderSpec| {
        let is_dense = |ffn: &&FfnSpec| matches!(ffn, FfnSpec::Mlp { .. });
        spec.ffns.iter().take_while(is_dense).count()
    };
    let moe = |spec: &DecoderSpec| match spec.ffns.last() {
        Some(FfnSpec::Moe(moe)) => moe.clone(),
        other => panic!("{other:?}"),
    };
    let v3 = spec(&json!(trimmed("deepseek_v3", &all))).unwrap();
    assert_eq!(n_dense(&v3), 3);
    let found = moe(&v3);
    assert_eq!((found.gate.scale, found.gate.normalize), (2.5, true));
    assert_eq!(found.shared_inter, Some(24));
    let groups = GateGroups {
        n_groups: 8,
        top_groups: 4,
        group_score: GroupScore::TopTwoSum,
    };
    assert_eq!(found.gate.groups, Some(groups));
    let v2 = spec(&json!(trimmed("deepseek_v2", &all))).unwrap();
    assert_eq!(n_dense(&v2), 0);
    let found = moe(&v2);
    assert_eq!((found.gate.scale, found.gate.normalize), (1.0, false));
    assert_eq!((found.shared_inter, found.gate.groups), (Some(48), None));

    // Groups that the default makes of too few experts have no two best.
    let mut config = trimmed("deepseek_v3", &["n_group", "topk_group"]);
    config.insert("n_routed_experts".to_owned(), json!(8));
    let expected = "config is contradictory: n_group 8 and topk_group 4 do not fit 8 experts";
    assert_eq!(spec(&json!(config)), Err(expected.to_owned()));
    let mut config = trimmed("deepseek_v2", &["n_group"]);
    config.insert("topk_method".to_owned(), json!("group_limited_greedy"));
    let expected = "config key `n_group` is missing";
    assert_eq!(spec(&json!(config)), Err(expected.to_owned()));
}

/// The head in the file was dropped without a word, and answers were those of another model.
#[test]
fn a_head_of_its_own_is_used_whatever_the_configuration_says() {
    let mut config = published("llama");
    for (tied, names, expected) in [
        (true, &["any"][..], true),
        (true, &["lm_head.weight"][..], false),
        (false, &["lm_head.weight"][..], false),
    ] {
        config.insert("tie_word_embeddings".to_owned(), json!(tied));
        let spec = with_tensors(&json!(config), names, |checkpoint| {
            spec_as_configured(checkpoint).unwrap()
        });
        assert_eq!(spec.tied_head, expected, "{tied} {names:?}");
    }
}

/// Checkpoints keep the tensors of prediction heads when their count is set to 0 or left out.
#[test]
fn prediction_heads_are_left_alone_also_where_none_are_counted() {
    let heads = [
        "model.layers.3.eh_proj.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.shared_head.norm.weight",
    ];
    let check = |n: Option<u64>, more: &[&str]| {
        let mut config = published("deepseek_v3");
        match n {
            Some(n) => config.insert("num_nextn_predict_layers".to_owned(), json!(n)),
            None => config.remove("num_nextn_predict_layers"),
        };
        let names = [&heads, more].concat();
        with_tensors(&json!(config), &names, |checkpoint| {
            let spec = spec_as_configured(checkpoint).unwrap();
            let source = checkpoint.of_rank(0, 1).unwrap();
            refuse_extra_tensors(&source, &spec).map_err(|e| e.to_string())
        })
    };
    for n in [Some(0), None, Some(1)] {
        assert_eq!(check(n, &[]), Ok(()), "{n:?}");
        // Layers that were cut off, and heads among the layers that count, are something else.
        for other in [
            "model.layers.4.self_attn.o_proj.weight",
            "model.layers.2.eh_proj.weight",
        ] {
            let error = check(n, &[other]).unwrap_err();
            assert!(error.contains(other), "{n:?}: {error}");
        }
    }
}
