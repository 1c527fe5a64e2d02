//! `dsd rank`: one rank of a group. Agents start it; a person has no use for it.

use anyhow::Result;
use clap::Args;
use dsd::{
    config::{LogConfig, LogFormat},
    group, telemetry,
};

#[derive(Debug, Args)]
pub(crate) struct Rank {
    /// Levels of the log by module.
    #[arg(long, default_value = "info")]
    log_filter: String,
    /// `text` or `json`.
    #[arg(long, default_value = "text")]
    log_format: String,
}

impl Rank {
    pub(crate) fn run(self) -> Result<()> {
        telemetry::install_logs(&LogConfig {
            filter: self.log_filter,
            format: match self.log_format.as_str() {
                "json" => LogFormat::Json,
                _ => LogFormat::Text,
            },
        })?;
        Ok(group::rank::run()?)
    }
}
