//! Strangers at the QUIC port who begin handshakes, answer a retry, and fall silent.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use quinn::{ClientConfig, Endpoint, crypto::rustls::QuicClientConfig};
use rustls::{RootCertStore, crypto::aws_lc_rs, version::TLS13};
use tokio::{net::UdpSocket, runtime::Builder, time::timeout};

/// What a stranger waits for one answer; the next round makes up for a lost datagram.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);
/// Handshakes begun at once.
const N_AT_ONCE: usize = 8;

/// Sockets that begin handshakes round by round until this is dropped.
#[derive(Debug)]
pub struct SilentHandshakes {
    stop: Arc<AtomicBool>,
    n_begun: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl SilentHandshakes {
    /// Begins with `n_sockets` of them against a node.
    pub fn against(node: SocketAddr, n_sockets: usize) -> Self {
        let (stop, n_begun) = (Arc::default(), Arc::default());
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&n_begun));
        let attack = move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(rounds(node, n_sockets, &stopped, &counter));
        };
        Self {
            stop,
            n_begun,
            thread: Some(thread::spawn(attack)),
        }
    }

    /// Handshakes that hold, or held, a place of the node.
    pub fn n_begun(&self) -> usize {
        self.n_begun.load(Ordering::Relaxed)
    }
}

impl Drop for SilentHandshakes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking(), "the attack broke off");
    }
}

async fn rounds(node: SocketAddr, n_sockets: usize, stop: &AtomicBool, n_begun: &AtomicUsize) {
    let mut sockets = Vec::new();
    for _ in 0..n_sockets {
        sockets.push(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    }
    let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    while !stop.load(Ordering::Relaxed) {
        for some in sockets.chunks(N_AT_ONCE) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let mut begun = Vec::new();
            for socket in some {
                begun.push(Box::pin(begin(&endpoint, socket, node)));
            }
            for one in begun {
                if let Ok(true) = timeout(ANSWER_TIMEOUT, one).await {
                    n_begun.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// One handshake through `socket`, up to the node's first words after a retry. True when they came.
async fn begin(endpoint: &Endpoint, socket: &UdpSocket, node: SocketAddr) -> bool {
    let own = socket.local_addr().unwrap();
    let Ok(connecting) = endpoint.connect_with(client_config(), own, "node.dsd.internal") else {
        return false;
    };
    let relay = async {
        let mut datagram = vec![0; 2048];
        let mut client = None;
        let mut is_retried = false;
        loop {
            let (len, from) = socket.recv_from(&mut datagram).await.unwrap();
            let packet = &datagram[..len];
            let is_retry = packet[0] & 0xf0 == 0xf0;
            match client {
                _ if from != node => {
                    client = Some(from);
                    socket.send_to(packet, node).await.unwrap();
                }
                Some(client) if is_retry => {
                    is_retried = true;
                    socket.send_to(packet, client).await.unwrap();
                }
                // Words from an earlier round, when there was no question in this one yet.
                None => {}
                Some(_) => return is_retried,
            }
        }
    };
    tokio::select! {
        _ = connecting => false,
        is_retried = relay => is_retried,
    }
}

/// Without a certificate: a stranger never gets so far as to show one.
fn client_config() -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"dsadm/1".to_vec()];
    ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}
