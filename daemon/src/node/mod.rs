//! A whole node: sockets, certificates, models and the way up and down.
//!
//! Puts the other modules together and nothing else. Sockets are bound before a model is loaded, so
//! that a taken port is said at once; HTTP answers while models load (`/health` is 200, `/ready`
//! says what is missing).
//!
//! Called by `dsd dev` and `dsd serve`.

mod certificates;
mod check;
mod descriptors;
mod drain;
mod explain;
mod loader;
mod ledger;
mod reload;
mod state_folder;
mod watchdog;

pub use check::{Finding, check};
pub use descriptors::TooFewFiles;
pub use explain::{ExplainedModel, ExplainedPlan, ExplainedValue, NoPlan};
pub use reload::Reread;

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dsd_proto::{
    ids::{ClusterName, NodeName},
    quic::{Identity, PkiError, Server, ServerError, ServerLimits},
};
use sd_notify::NotifyState;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};
use tracing::{error, info, warn};

use crate::{
    admin::{Admin, AdminConfig},
    catalog::{Catalog, ConfiguredModel, LoadError},
    config::{Config, ModelConfig},
    gateway::{Gateway, GatewayConfig, Stop},
    runtime::clock,
    telemetry::{self, Metrics},
    tenants::{Now, Source, Tenants, TenantsError},
};
use certificates::Certificates;
use reload::Reload;
use state_folder::StateFolder;

pub use state_folder::StateFolderError;

