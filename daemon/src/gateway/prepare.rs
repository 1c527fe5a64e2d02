//! From the bytes of a body to prompts and parameters. CPU work, done off the async threads.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Request, Response, header},
};
use dsd_proto::{
    code::Code,
    openai::{ChatCompletionRequest, CompletionRequest, GenerationOptions, Prompt, RequestError},
};
use tokio::{task, time};

use super::{
    Gateway,
    body::{self, BodyLimits},
    error::ApiError,
    generation::{self, ChoiceEnd, Generation, GenerationParams, PreparedPrompt},
    health,
};
use crate::{
    catalog::{Catalog, ServedModel},
    flow::{CacheOwner, SamplingParams},
    runtime::clock,
    text::{ChatOptions, ReasoningMode},
};

/// What a request brings besides its body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// When the answer must be over.
    deadline: Instant,
    /// With whom it may share cached prompts.
    cache_owner: CacheOwner,
}

/// A request that may be submitted.
pub(super) struct Prepared {
    pub(super) model: Arc<ServedModel>,
    pub(super) prompts: Vec<PreparedPrompt>,
    pub(super) params: GenerationParams,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

/// Reads a body and makes it ready for the engine with `prepare`. A failure is the answer to send.
pub(super) async fn read_and<T: Send + 'static>(
    gateway: &Gateway,
    request: Request<Body>,
    prepare: fn(&Catalog, &[u8], Terms) -> Result<T, ApiError>,
) -> Result<T, Response<Body>> {
    let (head, body) = request.into_parts();
    let is_readable =
        check_content_type(&head.headers).and_then(|()| check_content_encoding(&head.headers));
    if let Err(e) = is_readable {
        return Err(body::answer_then_drain(
            e.into_response(),
            &head.headers,
            body,
        ));
    }
    let config = &gateway.config;
    let limits = BodyLimits {
        len_max: config.body_len_max,
        timeout: config.body_timeout,
    };
    let received = body::read(
        &head.headers,
        body,
        limits,
        &gateway.body_budget,
        &gateway.stop.draining,
    )
    .await?;
    let terms = Terms {
        deadline: clock::now() + config.request_timeout,
        cache_owner: head
            .extensions
            .get::<CacheOwner>()
            .copied()
            .unwrap_or_default(),
    };
    let internal = |what: &str| ApiError::new(Code::Internal, what).into_response();
    let n_places = places(received.len(), config.body_len_max, config.encoders_max);
    let place = Arc::clone(&gateway.encoders).acquire_many_owned(n_places);
    let permit = match time::timeout(config.request_timeout, place).await {
        Ok(Ok(permit)) => permit,
        Ok(Err(_)) => return Err(internal("the node is stopping")),
        Err(_) => return Err(ApiError::of_end(&ChoiceEnd::DeadlinePassed).into_response()),
    };
    let catalog = Arc::clone(&gateway.catalog);
    // Ends by itself within the limits of a body, so it may outlive a client that goes away; its
    // place is free only then.
    let prepared = task::spawn_blocking(move || {
        let (bytes, share) = received.into_bytes();
        let prepared = prepare(&catalog, &bytes, terms);
        drop((bytes, share, permit));
        prepared
    });
    match prepared.await {
        Ok(prepared) => prepared.map_err(ApiError::into_response),
        Err(e) => {
            tracing::error!(error = %e, "preparing a request failed");
            Err(internal("the request could not be prepared"))
        }
    }
}

/// Places that a body takes among the encoders: its share of the longest body, so that all bodies
/// being prepared are together no longer than one may be. A chat is copied about eight times on its
/// way through the template; encoding in pieces adds little.
fn places(body_len: usize, body_len_max: usize, encoders_max: usize) -> u32 {
    let share = body_len
        .saturating_mul(encoders_max)
        .div_ceil(body_len_max.max(1));
    u32::try_from(share.clamp(1, encoders_max.max(1))).unwrap_or(1)
}

/// Hands what was prepared to the engine, if the model is fit to answer.
pub(super) fn start(gateway: &Gateway, prepared: &mut Prepared) -> Result<Generation, ApiError> {
    // Its body may have been on the way since before.
    if gateway.stop.draining.is_cancelled() {
        return Err(ApiError::shutting_down());
    }
    health::admission(&prepared.model, gateway.config.token_age_max)?;
    let prompts = std::mem::take(&mut prepared.prompts);
    Ok(Generation::start(
        &prepared.model,
        prompts,
        &prepared.params,
    )?)
}

/// A browser sends any other type across origins without asking first.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let mime = value
        .split(';')
        .next()
        .unwrap_or("")
        .trim()
        .to_ascii_lowercase();
    if mime == "application/json" || mime.ends_with("+json") {
        return Ok(());
    }
    let message = format!(
        "the content type is {:?}, expected \"application/json\"",
        value.chars().take(100).collect::<String>()
    );
    Err(ApiError::new(Code::UnsupportedMediaType, message))
}

