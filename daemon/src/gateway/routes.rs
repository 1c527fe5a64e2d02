//! Which path leads where, and what every answer gets.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, Method, Response, Version, header, uri::Authority},
    middleware::{self, Next},
    routing::{any, get, post},
};
use dsd_proto::{
    code::Code,
    openai::{Model, ModelList},
};
use serde::Serialize;
use tower_http::cors::{AllowHeaders, CorsLayer};

use super::{
    Gateway, about,
    auth::{self, Entered},
    body::{self, Announced},
    chat, completions,
    error::{self, ApiError, Dialect},
    generation,
    health::{self, NotReady},
    messages, prepare, responses, tokenize,
};
use crate::{catalog::ServedModel, runtime::clock};

/// Name of the header that tells requests apart in logs.
const REQUEST_ID: &str = "x-request-id";
/// How long a browser may go by the leave that it got.
const PREFLIGHT_AGE: Duration = Duration::from_secs(3600);
/// Longest request id taken over from a client.
const REQUEST_ID_LEN_MAX: usize = 128;

pub(super) fn router(gateway: Arc<Gateway>) -> Router {
    let origins = gateway.config.cors_origins.clone();
    let router = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/completions", post(completions::create))
        // DeepSeek's clients ask there for prefixes and holes.
        .route("/beta/chat/completions", post(chat::create))
        .route("/beta/completions", post(completions::create))
        .route("/beta/models", get(list_models))
        .route("/v1/messages", post(messages::create))
        .route("/anthropic/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route(
            "/anthropic/v1/messages/count_tokens",
            post(messages::count_tokens),
        )
        .route("/v1/responses", post(responses::create))
        .route("/responses", post(responses::create))
        .route("/v1/responses/input_tokens", post(responses::count_tokens))
        .route("/v1/responses/{*id}", any(responses::kept))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/version", get(version))
        .route("/tokenizer_info", get(about::tokenizer))
        .route("/user/balance", get(about::balance))
        .route("/v1/embeddings", post(about::no_embeddings))
        .route("/embeddings", post(about::no_embeddings))
        .route("/v1/models", get(list_models))
        .route("/models", get(list_models))
        .route("/v1/models/{*name}", get(show_model))
        .route("/models/{*name}", get(show_model))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(show_metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&gateway), around))
        .with_state(gateway);
    match origins.is_empty() {
        true => router,
        // Around everything: a browser asks for leave without the key.
        false => router.layer(cors(origins)),
    }
}

fn cors(origins: Vec<HeaderValue>) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::HEAD, Method::POST])
        // Clients name their versions in headers of their own; the key is checked all the same.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            header::RETRY_AFTER,
            HeaderName::from_static(REQUEST_ID),
            HeaderName::from_static(prepare::IGNORED),
            HeaderName::from_static(error::SHOULD_RETRY),
        ])
        .max_age(PREFLIGHT_AGE)
}

/// Around every request: whether it may be read at all, who calls, how long it takes, which id it
/// has.
async fn around(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let started = clock::now();
    let route = route_label(request.uri().path());
    let id = request_id(&request);
    let is_draining = gateway.stop.draining.is_cancelled();
    let entered = check_host(request.version(), request.headers()).and_then(|()| {
        if is_open(route) {
            return Ok(None);
        }
        let entered = auth::admit(&gateway.tenants, request.headers(), started)?;
        if is_draining {
            return Err(ApiError::shutting_down());
        }
        Ok(Some(entered))
    });
    let mut response = match entered {
        Ok(entered) => {
            if let Some(entered) = entered {
                request.extensions_mut().insert(entered);
            }
            next.run(request).await
        }
        Err(refusal) => {
            let (head, body) = request.into_parts();
            let refusal = refusal.into_response_in(Dialect::of_path(head.uri.path()));
            body::answer_then_drain(refusal, Announced::by(&head.headers), body)
        }
    };
    let status = response.status().as_u16();
    tracing::debug!(request = ?id, route, status, "answered");
    response.headers_mut().insert(REQUEST_ID, id);
    if is_draining {
        // The next request of this client goes to another node.
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    metrics::counter!("dsd_http_requests_total", "route" => route, "status" => status.to_string())
        .increment(1);
    metrics::histogram!("dsd_http_request_seconds", "route" => route)
        .record(clock::now().duration_since(started));
    response
}

/// The route as a metric label: a closed set, whatever clients ask for.
fn route_label(path: &str) -> &'static str {
    let path = path.strip_prefix("/anthropic").unwrap_or(path);
    let path = path.strip_prefix("/beta").unwrap_or(path);
    match path.strip_prefix("/v1").unwrap_or(path) {
        "/messages" => "/v1/messages",
        "/messages/count_tokens" => "/v1/messages/count_tokens",
        "/chat/completions" => "/v1/chat/completions",
        "/completions" => "/v1/completions",
        "/responses" => "/v1/responses",
        "/responses/input_tokens" => "/v1/responses/input_tokens",
        "/tokenize" => "/tokenize",
        "/detokenize" => "/detokenize",
        "/version" => "/version",
        "/tokenizer_info" => "/tokenizer_info",
        "/user/balance" => "/user/balance",
        "/embeddings" => "/v1/embeddings",
        "/models" => "/v1/models",
        "/health" => "/health",
        "/ready" => "/ready",
        "/metrics" => "/metrics",
        other if other.starts_with("/models/") => "/v1/models/{name}",
        _ => "other",
    }
}

