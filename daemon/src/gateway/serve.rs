//! Accepts connections and speaks HTTP/1.1 on them until told to stop.
//!
//! HTTP/1.1 only: no client of this API needs more without TLS, and guessing the version would wait
//! without limit for the first bytes of a silent client.

use std::{pin::Pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::{refused_head, write_timeout::WriteTimeout};

/// Bytes of a request head, and of one read.
pub(super) const HEAD_LEN_MAX: usize = 64 * 1024;
/// Pause after a failed accept; the usual cause, too many open files, does not go away faster.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections beyond the limit that get one hurried request each, so that probes and people still
/// find the node when someone holds every place.
const HURRIED_MAX: usize = 16;
/// Time for the head of a hurried request.
const HURRIED_HEADER_TIMEOUT: Duration = Duration::from_secs(1);

/// Limits of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    pub(super) connections_max: usize,
    pub(super) header_timeout: Duration,
    pub(super) write_timeout: Duration,
    pub(super) drain_timeout: Duration,
}

/// Serves until `shutdown`; then takes no more connections, lets requests finish within the drain
/// time and cuts off the rest.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ConnectionLimits,
    shutdown: CancellationToken,
) {
    let places = Places {
        regular: Arc::new(Semaphore::new(limits.connections_max)),
        hurried: Arc::new(Semaphore::new(HURRIED_MAX)),
    };
    let mut connections = JoinSet::new();
    while let Some((stream, place)) = accept(&listener, &places, &shutdown).await {
        while let Some(ended) = connections.try_join_next() {
            report_panic(ended);
        }
        connections.spawn(connection(
            stream,
            place,
            router.clone(),
            limits,
            shutdown.clone(),
        ));
    }
    drop(listener);
    let drained = time::timeout(limits.drain_timeout, async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    });
    if drained.await.is_err() {
        warn!(
            n_connections = connections.len(),
            "requests were cut off at the end of the drain time"
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

/// The next connection and its place; `None` on shutdown.
async fn accept(
    listener: &TcpListener,
    places: &Places,
    shutdown: &CancellationToken,
) -> Option<(TcpStream, Place)> {
    let place = select! {
        () = shutdown.cancelled() => return None,
        place = places.next() => place?,
    };
    loop {
        select! {
            () = shutdown.cancelled() => return None,
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
    shutdown: CancellationToken,
) {
    let _open = Open::new();
    let header_timeout = if place.hurried {
        limits.header_timeout.min(HURRIED_HEADER_TIMEOUT)
    } else {
        limits.header_timeout
    };
    // Events are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let stream = WriteTimeout::new(stream, limits.write_timeout);
    let io = TokioIo::new(refused_head::Reader::new(stream));
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .keep_alive(!place.hurried)
        .max_buf_size(HEAD_LEN_MAX)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut running = Pin::new(&mut connection);
    let ended = select! {
        ended = running.as_mut() => ended,
        () = shutdown.cancelled() => {
            running.as_mut().graceful_shutdown();
            running.await
        }
    };
    if let Err(e) = ended {
        debug!(error = %e, "connection ended");
        let stream = connection.into_parts().io.into_inner();
        refused_head::answer(stream, &e, header_timeout).await;
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
