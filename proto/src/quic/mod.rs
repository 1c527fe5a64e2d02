//! Messages over QUIC with mutual TLS: identities, a typed client, a server.
//!
//! Does not know what a node does with a request; that is the [`AdminService`] it is given.
//!
//! Invariant: no plaintext and no anonymous peer. The role in a peer's certificate decides which
//! messages it may send.

// Who may speak.
pub mod identity;
pub mod pki;

// How they speak: TLS and transport settings, frames on streams.
mod endpoint;
mod stream;
mod half_open;

// The two ends.
pub mod service;
pub mod client;
pub mod server;

pub use client::{Client, ClientError, Event, ReplyStream};
pub use endpoint::TlsError;
pub use identity::{Identity, PeerName, Role};
pub use pki::PkiError;
pub use server::{IdentityHandle, Server, ServerError, ServerLimits};
pub use service::{AdminService, Call, Gone, ReplySender, StreamCall};

/// Protocol name in the TLS handshake of everything that `dsctl` and nodes ask of a node.
pub const ALPN_ADMIN: &[u8] = b"dsadm/1";

#[cfg(test)]
mod tests;
