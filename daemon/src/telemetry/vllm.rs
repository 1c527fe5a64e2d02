//! The node's metrics under the names that vLLM has, with its labels and its histograms' edges, so that
//! dashboards and autoscalers made for it show this node, too.
//!
//! Names, labels and edges are those of vLLM 0.11 and later (`vllm/v1/metrics/loggers.py` and
//! `buckets.py` there), with two names that it dropped since and older boards ask for.
//!
//! Invariant: nothing is counted here; every value is one of the node's own, read from the text that
//! shows them. Edges are exact: those of the node's own histograms include them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

/// Edges of the time to the first token, in seconds.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Edges of times between tokens, in seconds.
const BETWEEN_TOKENS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Edges of times of whole requests and their phases, in seconds.
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Edges of the tokens of a step.
const STEP_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// Edges of the choices of a request.
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Edges of the tokens of a request; those above a model's context are left out.
const REQUEST_TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
    5e5, 1e6,
];

/// How requests that ended are called there, and by which of the node's ends.
const FINISHED: &[(&str, &[&str])] = &[
    ("stop", &["stop"]),
    ("length", &["length"]),
    ("abort", &["deadline_passed", "stopped", "cancelled"]),
    ("error", &["failed"]),
];

/// Where a value comes from.
enum Source {
    /// The sum of these.
    Sum(&'static [&'static str]),
    /// The first over the second.
    Ratio(&'static str, &'static str),
    /// A counter by [`FINISHED`].
    Finished(&'static str),
    /// A histogram, at these edges.
    Histogram(&'static str, &'static [f64]),
    /// A histogram of tokens of requests: at [`REQUEST_TOKENS`], up to this gauge.
    RequestTokens(&'static str, &'static str),
}

impl Source {
    /// The node's metrics that it reads.
    fn names(&self) -> Vec<&'static str> {
        match self {
            Self::Sum(names) => names.to_vec(),
            Self::Ratio(a, b) | Self::RequestTokens(a, b) => vec![a, b],
            Self::Finished(name) | Self::Histogram(name, _) => vec![name],
        }
    }

    fn type_name(&self, name: &str) -> &'static str {
        match self {
            Self::Sum(_) if name.ends_with("_total") => "counter",
            Self::Finished(_) => "counter",
            Self::Sum(_) | Self::Ratio(..) => "gauge",
            Self::Histogram(..) | Self::RequestTokens(..) => "histogram",
        }
    }
}

const CONTEXT: &str = "dsd_context_tokens";

/// Every name that is served, and what it shows.
#[rustfmt::skip]
const ALIASES: &[(&str, Source)] = &[
    ("vllm:num_requests_running", Source::Sum(&["dsd_sequences_running"])),
    ("vllm:num_requests_waiting", Source::Sum(&["dsd_sequences_waiting"])),
    ("vllm:kv_cache_usage_perc", Source::Ratio("dsd_kv_blocks_used", "dsd_kv_blocks")),
    ("vllm:gpu_cache_usage_perc", Source::Ratio("dsd_kv_blocks_used", "dsd_kv_blocks")),
    ("vllm:prefix_cache_queries_total", Source::Sum(&["dsd_prompt_tokens_total", "dsd_prompt_tokens_cached_total"])),
    ("vllm:prefix_cache_hits_total", Source::Sum(&["dsd_prompt_tokens_cached_total"])),
    ("vllm:num_preemptions_total", Source::Sum(&["dsd_preemptions_total"])),
    ("vllm:prompt_tokens_total", Source::Sum(&["dsd_prompt_tokens_total", "dsd_prompt_tokens_cached_total"])),
    ("vllm:prompt_tokens_cached_total", Source::Sum(&["dsd_prompt_tokens_cached_total"])),
    ("vllm:generation_tokens_total", Source::Sum(&["dsd_tokens_generated_total"])),
    ("vllm:request_success_total", Source::Finished("dsd_requests_finished_total")),
    ("vllm:iteration_tokens_total", Source::Histogram("dsd_engine_step_tokens", STEP_TOKENS)),
    ("vllm:time_to_first_token_seconds", Source::Histogram("dsd_time_to_first_token_seconds", FIRST_TOKEN)),
    ("vllm:inter_token_latency_seconds", Source::Histogram("dsd_inter_token_seconds", BETWEEN_TOKENS)),
    ("vllm:time_per_output_token_seconds", Source::Histogram("dsd_inter_token_seconds", BETWEEN_TOKENS)),
    ("vllm:request_time_per_output_token_seconds", Source::Histogram("dsd_time_per_output_token_seconds", BETWEEN_TOKENS)),
    ("vllm:e2e_request_latency_seconds", Source::Histogram("dsd_generation_seconds", REQUEST)),
    ("vllm:request_queue_time_seconds", Source::Histogram("dsd_queue_seconds", REQUEST)),
    ("vllm:request_prefill_time_seconds", Source::Histogram("dsd_prefill_seconds", REQUEST)),
    ("vllm:request_decode_time_seconds", Source::Histogram("dsd_decode_seconds", REQUEST)),
    ("vllm:request_inference_time_seconds", Source::Histogram("dsd_inference_seconds", REQUEST)),
    ("vllm:request_prompt_tokens", Source::RequestTokens("dsd_sequence_prompt_tokens", CONTEXT)),
    ("vllm:request_prefill_kv_computed_tokens", Source::RequestTokens("dsd_sequence_computed_tokens", CONTEXT)),
    ("vllm:request_generation_tokens", Source::RequestTokens("dsd_sequence_output_tokens", CONTEXT)),
    ("vllm:request_max_num_generation_tokens", Source::RequestTokens("dsd_request_longest_tokens", CONTEXT)),
    ("vllm:request_params_max_tokens", Source::RequestTokens("dsd_request_max_tokens", CONTEXT)),
    ("vllm:request_params_n", Source::Histogram("dsd_request_choices", CHOICES)),
];

