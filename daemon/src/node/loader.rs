//! From a path to a model that answers: checkpoint, tokenizer, executor, engine.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
};
use tracing::info;

use crate::{
    catalog::{LoadError, Loader, MemoryFigures, Progress, ServedModel},
    config::{
        self, Activations as ActivationsKey, Config, EngineConfig as EngineKeys,
        KvType as KvTypeKey, LogConfig, ModelSettings,
    },
    flow::Class,
    grammar::Checker,
    group::{self, CostFile, GroupConfig, STEP_TARGET_CPU},
    model::{self, ModelError},
    replica::{AdmissionConfig, Replica},
    runner::{
        self, Available, Budget, KV_BLOCK_LEN, MemoryPlan, RankPlan, ReplicaPlan,
        kv_bytes_per_token, plan_cpu,
    },
    runtime::clock,
    telemetry,
    text::TextModel,
    weights::{Checkpoint, KeeperConfig, PackKeeper},
};

use super::ledger::Ledger;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Full contexts that the KV cache holds where the configuration does not say: a second long request
/// need not wait for the end of the first.
const KV_CONTEXTS: usize = 2;
/// But at most this fraction of the memory that is available, unless that would be less than one
/// context and one fits beside the weights.
const KV_SHARE_OF_AVAILABLE: u64 = 4;
/// What that fraction is taken of where the system does not tell.
const AVAILABLE_BYTES_UNKNOWN: u64 = 4 << 30;

/// What models run with, by name.
#[derive(Debug)]
struct Settings {
    models: BTreeMap<String, ModelSettings>,
    /// Of models without an entry in the configuration.
    other: ModelSettings,
    log: LogConfig,
    drain_limit: Duration,
    cost_folder: PathBuf,
    ledger: Ledger,
}

/// The catalog's loader for this node's settings.
pub(super) fn new(config: &Config) -> Box<Loader> {
    let models = config.models.iter();
    let settings = Settings {
        models: models
            .map(|model| (model.name.clone(), config.settings(model)))
            .collect(),
        other: config.settings_default(),
        log: config.log.clone(),
        drain_limit: Duration::from_secs(config.node.drain_timeout_s),
        cost_folder: config.node.state_dir.join("cost"),
        ledger: Ledger::default(),
    };
    Box::new(move |name, path, on_progress| load(&settings, name, path, on_progress))
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
    settings: &Settings,
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
    telemetry::declare("model", name);
    let own = settings.models.get(name).unwrap_or(&settings.other);
    let (keys, service) = (&own.engine, &own.service);
    let started = clock::now();
    stage(0);
    let checkpoint = open(path)?;
    stage(1);
    let text = Arc::new(read_text(&checkpoint)?);
    let stop_token_ids = stop_token_ids(&checkpoint, &text);
    stage(2);
    let mut ledger = settings.ledger.open();
    let available = Available::now().map(|available| available.less(ledger.promised()));
    let PlannedModel { cpu, budget, plan } = plan(&checkpoint, keys, available)?;
    let kept_bytes_max = (plan.ranks.iter().map(|r| r.memory.kept_bytes).max()).unwrap_or(0);
    let own_bytes = plan.ranks.iter().map(|r| r.memory.bytes_of_its_own()).sum();
    ledger.enter(&text, own_bytes);
    drop(ledger);
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
    let context_len = plan.ranks.first().map_or(0, |rank| rank.memory.context_len);
    metrics::gauge!("dsd_context_tokens", "model" => name.to_owned()).set(context_len as f64);
    let spec = &plan.spec;
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
    let step_target = keys.step_target_ms.map(Duration::from_millis);
    let step_target = step_target.unwrap_or(STEP_TARGET_CPU);
    let group = GroupConfig {
        program: group::this_program(),
        log: settings.log.clone(),
        model: name.to_owned(),
        path: path.to_owned(),
        n_ranks: keys.tp,
        cpu,
        budget,
        step_timeout: Duration::from_secs(keys.step_timeout_s),
        agent_timeout: Duration::from_secs(keys.agent_timeout_s),
        step_target,
        cost: None,
        cost_file: Some(CostFile::new(&settings.cost_folder, name, learnt_on)),
        waiting_max: keys.waiting_max,
        prefix_cache: keys.prefix_cache,
        sampleable_len: text.vocab_len().min(spec.vocab_len),
        drain_limit: settings.drain_limit,
        kept_bytes_max,
    };
    let admission = AdmissionConfig {
        ttft_target: Some(Duration::from_secs_f64(service.ttft_target_s)),
        waiting_max: keys.waiting_max,
        batch_waiting_max: service.batch_waiting_max,
        running_max: budget.step_spans_max,
        step_target,
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
        architecture: spec.architecture.clone(),
        text,
        grammars: Checker::default(),
        replica,
        stop_token_ids,
        class: match service.class {
            config::Class::Interactive => Class::Interactive,
            config::Class::Batch => Class::Batch,
        },
        memory,
        keeper,
    })
}

