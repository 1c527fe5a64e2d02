//! Bodies of answers that take their time: events as they come, comments while nothing comes; empty
//! lines before an answer in one piece.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Response, header},
};
use futures::{StreamExt, stream};
use serde::Serialize;
use tokio::time;

use super::{
    error::{ApiError, Dialect},
    generation::{ChoiceEnd, Generation, GenerationEvent, TokenCounts},
    routes,
};

/// Turns events of a generation into the chunks of one route.
pub(super) trait ChunkEncoder: Send + 'static {
    /// Chunks of new text.
    fn delta(&mut self, event: GenerationDelta, chunks: &mut Chunks);
    /// The last chunk of a choice, whose end has a reason.
    fn finished(&mut self, choice: usize, end: &ChoiceEnd, chunks: &mut Chunks);
    /// After the last choice.
    fn done(&mut self, counts: TokenCounts, chunks: &mut Chunks);
    /// The stream ends here, and what was sent is not a whole answer.
    fn failed(&mut self, error: &ApiError, chunks: &mut Chunks) {
        chunks.push_text(&error.json(Dialect::OpenAi));
    }
    /// What says that the answer is still made.
    fn keep_alive(&self) -> &'static str {
        ": keep-alive\n\n"
    }
}

/// New text of a choice.
pub(super) struct GenerationDelta {
    pub(super) choice: usize,
    pub(super) deltas: Vec<crate::text::OutputDelta>,
    pub(super) tokens: Vec<super::generation::TokenChoice>,
}

/// Encoded events that wait to be sent.
#[derive(Default)]
pub(super) struct Chunks(VecDeque<Bytes>);

impl Chunks {
    /// Adds an event.
    pub(super) fn push(&mut self, chunk: &impl Serialize) {
        // Only a map with keys that are no strings cannot be written; no chunk has one.
        let json = serde_json::to_string(chunk).unwrap_or_default();
        self.push_text(&json);
    }

    /// Adds an event with a name.
    pub(super) fn push_event(&mut self, name: &str, chunk: &impl Serialize) {
        let json = serde_json::to_string(chunk).unwrap_or_default();
        self.0
            .push_back(format!("event: {name}\ndata: {json}\n\n").into());
    }

    /// Adds the end that OpenAI's clients wait for.
    pub(super) fn push_done(&mut self) {
        self.push_text("[DONE]");
    }

    fn push_text(&mut self, data: &str) {
        self.0.push_back(format!("data: {data}\n\n").into());
    }
}

/// An event stream over a generation. Dropping the body cancels the generation.
pub(super) fn response(
    generation: Generation,
    encoder: impl ChunkEncoder,
    keep_alive: Duration,
) -> Response<Body> {
    let events = EventStream {
        generation,
        encoder,
        keep_alive,
        chunks: Chunks::default(),
        over: false,
        _open: Open::new(),
    };
    let frames = stream::unfold(events, async |mut events| {
        let bytes = events.next().await?;
        Some((Ok::<_, Infallible>(bytes), events))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies of the nginx family would otherwise collect the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// An answer in one piece. From `keep_alive` on, empty lines tell the client and proxies that it is
/// still made, as DeepSeek's do; its status has to be 200 then, whatever comes of it. Dropping the body
/// drops `answer`.
pub(super) async fn whole<T: Serialize>(
    answer: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    dialect: Dialect,
    keep_alive: Duration,
) -> Response<Body> {
    let mut answer = Box::pin(answer);
    match time::timeout(keep_alive, &mut answer).await {
        Ok(Ok(value)) => return routes::json(&value),
        Ok(Err(e)) => return e.into_response_in(dialect),
        Err(_) => {}
    }
    let parts = stream::unfold(Some(answer), move |answer| async move {
        let mut answer = answer?;
        match time::timeout(keep_alive, &mut answer).await {
            Err(_) => Some((Ok::<_, Infallible>(Bytes::from_static(b"\n")), Some(answer))),
            Ok(outcome) => {
                let json = match outcome {
                    Ok(value) => serde_json::to_string(&value).unwrap_or_default(),
                    Err(e) => e.json(dialect),
                };
                Some((Ok(Bytes::from(json)), None))
            }
        }
    });
    let first = stream::once(async { Ok::<_, Infallible>(Bytes::from_static(b"\n")) });
    let mut response = Response::new(Body::from_stream(first.chain(parts)));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

struct EventStream<E> {
    generation: Generation,
    encoder: E,
    keep_alive: Duration,
    chunks: Chunks,
    over: bool,
    _open: Open,
}

impl<E: ChunkEncoder> EventStream<E> {
    async fn next(&mut self) -> Option<Bytes> {
        // From the last thing sent, not from the last token: a token whose text is held back sends nothing.
        let silence = time::sleep(self.keep_alive);
        tokio::pin!(silence);
        loop {
            if let Some(bytes) = self.chunks.0.pop_front() {
                return Some(bytes);
            }
            if self.over {
                return None;
            }
            tokio::select! {
                event = self.generation.next() => self.event(event),
                () = &mut silence => return Some(self.encoder.keep_alive().into()),
            }
        }
    }

    fn event(&mut self, event: Option<GenerationEvent>) {
        match event {
            Some(GenerationEvent::Delta {
                choice,
                deltas,
                tokens,
                ..
            }) => {
                self.encoder.delta(
                    GenerationDelta {
                        choice,
                        deltas,
                        tokens,
                    },
                    &mut self.chunks,
                );
            }
            Some(GenerationEvent::Finished { choice, end }) => {
                // Without a token there is no answer that could have ended early; but at a stop clients
                // look for an end of the stream that is like all others.
                let has_begun = end.is_whole()
                    || end == ChoiceEnd::Stopped
                    || 0 < self.generation.counts().n_output;
                match end.finish_reason().filter(|_| has_begun) {
                    Some(_) => self.encoder.finished(choice, &end, &mut self.chunks),
                    None => {
                        let error = ApiError::of_end(&end);
                        self.encoder.failed(&error, &mut self.chunks);
                        self.over = true;
                    }
                }
            }
            None => {
                self.encoder
                    .done(self.generation.counts(), &mut self.chunks);
                self.over = true;
            }
        }
    }
}

/// Counts a stream while it is sent.
struct Open;

impl Open {
    fn new() -> Self {
        metrics::gauge!("dsd_http_streams").increment(1.0);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        metrics::gauge!("dsd_http_streams").decrement(1.0);
    }
}
