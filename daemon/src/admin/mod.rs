//! What `dsctl` talks to: status, models, tenants and generation over QUIC.
//!
//! Turns wire messages into calls of catalog, tenants and gateway and back; knows no sockets. The server of
//! `dsd_proto::quic` calls it and drops its futures when a caller goes away, which cancels what they
//! hold.

mod generate;
mod tenants;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use dsd_proto::{
    code::Code,
    quic::{AdminService, ReplySender},
    wire::{
        admin::{
            ErrorReply, Finding, ModelEntry, ModelListReply, ModelLoadReply, ModelLoadRequest,
            ModelState, ModelStatus, ModelUnloadReply, ModelUnloadRequest, ModelVerifyReply,
            ModelVerifyRequest, Progress, StatusReply, TenantAddRequest, TenantKeyReply,
            TenantListReply, TenantRemoveReply, TenantRemoveRequest, TenantRotateKeyRequest,
            TenantSetRequest, TenantShowReply, TenantShowRequest,
        },
        generate::{GenerateDelta, GenerateDone, GenerateRequest},
    },
};
use tokio::{
    sync::{Semaphore, mpsc},
    task,
};

use crate::{
    catalog::{self, Catalog, Entry, LoadError, ServedModel, store},
    gateway::{self, ApiError},
    runtime::clock,
    telemetry,
    tenants::Tenants,
};

/// Reports of a long call that wait to be sent; later ones are dropped, the next says more anyway.
const PROGRESS_QUEUE_LEN: usize = 16;

/// What a node says about itself, and its limits for calls.
#[derive(Debug, Clone)]
pub struct AdminConfig {
    /// Name of the node.
    pub node: String,
    /// Cluster it belongs to.
    pub cluster: String,
    /// Where HTTP is answered.
    pub http_address: String,
    /// Where QUIC is answered.
    pub quic_address: String,
    /// Folder of models that are loaded by name.
    pub models_dir: PathBuf,
    /// Age of the last token above which a model is not ready.
    pub token_age_max: Duration,
    /// From the arrival of a generation to its end.
    pub request_timeout: Duration,
    /// On unload, for requests to finish.
    pub drain_timeout: Duration,
    /// Prompts tokenised at once.
    pub encoders_max: usize,
}

/// Answers what operators ask.
#[derive(Debug)]
pub struct Admin {
    config: AdminConfig,
    catalog: Arc<Catalog>,
    tenants: Arc<Tenants>,
    started: Instant,
    encoders: Arc<Semaphore>,
}

impl Admin {
    /// The operators' side of `catalog` and `tenants`. The node's uptime counts from here.
    pub fn new(config: AdminConfig, catalog: Arc<Catalog>, tenants: Arc<Tenants>) -> Self {
        let encoders = Arc::new(Semaphore::new(config.encoders_max));
        Self {
            config,
            catalog,
            tenants,
            started: clock::now(),
            encoders,
        }
    }

    /// The checkpoint that a name or an absolute path means.
    fn checkpoint(&self, path_or_name: &str) -> Result<PathBuf, ErrorReply> {
        let path = Path::new(path_or_name);
        if path.is_absolute() {
            return Ok(path.to_owned()).and_then(|path| {
                if path.exists() {
                    Ok(path)
                } else {
                    Err(not_found(format!("there is nothing at `{path_or_name}`")))
                }
            });
        }
        let dir = &self.config.models_dir;
        store::find(dir, path_or_name).ok_or_else(|| {
            not_found(format!(
                "there is no model `{path_or_name}` in `{}`",
                dir.display()
            ))
        })
    }

    fn state(&self, entry: &Entry) -> ModelState {
        match entry {
            Entry::Loading { .. } => ModelState::Loading,
            Entry::Served(model) => {
                match gateway::model_readiness(model, self.config.token_age_max) {
                    Ok(()) => ModelState::Ready,
                    Err(_) => ModelState::Stalled,
                }
            }
            Entry::Unloading(_) => ModelState::Stopping,
            Entry::Failed { .. } => ModelState::Failed,
        }
    }

