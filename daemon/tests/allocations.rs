//! Invariant: a step of an executor that has run one as long before allocates nothing.
//!
//! A test of its own process: the counter sees every thread of it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use dsd::{
    runner::{Budget, LogitRows, StepExecutor, StepPlan, load_cpu, plan_cpu},
    weights::Checkpoint,
};
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
    dtype::Format,
};

static N_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, first: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(first, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, first: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.realloc(first, layout, len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PROMPT_LEN: usize = 40;
const N_SEQUENCES: usize = 3;
const BLOCKS_EACH: usize = 4;

fn executor(model: &str, weights: Option<Format>, kv_type: KvType) -> impl StepExecutor {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data");
    let data = std::env::var_os("DSD_TEST_DATA").map_or(default, PathBuf::from);
    let folder = data.join("reference").join(model);
    assert!(
        folder.is_dir(),
        "{} is missing: run `make test-setup`",
        folder.display()
    );
    let mut checkpoint = Checkpoint::open(&folder).unwrap();
    let mut activations = Activations::F32;
    if let Some(format) = weights {
        checkpoint.round_weights(format);
        activations = Activations::Int8;
    }
    let cpu = CpuConfig {
        n_threads: 2,
        isa: Isa::available()[0],
        activations,
        kv_type,
    };
    let budget = Budget {
        kv_bytes_max: 16 << 20,
        step_tokens_max: 128,
        step_spans_max: 8,
    };
    let plan = plan_cpu(&checkpoint, cpu, 1, budget, None).unwrap();
    load_cpu(&checkpoint, cpu, &plan.ranks[0]).unwrap()
}

/// The prompts of all sequences in one step, then two tokens more of each; `plans[i]` is step `i`.
fn plans() -> Vec<StepPlan> {
    let mut plans = Vec::new();
    for positions in [
        0..PROMPT_LEN,
        PROMPT_LEN..PROMPT_LEN + 1,
        PROMPT_LEN + 1..PROMPT_LEN + 2,
    ] {
        let mut plan = StepPlan::default();
        for sequence in 0..N_SEQUENCES {
            let tokens = positions
                .clone()
                .map(|i| ((i * 37 + sequence * 101) % 370) as u32)
                .collect::<Vec<_>>();
            let blocks = (0..BLOCKS_EACH).map(|b| (sequence * BLOCKS_EACH + b) as u32);
            plan.push(
                sequence as u64,
                positions.start,
                &tokens,
                &blocks.collect::<Vec<_>>(),
                LogitRows::Last,
            );
        }
        plans.push(plan);
    }
    plans
}

#[test]
fn a_step_as_long_as_one_before_allocates_nothing() {
    for (model, weights, kv_type) in [
        ("llama", None, KvType::F32),
        ("llama", Some(Format::Int4), KvType::Bf16),
        ("qwen3_moe", Some(Format::Int8), KvType::Int8),
        ("deepseek_v2", None, KvType::Bf16),
        ("deepseek_v3", Some(Format::Int8), KvType::Int8),
        ("deepseek_v3_fp8", None, KvType::F32),
    ] {
        let before = N_ALLOCATIONS.load(Relaxed);
        let mut executor = executor(model, weights, kv_type);
        assert!(before < N_ALLOCATIONS.load(Relaxed), "loading is counted");
        let plans = plans();
        let mut counted = Vec::with_capacity(plans.len());
        for _ in 0..2 {
            counted.clear();
            for plan in &plans {
                let before = N_ALLOCATIONS.load(Relaxed);
                let logits = executor.execute(plan).unwrap();
                assert!(logits.iter().all(|v| v.is_finite()));
                counted.push(N_ALLOCATIONS.load(Relaxed) - before);
            }
        }
        assert_eq!(
            counted,
            [0; 3],
            "{model} {weights:?} {}: allocations of a prompt's step and of two more",
            kv_type.name()
        );
    }
}
