//! From the bytes of a body to prompts and parameters. CPU work, done off the async threads.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Request, Response, header},
};
use dsd_proto::{
    code::Code,
    openai::{
        self, AnswerShape, ChatCompletionRequest, CompletionRequest, GenerationOptions, Prompt,
        RequestError, ServiceTier, Tool, ToolChoice, limits,
    },
};
use tokio::{task, time};

use super::{
    Gateway,
    auth::{self, Entered},
    body::{self, Announced, BodyLimits},
    error::{ApiError, Dialect},
    generation::{self, ChoiceEnd, Generation, GenerationParams, PreparedPrompt},
    health,
};
use crate::{
    catalog::{Catalog, ServedModel},
    flow::{Class, SamplingParams},
    grammar::{self, Answer, Calls},
    replica::SubmitError,
    runtime::clock,
    tenants::{Caller, Refused},
    text::{ChatOptions, OutputForm, PromptForm},
};

/// Header with the seconds that the client waits for the whole answer.
const DEADLINE: &str = "x-request-deadline-s";

/// What a request brings besides its body.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    /// Who makes it, and since when.
    entered: Entered,
    /// When the answer must be over, whatever the client says.
    deadline: Instant,
    /// Seconds from arrival that the client waits, as its header says.
    patience_s: Option<f64>,
}

impl Terms {
    /// Who asks.
    pub(super) fn caller(&self) -> &Caller {
        &self.entered.caller
    }

    /// When the answer must be over, now that the body is known; its field counts before the header.
    fn deadline(&self, options: &GenerationOptions) -> Result<Instant, ApiError> {
        let patience = options.deadline_s.or(self.patience_s);
        // What is too long for a clock is longer than the node's own limit.
        let asked = patience
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .and_then(|patience| self.entered.arrived.checked_add(patience));
        let deadline = asked.map_or(self.deadline, |asked| asked.min(self.deadline));
        if deadline <= clock::now() {
            return Err(ApiError::of_end(&ChoiceEnd::DeadlinePassed));
        }
        Ok(deadline)
    }
}

/// A request that may be submitted.
pub(super) struct Prepared {
    pub(super) caller: Caller,
    pub(super) model: Arc<ServedModel>,
    /// The name or alias that the request used; answers repeat it, as DeepSeek's do.
    pub(super) model_name: String,
    pub(super) prompts: Vec<PreparedPrompt>,
    pub(super) params: GenerationParams,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Members of the body that nothing reads.
    pub(super) ignored: Vec<String>,
}

/// A plain completion that may be submitted.
pub(super) struct PreparedCompletion {
    pub(super) prepared: Prepared,
    /// Choices of each prompt that are the answer: the likeliest of those that are made.
    pub(super) n_returned: usize,
    /// The answer has log-probabilities.
    pub(super) wants_logprobs: bool,
    /// Each choice begins with its prompt.
    pub(super) echo: bool,
}

/// Header with the names of members of the body that are ignored.
pub(super) const IGNORED: &str = "x-dsd-ignored-fields";

/// Says which members of the body were ignored, so that nobody looks for their effect.
pub(super) fn name_ignored(response: &mut Response<Body>, names: &[String]) {
    let is_plain = |name: &&String| {
        name.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
    };
    let names: Vec<&str> = names.iter().filter(is_plain).map(String::as_str).collect();
    if !names.is_empty()
        && let Ok(value) = HeaderValue::from_str(&names.join(", "))
    {
        response.headers_mut().insert(IGNORED, value);
    }
}

