//! Metrics of a rank process, carried to its agent: there they are counted as if they were its own.
//!
//! Invariant: what is held between two deliveries is bounded; beyond that, samples are dropped and
//! counters and gauges are not.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dsd_proto::wire::group::{MetricKind, MetricSeries, MetricUpdate};
use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Label, Metadata,
    Recorder, SharedString, Unit,
};

/// Updates held at most; a step makes about twenty.
const UPDATES_MAX: usize = 65_536;
/// Series that a rank may name.
const SERIES_MAX: usize = 4_096;

/// Collects what a rank counts until somebody delivers it.
#[derive(Debug, Clone, Default)]
pub struct Collector(Arc<Mutex<Pending>>);

#[derive(Debug, Default)]
struct Pending {
    ids: HashMap<(u8, Key), u32>,
    /// Series that were not delivered yet.
    series: Vec<MetricSeries>,
    updates: Vec<MetricUpdate>,
}

impl Collector {
    /// Makes this process' metrics go here.
    ///
    /// # Errors
    /// When they go elsewhere already.
    pub fn install(&self) -> Result<(), metrics::SetRecorderError<Self>> {
        metrics::set_global_recorder(self.clone())
    }

    /// What came since the last call.
    pub fn take(&self) -> (Vec<MetricSeries>, Vec<MetricUpdate>) {
        let mut pending = self.lock();
        (
            mem::take(&mut pending.series),
            mem::take(&mut pending.updates),
        )
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn series(&self, kind: MetricKind, key: &Key) -> Arc<Series> {
        let mut pending = self.lock();
        let next = pending.ids.len() as u32;
        let code = match kind {
            MetricKind::Counter => 0,
            MetricKind::Gauge => 1,
            MetricKind::Histogram => 2,
        };
        let id = *pending.ids.entry((code, key.clone())).or_insert(next);
        if id == next {
            let labels = key.labels();
            pending.series.push(MetricSeries {
                id,
                kind,
                name: key.name().to_owned(),
                labels: labels
                    .flat_map(|l| [l.key().to_owned(), l.value().to_owned()])
                    .collect(),
            });
        }
        Arc::new(Series {
            id,
            collector: self.clone(),
        })
    }
}

struct Series {
    id: u32,
    collector: Collector,
}

impl Series {
    fn push(&self, value: f64, may_drop: bool) {
        let mut pending = self.collector.lock();
        if pending.updates.len() < UPDATES_MAX {
            pending.updates.push(MetricUpdate { id: self.id, value });
        } else if !may_drop
            && let Some(last) = pending.updates.iter_mut().rfind(|u| u.id == self.id)
        {
            last.value += value;
        }
    }
}

impl CounterFn for Series {
    #[expect(clippy::cast_precision_loss, reason = "increments are small")]
    fn increment(&self, value: u64) {
        if value > 0 {
            self.push(value as f64, false);
        }
    }

    fn absolute(&self, _value: u64) {
        debug_assert!(false, "a rank's counters only add, so that they survive it");
    }
}

impl GaugeFn for Series {
    fn increment(&self, _value: f64) {
        debug_assert!(
            false,
            "a rank's gauges are set, so that they do not outlive it"
        );
    }

    fn decrement(&self, _value: f64) {
        debug_assert!(
            false,
            "a rank's gauges are set, so that they do not outlive it"
        );
    }

    fn set(&self, value: f64) {
        let mut pending = self.collector.lock();
        match pending.updates.iter_mut().find(|u| u.id == self.id) {
            Some(update) => update.value = value,
            None => pending.updates.push(MetricUpdate { id: self.id, value }),
        }
    }
}

impl HistogramFn for Series {
    fn record(&self, value: f64) {
        self.push(value, true);
    }
}

impl Recorder for Collector {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.series(MetricKind::Counter, key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.series(MetricKind::Gauge, key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.series(MetricKind::Histogram, key))
    }
}

/// Counts here what a rank counted there.
#[derive(Default)]
pub struct Delivery {
    handles: HashMap<u32, Handle>,
}

enum Handle {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

impl Delivery {
    /// Applies what [`Collector::take`] gave; updates of series that were not named are dropped.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a counter's increments are whole and not negative; others saturate"
    )]
    pub fn apply(&mut self, series: Vec<MetricSeries>, updates: &[MetricUpdate]) {
        for MetricSeries {
            id,
            kind,
            name,
            labels,
        } in series
        {
            if self.handles.len() == SERIES_MAX {
                break;
            }
            let (pairs, _) = labels.as_chunks::<2>();
            let labels = pairs
                .iter()
                .map(|[key, value]| Label::new(key.clone(), value.clone()))
                .collect::<Vec<_>>();
            let handle = match kind {
                MetricKind::Counter => Handle::Counter(metrics::counter!(name, labels)),
                MetricKind::Gauge => Handle::Gauge(metrics::gauge!(name, labels)),
                MetricKind::Histogram => Handle::Histogram(metrics::histogram!(name, labels)),
            };
            self.handles.insert(id, handle);
        }
        for MetricUpdate { id, value } in updates {
            match self.handles.get(id) {
                Some(Handle::Counter(counter)) => counter.increment(*value as u64),
                Some(Handle::Gauge(gauge)) => gauge.set(*value),
                Some(Handle::Histogram(histogram)) => histogram.record(*value),
                None => {}
            }
        }
    }
}
