//! How many run at once: those that come when all places are taken wait in line, for a limited time;
//! those that find the line full are refused. Each client (one key) has a line of its own, and the lines take
//! turns: who asks for much waits for himself.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
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
    line: Mutex<Line>,
    running: AtomicU64,
    waiting: AtomicU64,
    ended: AtomicU64,
    refused: AtomicU64,
    cancelled: AtomicU64,
}

/// Who waits. Each of them that share a name stands behind those who came before; names take turns.
struct Line {
    free: usize,
    is_closed: bool,
    flows: VecDeque<Flow>,
}

/// Those of one name.
struct Flow {
    whose: String,
    waiting: VecDeque<oneshot::Sender<Result<Place, NoTurn>>>,
}

impl Flow {
    /// Whoever waits no more has dropped its end.
    fn forget_gone(&mut self) {
        self.waiting.retain(|call| !call.is_closed());
    }
}

/// A place among those who run, until it is dropped.
#[derive(Debug)]
struct Place(Arc<Queue>);

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    place: Place,
    use_of_it: Use,
}

/// What a turn counts as, when it is dropped.
#[derive(Clone, Copy, Debug)]
enum Use {
    /// A run that has not come to its end.
    Cancelled,
    /// One that has.
    Ended,
    /// No run.
    Other,
}

struct Waiting<'a>(&'a Queue);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let queue = Arc::clone(&self.0);
        queue.line().free += 1;
        queue.call();
    }
}

impl Turn {
    /// The run has come to its end; else it was cancelled.
    pub fn done(&mut self) {
        self.use_of_it = Use::Ended;
    }