/// Reads a body and makes it ready for the engine with `prepare`. A failure is the answer to send.
pub(super) async fn read_and<T: Send + 'static>(
    gateway: &Gateway,
    request: Request<Body>,
    prepare: fn(&Catalog, &[u8], Terms) -> Result<T, ApiError>,
) -> Result<T, Response<Body>> {
    let (head, body) = request.into_parts();
    let dialect = Dialect::of_path(head.uri.path());
    let internal = |what: &str| ApiError::new(Code::Internal, what).into_response_in(dialect);
    let Some(entered) = head.extensions.get::<Entered>().cloned() else {
        tracing::error!("a request was let in by nobody");
        return Err(internal("the request could not be prepared"));
    };
    let check = || {
        check_content_type(&head.headers)?;
        check_content_encoding(&head.headers)?;
        // Before the body is in memory.
        entered.caller.check(clock::now()).map_err(auth::over_cap)?;
        patience_s(&head.headers)
    };
    let announced = Announced::by(&head.headers);
    let patience_s = match check() {
        Ok(patience_s) => patience_s,
        Err(e) => {
            return Err(body::answer_then_drain(
                e.into_response_in(dialect),
                announced,
                body,
            ));
        }
    };
    let config = &gateway.config;
    let limits = BodyLimits {
        len_max: config.body_len_max,
        timeout: config.body_timeout,
    };
    // Its fields are slices of the buffer that it was read into.
    drop(head);
    let received = body::read(
        announced,
        body,
        limits,
        &gateway.body_budget,
        &gateway.stop.draining,
        dialect,
    )
    .await?;
    let terms = Terms {
        entered,
        deadline: clock::now() + config.request_timeout,
        patience_s,
    };
    let n_places = places(received.len(), config.body_len_max, config.encoders_max);
    let place = Arc::clone(&gateway.encoders).acquire_many_owned(n_places);
    let permit = match time::timeout(config.request_timeout, place).await {
        Ok(Ok(permit)) => permit,
        Ok(Err(_)) => return Err(internal("the node is stopping")),
        Err(_) => {
            return Err(ApiError::of_end(&ChoiceEnd::DeadlinePassed).into_response_in(dialect));
        }
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
        Ok(prepared) => prepared.map_err(|e| e.into_response_in(dialect)),
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
    let n_choices = prompts.len().saturating_mul(prepared.params.n);
    let n_prompt: usize = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let caller = &prepared.caller;
    let lease = caller
        .take(
            u32::try_from(n_choices).unwrap_or(u32::MAX),
            n_prompt as u64,
            prepared.params.max_tokens.map(|max| max as u64),
            clock::now(),
        )
        .map_err(auth::over_cap)?;
    match Generation::start(&prepared.model, &prompts, &prepared.params) {
        Ok(generation) => Ok(generation.with_lease(lease)),
        Err(e) => {
            lease.void();
            if matches!(e, SubmitError::Refused(_)) {
                caller.refused(Refused::Busy);
            }
            Err(e.into())
        }
    }
}

/// How long the client waits, as its header says.
fn patience_s(headers: &HeaderMap) -> Result<Option<f64>, ApiError> {
    let mut values = headers.get_all(DEADLINE).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let bad = |problem: &str| {
        let message = format!("the header `{DEADLINE}` {problem}");
        Err(ApiError::new(Code::InvalidRequest, message).with_param(DEADLINE))
    };
    if values.next().is_some() {
        return bad("is given twice");
    }
    match value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok())
    {
        Some(seconds) => Ok(Some(openai::positive_seconds(DEADLINE, seconds)?)),
        None => bad("is no number of seconds"),
    }
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
    of_chat(catalog, request, openai::unknown_fields(body), terms)
}

