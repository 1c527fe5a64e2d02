//! Accepts connections and calls, and hands requests to an [`AdminService`].
//!
//! One stream is one call. What a peer does wrong ends its stream, at worst its connection. Places
//! for connections are for peers whose certificate was found good; handshakes have their own, few.
//!
//! Invariant: handshakes, connections, calls per connection and every wait are bounded; all tasks
//! belong to the server and are gone when [`Server::run`] returns.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{
    Connecting, Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream,
    TokioRuntime, VarInt,
};
use rustls_pki_types::CertificateDer;
use tokio::{
    sync::{oneshot, watch},
    task::{self, JoinError, JoinSet},
    time::{sleep, timeout},
};
use tracing::{debug, error, info};

use crate::{
    code::Code,
    ids::{ClusterName, Epoch},
    quic::{
        endpoint::{self, TlsError},
        half_open::HalfOpen,
        identity::{Identity, PeerName, Role},
        service::{AdminService, Call, ReplySender},
        stream::{self, CODE_CANCELLED, CODE_FORBIDDEN, CODE_FULL, CODE_SHUTDOWN, ReadFrameError},
    },
    wire::{
        FrameError, Kind, Message,
        admin::{
            ErrorReply, ModelListRequest, ModelLoadRequest, ModelUnloadRequest, ModelVerifyRequest,
            StatusRequest, TenantAddRequest, TenantListRequest, TenantRemoveRequest,
            TenantRotateKeyRequest, TenantSetRequest, TenantShowRequest,
        },
        frame::{self, Header},
        generate::GenerateRequest,
    },
};

/// Everything a node may be asked.
const CALLS_ADMIN: &[Kind] = &[
    Kind::of::<StatusRequest>(),
    Kind::of::<GenerateRequest>(),
    Kind::of::<ModelListRequest>(),
    Kind::of::<ModelLoadRequest>(),
    Kind::of::<ModelUnloadRequest>(),
    Kind::of::<ModelVerifyRequest>(),
    Kind::of::<TenantListRequest>(),
    Kind::of::<TenantShowRequest>(),
    Kind::of::<TenantAddRequest>(),
    Kind::of::<TenantSetRequest>(),
    Kind::of::<TenantRotateKeyRequest>(),
    Kind::of::<TenantRemoveRequest>(),
];

/// What a node may ask another one.
const CALLS_NODE: &[Kind] = &[Kind::of::<StatusRequest>(), Kind::of::<GenerateRequest>()];

