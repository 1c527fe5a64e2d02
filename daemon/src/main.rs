//! The `dsd` command: the node, and offline evaluation of checkpoints.

mod commands;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

/// Serve DeepSeek-family models from this machine.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node on this machine for yourself: loopback addresses, its own certificates.
    Dev(commands::dev::Dev),
    /// Run the node that the configuration file describes (the systemd unit calls this).
    Serve(commands::serve::Serve),
    /// Name everything that `serve` would refuse; print nothing if all is good.
    CheckConfig(commands::check_config::CheckConfig),
    /// Lay a checkpoint out for the ranks of a group, in files that are used as they are.
    Pack(commands::pack::Pack),
    /// Run as one rank of a group; an agent starts it.
    #[command(hide = true)]
    Rank(commands::rank::Rank),
    /// Evaluate a checkpoint offline.
    #[command(subcommand)]
    Eval(commands::eval::Eval),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Dev(dev) => dev.run().map(|()| ExitCode::SUCCESS),
        Command::Serve(serve) => serve.run().map(|()| ExitCode::SUCCESS),
        Command::CheckConfig(check) => check.run(),
        Command::Pack(pack) => pack.run(),
        Command::Rank(rank) => rank.run(),
        Command::Eval(eval) => eval.run().map(|()| ExitCode::SUCCESS),
    };
    match outcome {
        Ok(code) => code,
        Err(e) => {
            // Nothing is left to do when standard error is gone, too.
            let _ = writeln!(io::stderr(), "dsd: {e:#}");
            ExitCode::FAILURE
        }
    }
}
