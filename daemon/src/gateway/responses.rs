//! OpenAI's other door: `POST /v1/responses` and `/v1/responses/input_tokens`, without a memory.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http,
};
use dsd_proto::{
    code::Code,
    openai::ChatTokenLogprob,
    responses::{
        Echo, Event, IncompleteDetails, InputTokenCount, InputTokensDetails, OutputItem,
        OutputPart, OutputTokensDetails, Part, ReasoningText, Response, ResponseError,
        ResponseUsage, ResponsesRequest, Status,
    },
};
use serde::Serialize;

use super::{
    Gateway,
    error::{ApiError, Dialect},
    generation::{ChoiceEnd, Generation, GenerationEvent, TokenChoice, TokenCounts},
    logprobs,
    prepare::{self, Prepared, Terms},
    routes,
    sse::{self, ChunkEncoder, Chunks, GenerationDelta},
};
use crate::{
    catalog::Catalog,
    runtime::clock,
    text::{OutputDelta, TextModel},
};

/// Where text of an item is: items have one part.
const CONTENT_INDEX: usize = 0;

pub(super) async fn create(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> http::Response<Body> {
    let (mut prepared, echo) = match prepare::read_and(&gateway, request, prepare_response).await {
        Ok(prepared) => prepared,
        Err(refusal) => return refusal,
    };
    let generation = match prepare::start(&gateway, &mut prepared) {
        Ok(generation) => generation,
        Err(e) => return e.with_prompt_param("input").into_response(),
    };
    let keep_alive = gateway.config.keep_alive;
    let answer = Answer::new(&prepared, echo);
    let mut response = match prepared.stream {
        true => sse::response(generation, Encoder::new(answer), keep_alive),
        false => sse::whole(whole(generation, answer), Dialect::OpenAi, keep_alive).await,
    };
    prepare::name_ignored(&mut response, &prepared.ignored);
    response
}

pub(super) async fn count_tokens(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> http::Response<Body> {
    match prepare::read_and(&gateway, request, prepare_response).await {
        Ok((prepared, _)) => routes::json(&InputTokenCount {
            object: "response.input_tokens",
            input_tokens: prepared.prompts.iter().map(|prompt| prompt.ids.len()).sum(),
        }),
        Err(refusal) => refusal,
    }
}

/// What is asked of an answer that was made before.
pub(super) async fn kept() -> http::Response<Body> {
    let message = "answers are not kept here; what was answered goes into `input` again";
    ApiError::new(Code::NotFound, message).into_response()
}

/// The chat that a request is, and what its answer says of it.
fn prepare_response(
    catalog: &Catalog,
    body: &[u8],
    terms: Terms,
) -> Result<(Prepared, Echo), ApiError> {
    let request = ResponsesRequest::from_slice(body)?;
    let prepared = prepare::of_chat(catalog, request.chat, request.ignored, terms);
    let prepared = prepared.map_err(|mut e| {
        if e.param.as_deref() == Some("messages") {
            e.param = Some("input".to_owned());
        }
        e
    })?;
    Ok((prepared, request.echo))
}

fn usage(counts: TokenCounts) -> ResponseUsage {
    ResponseUsage {
        input_tokens: counts.n_prompt,
        input_tokens_details: InputTokensDetails {
            cached_tokens: counts.n_cached,
            cache_write_tokens: 0,
        },
        output_tokens: counts.n_output,
        output_tokens_details: OutputTokensDetails {
            reasoning_tokens: counts.n_reasoning,
        },
        total_tokens: counts.n_prompt + counts.n_output,
    }
}

/// Collects a generation into one answer.
async fn whole(mut generation: Generation, mut answer: Answer) -> Result<Response, ApiError> {
    let mut events = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::Delta { deltas, tokens, .. } => {
                answer.delta(deltas, &tokens, &mut events);
            }
            GenerationEvent::Finished { end, .. } => {
                let has_begun = end.is_whole() || 0 < generation.counts().n_output;
                if end.finish_reason().filter(|_| has_begun).is_none() {
                    return Err(ApiError::of_end(&end));
                }
                answer.finish(&end, &mut events);
            }
        }
        // Nobody reads them.
        events.clear();
    }
    answer.response.usage = Some(usage(generation.counts()));
    Ok(answer.response)
}

/// An answer as it grows, and the events that tell of it.
struct Answer {
    response: Response,
    text: Arc<TextModel>,
    wants_logprobs: bool,
    n_calls: usize,
}

impl Answer {
    fn new(prepared: &Prepared, echo: Echo) -> Self {
        let response = Response {
            id: routes::answer_id("resp"),
            object: "response",
            created_at: clock::unix_seconds(),
            completed_at: None,
            status: Status::InProgress,
            error: None,
            incomplete_details: None,
            model: prepared.model_name.clone(),
            output: Vec::new(),
            usage: None,
            echo,
        };
        Self {
            response,
            text: Arc::clone(&prepared.model.text),
            wants_logprobs: prepared.params.top_logprobs.is_some(),
            n_calls: 0,
        }
    }

