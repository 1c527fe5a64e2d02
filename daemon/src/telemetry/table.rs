//! The table of metrics: every name, its kind, labels and meaning; counting is set up by it, and
//! docs/METRICS.md is made of it.
//!
//! Knows not who counts.
//!
//! Invariant: a counter or histogram whose labels are known is there from the start, at 0: a rate over
//! one that appears with its first event misses that event.

use metrics::Label;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::{TelemetryError, vllm};

/// Upper edges of latency histograms, in seconds: from a step of a tiny model to a long answer.
const SECONDS_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0, 600.0,
];

/// Upper edges of token histograms.
const TOKENS_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
];

/// Upper edges of histograms of what was seen over what was predicted.
const RATIO_BUCKETS: &[f64] = &[0.25, 0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0];

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution of seconds.
    Seconds,
    /// Distribution of counts, of tokens most often.
    Tokens,
    /// Distribution of ratios around 1.
    Ratio,
}

impl MetricKind {
    /// Its type in Prometheus.
    fn type_name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Seconds | Self::Tokens | Self::Ratio => "histogram",
        }
    }
}

/// What values a label has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelValues {
    /// These.
    OneOf(&'static [&'static str]),
    /// Names that [`declare`] is told.
    Declared,
    /// Whatever comes.
    Open,
}

/// A label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabelDoc {
    /// Its name.
    pub name: &'static str,
    /// Its values.
    pub values: LabelValues,
}

/// One metric as documented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricDoc {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: MetricKind,
    /// Its labels.
    pub labels: &'static [LabelDoc],
    /// What it says.
    pub help: &'static str,
}

const fn metric(
    name: &'static str,
    kind: MetricKind,
    labels: &'static [LabelDoc],
    help: &'static str,
) -> MetricDoc {
    MetricDoc {
        name,
        kind,
        labels,
        help,
    }
}

