//! Feeds systemd's watchdog as long as tokens come out, and finds engines that broke down.
//!
//! A frozen engine stops the feeding, and systemd restarts the node: liveness is forward progress,
//! not a thread that still ticks.

use std::{sync::Arc, time::Duration};

use sd_notify::NotifyState;
use tracing::warn;

use crate::{catalog::Catalog, gateway};

/// How often engines are looked at. Requests learn of a broken one at once; this is only how long
/// the restart waits.
const BROKEN_POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Runs for ever; without a watchdog it returns at once.
pub(super) async fn feed(catalog: Arc<Catalog>, token_age_max: Duration) {
    let Some(timeout) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut ticks = tokio::time::interval(timeout / 3);
    loop {
        ticks.tick().await;
        let stuck = catalog
            .served()
            .into_iter()
            // Ranks that are started again are looked after already.
            .filter(|model| !model.replica.load().is_forming)
            .find_map(|model| gateway::model_readiness(&model, token_age_max).err());
        match stuck {
            None => super::notify(&[NotifyState::Watchdog]),
            Some(reason) => warn!(%reason, "watchdog not fed"),
        }
    }
}

/// Waits until an engine has broken down, and names its model.
pub(super) async fn broken_engine(catalog: &Catalog) -> String {
    let mut ticks = tokio::time::interval(BROKEN_POLL_INTERVAL);
    loop {
        ticks.tick().await;
        let models = catalog.served();
        if let Some(model) = models.iter().find(|model| model.replica.load().is_dead) {
            return model.name.clone();
        }
    }
}
