//! Feeds systemd's watchdog as long as tokens come out, and finds engines that broke down.
//!
//! When no model answers any more the feeding stops, and systemd restarts the node: liveness is forward
//! progress, not a thread that still ticks. One stuck or damaged model beside others that answer is for
//! `/ready` to tell.

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
        let mut reasons = Vec::new();
        let mut n_alive = 0;
        for model in catalog.served() {
            // Ranks that are started again are looked after already.
            let is_forming = model.replica.load().is_forming;
            match gateway::model_readiness(&model, token_age_max) {
                Err(reason) if !is_forming => reasons.push(reason.to_string()),
                Ok(()) | Err(_) => n_alive += 1,
            }
        }
        // A restart would take the models that answer away as well.
        if 0 < n_alive || reasons.is_empty() {
            super::notify(&[NotifyState::Watchdog]);
        } else {
            warn!(reasons = reasons.join("; "), "watchdog not fed");
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