    fn model_status(&self, name: &str, entry: &Entry) -> ModelStatus {
        let state = self.state(entry);
        let (Entry::Served(model) | Entry::Unloading(model)) = entry else {
            return ModelStatus {
                name: name.to_owned(),
                architecture: String::new(),
                state,
                context_len: 0,
                n_running: 0,
                n_waiting: 0,
                n_blocks_used: 0,
                n_blocks: 0,
                n_steps: 0,
                n_prompt_tokens: 0,
                n_output_tokens: 0,
                n_preemptions: 0,
                last_token_age_ms: None,
                bytes_mapped: 0,
                kv_bytes: 0,
                workspace_bytes: 0,
            };
        };
        let load = model.replica.load();
        ModelStatus {
            name: name.to_owned(),
            architecture: model.architecture.clone(),
            state,
            context_len: clamped(model.context_len()),
            n_running: clamped(load.n_running),
            n_waiting: clamped(load.n_waiting),
            n_blocks_used: clamped(load.n_blocks_used),
            n_blocks: clamped(load.n_blocks),
            n_steps: load.n_steps,
            n_prompt_tokens: load.n_prompt_tokens,
            n_output_tokens: load.n_output_tokens,
            n_preemptions: load.n_preemptions,
            last_token_age_ms: load.last_token_age.map(millis),
            bytes_mapped: model.memory.weight_bytes,
            kv_bytes: model.memory.kv_bytes,
            workspace_bytes: model.memory.workspace_bytes,
        }
    }

    /// Runs blocking work and passes on how far it is until it ends. When the caller goes away the
    /// work goes on to its end, unobserved.
    async fn with_progress<T: Send + 'static>(
        progress: &mut ReplySender<'_, Progress>,
        work: impl FnOnce(&mut dyn FnMut(catalog::Progress)) -> T + Send + 'static,
    ) -> Result<T, ErrorReply> {
        let (tx, mut rx) = mpsc::channel(PROGRESS_QUEUE_LEN);
        let work = task::spawn_blocking(move || {
            work(&mut |progress| {
                // A full queue means a slow reader; the next report says more anyway.
                let _ = tx.try_send(progress);
            })
        });
        while let Some(report) = rx.recv().await {
            let report = Progress {
                phase: report.stage.to_owned(),
                done: report.n_done,
                total: report.n_total,
            };
            progress.send(&report).await?;
        }
        work.await.map_err(|e| {
            tracing::error!(error = %e, "an admin call broke off");
            ErrorReply::new(
                Code::Internal,
                "the call broke off; the log of the node has the cause",
            )
        })
    }
}

impl AdminService for Admin {
    async fn status(&self) -> Result<StatusReply, ErrorReply> {
        let readiness = gateway::readiness(&self.catalog, self.config.token_age_max);
        let entries = self.catalog.entries();
        Ok(StatusReply {
            node: self.config.node.clone(),
            cluster: self.config.cluster.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: clock::now().duration_since(self.started).as_secs(),
            ready: readiness.is_ok(),
            ready_reason: match readiness {
                Ok(()) => "every model produced a correct token lately".to_owned(),
                Err(reason) => reason.to_string(),
            },
            http_address: self.config.http_address.clone(),
            quic_address: self.config.quic_address.clone(),
            models: entries
                .iter()
                .map(|(name, entry)| self.model_status(name, entry))
                .collect(),
        })
    }

