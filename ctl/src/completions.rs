//! `dsctl completions`: a script that lets a shell complete our commands.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{
    cli::Cli,
    failure::{Exit, Failure},
    output::Output,
};

/// Prints the script.
pub(crate) fn run(shell: Shell, out: &mut Output<'_>) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dsctl", &mut script);
    out.raw(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}