/// What a chat asks for, from whatever words it was put in.
pub(super) fn of_chat(
    catalog: &Catalog,
    request: ChatCompletionRequest,
    ignored: Vec<String>,
    terms: Terms,
) -> Result<Prepared, ApiError> {
    let deadline = terms.deadline(&request.options)?;
    let caller = terms.entered.caller;
    let model = auth::lookup(catalog, &caller, request.model.as_deref())?;
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
    let offers_tools = !request.tools.is_empty() && request.tool_choice != ToolChoice::None;
    let sources = request.tools.iter().map(|tool| tool.source.clone());
    let options = ChatOptions {
        add_generation_prompt: true,
        thinking: request.thinking.or_else(|| {
            let thinks = request
                .model
                .as_deref()
                .is_some_and(|name| catalog.thinks(name));
            thinks.then_some(true)
        }),
        tools: offers_tools.then(|| sources.collect()),
        describe_tools: true,
        schema: match &request.options.shape {
            Some((_, AnswerShape::Json(schema))) => Some(schema.clone()),
            _ => None,
        },
        continues: request.continues,
        template_kwargs,
        tokens_max: Some(model.replica.limits().prompt_len_max()),
    };
    let prompt = model
        .text
        .render_chat(&messages, &options)
        .map_err(|e| ApiError::of_text(&e, "messages"))?;
    // Who names a function wants it called, once.
    let is_named = matches!(request.tool_choice, ToolChoice::Named(_));
    let tool_calls_max = match request.parallel_tool_calls && !is_named {
        true => usize::MAX,
        false => 1,
    };
    let any_object = serde_json::Map::new();
    let calls = prompt.form.tools.and_then(|markup| {
        let any_is_strict = request.tools.iter().any(|tool| tool.strict);
        let is_wanted = |tool: &&Tool| match &request.tool_choice {
            ToolChoice::None => false,
            // Beside an answer of a given shape they need a form, too; and those that are not strict
            // beside those that are.
            ToolChoice::Auto => request.options.shape.is_some() || any_is_strict,
            ToolChoice::Required => true,
            ToolChoice::Named(name) => tool.name == *name,
        };
        let wanted = request.tools.iter().filter(is_wanted);
        let is_free = request.tool_choice == ToolChoice::Auto && request.options.shape.is_none();
        // The model decides, and only what is strict has to follow its schema.
        let functions: Vec<_> = wanted
            .map(|tool| match is_free && !tool.strict {
                true => (&*tool.name, &any_object),
                false => (&*tool.name, &tool.parameters),
            })
            .collect();
        (!functions.is_empty()).then_some(Calls {
            markup,
            functions,
            max: tool_calls_max,
            are_free: is_free,
        })
    });
    let must_call = matches!(
        request.tool_choice,
        ToolChoice::Required | ToolChoice::Named(_)
    );
    let grammar = grammar(
        &model,
        &prompt.form,
        &request.options,
        calls.as_ref(),
        must_call,
    )?;
    let prompt = PreparedPrompt {
        ids: prompt.ids,
        form: OutputForm {
            tool_calls_max,
            ..prompt.form
        },
        echo: None,
    };
    let asked = Asked {
        caller,
        model,
        model_name: request.model,
        prompts: vec![prompt],
        grammar,
        deadline,
        ignored,
    };
    prepared(asked, request.options)
}

/// A plain completion: tokeniser only.
pub(super) fn completion(
    catalog: &Catalog,
    body: &[u8],
    terms: Terms,
) -> Result<PreparedCompletion, ApiError> {
    let request = CompletionRequest::from_slice(body)?;
    let deadline = terms.deadline(&request.options)?;
    let caller = terms.entered.caller;
    let model = auth::lookup(catalog, &caller, request.model.as_deref())?;
    let mut prompts = Vec::with_capacity(request.prompts.len());
    let form = PromptForm {
        add_special: request.add_special_tokens,
        parse_special: request.parse_special,
    };
    for prompt in request.prompts {
        let tokens_max = model.replica.limits().prompt_len_max();
        let encoded = match (&prompt, &request.suffix) {
            (Prompt::Tokens(ids), _) => Ok(ids.clone()),
            (Prompt::Text(text), None) => model.text.encode_prompt(text, form, tokens_max),
            (Prompt::Text(text), Some(suffix)) => {
                let encoded = model.text.encode_hole(text, suffix, tokens_max);
                encoded.ok_or_else(|| RequestError::Unsupported {
                    param: "suffix".to_owned(),
                    what: format!(
                        "filling a hole by `{}`, whose vocabulary has no tokens for it,",
                        model.name
                    ),
                })?
            }
        };
        let ids = encoded.map_err(|e| ApiError::of_text(&e, "prompt"))?;
        let echo = request.echo.then(|| match prompt {
            Prompt::Text(text) => text,
            Prompt::Tokens(_) => model.text.decode(&ids, false),
        });
        prompts.push(PreparedPrompt {
            ids,
            form: OutputForm::PLAIN,
            echo,
        });
    }
    let (n_returned, best_of) = (request.options.n as usize, request.best_of as usize);
    let top_logprobs = request.options.top_logprobs;
    if let Some(n_top) = top_logprobs.filter(|_| request.echo) {
        check_echoed(&prompts, n_returned, n_top)?;
    }
    let grammar = grammar(&model, &OutputForm::PLAIN, &request.options, None, false)?;
    let asked = Asked {
        caller,
        model,
        model_name: request.model,
        prompts,
        grammar,
        deadline,
        ignored: openai::unknown_fields(body),
    };
    let mut prepared = prepared(asked, request.options)?;
    prepared.params.n = best_of;
    if n_returned < best_of {
        // The likeliest are found by them.
        prepared.params.top_logprobs = Some(top_logprobs.unwrap_or(0));
    }
    Ok(PreparedCompletion {
        prepared,
        n_returned,
        wants_logprobs: top_logprobs.is_some(),
        echo: request.echo,
    })
}

