//! Percentiles by nearest rank.

use serde::Serialize;

/// A sample in a few numbers, in the unit of its values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Percentiles {
    /// Values in the sample; with 0 the other numbers mean nothing and are 0.
    pub(super) n: usize,
    /// Arithmetic mean.
    pub(super) mean: f64,
    /// Half of the values are at most this.
    pub(super) p50: f64,
    /// 90 % are at most this.
    pub(super) p90: f64,
    /// 95 % are at most this.
    pub(super) p95: f64,
    /// 99 % are at most this.
    pub(super) p99: f64,
    /// The largest.
    pub(super) max: f64,
}

impl Percentiles {
    /// Of `values`, in any order.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let Some(&max) = values.last() else {
            return Self::default();
        };
        let rank = |percent: usize| {
            // Smallest rank that covers the share; integers keep p50 of two values exact.
            let rank = (n * percent).div_ceil(100).max(1);
            values.get(rank - 1).copied().unwrap_or(max)
        };
        Self {
            n,
            mean: values.iter().sum::<f64>() / n as f64,
            p50: rank(50),
            p90: rank(90),
            p95: rank(95),
            p99: rank(99),
            max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_those_of_the_definition() {
        let hundred = Percentiles::of((1..=100).rev().map(f64::from).collect());
        let found = (
            hundred.p50,
            hundred.p90,
            hundred.p95,
            hundred.p99,
            hundred.max,
        );
        assert_eq!(found, (50.0, 90.0, 95.0, 99.0, 100.0));
        assert_eq!((hundred.n, hundred.mean), (100, 50.5));
        let two = Percentiles::of(vec![2.0, 1.0]);
        assert_eq!((two.p50, two.p90), (1.0, 2.0));
        let one = Percentiles::of(vec![3.0]);
        assert_eq!((one.p50, one.p99), (3.0, 3.0));
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
    }
}
