//! TLS and transport settings of both ends.
//!
//! Invariant: TLS 1.3 with certificates on both sides, no resumption, no early data, every window
//! and count bounded.

use std::{sync::Arc, time::Duration};

use quinn::{
    EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig},
};
use rustls::{
    RootCertStore, client::Resumption, crypto::CryptoProvider, server::WebPkiClientVerifier,
    version::TLS13,
};

use crate::quic::{ALPN_ADMIN, identity::Identity};

/// quinn sends batches of 10 segments; at 6,500 bytes they stay below the 65,507 bytes of one UDP
/// send, above 6,550 whole batches are lost.
const MTU_MAX: u16 = 6_500;
/// quinn starts with 12,000 bytes, ten packets of the minimum size. Two packets of ours exceed that:
/// with one probe of the path's MTU under way nothing else could be sent, and a close that comes
/// together with a cancelled stream was held back until the peer's idle timeout (seen in half of
/// the runs of a client that cancels within a millisecond).
const INITIAL_WINDOW: u64 = 10 * MTU_MAX as u64;
/// A frame of 4 MiB may be under way whole.
const CONNECTION_WINDOW: u32 = 8 << 20;
const STREAM_WINDOW: u32 = 1 << 20;
const SEND_WINDOW: u64 = 8 << 20;
/// A third of what the 30 s recovery budget allows; quinn's own default would eat all of it.
const IDLE_MAX_MS: u32 = 10_000;
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// quinn's default of 333 ms makes one lost first packet cost a second.
const INITIAL_RTT: Duration = Duration::from_millis(5);

/// Why the identity cannot be put to use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls refuses certificate, key or CA.
    #[error("certificate or key refused")]
    Rustls(#[from] rustls::Error),
    /// The CA cannot be used to verify clients.
    #[error("CA refused")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// The provider lacks the suite that QUIC starts with.
    #[error("no initial cipher suite")]
    Suite(#[from] NoInitialCipherSuite),
}

/// Settings of the end that accepts.
pub(super) fn server_config(
    identity: &Identity,
    calls_max: u32,
) -> Result<quinn::ServerConfig, TlsError> {
    let mut config = quinn::ServerConfig::with_crypto(server_crypto(identity)?);
    config.transport_config(Arc::new(transport(calls_max)));
    // dsctl may be on a laptop that changes networks.
    config.migration(true);
    config.max_incoming(256);
    config.incoming_buffer_size(64 << 10);
    config.incoming_buffer_size_total(4 << 20);
    Ok(config)
}

/// The part of it that knows certificates.
pub(super) fn server_crypto(identity: &Identity) -> Result<Arc<QuicServerConfig>, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity)?), provider())
            .build()?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain(), identity.key())?;
    tls.alpn_protocols = vec![ALPN_ADMIN.to_vec()];
    tls.max_early_data_size = 0;
    tls.send_tls13_tickets = 0;
    Ok(Arc::new(QuicServerConfig::try_from(tls)?))
}

/// Settings of the end that connects.
pub(super) fn client_config(identity: &Identity) -> Result<quinn::ClientConfig, TlsError> {
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(identity.chain(), identity.key())?;
    quic_client_config(tls)
}

pub(super) fn quic_client_config(
    mut tls: rustls::ClientConfig,
) -> Result<quinn::ClientConfig, TlsError> {
    tls.alpn_protocols = vec![ALPN_ADMIN.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    // A server never opens streams.
    config.transport_config(Arc::new(transport(0)));
    Ok(config)
}

/// Settings of the socket.
pub(super) fn endpoint_config() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // The only error is a value below 1,200, the minimum of QUIC.
    let accepted = config.max_udp_payload_size(MTU_MAX).is_ok();
    debug_assert!(accepted, "MTU_MAX is above 1,200");
    config
}

/// Passed everywhere by hand: a process-wide default would be a hidden dependency.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

pub(super) fn roots(identity: &Identity) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca().clone())?;
    Ok(roots)
}

fn transport(streams_max: u32) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_MAX);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    let mut config = TransportConfig::default();
    config
        .congestion_controller_factory(Arc::new(congestion))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_MAX_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(mtu))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None);
    config
}
