//! The `dsctl` command: operates a node over QUIC, measures it over HTTP.
//!
//! Knows `proto` only. Exit codes: 0 done, 1 wrong usage or refused by the node, 2 unhealthy,
//! 3 unreachable, 4 timed out, 130 interrupted.
#![forbid(unsafe_code)]

// The command line.
mod cli;

// One file per noun.
mod status;
mod model;
mod tenant;
mod generate;
mod chat;
mod bench;
mod completions;

// What they share.
mod session;
mod failure;
mod output;
mod progress;
mod clock;

#[cfg(test)]
mod tests;

use std::{
    env,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};

use crate::{
    cli::{Cli, Command},
    failure::{Exit, Failure},
    output::Output,
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout, errors to stderr; a closed pipe is nobody's problem.
            let _closed_pipe = error.print();
            return usage_exit(&error).into();
        }
    };
    let is_json = cli.global.json;
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            let mut stderr = io::stderr().lock();
            let _closed_pipe = if failure.exit == Exit::Done {
                Ok(())
            } else if is_json {
                writeln!(stderr, "{}", failure.to_json())
            } else {
                write!(stderr, "{failure}")
            };
            failure.exit.into()
        }
    }
}

/// clap's own code for a usage error is 2, which is "unhealthy" here.
fn usage_exit(error: &clap::Error) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Done,
        // Foreign enum: everything else is a mistake on the command line.
        _ => Exit::Refused,
    }
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Exit::Refused, "runtime", format!("cannot start: {e}")))?;
    let stdout = io::stdout();
    let is_terminal = stdout.is_terminal();
    let mut out = Output::new(Box::new(stdout.lock()), cli.global.json, is_terminal);
    let Cli { global, command } = cli;
    match command {
        Command::Status => runtime.block_on(status::run(&global, &mut out)),
        Command::Model(verb) => runtime.block_on(model::run(&global, verb, &mut out)),
        Command::Tenant(verb) => runtime.block_on(tenant::run(&global, verb, &mut out)),
        Command::Generate(args) => runtime.block_on(generate::run(&global, args, &mut out)),
        Command::Chat(args) => chat::run(&global, args, &runtime, &mut out),
        Command::Bench(args) => runtime.block_on(bench::run(&args, &mut out)),
        Command::Completions { shell } => completions::run(shell, &mut out),
    }
}
