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
pub(super) const HURRIED_MAX: usize = 64;
/// Time for the head of a hurried request, and for it to begin. Whoever wants something has sent it by
/// then; silent clients that fill the system's queue of 128 are through in half a second.
const HURRIED_HEADER_TIMEOUT: Duration = Duration::from_millis(250);

/// Limits of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    pub(super) connections_max: usize,
    pub(super) stages: StageLimits,
    pub(super) write_timeout: Duration,
    pub(super) flush_timeout: Duration,
}

/// Serves until `closing`; then lets answers be sent within the flush time and cuts off the rest.
/// Until the last of them is out, whoever comes anew is still told that the node goes down.
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
    let take_all = async |connections: &mut JoinSet<()>, closing: &CancellationToken| {
        while let Some((stream, place)) = accept(&listener, &places).await {
            while let Some(ended) = connections.try_join_next() {
                report_panic(ended);
            }
            let (router, closing) = (router.clone(), closing.clone());
            connections.spawn(connection(stream, place, router, limits, closing));
        }
    };
    let mut connections = JoinSet::new();
    select! {
        () = closing.cancelled() => {}
        () = take_all(&mut connections, &closing) => {}
    }
    let ended = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    };
    let (mut late, until_the_end) = (JoinSet::new(), CancellationToken::new());
    let flushed = select! {
        flushed = time::timeout(limits.flush_timeout, ended) => flushed.is_ok(),
        () = take_all(&mut late, &until_the_end) => false,
    };
    if !flushed {
        warn!(
            n_connections = connections.len(),
            "connections that did not end within the flush time were cut off"
        );
    }
    connections.shutdown().await;
    late.shutdown().await;
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

    /// A regular place instead of a hurried one, where one came free since.
    fn better_than(&self, place: Place) -> Place {
        match Arc::clone(&self.regular).try_acquire_owned() {
            Ok(_permit) if place.hurried => Place {
                hurried: false,
                _permit,
            },
            _ => place,
        }
    }
}

/// The next connection and its place.
async fn accept(listener: &TcpListener, places: &Places) -> Option<(TcpStream, Place)> {
    let place = places.next().await?;
    let mut is_failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Some((stream, places.better_than(place))),
            Err(e) => {
                // Once for each time that it begins: it may go on for long.
                if !std::mem::replace(&mut is_failing, true) {
                    warn!(error = %e, "cannot accept a connection");
                }
                time::sleep(ACCEPT_PAUSE).await;
            }
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
        Err(At::Idle | At::Exchange | At::Sending) => {}
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