/// Bounds of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections of peers that have proved who they are.
    pub connections_max: usize,
    /// Handshakes under way. A newcomer takes the place of the one that has been silent longest.
    pub handshakes_max: usize,
    /// Of them from one address (IPv6: one /64 network).
    pub handshakes_per_address_max: usize,
    /// Calls that run at once on one connection.
    pub calls_max: u32,
    /// For a handshake.
    pub handshake_timeout: Duration,
    /// From the opening of a stream to the end of its request.
    pub request_timeout: Duration,
    /// For a reader that does not read.
    pub write_timeout: Duration,
    /// For running calls when the server goes down.
    pub drain_timeout: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            // At the 1,000 a second that one core has been seen to take from silent ones of one
            // address, a newcomer stays for 190 ms, on a loaded machine dozens of times what a real
            // handshake takes. The rest of the places is for other addresses.
            handshakes_max: 256,
            handshakes_per_address_max: 192,
            calls_max: 64,
            handshake_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(3),
            write_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// Why a server cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The identity is of someone who may not serve.
    #[error("{found} may not serve, only a node may")]
    NotANode {
        /// Whose identity it is.
        found: String,
    },
    /// The identity cannot be put to use.
    #[error("cannot set up TLS")]
    Tls(#[source] TlsError),
    /// The socket cannot be driven.
    #[error("cannot serve on the UDP socket")]
    Socket(#[source] std::io::Error),
}

/// Handshakes under way above which an address has to prove itself first, so that forged ones take
/// no places: more than a handful at once is no ordinary day.
const HANDSHAKES_BEFORE_RETRY: usize = 8;
/// How often the log says what became of handshakes that failed, at most.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(10);

/// The accepting end.
#[derive(Debug)]
pub struct Server<S> {
    endpoint: Endpoint,
    config: quinn::ServerConfig,
    identity_tx: watch::Sender<Identity>,
    identity_rx: watch::Receiver<Identity>,
    shared: Arc<Shared<S>>,
}

/// Gives a running server a renewed certificate.
#[derive(Debug, Clone)]
pub struct IdentityHandle(watch::Sender<Identity>);

impl IdentityHandle {
    /// From now on the server shows this identity to new connections; those that are open go on.
    ///
    /// # Errors
    /// [`ServerError`]; the server keeps what it has.
    pub fn replace(&self, identity: Identity) -> Result<(), ServerError> {
        check_role(&identity)?;
        endpoint::server_crypto(&identity).map_err(ServerError::Tls)?;
        // A server that has ended needs none.
        let _ended = self.0.send(identity);
        Ok(())
    }
}

fn check_role(identity: &Identity) -> Result<(), ServerError> {
    match identity.name().role {
        Role::Node => Ok(()),
        Role::Admin => Err(ServerError::NotANode {
            found: identity.name().to_string(),
        }),
    }
}

/// Handshakes that came to nothing since the log last said so.
#[derive(Debug, Default)]
struct Troubles {
    n_displaced: u64,
    n_failed: u64,
    n_refused: u64,
    last_peer: Option<SocketAddr>,
}

impl Troubles {
    fn report(&mut self) {
        let Self {
            n_displaced,
            n_failed,
            n_refused,
            last_peer,
        } = std::mem::take(self);
        if let Some(peer) = last_peer {
            info!(
                %peer,
                n_displaced, n_failed, n_refused, "handshakes came to nothing"
            );
        }
    }
}

#[derive(Debug)]
struct Shared<S> {
    service: S,
    cluster: ClusterName,
    limits: ServerLimits,
}

impl<S: AdminService> Server<S> {
    /// Takes a bound socket. Must be called on a tokio runtime; nothing is accepted before
    /// [`Server::run`].
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn new(
        socket: UdpSocket,
        identity: &Identity,
        service: S,
        limits: ServerLimits,
    ) -> Result<Self, ServerError> {
        check_role(identity)?;
        let config =
            endpoint::server_config(identity, limits.calls_max).map_err(ServerError::Tls)?;
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new(
            endpoint::endpoint_config(),
            Some(config.clone()),
            socket,
            runtime,
        )
        .map_err(ServerError::Socket)?;
        let cluster = identity.name().cluster.clone();
        let (identity_tx, identity_rx) = watch::channel(identity.clone());
        Ok(Self {
            endpoint,
            config,
            identity_tx,
            identity_rx,
            shared: Arc::new(Shared {
                service,
                cluster,
                limits,
            }),
        })
    }

    /// The way to renew the certificate while the server runs.
    pub fn identity_handle(&self) -> IdentityHandle {
        IdentityHandle(self.identity_tx.clone())
    }

    /// Where the server can be reached.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `shutdown` completes, then lets running calls end within the drain time.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let (stop_tx, stop_rx) = watch::channel(false);
        let limits = self.shared.limits;
        let mut half_open = HalfOpen::new(limits.handshakes_max, limits.handshakes_per_address_max);
        let mut handshakes = JoinSet::<(SocketAddr, Result<Connection, HandshakeError>)>::new();
        let mut connections = JoinSet::new();
        let mut troubles = Troubles::default();
        let mut report = tokio::time::interval(TROUBLE_INTERVAL);
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(ended) = connections.join_next() => report_panic(ended),
                Some(ended) = handshakes.join_next_with_id() => {
                    let id = match &ended {
                        Ok((id, _)) => *id,
                        Err(error) => error.id(),
                    };
                    half_open.remove(&Handshake(id, None));
                    match ended {
                        Ok((_, (_, Ok(connection)))) => {
                            if limits.connections_max <= connections.len() {
                                troubles.n_refused += 1;
                                troubles.last_peer = Some(connection.remote_address());
                                let reason = b"the limit of connections is reached";
                                connection.close(VarInt::from_u32(CODE_FULL), reason);
                                continue;
                            }
                            let shared = Arc::clone(&self.shared);
                            let stop = stop_rx.clone();
                            connections.spawn(serve_connection(connection, shared, stop));
                        }
                        Ok((_, (peer, Err(error)))) => {
                            debug!(%peer, %error, "handshake failed");
                            troubles.last_peer = Some(peer);
                            match error {
                                HandshakeError::Displaced => troubles.n_displaced += 1,
                                HandshakeError::TimedOut | HandshakeError::Connection(_) => {
                                    troubles.n_failed += 1;
                                }
                            }
                        }
                        Err(error) => report_panic(Err(error)),
                    }
                }
                incoming = self.endpoint.accept() => {
                    let Some(incoming) = incoming else { break };
                    let peer = incoming.remote_address();
                    if limits.connections_max <= connections.len() {
                        troubles.n_refused += 1;
                        troubles.last_peer = Some(peer);
                        incoming.refuse();
                        continue;
                    }
                    let is_crowded = HANDSHAKES_BEFORE_RETRY <= half_open.len()
                        || limits.connections_max / 2 <= connections.len();
                    let Some(connecting) = accept(incoming, is_crowded) else { continue };
                    if let Some(Handshake(_, Some(displaced))) = half_open.make_room(peer.ip()) {
                        // Where nobody listens it was over just now.
                        let _over = displaced.send(());
                    }
                    let (displace, displaced) = oneshot::channel();
                    let wait = limits.handshake_timeout;
                    let task = handshakes.spawn(shake_hands(connecting, wait, displaced));
                    half_open.push(peer.ip(), Handshake(task.id(), Some(displace)));
                }
                Ok(()) = self.identity_rx.changed() => self.take_identity(),
                _ = report.tick() => troubles.report(),
            }
        }
        self.endpoint.set_server_config(None);
        handshakes.shutdown().await;
        // Refused only if no connection is left to hear it.
        let _all_gone = stop_tx.send(true);
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
        self.endpoint
            .close(VarInt::from_u32(CODE_SHUTDOWN), b"shutting down");
        // Gives the close a moment to be heard; a lost one costs the peer its idle timeout.
        let _heard = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }

    /// Everything but the certificate stays, the key of retry tokens above all: a handshake whose
    /// token was made with another one would fail.
    fn take_identity(&mut self) {
        let identity = self.identity_rx.borrow_and_update().clone();
        match endpoint::server_crypto(&identity) {
            Ok(crypto) => {
                self.config.crypto = crypto;
                self.endpoint.set_server_config(Some(self.config.clone()));
                info!(name = %identity.name(), "certificate replaced");
            }
            Err(error) => error!(%error, "a renewed certificate is of no use"),
        }
    }
}

