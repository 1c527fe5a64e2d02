//! The models this node serves: name -> tokenizer, template and replica.
//!
//! Knows which models there are and in which state; how one is built from a checkpoint is a function
//! that `main` passes in. Readers (every request) take no lock.
//!
//! Invariant: a name or alias leads to at most one model, also while it is loaded or unloaded.

pub mod store;

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;

use crate::{
    flow::Class,
    grammar::Checker,
    replica::Replica,
    runtime::clock,
    telemetry::chain,
    text::TextModel,
    weights::{DamagedTensor, PackKeeper},
};

/// How often an unload looks whether its engine has stopped.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A model that answers.
#[derive(Debug)]
pub struct ServedModel {
    /// Its name in requests.
    pub name: String,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// Checkpoint folder or file.
    pub path: PathBuf,
    /// `model_type` of the checkpoint.
    pub architecture: String,
    /// Tokenizer, template, parser of the output.
    pub text: Arc<TextModel>,
    /// Looks at what answers have to look like.
    pub grammars: Checker,
    /// The engine.
    pub replica: Replica,
    /// Tokens that end an answer.
    pub stop_token_ids: Arc<[u32]>,
    /// Class of requests whose tenant names none.
    pub class: Class,
    /// What it takes up.
    pub memory: MemoryFigures,
    /// Looks after the pack it is served from, where it is one.
    pub keeper: Option<PackKeeper>,
}

impl ServedModel {
    /// Positions that prompt and output may have together: what context and KV pool both hold.
    pub fn context_len(&self) -> usize {
        self.replica.limits().context_len_max
    }

    /// A tensor of its pack that is not what was packed.
    pub fn damage(&self) -> Option<DamagedTensor> {
        self.keeper.as_ref()?.health().damaged.into_iter().next()
    }
}

/// Bytes that a model takes up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// Weights, mapped from disk.
    pub weight_bytes: u64,
    /// KV cache.
    pub kv_bytes: u64,
    /// Everything else that a step needs.
    pub workspace_bytes: u64,
}

/// How far a load or a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, such as `reading weights`.
    pub stage: &'static str,
    /// Done so far.
    pub n_done: u64,
    /// In all; 0 when not known.
    pub n_total: u64,
}

/// A model that the configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfiguredModel {
    /// Its name.
    pub name: String,
    /// Checkpoint folder or file.
    pub path: PathBuf,
    /// Other names in requests, each of this model only.
    pub aliases: Vec<String>,
    /// Those of them by which a request thinks unless it says otherwise.
    pub thinking_aliases: Vec<String>,
    /// The node is not ready without it.
    pub required: bool,
}

/// Builds a served model from a checkpoint. Blocks; reports how far it is.
pub type Loader =
    dyn Fn(&str, &Path, &mut dyn FnMut(Progress)) -> Result<ServedModel, LoadError> + Send + Sync;

type BoxError = Box<dyn Error + Send + Sync>;

/// Why a model is not served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The name is taken.
    #[error("a model called `{name}` is {state} already")]
    Exists {
        /// The name.
        name: String,
        /// `served`, `loading` or `unloading`.
        state: &'static str,
    },
    /// The name is an alias of a model of the configuration.
    #[error("`{name}` is an alias of the model `{model}`")]
    IsAlias {
        /// The name.
        name: String,
        /// Whose alias it is.
        model: String,
    },
    /// The checkpoint is damaged, incomplete or absent.
    #[error("cannot use the checkpoint `{}`", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// Cause.
        #[source]
        source: BoxError,
    },
    /// The architecture or a format is not one this build runs.
    #[error("cannot run the model in `{}`", path.display())]
    Unsupported {
        /// The checkpoint.
        path: PathBuf,
        /// Cause.
        #[source]
        source: BoxError,
    },
    /// The memory plan does not fit.
    #[error("the model in `{}` does not fit into memory", path.display())]
    Memory {
        /// The checkpoint.
        path: PathBuf,
        /// Cause.
        #[source]
        source: BoxError,
    },
    /// The engine did not start.
    #[error("cannot start the engine of `{name}`")]
    Engine {
        /// The name.
        name: String,
        /// Cause.
        #[source]
        source: BoxError,
    },
}

/// Why a name leads to no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No model of that name.
    #[error("the model `{name}` is not served here{}", served_words(served))]
    Unknown {
        /// As asked for.
        name: String,
        /// What could be asked for.
        served: Vec<String>,
    },
    /// No name, and more than one model.
    #[error("`model` is required{}", served_words(served))]
    NameNeeded {
        /// What could be asked for.
        served: Vec<String>,
    },
    /// Not yet.
    #[error("the model `{name}` is being loaded")]
    Loading {
        /// The name.
        name: String,
    },
    /// Not any more.
    #[error("the model `{name}` is being unloaded")]
    Unloading {
        /// The name.
        name: String,
    },
    /// No name and no model.
    #[error("no model is served here")]
    NothingServed,
}

