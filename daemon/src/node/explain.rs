//! What each model of a configuration will run with, where every value comes from, and the memory it
//! will take: the node without sockets, processes or weights in memory.
//!
//! Called by `check`, and so by `dsd check-config`.

use std::{fs, path::PathBuf};

use super::loader::{self, PlannedModel};
use crate::{
    catalog::LoadError,
    config::{Config, KEYS, KeyDoc, ModelConfig, Origin},
    runner::{Available, MemoryPlan},
    telemetry::chain,
    weights::Checkpoint,
};

/// One model of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedModel {
    /// Its name.
    pub name: String,
    /// Checkpoint folder, GGUF file or pack.
    pub path: PathBuf,
    /// Everything that can be set for a model.
    pub values: Vec<ExplainedValue>,
    /// What it will take.
    pub plan: Result<ExplainedPlan, NoPlan>,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPlan {
    /// Nothing can be read at the path, from here.
    #[error("its path cannot be read: {0}")]
    Unreadable(String),
    /// It does not fit beside what is there.
    #[error("would not be loaded: {0}")]
    NoRoom(String),
    /// It would not be loaded.
    #[error("would not be loaded: {0}")]
    Refused(String),
}

/// One value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedValue {
    /// The key in the model's entry.
    pub key: &'static str,
    /// What it is; empty where it is absent.
    pub value: String,
    /// What that comes to, where the value leaves it open.
    pub comes_to: Option<String>,
    /// Where it is set; `None` for a default.
    pub origin: Option<Origin>,
}

/// Memory of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedPlan {
    /// `model_type` of the checkpoint.
    pub architecture: String,
    /// Positions that prompt and output may have together.
    pub context_len: usize,
    /// Positions in the KV cache, over all requests.
    pub kv_tokens: usize,
    /// One entry per rank.
    pub ranks: Vec<MemoryPlan>,
    /// What may be taken when this model is loaded, those before it being there; `None` where the system
    /// does not tell.
    pub available: Option<Available>,
}

impl ExplainedPlan {
    /// Bytes that all ranks take beside the mapped weights.
    pub fn own_bytes(&self) -> u64 {
        self.ranks.iter().map(MemoryPlan::bytes_of_its_own).sum()
    }
}

/// Explains every model of a configuration, in its order, each beside the ones before it.
pub(super) fn explain(config: &Config) -> Vec<ExplainedModel> {
    let mut promised = 0;
    let mut models = Vec::new();
    for model in &config.models {
        let available = Available::now().map(|available| available.less(promised));
        let explained = explain_model(config, model, available);
        promised += explained.plan.as_ref().map_or(0, ExplainedPlan::own_bytes);
        models.push(explained);
    }
    models
}

fn explain_model(
    config: &Config,
    model: &ModelConfig,
    available: Option<Available>,
) -> ExplainedModel {
    let settings = config.settings(model);
    let readable = match fs::metadata(&model.path) {
        Ok(_) => Ok(()),
        Err(e) => Err(NoPlan::Unreadable(e.to_string())),
    };
    let plan = readable.and_then(|()| {
        let checkpoint = loader::open(&model.path);
        checkpoint
            .and_then(|checkpoint| {
                let planned = loader::plan(&checkpoint, &settings.engine, available.clone())?;
                loader::read_text(&checkpoint)?;
                Ok(plan_of(&checkpoint, &planned, available))
            })
            .map_err(|e| match e {
                LoadError::Memory { .. } => NoPlan::NoRoom(chain(&e)),
                e => NoPlan::Refused(chain(&e)),
            })
    });
    let n_threads = loader::cpu_config(&settings.engine).n_threads;
    let comes_to = |key| match key {
        "threads" if settings.engine.threads == 0 => Some(n_threads.to_string()),
        "running_max" if settings.engine.step_tokens < settings.engine.running_max => {
            Some(settings.engine.step_tokens.to_string())
        }
        "kv_tokens" if settings.engine.kv_tokens.is_none() => {
            plan.as_ref().ok().map(|plan| plan.kv_tokens.to_string())
        }
        _ => None,
    };
    let mut values = Vec::new();
    let mut add = |key, value, origin: Option<&Origin>| {
        values.push(ExplainedValue {
            key,
            value,
            comes_to: comes_to(key),
            origin: origin.cloned(),
        });
    };
    let aliases: Vec<&str> = model.aliases.iter().map(|alias| &*alias.name).collect();
    add("aliases", aliases.join(", "), model.origins.of("aliases"));
    add(
        "required",
        model.required.to_string(),
        model.origins.of("required"),
    );
    for (section, shown) in [
        ("engine", settings.engine.shown()),
        ("service", settings.service.shown()),
    ] {
        let per_model = |key: &str| {
            let is_it = |doc: &&KeyDoc| (doc.section, doc.name) == (section, key);
            KEYS.iter().find(is_it).is_some_and(|doc| doc.per_model)
        };
        for (key, value) in shown.into_iter().filter(|(key, _)| per_model(key)) {
            let is_set = model.origins.of(key).is_some();
            // Replaced by the other way to say it, wherever it was set.
            let origin = match key {
                "kv_tokens" | "kv_bytes" if value.is_empty() => None,
                _ if is_set => model.origins.of(key),
                _ => config.origin(None, section, key),
            };
            add(key, value, origin);
        }
    }
    ExplainedModel {
        name: model.name.clone(),
        path: model.path.clone(),
        values,
        plan,
    }
}

fn plan_of(
    checkpoint: &Checkpoint,
    planned: &PlannedModel,
    available: Option<Available>,
) -> ExplainedPlan {
    let ranks: Vec<MemoryPlan> = planned.plan.ranks.iter().map(|rank| rank.memory).collect();
    let first = ranks.first();
    ExplainedPlan {
        architecture: checkpoint.architecture().to_owned(),
        context_len: first.map_or(0, |plan| plan.context_len),
        // The canary keeps a block to itself.
        kv_tokens: first.map_or(0, |plan| plan.n_blocks.saturating_sub(1) * plan.block_len),
        ranks,
        available,
    }
}
