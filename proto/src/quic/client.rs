//! Calls a node.
//!
//! Dropping a call's future or stream cancels the call on the node.

use std::{
    io,
    marker::PhantomData,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{
    ConnectError, Connection, ConnectionError, Endpoint, RecvStream, TokioRuntime,
    TransportErrorCode, VarInt, WriteError,
};
use tokio::time::{sleep, timeout};

use crate::{
    ids::Epoch,
    quic::{
        endpoint::{self, TlsError},
        identity::{Identity, PeerName, Role},
        pki::NODE_DNS_NAME,
        server,
        service::{Call, StreamCall},
        stream::{self, CODE_CANCELLED, ReadFrameError},
    },
    wire::{
        FrameError, Header, Kind, Message,
        admin::ErrorReply,
        frame::{self},
    },
};

/// Why a call has no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No local socket.
    #[error("cannot open a UDP socket")]
    Socket(#[source] io::Error),
    /// The identity cannot be put to use.
    #[error("cannot set up TLS")]
    Tls(#[source] TlsError),
    /// The address is not one that can be connected to.
    #[error("cannot connect to {address}")]
    BadAddress {
        /// The node's address.
        address: SocketAddr,
        /// The library's word.
        #[source]
        source: ConnectError,
    },
    /// Nothing answers.
    #[error("no node answers at {address}")]
    Unreachable {
        /// The node's address.
        address: SocketAddr,
    },
    /// Something answers, but it is not a node under our CA.
    #[error("{address} is not a node of this cluster: {reason}")]
    Untrusted {
        /// The node's address.
        address: SocketAddr,
        /// What is wrong with it.
        reason: String,
    },
    /// The node does not accept our certificate, or speaks another protocol.
    #[error("the node at {address} refused the connection: {reason}")]
    Refused {
        /// The node's address.
        address: SocketAddr,
        /// What it said.
        reason: String,
    },
    /// The connection was lost, or closed by the node.
    #[error("the connection to {address} was lost: {reason}")]
    Lost {
        /// The node's address.
        address: SocketAddr,
        /// What is known.
        reason: String,
    },
    /// The call took longer than its deadline.
    #[error("no reply within {} ms", after.as_millis())]
    TimedOut {
        /// The deadline.
        after: Duration,
    },
    /// The node ended the call without a reply.
    #[error("the node broke off the call")]
    BrokenOff,
    /// Either end speaks a frame that the other does not take.
    #[error("frame refused")]
    Frame(#[source] FrameError),
    /// The node answered with an error.
    #[error("{}: {}", .0.code(), .0.message)]
    Answered(ErrorReply),
}

/// How often we look whether the node has confirmed the handshake, which takes it about 1 ms.
const CONFIRMED_POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Before a handshake that lost its place is begun again: a few times what a whole one takes.
const DISPLACED_PAUSE: Duration = Duration::from_millis(20);

/// A connection to one node.
#[derive(Debug)]
pub struct Client {
    endpoint: Endpoint,
    connection: Connection,
    address: SocketAddr,
    node: PeerName,
}

impl Client {
    /// Connects to the node at `address` and makes sure that it is one of `identity`'s cluster.
    ///
    /// A node that drops us in the middle of the handshake, because it has more of them under way
    /// than it likes, is asked again until the deadline.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect(
        address: SocketAddr,
        identity: &Identity,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        let config = endpoint::client_config(identity).map_err(ClientError::Tls)?;
        Self::connect_with(address, identity, config, deadline).await
    }

    pub(super) async fn connect_with(
        address: SocketAddr,
        identity: &Identity,
        config: quinn::ClientConfig,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        let local: IpAddr = match address {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((local, 0)).map_err(ClientError::Socket)?;
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new(endpoint::endpoint_config(), None, socket, runtime)
            .map_err(ClientError::Socket)?;
        let shake_hands = async {
            loop {
                let connecting = endpoint
                    .connect_with(config.clone(), address, NODE_DNS_NAME)
                    .map_err(|source| ClientError::BadAddress { address, source })?;
                let outcome = match connecting.await {
                    Ok(connection) => confirmed(&connection).await.map(|()| connection),
                    Err(error) => Err(error),
                };
                match outcome {
                    Ok(connection) => return Ok(connection),
                    Err(error) if is_displaced(&error) => sleep(DISPLACED_PAUSE).await,
                    Err(ConnectionError::TimedOut) => {
                        return Err(ClientError::Unreachable { address });
                    }
                    Err(error) => return Err(connect_error(address, error)),
                }
            }
        };
        let connection = timeout(deadline, shake_hands)
            .await
            .unwrap_or(Err(ClientError::Unreachable { address }))?;
        match server::peer_name(&connection) {
            Some(node) if node.role == Role::Node && node.cluster == identity.name().cluster => {
                Ok(Self {
                    endpoint,
                    connection,
                    address,
                    node,
                })
            }
            found => {
                connection.close(VarInt::from_u32(CODE_CANCELLED), b"not the expected node");
                let found = found.map_or_else(|| "nobody".to_owned(), |name| name.to_string());
                let reason = format!("its certificate names {found}");
                Err(ClientError::Untrusted { address, reason })
            }
        }
    }

    /// Who answers.
    pub fn node(&self) -> &PeerName {
        &self.node
    }

    /// Makes a call and waits for its reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn call<C: Call>(
        &self,
        request: &C,
        deadline: Duration,
    ) -> Result<C::Reply, ClientError> {
        let welcome = [Kind::of::<C::Reply>(), Kind::of::<ErrorReply>()];
        let exchange = async {
            let mut recv = self.open(request).await?;
            let (header, body) = self.read(&mut recv, &welcome).await?;
            let reply = answer(&header, &body)?;
            // Nothing follows a reply; reading the end keeps quinn from cancelling what is done.
            stream::read_end(&mut recv)
                .await
                .map_err(|e| self.read_error(e))?;
            Ok(reply)
        };
        timeout(deadline, exchange)
            .await
            .map_err(|_| ClientError::TimedOut { after: deadline })?
    }

    /// Makes a call whose reply is preceded by other frames. `deadline` is for the request to be
    /// taken; how long a frame may take is the caller's to say in [`ReplyStream::next`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stream<C: StreamCall>(
        &self,
        request: &C,
        deadline: Duration,
    ) -> Result<ReplyStream<'_, C>, ClientError> {
        let recv = timeout(deadline, self.open(request))
            .await
            .map_err(|_| ClientError::TimedOut { after: deadline })??;
        Ok(ReplyStream {
            client: self,
            recv,
            is_done: false,
            call: PhantomData,
        })
    }

    /// Tells the node that nothing more comes. Calls still running are cancelled.
    pub async fn close(self) {
        self.connection.close(VarInt::from_u32(0), b"done");
        let _heard = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }

    /// The connection itself, for tests that misbehave on it.
    #[cfg(test)]
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Sends a request on a stream of its own and returns the way back.
    async fn open<C: Call>(&self, request: &C) -> Result<RecvStream, ClientError> {
        let bytes = frame::encode(request, Epoch::default()).map_err(ClientError::Frame)?;
        let (mut send, recv) = self
            .connection
            .open_bi()
            .await
            .map_err(|e| self.connection_error(e))?;
        match send.write_all(&bytes).await {
            Ok(()) => {
                // Already stopped by a node that answers without reading on; its answer counts.
                let _stopped = send.finish();
            }
            Err(WriteError::ConnectionLost(e)) => return Err(self.connection_error(e)),
            // The node stopped reading; its answer says why.
            Err(WriteError::Stopped(_)) => {}
            Err(WriteError::ClosedStream | WriteError::ZeroRttRejected) => {
                return Err(ClientError::BrokenOff);
            }
        }
        Ok(recv)
    }

    async fn read(
        &self,
        recv: &mut RecvStream,
        welcome: &[Kind],
    ) -> Result<(Header, Vec<u8>), ClientError> {
        stream::read_frame(recv, welcome)
            .await
            .map_err(|e| self.read_error(e))?
            .ok_or(ClientError::BrokenOff)
    }

    fn read_error(&self, error: ReadFrameError) -> ClientError {
        match error {
            ReadFrameError::Frame(e) => ClientError::Frame(e),
            ReadFrameError::Reset => ClientError::BrokenOff,
            ReadFrameError::Connection(e) => self.connection_error(e),
        }
    }

    fn connection_error(&self, error: ConnectionError) -> ClientError {
        connect_error(self.address, error)
    }
}