fn served_words(served: &[String]) -> String {
    if served.is_empty() {
        String::new()
    } else {
        format!("; served are: {}", served.join(", "))
    }
}

/// One model and its state.
#[derive(Debug, Clone)]
pub enum Entry {
    /// On its way.
    Loading {
        /// Checkpoint folder or file.
        path: PathBuf,
        /// How far it is.
        progress: Progress,
    },
    /// Answers.
    Served(Arc<ServedModel>),
    /// On its way out; running requests finish.
    Unloading(Arc<ServedModel>),
    /// The last load failed.
    Failed {
        /// Checkpoint folder or file.
        path: PathBuf,
        /// Why, with all causes.
        reason: String,
    },
}

impl Entry {
    /// The state in one word.
    pub fn state(&self) -> &'static str {
        match self {
            Self::Loading { .. } => "loading",
            Self::Served(_) => "served",
            Self::Unloading(_) => "unloading",
            Self::Failed { .. } => "failed",
        }
    }
}

type Entries = BTreeMap<String, Entry>;

/// All models of the node. Share it by `Arc`.
pub struct Catalog {
    entries: ArcSwap<Entries>,
    /// Held while the entries are replaced, so that no change is lost.
    change: Mutex<()>,
    loader: Box<Loader>,
    /// What the configuration names, in its order.
    configured: Vec<ConfiguredModel>,
}

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalog")
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl Catalog {
    /// A catalog without models.
    pub fn new(loader: Box<Loader>) -> Self {
        Self {
            entries: ArcSwap::default(),
            change: Mutex::new(()),
            loader,
            configured: Vec::new(),
        }
    }

    /// A catalog without models, which are loaded by and by; `configured` says what for.
    pub fn of_configuration(loader: Box<Loader>, configured: Vec<ConfiguredModel>) -> Self {
        Self {
            configured,
            ..Self::new(loader)
        }
    }

    /// The models that the configuration names.
    pub fn configured(&self) -> &[ConfiguredModel] {
        &self.configured
    }

    /// The model of the configuration that has this name or alias.
    pub fn configured_as(&self, name: &str) -> Option<&ConfiguredModel> {
        let is_it = |model: &&ConfiguredModel| {
            model.name == name || model.aliases.iter().any(|alias| alias == name)
        };
        self.configured.iter().find(is_it)
    }

    /// The name of a model whose name or alias this is.
    fn real_name<'a>(&'a self, name: &'a str) -> &'a str {
        self.configured_as(name).map_or(name, |model| &model.name)
    }

    /// Other names that lead to the model of this name.
    pub fn aliases(&self, name: &str) -> &[String] {
        let model = self.configured.iter().find(|model| model.name == name);
        model.map_or(&[], |model| &model.aliases)
    }

    /// Whether a request by this name thinks where it does not say.
    pub fn thinks(&self, name: &str) -> bool {
        let model = self.configured_as(name);
        model.is_some_and(|model| model.thinking_aliases.iter().any(|alias| alias == name))
    }

    /// Loads a model and serves it. Blocks until then: not for async threads.
    ///
    /// # Errors
    /// [`LoadError`]; the entry then shows the reason.
    pub fn load(
        &self,
        name: &str,
        path: &Path,
        on_progress: &mut dyn FnMut(Progress),
    ) -> Result<Arc<ServedModel>, LoadError> {
        if let Some(model) = self.configured_as(name).filter(|model| model.name != name) {
            return Err(LoadError::IsAlias {
                name: name.to_owned(),
                model: model.name.clone(),
            });
        }
        let progress = Progress {
            stage: "opening",
            n_done: 0,
            n_total: 0,
        };
        self.change(|entries| match entries.get(name) {
            Some(Entry::Failed { .. }) | None => {
                entries.insert(
                    name.to_owned(),
                    Entry::Loading {
                        path: path.to_owned(),
                        progress,
                    },
                );
                Ok(())
            }
            Some(entry) => Err(LoadError::Exists {
                name: name.to_owned(),
                state: entry.state(),
            }),
        })?;
        // Whatever happens in the loader, the entry must not stay in the state of loading.
        let mut loading = Loading {
            catalog: self,
            name,
            path,
            outcome: None,
        };
        let loaded = (self.loader)(name, path, &mut |progress| {
            self.change(|entries| {
                entries.insert(
                    name.to_owned(),
                    Entry::Loading {
                        path: path.to_owned(),
                        progress,
                    },
                );
            });
            on_progress(progress);
        });
        match loaded {
            Ok(model) => {
                let model = Arc::new(model);
                loading.outcome = Some(Entry::Served(Arc::clone(&model)));
                Ok(model)
            }
            Err(e) => {
                let reason = chain(&e);
                loading.outcome = Some(Entry::Failed {
                    path: path.to_owned(),
                    reason,
                });
                Err(e)
            }
        }
    }

    /// Serves a model that is ready already, in place of one of the same name.
    pub fn insert(&self, model: ServedModel) -> Arc<ServedModel> {
        let model = Arc::new(model);
        self.change(|entries| {
            entries.insert(model.name.clone(), Entry::Served(Arc::clone(&model)))
        });
        model
    }

    /// Takes no more requests for a model, lets the running ones finish within `drain`, ends the
    /// rest, and forgets it. Blocks until then. A failed entry is just forgotten. Returns the number
    /// of requests that were ended.
    ///
    /// # Errors
    /// When there is no such model, or it is on its way in or out.
    pub fn unload(&self, name: &str, drain: Duration) -> Result<usize, LookupError> {
        let name = self.real_name(name);
        let model = self.change(|entries| match entries.get(name).cloned() {
            Some(Entry::Served(model)) => {
                entries.insert(name.to_owned(), Entry::Unloading(Arc::clone(&model)));
                Ok(Some(model))
            }
            Some(Entry::Failed { .. }) => Ok(None),
            Some(Entry::Loading { .. }) => Err(LookupError::Loading {
                name: name.to_owned(),
            }),
            Some(Entry::Unloading(_)) => Err(LookupError::Unloading {
                name: name.to_owned(),
            }),
            None => Err(LookupError::Unknown {
                name: name.to_owned(),
                served: self.names(entries),
            }),
        })?;
        let n_ended = model.map_or(0, |model| stop(&model.replica, drain));
        self.change(|entries| entries.remove(name));
        Ok(n_ended)
    }

    /// The model to answer with, by name or alias. Without a name: the only one there is.
    ///
    /// # Errors
    /// [`LookupError`] with the names that would have worked.
    pub fn lookup(&self, name: Option<&str>) -> Result<Arc<ServedModel>, LookupError> {
        let entries = self.entries.load();
        let Some(name) = name else {
            let mut models = entries.values().filter_map(|entry| match entry {
                Entry::Served(model) => Some(model),
                Entry::Loading { .. } | Entry::Unloading(_) | Entry::Failed { .. } => None,
            });
            return match (models.next(), models.next()) {
                (Some(model), None) => Ok(Arc::clone(model)),
                (Some(_), Some(_)) => Err(LookupError::NameNeeded {
                    served: self.names(&entries),
                }),
                (None, _) => Err(LookupError::NothingServed),
            };
        };
        match entries.get(self.real_name(name)) {
            Some(Entry::Served(model)) => Ok(Arc::clone(model)),
            Some(Entry::Loading { .. }) => Err(LookupError::Loading {
                name: name.to_owned(),
            }),
            Some(Entry::Unloading(_)) => Err(LookupError::Unloading {
                name: name.to_owned(),
            }),
            Some(Entry::Failed { .. }) | None => {
                let name = name.chars().take(200).collect();
                Err(LookupError::Unknown {
                    name,
                    served: self.names(&entries),
                })
            }
        }
    }

    /// Names and aliases that lead to a model that answers.
    fn names(&self, entries: &Entries) -> Vec<String> {
        let served = entries
            .iter()
            .filter(|(_, entry)| matches!(entry, Entry::Served(_)));
        served
            .flat_map(|(name, _)| std::iter::once(name).chain(self.aliases(name)))
            .cloned()
            .collect()
    }

    /// All models by name, in whatever state.
    pub fn entries(&self) -> Arc<BTreeMap<String, Entry>> {
        self.entries.load_full()
    }

    /// The models that answer, by name.
    pub fn served(&self) -> Vec<Arc<ServedModel>> {
        let entries = self.entries.load();
        let models = entries.values().filter_map(|entry| match entry {
            Entry::Served(model) => Some(Arc::clone(model)),
            Entry::Loading { .. } | Entry::Unloading(_) | Entry::Failed { .. } => None,
        });
        models.collect()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Entries) -> T) -> T {
        let _held = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Entries::clone(&self.entries.load());
        let result = change(&mut entries);
        self.entries.store(Arc::new(entries));
        result
    }
}

/// A load in progress; writes its outcome when dropped, also after a panic of the loader.
struct Loading<'a> {
    catalog: &'a Catalog,
    name: &'a str,
    path: &'a Path,
    outcome: Option<Entry>,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or_else(|| Entry::Failed {
            path: self.path.to_owned(),
            reason: "the loader panicked".to_owned(),
        });
        self.catalog
            .change(|entries| entries.insert(self.name.to_owned(), outcome));
    }
}

/// Stops a replica and counts the requests that still ran at the end of the drain time.
fn stop(replica: &Replica, drain: Duration) -> usize {
    let deadline = clock::now() + drain;
    thread::scope(|scope| {
        let stopping = scope.spawn(|| replica.stop(drain));
        // The last look before the deadline counts: after it the engine ends the rest at once.
        let n_ended = loop {
            let load = replica.load();
            thread::sleep(DRAIN_POLL_INTERVAL.min(drain));
            if deadline <= clock::now() {
                break load.n_running + load.n_waiting;
            }
            if stopping.is_finished() {
                break 0;
            }
        };
        if stopping.join().is_err() {
            tracing::error!("stopping an engine broke off");
        }
        n_ended
    })
}