    /// Number of the item that grows.
    fn at(&self) -> usize {
        self.response.output.len().saturating_sub(1)
    }

    fn delta(&mut self, deltas: Vec<OutputDelta>, tokens: &[TokenChoice], events: &mut Vec<Event>) {
        // All of them go with the first of several pieces of text.
        let mut entries = match self.wants_logprobs {
            true => logprobs::chat(&self.text, tokens).content,
            false => Vec::new(),
        };
        for delta in deltas {
            match delta {
                OutputDelta::Content(text) => {
                    self.content(text, std::mem::take(&mut entries), events);
                }
                OutputDelta::Reasoning(text) => self.reasoning(text, events),
                OutputDelta::ToolCall(name) => self.call(name, events),
                OutputDelta::ToolArguments(text) => self.arguments(text, events),
            }
        }
        if let Some(OutputItem::Message { content, .. }) = self.response.output.last_mut()
            && let Some(part) = content.last_mut()
        {
            part.logprobs.append(&mut entries);
        }
    }

    fn content(&mut self, delta: String, entries: Vec<ChatTokenLogprob>, events: &mut Vec<Event>) {
        if !matches!(self.open(), Some(OutputItem::Message { .. })) {
            let item = |id| OutputItem::Message {
                id,
                status: Status::InProgress,
                role: "assistant",
                content: Vec::new(),
            };
            self.begin("msg", item, Some(Part::Text(OutputPart::default())), events);
        }
        let output_index = self.at();
        if let Some(OutputItem::Message { id, content, .. }) = self.response.output.last_mut()
            && let Some(part) = content.last_mut()
        {
            part.text.push_str(&delta);
            part.logprobs.extend_from_slice(&entries);
            events.push(Event::TextDelta {
                item_id: id.clone(),
                output_index,
                content_index: CONTENT_INDEX,
                delta,
                logprobs: entries,
            });
        }
    }

    fn reasoning(&mut self, delta: String, events: &mut Vec<Event>) {
        if !matches!(self.open(), Some(OutputItem::Reasoning { .. })) {
            let item = |id| OutputItem::Reasoning {
                id,
                status: Status::InProgress,
                summary: [],
                content: Vec::new(),
                encrypted_content: None,
            };
            let text = String::new();
            let part = Part::Reasoning(ReasoningText { text });
            self.begin("rs", item, Some(part), events);
        }
        let output_index = self.at();
        if let Some(OutputItem::Reasoning { id, content, .. }) = self.response.output.last_mut()
            && let Some(part) = content.last_mut()
        {
            part.text.push_str(&delta);
            events.push(Event::ReasoningDelta {
                item_id: id.clone(),
                output_index,
                content_index: CONTENT_INDEX,
                delta,
            });
        }
    }

    fn call(&mut self, name: String, events: &mut Vec<Event>) {
        let call_id = routes::call_id("call", &self.response.id, 0, self.n_calls);
        self.n_calls += 1;
        let item = |id| OutputItem::FunctionCall {
            id,
            status: Status::InProgress,
            call_id,
            name,
            arguments: String::new(),
        };
        self.begin("fc", item, None, events);
    }

    fn arguments(&mut self, delta: String, events: &mut Vec<Event>) {
        let output_index = self.at();
        if let Some(OutputItem::FunctionCall { id, arguments, .. }) =
            self.response.output.last_mut()
        {
            arguments.push_str(&delta);
            events.push(Event::ArgumentsDelta {
                item_id: id.clone(),
                output_index,
                delta,
            });
        }
    }

    /// The item that grows.
    fn open(&self) -> Option<&OutputItem> {
        self.response.output.last()
    }

    /// Ends the item that grows and begins another, with a part of text where it has one.
    fn begin(
        &mut self,
        prefix: &str,
        item: impl FnOnce(String) -> OutputItem,
        part: Option<Part>,
        events: &mut Vec<Event>,
    ) {
        self.close(Status::Completed, events);
        let output_index = self.response.output.len();
        let item_id = routes::call_id(prefix, &self.response.id, 0, output_index);
        let mut item = item(item_id.clone());
        events.push(Event::ItemAdded {
            output_index,
            item: item.clone(),
        });
        if let Some(part) = part {
            match (&mut item, &part) {
                (OutputItem::Message { content, .. }, Part::Text(text)) => {
                    content.push(text.clone());
                }
                (OutputItem::Reasoning { content, .. }, Part::Reasoning(text)) => {
                    content.push(text.clone());
                }
                _ => {}
            }
            events.push(Event::PartAdded {
                item_id,
                output_index,
                content_index: CONTENT_INDEX,
                part,
            });
        }
        self.response.output.push(item);
    }