/// Refuses an answer with more log-probabilities of prompts than anybody should hold at once.
fn check_echoed(prompts: &[PreparedPrompt], n: usize, n_top: usize) -> Result<(), ApiError> {
    let n_tokens: usize = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let n_all = n_tokens.saturating_mul(n).saturating_mul(1 + n_top);
    if limits::ECHOED_LOGPROBS_MAX < n_all {
        return Err(RequestError::OutOfRange {
            param: "logprobs".to_owned(),
            found: format!("{n_all} log-probabilities of echoed prompts"),
            expected: format!(
                "at most {}; send fewer prompts at once, or ask for fewer of the likeliest tokens",
                limits::ECHOED_LOGPROBS_MAX
            ),
        }
        .into());
    }
    Ok(())
}

/// What a request's answer has to follow, looked at before an engine gets it.
fn grammar(
    model: &ServedModel,
    form: &OutputForm,
    options: &GenerationOptions,
    calls: Option<&Calls<'_>>,
    must_call: bool,
) -> Result<Option<Arc<str>>, ApiError> {
    let answer = options.shape.as_ref().map(|(_, shape)| match shape {
        AnswerShape::Json(schema) => Answer::Json(schema.clone()),
        AnswerShape::Regex(regex) => Answer::Regex(regex.clone()),
        AnswerShape::Choice(texts) => Answer::Choice(texts.clone()),
        AnswerShape::Grammar(grammar) => Answer::Lark(grammar.clone()),
    });
    if answer.is_none() && calls.is_none() {
        return Ok(None);
    }
    if calls.is_some() && options.ignore_eos {
        return Err(RequestError::Conflict {
            param: "ignore_eos".to_owned(),
            problem:
                "does not go with calls that follow a schema, which end where they are complete"
                    .to_owned(),
        }
        .into());
    }
    let answer = answer.filter(|_| !must_call);
    let grammar = grammar::write(&model.text, form.reasoning, answer.as_ref(), calls);
    let param = match &options.shape {
        Some((param, _)) if !must_call => param,
        _ => "tools",
    };
    model.grammars.check(&model.text, &grammar).map_err(|e| {
        let message = format!("`{param}` cannot be followed: {e}");
        ApiError::new(Code::InvalidRequest, message).with_param(param)
    })?;
    Ok(Some(grammar.into()))
}

/// What was found in a body.
struct Asked {
    caller: Caller,
    model: Arc<ServedModel>,
    model_name: Option<String>,
    prompts: Vec<PreparedPrompt>,
    grammar: Option<Arc<str>>,
    deadline: Instant,
    ignored: Vec<String>,
}

fn prepared(asked: Asked, options: GenerationOptions) -> Result<Prepared, ApiError> {
    let Asked {
        caller,
        model,
        model_name,
        prompts,
        grammar,
        deadline,
        ignored,
    } = asked;
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
    let user = options.user_id.as_deref().or(options.user.as_deref());
    let is_batch = options.service_tier == ServiceTier::Flex || model.class == Class::Batch;
    let account = caller.account(user, is_batch);
    let spelt = options
        .stop
        .iter()
        .filter_map(|stop| model.text.added_id(stop));
    let mut stop_token_ids = options.stop_token_ids;
    stop_token_ids.extend(spelt);
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
        stop_token_ids,
        ignore_eos: options.ignore_eos,
        grammar,
        top_logprobs: options.top_logprobs,
        cache_owner: caller.cache_owner(options.user_id.as_deref()),
        account,
        deadline: Some(deadline),
    };
    Ok(Prepared {
        model_name: model_name.unwrap_or_else(|| model.name.clone()),
        caller,
        model,
        prompts,
        params,
        stream: options.stream,
        include_usage: options.include_usage,
        ignored,
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
