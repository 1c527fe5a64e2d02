//! SIGHUP: files that are read again while the node serves.
//!
//! Knows not what a change of tenants means.
//!
//! Invariant: a file that became wrong changes nothing, and no reload ends the node or a stream.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tracing::{error, info, warn};

use super::notify;
use crate::{
    config::{self, Config, ConfigError},
    telemetry,
    tenants::{Now, Tenants},
};

/// Reads the configuration again, as the start did.
pub type Reread = Box<dyn Fn() -> Result<Config, ConfigError> + Send>;

/// What SIGHUP has read again.
pub(super) struct Reload {
    /// The configuration of this start.
    pub(super) as_read: Config,
    /// `None` where there is no file of it.
    pub(super) reread: Option<Reread>,
}

impl Reload {
    /// Reads the file of tenants again at every SIGHUP, and names what of the configuration waits for a
    /// restart. Systemd is told only while it holds the node for up: the READY that ends a reload would
    /// otherwise be the first one.
    pub(super) async fn run(
        self,
        mut hangups: Signal,
        tenants: Arc<Tenants>,
        is_serving: Arc<AtomicBool>,
    ) {
        let mut reload = self;
        while hangups.recv().await.is_some() {
            let is_told = is_serving.load(Ordering::Acquire);
            if is_told {
                match NotifyState::monotonic_usec_now() {
                    Ok(now) => notify(&[NotifyState::Reloading, now]),
                    Err(e) => warn!(error = %e, "cannot tell systemd when the reload began"),
                }
            }
            let file = Arc::clone(&tenants);
            let read = tokio::task::spawn_blocking(move || {
                read_tenants(&file);
                reload.name_changes();
                reload
            });
            let outcome = read.await;
            if is_told && is_serving.load(Ordering::Acquire) {
                notify(&[NotifyState::Ready]);
            }
            match outcome {
                Ok(same) => reload = same,
                Err(e) => {
                    error!(error = %e, "reading again broke off; SIGHUP does nothing from now on");
                    return;
                }
            }
        }
    }

    /// Says what of the configuration is not as it was at the start.
    fn name_changes(&self) {
        let Some(reread) = &self.reread else { return };
        match reread() {
            Ok(new) => {
                let changed = config::changes(&self.as_read, &new);
                if !changed.is_empty() {
                    let keys = changed.join(", ");
                    warn!(keys, "the configuration changed; these wait for a restart");
                }
            }
            Err(e) => {
                error!(error = %telemetry::chain(&e), "the configuration is wrong now; a restart would fail");
            }
        }
    }
}

fn read_tenants(tenants: &Tenants) {
    if tenants.is_open() {
        info!("everybody may call, so there are no tenants to read again");
        return;
    }
    let result = match tenants.reload(Now::read()) {
        Ok(changed) => {
            let (n, n_added, n_removed) = (changed.n_tenants, changed.n_added, changed.n_removed);
            info!(n_tenants = n, n_added, n_removed, "tenants read again");
            "ok"
        }
        Err(e) => {
            error!(error = %telemetry::chain(&e), "tenants not read again, the old ones stay");
            "failed"
        }
    };
    metrics::counter!("dsd_tenant_reloads_total", "result" => result).increment(1);
}
