//! What one key takes now: how fast it asks, and how much of it runs.

use crate::key::Limits;
use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

type Limiter =
    RateLimiter<NotKeyed, InMemoryState, MonotonicClock, NoOpMiddleware<std::time::Instant>>;

/// Of one key.
pub(crate) struct Gate {
    rate: Option<(NonZeroU32, Limiter)>,
    running: Arc<AtomicU32>,
}

/// A run of a key's, until it is dropped.
#[derive(Debug)]
pub struct Held(Option<Arc<AtomicU32>>);

impl Held {
    /// Of somebody who has no limit.
    pub(crate) fn free() -> Self {
        Self(None)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(running) = &self.0 {
            running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Gate {
    /// With nothing behind it.
    pub fn new(limits: &Limits) -> Self {
        Self {
            rate: limiter(limits),
            running: Arc::default(),
        }
    }

    /// The same, should the limits have changed: what runs still counts.
    pub fn with(&self, limits: &Limits) -> Option<Self> {
        let is = self.rate.as_ref().map(|(rate, _)| rate.get());
        (is != limits.rate).then(|| Self {
            rate: limiter(limits),
            running: Arc::clone(&self.running),
        })
    }

    /// One more request; after how long it may come, otherwise (GCRA: as many at once as in a second).
    pub fn ask(&self) -> Result<(), Duration> {
        let Some((_, limiter)) = &self.rate else {
            return Ok(());
        };
        let clock = MonotonicClock;
        let checked = limiter.check();
        checked.map_err(|until| until.wait_time_from(clock.now()))
    }

    /// One more run, unless so many go on.
    pub fn hold(&self, max: Option<u32>) -> Option<Held> {
        let max = max.unwrap_or(u32::MAX);
        let more = |running| (running < max).then(|| running + 1);
        let update = self
            .running
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        update.ok().map(|_| Held(Some(Arc::clone(&self.running))))
    }
}

fn limiter(limits: &Limits) -> Option<(NonZeroU32, Limiter)> {
    let rate = NonZeroU32::new(limits.rate?)?;
    let limiter = RateLimiter::direct_with_clock(Quota::per_second(rate), MonotonicClock);
    Some((rate, limiter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_come_at_once_as_in_a_second_and_then_one_by_one() {
        let limits = Limits {
            rate: Some(2),
            ..Limits::default()
        };
        let gate = Gate::new(&limits);
        assert!(gate.ask().is_ok() && gate.ask().is_ok());
        let wait = gate.ask().unwrap_err();
        assert!(wait <= Duration::from_millis(500), "{wait:?}");
        assert!(gate.with(&limits).is_none());
        let none = gate.with(&Limits::default()).unwrap();
        assert!((0..1000).all(|_| none.ask().is_ok()));
    }

    #[test]
    fn what_runs_counts_until_it_is_dropped_whatever_limits_there_are() {
        let gate = Gate::new(&Limits::default());
        let first = gate.hold(Some(2)).unwrap();
        let _second = gate.hold(Some(2)).unwrap();
        assert!(gate.hold(Some(2)).is_none());
        let limits = Limits {
            rate: Some(9),
            ..Limits::default()
        };
        let gate = gate.with(&limits).unwrap();
        assert!(gate.hold(Some(2)).is_none());
        drop(first);
        assert!(gate.hold(Some(2)).is_some() && gate.hold(None).is_some());
    }
}
