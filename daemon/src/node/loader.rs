//! From a path to a model that answers: checkpoint, tokenizer, executor, engine.

use std::{path::Path, sync::Arc, time::Duration};

use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};
use tracing::info;

use crate::{
    catalog::{LoadError, Loader, MemoryFigures, Progress, ServedModel},
    config::{
        Activations as ActivationsKey, EngineConfig as EngineKeys, KvType as KvTypeKey, LogConfig,
        NodeConfig,
    },
    group::{self, CostFile, GroupConfig, STEP_TARGET_CPU},
    model::{self, DecoderSpec, ModelError},
    replica::{AdmissionConfig, Replica},
    runner::{
        self, Budget, KV_BLOCK_LEN, MemoryPlan, RankPlan, available_bytes, kv_bytes_per_token,
        plan_cpu,
    },
    runtime::clock,
    text::TextModel,
    weights::{Checkpoint, KeeperConfig, PackKeeper},
};

/// Without `engine.kv_tokens` and `engine.kv_bytes` the KV cache takes one full context, but at most
/// this fraction of the memory that is free.
const KV_SHARE_OF_AVAILABLE: u64 = 4;
/// By when first tokens have to be predicted.
const TTFT_TARGET: Duration = Duration::from_secs(2);
/// Batch requests that wait at most.
const BATCH_WAITING_MAX: usize = 1024;
/// What that fraction is taken of where the system does not tell.
const AVAILABLE_BYTES_UNKNOWN: u64 = 4 << 30;

/// The catalog's loader for this node's settings.
pub(super) fn new(keys: &EngineKeys, node: &NodeConfig, log: &LogConfig) -> Box<Loader> {
    let (keys, log) = (keys.clone(), log.clone());
    let drain_limit = Duration::from_secs(node.drain_timeout_s);
    let costs = node.state_dir.join("cost");
    Box::new(move |name, path, on_progress| {
        load(&keys, &log, drain_limit, &costs, name, path, on_progress)
    })
}

/// The compute settings of the configuration.
pub(super) fn cpu_config(keys: &EngineKeys) -> CpuConfig {
    let n_threads = match keys.threads {
        0 => {
            let n_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            (n_cores / keys.tp.max(1)).max(1)
        }
        n => n,
    };
    let activations = match keys.activations {
        ActivationsKey::F32 => Activations::F32,
        ActivationsKey::Int8 => Activations::Int8,
    };
    let kv_type = match keys.kv_type {
        KvTypeKey::F32 => KvType::F32,
        KvTypeKey::Bf16 => KvType::Bf16,
        KvTypeKey::Int8 => KvType::Int8,
    };
    CpuConfig {
        n_threads,
        isa: Isa::available()[0],
        activations,
        kv_type,
    }
}

