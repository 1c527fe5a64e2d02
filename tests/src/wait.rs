//! Waits on conditions, with deadlines.

use std::{
    thread,
    time::{Duration, Instant},
};

/// For anything that a healthy node does at once, on a machine that has other work, too.
pub const DEADLINE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `condition` gives a value and returns it.
///
/// # Panics
/// With `what` when the deadline passes first.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until_or(DEADLINE, condition)
        .unwrap_or_else(|| panic!("{what}: not within {} s", DEADLINE.as_secs()))
}

/// Waits until `condition` gives a value; `None` when `timeout` passes first.
pub fn until_or<T>(timeout: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        let value = condition();
        if value.is_some() || deadline < Instant::now() {
            return value;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// With `what` when the deadline passes first.
pub fn until_true(what: &str, mut condition: impl FnMut() -> bool) {
    until(what, || condition().then_some(()));
}
