//! `dsd serve`: the node that the configuration file describes.

use std::{env, path::PathBuf};

use anyhow::Result;
use clap::Args;
use dsd::{
    config::{self, Config},
    node::Node,
    telemetry,
};

#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    file: ConfigArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Configuration file; drop-ins lie in `dsd.toml.d` beside it.
    #[arg(long, default_value = config::PATH_DEFAULT, value_name = "FILE")]
    config: PathBuf,
}

impl ConfigArgs {
    pub(super) fn read(&self) -> Result<Config> {
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