    async fn model_list(&self) -> Result<ModelListReply, ErrorReply> {
        let dir = self.config.models_dir.clone();
        let stored = task::spawn_blocking(move || store::scan(&dir)).await;
        let stored = stored
            .map_err(|e| e.to_string())
            .and_then(|scanned| scanned.map_err(|e| e.to_string()));
        let stored = stored.map_err(|e| {
            let dir = self.config.models_dir.display();
            ErrorReply::new(
                Code::Internal,
                format!("cannot read the model store `{dir}`: {e}"),
            )
        })?;
        let entries = self.catalog.entries();
        let mut models: Vec<ModelEntry> = entries
            .iter()
            .map(|(name, entry)| {
                let (path, architecture, bytes) = match entry {
                    Entry::Served(model) | Entry::Unloading(model) => (
                        &model.path,
                        model.architecture.clone(),
                        model.memory.weight_bytes,
                    ),
                    Entry::Loading { path, .. } | Entry::Failed { path, .. } => {
                        (path, String::new(), 0)
                    }
                };
                let on_disk = stored.iter().find(|stored| stored.path == *path);
                let is_gguf = path.extension().is_some_and(|ext| ext == "gguf");
                ModelEntry {
                    name: name.clone(),
                    path: path.display().to_string(),
                    state: Some(self.state(entry)),
                    architecture,
                    format: on_disk
                        .map_or(if is_gguf { "gguf" } else { "safetensors" }, |stored| {
                            stored.format
                        })
                        .to_owned(),
                    bytes: on_disk.map_or(bytes, |stored| stored.bytes),
                }
            })
            .collect();
        let loaded: BTreeSet<String> = models.iter().map(|model| model.path.clone()).collect();
        models.extend(
            stored
                .into_iter()
                .filter(|stored| !loaded.contains(&stored.path.display().to_string()))
                .map(|stored| ModelEntry {
                    name: stored.name,
                    path: stored.path.display().to_string(),
                    state: None,
                    architecture: stored.architecture,
                    format: stored.format.to_owned(),
                    bytes: stored.bytes,
                }),
        );
        models.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(ModelListReply { models })
    }

