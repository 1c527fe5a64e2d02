//! `dsd serve` and `dsd check-config`: the node that the configuration file describes.

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Result;
use clap::Args;
use dsd::{
    config::{self, Config},
    node::{self, Node},
    telemetry,
};

#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    file: ConfigArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CheckConfig {
    #[command(flatten)]
    file: ConfigArgs,
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// Configuration file; drop-ins lie in `dsd.toml.d` beside it.
    #[arg(long, default_value = config::PATH_DEFAULT, value_name = "FILE")]
    config: PathBuf,
}

impl ConfigArgs {
    fn read(&self) -> Result<Config> {
        Ok(Config::load(&self.config, env::vars())?)
    }
}

impl Serve {
    pub(crate) fn run(&self) -> Result<()> {
        let config = self.file.read()?;
        telemetry::install_logs(&config.log)?;
        Node::bind(config)?.run(|_| {})?;
        Ok(())
    }
}

impl CheckConfig {
    pub(crate) fn run(&self) -> Result<()> {
        let config = self.file.read()?;
        for warning in node::warnings(&config) {
            // A closed standard error hears nothing.
            let _ = writeln!(io::stderr(), "dsd: warning: {warning}");
        }
        Ok(())
    }
}
