//! How many run at once: those that come when all places are taken wait in line, for a limited time;
//! those that find the line full are refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// Memory that the default reckons for each run: most take less.
const RUN_BYTES: u64 = 64 << 20;
/// Runs for each processor, by default: most wait for something.
const RUNS_PER_PROCESSOR: usize = 16;

/// How many may run, and wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Runs at once.
    pub running_max: usize,
    /// Runs that wait for one of those to end.
    pub waiting_max: usize,
    /// How long one waits.
    pub wait_max: Duration,
}

impl QueueLimits {
    /// For a host with so many processors and so much memory.
    pub fn for_host(processors: usize, memory_bytes: u64) -> Self {
        let by_memory = usize::try_from(memory_bytes / RUN_BYTES).unwrap_or(usize::MAX);
        Self {
            running_max: (processors * RUNS_PER_PROCESSOR).min(by_memory).max(1),
            waiting_max: 1024,
            wait_max: Duration::from_secs(60),
        }
    }
}

/// What has come of those who came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// That run.
    pub running: u64,
    /// That wait.
    pub waiting: u64,
    /// That have ended.
    pub ended: u64,
    /// That were refused.
    pub refused: u64,
    /// Whose caller went away before their end.
    pub cancelled: u64,
}

/// Why there is no turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTurn {
    /// Too many wait.
    #[error("{running} sandboxes run and {waiting} runs wait already, as many as may")]
    Full {
        /// How many may run.
        running: usize,
        /// How many may wait.
        waiting: usize,
    },
    /// It waited too long.
    #[error("no sandbox has ended for this run within {} s", .0.as_secs())]
    Late(Duration),
    /// Nothing begins any more.
    #[error("the engine is stopping")]
    Closed,
}

/// The line, and those who are through.
pub struct Queue {
    limits: QueueLimits,
    places: Semaphore,
    running: AtomicU64,
    waiting: AtomicU64,
    ended: AtomicU64,
    refused: AtomicU64,
    cancelled: AtomicU64,
}

/// A run's turn, until it is dropped.
pub struct Turn<'a> {
    queue: &'a Queue,
    is_done: bool,
    _permit: SemaphorePermit<'a>,
}

struct Waiting<'a>(&'a Queue);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Turn<'_> {
    /// The run has come to its end; else it was cancelled.
    pub fn done(&mut self) {
        self.is_done = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let counter = if self.is_done {
            &self.queue.ended
        } else {
            &self.queue.cancelled
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.queue.running.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Queue {
    /// With nobody in it.
    pub fn new(limits: QueueLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            places: Semaphore::new(limits.running_max),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
        })
    }

    /// What has come of those who came.
    pub fn stats(&self) -> QueueStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueStats {
            running: count(&self.running),
            waiting: count(&self.waiting),
            ended: count(&self.ended),
            refused: count(&self.refused),
            cancelled: count(&self.cancelled),
        }
    }

    /// A turn, at once if a place is free.
    ///
    /// # Errors
    /// If the line is full, or takes too long.
    pub async fn turn(&self) -> Result<Turn<'_>, NoTurn> {
        let permit = match self.places.try_acquire() {
            Ok(permit) => permit,
            Err(_) => self.wait().await.inspect_err(|_| {
                self.refused.fetch_add(1, Ordering::Relaxed);
            })?,
        };
        self.running.fetch_add(1, Ordering::AcqRel);
        Ok(Turn {
            queue: self,
            is_done: false,
            _permit: permit,
        })
    }

    async fn wait(&self) -> Result<SemaphorePermit<'_>, NoTurn> {
        if self.places.is_closed() {
            return Err(NoTurn::Closed);
        }
        let before = self.waiting.fetch_add(1, Ordering::AcqRel);
        let _waiting = Waiting(self);
        if before >= self.limits.waiting_max as u64 {
            return Err(NoTurn::Full {
                running: self.limits.running_max,
                waiting: self.limits.waiting_max,
            });
        }
        let limit = self.limits.wait_max;
        let acquired = timeout(limit, self.places.acquire()).await;
        let acquired = acquired.map_err(|_| NoTurn::Late(limit))?;
        acquired.map_err(|_| NoTurn::Closed)
    }

    /// Gives no more turns; those who wait are told so.
    pub fn close(&self) {
        self.places.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(running_max: usize, waiting_max: usize, wait_ms: u64) -> Arc<Queue> {
        Queue::new(QueueLimits {
            running_max,
            waiting_max,
            wait_max: Duration::from_millis(wait_ms),
        })
    }

    #[tokio::test]
    async fn who_finds_the_line_full_is_refused_and_who_waits_too_long_too() {
        let queue = queue(1, 1, 20);
        let mut first = queue.turn().await.unwrap();
        let (second, third) = tokio::join!(queue.turn(), queue.turn());
        assert_eq!(second.err(), Some(NoTurn::Late(Duration::from_millis(20))));
        let full = NoTurn::Full {
            running: 1,
            waiting: 1,
        };
        assert_eq!(third.err(), Some(full));
        first.done();
        drop(first);
        drop(queue.turn().await.unwrap());
        let stats = queue.stats();
        assert_eq!((stats.ended, stats.refused, stats.cancelled), (1, 2, 1));
        assert_eq!((stats.running, stats.waiting), (0, 0));
    }

    #[tokio::test]
    async fn who_waits_gets_the_place_of_who_ends() {
        let queue = queue(1, 5, 10_000);
        let first = queue.turn().await.unwrap();
        let waiting = queue.turn();
        let (second, ()) = tokio::join!(waiting, async { drop(first) });
        assert!(second.is_ok());
    }

    #[tokio::test]
    async fn a_closed_line_tells_those_in_it() {
        let queue = queue(1, 5, 10_000);
        let _first = queue.turn().await.unwrap();
        let (second, ()) = tokio::join!(queue.turn(), async { queue.close() });
        assert_eq!(second.err(), Some(NoTurn::Closed));
        assert_eq!(queue.turn().await.err(), Some(NoTurn::Closed));
        let stats = queue.stats();
        assert_eq!((stats.running, stats.waiting), (1, 0));
    }

    #[test]
    fn the_default_is_bounded_by_processors_and_by_memory() {
        assert_eq!(QueueLimits::for_host(2, u64::MAX).running_max, 32);
        assert_eq!(QueueLimits::for_host(64, 1 << 30).running_max, 16);
        assert_eq!(QueueLimits::for_host(1, 0).running_max, 1);
    }
}
