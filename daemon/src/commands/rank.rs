//! `dsd rank`: one rank of a group. Agents start it; a person has no use for it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use dsd::{
    config::{LogConfig, LogFormat},
    group::{self, rank::RankError},
    telemetry::{self, chain},
};

#[derive(Debug, Args)]
pub(crate) struct Rank {
    /// Levels of the log by module.
    #[arg(long, default_value = "info")]
    log_filter: String,
    /// `text` or `json`.
    #[arg(long, default_value = "text")]
    log_format: String,
    /// The process that starts it, and with which it ends.
    #[arg(long)]
    agent_pid: Option<u32>,
}

impl Rank {
    pub(crate) fn run(self) -> Result<ExitCode> {
        telemetry::install_logs(&LogConfig {
            filter: self.log_filter,
            format: match self.log_format.as_str() {
                "json" => LogFormat::Json,
                _ => LogFormat::Text,
            },
        })?;
        match group::rank::run(self.agent_pid) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(e @ (RankError::Form { .. } | RankError::Lost(_))) => {
                // The agent was told and says so.
                tracing::debug!(error = %chain(&e), "rank ends");
                Ok(ExitCode::FAILURE)
            }
            Err(e) => Err(e.into()),
        }
    }
}
