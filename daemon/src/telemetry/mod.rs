//! Logs to standard error, and the metrics that `/metrics` shows.
//!
//! Knows the name and meaning of every metric; knows not who counts. Called by `main`, and by the
//! gateway to render.

pub mod forward;

use std::{
    error::Error,
    io::{self, IsTerminal},
};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{
    EnvFilter, filter::ParseError, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::config::{LogConfig, LogFormat};

/// Replaces `log.filter` for one start.
pub const LOG_FILTER_ENV: &str = "DSD_LOG";

/// Upper edges of latency histograms, in seconds: from a step of a tiny model to a long answer.
const SECONDS_BUCKETS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0, 600.0,
];

/// Upper edges of token histograms.
const TOKENS_BUCKETS: [f64; 14] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
];

/// Upper edges of histograms of what was seen over what was predicted.
const RATIO_BUCKETS: [f64; 11] = [0.25, 0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0];

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
    /// This process logs already.
    #[error("a logger is set already")]
    LoggerSet(#[source] tracing_subscriber::util::TryInitError),
    /// This process counts already, or the buckets are wrong.
    #[error("cannot set up metrics")]
    Metrics(#[source] BuildError),
}

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution of seconds.
    Seconds,
    /// Distribution of token counts.
    Tokens,
    /// Distribution of ratios around 1.
    Ratio,
}

/// Every metric of the node: name, kind, meaning.
pub const METRICS: &[(&str, MetricKind, &str)] = &[
    (
        "dsd_http_requests_total",
        MetricKind::Counter,
        "Answers by route and status.",
    ),
    (
        "dsd_http_request_seconds",
        MetricKind::Seconds,
        "Request head to answer head, by route.",
    ),
    (
        "dsd_http_connections",
        MetricKind::Gauge,
        "Open connections.",
    ),
    (
        "dsd_http_streams",
        MetricKind::Gauge,
        "Event streams being sent.",
    ),
    (
        "dsd_http_bodies_refused_total",
        MetricKind::Counter,
        "Bodies without room in the budget, or stalled while others waited for it, by cause.",
    ),
    (
        "dsd_generations_total",
        MetricKind::Counter,
        "Choices by model and how they ended.",
    ),
    (
        "dsd_generation_seconds",
        MetricKind::Seconds,
        "Admission to the end of a choice.",
    ),
    (
        "dsd_requests_finished_total",
        MetricKind::Counter,
        "Engine requests by model and reason of their end.",
    ),
    (
        "dsd_queue_seconds",
        MetricKind::Seconds,
        "Admission to the first step.",
    ),
    (
        "dsd_time_to_first_token_seconds",
        MetricKind::Seconds,
        "Admission to the first token.",
    ),
    (
        "dsd_inter_token_seconds",
        MetricKind::Seconds,
        "Between two tokens of a sequence.",
    ),
    (
        "dsd_group_losses_total",
        MetricKind::Counter,
        "Groups of ranks that were lost and formed again, by model.",
    ),
    (
        "dsd_sequences_running",
        MetricKind::Gauge,
        "Sequences in the running set.",
    ),
    (
        "dsd_sequences_waiting",
        MetricKind::Gauge,
        "Requests that wait for a place.",
    ),
    (
        "dsd_kv_blocks",
        MetricKind::Gauge,
        "KV blocks for requests.",
    ),
    ("dsd_kv_blocks_used", MetricKind::Gauge, "KV blocks in use."),
    (
        "dsd_tenant_requests_total",
        MetricKind::Counter,
        "Requests taken, by tenant.",
    ),
    (
        "dsd_tenant_tokens_total",
        MetricKind::Counter,
        "Tokens by tenant and kind: prompt, cached (of them), output.",
    ),
    (
        "dsd_tenant_refusals_total",
        MetricKind::Counter,
        "Requests refused, by tenant and reason.",
    ),
    (
        "dsd_tenant_queue_seconds",
        MetricKind::Seconds,
        "Admission to the first step, by tenant.",
    ),
    (
        "dsd_tenant_choices_waiting",
        MetricKind::Gauge,
        "Choices that wait for their first step, by tenant.",
    ),
    (
        "dsd_tenant_choices_running",
        MetricKind::Gauge,
        "Choices under way, by tenant.",
    ),
    (
        "dsd_tenant_work_share_ratio",
        MetricKind::Gauge,
        "A tenant's part of the work of the last minute.",
    ),
    (
        "dsd_tenant_reloads_total",
        MetricKind::Counter,
        "Times the file of tenants or keys was read again, by result.",
    ),
    (
        "dsd_pack_locked_bytes",
        MetricKind::Gauge,
        "Bytes of a model's pack that stay in memory.",
    ),
    (
        "dsd_pack_damaged_tensors",
        MetricKind::Gauge,
        "Tensors of a model's pack that are not what was packed.",
    ),
    (
        "dsd_pack_scrubs_total",
        MetricKind::Counter,
        "Reads of all tensors of a model's pack.",
    ),
    (
        "dsd_preemptions_total",
        MetricKind::Counter,
        "Sequences preempted for want of KV blocks.",
    ),
    (
        "dsd_prompt_tokens_total",
        MetricKind::Counter,
        "Prompt tokens computed.",
    ),
    (
        "dsd_prompt_tokens_cached_total",
        MetricKind::Counter,
        "Prompt tokens found in the cache.",
    ),
    (
        "dsd_recomputed_tokens_total",
        MetricKind::Counter,
        "Tokens computed again after a preemption.",
    ),
    (
        "dsd_tokens_generated_total",
        MetricKind::Counter,
        "Tokens generated.",
    ),
    (
        "dsd_engine_step_seconds",
        MetricKind::Seconds,
        "Time of a step.",
    ),
    (
        "dsd_engine_step_seen_over_predicted_ratio",
        MetricKind::Ratio,
        "Time of a step over the cost model's prediction.",
    ),
    (
        "dsd_ttft_seen_over_predicted_ratio",
        MetricKind::Ratio,
        "Time to the first token of interactive requests over what admission predicted.",
    ),
    (
        "dsd_refusals_total",
        MetricKind::Counter,
        "Requests refused by admission, by reason.",
    ),
    (
        "dsd_engine_step_tokens",
        MetricKind::Tokens,
        "Tokens of a step.",
    ),
    (
        "dsd_engine_steps_failed_total",
        MetricKind::Counter,
        "Steps that failed.",
    ),
    (
        "dsd_canaries_total",
        MetricKind::Counter,
        "Canary requests by model and result.",
    ),
];

