//! Request bodies: read within a size, a time and a budget for all of them, or refused while they
//! still arrive.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, Response, header},
};
use dsd_proto::code::Code;
use futures::stream;
use http_body_util::BodyExt;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use super::{
    body_budget::{BodyBudget, BodyShare},
    error::{ApiError, Dialect},
};
use crate::runtime::clock;

/// How long the rest of a refused body is read and thrown away, so that the client, still sending,
/// gets to read the answer instead of a reset connection.
pub(super) const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// Bytes of a refused body that are read and thrown away at most.
const DRAIN_LEN_MAX: usize = 256 << 20;
/// Bytes of a piece in which bodies are kept: grown as one, a long body would be copied again and
/// again and leave holes behind as large as itself.
const PIECE_LEN: usize = 16 * 1024;
/// While others wait for room, a body that holds some must bring [`PROGRESS_LEN_MIN`] in this time.
const PROGRESS_TIME: Duration = Duration::from_secs(2);
/// 8 KiB a second: `http.body_timeout_s` asks for nine times as much of the longest body.
const PROGRESS_LEN_MIN: usize = 16 * 1024;
/// How long a body waits for room, all its waits together.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(10);
/// When to come back to a node without room: two rounds of the bodies that stand still.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What a head says of its body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Announced {
    length: Option<u64>,
    /// The client sends nothing before it is told to, so that there is nothing to drain.
    waits_for_leave: bool,
}

impl Announced {
    pub(super) fn by(headers: &HeaderMap) -> Self {
        let length = headers.get(header::CONTENT_LENGTH);
        Self {
            length: length.and_then(|value| value.to_str().ok()?.parse().ok()),
            waits_for_leave: headers.contains_key(header::EXPECT),
        }
    }
}

/// Limits of a body.
#[derive(Debug, Clone, Copy)]
pub(super) struct BodyLimits {
    pub(super) len_max: usize,
    /// For all of it to arrive, waits for room not counted.
    pub(super) timeout: Duration,
}

/// A body that has arrived. It counts against the budget until it is dropped.
#[derive(Debug)]
pub(super) struct Received {
    pieces: Vec<Vec<u8>>,
    len: usize,
    share: BodyShare,
}

impl Received {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All bytes in one, and what to hold on to as long as they are in use.
    pub(super) fn into_bytes(self) -> (Vec<u8>, BodyShare) {
        let mut bytes = Vec::with_capacity(self.len);
        for piece in self.pieces {
            bytes.extend_from_slice(&piece);
        }
        (bytes, self.share)
    }

    fn push(&mut self, mut data: &[u8]) {
        self.len += data.len();
        while !data.is_empty() {
            let room = self.pieces.last().map_or(0, |last| PIECE_LEN - last.len());
            let (now, later) = data.split_at(data.len().min(room));
            match self.pieces.last_mut() {
                Some(last) => {
                    if last.capacity() < last.len() + now.len() {
                        // Left to itself it would grow to twice its length, beyond a piece.
                        last.reserve_exact(room);
                    }
                    last.extend_from_slice(now);
                }
                None => debug_assert!(now.is_empty()),
            }
            if !later.is_empty() {
                // Most bodies are shorter than a piece.
                let is_first = self.pieces.is_empty();
                let capacity = if is_first { later.len() } else { PIECE_LEN };
                self.pieces
                    .push(Vec::with_capacity(capacity.min(PIECE_LEN)));
            }
            data = later;
        }
    }
}

/// Reads a body within its limits and the budget, until `draining`. A failure is the answer to send.
pub(super) async fn read(
    announced: Announced,
    mut body: Body,
    limits: BodyLimits,
    budget: &BodyBudget,
    draining: &CancellationToken,
    dialect: Dialect,
) -> Result<Received, Response<Body>> {
    let BodyLimits { len_max, timeout } = limits;
    let too_large = |found: String| {
        let message = format!("the body has {found} bytes, at most {len_max} are read");
        ApiError::new(Code::PayloadTooLarge, message).into_response_in(dialect)
    };
    let is_too_large = |length: &u64| u64::try_from(len_max).is_ok_and(|max| max < *length);
    if let Some(length) = announced.length.filter(is_too_large) {
        return Err(answer_then_drain(
            too_large(length.to_string()),
            announced,
            body,
        ));
    }
    let collected = tokio::select! {
        biased;
        collected = collect(&mut body, limits, budget.open(announced.length)) => collected,
        () = draining.cancelled() => Err(ReadFailure::Draining),
    };
    let failure = match collected {
        Ok(received) => return Ok(received),
        Err(failure) => failure,
    };
    let closing = |code, message: String| {
        let mut response = ApiError::new(code, message).into_response_in(dialect);
        let close = header::HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
        response
    };
    Err(match failure {
        ReadFailure::TooLarge => {
            answer_then_drain(too_large(format!("more than {len_max}")), announced, body)
        }
        // The client is gone or its chunks are garbled; whoever still listens learns this.
        ReadFailure::Broken => {
            ApiError::new(Code::InvalidRequest, "the body ended early or is garbled")
                .into_response_in(dialect)
        }
        ReadFailure::Late => {
            let message = format!("the body did not arrive within {} s", timeout.as_secs_f32());
            closing(Code::RequestTimeout, message)
        }
        ReadFailure::Stalled => {
            count_refused("stalled");
            let message = format!(
                "less than {PROGRESS_LEN_MIN} bytes of the body came in {} s while others waited",
                PROGRESS_TIME.as_secs()
            );
            closing(Code::RequestTimeout, message)
        }
        ReadFailure::NoRoom => {
            count_refused("no_room");
            let mut error = ApiError::new(
                Code::BodyBudgetFull,
                "too many long bodies arrive at once; there is no room for this one",
            );
            error.retry_after = Some(RETRY_AFTER);
            answer_then_drain(error.into_response_in(dialect), announced, body)
        }
        ReadFailure::Draining => {
            let refusal = ApiError::shutting_down().into_response_in(dialect);
            answer_then_drain(refusal, announced, body)
        }
    })
}

