//! Accepts connections and speaks HTTP/1.1 on them until told to stop.
//!
//! HTTP/1.1 only: no client of this API needs more without TLS, and guessing the version would wait
//! without limit for the first bytes of a silent client.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper::{
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::{
    refused_head,
    stage::{At, Stage, StageLimits},
    write_timeout::WriteTimeout,
};

/// Bytes of a request head, and of one read.
pub(super) const HEAD_LEN_MAX: usize = 64 * 1024;
/// Pause after a failed accept; the usual cause, too many open files, does not go away faster.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections beyond the limit that get one hurried request each, so that probes and people still
/// find the node when someone holds every place.
pub(super) const HURRIED_MAX: usize = 16;
/// Time for the head of a hurried request, and for it to begin.
const HURRIED_HEADER_TIMEOUT: Duration = Duration::from_secs(1);

/// Limits of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    pub(super) connections_max: usize,
    pub(super) stages: StageLimits,
    pub(super) write_timeout: Duration,
    pub(super) flush_timeout: Duration,
}

/// Serves until `closing`; then takes no more connections, lets answers be sent within the flush
/// time and cuts off the rest.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ConnectionLimits,
    closing: CancellationToken,
) {
    let places = Places {
        regular: Arc::new(Semaphore::new(limits.connections_max)),
        hurried: Arc::new(Semaphore::new(HURRIED_MAX)),
    };
    let mut connections = JoinSet::new();
    while let Some((stream, place)) = accept(&listener, &places, &closing).await {
        while let Some(ended) = connections.try_join_next() {
            report_panic(ended);
        }
        connections.spawn(connection(
            stream,
            place,
            router.clone(),
            limits,
            closing.clone(),
        ));
    }
    drop(listener);
    let flushed = time::timeout(limits.flush_timeout, async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    });
    if flushed.await.is_err() {
        warn!(
            n_connections = connections.len(),
            "clients that did not take their answers were cut off"
        );
        connections.shutdown().await;
    }
}

/// A handler that panics takes its connection with it and nothing else.
fn report_panic(ended: Result<(), JoinError>) {
    if let Err(e) = ended {
        error!(error = %e, "a connection's task broke off");
    }
}

/// Room for connections.
struct Places {
    regular: Arc<Semaphore>,
    hurried: Arc<Semaphore>,
}

/// A connection's place, given back when it ends.
struct Place {
    hurried: bool,
    _permit: OwnedSemaphorePermit,
}

impl Places {
    /// A regular place, or a hurried one while there are none.
    async fn next(&self) -> Option<Place> {
        let (permit, hurried) = select! {
            biased;
            permit = Arc::clone(&self.regular).acquire_owned() => (permit, false),
            permit = Arc::clone(&self.hurried).acquire_owned() => (permit, true),
        };
        // Fails only when closed, which nobody does.
        let _permit = permit.ok()?;
        Some(Place { hurried, _permit })
    }
}

/// The next connection and its place; `None` when the node closes.
async fn accept(
    listener: &TcpListener,
    places: &Places,
    closing: &CancellationToken,
) -> Option<(TcpStream, Place)> {
    let place = select! {
        () = closing.cancelled() => return None,
        place = places.next() => place?,
    };
    loop {
        select! {
            () = closing.cancelled() => return None,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => return Some((stream, place)),
                Err(e) => {
                    warn!(error = %e, "cannot accept a connection");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn connection(
    stream: TcpStream,
    place: Place,
    router: Router,
    limits: ConnectionLimits,
    closing: CancellationToken,
) {
    let _open = Open::new();
    let hurry = |limit: Duration| {
        if place.hurried {
            limit.min(HURRIED_HEADER_TIMEOUT)
        } else {
            limit
        }
    };
    let stages = StageLimits {
        idle: hurry(limits.stages.idle),
        head: hurry(limits.stages.head),
    };
    // Events are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let stream = WriteTimeout::new(stream, limits.write_timeout);
    let stage = Stage::new();
    let io = TokioIo::new(refused_head::Reader::new(stream, stage.clone()));
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request| {
        stage.request_began();
        let answering = router.call(request);
        let stage = stage.clone();
        async move {
            let answer = answering.await;
            answer.map(|answer| answer.map(|body| stage.until_end_of(body)))
        }
    });
    let mut connection = http1::Builder::new()
        // The stages have timers of their own.
        .header_read_timeout(None)
        .keep_alive(!place.hurried)
        .max_buf_size(HEAD_LEN_MAX)
        .serve_connection(io, service);
    let mut running = Pin::new(&mut connection);
    let ended = {
        let mut overstayed = pin!(stage.overstayed(stages));
        let mut closed = pin!(closing.cancelled());
        let mut is_closing = false;
        loop {
            select! {
                biased;
                ended = running.as_mut() => break Ok(ended),
                at = overstayed.as_mut() => break Err(at),
                () = closed.as_mut(), if !is_closing => {
                    is_closing = true;
                    running.as_mut().graceful_shutdown();
                }
            }
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(e)) => {
            debug!(error = %e, "connection ended");
            refused_head::answer(connection.into_parts().io.into_inner(), &e).await;
        }
        Err(At::Head) => {
            let stream = connection.into_parts().io.into_inner();
            refused_head::answer_late(stream, stages.head).await;
        }
        // Nobody waits for an answer.
        Err(At::Idle | At::Exchange) => {}
    }
}

/// Counts a connection while it is open.
struct Open;

impl Open {
    fn new() -> Self {
        metrics::gauge!("dsd_http_connections").increment(1.0);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        metrics::gauge!("dsd_http_connections").decrement(1.0);
    }
}
