//! Logs to standard error, and the metrics that `/metrics` shows.
//!
//! Knows the name and meaning of every metric; knows not who counts. Called by `main`, by the gateway
//! to render, and by whoever learns of a model or tenant that will be counted for.

mod filter;
pub mod forward;
mod table;
mod vllm;

pub use filter::{log_filter, read_filter};
pub use table::{
    LabelDoc, LabelValues, METRICS, MetricDoc, MetricKind, Metrics, declare, install_metrics,
    markdown,
};

use std::{
    error::Error,
    io::{self, IsTerminal},
};

use metrics_exporter_prometheus::BuildError;
use tracing_subscriber::{filter::ParseError, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{LogConfig, LogFormat};

/// Replaces `log.filter` for one start.
pub const LOG_FILTER_ENV: &str = "DSD_LOG";

/// Why logs or metrics cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not understood.
    #[error("log filter `{filter}` is not understood")]
    Filter {
        /// As given.
        filter: String,
        /// Cause.
        #[source]
        source: ParseError,
    },
    /// The filter names what is no part of this program.
    #[error(
        "log filter `{filter}`: nothing in this program is called `{target}`{}",
        suggestion.as_ref().map_or_else(
            || "; targets are modules such as `dsd::gateway`".to_owned(),
            |word| format!("; did you mean `{word}`?")
        )
    )]
    NoTarget {
        /// As given.
        filter: String,
        /// The part of it.
        target: String,
        /// The nearest target or level.
        suggestion: Option<String>,
    },
    /// This process logs already.
    #[error("a logger is set already")]
    LoggerSet(#[source] tracing_subscriber::util::TryInitError),
    /// This process counts already, or the buckets are wrong.
    #[error("cannot set up metrics")]
    Metrics(#[source] BuildError),
}

/// Starts to log to standard error.
///
/// # Errors
/// When the filter is wrong or a logger is set already.
pub fn install_logs(config: &LogConfig) -> Result<(), TelemetryError> {
    let filter = read_filter(&log_filter(config).0)?;
    let registry = tracing_subscriber::registry().with(filter);
    match config.format {
        LogFormat::Text => registry
            // The journal and files would keep the colour codes as text.
            .with(
                fmt::layer()
                    .with_ansi(io::stderr().is_terminal())
                    .with_writer(io::stderr),
            )
            .try_init(),
        LogFormat::Json => registry
            .with(
                fmt::layer()
                    .json()
                    .flatten_event(true)
                    .with_writer(io::stderr),
            )
            .try_init(),
    }
    .map_err(TelemetryError::LoggerSet)
}

/// An error with all its causes, on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    /// Every quoted name of a metric in the sources of this package, this module and tests left out.
    fn names_in(dir: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if ["telemetry", "tests", "tests.rs"]
                .iter()
                .any(|left_out| path.ends_with(left_out))
            {
                continue;
            }
            if path.is_dir() {
                names_in(&path, names);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for rest in text.split("\"dsd_").skip(1) {
                names.extend(rest.split_once('"').map(|(name, _)| format!("dsd_{name}")));
            }
        }
    }

    #[test]
    fn described_metrics_are_counted_and_counted_ones_described() {
        let mut counted = BTreeSet::new();
        names_in(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut counted,
        );
        let described: BTreeSet<String> = METRICS.iter().map(|doc| doc.name.to_owned()).collect();
        assert_eq!(counted, described);
    }

    #[test]
    fn the_documentation_is_the_table_of_metrics() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/METRICS.md");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(path, markdown()).unwrap();
        }
        let found = fs::read_to_string(path).unwrap_or_default();
        assert_eq!(
            found,
            markdown(),
            "run the test with UPDATE_GOLDEN=1 to rewrite docs/METRICS.md"
        );
    }

    #[test]
    fn a_wrong_filter_is_refused_by_name() {
        let config = LogConfig {
            filter: "info,=x=".into(),
            format: LogFormat::Text,
        };
        let error = install_logs(&config).expect_err("the filter is wrong");
        assert_eq!(error.to_string(), "log filter `info,=x=` is not understood");
    }
}
