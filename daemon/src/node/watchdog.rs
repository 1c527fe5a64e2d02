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
        match progress(&catalog, token_age_max) {
            Ok(()) => super::notify(&[NotifyState::Watchdog]),
            Err(reasons) => warn!(reasons = reasons.join("; "), "watchdog not fed"),
        }
    }
}

/// Whether a restart would take away a model that answers; the error says why none does.
fn progress(catalog: &Catalog, token_age_max: Duration) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    for model in catalog.served() {
        // Ranks that are started again are looked after already.
        let is_forming = model.replica.load().is_forming;
        match gateway::model_readiness(&model, token_age_max) {
            Err(reason) if !is_forming => reasons.push(reason.to_string()),
            Ok(()) | Err(_) => return Ok(()),
        }
    }
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(reasons),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flow::{self, Request, RequestId, SamplingParams},
        gateway::tests::kit::{self, BOMB, QUICK},
    };

    const AGE_MAX: Duration = Duration::from_secs(3600);

    /// Breaks a model's engine and waits until that shows.
    fn break_down(catalog: &Catalog, name: &str) {
        let model = catalog.lookup(Some(name)).unwrap();
        let (sink, mut stream) = flow::token_stream(1);
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
        model.replica.submit(request).unwrap();
        // Ends when the engine's thread is gone.
        while stream.blocking_next().is_some() {}
        while !model.replica.load().is_dead {
            std::thread::yield_now();
        }
    }

    /// One broken model used to stop the watchdog, and systemd took the others away with it.
    #[test]
    fn a_node_is_fed_as_long_as_one_of_its_models_answers() {
        let catalog = Catalog::new(Box::new(|_, _, _| unreachable!("nothing is loaded")));
        assert_eq!(progress(&catalog, AGE_MAX), Ok(()), "nothing to serve");
        for name in ["a", "b"] {
            catalog.insert(kit::model(name, &QUICK));
        }
        assert_eq!(progress(&catalog, AGE_MAX), Ok(()));
        break_down(&catalog, "a");
        assert_eq!(progress(&catalog, AGE_MAX), Ok(()));
        break_down(&catalog, "b");
        let reasons = progress(&catalog, AGE_MAX).unwrap_err();
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        assert!(reasons[1].contains("`b`"), "{reasons:?}");
    }
}
