//! Real ends over loopback: every call, and everything a peer can do wrong.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinSet,
};

use super::{
    AdminService, Client, ClientError, Event, Identity, ReplySender, Role, Server, ServerError,
    ServerLimits,
    endpoint::{provider, quic_client_config, roots},
    pki,
    stream::read_frame,
};
use crate::{
    code::Code,
    ids::Epoch,
    wire::{
        Class, Kind, Message,
        admin::{
            ErrorReply, ModelListReply, ModelListRequest, ModelLoadReply, ModelLoadRequest,
            ModelUnloadReply, ModelUnloadRequest, ModelVerifyReply, ModelVerifyRequest, Progress,
            StatusReply, StatusRequest, TenantAddRequest, TenantKeyReply, TenantListReply,
            TenantRemoveReply, TenantRemoveRequest, TenantRotateKeyRequest, TenantSetRequest,
            TenantShowReply, TenantShowRequest,
        },
        frame::{self, HEADER_LEN},
        generate::{GenerateDelta, GenerateDone, GenerateRequest},
        samples,
    },
};

const DEADLINE: Duration = Duration::from_secs(10);

#[expect(
    clippy::disallowed_methods,
    reason = "certificates are made for the real present"
)]
fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Certificates of one cluster.
struct Pki {
    folder: TempDir,
}

impl Pki {
    fn new(cluster: &str) -> Self {
        let pki = Self::empty();
        pki.ensure(cluster, unix_now());
        pki
    }

    fn empty() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn ensure(&self, cluster: &str, now_unix_s: u64) {
        let node = "node-1".parse().unwrap();
        pki::ensure(
            self.folder.path(),
            &cluster.parse().unwrap(),
            &node,
            now_unix_s,
        )
        .unwrap();
    }

    fn identity(&self, role: Role) -> Identity {
        pki::load(self.folder.path(), role, unix_now()).unwrap()
    }
}

/// Answers with the samples; generation of the model "endless" never ends by itself.
struct Samples {
    cancelled: mpsc::Sender<()>,
    release: Arc<Notify>,
}

/// Tells that the future holding it was dropped.
struct Dropped(mpsc::Sender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _full_is_told_already = self.0.try_send(());
    }
}

impl AdminService for Samples {
    async fn status(&self) -> Result<StatusReply, ErrorReply> {
        Ok(samples::status_reply())
    }

    async fn model_list(&self) -> Result<ModelListReply, ErrorReply> {
        Ok(samples::model_list_reply())
    }