/// What a streamed call yields.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<Item, Reply> {
    /// More follows.
    Item(Item),
    /// Nothing follows.
    Reply(Reply),
}

/// The frames of a streamed call, in order. Dropping it cancels the call.
#[derive(Debug)]
pub struct ReplyStream<'c, C> {
    client: &'c Client,
    recv: RecvStream,
    is_done: bool,
    call: PhantomData<fn(C)>,
}

impl<C: StreamCall> ReplyStream<'_, C> {
    /// The next frame, or `None` after the reply. A future that is dropped before it is done may
    /// leave half a frame behind; the stream is of no use then but to be dropped as well.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::TimedOut`] when nothing came for `deadline`.
    pub async fn next(
        &mut self,
        deadline: Duration,
    ) -> Result<Option<Event<C::Item, C::Reply>>, ClientError> {
        if self.is_done {
            return Ok(None);
        }
        let welcome = [
            Kind::of::<C::Item>(),
            Kind::of::<C::Reply>(),
            Kind::of::<ErrorReply>(),
        ];
        let (header, body) = timeout(deadline, self.client.read(&mut self.recv, &welcome))
            .await
            .map_err(|_| ClientError::TimedOut { after: deadline })??;
        if header.type_id == C::Item::TYPE {
            let item = frame::decode_body(&header, &body).map_err(ClientError::Frame)?;
            return Ok(Some(Event::Item(item)));
        }
        self.is_done = true;
        let reply = answer(&header, &body)?;
        let end = stream::read_end(&mut self.recv);
        timeout(deadline, end)
            .await
            .map_err(|_| ClientError::TimedOut { after: deadline })?
            .map_err(|e| self.client.read_error(e))?;
        Ok(Some(Event::Reply(reply)))
    }

    /// Cancels the call; the same as dropping the stream.
    pub fn cancel(mut self) {
        let _already_ended = self.recv.stop(VarInt::from_u32(CODE_CANCELLED));
    }
}