/// Renders what was counted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(PrometheusHandle);

/// Starts to log to standard error.
///
/// # Errors
/// When the filter is wrong or a logger is set already.
pub fn install_logs(config: &LogConfig) -> Result<(), TelemetryError> {
    let filter = std::env::var(LOG_FILTER_ENV).unwrap_or_else(|_| config.filter.clone());
    let filter =
        EnvFilter::try_new(&filter).map_err(|source| TelemetryError::Filter { filter, source })?;
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

/// Starts to count. The process has one set of counters.
///
/// # Errors
/// When counters are set already.
pub fn install_metrics() -> Result<Metrics, TelemetryError> {
    let handle = PrometheusBuilder::new()
        .set_buckets(&SECONDS_BUCKETS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_tokens".to_owned()), &TOKENS_BUCKETS)
        })
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_ratio".to_owned()), &RATIO_BUCKETS)
        })
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(TelemetryError::Metrics)?;
    for &(name, kind, help) in METRICS {
        match kind {
            MetricKind::Counter => metrics::describe_counter!(name, help),
            MetricKind::Gauge => metrics::describe_gauge!(name, help),
            MetricKind::Seconds => {
                metrics::describe_histogram!(name, metrics::Unit::Seconds, help);
            }
            MetricKind::Tokens | MetricKind::Ratio => metrics::describe_histogram!(name, help),
        }
    }
    Ok(Metrics(handle))
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

impl Metrics {
    /// Everything counted so far, in Prometheus text format. Also folds histogram samples together,
    /// which otherwise pile up: call it, or [`Self::tidy`], every few seconds.
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Folds histogram samples together.
    pub fn tidy(&self) {
        self.0.run_upkeep();
    }
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
        let described: BTreeSet<String> = METRICS
            .iter()
            .map(|(name, _, _)| (*name).to_owned())
            .collect();
        assert_eq!(counted, described);
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
