//! Processes: commands with a deadline, signals, memory.

use std::{
    fs,
    io::{Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use crate::wait;

/// What a finished command left.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// The lines of standard output, each a JSON value.
    ///
    /// # Panics
    /// When one is not.
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line:?} of {self:?}"))
        };
        self.stdout.lines().map(parse).collect()
    }
}

/// Runs a command to its end, with `input` on its standard input.
///
/// # Panics
/// When it does not start or end in time; it is killed then.
pub fn run(command: &mut Command, input: &str) -> Outcome {
    let piped = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = piped
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    // A command that reads nothing closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let stdout = read_all(child.stdout.take().unwrap());
    let stderr = read_all(child.stderr.take().unwrap());
    let status = exit_of(&mut child, &format!("{command:?}"));
    let text = |reader: thread::JoinHandle<String>| reader.join().unwrap();
    Outcome {
        code: status.code(),
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

/// Waits for a child's end; kills it when it takes too long.
///
/// # Panics
/// When it takes too long.
pub fn exit_of(child: &mut Child, what: &str) -> ExitStatus {
    match wait::until_or(wait::DEADLINE, || child.try_wait().unwrap()) {
        Some(status) => status,
        None => {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{what} did not end within {} s", wait::DEADLINE.as_secs());
        }
    }
}

/// Sends a signal by its name, such as `TERM`.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status();
    assert!(status.unwrap().success(), "cannot send SIG{name} to {pid}");
}

/// Bytes of a process' memory, pages shared with others counted in part
/// (`/proc/<pid>/smaps_rollup`).
///
/// # Panics
/// When the process is gone.
pub fn proportional_bytes(pid: u32) -> u64 {
    field_bytes(&format!("/proc/{pid}/smaps_rollup"), "Pss")
}

/// Bytes of a field of `/proc/<pid>/status`, such as `VmRSS` or `RssAnon`.
pub fn memory_bytes(pid: u32, field: &str) -> u64 {
    field_bytes(&format!("/proc/{pid}/status"), field)
}

fn field_bytes(file: &str, field: &str) -> u64 {
    let status = fs::read_to_string(file).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib * 1024
}

fn read_all(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