/// Tokens that end an answer: the tokenizer's where the configuration names none.
fn stop_token_ids(checkpoint: &Checkpoint, text: &TextModel) -> Arc<[u32]> {
    match checkpoint.eos_token_ids() {
        [] => text.eos_id().into_iter().collect(),
        ids => ids.into(),
    }
}

fn bad_checkpoint(path: &Path, source: impl Into<BoxError>) -> LoadError {
    LoadError::Checkpoint {
        path: path.to_owned(),
        source: source.into(),
    }
}

/// A checkpoint of a model that runs here.
pub(super) fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let checkpoint = Checkpoint::open(path).map_err(|e| bad_checkpoint(path, e))?;
    match model::spec_of(&checkpoint) {
        Ok(_) => Ok(checkpoint),
        Err(e) => Err(LoadError::Unsupported {
            path: path.to_owned(),
            source: e.into(),
        }),
    }
}

/// Tokenizer and template of a checkpoint.
pub(super) fn read_text(checkpoint: &Checkpoint) -> Result<TextModel, LoadError> {
    TextModel::from_checkpoint(checkpoint).map_err(|e| bad_checkpoint(checkpoint.path(), e))
}

/// A model on paper.
#[derive(Debug)]
pub(super) struct PlannedModel {
    /// How each rank computes.
    pub(super) cpu: CpuConfig,
    /// What all ranks may take.
    pub(super) budget: Budget,
    /// Who holds what.
    pub(super) plan: ReplicaPlan,
}

/// Plans a model within its settings and, where it is known, what is available.
pub(super) fn plan(
    checkpoint: &Checkpoint,
    keys: &EngineKeys,
    available: Option<Available>,
) -> Result<PlannedModel, LoadError> {
    let path = checkpoint.path();
    let failed = |e| match e {
        runner::LoadError::Plan(_) => LoadError::Memory {
            path: path.to_owned(),
            source: e.into(),
        },
        runner::LoadError::Model(ModelError::Config(_)) => LoadError::Unsupported {
            path: path.to_owned(),
            source: e.into(),
        },
        runner::LoadError::Model(_) => bad_checkpoint(path, e),
        runner::LoadError::Cpu(_) => LoadError::Engine {
            name: path.display().to_string(),
            source: e.into(),
        },
    };
    let cpu = cpu_config(keys);
    let budget = budget(checkpoint, cpu, keys, available.as_ref()).map_err(failed)?;
    let plan = plan_cpu(checkpoint, cpu, keys.tp, budget, available).map_err(failed)?;
    Ok(PlannedModel { cpu, budget, plan })
}

/// How packs are looked after.
fn keeper_config(keys: &EngineKeys) -> KeeperConfig {
    KeeperConfig {
        scrub_interval: Duration::from_secs(keys.scrub_interval_s),
        scrub_bytes_per_s: keys.scrub_bytes_per_s,
    }
}

