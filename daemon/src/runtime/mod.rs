//! Clock, named threads, files that others may have put there, and memory given back.
//!
//! The only place that reads time or starts a thread, so that everything else can be run on a
//! virtual clock and joined.

pub mod clock;
pub mod file;
pub mod thread;
#[expect(unsafe_code, reason = "only the C library can give memory back")]
pub(crate) mod heap;
