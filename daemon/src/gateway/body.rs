//! Request bodies: read within a size and a time, or refused while they still arrive.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, Response, header},
};
use dsd_proto::code::Code;
use futures::stream;
use http_body_util::BodyExt;
use tokio::time;

use super::error::ApiError;

/// How long the rest of a refused body is read and thrown away, so that the client, still sending,
/// gets to read the answer instead of a reset connection.
pub(super) const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// Reads a body of at most `len_max` bytes within `timeout`. A failure is the answer to send.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Body,
    len_max: usize,
    timeout: Duration,
) -> Result<Bytes, Response<Body>> {
    let too_large = |found: String| {
        let message = format!("the body has {found} bytes, at most {len_max} are read");
        ApiError::new(Code::PayloadTooLarge, message).into_response()
    };
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if let Some(length) =
        length.filter(|length| u64::try_from(len_max).is_ok_and(|max| max < *length))
    {
        return Err(answer_then_drain(
            too_large(length.to_string()),
            headers,
            body,
        ));
    }
    let read = time::timeout(timeout, async {
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| ReadFailure::Broken)?.into_data() else {
                continue;
            };
            if len_max - bytes.len() < data.len() {
                return Err(ReadFailure::TooLarge);
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes)
    });
    match read.await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(ReadFailure::TooLarge)) => Err(answer_then_drain(
            too_large(format!("more than {len_max}")),
            headers,
            body,
        )),
        // The client is gone or its chunks are garbled; whoever still listens learns this.
        Ok(Err(ReadFailure::Broken)) => Err(ApiError::new(
            Code::InvalidRequest,
            "the body ended early or is garbled",
        )
        .into_response()),
        Err(_) => {
            let message = format!("the body did not arrive within {} s", timeout.as_secs_f32());
            let mut response = ApiError::new(Code::RequestTimeout, message).into_response();
            response.headers_mut().insert(
                header::CONNECTION,
                header::HeaderValue::from_static("close"),
            );
            Err(response)
        }
    }
}

enum ReadFailure {
    TooLarge,
    Broken,
}

/// Sends an answer at once and keeps reading the request's body for a while before the connection
/// closes. A client that writes its whole request before it reads would otherwise see a reset.
pub(super) fn answer_then_drain(
    response: Response<Body>,
    request: &HeaderMap,
    rest: Body,
) -> Response<Body> {
    // Such a client waits for permission to send and there is nothing to drain.
    if request.contains_key(header::EXPECT) {
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
            let drained = async { while let Some(Ok(_)) = rest.frame().await {} };
            // Drained or not, the answer ends here.
            let _ = time::timeout(DRAIN_TIME_MAX, drained).await;
            None
        }
    });
    Response::from_parts(head, Body::from_stream(frames))
}
