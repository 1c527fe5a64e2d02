//! Kit for end-to-end tests: real `dsd` and `dsctl` processes over loopback.
//!
//! Waits are on a condition with a deadline; a node whose log holds a warning that its test did not
//! list fails that test.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests fail by panicking, and read the real clock"
)]

pub mod data;
pub mod http;
pub mod node;
pub mod process;
pub mod silent;
pub mod tool;
pub mod wait;