/// A handshake under way; equal are two of one task.
#[derive(Debug)]
struct Handshake(task::Id, Option<oneshot::Sender<()>>);

impl PartialEq for Handshake {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

/// Goes on with the handshake, unless the address has to prove itself first.
fn accept(incoming: Incoming, is_crowded: bool) -> Option<Connecting> {
    let peer = incoming.remote_address();
    if is_crowded && !incoming.remote_address_validated() && incoming.may_retry() {
        if let Err(error) = incoming.retry() {
            debug!(%peer, %error, "cannot ask for a retry");
        }
        return None;
    }
    match incoming.accept() {
        Ok(connecting) => Some(connecting),
        Err(error) => {
            debug!(%peer, %error, "connection refused");
            None
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("it made room for another one")]
    Displaced,
    #[error("it took too long")]
    TimedOut,
    #[error(transparent)]
    Connection(ConnectionError),
}

async fn shake_hands(
    connecting: Connecting,
    wait: Duration,
    displaced: oneshot::Receiver<()>,
) -> (SocketAddr, Result<Connection, HandshakeError>) {
    let peer = connecting.remote_address();
    let outcome = tokio::select! {
        // In this order because a handshake that is over is not given up.
        biased;
        connected = connecting => connected.map_err(HandshakeError::Connection),
        Ok(()) = displaced => Err(HandshakeError::Displaced),
        () = sleep(wait) => Err(HandshakeError::TimedOut),
    };
    (peer, outcome)
}

async fn serve_connection<S: AdminService>(
    connection: Connection,
    shared: Arc<Shared<S>>,
    mut stop: watch::Receiver<bool>,
) {
    let address = connection.remote_address();
    let peer = match peer_name(&connection) {
        Some(peer) if peer.cluster == shared.cluster => peer,
        found => {
            info!(peer = %address, ?found, "certificate names no member of this cluster");
            connection.close(
                VarInt::from_u32(CODE_FORBIDDEN),
                b"not a member of this cluster",
            );
            return;
        }
    };
    debug!(%peer, %address, "connected");
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            accepted = connection.accept_bi() => match accepted {
                Ok((send, recv)) => {
                    let shared = Arc::clone(&shared);
                    let role = peer.role;
                    calls.spawn(async move { serve_call(send, recv, role, &shared).await });
                }
                // Dropping the set drops the calls.
                Err(error) => {
                    debug!(%address, %error, "connection ended");
                    return;
                }
            },
            Some(ended) = calls.join_next() => report_panic(ended),
            _ = stop.changed() => break,
        }
    }
    let drained = timeout(shared.limits.drain_timeout, async {
        while let Some(ended) = calls.join_next().await {
            report_panic(ended);
        }
    });
    if drained.await.is_err() {
        info!(%address, n_calls = calls.len(), "calls were cut off at the drain limit");
    }
    connection.close(VarInt::from_u32(CODE_SHUTDOWN), b"shutting down");
}

