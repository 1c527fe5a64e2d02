//! From a path to a model that answers: checkpoint, tokenizer, executor, engine.

use std::{path::Path, sync::Arc, time::Duration};

use dsd_kernels::{
    backend::Activations,
    cpu::{CpuConfig, Isa},
};
use tracing::info;

use crate::{
    catalog::{LoadError, Loader, MemoryFigures, Progress, ServedModel},
    collective::Collective,
    config::{Activations as ActivationsKey, EngineConfig as EngineKeys, NodeConfig},
    engine::EngineConfig,
    model::{self, DecoderSpec, ModelError},
    replica::Replica,
    runner::{self, Budget, KV_BLOCK_LEN, StepExecutor, available_bytes, load_cpu, plan_cpu},
    runtime::clock,
    text::TextModel,
    weights::{Checkpoint, KeeperConfig, PackKeeper},
};

/// Without `engine.kv_tokens` and `engine.kv_bytes` the KV cache takes one full context, but at most
/// this fraction of the memory that is free.
const KV_SHARE_OF_AVAILABLE: u64 = 4;
/// What that fraction is taken of where the system does not tell.
const AVAILABLE_BYTES_UNKNOWN: u64 = 4 << 30;

/// The catalog's loader for this node's settings.
pub(super) fn new(keys: &EngineKeys, node: &NodeConfig) -> Box<Loader> {
    let keys = keys.clone();
    let drain_limit = Duration::from_secs(node.drain_timeout_s);
    Box::new(move |name, path, on_progress| load(&keys, drain_limit, name, path, on_progress))
}

/// The compute settings of the configuration.
pub(super) fn cpu_config(keys: &EngineKeys) -> CpuConfig {
    let n_threads = match keys.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n,
    };
    let activations = match keys.activations {
        ActivationsKey::F32 => Activations::F32,
        ActivationsKey::Int8 => Activations::Int8,
    };
    CpuConfig {
        n_threads,
        isa: Isa::available()[0],
        activations,
    }
}

fn load(
    keys: &EngineKeys,
    drain_limit: Duration,
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
    let plan = plan_cpu(&checkpoint, cpu, 1, budget(keys, &spec)).map_err(failed)?;
    let rank = &plan.ranks[0];
    let executor = load_cpu(&checkpoint, cpu, rank, Collective::Solo).map_err(failed)?;
    for line in rank.memory.to_string().lines() {
        info!(model = name, "{line}");
    }
    stage(3);
    let memory = MemoryFigures {
        weight_bytes: rank.memory.mapped_bytes + rank.memory.panels_bytes,
        kv_bytes: rank.memory.kv_bytes,
        workspace_bytes: rank.memory.workspace_bytes,
    };
    let mut engine = EngineConfig::for_executor(name, &executor.limits());
    engine.waiting_max = keys.waiting_max;
    engine.prefix_cache = keys.prefix_cache;
    engine.sampleable_len = text.vocab_len().min(spec.vocab_len);
    engine.drain_limit = drain_limit;
    let replica = Replica::start(Box::new(executor), engine).map_err(|e| LoadError::Engine {
        name: name.to_owned(),
        source: e.into(),
    })?;
    info!(
        model = name,
        architecture = spec.architecture,
        isa = cpu.isa.name(),
        threads = cpu.n_threads,
        took_ms = started.elapsed().as_millis(),
        "model ready"
    );
    let keeper = match checkpoint.pack() {
        None => None,
        Some(pack) => Some(
            PackKeeper::start(name, Arc::clone(pack), keeper_config(keys)).map_err(|e| {
                LoadError::Engine {
                    name: name.to_owned(),
                    source: e.into(),
                }
            })?,
        ),
    };
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
fn budget(keys: &EngineKeys, spec: &DecoderSpec) -> Budget {
    let bytes_per_token = spec.cache_elements_per_token() as u64 * 4;
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