const fn one_of(name: &'static str, values: &'static [&'static str]) -> LabelDoc {
    LabelDoc {
        name,
        values: LabelValues::OneOf(values),
    }
}

const fn declared(name: &'static str) -> LabelDoc {
    LabelDoc {
        name,
        values: LabelValues::Declared,
    }
}

const fn open(name: &'static str) -> LabelDoc {
    LabelDoc {
        name,
        values: LabelValues::Open,
    }
}

const MODEL: LabelDoc = declared("model");
const TENANT: LabelDoc = declared("tenant");
const ROUTE: LabelDoc = open("route");
const STATUS: LabelDoc = open("status");

/// How choices end.
const ENDS: &[&str] = &[
    "stop",
    "tool_calls",
    "length",
    "deadline",
    "stopped",
    "lost",
    "failed",
    "cancelled",
];
/// How requests end in an engine.
const REASONS: &[&str] = &[
    "stop",
    "length",
    "deadline_passed",
    "stopped",
    "failed",
    "cancelled",
];
/// Why a tenant's requests are refused.
const TENANT_REFUSALS: &[&str] = &["concurrency", "requests", "tokens", "model", "busy"];

/// Every metric of the node.
#[rustfmt::skip]
pub const METRICS: &[MetricDoc] = &[
    metric("dsd_http_requests_total", MetricKind::Counter, &[ROUTE, STATUS], "Answers by route and status."),
    metric("dsd_http_request_seconds", MetricKind::Seconds, &[ROUTE], "Request head to answer head, by route."),
    metric("dsd_http_connections", MetricKind::Gauge, &[], "Open connections."),
    metric("dsd_http_streams", MetricKind::Gauge, &[], "Event streams being sent."),
    metric("dsd_http_bodies_refused_total", MetricKind::Counter, &[one_of("cause", &["no_room", "stalled"])], "Bodies without room in the budget, or stalled while others waited for it, by cause."),
    metric("dsd_generations_total", MetricKind::Counter, &[MODEL, one_of("end", ENDS)], "Choices by model and how they ended."),
    metric("dsd_generation_seconds", MetricKind::Seconds, &[MODEL], "Admission to the end of a choice."),
    metric("dsd_request_choices", MetricKind::Tokens, &[MODEL], "Choices that a request asks for, for each of its prompts."),
    metric("dsd_request_max_tokens", MetricKind::Tokens, &[MODEL], "Tokens that a request asks for at most."),
    metric("dsd_request_longest_tokens", MetricKind::Tokens, &[MODEL], "Tokens of the longest choice of a request."),
    metric("dsd_requests_finished_total", MetricKind::Counter, &[MODEL, one_of("reason", REASONS)], "Engine requests by model and reason of their end."),
    metric("dsd_queue_seconds", MetricKind::Seconds, &[MODEL], "Admission to the first step."),
    metric("dsd_time_to_first_token_seconds", MetricKind::Seconds, &[MODEL], "Admission to the first token."),
    metric("dsd_inter_token_seconds", MetricKind::Seconds, &[MODEL], "Between two tokens of a sequence."),
    metric("dsd_time_per_output_token_seconds", MetricKind::Seconds, &[MODEL], "First to last token of a sequence, over the tokens after the first."),
    metric("dsd_prefill_seconds", MetricKind::Seconds, &[MODEL], "First step of a sequence to its first token."),
    metric("dsd_decode_seconds", MetricKind::Seconds, &[MODEL], "First to last token of a sequence."),
    metric("dsd_inference_seconds", MetricKind::Seconds, &[MODEL], "First step of a sequence to its last token."),
    metric("dsd_sequence_prompt_tokens", MetricKind::Tokens, &[MODEL], "Prompt tokens of a sequence that gave a token."),
    metric("dsd_sequence_computed_tokens", MetricKind::Tokens, &[MODEL], "Prompt tokens of such a sequence that were not found in the cache."),
    metric("dsd_sequence_output_tokens", MetricKind::Tokens, &[MODEL], "Tokens that such a sequence gave."),
    metric("dsd_group_losses_total", MetricKind::Counter, &[MODEL], "Groups of ranks that were lost and formed again, by model."),
    metric("dsd_sequences_running", MetricKind::Gauge, &[MODEL], "Sequences in the running set."),
    metric("dsd_sequences_waiting", MetricKind::Gauge, &[MODEL], "Requests that wait for a place."),
    metric("dsd_kv_blocks", MetricKind::Gauge, &[MODEL], "KV blocks for requests."),
    metric("dsd_kv_blocks_used", MetricKind::Gauge, &[MODEL], "KV blocks in use."),
    metric("dsd_context_tokens", MetricKind::Gauge, &[MODEL], "Positions that prompt and output of a request may have together."),
    metric("dsd_tenant_requests_total", MetricKind::Counter, &[TENANT], "Requests taken, by tenant."),
    metric("dsd_tenant_tokens_total", MetricKind::Counter, &[TENANT, one_of("kind", &["prompt", "cached", "output"])], "Tokens by tenant and kind: prompt, cached (of them), output."),
    metric("dsd_tenant_refusals_total", MetricKind::Counter, &[TENANT, one_of("reason", TENANT_REFUSALS)], "Requests refused, by tenant and reason."),
    metric("dsd_tenant_queue_seconds", MetricKind::Seconds, &[TENANT], "Admission to the first step, by tenant."),
    metric("dsd_tenant_choices_waiting", MetricKind::Gauge, &[TENANT], "Choices that wait for their first step, by tenant."),
    metric("dsd_tenant_choices_running", MetricKind::Gauge, &[TENANT], "Choices under way, by tenant."),
    metric("dsd_tenant_work_share_ratio", MetricKind::Gauge, &[TENANT], "A tenant's part of the work of the last minute."),
    metric("dsd_tenant_reloads_total", MetricKind::Counter, &[one_of("result", &["ok", "failed"])], "Times the file of tenants or keys was read again, by result."),
    metric("dsd_pack_locked_bytes", MetricKind::Gauge, &[MODEL], "Bytes of a model's pack that stay in memory."),
    metric("dsd_pack_damaged_tensors", MetricKind::Gauge, &[MODEL], "Tensors of a model's pack that are not what was packed."),
    metric("dsd_pack_scrubs_total", MetricKind::Counter, &[MODEL], "Reads of all tensors of a model's pack."),
    metric("dsd_preemptions_total", MetricKind::Counter, &[MODEL], "Sequences preempted for want of KV blocks."),
    metric("dsd_prompt_tokens_total", MetricKind::Counter, &[MODEL], "Prompt tokens computed."),
    metric("dsd_prompt_tokens_cached_total", MetricKind::Counter, &[MODEL], "Prompt tokens found in the cache."),
    metric("dsd_recomputed_tokens_total", MetricKind::Counter, &[MODEL], "Tokens computed again after a preemption."),
    metric("dsd_tokens_generated_total", MetricKind::Counter, &[MODEL], "Tokens generated."),
    metric("dsd_engine_step_seconds", MetricKind::Seconds, &[MODEL], "Time of a step."),
    metric("dsd_engine_step_seen_over_predicted_ratio", MetricKind::Ratio, &[MODEL], "Time of a step over the cost model's prediction."),
    metric("dsd_ttft_seen_over_predicted_ratio", MetricKind::Ratio, &[MODEL], "Time to the first token of interactive requests over what admission predicted."),
    metric("dsd_refusals_total", MetricKind::Counter, &[MODEL, one_of("reason", &["busy", "queue_full", "too_late"])], "Requests refused by admission, by reason."),
    metric("dsd_engine_step_tokens", MetricKind::Tokens, &[MODEL], "Tokens of a step."),
    metric("dsd_engine_steps_failed_total", MetricKind::Counter, &[MODEL], "Steps that failed."),
    metric("dsd_canaries_total", MetricKind::Counter, &[MODEL, one_of("result", &["right", "wrong", "failed"])], "Canary requests by model and result."),
];

/// Renders what was counted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(PrometheusHandle);

/// Starts to count. The process has one set of counters.
///
/// # Errors
/// When counters are set already.
pub fn install_metrics() -> Result<Metrics, TelemetryError> {
    let mut builder = PrometheusBuilder::new();
    for doc in METRICS {
        if let Some(buckets) = buckets(doc) {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(doc.name.to_owned()), &buckets)
                .map_err(TelemetryError::Metrics)?;
        }
    }
    let handle = builder
        .install_recorder()
        .map_err(TelemetryError::Metrics)?;
    for MetricDoc {
        name, kind, help, ..
    } in METRICS
    {
        match kind {
            MetricKind::Counter => metrics::describe_counter!(*name, *help),
            MetricKind::Gauge => metrics::describe_gauge!(*name, *help),
            MetricKind::Seconds => {
                metrics::describe_histogram!(*name, metrics::Unit::Seconds, *help);
            }
            MetricKind::Tokens | MetricKind::Ratio => metrics::describe_histogram!(*name, *help),
        }
    }
    for doc in METRICS.iter().filter(|doc| !has_declared(doc)) {
        begin(doc, Vec::new());
    }
    Ok(Metrics(handle))
}