/// Who the handshake proved the peer to be.
pub(super) fn peer_name(connection: &Connection) -> Option<PeerName> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    PeerName::of_certificate(chain.first()?)
}

async fn serve_call<S: AdminService>(
    mut send: SendStream,
    mut recv: RecvStream,
    role: Role,
    shared: &Shared<S>,
) {
    let read = timeout(shared.limits.request_timeout, read_request(&mut recv, role)).await;
    let (header, body) = match read {
        Ok(Ok(request)) => request,
        Ok(Err(Some(error))) => {
            return send_last(&mut send, Err::<ErrorReply, _>(error), shared).await;
        }
        // Nobody is there to be answered.
        Ok(Err(None)) => return,
        Err(_) => {
            let message = format!(
                "no whole request within {} ms",
                shared.limits.request_timeout.as_millis()
            );
            let error = ErrorReply::new(Code::RequestTimeout, message);
            return send_last(&mut send, Err::<ErrorReply, _>(error), shared).await;
        }
    };
    let stopped = send.stopped();
    let served = tokio::select! {
        // In this order because the arrival of the last byte also completes `stopped`.
        biased;
        () = dispatch(&header, &body, &mut send, shared) => true,
        _ = stopped => false,
    };
    if !served {
        debug!(type_id = header.type_id, "call cancelled by its caller");
        let _already_closed = send.reset(VarInt::from_u32(CODE_CANCELLED));
    }
}

