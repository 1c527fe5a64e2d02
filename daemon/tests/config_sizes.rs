//! Invariant: whatever numbers a configuration holds, opening, planning and loading its model end in
//! an error or a model, and nothing near [`ALLOCATION_MAX`] is allocated on the way.
//!
//! A test of its own process: the counter sees every thread of it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    ops::Range,
    os::unix::fs::{FileExt, symlink},
    panic::catch_unwind,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use dsd::{
    runner::{Budget, ReplicaPlan, load_cpu, plan_cpu},
    text::TextModel,
    weights::Checkpoint,
};
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};
use serde_json::{Value, json};

/// Bytes that a case may hold at once; the largest of these models is loaded in 20 MB.
const ALLOCATION_MAX: usize = 64 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counting;

fn grown(len: usize) {
    let live = LIVE.fetch_add(len, Relaxed) + len;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, first: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(first, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, first: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        grown(len);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.realloc(first, layout, len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn test_data() -> PathBuf {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data");
    std::env::var_os("DSD_TEST_DATA").map_or(default, PathBuf::from)
}

/// Held while memory is counted: tests of one process run at once.
static COUNTING: Mutex<()> = Mutex::new(());

fn cpu() -> CpuConfig {
    CpuConfig {
        n_threads: 1,
        isa: Isa::available()[0],
        activations: Activations::F32,
        kv_type: KvType::F32,
    }
}

/// A small cache and small steps, since those are the operator's choice.
const BUDGET: Budget = Budget {
    kv_bytes_max: 1 << 20,
    step_tokens_max: 16,
    step_spans_max: 4,
};

/// What the node's loader does with a path before it starts ranks.
fn plan(path: &Path) -> Result<(Checkpoint, ReplicaPlan), String> {
    let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
    // More ranks than one see the sizes from another side, and may be too many for this model.
    let _ = plan_cpu(&checkpoint, cpu(), 2, BUDGET, None);
    let plan = plan_cpu(&checkpoint, cpu(), 1, BUDGET, None).map_err(|e| e.to_string())?;
    Ok((checkpoint, plan))
}

/// The same, and what the ranks do with it: a model that could compute.
fn load(path: &Path) -> Result<(), String> {
    let (checkpoint, plan) = plan(path)?;
    let text = TextModel::from_checkpoint(&checkpoint).map_err(|e| e.to_string());
    load_cpu(&checkpoint, cpu(), &plan.ranks[0]).map_err(|e| e.to_string())?;
    text.map(drop)
}

/// Runs a case; fails the test on a panic or too much memory. Returns the outcome.
fn check<T>(case: &str, path: &Path, run: fn(&Path) -> Result<T, String>) -> Result<(), String> {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let outcome = catch_unwind(|| run(path).map(drop));
    let outcome = outcome.unwrap_or_else(|_| panic!("{case} panicked"));
    let taken = PEAK.load(Relaxed).saturating_sub(before);
    assert!(
        taken < ALLOCATION_MAX,
        "{case} took {taken} bytes: {outcome:?}"
    );
    outcome
}

/// Values that are wrong for most keys, and some that a size may have.
fn values() -> [Value; 7] {
    [
        json!(0),
        json!(1),
        json!(-1),
        json!(1_u64 << 31),
        json!(1_u64 << 40),
        json!(40_000_000),
        json!(u64::MAX),
    ]
}

/// Paths to all integers of a value, through objects and lists.
fn integers(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(n) if n.is_i64() || n.is_u64() => found.push(path.to_owned()),
        Value::Array(list) => {
            for (i, value) in list.iter().enumerate() {
                integers(value, &format!("{path}/{i}"), found);
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                integers(value, &format!("{path}/{key}"), found);
            }
        }
        _ => {}
    }
}

/// `num_experts: 40000000` ended the agent: a string for the name of every expert of every layer.
#[test]
fn no_integer_of_a_configuration_ends_the_process() {
    let _counting = COUNTING.lock();
    let reference = test_data().join("reference");
    let mut n_cases = 0;
    for model in fs::read_dir(&reference).unwrap() {
        let model = model.unwrap();
        let name = model.file_name().into_string().unwrap();
        let mut config = Value::Null;
        let folder = with_config(&name, |original| config = original.clone());
        let mut paths = Vec::new();
        integers(&config, "", &mut paths);
        assert!(8 < paths.len(), "{name}: {paths:?}");
        let write = |config: &Value| {
            fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        };
        assert_eq!(check(&name, folder.path(), load), Ok(()));
        for path in &paths {
            for value in values() {
                let case = format!("{name}: {path} = {value}");
                let mut config = config.clone();
                *config.pointer_mut(path).unwrap() = value;
                write(&config);
                let outcome = check(&case, folder.path(), load);
                n_cases += 1;
                let key = path.rsplit('/').next().unwrap();
                if let (true, Err(message)) = (case.ends_with("= 40000000"), outcome) {
                    assert!(message.contains(key), "{case}: {message}");
                }
            }
        }
    }
    assert!(1000 < n_cases, "{n_cases}");
}

/// Every size is a little off at least once, below all maxima.
#[test]
fn sizes_that_the_tensors_do_not_have_are_refused_with_key_value_and_what_is_there() {
    let _counting = COUNTING.lock();
    for (model, key, value, expected) in [
        (
            "llama",
            "vocab_size",
            385,
            "tensor `model.embed_tokens.weight` has 384 rows",
        ),
        (
            "llama",
            "num_hidden_layers",
            1000,
            "there are tensors of 2 layers",
        ),
        ("qwen3", "num_attention_heads", 4096, "has 384 rows"),
        ("qwen3", "num_key_value_heads", 3, "has 128 rows"),
        ("qwen3", "intermediate_size", 100_000, "has 224 rows"),
        (
            "qwen3_moe",
            "num_experts",
            16_384,
            "tensor `model.layers.0.mlp.gate.weight` has 10 rows",
        ),
        ("qwen3_moe", "moe_intermediate_size", 64, "has 32 rows"),
        (
            "qwen3_moe",
            "mlp_only_layers",
            7,
            "the tensors of layer 1 have no experts",
        ),
        ("deepseek_v3", "n_routed_experts", 10_000, "rows"),
        ("deepseek_v3", "n_shared_experts", 9, "rows"),
        ("deepseek_v3", "kv_lora_rank", 1 << 20, "rows"),
        ("deepseek_v3", "q_lora_rank", 1 << 20, "rows"),
        (
            "deepseek_v3",
            "first_k_dense_replace",
            0,
            "the tensors of layer 0 have no experts",
        ),
    ] {
        let folder = with_config(model, |config| {
            let value = json!(value);
            let is_list = config[key].is_array();
            config[key] = if is_list { json!([value]) } else { value };
        });
        let case = format!("{model} {key} {value}");
        let message = check(&case, folder.path(), plan).unwrap_err();
        let start = format!("config key `{key}` is ");
        assert!(
            message.starts_with(&start) && message.contains(&value.to_string()),
            "{case}: {message}"
        );
        assert!(message.contains(expected), "{case}: {message}");
    }
}

/// A copy of a reference model with another configuration.
fn with_config(model: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let original = test_data().join("reference").join(model);
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(&original).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "config.json" {
            symlink(file.path(), folder.path().join(file.file_name())).unwrap();
        }
    }
    let config = fs::read(original.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// The same for the metadata of a GGUF file, whose integers are changed in place.
#[test]
fn no_integer_of_gguf_metadata_ends_the_process() {
    let _counting = COUNTING.lock();
    let original = test_data().join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let bytes = fs::read(&original).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, &bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let mut n_cases = 0;
    for (key, place) in gguf_integers(&bytes) {
        for value in values() {
            let wanted = value.as_u64().unwrap_or(u64::MAX);
            let raw = &wanted.to_le_bytes()[..place.len()];
            file.write_all_at(raw, place.start as u64).unwrap();
            let case = format!("{key} = {value}");
            // As far as a plan: loading copies 90 MB into panels.
            let outcome = check(&case, &path, plan);
            n_cases += 1;
            if value == json!(40_000_000) && key.starts_with("llama.") {
                assert!(outcome.is_err() || key == "llama.context_length", "{case}");
            }
        }
        file.write_all_at(&bytes[place.clone()], place.start as u64)
            .unwrap();
    }
    assert!(50 < n_cases, "{n_cases}");
}

/// Keys of a GGUF file with one integer each, and where it is.
fn gguf_integers(bytes: &[u8]) -> Vec<(String, Range<usize>)> {
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    // Bytes of a value by its type; strings and arrays have lengths of their own.
    let len_of = |kind: u32| match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        other => panic!("type {other}"),
    };
    let mut at = 24;
    let mut found = Vec::new();
    for _ in 0..u64_at(16) {
        let key = String::from_utf8(bytes[at + 8..at + 8 + u64_at(at)].to_vec()).unwrap();
        at += 8 + key.len();
        let kind = u32_at(at);
        at += 4;
        match kind {
            8 => at += 8 + u64_at(at),
            9 => {
                let (kind, n) = (u32_at(at), u64_at(at + 4));
                at += 12;
                for _ in 0..n {
                    at += match kind {
                        8 => 8 + u64_at(at),
                        kind => len_of(kind),
                    };
                }
            }
            kind => {
                let place = at..at + len_of(kind);
                at = place.end;
                if matches!(kind, 0..=5 | 10 | 11) {
                    found.push((key, place));
                }
            }
        }
    }
    found
}
