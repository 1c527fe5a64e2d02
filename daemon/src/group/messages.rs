//! Between what flows inside a process and what crosses to another.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dsd_proto::wire::group::{
    EngineLimits as WireLimits, GroupEventKind, GroupLoad, GroupScore, GroupScores, GroupStart,
    GroupSubmit, GroupToken, TokenSampling, TokenValue,
};

use crate::{
    engine::{EngineLimits, EngineLoad},
    flow::{
        Account, CacheOwner, Class, FinishReason, Request, RequestId, SamplingParams, Siblings,
        StreamItem, TokenEvent, TokenLogprobs, TokenSink,
    },
    runtime::clock,
};

fn values(pairs: &[(u32, f32)]) -> Vec<TokenValue> {
    let value = |(token, value): &(u32, f32)| TokenValue {
        token: *token,
        value: *value,
    };
    pairs.iter().map(value).collect()
}

fn pairs(values: Vec<TokenValue>) -> Vec<(u32, f32)> {
    values.into_iter().map(|v| (v.token, v.value)).collect()
}

/// What a request is, without its reader: enough to ask again.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) id: u64,
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: usize,
    pub(super) stop_tokens: Arc<[u32]>,
    pub(super) sampling: SamplingParams,
    pub(super) grammar: Option<Arc<str>>,
    pub(super) top_logprobs: Option<usize>,
    /// Moves along with the scores that came.
    pub(super) scored_from: Option<usize>,
    pub(super) deadline: Option<Instant>,
    pub(super) cache_owner: CacheOwner,
    pub(super) account: Account,
    pub(super) siblings: Siblings,
}

impl Asked {
    /// The message that asks for what follows `output`.
    pub(super) fn submit(&self, output: &[u32], now: Instant) -> GroupSubmit {
        let params = &self.sampling;
        let left = |deadline: Instant| deadline.saturating_duration_since(now);
        GroupSubmit {
            id: self.id,
            prompt: self.prompt.clone(),
            output: output.to_vec(),
            n_output_max: self.max_tokens as u64,
            stop_tokens: self.stop_tokens.to_vec(),
            sampling: TokenSampling {
                temperature: params.temperature,
                top_p: params.top_p,
                top_k: params.top_k as u64,
                min_p: params.min_p,
                repetition_penalty: params.repetition_penalty,
                frequency_penalty: params.frequency_penalty,
                presence_penalty: params.presence_penalty,
                logit_bias: values(&params.logit_bias),
                seed: params.seed,
            },
            grammar: self.grammar.as_deref().map(str::to_owned),
            top_logprobs: self.top_logprobs.map(|n| n as u32),
            scored_from: self.scored_from.map(|n| n as u64),
            deadline_ms: self.deadline.map(|d| left(d).as_millis() as u64),
            cache_owner: self.cache_owner.0.to_vec(),
            tenant: self.account.tenant,
            user: self.account.user,
            weight: self.account.weight,
            is_batch: self.account.class == Class::Batch,
            siblings_request: self.siblings.request,
            n_siblings: self.siblings.n,
        }
    }
}

/// The request that a message asks for; its events go to `sink`.
pub(super) fn request(message: GroupSubmit, now: Instant, sink: TokenSink) -> Request {
    let sampling = message.sampling;
    let mut cache_owner = CacheOwner::default();
    let n = message.cache_owner.len().min(cache_owner.0.len());
    cache_owner.0[..n].copy_from_slice(&message.cache_owner[..n]);
    Request {
        id: RequestId(message.id),
        prompt: message.prompt,
        output: message.output,
        max_tokens: usize::try_from(message.n_output_max).unwrap_or(usize::MAX),
        stop_tokens: message.stop_tokens.into(),
        sampling: SamplingParams {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: usize::try_from(sampling.top_k).unwrap_or(usize::MAX),
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            logit_bias: pairs(sampling.logit_bias),
            seed: sampling.seed,
        },
        grammar: message.grammar.map(Into::into),
        top_logprobs: message.top_logprobs.map(|n| n as usize),
        scored_from: message
            .scored_from
            .map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        deadline: message
            .deadline_ms
            .and_then(|ms| now.checked_add(Duration::from_millis(ms))),
        cache_owner,
        account: Account {
            tenant: message.tenant,
            user: message.user,
            weight: message.weight.max(1),
            class: match message.is_batch {
                true => Class::Batch,
                false => Class::Interactive,
            },
        },
        siblings: Siblings {
            request: message.siblings_request,
            n: message.n_siblings,
        },
        sink,
    }
}

