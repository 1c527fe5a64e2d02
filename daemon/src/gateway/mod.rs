//! The HTTP edge: OpenAI routes, limits, streaming, health and metrics.
//!
//! Knows no weights, no steps and no cluster. A request is read and refused here; what is admitted
//! becomes a [`generation::Generation`], whose drop cancels it.
//!
//! Invariant: every answer that is no success has OpenAI's error shape and a code of the closed
//! list; nothing a client sends makes the node stop serving others.

pub mod generation;

mod about;
mod auth;
mod body;
mod body_budget;
mod chat;
mod completions;
mod error;
mod health;
mod logprobs;
mod messages;
mod openapi;
mod prepare;
mod refused_head;
mod responses;
mod routes;
mod serve;
mod sse;
mod stage;
mod tokenize;
mod write_timeout;

#[cfg(test)]
pub(crate) mod tests;

pub use error::ApiError;
pub use health::{NotReady, admission, model_readiness, readiness};

use std::{sync::Arc, time::Duration};

use axum::http::HeaderValue;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use self::{body_budget::BodyBudget, stage::StageLimits};
use crate::{catalog::Catalog, config::HttpConfig, telemetry::Metrics, tenants::Tenants};

/// Connections beyond `connections_max` that a node may hold for a moment.
pub const CONNECTIONS_EXTRA: usize = serve::HURRIED_MAX;

/// Limits of the HTTP edge.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Bytes of a request body.
    pub body_len_max: usize,
    /// Bytes of all request bodies in flight.
    pub body_budget_len: usize,
    /// Connections at once; further ones wait to be accepted.
    pub connections_max: usize,
    /// For a request's head to arrive once it has begun.
    pub header_timeout: Duration,
    /// For a connection to stay without a request.
    pub idle_timeout: Duration,
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
    /// Origins whose pages may ask.
    pub cors_origins: Vec<HeaderValue>,
    /// When the node closes, for clients to take what is left of their answers.
    pub flush_timeout: Duration,
}

/// How a node goes down, in two steps.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Running requests may finish, new ones are refused, `/ready` is 503.
    pub draining: CancellationToken,
    /// Nothing runs any more: answers are sent to their end and connections closed.
    pub closing: CancellationToken,
}

impl GatewayConfig {
    /// From the configuration file's section, and how long the end of a stop may take.
    pub fn new(http: &HttpConfig, flush_timeout: Duration) -> Self {
        Self {
            body_len_max: http.body_bytes_max,
            body_budget_len: http.body_budget_bytes,
            connections_max: http.connections_max,
            header_timeout: Duration::from_secs(http.header_timeout_s),
            idle_timeout: Duration::from_secs(http.idle_timeout_s),
            body_timeout: Duration::from_secs(http.body_timeout_s),
            write_timeout: Duration::from_secs(http.write_timeout_s),
            request_timeout: Duration::from_secs(http.request_timeout_s),
            keep_alive: Duration::from_secs(http.keep_alive_s),
            encoders_max: http.encoders_max,
            token_age_max: Duration::from_secs(http.token_age_max_s),
            // The configuration's check took no other.
            cors_origins: http
                .cors_origins
                .iter()
                .filter_map(|origin| HeaderValue::from_str(origin).ok())
                .collect(),
            flush_timeout,
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
    body_budget: BodyBudget,
    stop: Stop,
}

impl Gateway {
    /// An edge that serves the models of `catalog` to `tenants`.
    pub fn new(
        config: GatewayConfig,
        tenants: Arc<Tenants>,
        catalog: Arc<Catalog>,
        metrics: Metrics,
        stop: Stop,
    ) -> Self {
        let encoders = Arc::new(Semaphore::new(config.encoders_max));
        let body_budget = BodyBudget::new(config.body_budget_len);
        Self {
            config,
            tenants,
            catalog,
            metrics,
            encoders,
            body_budget,
            stop,
        }
    }

    /// Serves HTTP on `listener` until the node closes and all clients have their answers, or the
    /// flush time is over.
    pub async fn serve(self, listener: TcpListener) {
        let limits = serve::ConnectionLimits {
            connections_max: self.config.connections_max,
            stages: StageLimits {
                idle: self.config.idle_timeout,
                head: self.config.header_timeout,
            },
            write_timeout: self.config.write_timeout,
            flush_timeout: self.config.flush_timeout,
        };
        let closing = self.stop.closing.clone();
        serve::serve(listener, routes::router(Arc::new(self)), limits, closing).await;
    }
}