    async fn model_load(
        &self,
        request: ModelLoadRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelLoadReply, ErrorReply> {
        assert_eq!(request, samples::model_load_request());
        for done in 0..3 {
            progress
                .send(&Progress {
                    done,
                    ..samples::progress()
                })
                .await?;
        }
        Ok(samples::model_load_reply())
    }

    async fn model_unload(
        &self,
        request: ModelUnloadRequest,
    ) -> Result<ModelUnloadReply, ErrorReply> {
        match request.name.as_str() {
            "tiny" => Ok(samples::model_unload_reply()),
            "bug" => panic!("a bug of the service"),
            _ => Err(samples::error_reply()),
        }
    }

    async fn model_verify(
        &self,
        _request: ModelVerifyRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> Result<ModelVerifyReply, ErrorReply> {
        progress.send(&samples::progress()).await?;
        Ok(samples::model_verify_reply())
    }

    async fn tenant_list(&self) -> Result<TenantListReply, ErrorReply> {
        Ok(samples::tenant_list_reply())
    }

    async fn tenant_show(&self, _: TenantShowRequest) -> Result<TenantShowReply, ErrorReply> {
        Ok(samples::tenant_show_reply())
    }

    async fn tenant_add(&self, _: TenantAddRequest) -> Result<TenantKeyReply, ErrorReply> {
        Ok(samples::tenant_key_reply())
    }

    async fn tenant_set(&self, _: TenantSetRequest) -> Result<TenantShowReply, ErrorReply> {
        Ok(samples::tenant_show_reply())
    }

    async fn tenant_rotate_key(
        &self,
        _: TenantRotateKeyRequest,
    ) -> Result<TenantKeyReply, ErrorReply> {
        Ok(samples::tenant_key_reply())
    }

    async fn tenant_remove(&self, _: TenantRemoveRequest) -> Result<TenantRemoveReply, ErrorReply> {
        Ok(samples::tenant_remove_reply())
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        deltas: &mut ReplySender<'_, GenerateDelta>,
    ) -> Result<GenerateDone, ErrorReply> {
        deltas.send(&samples::generate_delta()).await?;
        if request.model == "endless" {
            let _dropped = Dropped(self.cancelled.clone());
            self.release.notified().await;
        }
        Ok(samples::generate_done())
    }
}

/// A server on its own task with certificates, and what its service reports.
struct Rig {
    pki: Pki,
    address: SocketAddr,
    cancelled: mpsc::Receiver<()>,
    release: Arc<Notify>,
    identity: super::IdentityHandle,
    shutdown: Option<oneshot::Sender<()>>,
    tasks: JoinSet<()>,
}

impl Rig {
    fn new() -> Self {
        Self::with(ServerLimits::default())
    }

    fn with(limits: ServerLimits) -> Self {
        Self::of(Pki::new("lab"), limits)
    }

    fn of(pki: Pki, limits: ServerLimits) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (cancelled_tx, cancelled) = mpsc::channel(16);
        let release = Arc::new(Notify::new());
        let service = Samples {
            cancelled: cancelled_tx,
            release: Arc::clone(&release),
        };
        let server = Server::new(socket, &pki.identity(Role::Node), service, limits).unwrap();
        let address = server.local_addr().unwrap();
        let identity = server.identity_handle();
        let (shutdown, stopped) = oneshot::channel::<()>();
        let mut tasks = JoinSet::new();
        tasks.spawn(server.run(async {
            let _dropped_counts_too = stopped.await;
        }));
        Self {
            pki,
            address,
            cancelled,
            release,
            identity,
            shutdown: Some(shutdown),
            tasks,
        }
    }

    async fn client(&self, role: Role) -> Client {
        Client::connect(self.address, &self.pki.identity(role), DEADLINE)
            .await
            .unwrap()
    }

    async fn assert_serves(&self) {
        let client = self.client(Role::Admin).await;
        let reply = client.call(&StatusRequest {}, DEADLINE).await.unwrap();
        assert_eq!(reply, samples::status_reply());
        client.close().await;
    }
}

async fn collect<C: super::StreamCall>(client: &Client, request: &C) -> (Vec<C::Item>, C::Reply) {
    let mut stream = client.stream(request, DEADLINE).await.unwrap();
    let mut items = Vec::new();
    loop {
        match stream.next(DEADLINE).await.unwrap() {
            Some(Event::Item(item)) => items.push(item),
            Some(Event::Reply(reply)) => {
                assert!(stream.next(DEADLINE).await.unwrap().is_none());
                return (items, reply);
            }
            None => panic!("no reply"),
        }
    }
}

fn endless() -> GenerateRequest {
    GenerateRequest {
        model: "endless".into(),
        ..samples::generate_request()
    }
}

/// Sends raw bytes as a call and returns the code of the answer.
async fn code_of(client: &Client, bytes: &[u8], finish: bool) -> Code {
    let (mut send, mut recv) = client.connection().open_bi().await.unwrap();
    // A server that answers early stops reading.
    let _refused = send.write_all(bytes).await;
    if finish {
        let _refused = send.finish();
    }
    let welcome = [Kind::of::<ErrorReply>()];
    let (header, body) = read_frame(&mut recv, &welcome).await.unwrap().unwrap();
    frame::decode_body::<ErrorReply>(&header, &body)
        .unwrap()
        .code()
}

#[tokio::test]
async fn every_call_brings_its_reply() {
    let rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    assert_eq!(client.node().to_string(), "ds://lab/node/node-1");

    let status = client
        .call(&samples::status_request(), DEADLINE)
        .await
        .unwrap();
    assert_eq!(status, samples::status_reply());
    let list = client.call(&ModelListRequest {}, DEADLINE).await.unwrap();
    assert_eq!(list, samples::model_list_reply());
    let unload = client
        .call(&samples::model_unload_request(), DEADLINE)
        .await
        .unwrap();
    assert_eq!(unload, samples::model_unload_reply());

    let (steps, loaded) = collect(&client, &samples::model_load_request()).await;
    assert_eq!(steps.iter().map(|p| p.done).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(loaded, samples::model_load_reply());
    let (steps, verified) = collect(&client, &samples::model_verify_request()).await;
    assert_eq!((steps.len(), verified), (1, samples::model_verify_reply()));
    let (deltas, done) = collect(&client, &samples::generate_request()).await;
    assert_eq!((deltas.len(), done), (1, samples::generate_done()));
    client.close().await;
}

#[tokio::test]
async fn an_error_comes_with_its_code_and_time() {
    let rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    let request = ModelUnloadRequest {
        name: "other".into(),
    };
    let error = client.call(&request, DEADLINE).await.unwrap_err();
    let ClientError::Answered(reply) = error else {
        panic!("{error}")
    };
    assert_eq!(reply.code(), Code::QueueFull);
    assert_eq!(reply, samples::error_reply());
}

#[tokio::test]
async fn a_bug_in_one_call_ends_that_call_only() {
    let rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    let request = ModelUnloadRequest { name: "bug".into() };
    let error = client.call(&request, DEADLINE).await.unwrap_err();
    assert!(matches!(error, ClientError::BrokenOff), "{error}");
    client.call(&StatusRequest {}, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_client_of_another_ca_trusts_no_node_and_is_trusted_by_none() {
    let rig = Rig::new();
    let stranger = Pki::new("lab");
    let error = Client::connect(rig.address, &stranger.identity(Role::Admin), DEADLINE)
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Untrusted { .. }), "{error}");

    // One that believes the node's CA but shows a certificate of another.
    let ours = rig.pki.identity(Role::Admin);
    let theirs = stranger.identity(Role::Admin);
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots(&ours).unwrap())
        .with_client_auth_cert(theirs.chain(), theirs.key())
        .unwrap();
    refused(&rig, &ours, tls).await;
    rig.assert_serves().await;
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let rig = Rig::new();
    let ours = rig.pki.identity(Role::Admin);
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots(&ours).unwrap())
        .with_no_client_auth();
    refused(&rig, &ours, tls).await;
    rig.assert_serves().await;
}

