//! Generation for `dsctl`: the gateway's generation with the wire's request and replies.

use std::sync::Arc;

use dsd_proto::{
    code::Code,
    openai::limits,
    quic::ReplySender,
    wire::{
        admin::ErrorReply,
        generate::{Finish, GenerateDelta, GenerateDone, GenerateRequest, Input, Role, Sampling},
    },
};
use serde_json::json;
use tokio::task;

use super::{Admin, clamped, error_reply, millis};
use crate::{
    catalog::{Catalog, ServedModel},
    flow::{Account, CacheOwner, SamplingParams},
    gateway::{
        self, ApiError,
        generation::{
            self, ChoiceEnd, Generation, GenerationEvent, GenerationParams, PreparedPrompt,
        },
    },
    runtime::clock,
    text::{ChatOptions, OutputDelta, OutputForm, PromptForm},
};

pub(super) async fn run(
    admin: &Admin,
    request: GenerateRequest,
    deltas: &mut ReplySender<'_, GenerateDelta>,
) -> Result<GenerateDone, ErrorReply> {
    let arrived = clock::now();
    let params = params(&request, arrived + admin.config.request_timeout)?;
    let internal = || ErrorReply::new(Code::Internal, "the request could not be prepared");
    let permit = Arc::clone(&admin.encoders)
        .acquire_owned()
        .await
        .map_err(|_| internal())?;
    let catalog = Arc::clone(&admin.catalog);
    let prepared = task::spawn_blocking(move || {
        let prepared = prepare(&catalog, request);
        drop(permit);
        prepared
    });
    let (model, prompt) = prepared
        .await
        .map_err(|e| {
            tracing::error!(error = %e, "preparing a request broke off");
            internal()
        })?
        .map_err(|e| error_reply(&e))?;
    gateway::admission(&model, admin.config.token_age_max)
        .map_err(|e| error_reply(&ApiError::from(e)))?;
    let mut generation = Generation::start(&model, &[prompt], &params)
        .map_err(|e| error_reply(&ApiError::from(e)))?;
    let mut ttft_ms = None;
    let mut n_tokens_held = 0;
    let mut finish_reason = Finish::Stop;
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::Delta {
                deltas: pieces,
                n_tokens,
                ..
            } => {
                ttft_ms.get_or_insert_with(|| millis(clock::now().duration_since(arrived)));
                n_tokens_held += n_tokens;
                if !pieces.is_empty() {
                    deltas
                        .send(&delta(pieces, std::mem::take(&mut n_tokens_held)))
                        .await?;
                }
            }
            GenerationEvent::Finished { end, .. } => {
                finish_reason = match end {
                    ChoiceEnd::Stop | ChoiceEnd::StopString(_) | ChoiceEnd::ToolCalls => {
                        Finish::Stop
                    }
                    ChoiceEnd::Length => Finish::Length,
                    ChoiceEnd::DeadlinePassed
                    | ChoiceEnd::Stopped
                    | ChoiceEnd::Lost
                    | ChoiceEnd::Failed(_) => {
                        return Err(error_reply(&ApiError::of_end(&end)));
                    }
                };
            }
        }
    }
    let counts = generation.counts();
    let admitted_at = generation.admitted_at().unwrap_or_else(clock::now);
    let queue_ms = millis(admitted_at.duration_since(arrived));
    Ok(GenerateDone {
        finish_reason,
        n_prompt_tokens: clamped(counts.n_prompt),
        n_completion_tokens: clamped(counts.n_output),
        queue_ms,
        ttft_ms: ttft_ms.unwrap_or(queue_ms),
    })
}

fn delta(pieces: Vec<OutputDelta>, n_tokens: usize) -> GenerateDelta {
    let mut delta = GenerateDelta {
        content: String::new(),
        reasoning: String::new(),
        n_tokens: clamped(n_tokens),
    };
    for piece in pieces {
        match piece {
            OutputDelta::Content(text) => delta.content.push_str(&text),
            OutputDelta::Reasoning(text) => delta.reasoning.push_str(&text),
            // No tools were offered.
            OutputDelta::ToolCall(_) | OutputDelta::ToolArguments(_) => {}
        }
    }
    delta
}

