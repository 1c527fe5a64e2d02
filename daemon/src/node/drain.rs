//! The way down: new requests are refused and `/ready` is 503 while running requests finish, or end
//! with what they have at the drain limit; then connections close.
//!
//! Invariant: connections close after the replicas have stopped, so every stream gets its last
//! event.

use std::{sync::Arc, time::Duration};

use sd_notify::NotifyState;
use tokio::{task::JoinSet, time};
use tracing::{error, warn};

use super::{STOP_GRACE, notify};
use crate::{
    catalog::{Catalog, Entry},
    gateway::Stop,
};

/// Stops the replicas within `limit`, then the services.
pub(super) async fn drain(
    catalog: &Arc<Catalog>,
    stop: &Stop,
    services: &mut JoinSet<()>,
    limit: Duration,
) {
    notify(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    stop.draining.cancel();
    let mut replicas = JoinSet::new();
    for entry in catalog.entries().values() {
        // One that is being unloaded has requests, too.
        if let Entry::Served(model) | Entry::Unloading(model) = entry {
            let model = Arc::clone(model);
            replicas.spawn_blocking(move || model.replica.stop(limit));
        }
    }
    let stopped = async {
        while let Some(ended) = replicas.join_next().await {
            if let Err(e) = ended {
                error!(error = %e, "stopping a model broke off");
            }
        }
    };
    tokio::select! {
        stopped = time::timeout(limit + STOP_GRACE, stopped) => {
            if stopped.is_err() {
                warn!("a model did not stop within the drain time");
            }
        }
        // Whatever tokens come: the limit ends it.
        () = feed_watchdog() => {}
    }
    notify(&[NotifyState::Status("closing")]);
    stop.closing.cancel();
    // Each cuts off by itself what does not end; this is for one that would not.
    let closed = async { while services.join_next().await.is_some() {} };
    if time::timeout(2 * STOP_GRACE, closed).await.is_err() {
        warn!("connections did not close within their time");
    }
}

/// Runs for ever.
async fn feed_watchdog() {
    let Some(timeout) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    let mut ticks = time::interval(timeout / 3);
    loop {
        ticks.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}