    /// Ends the item that grows.
    fn close(&mut self, status: Status, events: &mut Vec<Event>) {
        let output_index = self.at();
        let Some(item) = self.response.output.last_mut() else {
            return;
        };
        item.set_status(status);
        let item_id = item.id().to_owned();
        let content_index = CONTENT_INDEX;
        let part = match &*item {
            OutputItem::Message { content, .. } => content.last().map(|part| {
                events.push(Event::TextDone {
                    item_id: item_id.clone(),
                    output_index,
                    content_index,
                    text: part.text.clone(),
                    logprobs: part.logprobs.clone(),
                });
                Part::Text(part.clone())
            }),
            OutputItem::Reasoning { content, .. } => content.last().map(|part| {
                events.push(Event::ReasoningDone {
                    item_id: item_id.clone(),
                    output_index,
                    content_index,
                    text: part.text.clone(),
                });
                Part::Reasoning(part.clone())
            }),
            OutputItem::FunctionCall {
                name, arguments, ..
            } => {
                events.push(Event::ArgumentsDone {
                    item_id: item_id.clone(),
                    output_index,
                    name: name.clone(),
                    arguments: arguments.clone(),
                });
                None
            }
        };
        if let Some(part) = part {
            events.push(Event::PartDone {
                item_id,
                output_index,
                content_index,
                part,
            });
        }
        events.push(Event::ItemDone {
            output_index,
            item: item.clone(),
        });
    }

    /// The model has ended.
    fn finish(&mut self, end: &ChoiceEnd, events: &mut Vec<Event>) {
        let reason = match end {
            ChoiceEnd::Stop | ChoiceEnd::StopString(_) | ChoiceEnd::ToolCalls => None,
            ChoiceEnd::Length => Some("max_output_tokens"),
            ChoiceEnd::DeadlinePassed => Some("deadline_exceeded"),
            ChoiceEnd::Stopped | ChoiceEnd::Lost | ChoiceEnd::Failed(_) => {
                Some("insufficient_system_resource")
            }
        };
        let status = match reason {
            None => Status::Completed,
            Some(_) => Status::Incomplete,
        };
        self.close(status, events);
        self.response.status = status;
        self.response.incomplete_details = reason.map(|reason| IncompleteDetails { reason });
        self.response.completed_at = (status == Status::Completed).then(clock::unix_seconds);
    }
}

/// An event with its number.
#[derive(Serialize)]
struct Numbered<'a> {
    #[serde(flatten)]
    event: &'a Event,
    sequence_number: u64,
}

struct Encoder {
    answer: Answer,
    n_events: u64,
}

impl Encoder {
    fn new(answer: Answer) -> Self {
        Self {
            answer,
            n_events: 0,
        }
    }

    fn push(&mut self, event: &Event, chunks: &mut Chunks) {
        let sequence_number = self.n_events;
        self.n_events += 1;
        let numbered = Numbered {
            event,
            sequence_number,
        };
        chunks.push_event(event.name(), &numbered);
    }

    fn begin(&mut self, chunks: &mut Chunks) {
        if self.n_events == 0 {
            let response = self.answer.response.clone();
            self.push(&Event::Created { response }, chunks);
            let response = self.answer.response.clone();
            self.push(&Event::InProgress { response }, chunks);
        }
    }

    fn push_all(&mut self, events: &[Event], chunks: &mut Chunks) {
        events.iter().for_each(|event| self.push(event, chunks));
    }
}

impl ChunkEncoder for Encoder {
    fn delta(&mut self, event: GenerationDelta, chunks: &mut Chunks) {
        self.begin(chunks);
        let mut events = Vec::new();
        self.answer.delta(event.deltas, &event.tokens, &mut events);
        self.push_all(&events, chunks);
    }

    fn finished(&mut self, _: usize, end: &ChoiceEnd, chunks: &mut Chunks) {
        self.begin(chunks);
        let mut events = Vec::new();
        self.answer.finish(end, &mut events);
        self.push_all(&events, chunks);
    }

    fn done(&mut self, counts: TokenCounts, chunks: &mut Chunks) {
        self.answer.response.usage = Some(usage(counts));
        let response = self.answer.response.clone();
        let event = match response.status {
            Status::Completed => Event::Completed { response },
            _ => Event::Incomplete { response },
        };
        self.push(&event, chunks);
    }

    fn failed(&mut self, error: &ApiError, chunks: &mut Chunks) {
        self.begin(chunks);
        self.answer.response.status = Status::Failed;
        self.answer.response.error = Some(ResponseError {
            code: error.code.name().to_owned(),
            message: error.message.clone(),
        });
        let response = self.answer.response.clone();
        self.push(&Event::Failed { response }, chunks);
    }
}