async fn refused(rig: &Rig, ours: &Identity, tls: rustls::ClientConfig) {
    let config = quic_client_config(tls).unwrap();
    let error = match Client::connect_with(rig.address, ours, config, DEADLINE).await {
        Ok(client) => client.call(&StatusRequest {}, DEADLINE).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn an_operator_may_not_serve() {
    let pki = Pki::new("lab");
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let service = Samples {
        cancelled: mpsc::channel(1).0,
        release: Arc::new(Notify::new()),
    };
    let limits = ServerLimits::default();
    let error = Server::new(socket, &pki.identity(Role::Admin), service, limits)
        .err()
        .unwrap();
    assert!(matches!(error, ServerError::NotANode { .. }), "{error}");
}

#[tokio::test]
async fn a_node_may_ask_for_status_but_not_change_models() {
    let rig = Rig::new();
    let client = rig.client(Role::Node).await;
    client.call(&StatusRequest {}, DEADLINE).await.unwrap();
    let error = client
        .call(&samples::model_unload_request(), DEADLINE)
        .await
        .unwrap_err();
    let ClientError::Answered(reply) = error else {
        panic!("{error}")
    };
    assert_eq!(reply.code(), Code::Forbidden);
}

#[tokio::test]
async fn nobody_at_the_address_is_said_within_the_deadline() {
    let pki = Pki::new("lab");
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let silent = socket.local_addr().unwrap();
    let short = Duration::from_millis(200);
    let error = Client::connect(silent, &pki.identity(Role::Admin), short)
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { address } if address == silent));
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_refused() {
    let old = Pki::empty();
    let two_years_ago = unix_now() - 2 * 365 * 24 * 3600;
    old.ensure("lab", two_years_ago);
    let expired = pki::load(old.folder.path(), Role::Admin, two_years_ago).unwrap();
    for name in ["node.pem", "admin.pem"] {
        std::fs::remove_file(old.folder.path().join(name)).unwrap();
    }
    old.ensure("lab", unix_now());
    let rig = Rig::of(old, ServerLimits::default());
    let error = match Client::connect(rig.address, &expired, DEADLINE).await {
        Ok(client) => client.call(&StatusRequest {}, DEADLINE).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    rig.assert_serves().await;
}

/// Begins a handshake through a socket of its own, answers a retry, and falls silent. The socket
/// must be kept: where nobody listens the system tells the server.
async fn silent_handshake(server: SocketAddr, identity: &Identity) -> tokio::net::UdpSocket {
    let trap = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let connect = Client::connect(trap.local_addr().unwrap(), identity, DEADLINE);
    let relay = async {
        let mut datagram = vec![0; 2048];
        let mut client = None;
        loop {
            let (len, from) = trap.recv_from(&mut datagram).await.unwrap();
            let packet = &datagram[..len];
            let is_retry = packet[0] & 0xf0 == 0xf0;
            match client {
                _ if from != server => {
                    client = Some(from);
                    trap.send_to(packet, server).await.unwrap();
                }
                Some(client) if is_retry => {
                    trap.send_to(packet, client).await.unwrap();
                }
                // Anything else shows that a place is taken.
                _ => break,
            }
        }
    };
    tokio::select! {
        _ = connect => panic!("nobody answers"),
        () = relay => {}
    }
    trap
}

#[tokio::test]
async fn silent_handshakes_hold_no_place_of_a_connection() {
    let rig = Rig::with(ServerLimits {
        connections_max: 1,
        handshakes_max: 1,
        ..ServerLimits::default()
    });
    let identity = rig.pki.identity(Role::Admin);
    let _silent = silent_handshake(rig.address, &identity).await;
    // Long before the time of the silent one is over.
    Client::connect(rig.address, &identity, Duration::from_secs(1))
        .await
        .unwrap()
        .close()
        .await;
}

/// Every place used to be theirs until their time was over, and then again.
#[tokio::test]
async fn silent_handshakes_keep_nobody_out() {
    let rig = Rig::with(ServerLimits {
        handshakes_max: 24,
        handshakes_per_address_max: 16,
        handshake_timeout: Duration::from_secs(60),
        ..ServerLimits::default()
    });
    let identity = rig.pki.identity(Role::Admin);
    let mut silent = Vec::new();
    for _ in 0..60 {
        silent.push(silent_handshake(rig.address, &identity).await);
    }
    for _ in 0..5 {
        let client = Client::connect(rig.address, &identity, Duration::from_secs(1))
            .await
            .unwrap();
        client.call(&StatusRequest {}, DEADLINE).await.unwrap();
        client.close().await;
    }
}

/// One who is displaced in the middle of a handshake begins again and gets in.
#[tokio::test]
async fn a_displaced_client_comes_back() {
    let rig = Rig::with(ServerLimits {
        handshakes_max: 2,
        ..ServerLimits::default()
    });
    let identity = rig.pki.identity(Role::Admin);
    let mut clients = JoinSet::new();
    for _ in 0..40 {
        let (address, identity) = (rig.address, identity.clone());
        clients.spawn(async move {
            let client = Client::connect(address, &identity, DEADLINE).await?;
            client.call(&StatusRequest {}, DEADLINE).await?;
            client.close().await;
            Ok::<(), ClientError>(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_handshake_that_takes_too_long_is_over() {
    let rig = Rig::with(ServerLimits {
        handshake_timeout: Duration::from_millis(200),
        ..ServerLimits::default()
    });
    let identity = rig.pki.identity(Role::Admin);
    // Of what the client sends, the server sees the first datagram only; the client sees all.
    let trap = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let connect = Client::connect(trap.local_addr().unwrap(), &identity, DEADLINE);
    let relay = async {
        let mut datagram = vec![0; 2048];
        let mut first: Option<(SocketAddr, Vec<u8>)> = None;
        loop {
            let (len, from) = trap.recv_from(&mut datagram).await.unwrap();
            let packet = &datagram[..len];
            match &first {
                Some((client, _)) if from == rig.address => {
                    trap.send_to(packet, client).await.unwrap();
                }
                // Told that it is over, it begins anew.
                Some((_, first)) if is_initial_of_other(packet, first) => break,
                // The same again, for the server must not send more than three times what it gets.
                Some((_, first)) => {
                    trap.send_to(first, rig.address).await.unwrap();
                }
                None => {
                    trap.send_to(packet, rig.address).await.unwrap();
                    first = Some((from, packet.to_vec()));
                }
            }
        }
    };
    tokio::select! {
        _ = connect => panic!("the handshake cannot be completed"),
        told = tokio::time::timeout(Duration::from_secs(5), relay) => told.unwrap(),
    }
    rig.assert_serves().await;
}

/// The source connection id of a packet with a long header.
fn source_id(packet: &[u8]) -> &[u8] {
    let at = 6 + usize::from(packet[5]);
    &packet[at + 1..at + 1 + usize::from(packet[at])]
}

fn is_initial_of_other(packet: &[u8], first: &[u8]) -> bool {
    packet[0] & 0xf0 == 0xc0 && source_id(packet) != source_id(first)
}

/// Serial number of the node's certificate as a client sees it.
fn node_serial(client: &Client) -> Vec<u8> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let chain = client.connection().peer_identity().unwrap();
    let chain = chain
        .downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>()
        .unwrap();
    let (_, certificate) = X509Certificate::from_der(&chain[0]).unwrap();
    certificate.raw_serial().to_vec()
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_to_new_connections_and_old_ones_go_on() {
    let rig = Rig::new();
    let open = rig.client(Role::Admin).await;
    let mut running = open.stream(&endless(), DEADLINE).await.unwrap();
    running.next(DEADLINE).await.unwrap();
    let before = node_serial(&open);

    let folder = rig.pki.folder.path();
    std::fs::remove_file(folder.join("node.pem")).unwrap();
    // Not in the same second.
    rig.pki.ensure("lab", unix_now() - 60);
    let admin = rig.pki.identity(Role::Admin);
    assert!(rig.identity.replace(admin).is_err());
    rig.identity.replace(rig.pki.identity(Role::Node)).unwrap();
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        let client = rig.client(Role::Admin).await;
        client.call(&StatusRequest {}, DEADLINE).await.unwrap();
        if node_serial(&client) != before {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline);
        client.close().await;
    }
    open.call(&StatusRequest {}, DEADLINE).await.unwrap();
    rig.release.notify_one();
    let last = running.next(DEADLINE).await.unwrap();
    assert_eq!(last, Some(Event::Reply(samples::generate_done())));
}

#[tokio::test]
async fn datagrams_of_garbage_leave_the_server_serving() {
    let rig = Rig::new();
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut seed = 1u32;
    for len in (0..1500).step_by(7) {
        let garbage: Vec<u8> = (0..len)
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                seed.to_le_bytes()[3]
            })
            .collect();
        socket.send_to(&garbage, rig.address).unwrap();
    }
    rig.assert_serves().await;
}

#[tokio::test]
async fn bad_frames_are_answered_by_name_and_end_only_their_stream() {
    let rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    let good = frame::encode(&samples::generate_request(), Epoch(0)).unwrap();
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let too_long = |len: u32| {
        let mut bytes = good.clone();
        bytes[20..24].copy_from_slice(&len.to_le_bytes());
        bytes
    };
    let cases: &[(&str, Vec<u8>, Code)] = &[
        ("nothing", vec![], Code::BadFrame),
        (
            "half a header",
            good[..HEADER_LEN / 2].to_vec(),
            Code::BadFrame,
        ),
        (
            "half a body",
            good[..good.len() - 1].to_vec(),
            Code::BadFrame,
        ),
        (
            "trailing bytes",
            [good.as_slice(), b"x"].concat(),
            Code::BadFrame,
        ),
        ("another magic", changed(0, b'x'), Code::BadFrame),
        (
            "HTTP",
            b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".to_vec(),
            Code::BadFrame,
        ),
        ("a later header", changed(2, 9), Code::VersionMismatch),
        ("flags", changed(3, 1), Code::BadFrame),
        ("an unknown type", changed(5, 0xee), Code::UnknownMessage),
        (
            "a reply as request",
            { frame::encode(&samples::status_reply(), Epoch(0)).unwrap() },
            Code::UnknownMessage,
        ),
        ("a later version", changed(6, 2), Code::VersionMismatch),
        (
            "another schema",
            changed(8, good[8] ^ 1),
            Code::VersionMismatch,
        ),
        ("a tail", changed(24, 1), Code::PayloadTooLarge),
        ("a huge length", too_long(u32::MAX), Code::PayloadTooLarge),
        (
            "a length above the class",
            too_long(Class::Request.body_len_max() + 1),
            Code::PayloadTooLarge,
        ),
        (
            "a damaged body",
            {
                let mut bytes = good.clone();
                let start = good.len() - 24;
                bytes[start..].fill(0xff);
                bytes
            },
            Code::BadFrame,
        ),
    ];
    for (what, bytes, expected) in cases {
        assert_eq!(code_of(&client, bytes, true).await, *expected, "{what}");
    }
    // The same connection goes on.
    client.call(&StatusRequest {}, DEADLINE).await.unwrap();
    rig.assert_serves().await;
}

#[tokio::test]
async fn half_a_frame_and_silence_is_a_timeout() {
    let limits = ServerLimits {
        request_timeout: Duration::from_millis(200),
        ..ServerLimits::default()
    };
    let rig = Rig::with(limits);
    let client = rig.client(Role::Admin).await;
    let good = frame::encode(&samples::generate_request(), Epoch(0)).unwrap();
    for len in [0, 1, HEADER_LEN, good.len() - 1, good.len()] {
        // Without bytes quinn does not announce the stream; one byte does.
        let len = len.max(1);
        assert_eq!(
            code_of(&client, &good[..len], false).await,
            Code::RequestTimeout
        );
    }
    client.call(&StatusRequest {}, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_dropped_stream_cancels_its_call() {
    let mut rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    for explicit in [true, false] {
        let mut stream = client.stream(&endless(), DEADLINE).await.unwrap();
        assert!(matches!(
            stream.next(DEADLINE).await.unwrap(),
            Some(Event::Item(_))
        ));
        if explicit {
            stream.cancel();
        } else {
            drop(stream);
        }
        rig.cancelled.recv().await.unwrap();
    }
    client.call(&StatusRequest {}, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_closed_connection_cancels_its_calls() {
    let mut rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    let mut stream = client.stream(&endless(), DEADLINE).await.unwrap();
    assert!(matches!(
        stream.next(DEADLINE).await.unwrap(),
        Some(Event::Item(_))
    ));
    client.connection().close(0u32.into(), b"");
    rig.cancelled.recv().await.unwrap();
    assert!(stream.next(DEADLINE).await.is_err());
    rig.assert_serves().await;
}

/// With quinn's initial window and our MTU, one MTU probe under way held back the cancel and the close
/// that came with it, and the server noticed only at its idle timeout of 10 s.
#[test]
fn a_client_that_leaves_at_once_is_noticed_at_once() {
    // Two threads, so that the probe is still under way when the client leaves.
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let (rig_tx, rig_rx) = std::sync::mpsc::sync_channel(1);
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = move || {
        runtime().block_on(async {
            let mut rig = Rig::new();
            let cancelled = std::mem::replace(&mut rig.cancelled, mpsc::channel(1).1);
            rig_tx
                .send((rig.address, rig.pki.identity(Role::Admin), cancelled))
                .unwrap();
            let _dropped_is_the_signal = stopped.await;
        });
    };
    let server = std::thread::Builder::new()
        .name("server".into())
        .spawn(serve)
        .unwrap();
    let (address, identity, mut cancelled) = rig_rx.recv().unwrap();
    runtime().block_on(async {
        for n_turns in 0..40 {
            let client = Client::connect(address, &identity, DEADLINE).await.unwrap();
            let mut stream = client.stream(&endless(), DEADLINE).await.unwrap();
            assert!(matches!(
                stream.next(DEADLINE).await.unwrap(),
                Some(Event::Item(_))
            ));
            // Leaves at another point of the MTU search each time.
            for _ in 0..n_turns {
                tokio::task::yield_now().await;
            }
            drop(stream);
            client.close().await;
            let noticed = tokio::time::timeout(Duration::from_secs(5), cancelled.recv());
            noticed.await.unwrap().unwrap();
        }
    });
    drop(stop);
    server.join().unwrap();
}

#[tokio::test]
async fn calls_above_the_limit_wait_and_time_out() {
    let rig = Rig::with(ServerLimits {
        calls_max: 2,
        ..ServerLimits::default()
    });
    let client = rig.client(Role::Admin).await;
    let first = client.stream(&endless(), DEADLINE).await.unwrap();
    let _second = client.stream(&endless(), DEADLINE).await.unwrap();
    let short = Duration::from_millis(200);
    let error = client.call(&StatusRequest {}, short).await.unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    drop(first);
    client.call(&StatusRequest {}, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn connections_above_the_limit_are_refused() {
    let rig = Rig::with(ServerLimits {
        connections_max: 2,
        ..ServerLimits::default()
    });
    let first = rig.client(Role::Admin).await;
    let _second = rig.client(Role::Admin).await;
    let identity = rig.pki.identity(Role::Admin);
    let error = Client::connect(rig.address, &identity, DEADLINE)
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    first.call(&StatusRequest {}, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn shutdown_lets_running_calls_end() {
    let mut rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    let mut stream = client.stream(&endless(), DEADLINE).await.unwrap();
    assert!(matches!(
        stream.next(DEADLINE).await.unwrap(),
        Some(Event::Item(_))
    ));
    rig.shutdown.take().unwrap().send(()).unwrap();
    rig.release.notify_one();
    let last = stream.next(DEADLINE).await.unwrap();
    assert_eq!(last, Some(Event::Reply(samples::generate_done())));
    rig.tasks.join_next().await.unwrap().unwrap();
    let error = client.call(&StatusRequest {}, DEADLINE).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn shutdown_cuts_off_calls_that_do_not_end() {
    let limits = ServerLimits {
        drain_timeout: Duration::from_millis(100),
        ..ServerLimits::default()
    };
    let mut rig = Rig::with(limits);
    let client = rig.client(Role::Admin).await;
    let mut stream = client.stream(&endless(), DEADLINE).await.unwrap();
    assert!(matches!(
        stream.next(DEADLINE).await.unwrap(),
        Some(Event::Item(_))
    ));
    rig.shutdown.take().unwrap().send(()).unwrap();
    rig.tasks.join_next().await.unwrap().unwrap();
    rig.cancelled.recv().await.unwrap();
    assert!(stream.next(DEADLINE).await.is_err());
}

#[tokio::test]
async fn a_prompt_at_the_limit_arrives_whole() {
    let rig = Rig::new();
    let client = rig.client(Role::Admin).await;
    let request = GenerateRequest {
        input: crate::wire::generate::Input::Prompt("a".repeat((4 << 20) - 1024)),
        ..samples::generate_request()
    };
    let (deltas, _done) = collect(&client, &request).await;
    assert_eq!(deltas.len(), 1);
    assert_eq!(GenerateRequest::CLASS, Class::Request);
}
