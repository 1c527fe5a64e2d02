//! End-to-end suites, one binary so that they link once.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests fail by panicking, and read the real clock"
)]

mod bad_input;
mod cancel_storm;
mod checkpoints;
mod clients;
mod dsctl;
mod echo;
mod edge;
mod lifecycle;
mod memory;
mod metrics;
mod openai;
mod packs;
mod quic;
mod ranks;
mod same_answers;
mod same_tokens;
mod start_up;
mod state_folder;
mod tenants;
mod tidy;
mod tools;
