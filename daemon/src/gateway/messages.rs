//! Anthropic's door: `POST /v1/messages` and `/v1/messages/count_tokens`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::Response,
};
use dsd_proto::anthropic::{
    BlockDelta, ContentBlock, ErrorDetail, Message, MessageEnd, MessageEvent, MessageUsage,
    MessagesRequest, StopReason, TokenCount,
};

use super::{
    Gateway,
    error::{ApiError, Dialect},
    generation::{ChoiceEnd, Generation, GenerationEvent, TokenCounts},
    prepare::{self, Prepared, Terms},
    routes,
    sse::{self, ChunkEncoder, Chunks, GenerationDelta},
};
use crate::{catalog::Catalog, text::OutputDelta};

const DIALECT: Dialect = Dialect::Anthropic;

pub(super) async fn create(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Response<Body> {
    let mut prepared = match prepare::read_and(&gateway, request, prepare_message).await {
        Ok(prepared) => prepared,
        Err(refusal) => return refusal,
    };
    let generation = match prepare::start(&gateway, &mut prepared) {
        Ok(generation) => generation,
        Err(e) => return e.with_prompt_param("messages").into_response_in(DIALECT),
    };
    let keep_alive = gateway.config.keep_alive;
    let head = Message {
        id: routes::answer_id("msg"),
        kind: "message".to_owned(),
        role: "assistant".to_owned(),
        model: prepared.model_name,
        content: Vec::new(),
        stop_reason: None,
        stop_sequence: None,
        usage: usage(generation.counts()),
    };
    if prepared.stream {
        return sse::response(generation, Encoder::new(head), keep_alive);
    }
    sse::whole(whole(generation, head), DIALECT, keep_alive).await
}

pub(super) async fn count_tokens(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Response<Body> {
    match prepare::read_and(&gateway, request, prepare_to_count).await {
        Ok(prepared) => routes::json(&TokenCount {
            input_tokens: prepared.prompts.iter().map(|prompt| prompt.ids.len()).sum(),
        }),
        Err(refusal) => refusal,
    }
}

fn prepare_message(catalog: &Catalog, body: &[u8], terms: Terms) -> Result<Prepared, ApiError> {
    let MessagesRequest(request) = MessagesRequest::from_slice(body, true)?;
    prepare::of_chat(catalog, request, Vec::new(), terms)
}

/// The same for its number of tokens only.
fn prepare_to_count(catalog: &Catalog, body: &[u8], terms: Terms) -> Result<Prepared, ApiError> {
    let MessagesRequest(request) = MessagesRequest::from_slice(body, false)?;
    prepare::of_chat(catalog, request, Vec::new(), terms)
}

fn usage(counts: TokenCounts) -> MessageUsage {
    MessageUsage {
        input_tokens: counts.n_prompt.saturating_sub(counts.n_cached),
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: counts.n_cached,
        output_tokens: counts.n_output,
    }
}

/// Why an answer ended, in Anthropic's words.
fn end_of(end: &ChoiceEnd) -> MessageEnd {
    let (stop_reason, stop_sequence) = match end {
        ChoiceEnd::StopString(stop) => (StopReason::StopSequence, Some(stop.clone())),
        ChoiceEnd::ToolCalls => (StopReason::ToolUse, None),
        ChoiceEnd::Stop => (StopReason::EndTurn, None),
        ChoiceEnd::Length
        | ChoiceEnd::DeadlinePassed
        | ChoiceEnd::Stopped
        | ChoiceEnd::Lost
        | ChoiceEnd::Failed(_) => (StopReason::MaxTokens, None),
    };
    MessageEnd {
        stop_reason,
        stop_sequence,
    }
}

/// Collects a generation into one answer.
async fn whole(mut generation: Generation, mut message: Message) -> Result<Message, ApiError> {
    let mut arguments: Vec<String> = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::Delta { deltas, .. } => {
                for delta in deltas {
                    add(&mut message, &mut arguments, delta);
                }
            }
            GenerationEvent::Finished { end, .. } => {
                let has_begun = end.is_whole() || 0 < generation.counts().n_output;
                if end.finish_reason().filter(|_| has_begun).is_none() {
                    return Err(ApiError::of_end(&end));
                }
                let end = end_of(&end);
                (message.stop_reason, message.stop_sequence) =
                    (Some(end.stop_reason), end.stop_sequence);
            }
        }
    }
    let mut arguments = arguments.into_iter();
    for block in &mut message.content {
        if let ContentBlock::ToolUse { input, .. } = block {
            let text = arguments.next().unwrap_or_default();
            *input = serde_json::from_str(&text).unwrap_or_else(|_| text.into());
        }
    }
    message.usage = usage(generation.counts());
    Ok(message)
}