/// Name of the cluster in certificates: until nodes join each other, each is its own.
const CLUSTER: &str = "dsd";
/// How often histogram samples are folded together, whether anybody scrapes or not.
const METRICS_TIDY_INTERVAL: Duration = Duration::from_secs(5);
/// What models may take beyond the drain time to stop, and then clients to take their last bytes.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Why a node does not come up.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The state folder cannot be written, or another daemon lives in it.
    #[error(transparent)]
    StateFolder(#[from] StateFolderError),
    /// An address is taken or not ours.
    #[error(
        "cannot listen on {protocol} {address}; is another dsd running? choose another with {option}"
    )]
    Listen {
        /// `HTTP` or `QUIC`.
        protocol: &'static str,
        /// The address.
        address: SocketAddr,
        /// Where to change it.
        option: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The node's name cannot stand in a certificate.
    #[error("node.name `{name}` cannot be used")]
    Name {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: dsd_proto::ids::NameError,
    },
    /// Certificates cannot be made or used.
    #[error("cannot use the certificates in `{}`", path.display())]
    Pki {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: PkiError,
    },
    /// The QUIC server cannot be set up.
    #[error(transparent)]
    Quic(#[from] ServerError),
    /// The file of tenants or API keys cannot be used.
    #[error("it is not known who may call")]
    Tenants(#[from] TenantsError),
    /// Too few files may be open.
    #[error(transparent)]
    TooFewFiles(#[from] TooFewFiles),
    /// Counters cannot be set up.
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    /// The async runtime or a signal handler cannot be set up.
    #[error("cannot set up the network runtime")]
    Runtime(#[source] io::Error),
    /// An engine panicked. Only a new process is known to be sound.
    #[error("the engine of the model `{model}` has broken down")]
    EngineBroken {
        /// Its model.
        model: String,
    },
    /// No model of the configuration could be loaded, and one of them is required; the log has one
    /// line for each.
    #[error("no model could be loaded")]
    NoModel(#[source] LoadError),
}

/// A node with its sockets bound and its models not yet loaded.
pub struct Node {
    config: Config,
    hangups: Signal,
    reload: Reload,
    state_folder: StateFolder,
    runtime: Runtime,
    http: TcpListener,
    quic: UdpSocket,
    certificates: Certificates,
    identity: Identity,
    tenants: Arc<Tenants>,
    metrics: Metrics,
    catalog: Arc<Catalog>,
    addresses: NodeAddresses,
}

/// Where a node answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeAddresses {
    /// The OpenAI API.
    pub http: SocketAddr,
    /// `dsctl` and other nodes.
    pub quic: SocketAddr,
}

impl Node {
    /// Takes sockets, state folder and certificates. From here on SIGHUP does not end the process:
    /// it has the tenants read again, and `reread` say what else has changed.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn bind(mut config: Config, reread: Option<Reread>) -> Result<Self, NodeError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(NodeError::Runtime)?;
        let hangups = {
            let _entered = runtime.enter();
            signal(SignalKind::hangup()).map_err(NodeError::Runtime)?
        };
        let metrics = telemetry::install_metrics()?;
        for model in &config.models {
            telemetry::declare("model", &model.name);
        }
        let reload = Reload {
            as_read: config.clone(),
            reread,
        };
        config.http.connections_max = descriptors::connections(&config)?;
        let state = &config.node.state_dir;
        // Before anything else is written: two first starts at once would mix their certificates.
        let state_folder = StateFolder::lock(state)?;
        if let Some(exposure) = state_folder::exposure(state) {
            warn!("{exposure}");
        }
        let bad_name = |source| NodeError::Name {
            name: config.node.name.clone(),
            source,
        };
        let name = config.node.name.parse::<NodeName>().map_err(bad_name)?;
        let cluster = CLUSTER.parse::<ClusterName>().map_err(bad_name)?;
        let certificates = Certificates {
            folder: state.join("pki"),
            cluster,
            node: name,
        };
        let identity = certificates.identity()?;
        let tenants = Arc::new(Tenants::read(source_of(&config), Now::read())?);
        let listen = |protocol, address, option| {
            move |source| NodeError::Listen {
                protocol,
                address,
                option,
                source,
            }
        };
        let failed = listen("HTTP", config.http.listen, "--http or http.listen");
        let http = TcpListener::bind(config.http.listen).map_err(failed)?;
        http.set_nonblocking(true).map_err(failed)?;
        let failed = listen("QUIC", config.quic.listen, "--quic or quic.listen");
        let quic = UdpSocket::bind(config.quic.listen).map_err(failed)?;
        let addresses = NodeAddresses {
            http: http.local_addr().map_err(NodeError::Runtime)?,
            quic: quic.local_addr().map_err(NodeError::Runtime)?,
        };
        let catalog = Arc::new(Catalog::of_configuration(
            loader::new(&config),
            configured(&config.models),
        ));
        Ok(Self {
            config,
            hangups,
            reload,
            state_folder,
            runtime,
            http,
            quic,
            certificates,
            identity,
            tenants,
            metrics,
            catalog,
            addresses,
        })
    }

    /// Where the node answers; with port 0 in the configuration, the one that was given.
    pub fn addresses(&self) -> NodeAddresses {
        self.addresses
    }

    /// Loads the models, calls `on_ready` and serves until SIGTERM or SIGINT, or until an engine
    /// breaks down; then lets requests finish within the drain time. A second signal ends the wait.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn run(self, on_ready: impl FnOnce(&Catalog)) -> Result<(), NodeError> {
        let Self {
            config,
            hangups,
            reload,
            // Held until everything has ended.
            state_folder: _state_folder,
            runtime,
            http,
            quic,
            certificates,
            identity,
            tenants,
            metrics,
            catalog,
            addresses,
        } = self;
        let drain = Duration::from_secs(config.node.drain_timeout_s);
        let outcome = runtime.block_on(async {
            let stop = Stop::default();
            let mut services = JoinSet::new();
            let listener = tokio::net::TcpListener::from_std(http).map_err(NodeError::Runtime)?;
            let gateway = Gateway::new(
                GatewayConfig::new(&config.http, STOP_GRACE),
                Arc::clone(&tenants),
                Arc::clone(&catalog),
                metrics.clone(),
                stop.clone(),
            );
            services.spawn(gateway.serve(listener));
            let admin = Admin::new(
                admin_config(&config, addresses),
                Arc::clone(&catalog),
                Arc::clone(&tenants),
            );
            let limits = ServerLimits {
                // Calls end when their model stops.
                drain_timeout: drain + STOP_GRACE,
                ..ServerLimits::default()
            };
            let server = Server::new(quic, &identity, admin, limits)?;
            let mut upkeep = JoinSet::new();
            upkeep.spawn(certificates.keep(server.identity_handle()));
            services.spawn(server.run(stop.draining.clone().cancelled_owned()));
            upkeep.spawn(tidy_metrics(metrics, Arc::clone(&tenants)));
            let is_serving = Arc::<AtomicBool>::default();
            upkeep.spawn(reload.run(hangups, tenants, Arc::clone(&is_serving)));
            info!(http = %addresses.http, quic = %addresses.quic, "listening");

            let mut signals = StopSignals::new().map_err(NodeError::Runtime)?;
            tokio::select! {
                loaded = load_models(&catalog, &config.models) => loaded?,
                () = signals.wait() => {
                    info!("stopped while loading");
                    return Ok(());
                }
            }
            let token_age_max = Duration::from_secs(config.http.token_age_max_s);
            let feeder = upkeep.spawn(watchdog::feed(Arc::clone(&catalog), token_age_max));
            is_serving.store(true, Ordering::Release);
            notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
            on_ready(&catalog);

            let broken = tokio::select! {
                () = signals.wait() => None,
                model = watchdog::broken_engine(&catalog) => Some(model),
            };
            let drain_s = drain.as_secs();
            match &broken {
                None => info!(drain_s, "stopping, requests may finish"),
                Some(model) => {
                    warn!(
                        model,
                        drain_s, "stopping over a broken engine, other models may finish"
                    );
                }
            }
            is_serving.store(false, Ordering::Release);
            // Models that have stopped give no tokens; the drain feeds by itself.
            feeder.abort();
            tokio::select! {
                () = drain::drain(&catalog, &stop, &mut services, drain) => {}
                () = signals.wait() => warn!("stopped at once by a second signal"),
            }
            broken.map_or(Ok(()), |model| Err(NodeError::EngineBroken { model }))
        });
        for model in catalog.served() {
            model.replica.stop(Duration::ZERO);
        }
        runtime.shutdown_timeout(STOP_GRACE);
        info!("stopped");
        outcome
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn admin_config(config: &Config, addresses: NodeAddresses) -> AdminConfig {
    AdminConfig {
        node: config.node.name.clone(),
        cluster: CLUSTER.to_owned(),
        http_address: addresses.http.to_string(),
        quic_address: addresses.quic.to_string(),
        models_dir: models_dir(config),
        token_age_max: Duration::from_secs(config.http.token_age_max_s),
        request_timeout: Duration::from_secs(config.http.request_timeout_s),
        drain_timeout: Duration::from_secs(config.node.drain_timeout_s),
        encoders_max: config.http.encoders_max,
    }
}

/// What the catalog knows of the configuration's models.
fn configured(models: &[ModelConfig]) -> Vec<ConfiguredModel> {
    let configured = |model: &ModelConfig| ConfiguredModel {
        name: model.name.clone(),
        path: model.path.clone(),
        aliases: model
            .aliases
            .iter()
            .map(|alias| alias.name.clone())
            .collect(),
        thinking_aliases: model
            .aliases
            .iter()
            .filter(|alias| alias.thinks)
            .map(|alias| alias.name.clone())
            .collect(),
        required: model.required,
    };
    models.iter().map(configured).collect()
}

/// Where the configuration says who may call.
fn source_of(config: &Config) -> Source {
    Source::new(
        config.service.tenants_file.as_deref(),
        config.http.api_keys_file.as_deref(),
    )
}

/// Where models are looked for by name.
pub fn models_dir(config: &Config) -> PathBuf {
    let default = || config.node.state_dir.join("models");
    config.node.models_dir.clone().unwrap_or_else(default)
}

/// Loads one model after the other; those that fail are logged and left out. A node with none of its
/// models is of no use unless it may be without them all: then they can still be loaded by hand.
async fn load_models(catalog: &Arc<Catalog>, models: &[ModelConfig]) -> Result<(), NodeError> {
    let mut failed = None;
    let mut n_loaded = 0;
    for ModelConfig {
        name,
        path,
        required,
        ..
    } in models
    {
        let (catalog, name, path) = (Arc::clone(catalog), name.clone(), path.clone());
        let model = name.clone();
        let load = move || catalog.load(&name, &path, &mut |_| {}).map(|_| ());
        match tokio::task::spawn_blocking(load).await {
            Ok(Ok(())) => n_loaded += 1,
            Ok(Err(e)) => {
                error!(%model, error = %telemetry::chain(&e), "model not loaded");
                failed = failed.or_else(|| required.then_some(e));
            }
            Err(e) => error!(%model, error = %e, "the loader of a model died"),
        }
    }
    match failed {
        Some(e) if n_loaded == 0 => Err(NodeError::NoModel(e)),
        _ => Ok(()),
    }
}

async fn tidy_metrics(metrics: Metrics, tenants: Arc<Tenants>) {
    let mut ticks = tokio::time::interval(METRICS_TIDY_INTERVAL);
    loop {
        ticks.tick().await;
        tenants.publish(clock::now());
        metrics.tidy();
    }
}

/// Tells systemd; without it there is nobody to tell.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(states) {
        warn!(error = %e, "cannot notify systemd");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flow::{self, Request, RequestId, SamplingParams},
        gateway::tests::kit::{self, BOMB, QUICK},
    };

    /// A node over a fake model, its sockets on free ports.
    fn node(state: &std::path::Path) -> Node {
        let mut config = Config::default();
        config.node.drain_timeout_s = 5;
        let name = config.node.name.parse::<NodeName>().unwrap();
        let cluster = CLUSTER.parse::<ClusterName>().unwrap();
        let state_folder = StateFolder::lock(state).unwrap();
        let certificates = Certificates {
            folder: state.join("pki"),
            cluster,
            node: name,
        };
        let identity = certificates.identity().unwrap();
        let http = TcpListener::bind("127.0.0.1:0").unwrap();
        http.set_nonblocking(true).unwrap();
        let quic = UdpSocket::bind("127.0.0.1:0").unwrap();
        let addresses = NodeAddresses {
            http: http.local_addr().unwrap(),
            quic: quic.local_addr().unwrap(),
        };
        let catalog = Catalog::new(loader::new(&config));
        catalog.insert(kit::model("tiny", &QUICK));
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let hangups = {
            let _entered = runtime.enter();
            signal(SignalKind::hangup()).unwrap()
        };
        let reload = Reload {
            as_read: config.clone(),
            reread: None,
        };
        Node {
            config,
            hangups,
            reload,
            state_folder,
            runtime,
            http,
            quic,
            certificates,
            identity,
            tenants: Arc::new(Tenants::open(clock::now())),
            metrics: kit::metrics(),
            catalog: Arc::new(catalog),
            addresses,
        }
    }

    /// The process used to live on without its engine; systemd can restart only what ends.
    #[test]
    fn a_node_ends_with_an_error_when_an_engine_breaks_down() {
        let state = tempfile::tempdir().unwrap();
        // Read by nobody but alive: a dropped stream would cancel the request before its step.
        let (sink, _stream) = flow::token_stream(1);
        let outcome = node(state.path()).run(|catalog| {
            let request = Request {
                id: RequestId(1),
                prompt: vec![BOMB],
                output: Vec::new(),
                max_tokens: 1,
                stop_tokens: Arc::new([]),
                sampling: SamplingParams::default(),
                grammar: None,
                top_logprobs: None,
                scored_from: None,
                deadline: None,
                cache_owner: flow::CacheOwner::default(),
                account: flow::Account::default(),
                siblings: flow::Siblings::default(),
                sink,
            };
            catalog
                .lookup(None)
                .unwrap()
                .replica
                .submit(request)
                .unwrap();
        });
        let error = outcome.unwrap_err();
        assert!(
            matches!(&error, NodeError::EngineBroken { model } if model == "tiny"),
            "{error}"
        );
    }
}