/// Everything of a body. What was read of it is gone on failure.
async fn collect(
    body: &mut Body,
    limits: BodyLimits,
    share: BodyShare,
) -> Result<Received, ReadFailure> {
    let mut received = Received {
        pieces: Vec::new(),
        len: 0,
        share,
    };
    let now = || Instant::from_std(clock::now());
    let mut deadline = now() + limits.timeout;
    let mut patience = ROOM_WAIT_MAX;
    // When the time to make progress began, and how much had come then.
    let mut progress = (now(), 0);
    loop {
        let check_at = progress.0 + PROGRESS_TIME;
        let next = tokio::select! {
            biased;
            frame = body.frame() => frame,
            () = time::sleep_until(deadline) => return Err(ReadFailure::Late),
            () = time::sleep_until(check_at) => {
                let is_stalled = received.len - progress.1 < PROGRESS_LEN_MIN;
                if is_stalled && received.share.is_in_the_way() {
                    return Err(ReadFailure::Stalled);
                }
                progress = (now(), received.len);
                continue;
            }
        };
        let Some(frame) = next else {
            return Ok(received);
        };
        let Ok(data) = frame.map_err(|_| ReadFailure::Broken)?.into_data() else {
            continue;
        };
        if limits.len_max - received.len < data.len() {
            return Err(ReadFailure::TooLarge);
        }
        if let Some(waiting) = received.share.take(data.len()) {
            let began = now();
            let decided = time::timeout(patience, waiting.decided()).await;
            if !matches!(decided, Ok(Ok(()))) {
                return Err(ReadFailure::NoRoom);
            }
            // Our time, not the client's.
            let waited = now() - began;
            patience = patience.saturating_sub(waited);
            deadline += waited;
            progress = (now(), received.len);
        }
        received.push(&data);
    }
}

fn count_refused(cause: &'static str) {
    metrics::counter!("dsd_http_bodies_refused_total", "cause" => cause).increment(1);
}

#[derive(Debug)]
enum ReadFailure {
    TooLarge,
    Broken,
    Late,
    /// It holds room that others wait for, and does not go on.
    Stalled,
    NoRoom,
    /// The node goes down.
    Draining,
}

/// Sends an answer at once and keeps reading the request's body for a while before the connection
/// closes. A client that writes its whole request before it reads would otherwise see a reset.
pub(super) fn answer_then_drain(
    response: Response<Body>,
    announced: Announced,
    rest: Body,
) -> Response<Body> {
    if announced.waits_for_leave {
        return response;
    }
    let (mut head, answer) = response.into_parts();
    head.headers.insert(
        header::CONNECTION,
        header::HeaderValue::from_static("close"),
    );
    enum Stage {
        Answer(Body, Body),
        Drain(Body),
    }
    let frames = stream::unfold(Stage::Answer(answer, rest), async |stage| match stage {
        Stage::Answer(answer, rest) => {
            let bytes = answer
                .collect()
                .await
                .map(http_body_util::Collected::to_bytes)
                .unwrap_or_default();
            Some((Ok::<_, Infallible>(bytes), Stage::Drain(rest)))
        }
        Stage::Drain(mut rest) => {
            let drained = async {
                let mut n_drained = 0;
                while let Some(Ok(frame)) = rest.frame().await {
                    n_drained += frame.data_ref().map_or(0, |data| data.len());
                    if DRAIN_LEN_MAX < n_drained {
                        return;
                    }
                }
            };
            // Drained or not, the answer ends here.
            let _ = time::timeout(DRAIN_TIME_MAX, drained).await;
            None
        }
    });
    Response::from_parts(head, Body::from_stream(frames))
}
