//! The HTTP edge: OpenAI routes, limits, streaming, health and metrics.
//!
//! Knows no weights, no steps and no cluster. A request is read and refused here; what is admitted
//! becomes a [`generation::Generation`], whose drop cancels it.
//!
//! Invariant: every answer that is no success has OpenAI's error shape and a code of the closed
//! list; nothing a client sends makes the node stop serving others.

pub mod generation;

mod auth;
mod body;
mod chat;
mod completions;
mod error;
mod health;
mod logprobs;
mod prepare;
mod refused_head;
mod routes;
mod serve;
mod sse;
mod write_timeout;

#[cfg(test)]
pub(crate) mod tests;

pub use error::ApiError;
pub use health::{NotReady, admission, model_readiness, readiness};

use std::{sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{catalog::Catalog, config::HttpConfig, telemetry::Metrics, tenants::Tenants};

/// Limits of the HTTP edge.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Bytes of a request body.
    pub body_len_max: usize,
    /// Connections at once; further ones wait to be accepted.
    pub connections_max: usize,
    /// For a request's head to arrive, and for a connection to stay idle.
    pub header_timeout: Duration,
    /// For a request's body to arrive.
    pub body_timeout: Duration,
    /// For a client to take what is sent.
    pub write_timeout: Duration,
    /// From the end of the body to the end of the answer.
    pub request_timeout: Duration,
    /// Silence after which a stream gets a comment.
    pub keep_alive: Duration,
    /// Prompts tokenised at once.
    pub encoders_max: usize,
    /// Age of the last token above which a model is not ready.
    pub token_age_max: Duration,
    /// On shutdown, for requests to finish.
    pub drain_timeout: Duration,
}

impl GatewayConfig {
    /// From the configuration file's section, and how long a stop may take.
    pub fn new(http: &HttpConfig, drain_timeout: Duration) -> Self {
        Self {
            body_len_max: http.body_bytes_max,
            connections_max: http.connections_max,
            header_timeout: Duration::from_secs(http.header_timeout_s),
            body_timeout: Duration::from_secs(http.body_timeout_s),
            write_timeout: Duration::from_secs(http.write_timeout_s),
            request_timeout: Duration::from_secs(http.request_timeout_s),
            keep_alive: Duration::from_secs(http.keep_alive_s),
            encoders_max: http.encoders_max,
            token_age_max: Duration::from_secs(http.token_age_max_s),
            drain_timeout,
        }
    }
}

/// The HTTP edge of a node.
#[derive(Debug)]
pub struct Gateway {
    config: GatewayConfig,
    tenants: Arc<Tenants>,
    catalog: Arc<Catalog>,
    metrics: Metrics,
    /// Places for parsing and tokenising, which take a core each.
    encoders: Arc<Semaphore>,
}

impl Gateway {
    /// An edge that serves the models of `catalog` to `tenants`.
    pub fn new(
        config: GatewayConfig,
        tenants: Arc<Tenants>,
        catalog: Arc<Catalog>,
        metrics: Metrics,
    ) -> Self {
        let encoders = Arc::new(Semaphore::new(config.encoders_max));
        Self {
            config,
            tenants,
            catalog,
            metrics,
            encoders,
        }
    }

    /// Serves HTTP on `listener` until `shutdown`, then lets requests finish within the drain time.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let limits = serve::ConnectionLimits {
            connections_max: self.config.connections_max,
            header_timeout: self.config.header_timeout,
            write_timeout: self.config.write_timeout,
            drain_timeout: self.config.drain_timeout,
        };
        serve::serve(listener, routes::router(Arc::new(self)), limits, shutdown).await;
    }
}
