//! Where a connection is between its requests and answers, and until when it may stay there.
//!
//! An idle connection and a head on its way have limits of their own; while a request is read and
//! answered, others watch the time.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio::time;

use crate::runtime::clock;

/// How long a connection may stay in a stage.
#[derive(Debug, Clone, Copy)]
pub(super) struct StageLimits {
    /// Without a byte of a next request.
    pub(super) idle: Duration,
    /// From the first byte of a head to its last.
    pub(super) head: Duration,
}

/// The stage of a connection. Clones share it; all belong to the connection's task.
#[derive(Debug, Clone)]
pub(super) struct Stage(Arc<Mutex<(At, Instant)>>);

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// Nothing has come since the last answer.
    Idle,
    /// A head has begun.
    Head,
    /// A request is being read or answered.
    Exchange,
    /// The answer is complete, and some of it may wait for the client to take it.
    Sending,
}

impl Stage {
    /// A connection that has just been accepted.
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new((At::Idle, clock::now()))))
    }

    /// Bytes came; they begin a head unless one is known already.
    pub(super) fn bytes_came(&self) {
        if self.now().0 == At::Idle {
            self.enter(At::Head);
        }
    }

    /// A head is complete.
    pub(super) fn request_began(&self) {
        self.enter(At::Exchange);
    }

    /// All that was to be sent is. An answer still waiting to be taken is not the client's idling.
    pub(super) fn flushed(&self) {
        if self.now().0 == At::Sending {
            self.enter(At::Idle);
        }
    }

    /// The answer whose body this becomes ends the exchange.
    pub(super) fn until_end_of(&self, body: Body) -> AnswerBody {
        AnswerBody {
            body,
            stage: self.clone(),
        }
    }

    /// Waits until a stage has lasted too long, and names it. To be polled whenever the connection
    /// has been: only it changes the stage.
    pub(super) async fn overstayed(&self, limits: StageLimits) -> At {
        let mut timer: Option<(Instant, Pin<Box<time::Sleep>>)> = None;
        poll_fn(move |ctx| {
            let (at, since) = self.now();
            let limit = match at {
                At::Idle => limits.idle,
                At::Head => limits.head,
                At::Exchange | At::Sending => {
                    timer = None;
                    return Poll::Pending;
                }
            };
            let deadline = since + limit;
            let (set_to, sleep) = timer.get_or_insert_with(|| {
                let sleep = time::sleep_until(deadline.into());
                (deadline, Box::pin(sleep))
            });
            if *set_to != deadline {
                *set_to = deadline;
                sleep.as_mut().reset(deadline.into());
            }
            sleep.as_mut().poll(ctx).map(|()| at)
        })
        .await
    }

    fn now(&self) -> (At, Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, at: At) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (at, clock::now());
    }
}

/// The body of an answer; with its end only the sending is left.
#[derive(Debug)]
pub(super) struct AnswerBody {
    body: Body,
    stage: Stage,
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.stage.enter(At::Sending);
    }
}

impl hyper::body::Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        ctx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(ctx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_stage_has_its_own_limit_and_an_exchange_has_none() {
        let limits = StageLimits {
            idle: Duration::from_millis(60),
            head: Duration::from_millis(20),
        };
        let stage = Stage::new();
        assert_eq!(stage.overstayed(limits).await, At::Idle);
        stage.bytes_came();
        let began = stage.now();
        stage.bytes_came();
        assert_eq!(stage.now(), began, "further bytes buy no time");
        assert_eq!(stage.overstayed(limits).await, At::Head);
        stage.request_began();
        stage.bytes_came();
        let body = stage.until_end_of(Body::empty());
        let patience = Duration::from_millis(200);
        time::timeout(patience, stage.overstayed(limits))
            .await
            .expect_err("an exchange is not this module's to end");
        drop(body);
        time::timeout(patience, stage.overstayed(limits))
            .await
            .expect_err("the client may still be taking the answer");
        stage.flushed();
        assert_eq!(stage.overstayed(limits).await, At::Idle);
    }
}