/// An event on its way to the agent.
pub(super) fn event_of(item: StreamItem) -> GroupEventKind {
    match item {
        StreamItem::Started { n_cached, at } => GroupEventKind::Started(GroupStart {
            n_cached: n_cached as u64,
            age_us: clock::now().saturating_duration_since(at).as_micros() as u64,
        }),
        StreamItem::Prefilled { n_computed } => GroupEventKind::Prefilled(n_computed as u64),
        StreamItem::Scored { first, scores } => GroupEventKind::Scored(GroupScores {
            first: first as u64,
            scores: scores
                .into_iter()
                .map(|score| GroupScore {
                    logprob: score.chosen,
                    top: values(&score.top),
                })
                .collect(),
        }),
        StreamItem::Token(event) => {
            let (logprob, top) = match event.logprobs {
                Some(logprobs) => (Some(logprobs.chosen), values(&logprobs.top)),
                None => (None, Vec::new()),
            };
            GroupEventKind::Token(GroupToken {
                index: event.index as u64,
                token: event.token,
                logprob,
                top,
            })
        }
        StreamItem::Finished(FinishReason::Stop) => GroupEventKind::Stop,
        StreamItem::Finished(FinishReason::Length) => GroupEventKind::Length,
        StreamItem::Finished(FinishReason::DeadlinePassed) => GroupEventKind::DeadlinePassed,
        StreamItem::Finished(FinishReason::Stopped | FinishReason::InsufficientResources) => {
            GroupEventKind::Stopped
        }
        StreamItem::Finished(FinishReason::Failed(cause)) => GroupEventKind::Failed(cause),
    }
}

/// The event as the request's sink gets it; `None` when the engine did not take the request.
pub(super) fn item_of(event: GroupEventKind) -> Option<StreamItem> {
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    Some(match event {
        GroupEventKind::NoRoom => return None,
        GroupEventKind::Started(start) => {
            let now = clock::now();
            StreamItem::Started {
                n_cached: size(start.n_cached),
                at: now
                    .checked_sub(Duration::from_micros(start.age_us))
                    .unwrap_or(now),
            }
        }
        GroupEventKind::Prefilled(n_computed) => StreamItem::Prefilled {
            n_computed: size(n_computed),
        },
        GroupEventKind::Scored(scored) => StreamItem::Scored {
            first: size(scored.first),
            scores: scored
                .scores
                .into_iter()
                .map(|score| TokenLogprobs {
                    chosen: score.logprob,
                    top: pairs(score.top),
                })
                .collect(),
        },
        GroupEventKind::Token(token) => {
            let top = pairs(token.top);
            StreamItem::Token(TokenEvent {
                index: size(token.index),
                token: token.token,
                logprobs: token.logprob.map(|chosen| TokenLogprobs { chosen, top }),
            })
        }
        GroupEventKind::Stop => StreamItem::Finished(FinishReason::Stop),
        GroupEventKind::Length => StreamItem::Finished(FinishReason::Length),
        GroupEventKind::DeadlinePassed => StreamItem::Finished(FinishReason::DeadlinePassed),
        GroupEventKind::Stopped => StreamItem::Finished(FinishReason::Stopped),
        GroupEventKind::Failed(cause) => StreamItem::Finished(FinishReason::Failed(cause)),
    })
}

pub(super) fn load_message(load: &EngineLoad) -> GroupLoad {
    GroupLoad {
        n_running: load.n_running as u64,
        n_waiting: load.n_waiting as u64,
        n_blocks_used: load.n_blocks_used as u64,
        n_blocks: load.n_blocks as u64,
        n_steps: load.n_steps,
        n_prompt_tokens: load.n_prompt_tokens,
        n_output_tokens: load.n_output_tokens,
        n_preemptions: load.n_preemptions,
        last_token_age_us: load.last_token_age.map(|age| age.as_micros() as u64),
        canary_wrong: load.canary_wrong,
    }
}

pub(super) fn limits_message(limits: &EngineLimits, canary_token: u32) -> WireLimits {
    WireLimits {
        context_len_max: limits.context_len_max as u64,
        vocab_len: limits.vocab_len as u64,
        sampleable_len: limits.sampleable_len as u64,
        waiting_max: limits.waiting_max as u64,
        running_max: limits.running_max as u64,
        n_blocks: limits.n_blocks as u64,
        block_len: limits.block_len as u64,
        canary_token,
    }
}

pub(super) fn limits_of(limits: &WireLimits) -> EngineLimits {
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    EngineLimits {
        context_len_max: size(limits.context_len_max),
        vocab_len: size(limits.vocab_len),
        sampleable_len: size(limits.sampleable_len),
        waiting_max: size(limits.waiting_max),
        running_max: size(limits.running_max),
        n_blocks: size(limits.n_blocks),
        block_len: size(limits.block_len),
    }
}
