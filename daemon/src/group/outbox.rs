//! A rank's way out to its agent: frames are put here and written by a thread of its own, so that
//! whoever computes never waits for a socket.
//!
//! Invariant: what was put in before [`Outbox::finish`] is written before it returns, or the agent is
//! not listening.
//!
//! Called by rank.

use std::{
    io::{self, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dsd_proto::wire::Message;
use tracing::warn;

use super::frames;
use crate::runtime::thread;

/// Bytes that wait to be written at most. An agent that lets so many pile up is of no use: it is
/// frozen, and the rank ends, its socket closed, before it has taken the machine's memory.
const BYTES_MAX: usize = 64 << 20;
/// How often ticks are sent.
const TICK_INTERVAL: Duration = Duration::from_millis(500);
/// How long the end waits for the agent to take what is left.
const FINISH_LIMIT: Duration = Duration::from_secs(2);

/// See the module. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    shared: Arc<Shared>,
    epoch: u64,
}

#[derive(Debug)]
struct Shared {
    socket: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    is_writing: bool,
    /// Nothing follows; the reader of the same socket is woken once all is written.
    is_closed: bool,
    is_broken: bool,
}

impl Outbox {
    /// Starts the thread that writes to `socket`.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(super) fn start(socket: UnixStream, epoch: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            socket,
            state: Mutex::default(),
            changed: Condvar::default(),
        });
        let of_thread = Arc::clone(&shared);
        thread::spawn("dsd-outbox", move || of_thread.write())?;
        Ok(Self { shared, epoch })
    }

    /// Sends what `tick` says, if it says something, twice a second from now on.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(super) fn start_ticking<M: Message>(
        &self,
        tick: impl Fn() -> Option<M> + Send + 'static,
    ) -> io::Result<()> {
        let outbox = self.clone();
        thread::spawn("dsd-tick", move || {
            while !outbox.shared.lock().is_over() {
                if let Some(message) = tick() {
                    outbox.send(&message);
                }
                std::thread::sleep(TICK_INTERVAL);
            }
        })?;
        Ok(())
    }

    /// Puts a message in. Never waits for the agent.
    pub(super) fn send<M: Message>(&self, message: &M) {
        let frame = match frames::encode(message, self.epoch) {
            Ok(frame) => frame,
            Err(e) => {
                warn!(error = %e, "a message to the agent is too long");
                return;
            }
        };
        let mut state = self.shared.lock();
        if state.is_over() {
            return;
        }
        if BYTES_MAX < state.bytes.len() + frame.len() {
            warn!(
                bytes = state.bytes.len(),
                "the agent does not take what it is sent"
            );
            state.is_broken = true;
            state.bytes = Vec::new();
            // Wakes whoever writes or reads: this is the end of the rank.
            let _ = self.shared.socket.shutdown(Shutdown::Both);
        } else {
            state.bytes.extend(frame);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Nothing follows: what is left is written, then the thread that reads the socket is woken.
    pub(super) fn close(&self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written, for as long as an agent that listens takes.
    pub(super) fn finish(&self) {
        let state = self.shared.lock();
        let is_pending =
            |state: &mut State| !state.is_broken && (state.is_writing || !state.bytes.is_empty());
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, FINISH_LIMIT, is_pending);
        drop(waited);
    }
}

impl State {
    fn is_over(&self) -> bool {
        self.is_closed || self.is_broken
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) {
        let mut socket = &self.socket;
        loop {
            let state = self.lock();
            let is_idle = |state: &mut State| state.bytes.is_empty() && !state.is_over();
            let waited = self.changed.wait_while(state, is_idle);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            if state.is_broken || (state.bytes.is_empty() && state.is_closed) {
                drop(state);
                // Wakes whoever reads: nothing follows. Fails where the agent is gone.
                let _ = socket.shutdown(Shutdown::Read);
                return;
            }
            let bytes = std::mem::take(&mut state.bytes);
            state.is_writing = true;
            drop(state);
            let written = socket.write_all(&bytes);
            let mut state = self.lock();
            state.is_writing = false;
            // An agent that is gone is noticed by the thread that reads.
            state.is_broken |= written.is_err();
            drop(state);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use dsd_proto::wire::group::{GroupStop, RankFailed};

    use super::*;

    #[test]
    fn whoever_sends_never_waits_and_all_is_written_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let outbox = Outbox::start(ours, 1).unwrap();
        // More than a socket's buffer holds, with nobody reading.
        let message = RankFailed {
            message: "x".repeat(100_000),
        };
        for _ in 0..50 {
            outbox.send(&message);
        }
        outbox.send(&GroupStop { drain_ms: 7 });
        outbox.close();
        outbox.send(&GroupStop { drain_ms: 8 });
        let mut n = 0;
        while let Some(frame) = frames::read(&mut theirs).unwrap() {
            n += 1;
            if frame.is::<GroupStop>() {
                assert_eq!(frame.decode::<GroupStop>().unwrap().drain_ms, 7);
                break;
            }
        }
        assert_eq!(n, 51);
        outbox.finish();
    }

    #[test]
    fn an_agent_that_takes_nothing_breaks_the_outbox_within_its_bound() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut reader = ours.try_clone().unwrap();
        let outbox = Outbox::start(ours, 1).unwrap();
        let message = RankFailed {
            message: "x".repeat(200_000),
        };
        for _ in 0..1000 {
            outbox.send(&message);
        }
        assert!(outbox.shared.lock().is_broken);
        assert_eq!(outbox.shared.lock().bytes.len(), 0);
        // Though the agent is there still, whoever reads is told of the end, and so is the agent.
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
        theirs.read_to_end(&mut Vec::new()).unwrap();
        outbox.finish();
    }
}
