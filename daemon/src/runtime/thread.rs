//! Named threads.

use std::{io, thread};

/// Starts a thread that shows up under `name` (at most 15 bytes are visible in `top`).
///
/// # Errors
/// When the system refuses a thread.
pub fn spawn<F, T>(name: &str, body: F) -> io::Result<thread::JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    thread::Builder::new().name(name.to_owned()).spawn(body)
}
