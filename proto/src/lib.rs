//! What crosses a process boundary: wire messages, QUIC transport, public HTTP types.
//!
//! Does not know the daemon, its engine or how a model works.
#![forbid(unsafe_code)]

// Words shared by every boundary.
pub mod ids;
pub mod code;

// Between nodes, and between a node and dsctl.
pub mod wire;
pub mod quic;

// Between a node and its users.
pub mod openai;
pub mod anthropic;
pub mod responses;
pub mod fields;
