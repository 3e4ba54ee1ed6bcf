//! Times, as distributions.

use serde::Serialize;
use std::time::Duration;

/// Times of one kind, in milliseconds, ascending.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Samples {
    /// All of them.
    #[serde(skip)]
    pub all_ms: Vec<f64>,
    /// How many.
    pub count: usize,
    /// The shortest.
    pub min_ms: f64,
    /// Half are not longer.
    pub p50_ms: f64,
    /// Of a hundred, 99 are not longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Samples {
    /// Of these.
    #[must_use]
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut all: Vec<f64> = times
            .into_iter()
            .map(|time| time.as_secs_f64() * 1000.0)
            .collect();
        all.sort_by(f64::total_cmp);
        Self {
            count: all.len(),
            min_ms: all.first().copied().unwrap_or_default(),
            p50_ms: quantile(&all, 50),
            p99_ms: quantile(&all, 99),
            max_ms: all.last().copied().unwrap_or_default(),
            all_ms: all,
        }
    }
}

impl Samples {
    /// The smallest that so many of a thousand do not exceed.
    #[must_use]
    pub fn per_mille(&self, of_thousand: usize) -> f64 {
        let rank = (self.all_ms.len() * of_thousand).div_ceil(1000).max(1);
        self.all_ms.get(rank - 1).copied().unwrap_or_default()
    }
}

/// The smallest that so many of a hundred do not exceed.
fn quantile(ascending: &[f64], percent: usize) -> f64 {
    let rank = (ascending.len() * percent).div_ceil(100).max(1);
    ascending.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_samples() {
        let samples = Samples::of((1..=200).rev().map(Duration::from_millis));
        assert_eq!((samples.count, samples.p50_ms), (200, 100.0));
        assert_eq!(samples.min_ms, 1.0);
        assert_eq!(
            (samples.per_mille(900), samples.per_mille(999)),
            (180.0, 200.0)
        );
        assert_eq!((samples.p99_ms, samples.max_ms), (198.0, 200.0));
        let one = Samples::of([Duration::from_millis(7)]);
        assert_eq!((one.p50_ms, one.p99_ms), (7.0, 7.0));
        assert_eq!(Samples::of([]).count, 0);
    }
}
