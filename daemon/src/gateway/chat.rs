//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::Response,
};
use dsd_proto::openai::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprobs, ChatReply,
    FinishReason, FunctionDelta, FunctionReply, ToolCallDelta, ToolCallReply, Usage,
};

use super::{
    Gateway,
    error::{ApiError, Dialect},
    generation::{ChoiceEnd, Generation, GenerationEvent, TokenCounts},
    logprobs, prepare, routes,
    sse::{self, ChunkEncoder, Chunks, GenerationDelta},
};
use crate::{catalog::ServedModel, runtime::clock, text::OutputDelta};

pub(super) async fn create(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Response<Body> {
    let mut prepared = match prepare::read_and(&gateway, request, prepare::chat).await {
        Ok(prepared) => prepared,
        Err(refusal) => return refusal,
    };
    let wants_logprobs = prepared.params.top_logprobs.is_some();
    let generation = match prepare::start(&gateway, &mut prepared) {
        Ok(generation) => generation,
        Err(e) => {
            return e.with_prompt_param("messages").into_response();
        }
    };
    let head = Head::new(prepared.model, prepared.model_name, wants_logprobs);
    if prepared.stream {
        let started = vec![false; generation.n_choices()];
        let n_calls = vec![0; generation.n_choices()];
        let encoder = Encoder {
            head,
            include_usage: prepared.include_usage,
            started,
            n_calls,
        };
        let mut response = sse::response(generation, encoder, gateway.config.keep_alive);
        prepare::name_ignored(&mut response, &prepared.ignored);
        return response;
    }
    let answer = async move { whole(generation, &head).await };
    let mut response = sse::whole(answer, Dialect::OpenAi, gateway.config.keep_alive).await;
    prepare::name_ignored(&mut response, &prepared.ignored);
    response
}

/// What all chunks of an answer share.
struct Head {
    id: String,
    created: u64,
    model: Arc<ServedModel>,
    model_name: String,
    wants_logprobs: bool,
}

impl Head {
    fn new(model: Arc<ServedModel>, model_name: String, wants_logprobs: bool) -> Self {
        Self {
            id: routes::answer_id("chatcmpl"),
            created: clock::unix_seconds(),
            model,
            model_name,
            wants_logprobs,
        }
    }

    /// Of a choice's call, from 0: the same in every answer to the same stream.
    fn call_id(&self, choice: usize, call: usize) -> String {
        routes::call_id("call", &self.id, choice, call)
    }
}

/// Collects a generation into one answer.
async fn whole(mut generation: Generation, head: &Head) -> Result<ChatCompletion, ApiError> {
    struct Partial {
        content: String,
        reasoning: Option<String>,
        calls: Vec<ToolCallReply>,
        logprobs: ChatLogprobs,
        finish_reason: FinishReason,
    }
    let new = || Partial {
        content: String::new(),
        reasoning: None,
        calls: Vec::new(),
        logprobs: ChatLogprobs::default(),
        finish_reason: FinishReason::Stop,
    };
    let mut partials: Vec<Partial> = (0..generation.n_choices()).map(|_| new()).collect();
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::Delta {
                choice,
                deltas,
                tokens,
                ..
            } => {
                let partial = &mut partials[choice];
                for delta in deltas {
                    match delta {
                        OutputDelta::Content(text) => partial.content.push_str(&text),
                        OutputDelta::Reasoning(text) => {
                            partial.reasoning.get_or_insert_default().push_str(&text)
                        }
                        OutputDelta::ToolCall(name) => partial.calls.push(ToolCallReply {
                            id: head.call_id(choice, partial.calls.len()),
                            kind: "function".to_owned(),
                            function: FunctionReply {
                                name,
                                arguments: String::new(),
                            },
                        }),
                        OutputDelta::ToolArguments(text) => {
                            if let Some(call) = partial.calls.last_mut() {
                                call.function.arguments.push_str(&text);
                            }
                        }
                    }
                }
                let new = logprobs::chat(&head.model.text, &tokens);
                partial.logprobs.content.extend(new.content);
                let of_thoughts = &mut partial.logprobs.reasoning_content;
                of_thoughts.extend(new.reasoning_content);
            }
            GenerationEvent::Finished { choice, end } => {
                let has_begun = end.is_whole() || 0 < generation.counts().n_output;
                let reason = end.finish_reason().filter(|_| has_begun);
                partials[choice].finish_reason = reason.ok_or_else(|| ApiError::of_end(&end))?;
            }
        }
    }
    let choices = partials
        .into_iter()
        .enumerate()
        .map(|(index, partial)| ChatChoice {
            index,
            message: ChatReply {
                role: "assistant".to_owned(),
                content: Some(partial.content)
                    .filter(|text| !text.is_empty() || partial.calls.is_empty()),
                refusal: None,
                reasoning_content: partial.reasoning,
                tool_calls: partial.calls,
            },
            logprobs: head.wants_logprobs.then_some(partial.logprobs),
            finish_reason: partial.finish_reason,
        });
    Ok(ChatCompletion {
        id: head.id.clone(),
        object: "chat.completion".to_owned(),
        created: head.created,
        model: head.model_name.clone(),
        choices: choices.collect(),
        usage: usage(generation.counts()),
    })
}