/// The request of a call; `Err(None)` when the caller is gone.
async fn read_request(
    recv: &mut RecvStream,
    role: Role,
) -> Result<(Header, Vec<u8>), Option<ErrorReply>> {
    let refusal = |error: ReadFrameError| match error {
        ReadFrameError::Frame(error) => Some(ErrorReply::new(error.code(), error.to_string())),
        ReadFrameError::Reset | ReadFrameError::Connection(_) => None,
    };
    let (header, body) = stream::read_frame(recv, CALLS_ADMIN)
        .await
        .map_err(refusal)?
        .ok_or_else(|| {
            Some(ErrorReply::new(
                Code::BadFrame,
                "the stream holds no request",
            ))
        })?;
    stream::read_end(recv).await.map_err(refusal)?;
    let allowed = match role {
        Role::Admin => CALLS_ADMIN,
        Role::Node => CALLS_NODE,
    };
    if header.kind(allowed).is_err() {
        let message = format!("the role {role} may not send this message");
        return Err(Some(ErrorReply::new(Code::Forbidden, message)));
    }
    Ok((header, body))
}

async fn dispatch<S: AdminService>(
    header: &Header,
    body: &[u8],
    send: &mut SendStream,
    shared: &Shared<S>,
) {
    let service = &shared.service;
    let wait = shared.limits.write_timeout;
    match header.type_id {
        StatusRequest::TYPE => {
            let reply = match request::<StatusRequest>(header, body) {
                Ok(StatusRequest {}) => service.status().await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        ModelListRequest::TYPE => {
            let reply = match request::<ModelListRequest>(header, body) {
                Ok(ModelListRequest {}) => service.model_list().await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        ModelUnloadRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => service.model_unload(request).await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        ModelLoadRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => {
                    service
                        .model_load(request, &mut ReplySender::new(send, wait))
                        .await
                }
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        ModelVerifyRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => {
                    service
                        .model_verify(request, &mut ReplySender::new(send, wait))
                        .await
                }
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        TenantListRequest::TYPE => {
            let reply = match request::<TenantListRequest>(header, body) {
                Ok(TenantListRequest {}) => service.tenant_list().await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        TenantShowRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => service.tenant_show(request).await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        TenantAddRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => service.tenant_add(request).await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        TenantSetRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => service.tenant_set(request).await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        TenantRotateKeyRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => service.tenant_rotate_key(request).await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        TenantRemoveRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => service.tenant_remove(request).await,
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        GenerateRequest::TYPE => {
            let reply = match request(header, body) {
                Ok(request) => {
                    service
                        .generate(request, &mut ReplySender::new(send, wait))
                        .await
                }
                Err(error) => Err(error),
            };
            send_last(send, reply, shared).await;
        }
        found => {
            let error = FrameError::UnknownType { found };
            let error = ErrorReply::new(error.code(), error.to_string());
            send_last(send, Err::<ErrorReply, _>(error), shared).await;
        }
    }
}

fn request<C: Call>(header: &Header, body: &[u8]) -> Result<C, ErrorReply> {
    frame::decode_body(header, body)
        .map_err(|error| ErrorReply::new(error.code(), error.to_string()))
}

/// Sends the frame that ends a call and waits until it has arrived, so that the connection is not
/// closed over its head.
async fn send_last<M: Message, S>(
    send: &mut SendStream,
    reply: Result<M, ErrorReply>,
    shared: &Shared<S>,
) {
    let encoded = match &reply {
        Ok(message) => frame::encode(message, Epoch::default()),
        Err(error) => frame::encode(error, Epoch::default()),
    };
    let bytes = match encoded {
        Ok(bytes) => bytes,
        Err(error) => {
            error!(message = M::NAME, %error, "cannot encode a reply");
            let _already_closed = send.reset(VarInt::from_u32(CODE_CANCELLED));
            return;
        }
    };
    let arrived = timeout(shared.limits.write_timeout, async {
        if send.write_all(&bytes).await.is_ok() && send.finish().is_ok() {
            let _arrived_or_gone = send.stopped().await;
        }
    });
    if arrived.await.is_err() {
        let _already_closed = send.reset(VarInt::from_u32(CODE_CANCELLED));
    }
}

fn report_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a task of the server broke off");
    }
}
