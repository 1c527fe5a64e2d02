//! The engine's metrics, registered once so that a step only adds numbers.

use metrics::{Counter, Gauge, Histogram};

use crate::flow::FinishReason;

/// Handles labelled with the model.
pub(super) struct Meter {
    pub(super) step_seconds: Histogram,
    pub(super) step_tokens: Histogram,
    pub(super) step_prediction_ratio: Histogram,
    pub(super) queue_seconds: Histogram,
    pub(super) time_to_first_token_seconds: Histogram,
    pub(super) inter_token_seconds: Histogram,
    pub(super) time_per_output_token_seconds: Histogram,
    pub(super) prefill_seconds: Histogram,
    pub(super) decode_seconds: Histogram,
    pub(super) inference_seconds: Histogram,
    pub(super) sequence_prompt_tokens: Histogram,
    pub(super) sequence_computed_tokens: Histogram,
    pub(super) sequence_output_tokens: Histogram,
    pub(super) prompt_tokens: Counter,
    pub(super) recomputed_tokens: Counter,
    pub(super) cached_tokens: Counter,
    pub(super) tokens_generated: Counter,
    pub(super) preemptions: Counter,
    pub(super) steps_failed: Counter,
    pub(super) canaries_right: Counter,
    pub(super) canaries_wrong: Counter,
    pub(super) canaries_failed: Counter,
    pub(super) sequences_running: Gauge,
    pub(super) sequences_waiting: Gauge,
    pub(super) kv_blocks: Gauge,
    pub(super) kv_blocks_used: Gauge,
    finished: [Counter; End::ALL.len()],
}

/// How a request can end, the reader's leaving included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Stop,
    Length,
    DeadlinePassed,
    Stopped,
    Failed,
    Cancelled,
}

impl End {
    const ALL: [Self; 6] = [
        Self::Stop,
        Self::Length,
        Self::DeadlinePassed,
        Self::Stopped,
        Self::Failed,
        Self::Cancelled,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::DeadlinePassed => "deadline_passed",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl From<&FinishReason> for End {
    fn from(reason: &FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::DeadlinePassed => Self::DeadlinePassed,
            FinishReason::Stopped | FinishReason::InsufficientResources => Self::Stopped,
            FinishReason::Failed(_) => Self::Failed,
        }
    }
}

impl Meter {
    pub(super) fn new(model: &str) -> Self {
        let histogram = |name: &'static str| metrics::histogram!(name, "model" => model.to_owned());
        let counter = |name: &'static str| metrics::counter!(name, "model" => model.to_owned());
        let gauge = |name: &'static str| metrics::gauge!(name, "model" => model.to_owned());
        let canaries = |result: &'static str| {
            let model = model.to_owned();
            metrics::counter!("dsd_canaries_total", "model" => model, "result" => result)
        };
        let finished = |end: End| {
            let (model, reason) = (model.to_owned(), end.name());
            metrics::counter!("dsd_requests_finished_total", "model" => model, "reason" => reason)
        };
        Self {
            step_seconds: histogram("dsd_engine_step_seconds"),
            step_tokens: histogram("dsd_engine_step_tokens"),
            step_prediction_ratio: histogram("dsd_engine_step_seen_over_predicted_ratio"),
            queue_seconds: histogram("dsd_queue_seconds"),
            time_to_first_token_seconds: histogram("dsd_time_to_first_token_seconds"),
            inter_token_seconds: histogram("dsd_inter_token_seconds"),
            time_per_output_token_seconds: histogram("dsd_time_per_output_token_seconds"),
            prefill_seconds: histogram("dsd_prefill_seconds"),
            decode_seconds: histogram("dsd_decode_seconds"),
            inference_seconds: histogram("dsd_inference_seconds"),
            sequence_prompt_tokens: histogram("dsd_sequence_prompt_tokens"),
            sequence_computed_tokens: histogram("dsd_sequence_computed_tokens"),
            sequence_output_tokens: histogram("dsd_sequence_output_tokens"),
            prompt_tokens: counter("dsd_prompt_tokens_total"),
            recomputed_tokens: counter("dsd_recomputed_tokens_total"),
            cached_tokens: counter("dsd_prompt_tokens_cached_total"),
            tokens_generated: counter("dsd_tokens_generated_total"),
            preemptions: counter("dsd_preemptions_total"),
            steps_failed: counter("dsd_engine_steps_failed_total"),
            canaries_right: canaries("right"),
            canaries_wrong: canaries("wrong"),
            canaries_failed: canaries("failed"),
            sequences_running: gauge("dsd_sequences_running"),
            sequences_waiting: gauge("dsd_sequences_waiting"),
            kv_blocks: gauge("dsd_kv_blocks"),
            kv_blocks_used: gauge("dsd_kv_blocks_used"),
            finished: End::ALL.map(finished),
        }
    }

    pub(super) fn count_end(&self, end: End) {
        self.finished[end as usize].increment(1);
    }
}