fn add(message: &mut Message, arguments: &mut Vec<String>, delta: OutputDelta) {
    match (delta, message.content.last_mut()) {
        (OutputDelta::Content(new), Some(ContentBlock::Text { text })) => text.push_str(&new),
        (OutputDelta::Content(text), _) => message.content.push(ContentBlock::Text { text }),
        (OutputDelta::Reasoning(new), Some(ContentBlock::Thinking { thinking, .. })) => {
            thinking.push_str(&new);
        }
        (OutputDelta::Reasoning(thinking), _) => {
            let signature = String::new();
            message.content.push(ContentBlock::Thinking {
                thinking,
                signature,
            });
        }
        (OutputDelta::ToolCall(name), _) => {
            message.content.push(ContentBlock::ToolUse {
                id: routes::call_id("toolu", &message.id, 0, arguments.len()),
                name,
                input: serde_json::Value::Null,
            });
            arguments.push(String::new());
        }
        (OutputDelta::ToolArguments(text), _) => {
            if let Some(last) = arguments.last_mut() {
                last.push_str(&text);
            }
        }
    }
}

struct Encoder {
    head: Message,
    has_begun: bool,
    /// The part that is open, and the number of the next one.
    open: Option<Part>,
    n_parts: usize,
    n_calls: usize,
    end: Option<MessageEnd>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Thinking,
    Text,
    Call,
}

impl Encoder {
    fn new(head: Message) -> Self {
        Self {
            head,
            has_begun: false,
            open: None,
            n_parts: 0,
            n_calls: 0,
            end: None,
        }
    }

    fn push(event: &MessageEvent, chunks: &mut Chunks) {
        chunks.push_event(event.name(), event);
    }

    fn begin(&mut self, chunks: &mut Chunks) {
        if !std::mem::replace(&mut self.has_begun, true) {
            let message = self.head.clone();
            Self::push(&MessageEvent::MessageStart { message }, chunks);
        }
    }

    fn close(&mut self, chunks: &mut Chunks) {
        if self.open.take().is_some() {
            let index = self.n_parts - 1;
            Self::push(&MessageEvent::ContentBlockStop { index }, chunks);
        }
    }

    /// Goes on with a part of this kind, or begins one.
    fn part(&mut self, part: Part, empty: ContentBlock, chunks: &mut Chunks) {
        if self.open == Some(part) && part != Part::Call {
            return;
        }
        self.close(chunks);
        let (index, content_block) = (self.n_parts, empty);
        let start = MessageEvent::ContentBlockStart {
            index,
            content_block,
        };
        Self::push(&start, chunks);
        self.open = Some(part);
        self.n_parts += 1;
    }

    fn more(&self, delta: BlockDelta, chunks: &mut Chunks) {
        let index = self.n_parts.saturating_sub(1);
        Self::push(&MessageEvent::ContentBlockDelta { index, delta }, chunks);
    }
}

impl ChunkEncoder for Encoder {
    fn delta(&mut self, event: GenerationDelta, chunks: &mut Chunks) {
        self.begin(chunks);
        for delta in event.deltas {
            match delta {
                OutputDelta::Content(text) => {
                    let empty = ContentBlock::Text {
                        text: String::new(),
                    };
                    self.part(Part::Text, empty, chunks);
                    self.more(BlockDelta::TextDelta { text }, chunks);
                }
                OutputDelta::Reasoning(thinking) => {
                    let empty = ContentBlock::Thinking {
                        thinking: String::new(),
                        signature: String::new(),
                    };
                    self.part(Part::Thinking, empty, chunks);
                    self.more(BlockDelta::ThinkingDelta { thinking }, chunks);
                }
                OutputDelta::ToolCall(name) => {
                    let empty = ContentBlock::ToolUse {
                        id: routes::call_id("toolu", &self.head.id, 0, self.n_calls),
                        name,
                        input: serde_json::json!({}),
                    };
                    self.n_calls += 1;
                    self.part(Part::Call, empty, chunks);
                }
                OutputDelta::ToolArguments(partial_json) => {
                    self.more(BlockDelta::InputJsonDelta { partial_json }, chunks);
                }
            }
        }
    }

    fn finished(&mut self, _: usize, end: &ChoiceEnd, chunks: &mut Chunks) {
        self.begin(chunks);
        self.close(chunks);
        self.end = Some(end_of(end));
    }

    fn done(&mut self, counts: TokenCounts, chunks: &mut Chunks) {
        let usage = usage(counts);
        if let Some(delta) = self.end.take() {
            Self::push(&MessageEvent::MessageDelta { delta, usage }, chunks);
        }
        Self::push(&MessageEvent::MessageStop, chunks);
    }

    fn failed(&mut self, error: &ApiError, chunks: &mut Chunks) {
        let error = ErrorDetail::of_status(error.status(), error.message());
        Self::push(&MessageEvent::Error { error }, chunks);
    }

    fn keep_alive(&self) -> &'static str {
        "event: ping\ndata: {\"type\": \"ping\"}\n\n"
    }
}
