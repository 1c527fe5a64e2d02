//! `dsd serve`: the node that the configuration file describes.

use std::{
    env,
    path::{Path, PathBuf},
};

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
    pub(super) fn path(&self) -> &Path {
        &self.config
    }

    pub(super) fn read(&self) -> Result<Config> {
        Ok(Config::load(&self.config, env::vars())?)
    }
}

/// Says which variables look like this program's and are not.
pub(super) fn warn_of_variables() {
    for name in config::unread_variables(env::vars()) {
        tracing::warn!(name, "nothing reads this environment variable");
    }
}

impl Serve {
    pub(crate) fn run(&self) -> Result<()> {
        let config = self.file.read()?;
        telemetry::install_logs(&config.log)?;
        warn_of_variables();
        let path = self.file.config.clone();
        let reread = Box::new(move || Config::load(&path, env::vars()));
        Node::bind(config, Some(reread))?.run(|_| {})?;
        Ok(())
    }
}