fn usage(counts: TokenCounts) -> Usage {
    Usage::new(
        counts.n_prompt,
        counts.n_cached,
        counts.n_output,
        Some(counts.n_reasoning),
    )
}

struct Encoder {
    head: Head,
    include_usage: bool,
    /// Choices whose role was sent.
    started: Vec<bool>,
    /// Calls of each choice that have begun.
    n_calls: Vec<usize>,
}

impl Encoder {
    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.head.id.clone(),
            object: "chat.completion.chunk".to_owned(),
            created: self.head.created,
            model: self.head.model_name.clone(),
            choices,
            usage: self.include_usage.then_some(usage),
        }
    }

    /// The first chunk of a call.
    fn call(&mut self, choice: usize, name: String) -> ChatDelta {
        let index = self.n_calls[choice];
        self.n_calls[choice] += 1;
        ChatDelta {
            tool_calls: vec![ToolCallDelta {
                index,
                id: Some(self.head.call_id(choice, index)),
                kind: Some("function".to_owned()),
                function: FunctionDelta {
                    name: Some(name),
                    arguments: String::new(),
                },
            }],
            ..ChatDelta::default()
        }
    }

    /// The first chunk of a choice names the role and has no text.
    fn start(&mut self, index: usize, chunks: &mut Chunks) {
        if !std::mem::replace(&mut self.started[index], true) {
            let delta = ChatDelta {
                role: Some("assistant".to_owned()),
                content: Some(String::new()),
                ..ChatDelta::default()
            };
            let choice = ChatChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
            };
            chunks.push(&self.chunk(vec![choice], None));
        }
    }
}

impl ChunkEncoder for Encoder {
    fn delta(&mut self, event: GenerationDelta, chunks: &mut Chunks) {
        self.start(event.choice, chunks);
        let mut tokens = event.tokens;
        let wants_logprobs = self.head.wants_logprobs;
        let text = Arc::clone(&self.head.model.text);
        // All tokens go with the first of several pieces of text.
        let mut logprobs = || {
            wants_logprobs
                .then(|| logprobs::chat(&text, &std::mem::take(&mut tokens)))
                .filter(|l| !l.content.is_empty() || !l.reasoning_content.is_empty())
        };
        let mut n_sent = 0;
        for delta in event.deltas {
            let delta = match delta {
                OutputDelta::Content(text) => ChatDelta {
                    content: Some(text),
                    ..ChatDelta::default()
                },
                OutputDelta::Reasoning(text) => ChatDelta {
                    reasoning_content: Some(text),
                    ..ChatDelta::default()
                },
                OutputDelta::ToolCall(name) => self.call(event.choice, name),
                OutputDelta::ToolArguments(arguments) => ChatDelta {
                    tool_calls: vec![ToolCallDelta {
                        index: self.n_calls[event.choice].saturating_sub(1),
                        id: None,
                        kind: None,
                        function: FunctionDelta {
                            name: None,
                            arguments,
                        },
                    }],
                    ..ChatDelta::default()
                },
            };
            let choice = ChatChunkChoice {
                index: event.choice,
                delta,
                logprobs: logprobs(),
                finish_reason: None,
            };
            chunks.push(&self.chunk(vec![choice], None));
            n_sent += 1;
        }
        if n_sent == 0
            && let Some(logprobs) = logprobs()
        {
            let delta = ChatDelta {
                content: Some(String::new()),
                ..ChatDelta::default()
            };
            let choice = ChatChunkChoice {
                index: event.choice,
                delta,
                logprobs: Some(logprobs),
                finish_reason: None,
            };
            chunks.push(&self.chunk(vec![choice], None));
        }
    }

    fn finished(&mut self, index: usize, end: &ChoiceEnd, chunks: &mut Chunks) {
        self.start(index, chunks);
        let delta = ChatDelta::default();
        let choice = ChatChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: end.finish_reason(),
        };
        chunks.push(&self.chunk(vec![choice], None));
    }

    fn done(&mut self, counts: TokenCounts, chunks: &mut Chunks) {
        if self.include_usage {
            chunks.push(&self.chunk(Vec::new(), Some(usage(counts))));
        }
        chunks.push_done();
    }
}