/// Upper edges of a histogram: its own, and those at which it is read under other names.
fn buckets(doc: &MetricDoc) -> Option<Vec<f64>> {
    let own = match doc.kind {
        MetricKind::Counter | MetricKind::Gauge => return None,
        MetricKind::Seconds => SECONDS_BUCKETS,
        MetricKind::Tokens => TOKENS_BUCKETS,
        MetricKind::Ratio => RATIO_BUCKETS,
    };
    let mut buckets: Vec<f64> = own
        .iter()
        .copied()
        .chain(vllm::edges_of(doc.name))
        .collect();
    buckets.sort_by(f64::total_cmp);
    buckets.dedup();
    Some(buckets)
}

fn has_declared(doc: &MetricDoc) -> bool {
    let mut labels = doc.labels.iter();
    labels.any(|label| label.values == LabelValues::Declared)
}

/// Lets every counter and histogram with a label `label` begin for one more of its values: a model or a
/// tenant. Those that have begun go on.
pub fn declare(label: &'static str, value: &str) {
    let is_it = |doc: &&MetricDoc| {
        let declared = |l: &LabelDoc| l.name == label && l.values == LabelValues::Declared;
        doc.labels.iter().any(declared)
    };
    for doc in METRICS.iter().filter(is_it) {
        begin(doc, vec![Label::new(label, value.to_owned())]);
    }
}

/// Begins all series of a metric that have `declared` among their labels.
fn begin(doc: &MetricDoc, declared: Vec<Label>) {
    let mut series = vec![declared];
    for label in doc.labels {
        match label.values {
            LabelValues::Declared => {}
            LabelValues::Open => return,
            LabelValues::OneOf(values) => {
                let with = |labels: &Vec<Label>, value: &'static str| {
                    let mut labels = labels.clone();
                    labels.push(Label::from_static_parts(label.name, value));
                    labels
                };
                series = series
                    .iter()
                    .flat_map(|labels| values.iter().map(move |value| with(labels, value)))
                    .collect();
            }
        }
    }
    for labels in series {
        match doc.kind {
            MetricKind::Counter => metrics::counter!(doc.name, labels).increment(0),
            // Not known before it is set.
            MetricKind::Gauge => {}
            MetricKind::Seconds | MetricKind::Tokens | MetricKind::Ratio => {
                drop(metrics::histogram!(doc.name, labels));
            }
        }
    }
}

impl Metrics {
    /// Everything counted so far, in Prometheus text format, under the names of vLLM, too. Also folds
    /// histogram samples together, which otherwise pile up: call it, or [`Self::tidy`], every few
    /// seconds.
    pub fn render(&self) -> String {
        let mut text = self.0.render();
        let aliases = vllm::render(&text);
        text.push_str(&aliases);
        text
    }

    /// Folds histogram samples together.
    pub fn tidy(&self) {
        self.0.run_upkeep();
    }
}

/// docs/METRICS.md as it must read.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Metrics\n\n\
         `GET /metrics`, in Prometheus text format, without an API key. Counters and histograms are there from the start, at 0, for\n\
         every model of the configuration and every tenant; gauges once they are known.\n\n\
         | name | type | labels | meaning | under vLLM's names |\n|---|---|---|---|---|\n",
    );
    for doc in METRICS {
        let label = |label: &LabelDoc| match label.values {
            LabelValues::OneOf(values) => format!("`{}` ({})", label.name, values.join(", ")),
            LabelValues::Declared | LabelValues::Open => format!("`{}`", label.name),
        };
        let labels: Vec<String> = doc.labels.iter().map(label).collect();
        let aliases: Vec<String> = vllm::names_of(doc.name)
            .map(|name| format!("`{name}`"))
            .collect();
        text.push_str(&format!(
            "| `{}` | {} | {} | {} | {} |\n",
            doc.name,
            doc.kind.type_name(),
            labels.join(", "),
            doc.help,
            aliases.join(", ")
        ));
    }
    text.push_str(&vllm::markdown());
    text
}
