//! The dsd node: from an HTTP or QUIC request down to the kernels and back.
//!
//! Modules stand in the order in which they may name each other: each names only modules below it
//! (docs/ARCHITECTURE.md has the table, `tests/it/tidy.rs` checks it).
#![deny(unsafe_code)]

pub mod node;
pub mod eval;
pub mod packing;
pub mod admin;
pub mod gateway;
pub mod tenants;
pub mod catalog;
pub mod replica;
pub mod admission;
pub mod group;
pub mod engine;
pub mod scheduler;
pub mod kv_cache;
pub mod runner;
pub mod model;
pub mod collective;
pub mod sampler;
pub mod grammar;
pub mod text;
pub mod weights;

// Named by all, name none of the above.
pub mod flow;
pub mod cost;
pub mod config;
pub mod telemetry;
pub mod runtime;