fn load(
    keys: &EngineKeys,
    log: &LogConfig,
    drain_limit: Duration,
    cost_folder: &Path,
    name: &str,
    path: &Path,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<ServedModel, LoadError> {
    const STAGES: [&str; 4] = [
        "reading headers",
        "reading the tokenizer",
        "taking memory",
        "first token",
    ];
    let mut stage = |index: usize| {
        let n_total = STAGES.len() as u64;
        on_progress(Progress {
            stage: STAGES[index],
            n_done: index as u64,
            n_total,
        });
    };
    let started = clock::now();
    stage(0);
    let bad_checkpoint = |source| LoadError::Checkpoint {
        path: path.to_owned(),
        source,
    };
    let checkpoint = Checkpoint::open(path).map_err(|e| bad_checkpoint(e.into()))?;
    let spec = model::spec_of(&checkpoint).map_err(|e| LoadError::Unsupported {
        path: path.to_owned(),
        source: e.into(),
    })?;
    stage(1);
    let text = TextModel::from_checkpoint(&checkpoint).map_err(|e| bad_checkpoint(e.into()))?;
    stage(2);
    let cpu = cpu_config(keys);
    let failed = |e| match e {
        runner::LoadError::Plan(_) => LoadError::Memory {
            path: path.to_owned(),
            source: e.into(),
        },
        runner::LoadError::Model(ModelError::Config(_)) => LoadError::Unsupported {
            path: path.to_owned(),
            source: e.into(),
        },
        runner::LoadError::Model(_) => bad_checkpoint(e.into()),
        runner::LoadError::Cpu(_) => LoadError::Engine {
            name: name.to_owned(),
            source: e.into(),
        },
    };
    let bytes_per_token = kv_bytes_per_token(&checkpoint, cpu, keys.tp).map_err(failed)?;
    let budget = budget(keys, &spec, bytes_per_token);
    let plan = plan_cpu(&checkpoint, cpu, keys.tp, budget, available_bytes()).map_err(failed)?;
    for (rank, RankPlan { memory, .. }) in plan.ranks.iter().enumerate() {
        for line in memory.to_string().lines() {
            info!(model = name, rank, "{line}");
        }
    }
    stage(3);
    // Before ranks map the pack: reading ahead of them is what its first start on cold disks needs.
    let keeper = checkpoint
        .pack()
        .map(|pack| PackKeeper::start(name, Arc::clone(pack), keeper_config(keys)))
        .transpose()
        .map_err(|e| LoadError::Engine {
            name: name.to_owned(),
            source: e.into(),
        })?;
    let sum = |bytes: fn(&MemoryPlan) -> u64| plan.ranks.iter().map(|r| bytes(&r.memory)).sum();
    let memory = MemoryFigures {
        weight_bytes: sum(|plan| plan.mapped_bytes + plan.panels_bytes),
        kv_bytes: sum(|plan| plan.kv_bytes),
        workspace_bytes: sum(|plan| plan.workspace_bytes),
    };
    let learnt_on = format!(
        "dsd {} {} ranks={} threads={} isa={} activations={:?} kv={}",
        env!("CARGO_PKG_VERSION"),
        path.display(),
        keys.tp,
        cpu.n_threads,
        cpu.isa.name(),
        cpu.activations,
        cpu.kv_type.name(),
    );
    let group = GroupConfig {
        program: group::this_program(),
        log: log.clone(),
        model: name.to_owned(),
        path: path.to_owned(),
        n_ranks: keys.tp,
        cpu,
        budget,
        step_timeout: Duration::from_secs(keys.step_timeout_s),
        step_target: STEP_TARGET_CPU,
        cost: None,
        cost_file: Some(CostFile::new(cost_folder, name, learnt_on)),
        waiting_max: keys.waiting_max,
        prefix_cache: keys.prefix_cache,
        sampleable_len: text.vocab_len().min(spec.vocab_len),
        drain_limit,
    };
    let admission = AdmissionConfig {
        ttft_target: Some(TTFT_TARGET),
        waiting_max: keys.waiting_max,
        batch_waiting_max: BATCH_WAITING_MAX,
        running_max: budget.step_spans_max,
        step_target: STEP_TARGET_CPU,
        n_blocks: 1,
        block_len: KV_BLOCK_LEN,
    };
    let replica = Replica::start_group(group, admission).map_err(|e| LoadError::Engine {
        name: name.to_owned(),
        source: e.into(),
    })?;
    info!(
        model = name,
        architecture = spec.architecture,
        isa = cpu.isa.name(),
        ranks = keys.tp,
        threads = cpu.n_threads,
        took_ms = started.elapsed().as_millis() as u64,
        "model ready"
    );
    Ok(ServedModel {
        name: name.to_owned(),
        created: clock::unix_seconds(),
        path: path.to_owned(),
        architecture: spec.architecture,
        text: Arc::new(text),
        replica,
        stop_token_ids: checkpoint.eos_token_ids().into(),
        memory,
        keeper,
    })
}

/// How packs are looked after.
fn keeper_config(keys: &EngineKeys) -> KeeperConfig {
    KeeperConfig {
        scrub_interval: Duration::from_secs(keys.scrub_interval_s),
        scrub_bytes_per_s: keys.scrub_bytes_per_s,
    }
}

/// What the configuration allows a replica of this model.
fn budget(keys: &EngineKeys, spec: &DecoderSpec, bytes_per_token: u64) -> Budget {
    // One block more than asked for: the canary keeps it to itself.
    let bytes_of = |n_tokens: usize| {
        let with_canary = n_tokens.next_multiple_of(KV_BLOCK_LEN) + KV_BLOCK_LEN;
        (with_canary as u64).saturating_mul(bytes_per_token)
    };
    let kv_bytes_max = match (keys.kv_bytes, keys.kv_tokens) {
        (Some(bytes), Some(n_tokens)) => bytes.min(bytes_of(n_tokens)),
        (Some(bytes), None) => bytes,
        (None, Some(n_tokens)) => bytes_of(n_tokens),
        (None, None) => {
            let available = available_bytes().unwrap_or(AVAILABLE_BYTES_UNKNOWN);
            bytes_of(spec.context_len).min(available / KV_SHARE_OF_AVAILABLE)
        }
    };
    Budget {
        kv_bytes_max,
        step_tokens_max: keys.step_tokens,
        step_spans_max: keys.running_max.min(keys.step_tokens),
    }
}