/// A compressed body would grow without bound once unpacked.
fn check_content_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let is_plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    match headers.get(header::CONTENT_ENCODING) {
        Some(value) if !is_plain(value) => {
            let found = String::from_utf8_lossy(value.as_bytes());
            let message = format!(
                "the content encoding is {:?}, bodies are read uncompressed only",
                found.chars().take(100).collect::<String>()
            );
            Err(ApiError::new(Code::UnsupportedMediaType, message))
        }
        _ => Ok(()),
    }
}

/// A chat: template and tokeniser.
pub(super) fn chat(catalog: &Catalog, body: &[u8], terms: Terms) -> Result<Prepared, ApiError> {
    let request = ChatCompletionRequest::from_slice(body)?;
    let model = catalog.lookup(request.model.as_deref())?;
    let mut template_kwargs = request.template_args;
    if let Some(effort) = request.reasoning_effort {
        template_kwargs
            .entry("reasoning_effort")
            .or_insert_with(|| effort.as_str().into());
    }
    let messages: Vec<serde_json::Value> = request
        .messages
        .iter()
        .map(|message| message.to_value())
        .collect();
    let options = ChatOptions {
        add_generation_prompt: true,
        thinking: request.thinking,
        tools: None,
        template_kwargs,
        tokens_max: Some(model.replica.limits().prompt_len_max()),
    };
    let prompt = model
        .text
        .render_chat(&messages, &options)
        .map_err(|e| ApiError::of_text(&e, "messages"))?;
    let prompt = PreparedPrompt {
        ids: prompt.ids,
        reasoning: prompt.reasoning,
    };
    prepared(model, vec![prompt], request.options, terms)
}

/// A plain completion: tokeniser only.
pub(super) fn completion(
    catalog: &Catalog,
    body: &[u8],
    terms: Terms,
) -> Result<Prepared, ApiError> {
    let request = CompletionRequest::from_slice(body)?;
    let model = catalog.lookup(request.model.as_deref())?;
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for prompt in request.prompts {
        let ids = match prompt {
            Prompt::Tokens(ids) => ids,
            Prompt::Text(text) => model
                .text
                .encode_prompt(&text, model.replica.limits().prompt_len_max())
                .map_err(|e| ApiError::of_text(&e, "prompt"))?,
        };
        prompts.push(PreparedPrompt {
            ids,
            reasoning: ReasoningMode::Off,
        });
    }
    prepared(model, prompts, request.options, terms)
}

fn prepared(
    model: Arc<ServedModel>,
    prompts: Vec<PreparedPrompt>,
    options: GenerationOptions,
    terms: Terms,
) -> Result<Prepared, ApiError> {
    let vocab_len = model.replica.limits().vocab_len;
    let outside = |id: &u32| usize::try_from(*id).map_or(true, |id| vocab_len <= id);
    if let Some((id, _)) = options.logit_bias.iter().find(|(id, _)| outside(id)) {
        return Err(RequestError::OutOfRange {
            param: format!("logit_bias.{id}"),
            found: "a bias of an unknown token".to_owned(),
            expected: format!("token ids below {vocab_len}"),
        }
        .into());
    }
    let params = GenerationParams {
        n: options.n as usize,
        max_tokens: options.max_tokens,
        sampling: SamplingParams {
            temperature: options.temperature,
            top_p: options.top_p,
            top_k: options.top_k,
            min_p: options.min_p,
            repetition_penalty: options.repetition_penalty,
            frequency_penalty: options.frequency_penalty,
            presence_penalty: options.presence_penalty,
            logit_bias: options.logit_bias,
            seed: options.seed.unwrap_or_else(generation::fresh_seed),
        },
        stop: options.stop,
        stop_token_ids: options.stop_token_ids,
        ignore_eos: options.ignore_eos,
        top_logprobs: options.top_logprobs,
        cache_owner: terms.cache_owner,
        deadline: Some(terms.deadline),
    };
    Ok(Prepared {
        model,
        prompts,
        params,
        stream: options.stream,
        include_usage: options.include_usage,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_body_is_prepared_alone() {
        const LEN_MAX: usize = 4 << 20;
        let check = |len, expected| assert_eq!(places(len, LEN_MAX, 4), expected, "{len}");
        check(0, 1);
        check(LEN_MAX / 4, 1);
        check(LEN_MAX / 4 + 1, 2);
        check(LEN_MAX, 4);
        check(usize::MAX, 4);
        assert_eq!(places(LEN_MAX, LEN_MAX, 1), 1);
    }
}