/// The edges at which a histogram of the node is read here.
pub(super) fn edges_of(name: &str) -> impl Iterator<Item = f64> {
    let edges = ALIASES.iter().filter_map(move |(_, source)| match source {
        Source::Histogram(of, edges) if *of == name => Some(*edges),
        Source::RequestTokens(of, _) if *of == name => Some(REQUEST_TOKENS),
        _ => None,
    });
    edges.flatten().copied()
}

/// The names under which a metric of the node is read.
pub(super) fn names_of(name: &str) -> impl Iterator<Item = &'static str> {
    let reads = move |source: &Source| match source {
        Source::RequestTokens(of, _) => *of == name,
        source => source.names().into_iter().any(|of| of == name),
    };
    ALIASES
        .iter()
        .filter(move |(_, source)| reads(source))
        .map(|(alias, _)| *alias)
}

/// The part of docs/METRICS.md that says how they are to be read.
pub(super) fn markdown() -> String {
    let mut text = String::from(
        "\n## vLLM's names\n\n\
         The same values under vLLM's names, with its labels (`model_name`, and `engine`, which is always `0`) and its histograms'\n\
         edges. What vLLM shows besides (LoRA, speculative decoding, multimodal caches, sleep) has nothing here to show and is absent.\n\n\
         | name | type | of |\n|---|---|---|\n",
    );
    for (alias, source) in ALIASES {
        let names: Vec<String> = (source.names().iter())
            .filter(|name| **name != CONTEXT)
            .map(|name| format!("`{name}`"))
            .collect();
        let of = match source {
            Source::Ratio(..) => names.join(" / "),
            Source::Finished(_) => {
                let ends = FINISHED.iter().map(|(finished, reasons)| {
                    format!("`finished_reason` {finished}: {}", reasons.join(", "))
                });
                format!(
                    "{} ({})",
                    names.join(""),
                    ends.collect::<Vec<_>>().join("; ")
                )
            }
            _ => names.join(" + "),
        };
        let kind = source.type_name(alias);
        text.push_str(&format!("| `{alias}` | {kind} | {of} |\n"));
    }
    text
}

/// One line of the node's text. Names and values are as they stand there, escapes included.
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(&'a str, &'a str)>,
    value: f64,
}

impl<'a> Sample<'a> {
    /// Reads `name{label="value",..} number`; `None` for comments and empty lines.
    fn read(line: &'a str) -> Option<Self> {
        let (name, mut rest) = line.split_at(line.find(['{', ' '])?);
        let mut labels = Vec::new();
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            while !rest.starts_with('}') {
                let (label, value) = rest.trim_start_matches(',').split_once("=\"")?;
                let end = closing_quote(value)?;
                labels.push((label, &value[..end]));
                rest = &value[end + 1..];
            }
            rest = &rest[1..];
        }
        let value = rest.trim().parse().ok()?;
        Some(Self {
            name,
            labels,
            value,
        })
    }

    fn label(&self, name: &str) -> Option<&'a str> {
        let label = self.labels.iter().find(|(label, _)| *label == name);
        label.map(|(_, value)| *value)
    }
}

/// Where a value ends that may hold escaped quotes.
fn closing_quote(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    text.bytes().position(|byte| {
        let is_end = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        is_end
    })
}

/// The node's samples by name.
struct Samples<'a>(BTreeMap<&'a str, Vec<Sample<'a>>>);

impl<'a> Samples<'a> {
    fn read(text: &'a str) -> Self {
        let mut samples: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for sample in text.lines().filter_map(Sample::read) {
            samples.entry(sample.name).or_default().push(sample);
        }
        Self(samples)
    }

