//! The body of a streamed answer: events as they come, comments while nothing comes.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Response, header},
};
use futures::stream;
use serde::Serialize;
use tokio::time;

use super::{
    error::ApiError,
    generation::{ChoiceEnd, Generation, GenerationEvent, TokenCounts},
};

/// Turns events of a generation into the chunks of one route.
pub(super) trait ChunkEncoder: Send + 'static {
    /// Chunks of new text.
    fn delta(&mut self, event: GenerationDelta, chunks: &mut Chunks);
    /// The last chunk of a choice.
    fn finished(
        &mut self,
        choice: usize,
        reason: dsd_proto::openai::FinishReason,
        chunks: &mut Chunks,
    );
    /// After the last choice: token counts, if the client wants them.
    fn usage(&mut self, counts: TokenCounts, chunks: &mut Chunks);
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
                () = &mut silence => return Some(Bytes::from_static(b": keep-alive\n\n")),
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
                    Some(reason) => self.encoder.finished(choice, reason, &mut self.chunks),
                    None => {
                        // The stream ends without `[DONE]`: what was sent is not a whole answer.
                        self.chunks.push_text(&ApiError::of_end(&end).json());
                        self.over = true;
                    }
                }
            }
            None => {
                self.encoder
                    .usage(self.generation.counts(), &mut self.chunks);
                self.chunks.push_text("[DONE]");
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
