//! Invariant 1: the logits of a sequence are the same bits whatever else is in the batch, however its
//! prompt is cut and whichever logits are wanted beside its own.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{cell::RefCell, path::PathBuf, time::Duration};

use dsd::{
    collective::{Collective, Segment},
    runner::{Budget, LogitRows, StepExecutor, StepPlan, load_cpu, plan_cpu},
    runtime::thread,
    weights::Checkpoint,
};
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};
use proptest::prelude::*;

const VOCAB: usize = 384;

/// The first rank's executor; the others follow it on threads until it is dropped.
fn executor(
    model: &str,
    n_ranks: usize,
    n_threads: usize,
    activations: Activations,
    kv_type: KvType,
) -> Box<dyn StepExecutor> {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data");
    let data = std::env::var_os("DSD_TEST_DATA").map_or(default, PathBuf::from);
    let folder = data.join("reference").join(model);
    assert!(
        folder.is_dir(),
        "{} is missing: run `make test-setup`",
        folder.display()
    );
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let cpu = CpuConfig {
        n_threads,
        isa: Isa::available()[0],
        activations,
        kv_type,
    };
    let budget = Budget {
        kv_bytes_max: 16 << 20,
        step_tokens_max: 96,
        step_spans_max: 96,
    };
    let plan = plan_cpu(&checkpoint, cpu, n_ranks, budget, None).unwrap();
    let load = |rank: usize| load_cpu(&checkpoint, cpu, &plan.ranks[rank]).unwrap();
    if n_ranks == 1 {
        return Box::new(load(0));
    }
    let segment = Segment::create(n_ranks).unwrap();
    let join = |rank| Collective::Shm(segment.clone().join(rank, Duration::from_secs(60)));
    for rank in 1..n_ranks {
        let mut follower = load(rank).in_group(join(rank));
        thread::spawn("follower", move || follower.follow().unwrap()).unwrap();
    }
    Box::new(load(0).in_group(join(0)))
}

/// A sequence with its own blocks, fed to an executor piece by piece.
struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
    done: usize,
    last: Vec<u32>,
}

impl Sequence {
    fn new(tokens: &[u32], first_block: u32) -> Self {
        let blocks = (0..4).map(|i| first_block + i * 3).collect();
        Self {
            tokens: tokens.to_vec(),
            blocks,
            done: 0,
            last: Vec::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.done == self.tokens.len()
    }
}

/// Runs all sequences together, `chunk(step, index)` tokens of each at a step, and returns the bits
/// of each one's last logits; `wanted` are those of a sequence's last step.
fn run(
    executor: &mut dyn StepExecutor,
    wanted: LogitRows,
    mut sequences: Vec<Sequence>,
    mut chunk: impl FnMut(usize, usize) -> usize,
) -> Vec<Vec<u32>> {
    let mut plan = StepPlan::default();
    for step in 0.. {
        if sequences.iter().all(Sequence::is_done) {
            break;
        }
        plan.clear();
        let mut ends = Vec::new();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let n = chunk(step, index).min(sequence.tokens.len() - sequence.done);
            if n == 0 {
                continue;
            }
            let end = sequence.done + n;
            let is_last = end == sequence.tokens.len();
            let logits = if is_last { wanted } else { LogitRows::Skip };
            let tokens = &sequence.tokens[sequence.done..end];
            plan.push(
                index as u64,
                sequence.done,
                tokens,
                &sequence.blocks,
                logits,
            );
            sequence.done = end;
            ends.extend(is_last.then_some(index));
        }
        if plan.spans.is_empty() {
            continue;
        }
        let mut logits = &*executor.execute(&plan).unwrap();
        let n_rows = plan.spans.iter().map(|span| span.logit_tokens().len());
        for (n_rows, index) in n_rows.filter(|n| *n > 0).zip(ends) {
            let (rows, rest) = logits.split_at(n_rows * VOCAB);
            let last = rows[rows.len() - VOCAB..].iter();
            (sequences[index].last, logits) = (last.map(|v| v.to_bits()).collect(), rest);
        }
    }
    sequences.into_iter().map(|s| s.last).collect()
}

fn check(model: &str, n_ranks: usize, activations: Activations, kv_type: KvType) {
    let one = RefCell::new(executor(model, n_ranks, 1, activations, kv_type));
    let two = RefCell::new(executor(model, n_ranks, 2, activations, kv_type));
    let prompt = |len: usize, seed: u32| {
        (0..len as u32)
            .map(|i| (i * 37 + seed * 101) % 370)
            .collect::<Vec<_>>()
    };
    let cases = (
        proptest::collection::vec((1usize..100, 0u32..1000), 1..5),
        proptest::collection::vec(0usize..24, 32),
    );
    let config = ProptestConfig {
        cases: 12,
        failure_persistence: None,
        ..Default::default()
    };
    proptest!(config, |((prompts, chunks) in cases)| {
        let alone = |wanted| {
            let run_one = |(len, seed): &(usize, u32)| {
                let sequence = Sequence::new(&prompt(*len, *seed), 5);
                run(&mut **one.borrow_mut(), wanted, vec![sequence], |_, _| 96).remove(0)
            };
            prompts.iter().map(run_one).collect::<Vec<_>>()
        };
        let (alone, among_all) = (alone(LogitRows::Last), alone(LogitRows::All));
        let sequences = prompts
            .iter()
            .enumerate()
            .map(|(i, (len, seed))| Sequence::new(&prompt(*len, *seed), 20 * i as u32))
            .collect();
        let together = run(&mut **two.borrow_mut(), LogitRows::Last, sequences, |step, index| {
            // Never all zero for good: every eighth step everybody moves.
            if step % 8 == 7 { 1 } else { chunks[(step * 5 + index * 11) % chunks.len()] }
        });
        prop_assert_eq!(&alone, &together);
        prop_assert_eq!(alone, among_all);
    });
}

#[test]
fn grouped_heads_have_the_same_bits_in_any_batch() {
    check("llama", 1, Activations::F32, KvType::F32);
}

#[test]
fn quantized_experts_have_the_same_bits_in_any_batch() {
    check("deepseek_v3_fp8", 1, Activations::F32, KvType::F32);
}

#[test]
fn latent_attention_and_experts_have_the_same_bits_in_any_batch() {
    check("deepseek_v2", 1, Activations::F32, KvType::F32);
}

#[test]
fn normalised_heads_and_experts_have_the_same_bits_in_any_batch() {
    check("qwen3_moe", 1, Activations::Int8, KvType::Bf16);
}

#[test]
fn rounded_keys_and_values_have_the_same_bits_in_any_batch() {
    check("llama", 1, Activations::F32, KvType::Int8);
    check("deepseek_v3", 1, Activations::F32, KvType::Int8);
}

#[test]
fn two_ranks_give_the_same_bits_in_any_batch() {
    check("llama", 2, Activations::F32, KvType::F32);
    check("deepseek_v3", 2, Activations::F32, KvType::F32);
}

#[test]
fn three_uneven_ranks_give_the_same_bits_in_any_batch() {
    check("deepseek_v2", 3, Activations::Int8, KvType::Bf16);
}