/// What the configuration allows a replica of this model.
fn budget(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    keys: &EngineKeys,
    available: Option<&Available>,
) -> Result<Budget, runner::LoadError> {
    let bytes_per_token = kv_bytes_per_token(checkpoint, cpu, keys.tp)?;
    // One block more than asked for: the canary keeps it to itself.
    let bytes_of = |n_tokens: usize| {
        let with_canary = n_tokens.next_multiple_of(KV_BLOCK_LEN) + KV_BLOCK_LEN;
        (with_canary as u64).saturating_mul(bytes_per_token)
    };
    let budget = |kv_bytes_max| Budget {
        kv_bytes_max,
        step_tokens_max: keys.step_tokens,
        step_spans_max: keys.running_max.min(keys.step_tokens),
    };
    if let Some(bytes) = keys.kv_bytes.or_else(|| keys.kv_tokens.map(bytes_of)) {
        return Ok(budget(bytes));
    }
    let context_len = model::spec_of(checkpoint)
        .map_err(ModelError::from)?
        .context_len;
    let all = available.map_or(AVAILABLE_BYTES_UNKNOWN, |available| available.bytes);
    let share = all / KV_SHARE_OF_AVAILABLE;
    let (one, several) = (bytes_of(context_len), bytes_of(KV_CONTEXTS * context_len));
    if one <= share {
        return Ok(budget(several.min(share)));
    }
    // Mapped weights count here: a cache that pushes them out of memory makes every step read a disk.
    let with_one = plan_cpu(checkpoint, cpu, keys.tp, budget(one), None)?;
    let ranks = with_one.ranks.iter().map(|rank| &rank.memory);
    let needed = ranks
        .map(|plan| plan.mapped_bytes + plan.bytes_of_its_own())
        .sum::<u64>();
    Ok(budget(if needed <= all { one } else { share }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{runner::MemoryBound, telemetry::chain, weights::tests::test_data};

    fn available(bytes: u64) -> Option<Available> {
        Some(Available {
            bytes,
            bound: MemoryBound::System,
            promised: 0,
        })
    }

    fn keys() -> EngineKeys {
        EngineKeys {
            threads: 1,
            step_tokens: 16,
            running_max: 4,
            ..EngineKeys::default()
        }
    }

    /// Positions of the cache that a plan has, without the canary's block.
    fn kv_tokens(checkpoint: &Checkpoint, keys: &EngineKeys, all: u64) -> usize {
        let plan = plan(checkpoint, keys, available(all)).unwrap().plan;
        let memory = plan.ranks[0].memory;
        (memory.n_blocks - 1) * memory.block_len
    }

    #[test]
    fn the_cache_holds_two_contexts_within_a_quarter_but_one_where_it_fits() {
        let checkpoint = open(&test_data().join("reference/qwen3")).unwrap();
        let context_len = model::spec_of(&checkpoint).unwrap().context_len;
        assert!(context_len.is_multiple_of(KV_BLOCK_LEN));
        let one = PlannedModel::bytes(&checkpoint, context_len);
        let of_a_context = one.kv - one.canary;
        let check = |all, expected| {
            assert_eq!(kv_tokens(&checkpoint, &keys(), all), expected, "{all}");
        };
        check(4 * (one.kv + of_a_context), 2 * context_len);
        check(u64::MAX, 2 * context_len);
        // A quarter is between one context and two.
        check(
            4 * (one.kv + of_a_context / 2),
            context_len + context_len / 2,
        );
        // A quarter is less than one, but one fits.
        check(4 * one.kv - 4, context_len);
        check(one.all, context_len);
        // It does not.
        let share = (one.all - 1) / 4;
        let blocks = share / (one.canary) - 1;
        check(one.all - 1, blocks as usize * KV_BLOCK_LEN);
        // What is said counts, however much there is.
        let said = EngineKeys {
            kv_tokens: Some(64),
            ..keys()
        };
        assert_eq!(kv_tokens(&checkpoint, &said, u64::MAX), 64);
    }

    /// Answers of a checkpoint that named no end token but the tokenizer's never stopped.
    #[test]
    fn the_tokenizers_end_token_counts_where_no_other_is_named() {
        let from = test_data().join("reference/llama");
        let dir = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(&from).unwrap() {
            let file = file.unwrap().path();
            if file.is_file() && !file.ends_with("generation_config.json") {
                let to = dir.path().join(file.file_name().unwrap());
                std::fs::copy(&file, to).unwrap();
            }
        }
        let config_file = dir.path().join("config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&config_file).unwrap()).unwrap();
        let check = |config: &serde_json::Value, expected: &dyn Fn(&TextModel) -> u32| {
            std::fs::write(&config_file, config.to_string()).unwrap();
            let checkpoint = open(dir.path()).unwrap();
            let text = TextModel::from_checkpoint(&checkpoint).unwrap();
            assert_eq!(*stop_token_ids(&checkpoint, &text), [expected(&text)]);
        };
        config["eos_token_id"] = 7.into();
        check(&config, &|_| 7);
        config["eos_token_id"] = serde_json::Value::Null;
        check(&config, &|text| text.eos_id().unwrap());
    }

    struct Bytes {
        /// Of a cache of the positions asked for, the canary's block included.
        kv: u64,
        canary: u64,
        /// Of everything, mapped weights included.
        all: u64,
    }

    impl PlannedModel {
        fn bytes(checkpoint: &Checkpoint, n_tokens: usize) -> Bytes {
            let keys = EngineKeys {
                kv_tokens: Some(n_tokens),
                ..keys()
            };
            let plan = plan(checkpoint, &keys, None).unwrap().plan;
            let memory = plan.ranks[0].memory;
            Bytes {
                kv: memory.kv_bytes,
                canary: memory.kv_bytes / memory.n_blocks as u64,
                all: memory.mapped_bytes + memory.bytes_of_its_own(),
            }
        }
    }

    /// A plan of 478 MiB in a group of 200 MiB was killed while it was loaded.
    #[test]
    fn a_plan_above_the_limit_of_a_control_group_is_refused_with_the_numbers() {
        let checkpoint = open(&test_data().join("reference/llama")).unwrap();
        let keys = EngineKeys {
            kv_bytes: Some(300 << 20),
            running_max: 4096,
            step_tokens: 4096,
            ..keys()
        };
        let group = Available {
            bytes: 200 << 20,
            bound: MemoryBound::Group {
                file: "/sys/fs/cgroup/dsd/memory.max".into(),
                limit: 210 << 20,
                used: 10 << 20,
            },
            promised: 0,
        };
        let error = plan(&checkpoint, &keys, Some(group)).unwrap_err();
        let text = chain(&error);
        assert!(matches!(error, LoadError::Memory { .. }), "{text}");
        let expected = "209715200 bytes are available in `/sys/fs/cgroup/dsd/memory.max`: 10485760 of \
                        220200960 are used";
        assert!(text.contains(expected), "{text}");
    }
}
