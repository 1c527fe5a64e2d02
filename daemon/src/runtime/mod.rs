//! Clock, named threads and the shutdown signal.
//!
//! The only place that reads time or starts a thread, so that everything else can be run on a
//! virtual clock and joined.

pub mod clock;
pub mod thread;