/// Refuses what two readers on the way could take for requests to different hosts (RFC 9112, 3.2).
fn check_host(version: Version, headers: &HeaderMap) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let message = match (hosts.next(), hosts.next()) {
        (_, Some(_)) => "there is more than one Host field",
        (None, None) if version == Version::HTTP_11 => "the Host field is missing",
        (None, None) => return Ok(()),
        (Some(host), None) if host.is_empty() => return Ok(()),
        (Some(host), None) => match Authority::try_from(host.as_bytes()) {
            Ok(host) if !host.as_str().contains('@') => return Ok(()),
            _ => "the Host field is no host and port",
        },
    };
    Err(ApiError::new(Code::InvalidRequest, message))
}

/// Routes that load balancers and scrapers ask without a key; they tell nothing about users.
fn is_open(route: &str) -> bool {
    matches!(route, "/health" | "/ready" | "/metrics")
}

/// The client's id if it can be logged, else a fresh one.
fn request_id(request: &Request) -> HeaderValue {
    let usable = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_LEN_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    // A copy: a slice would keep the whole head as long as the request.
    let given = request.headers().get(REQUEST_ID).filter(usable);
    let given = given.and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok());
    given.unwrap_or_else(|| {
        HeaderValue::from_str(&answer_id("req")).unwrap_or_else(|_| HeaderValue::from_static("req"))
    })
}

/// A name for an answer that no other one has.
pub(super) fn answer_id(prefix: &str) -> String {
    format!(
        "{prefix}-{:016x}{:016x}",
        generation::fresh_seed(),
        generation::fresh_seed()
    )
}

/// The name of an answer's call in its conversation, both counted from 0: the same in every answer to
/// the same stream.
pub(super) fn call_id(prefix: &str, answer: &str, choice: usize, call: usize) -> String {
    let digest = blake3::hash(format!("{answer}/{choice}/{call}").as_bytes()).to_hex();
    format!("{prefix}_{call:02}_{}", &digest[..24])
}

/// A 200 answer.
pub(super) fn json(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut response = Response::new(Body::from(bytes));
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/json"),
            );
            response
        }
        Err(e) => {
            tracing::error!(error = %e, "an answer cannot be written as JSON");
            ApiError::new(Code::Internal, "the answer could not be written").into_response()
        }
    }
}

/// The model under a name or alias of it.
fn model(id: &str, served: &ServedModel) -> Model {
    Model {
        id: id.to_owned(),
        object: "model".to_owned(),
        created: served.created,
        owned_by: "dsd".to_owned(),
        max_model_len: served.context_len(),
    }
}

async fn list_models(
    State(gateway): State<Arc<Gateway>>,
    Extension(entered): Extension<Entered>,
) -> Response<Body> {
    let mut data = Vec::new();
    for served in auth::visible(&gateway.catalog, &entered.caller) {
        let aliases = gateway.catalog.aliases(&served.name);
        let names = std::iter::once(&served.name).chain(aliases);
        data.extend(names.map(|name| model(name, &served)));
    }
    json(&ModelList {
        object: "list".to_owned(),
        data,
    })
}

/// The rest of the path is the name: names of Hugging Face hold a slash.
async fn show_model(
    State(gateway): State<Arc<Gateway>>,
    Extension(entered): Extension<Entered>,
    name: Result<Path<String>, PathRejection>,
) -> Response<Body> {
    let Ok(Path(name)) = name else {
        return ApiError::new(Code::ModelNotFound, "the model's name is not valid UTF-8")
            .into_response();
    };
    match auth::lookup(&gateway.catalog, &entered.caller, Some(&name)) {
        Ok(served) => json(&model(&name, &served)),
        Err(e) => e.into_response(),
    }
}

/// The process is there and its network threads turn; says nothing about models.
async fn health() -> Response<Body> {
    json(&serde_json::json!({"status": "alive"}))
}

/// The build.
async fn version() -> Response<Body> {
    json(&serde_json::json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn ready(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    if gateway.stop.draining.is_cancelled() {
        return ApiError::from(NotReady::Draining).into_response();
    }
    match health::readiness(&gateway.catalog, gateway.config.token_age_max) {
        Ok(()) => json(&serde_json::json!({"status": "ready"})),
        Err(reason) => ApiError::from(reason).into_response(),
    }
}

async fn show_metrics(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    let mut response = Response::new(Body::from(gateway.metrics.render()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

async fn not_found(request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let message = format!(
        "there is no route {}",
        head.uri.path().chars().take(200).collect::<String>()
    );
    body::answer_then_drain(
        ApiError::new(Code::NotFound, message).into_response_in(Dialect::of_path(head.uri.path())),
        Announced::by(&head.headers),
        body,
    )
}

async fn method_not_allowed(request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let allowed = match route_label(head.uri.path()) {
        "/v1/chat/completions"
        | "/v1/completions"
        | "/v1/embeddings"
        | "/v1/responses"
        | "/v1/responses/input_tokens"
        | "/tokenize"
        | "/detokenize"
        | "/v1/messages"
        | "/v1/messages/count_tokens" => "POST",
        _ => "GET, HEAD",
    };
    let message = format!(
        "the route takes {allowed}, not {}",
        head.method.as_str().chars().take(20).collect::<String>()
    );
    let mut response = ApiError::new(Code::MethodNotAllowed, message)
        .into_response_in(Dialect::of_path(head.uri.path()));
    response
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(allowed));
    body::answer_then_drain(response, Announced::by(&head.headers), body)
}