    fn of(&self, name: &str) -> &[Sample<'a>] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The models that a metric is shown for.
    fn models(&self, name: &str) -> BTreeSet<&'a str> {
        let samples = self.of(name).iter();
        samples.filter_map(|sample| sample.label("model")).collect()
    }

    /// The sum of a metric's values of a model where `is_it`; `None` where there is none.
    fn sum(&self, name: &str, model: &str, is_it: impl Fn(&Sample<'_>) -> bool) -> Option<f64> {
        let samples = self.of(name).iter();
        let values = samples
            .filter(|sample| sample.label("model") == Some(model) && is_it(sample))
            .map(|sample| sample.value);
        values.reduce(|a, b| a + b)
    }
}

/// The node's text again, under vLLM's names.
pub(super) fn render(native: &str) -> String {
    let samples = Samples::read(native);
    let mut text = String::new();
    for (alias, source) in ALIASES {
        let lines = lines(alias, source, &samples);
        if !lines.is_empty() {
            let (of, kind) = (source.names().join(" and "), source.type_name(alias));
            text.push_str(&format!("# HELP {alias} As in vLLM, of {of}.\n"));
            text.push_str(&format!("# TYPE {alias} {kind}\n{lines}\n"));
        }
    }
    text
}

fn lines(alias: &str, source: &Source, samples: &Samples<'_>) -> String {
    let mut text = String::new();
    let mut line = |suffix: &str, model: &str, more: Option<(&str, &str)>, value: f64| {
        let more = more.map_or_else(String::new, |(label, value)| {
            format!(",{label}=\"{value}\"")
        });
        let labels = format!("model_name=\"{model}\",engine=\"0\"{more}");
        // Writing to a string does not fail.
        let _ = writeln!(text, "{alias}{suffix}{{{labels}}} {value}");
    };
    let all = |_: &Sample<'_>| true;
    match source {
        Source::Sum(names) => {
            for model in samples.models(names[0]) {
                let values = names
                    .iter()
                    .filter_map(|name| samples.sum(name, model, all));
                line("", model, None, values.sum());
            }
        }
        Source::Ratio(part, whole) => {
            for model in samples.models(whole) {
                let part = samples.sum(part, model, all).unwrap_or(0.0);
                let whole = samples.sum(whole, model, all).unwrap_or(0.0);
                line(
                    "",
                    model,
                    None,
                    if 0.0 < whole { part / whole } else { 0.0 },
                );
            }
        }
        Source::Finished(name) => {
            for model in samples.models(name) {
                for (finished, reasons) in FINISHED {
                    let is_it =
                        |s: &Sample<'_>| s.label("reason").is_some_and(|r| reasons.contains(&r));
                    let n = samples.sum(name, model, is_it).unwrap_or(0.0);
                    line("", model, Some(("finished_reason", finished)), n);
                }
            }
        }
        Source::Histogram(name, edges) => {
            for model in samples.models(&format!("{name}_count")) {
                histogram(samples, name, model, edges, &mut line);
            }
        }
        Source::RequestTokens(name, limit) => {
            for model in samples.models(&format!("{name}_count")) {
                let limit = samples.sum(limit, model, all).unwrap_or(f64::INFINITY);
                let n = REQUEST_TOKENS.iter().take_while(|edge| **edge <= limit);
                histogram(
                    samples,
                    name,
                    model,
                    &REQUEST_TOKENS[..n.count()],
                    &mut line,
                );
            }
        }
    }
    text
}

/// Writes a line: what follows the name, the model, one more label, the value.
type WriteLine<'a> = &'a mut dyn FnMut(&str, &str, Option<(&str, &str)>, f64);

fn histogram(samples: &Samples<'_>, name: &str, model: &str, edges: &[f64], line: WriteLine<'_>) {
    let buckets = format!("{name}_bucket");
    let at = |edge: f64| {
        let is_it = |s: &Sample<'_>| s.label("le").and_then(|le| le.parse().ok()) == Some(edge);
        samples.sum(&buckets, model, is_it)
    };
    for edge in edges {
        if let Some(n) = at(*edge) {
            line("_bucket", model, Some(("le", &edge_text(*edge))), n);
        }
    }
    let value = |suffix: &str| {
        let name = format!("{name}{suffix}");
        samples.sum(&name, model, |_| true).unwrap_or(0.0)
    };
    let n = value("_count");
    line("_bucket", model, Some(("le", "+Inf")), n);
    line("_sum", model, None, value("_sum"));
    line("_count", model, None, n);
}

/// An edge as Python's Prometheus client writes it: queries name edges by their text.
fn edge_text(edge: f64) -> String {
    if edge < 1e6 {
        return format!("{edge:?}");
    }
    let (digits, exponent) = {
        let text = format!("{edge:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        (digits.to_owned(), exponent.parse::<i32>().unwrap_or(0))
    };
    format!("{digits}e+{exponent:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::METRICS;

    #[test]
    fn every_alias_shows_a_metric_of_the_table_at_edges_that_it_has() {
        for (alias, source) in ALIASES {
            for name in source.names() {
                let doc = METRICS.iter().find(|doc| doc.name == name);
                assert!(
                    doc.is_some_and(|doc| doc.labels[0].name == "model"),
                    "{alias}: {name}"
                );
            }
        }
    }

    #[test]
    fn samples_are_read_with_their_escapes() {
        let line = r#"a_total{model="x\"},y=\"1\\",end="stop"} 12"#;
        let sample = Sample::read(line).unwrap();
        assert_eq!(sample.name, "a_total");
        assert_eq!(sample.label("model"), Some(r#"x\"},y=\"1\\"#));
        assert_eq!(sample.label("end"), Some("stop"));
        assert_eq!(sample.value, 12.0);
        assert_eq!(Sample::read("b 0.5").map(|s| s.value), Some(0.5));
        for line in ["", "# TYPE a counter", "a{b=\"c", "a{b} 1", "a{b=\"c\"}"] {
            assert!(Sample::read(line).is_none(), "{line}");
        }
    }

    /// The whole text for two models, as vLLM would show them.
    #[test]
    fn values_stand_under_both_names() {
        let native = "\
            dsd_sequences_running{model=\"m\"} 3\n\
            dsd_sequences_running{model=\"n\"} 0\n\
            dsd_kv_blocks{model=\"m\"} 8\n\
            dsd_kv_blocks_used{model=\"m\"} 2\n\
            dsd_prompt_tokens_total{model=\"m\"} 100\n\
            dsd_prompt_tokens_cached_total{model=\"m\"} 28\n\
            dsd_requests_finished_total{model=\"m\",reason=\"stop\"} 5\n\
            dsd_requests_finished_total{model=\"m\",reason=\"cancelled\"} 2\n\
            dsd_requests_finished_total{model=\"m\",reason=\"stopped\"} 1\n\
            dsd_context_tokens{model=\"m\"} 15\n\
            dsd_sequence_prompt_tokens_bucket{model=\"m\",le=\"1\"} 0\n\
            dsd_sequence_prompt_tokens_bucket{model=\"m\",le=\"4\"} 3\n\
            dsd_sequence_prompt_tokens_bucket{model=\"m\",le=\"10\"} 4\n\
            dsd_sequence_prompt_tokens_bucket{model=\"m\",le=\"20\"} 5\n\
            dsd_sequence_prompt_tokens_bucket{model=\"m\",le=\"+Inf\"} 6\n\
            dsd_sequence_prompt_tokens_sum{model=\"m\"} 50.5\n\
            dsd_sequence_prompt_tokens_count{model=\"m\"} 6\n";
        let text = render(native);
        for expected in [
            "# TYPE vllm:num_requests_running gauge\n\
             vllm:num_requests_running{model_name=\"m\",engine=\"0\"} 3\n\
             vllm:num_requests_running{model_name=\"n\",engine=\"0\"} 0\n",
            "vllm:kv_cache_usage_perc{model_name=\"m\",engine=\"0\"} 0.25\n",
            "# TYPE vllm:prompt_tokens_total counter\n\
             vllm:prompt_tokens_total{model_name=\"m\",engine=\"0\"} 128\n",
            "vllm:prefix_cache_hits_total{model_name=\"m\",engine=\"0\"} 28\n",
            "vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"stop\"} 5\n\
             vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"length\"} 0\n\
             vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"abort\"} 3\n\
             vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"error\"} 0\n",
            // Edges that are not vLLM's, and those above the context, are left out.
            "# TYPE vllm:request_prompt_tokens histogram\n\
             vllm:request_prompt_tokens_bucket{model_name=\"m\",engine=\"0\",le=\"1.0\"} 0\n\
             vllm:request_prompt_tokens_bucket{model_name=\"m\",engine=\"0\",le=\"10.0\"} 4\n\
             vllm:request_prompt_tokens_bucket{model_name=\"m\",engine=\"0\",le=\"+Inf\"} 6\n\
             vllm:request_prompt_tokens_sum{model_name=\"m\",engine=\"0\"} 50.5\n\
             vllm:request_prompt_tokens_count{model_name=\"m\",engine=\"0\"} 6\n",
        ] {
            assert!(text.contains(expected), "{expected}\n--\n{text}");
        }
        assert!(!text.contains("vllm:time_to_first_token_seconds"), "{text}");
    }

    #[test]
    fn edges_are_written_as_pythons_client_does() {
        for (edge, expected) in [
            (0.001, "0.001"),
            (1.0, "1.0"),
            (7680.0, "7680.0"),
            (5e5, "500000.0"),
            (1e6, "1e+06"),
        ] {
            assert_eq!(edge_text(edge), expected);
        }
    }
}