/// The last frame of a call: its reply or the node's error.
fn answer<M: Message>(header: &Header, body: &[u8]) -> Result<M, ClientError> {
    if header.type_id == ErrorReply::TYPE {
        let error = frame::decode_body(header, body).map_err(ClientError::Frame)?;
        return Err(ClientError::Answered(error));
    }
    frame::decode_body(header, body).map_err(ClientError::Frame)
}

/// Waits until the node has found our certificate good. Our side of the handshake is over before: a
/// node that refuses us, or gave our place away, says so only now.
async fn confirmed(connection: &Connection) -> Result<(), ConnectionError> {
    let is_confirmed = async {
        // There is no event for it.
        while connection.stats().frame_rx.handshake_done == 0 {
            sleep(CONFIRMED_POLL_INTERVAL).await;
        }
    };
    tokio::select! {
        () = is_confirmed => Ok(()),
        error = connection.closed() => Err(error),
    }
}

/// The node gave our place among its handshakes to somebody who came later.
fn is_displaced(error: &ConnectionError) -> bool {
    // What it says to a handshake that it drops; a node that is full, or refuses us, says so.
    matches!(error, ConnectionError::ConnectionClosed(close)
        if close.error_code == TransportErrorCode::APPLICATION_ERROR)
}

fn connect_error(address: SocketAddr, error: ConnectionError) -> ClientError {
    match error {
        // What our own TLS found wrong with the other end.
        ConnectionError::TransportError(e) => ClientError::Untrusted {
            address,
            reason: e.to_string(),
        },
        // What the other end's TLS found wrong with us, or its limit.
        ConnectionError::ConnectionClosed(e) => ClientError::Refused {
            address,
            reason: e.to_string(),
        },
        ConnectionError::ApplicationClosed(e) => ClientError::Refused {
            address,
            reason: e.to_string(),
        },
        ConnectionError::VersionMismatch => ClientError::Refused {
            address,
            reason: "no common QUIC version".to_owned(),
        },
        ConnectionError::TimedOut
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => ClientError::Lost {
            address,
            reason: error.to_string(),
        },
    }
}
