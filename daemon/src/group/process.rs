//! One rank's process as its supervisor holds it.
//!
//! Invariant: a process that was started is killed and reaped when its holder is dropped. It is killed by
//! the system, too, when the thread that started it ends, which therefore lives as long as its holder.

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            net::UnixStream,
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use dsd_proto::wire::group::RankStart;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::frames::{self, Incoming};
use crate::config::{LogConfig, LogFormat};

/// A running rank.
#[derive(Debug)]
pub(super) struct RankProcess {
    child: Child,
    pidfd: OwnedFd,
    pub(super) socket: UnixStream,
    pub(super) incoming: Incoming,
    /// Bytes that the socket did not take yet.
    pub(super) outgoing: Vec<u8>,
}

impl RankProcess {
    /// Starts `program rank` and tells it what it is to be. Its standard input is the socket, and
    /// the end of the socket is its end.
    pub(super) fn spawn(
        program: &Path,
        log: &LogConfig,
        start: &RankStart,
        epoch: u64,
    ) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let format = match log.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        let mut child = Command::new(program)
            .arg0("dsd")
            .args(["rank", "--log-filter", &log.filter, "--log-format", format])
            .args(["--agent-pid", &std::process::id().to_string()])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // Ctrl-C in a terminal is for the agent, which lets requests finish first.
            .process_group(0)
            .spawn()?;
        let pidfd = match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                // Out of descriptors: nobody would hold the process, or reap it.
                let _ = child.kill();
                let _ = child.wait();
                return Err(e.into());
            }
        };
        let mut process = Self {
            child,
            pidfd,
            socket,
            incoming: Incoming::default(),
            outgoing: Vec::new(),
        };
        let frame = frames::encode(start, epoch).map_err(io::Error::other)?;
        process.socket.write_all(&frame)?;
        process.socket.set_nonblocking(true)?;
        Ok(process)
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Readable once the process has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it ended; `None` while it runs.
    pub(super) fn ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(words_of(status)),
            Err(e) => Some(format!("cannot be waited for: {e}")),
        }
    }

    /// Kills it; dropping this waits for its end.
    pub(super) fn kill(&self) {
        // It may have ended already; then there is nothing to kill.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Writes as much of `outgoing` as the socket takes. A rank that has closed its end is about to be
    /// found ended, with more to say of it, or silent.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.socket.write(&self.outgoing) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    self.outgoing.clear();
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

fn words_of(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}
