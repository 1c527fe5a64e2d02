//! Answers to heads that the HTTP reader does not take, in the shape of all other errors.
//!
//! The reader answers such heads by itself, with an empty body, or not at all. [`Reader`] holds back
//! those answers and remembers what happened; [`answer`] then says it properly.
//!
//! Invariant: an answer of ours with a status of 4xx has a body, which is how the reader's are told.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use dsd_proto::code::Code;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    time,
};

use super::{
    body::DRAIN_TIME_MAX,
    error::{ApiError, Dialect},
    serve::HEAD_LEN_MAX,
    stage::Stage,
};

/// A connection as the HTTP reader sees it.
pub(super) struct Reader<T> {
    inner: T,
    /// Status of the answer that was held back.
    refused: Option<u16>,
    /// Whether bytes came since something was last sent.
    is_inside_request: bool,
    stage: Stage,
}

/// Bytes of one read: one less than the HTTP reader's buffer at first, which grows for those who fill
/// it, up to 64 KiB. A thousand bodies that wait for room would take as many of them.
const READ_LEN_MAX: usize = 8 * 1024 - 1;

impl<T> Reader<T> {
    pub(super) fn new(inner: T, stage: Stage) -> Self {
        Self {
            inner,
            refused: None,
            is_inside_request: false,
            stage,
        }
    }

    /// What the client is to be told after the reader gave up with `error`, if anything.
    fn refusal(&self, error: &hyper::Error) -> Option<ApiError> {
        match self.refused {
            Some(414 | 431) => {
                let message = format!(
                    "the head is too large: more than {HEAD_LEN_MAX} bytes or 100 fields, or a \
                     content length beyond 64 bits"
                );
                Some(ApiError::new(Code::HeadTooLarge, message))
            }
            Some(_) => Some(not_http()),
            None if !self.is_inside_request => None,
            None => error.is_parse().then(not_http),
        }
    }
}

fn not_http() -> ApiError {
    let message = "this is no HTTP/1.1 request: its first line or a header field is malformed";
    ApiError::new(Code::InvalidRequest, message)
}

/// Answers a head that the reader refused with `error`. Does nothing for a connection that ended
/// otherwise.
pub(super) async fn answer<T: AsyncRead + AsyncWrite + Unpin>(
    connection: Reader<T>,
    error: &hyper::Error,
) {
    if let Some(refusal) = connection.refusal(error) {
        farewell(connection, &refusal).await;
    }
}

/// Answers a head that did not arrive in time.
pub(super) async fn answer_late<T: AsyncRead + AsyncWrite + Unpin>(
    connection: Reader<T>,
    header_timeout: Duration,
) {
    let seconds = header_timeout.as_secs_f32();
    let message = format!("the head did not arrive within {seconds} s");
    farewell(connection, &ApiError::new(Code::RequestTimeout, message)).await;
}

/// Sends a refusal as the last answer, and waits a while for the client to take it.
async fn farewell<T: AsyncRead + AsyncWrite + Unpin>(
    mut connection: Reader<T>,
    refusal: &ApiError,
) {
    let status = refusal.code.http_status();
    let body = refusal.json(Dialect::OpenAi);
    let reason = hyper::StatusCode::from_u16(status).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        reason.canonical_reason().unwrap_or("Refused"),
        body.len()
    );
    let io = &mut connection.inner;
    let farewell = async {
        io.write_all(answer.as_bytes()).await?;
        io.shutdown().await?;
        // Closing with unread bytes would reset the connection and take the answer along.
        let mut rest = [0; 4096];
        while 0 < io.read(&mut rest).await? {}
        Ok::<_, io::Error>(())
    };
    // The client may be gone or take nothing; either way the connection ends here.
    let _ = time::timeout(DRAIN_TIME_MAX, farewell).await;
}

/// The status of an answer without a body.
fn empty_refusal(head: &[u8]) -> Option<u16> {
    const CONTENT_LENGTH: &[u8] = b"\r\ncontent-length: 0\r\n";
    let status: &[u8; 3] = head.strip_prefix(b"HTTP/1.")?.get(2..)?.first_chunk()?;
    let is_empty = head
        .windows(CONTENT_LENGTH.len())
        .any(|window| window.eq_ignore_ascii_case(CONTENT_LENGTH));
    let is_refusal = status[0] == b'4' && is_empty && head.ends_with(b"\r\n\r\n");
    is_refusal.then(|| str::from_utf8(status).ok()?.parse().ok())?
}

impl<T: AsyncRead + Unpin> AsyncRead for Reader<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        ctx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = buf.remaining().min(READ_LEN_MAX);
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(len));
        let read = Pin::new(&mut self.inner).poll_read(ctx, &mut part);
        let n_read = part.filled().len();
        buf.advance(n_read);
        if 0 < n_read {
            self.is_inside_request = true;
            self.stage.bytes_came();
        }
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Reader<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        ctx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(status) = empty_refusal(buf) {
            self.refused = Some(status);
            return Poll::Ready(Ok(buf.len()));
        }
        self.is_inside_request = false;
        Pin::new(&mut self.inner).poll_write(ctx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        ctx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [head] = bufs {
            return self.poll_write(ctx, head);
        }
        self.is_inside_request = false;
        Pin::new(&mut self.inner).poll_write_vectored(ctx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(ctx);
        if let Poll::Ready(Ok(())) = flushed {
            self.stage.flushed();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.refused.is_some() {
            // The answer is still to come.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_shutdown(ctx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_refusals_without_a_body_are_held_back() {
        let head = |first: &str, len: usize| {
            format!("{first}\r\nconnection: close\r\ncontent-length: {len}\r\ndate: x\r\n\r\n")
        };
        let check = |text: &str, expected| assert_eq!(empty_refusal(text.as_bytes()), expected);
        check(&head("HTTP/1.1 431 Too Large", 0), Some(431));
        check(&head("HTTP/1.0 400 Bad Request", 0), Some(400));
        check(&head("HTTP/1.1 400 Bad Request", 10), None);
        check(&head("HTTP/1.1 200 OK", 0), None);
        check("HTTP/1.1 4", None);
        check("", None);
    }
}
