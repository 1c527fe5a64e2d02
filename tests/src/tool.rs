//! `dsctl` and `dsd` as a person calls them.

use std::{env, process::Command};

use crate::{
    data,
    node::Node,
    process::{self, Outcome},
};

/// A program of this workspace with no `DSD_` variable from outside.
pub fn command(program: &str) -> Command {
    without_settings(Command::new(data::program(program)))
}

/// The same under a hard limit of open files, with half of it as the soft one.
pub fn command_with_open_files(program: &str, max: u32) -> Command {
    let mut shell = Command::new("sh");
    let script = format!(
        "ulimit -Sn {} && ulimit -Hn {max} && exec \"$0\" \"$@\"",
        max / 2
    );
    shell.args(["-c", &script]).arg(data::program(program));
    without_settings(shell)
}

fn without_settings(mut command: Command) -> Command {
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("DSD_") {
            command.env_remove(name);
        }
    }
    command
}

/// `dsctl` for a node, not started yet.
pub fn dsctl_command(node: &Node, args: &[&str]) -> Command {
    let mut command = command("dsctl");
    command
        .args(["--node", &node.quic.to_string()])
        .arg("--state")
        .arg(node.state())
        .args(args);
    command
}

/// Runs `dsctl` against a node.
pub fn dsctl(node: &Node, args: &[&str]) -> Outcome {
    process::run(&mut dsctl_command(node, args), "")
}

/// Runs `dsctl --json` against a node and returns its last line; it must exit with 0.
///
/// # Panics
/// When it does not.
pub fn dsctl_json(node: &Node, args: &[&str]) -> serde_json::Value {
    let outcome = dsctl(node, &[&["--json"], args].concat());
    assert_eq!(outcome.code, Some(0), "{args:?}: {outcome:?}");
    outcome
        .json_lines()
        .pop()
        .unwrap_or_else(|| panic!("{args:?}: no output"))
}

/// Runs `dsd` to its end.
pub fn dsd(args: &[&str]) -> Outcome {
    process::run(command("dsd").args(args), "")
}