    async fn model_load(
        &self,
        request: ModelLoadRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelLoadReply, ErrorReply> {
        let started = clock::now();
        // A model of the configuration is loaded as the configuration says, whatever the store has.
        let (name, path) = match self.catalog.configured_as(&request.path_or_name) {
            Some(model) => (model.name.clone(), model.path.clone()),
            None => {
                let path = self.checkpoint(&request.path_or_name)?;
                let name = store::name_of(&path).ok_or_else(|| {
                    ErrorReply::new(Code::InvalidRequest, "the path gives the model no name")
                })?;
                (name, path)
            }
        };
        let catalog = Arc::clone(&self.catalog);
        let loaded = Self::with_progress(progress, move |on_progress| {
            let loaded = catalog.load(&name, &path, on_progress);
            if let Err(e) = &loaded {
                tracing::warn!(
                    model = name,
                    error = telemetry::chain(e),
                    "a model was not loaded"
                );
            }
            loaded
        });
        let model: Arc<ServedModel> = loaded.await?.map_err(|e| load_error(&e))?;
        Ok(ModelLoadReply {
            name: model.name.clone(),
            architecture: model.architecture.clone(),
            context_len: clamped(model.context_len()),
            n_blocks: clamped(model.replica.limits().n_blocks),
            bytes_mapped: model.memory.weight_bytes,
            kv_bytes: model.memory.kv_bytes,
            workspace_bytes: model.memory.workspace_bytes,
            load_ms: millis(clock::now().duration_since(started)),
        })
    }

    async fn model_unload(
        &self,
        request: ModelUnloadRequest,
    ) -> Result<ModelUnloadReply, ErrorReply> {
        let catalog = Arc::clone(&self.catalog);
        let (name, drain) = (request.name.clone(), self.config.drain_timeout);
        let unloaded = task::spawn_blocking(move || catalog.unload(&name, drain)).await;
        let n_ended = unloaded
            .map_err(|e| {
                tracing::error!(error = %e, "unloading a model broke off");
                ErrorReply::new(
                    Code::Internal,
                    "unloading broke off; the log of the node has the cause",
                )
            })?
            .map_err(|e| error_reply(&ApiError::from(e)))?;
        Ok(ModelUnloadReply {
            name: request.name,
            n_requests_ended: clamped(n_ended),
        })
    }

    async fn model_verify(
        &self,
        request: ModelVerifyRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelVerifyReply, ErrorReply> {
        let loaded = self
            .catalog
            .entries()
            .get(&request.name)
            .map(|entry| match entry {
                Entry::Served(model) | Entry::Unloading(model) => model.path.clone(),
                Entry::Loading { path, .. } | Entry::Failed { path, .. } => path.clone(),
            });
        let path = match loaded {
            Some(path) => path,
            None => self.checkpoint(&request.name)?,
        };
        let file = path.display().to_string();
        let report = Self::with_progress(progress, move |on_progress| {
            store::verify(&path, on_progress)
        })
        .await?;
        let report = match report {
            Ok(report) => report,
            // A checkpoint that does not even open is damaged, which is what was asked.
            Err(e) => {
                let finding = Finding {
                    file,
                    tensor: String::new(),
                    expected: "a checkpoint that can be opened".to_owned(),
                    found: telemetry::chain(&e),
                };
                return Ok(ModelVerifyReply {
                    name: request.name,
                    n_files: 0,
                    n_tensors: 0,
                    bytes: 0,
                    digest: String::new(),
                    findings: vec![finding],
                });
            }
        };
        let files: BTreeSet<_> = report.tensors.iter().map(|tensor| &tensor.file).collect();
        let findings = report.findings.iter().map(|finding| Finding {
            file: finding
                .file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            tensor: finding.tensor.clone(),
            expected: finding.expected.clone(),
            found: finding.found.clone(),
        });
        Ok(ModelVerifyReply {
            name: request.name,
            n_files: clamped(files.len()),
            n_tensors: clamped(report.tensors.len()),
            bytes: report.bytes,
            digest: report.digest.clone(),
            findings: findings.collect(),
        })
    }

    async fn tenant_list(&self) -> Result<TenantListReply, ErrorReply> {
        Ok(tenants::list(self))
    }

    async fn tenant_show(&self, request: TenantShowRequest) -> Result<TenantShowReply, ErrorReply> {
        tenants::show(self, &request.name)
    }

    async fn tenant_add(&self, request: TenantAddRequest) -> Result<TenantKeyReply, ErrorReply> {
        tenants::add(self, request).await
    }

    async fn tenant_set(&self, request: TenantSetRequest) -> Result<TenantShowReply, ErrorReply> {
        tenants::set(self, request).await
    }

    async fn tenant_rotate_key(
        &self,
        request: TenantRotateKeyRequest,
    ) -> Result<TenantKeyReply, ErrorReply> {
        tenants::rotate_key(self, request).await
    }

    async fn tenant_remove(
        &self,
        request: TenantRemoveRequest,
    ) -> Result<TenantRemoveReply, ErrorReply> {
        tenants::remove(self, request).await
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        deltas: &mut ReplySender<'_, GenerateDelta>,
    ) -> Result<GenerateDone, ErrorReply> {
        generate::run(self, request, deltas).await
    }
}

/// The wire's form of an error of the gateway.
fn error_reply(error: &ApiError) -> ErrorReply {
    let message = match &error.param {
        Some(param) if !error.message.contains(param.as_str()) => {
            format!("{param}: {}", error.message)
        }
        _ => error.message.clone(),
    };
    ErrorReply {
        code_number: error.code.number(),
        message,
        retry_after_ms: error.retry_after.map(millis),
    }
}

fn load_error(error: &LoadError) -> ErrorReply {
    let code = match error {
        LoadError::Exists { .. } | LoadError::IsAlias { .. } => Code::ModelExists,
        LoadError::Checkpoint { .. } => Code::WeightsInvalid,
        LoadError::Unsupported { .. } => Code::ModelUnsupported,
        LoadError::Memory { .. } => Code::InsufficientMemory,
        LoadError::Engine { .. } => Code::Internal,
    };
    ErrorReply::new(code, telemetry::chain(error))
}

fn not_found(message: String) -> ErrorReply {
    ErrorReply::new(Code::NotFound, message)
}

fn clamped(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