/// Looks the model up and tokenises. Blocks for as long as a prompt takes.
fn prepare(
    catalog: &Catalog,
    request: GenerateRequest,
) -> Result<(Arc<ServedModel>, PreparedPrompt), ApiError> {
    let model = catalog.lookup(Some(request.model.as_str()).filter(|name| !name.is_empty()))?;
    let tokens_max = model.replica.limits().prompt_len_max();
    let prompt = match request.input {
        Input::Tokens(ids) => PreparedPrompt {
            ids,
            form: OutputForm::PLAIN,
            echo: None,
        },
        Input::Prompt(text) => {
            let ids = model
                .text
                .encode_prompt(&text, PromptForm::default(), tokens_max);
            let ids = ids.map_err(|e| ApiError::of_text(&e, "prompt"))?;
            PreparedPrompt {
                ids,
                form: OutputForm::PLAIN,
                echo: None,
            }
        }
        Input::Chat(messages) => {
            let mut values = Vec::with_capacity(messages.len());
            for message in messages {
                let role = match message.role {
                    Role::System => "system",
                    Role::User => "user",
                    Role::Assistant => "assistant",
                    Role::Tool => {
                        return Err(ApiError::new(
                            Code::Unsupported,
                            "results of tool calls are not supported",
                        ));
                    }
                };
                values.push(json!({"role": role, "content": message.content}));
            }
            if values.is_empty() {
                return Err(ApiError::new(
                    Code::InvalidRequest,
                    "the conversation has no message",
                ));
            }
            let options = ChatOptions {
                add_generation_prompt: true,
                thinking: request.thinking,
                tokens_max: Some(tokens_max),
                ..ChatOptions::default()
            };
            let prompt = model.text.render_chat(&values, &options);
            let prompt = prompt.map_err(|e| ApiError::of_text(&e, "messages"))?;
            PreparedPrompt {
                ids: prompt.ids,
                form: prompt.form,
                echo: None,
            }
        }
    };
    Ok((model, prompt))
}

fn params(
    request: &GenerateRequest,
    deadline: std::time::Instant,
) -> Result<GenerationParams, ErrorReply> {
    let bad = |message: String| Err(ErrorReply::new(Code::InvalidRequest, message));
    if request.max_tokens == Some(0) {
        return bad("`max_tokens` is 0, expected at least 1".to_owned());
    }
    if limits::STOP_STRINGS_MAX < request.stop.len() {
        return bad(format!(
            "{} stop strings, at most {} are allowed",
            request.stop.len(),
            limits::STOP_STRINGS_MAX
        ));
    }
    let is_bad = |text: &&String| text.is_empty() || limits::STOP_STRING_LEN_MAX < text.len();
    if let Some(text) = request.stop.iter().find(is_bad) {
        let max = limits::STOP_STRING_LEN_MAX;
        return bad(format!(
            "a stop string has {} bytes, expected 1 to {max}",
            text.len()
        ));
    }
    Ok(GenerationParams {
        n: 1,
        max_tokens: request.max_tokens.map(|max| max as usize),
        sampling: sampling(&request.sampling)?,
        stop: request.stop.clone(),
        stop_token_ids: Vec::new(),
        ignore_eos: false,
        grammar: None,
        top_logprobs: None,
        cache_owner: CacheOwner::default(),
        account: Account::default(),
        deadline: Some(deadline),
    })
}

/// The ranges and defaults of the HTTP API.
fn sampling(wire: &Sampling) -> Result<SamplingParams, ErrorReply> {
    let number = |name: &str, value: Option<f32>, min: f32, max: f32, default: f32| match value {
        None => Ok(default),
        // Not-a-number is in no range.
        Some(value) if (min..=max).contains(&value) => Ok(value),
        Some(value) => Err(ErrorReply::new(
            Code::InvalidRequest,
            format!("`{name}` is {value}, expected {min} to {max}"),
        )),
    };
    let repetition_penalty = number(
        "repetition_penalty",
        wire.repetition_penalty,
        0.0,
        10.0,
        1.0,
    )?;
    if repetition_penalty == 0.0 {
        return Err(ErrorReply::new(
            Code::InvalidRequest,
            "`repetition_penalty` is 0, expected above 0",
        ));
    }
    Ok(SamplingParams {
        temperature: number("temperature", wire.temperature, 0.0, 2.0, 1.0)?,
        top_p: number("top_p", wire.top_p, 0.0, 1.0, 1.0)?,
        top_k: wire.top_k.unwrap_or(0) as usize,
        min_p: number("min_p", wire.min_p, 0.0, 1.0, 0.0)?,
        repetition_penalty,
        frequency_penalty: number("frequency_penalty", wire.frequency_penalty, -2.0, 2.0, 0.0)?,
        presence_penalty: number("presence_penalty", wire.presence_penalty, -2.0, 2.0, 0.0)?,
        logit_bias: Vec::new(),
        seed: wire.seed.unwrap_or_else(generation::fresh_seed),
    })
}
