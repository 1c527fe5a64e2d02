//! Whether the node serves: judged by tokens that came out, not by the process being there.

use std::time::Duration;

use crate::catalog::{Catalog, Entry, ServedModel};

/// Requests are refused after this many times the silence at which readiness goes: one step with a
/// long prompt on a slow machine may well take the first, and waiting for it is what clients want.
const SILENCE_FACTOR: u32 = 4;

/// Why the node is not ready.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The node goes down.
    #[error("draining: the node is shutting down, running requests may finish")]
    Draining,
    /// Nothing to serve.
    #[error("no model is loaded")]
    NoModel,
    /// A model of the configuration is on its way.
    #[error("the model `{model}` is being loaded")]
    Loading {
        /// Its name.
        model: String,
    },
    /// A required model of the configuration is not served.
    #[error("the model `{model}`, which the configuration requires, is {state}")]
    NotServed {
        /// Its name.
        model: String,
        /// `not loaded`, `unloading` or `failed`.
        state: &'static str,
    },
    /// A model's engine panicked.
    #[error("the engine of the model `{model}` has broken down")]
    Dead {
        /// Its name.
        model: String,
    },
    /// A model's ranks are started again.
    #[error("the ranks of the model `{model}` were lost and are started again; requests wait")]
    Forming {
        /// Its name.
        model: String,
    },
    /// A model's step takes much longer than it should, or one of its ranks is silent.
    #[error("the model `{model}` is stalled: {}", stalled_words(*silent_rank))]
    Stalled {
        /// Its name.
        model: String,
        /// The rank that is silent; `None` when it is a step that does not end.
        silent_rank: Option<usize>,
    },
    /// A model has not produced its first token.
    #[error("the model `{model}` has produced no token yet")]
    NoToken {
        /// Its name.
        model: String,
    },
    /// A model is silent.
    #[error(
        "the last token of the model `{model}` is {age_s} s old, at most {max_s} s are allowed"
    )]
    TokenTooOld {
        /// Its name.
        model: String,
        /// Age in seconds.
        age_s: u64,
        /// The limit in seconds.
        max_s: u64,
    },
    /// A model's weights in memory are not those that were packed.
    #[error("tensor `{tensor}` of the model `{model}` is damaged; pack its checkpoint again")]
    DamagedWeights {
        /// The model's name.
        model: String,
        /// The tensor's.
        tensor: String,
    },
    /// A model says something else than it used to.
    #[error("the model `{model}` answers a fixed prompt otherwise than it did at first")]
    WrongToken {
        /// Its name.
        model: String,
    },
}

fn stalled_words(silent_rank: Option<usize>) -> String {
    match silent_rank {
        Some(rank) => format!("rank {rank} gives no sign of life"),
        None => "a step takes much longer than it should".to_owned(),
    }
}

/// Ready when every required model of the configuration is served, at least one model is, and each
/// produced a correct token within `token_age_max`. Models that are not required are left out, as if
/// they were not there; those that were loaded by hand count while they are loaded or served.
///
/// # Errors
/// The first reason against it.
pub fn readiness(catalog: &Catalog, token_age_max: Duration) -> Result<(), NotReady> {
    let entries = catalog.entries();
    let required = catalog.configured().iter().filter(|model| model.required);
    for model in required {
        let state = match entries.get(&model.name) {
            Some(Entry::Loading { .. } | Entry::Served(_)) => continue,
            Some(entry @ (Entry::Unloading(_) | Entry::Failed { .. })) => entry.state(),
            None => "not loaded",
        };
        return Err(NotReady::NotServed {
            model: model.name.clone(),
            state,
        });
    }
    let is_optional = |name: &str| {
        let model = catalog.configured().iter().find(|model| model.name == name);
        model.is_some_and(|model| !model.required)
    };
    let mut n_served = 0;
    for (name, entry) in entries.iter() {
        match entry {
            Entry::Loading { .. } if !is_optional(name) => {
                return Err(NotReady::Loading {
                    model: name.clone(),
                });
            }
            Entry::Served(model) => {
                n_served += 1;
                if !is_optional(name) {
                    model_readiness(model, token_age_max)?;
                }
            }
            // Neither is asked for any more.
            Entry::Loading { .. } | Entry::Unloading(_) | Entry::Failed { .. } => {}
        }
    }
    if n_served == 0 {
        Err(NotReady::NoModel)
    } else {
        Ok(())
    }
}

/// Ready when the model produced a correct token within `token_age_max`.
///
/// # Errors
/// The reason against it.
pub fn model_readiness(model: &ServedModel, token_age_max: Duration) -> Result<(), NotReady> {
    let load = model.replica.load();
    let name = model.name.clone();
    if load.is_forming {
        return Err(NotReady::Forming { model: name });
    }
    if load.is_stalled {
        return Err(NotReady::Stalled {
            model: name,
            silent_rank: load.silent_rank,
        });
    }
    liveness(model, token_age_max)
}

fn liveness(model: &ServedModel, token_age_max: Duration) -> Result<(), NotReady> {
    let load = model.replica.load();
    let name = || model.name.clone();
    if load.is_dead {
        return Err(NotReady::Dead { model: name() });
    }
    if load.canary_wrong {
        return Err(NotReady::WrongToken { model: name() });
    }
    if let Some(damage) = model.damage() {
        return Err(NotReady::DamagedWeights {
            model: name(),
            tensor: damage.tensor,
        });
    }
    match load.last_token_age {
        None => Err(NotReady::NoToken { model: name() }),
        Some(age) if token_age_max < age => Err(NotReady::TokenTooOld {
            model: name(),
            age_s: age.as_secs(),
            max_s: token_age_max.as_secs(),
        }),
        Some(_) => Ok(()),
    }
}

/// Whether a request for the model may be taken, even while its ranks are started again: unlike one
/// that is merely slow, a model that is
/// broken, wrong or silent for long would only keep its clients waiting until their deadline.
///
/// # Errors
/// The reason against it.
pub fn admission(model: &ServedModel, token_age_max: Duration) -> Result<(), NotReady> {
    liveness(model, token_age_max.saturating_mul(SILENCE_FACTOR))
}
