//! Which path leads where, and what every answer gets.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, Method, Response, Version, header, uri::Authority},
    middleware::{self, Next},
    routing::{MethodRouter, any, get, post},
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
    messages, openapi, prepare, responses, tokenize,
};
use crate::{catalog::ServedModel, runtime::clock};

/// Name of the header that tells requests apart in logs.
const REQUEST_ID: &str = "x-request-id";
/// How long a browser may go by the leave that it got.
const PREFLIGHT_AGE: Duration = Duration::from_secs(3600);
/// Longest request id taken over from a client.
const REQUEST_ID_LEN_MAX: usize = 128;

/// How a route is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    Post,
}

/// A route. One that stands here has its path, its label in metrics, its methods and its description.
#[derive(Clone, Copy)]
pub(super) struct Route {
    /// Its name in metrics and `/openapi.json`.
    pub(super) label: &'static str,
    pub(super) verb: Verb,
    /// Where it is found.
    paths: &'static [&'static str],
    /// Needs no key: load balancers and scrapers ask it; it tells nothing about users.
    pub(super) is_open: bool,
    /// What it is for.
    pub(super) about: &'static str,
    handler: fn() -> MethodRouter<Arc<Gateway>>,
}

const fn asked(
    label: &'static str,
    paths: &'static [&'static str],
    about: &'static str,
    handler: fn() -> MethodRouter<Arc<Gateway>>,
) -> Route {
    Route {
        label,
        verb: Verb::Post,
        paths,
        is_open: false,
        about,
        handler,
    }
}

const fn shown(
    label: &'static str,
    paths: &'static [&'static str],
    about: &'static str,
    handler: fn() -> MethodRouter<Arc<Gateway>>,
) -> Route {
    Route {
        verb: Verb::Get,
        ..asked(label, paths, about, handler)
    }
}

const fn open(route: Route) -> Route {
    Route {
        is_open: true,
        ..route
    }
}

/// All routes. `/beta` is where DeepSeek's clients ask for prefixes and holes.
pub(super) static ROUTES: [Route; 19] = [
    asked(
        "/v1/chat/completions",
        &[
            "/v1/chat/completions",
            "/chat/completions",
            "/beta/chat/completions",
        ],
        "Answers a conversation.",
        || post(chat::create),
    ),
    asked(
        "/v1/completions",
        &["/v1/completions", "/completions", "/beta/completions"],
        "Continues a text.",
        || post(completions::create),
    ),
    asked(
        "/v1/messages",
        &["/v1/messages", "/anthropic/v1/messages"],
        "Answers a conversation in Anthropic's manner.",
        || post(messages::create),
    ),
    asked(
        "/v1/messages/count_tokens",
        &[
            "/v1/messages/count_tokens",
            "/anthropic/v1/messages/count_tokens",
        ],
        "Counts the tokens of a conversation.",
        || post(messages::count_tokens),
    ),
    asked(
        "/v1/responses",
        &["/v1/responses", "/responses"],
        "Answers items; nothing is kept.",
        || post(responses::create),
    ),
    asked(
        "/v1/responses/input_tokens",
        &["/v1/responses/input_tokens", "/responses/input_tokens"],
        "Counts the tokens of items.",
        || post(responses::count_tokens),
    ),
    shown(
        "/v1/responses/{id}",
        &["/v1/responses/{*id}", "/responses/{*id}"],
        "Always 404: answers are not kept.",
        || any(responses::kept),
    ),
    asked(
        "/v1/embeddings",
        &["/v1/embeddings", "/embeddings"],
        "Always 400: no model here makes embeddings.",
        || post(about::no_embeddings),
    ),
    asked(
        "/tokenize",
        &["/tokenize"],
        "A text's or a chat's tokens.",
        || post(tokenize::tokenize),
    ),
    asked(
        "/detokenize",
        &["/detokenize"],
        "The text of tokens.",
        || post(tokenize::detokenize),
    ),
    shown(
        "/tokenizer_info",
        &["/tokenizer_info"],
        "A model's marks and chat template; `?model=NAME` where several are served.",
        || get(about::tokenizer),
    ),
    shown(
        "/user/balance",
        &["/user/balance"],
        "What is left of the cap on tokens.",
        || get(about::balance),
    ),
    shown(
        "/v1/models",
        &["/v1/models", "/models", "/beta/models"],
        "The served models.",
        || get(list_models),
    ),
    shown(
        "/v1/models/{name}",
        &["/v1/models/{*name}", "/models/{*name}"],
        "One of them.",
        || get(show_model),
    ),
    shown("/version", &["/version"], "The build.", || get(version)),
    open(shown(
        "/health",
        &["/health"],
        "The process is there.",
        || get(health),
    )),
    open(shown("/ready", &["/ready"], "Models answer.", || {
        get(ready)
    })),
    open(shown(
        "/metrics",
        &["/metrics"],
        "Prometheus' text form.",
        || get(show_metrics),
    )),
    open(shown(
        "/openapi.json",
        &["/openapi.json"],
        "This description.",
        || get(openapi::show),
    )),
];

pub(super) fn router(gateway: Arc<Gateway>) -> Router {
    let origins = gateway.config.cors_origins.clone();
    let mut router = Router::new();
    for route in &ROUTES {
        for path in route.paths {
            router = router.route(path, (route.handler)());
        }
    }
    let router = router
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
    let found = route_of(request.uri().path());
    let route = route_label(request.uri().path());
    let id = request_id(&request);
    let is_draining = gateway.stop.draining.is_cancelled();
    let entered = check_host(request.version(), request.headers()).and_then(|()| {
        if found.is_some_and(|route| route.is_open) {
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

/// The route of a path, whatever its method.
fn route_of(path: &str) -> Option<&'static Route> {
    let is = |pattern: &&str, exactly: bool| match pattern.split_once("{*") {
        None => exactly && path == *pattern,
        Some((start, _)) => {
            !exactly
                && path
                    .strip_prefix(start)
                    .is_some_and(|rest| !rest.is_empty())
        }
    };
    let find = |exactly| {
        let leads = |route: &&Route| route.paths.iter().any(|pattern| is(pattern, exactly));
        ROUTES.iter().find(leads)
    };
    find(true).or_else(|| find(false))
}

/// The route as a metric label: a closed set, whatever clients ask for.
fn route_label(path: &str) -> &'static str {
    route_of(path).map_or("other", |route| route.label)
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
    let allowed = match route_of(head.uri.path()).map(|route| route.verb) {
        Some(Verb::Post) => "POST",
        Some(Verb::Get) | None => "GET, HEAD",
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