    /// It is for something else than a run.
    pub fn for_no_run(&mut self) {
        self.use_of_it = Use::Other;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let queue = &self.place.0;
        let counter = match self.use_of_it {
            Use::Ended => Some(&queue.ended),
            Use::Cancelled => Some(&queue.cancelled),
            Use::Other => None,
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        queue.running.fetch_sub(1, Ordering::AcqRel);
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Line {
    /// The first of the name whose turn it is.
    fn next(&mut self) -> Option<oneshot::Sender<Result<Place, NoTurn>>> {
        loop {
            let mut flow = self.flows.pop_front()?;
            flow.forget_gone();
            let first = flow.waiting.pop_front();
            if !flow.waiting.is_empty() {
                self.flows.push_back(flow);
            }
            if first.is_some() {
                return first;
            }
        }
    }

    fn flow(&mut self, whose: &str) -> &mut Flow {
        let known = self.flows.iter().position(|flow| flow.whose == whose);
        let index = known.unwrap_or_else(|| {
            let (whose, waiting) = (whose.to_owned(), VecDeque::new());
            self.flows.push_back(Flow { whose, waiting });
            self.flows.len() - 1
        });
        &mut self.flows[index]
    }

    /// In a full line, the last of those who are most makes room for one of fewer.
    fn make_room(&mut self, whose: &str) -> Option<oneshot::Sender<Result<Place, NoTurn>>> {
        self.flows.iter_mut().for_each(Flow::forget_gone);
        let own = self.flows.iter().find(|flow| flow.whose == whose);
        let own = own.map_or(0, |flow| flow.waiting.len());
        let longest = self
            .flows
            .iter_mut()
            .max_by_key(|flow| flow.waiting.len())?;
        if longest.waiting.len() <= own + 1 {
            return None;
        }
        longest.waiting.pop_back()
    }
}

impl Queue {
    /// With nobody in it.
    pub fn new(limits: QueueLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            line: Mutex::new(Line {
                free: limits.running_max,
                is_closed: false,
                flows: VecDeque::new(),
            }),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
        })
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// A turn for somebody of that name, at once if a place is free.
    ///
    /// # Errors
    /// If the line is full, or takes too long.
    pub async fn turn(self: &Arc<Self>, whose: &str) -> Result<Turn, NoTurn> {
        let place = self.place(whose).await.inspect_err(|_| {
            self.refused.fetch_add(1, Ordering::Relaxed);
        })?;
        self.running.fetch_add(1, Ordering::AcqRel);
        Ok(Turn {
            place,
            use_of_it: Use::Cancelled,
        })
    }

    async fn place(self: &Arc<Self>, whose: &str) -> Result<Place, NoTurn> {
        let (called, _waiting) = {
            let mut line = self.line();
            if line.is_closed {
                return Err(NoTurn::Closed);
            }
            // Nobody waits while a place is free.
            if line.free > 0 {
                line.free -= 1;
                drop(line);
                return Ok(Place(Arc::clone(self)));
            }
            if self.waiting.load(Ordering::Acquire) >= self.limits.waiting_max as u64 {
                let other = line.make_room(whose).ok_or_else(|| self.full())?;
                // One that has gone takes no offence.
                let _ = other.send(Err(self.full()));
            }
            let (call, called) = oneshot::channel();
            let flow = line.flow(whose);
            flow.forget_gone();
            flow.waiting.push_back(call);
            self.waiting.fetch_add(1, Ordering::AcqRel);
            (called, Waiting(self))
        };
        let limit = self.limits.wait_max;
        let called = timeout(limit, called).await;
        let called = called.map_err(|_| NoTurn::Late(limit))?;
        // It is dropped without a word when the line is closed.
        called.unwrap_or(Err(NoTurn::Closed))
    }

    fn full(&self) -> NoTurn {
        NoTurn::Full {
            running: self.limits.running_max,
            waiting: self.limits.waiting_max,
        }
    }

    /// Gives free places to those who wait.
    fn call(self: &Arc<Self>) {
        loop {
            let mut line = self.line();
            if line.free == 0 {
                return;
            }
            let Some(next) = line.next() else { return };
            line.free -= 1;
            // Whoever has gone meanwhile drops the place, which takes the line.
            drop(line);
            drop(next.send(Ok(Place(Arc::clone(self)))));
        }
    }

    /// Gives no more turns; those who wait are told so.
    pub fn close(&self) {
        let mut line = self.line();
        line.is_closed = true;
        line.flows.clear();
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
        let mut first = queue.turn("").await.unwrap();
        let (second, third) = tokio::join!(queue.turn(""), queue.turn(""));
        assert_eq!(second.err(), Some(NoTurn::Late(Duration::from_millis(20))));
        let full = NoTurn::Full {
            running: 1,
            waiting: 1,
        };
        assert_eq!(third.err(), Some(full));
        first.done();
        drop(first);
        drop(queue.turn("").await.unwrap());
        queue.turn("").await.unwrap().for_no_run();
        let stats = queue.stats();
        assert_eq!((stats.ended, stats.refused, stats.cancelled), (1, 2, 1));
        assert_eq!((stats.running, stats.waiting), (0, 0));
    }

    #[tokio::test]
    async fn who_waits_gets_the_place_of_who_ends() {
        let queue = queue(1, 5, 10_000);
        let first = queue.turn("").await.unwrap();
        let waiting = queue.turn("");
        let (second, ()) = tokio::join!(waiting, async { drop(first) });
        assert!(second.is_ok());
    }

    #[tokio::test]
    async fn a_closed_line_tells_those_in_it() {
        let queue = queue(1, 5, 10_000);
        let _first = queue.turn("").await.unwrap();
        let (second, ()) = tokio::join!(queue.turn(""), async { queue.close() });
        assert_eq!(second.err(), Some(NoTurn::Closed));
        assert_eq!(queue.turn("").await.err(), Some(NoTurn::Closed));
        let stats = queue.stats();
        assert_eq!((stats.running, stats.waiting), (1, 0));
    }

    /// In which order those who wait are called, by name.
    async fn order(queue: &Arc<Queue>, who: &[&'static str]) -> Vec<&'static str> {
        let first = queue.turn("first").await.unwrap();
        let (sender, mut called) = tokio::sync::mpsc::unbounded_channel();
        for name in who.iter().copied() {
            let (own, sender) = (Arc::clone(queue), sender.clone());
            let waiting = queue.stats().waiting;
            tokio::spawn(async move {
                let turn = own.turn(name).await;
                let _ = sender.send((name, turn.is_ok()));
            });
            // It is in line before the next one comes.
            while queue.stats().waiting == waiting && queue.stats().refused == 0 {
                tokio::task::yield_now().await;
            }
        }
        drop((first, sender));
        let mut order = Vec::new();
        while let Some((name, has_run)) = called.recv().await {
            if has_run {
                order.push(name);
            }
        }
        order
    }

    #[tokio::test]
    async fn who_asks_for_much_waits_for_himself() {
        let queue = queue(1, 100, 10_000);
        let called = order(&queue, &["a", "a", "a", "a", "b", "c", "b"]).await;
        assert_eq!(called, ["a", "b", "c", "a", "b", "a", "a"]);
        assert_eq!(queue.line().free, 1);
    }

    #[tokio::test]
    async fn in_a_full_line_the_many_make_room_for_the_few() {
        let queue = queue(1, 3, 10_000);
        let called = order(&queue, &["a", "a", "a", "b"]).await;
        assert_eq!(called, ["a", "b", "a"]);
        assert_eq!((queue.stats().refused, queue.stats().waiting), (1, 0));
        // Among equals, who comes last is refused.
        let _first = queue.turn("a").await.unwrap();
        let (own, other) = (Arc::clone(&queue), Arc::clone(&queue));
        let waiting = [
            tokio::spawn(async move { own.turn("a").await.is_ok() }),
            tokio::spawn(async move { other.turn("b").await.is_ok() }),
        ];
        while queue.stats().waiting < 2 {
            tokio::task::yield_now().await;
        }
        let third = Arc::clone(&queue);
        let third = tokio::spawn(async move { third.turn("c").await.is_ok() });
        while queue.stats().waiting < 3 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(queue.turn("b").await, Err(NoTurn::Full { .. })));
        queue.close();
        for one in waiting {
            assert!(!one.await.unwrap());
        }
        assert!(!third.await.unwrap());
    }

    #[tokio::test]
    async fn a_place_that_is_called_for_somebody_who_has_gone_is_given_on() {
        let queue = queue(1, 5, 10_000);
        let first = queue.turn("").await.unwrap();
        for _ in 0..3 {
            let gone = timeout(Duration::from_millis(5), queue.turn("gone")).await;
            assert!(gone.is_err());
        }
        let (second, ()) = tokio::join!(queue.turn(""), async { drop(first) });
        drop(second.unwrap());
        assert_eq!((queue.line().free, queue.stats().waiting), (1, 0));
    }

    #[test]
    fn the_default_is_bounded_by_processors_and_by_memory() {
        assert_eq!(QueueLimits::for_host(2, u64::MAX).running_max, 32);
        assert_eq!(QueueLimits::for_host(64, 1 << 30).running_max, 16);
        assert_eq!(QueueLimits::for_host(1, 0).running_max, 1);
    }
}
