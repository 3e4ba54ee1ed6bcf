//! Forks made ahead of demand. A pooled fork is used once; who comes when none is left gets one
//! that is forked at once.

use crate::fork::{Fork, ForkError};
use crate::sandbox::{self, Event, RunRequest, RunResult};
use crate::usage::Meter;
use crate::zygote::Zygote;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use zygote_snapshot::RunKind;

/// How long the pool leaves the processors to runs that need all of them.
const QUIET_MAX: Duration = Duration::from_millis(500);
/// The kinds of run that it has forks for.
const KINDS: [RunKind; 3] = [RunKind::Python, RunKind::Command, RunKind::Sandbox];
/// How long to wait after a fork that could not be made.
const RETRY: Duration = Duration::from_millis(500);
/// A machine that is not made by then never will be. Emulated hosts are slow.
const PARK_MAX: Duration = Duration::from_secs(60);

/// How many forks wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Always.
    pub idle_min: usize,
    /// At most, under load.
    pub idle_max: usize,
    /// What those that wait may cost the host together, in KiB.
    pub memory_max_kib: u64,
    /// After so long without a request the pool goes back to `idle_min`.
    pub drain_after: Duration,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            idle_min: 2,
            idle_max: 32,
            memory_max_kib: 1 << 20,
            drain_after: Duration::from_secs(60),
        }
    }
}

/// What a pool has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Forks that wait now.
    pub idle: u64,
    /// Requests that found one.
    pub hits: u64,
    /// Requests that found none.
    pub misses: u64,
    /// Forks made ahead.
    pub made: u64,
    /// Those of them that could not be made, or died waiting.
    pub lost: u64,
    /// What making them has taken.
    pub making: Duration,
}

/// A zygote with forks made ahead.
pub struct Pool {
    zygote: Arc<Zygote>,
    shared: Arc<Shared>,
    owner: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    idle: Mutex<VecDeque<Fork>>,
    /// The kinds that have been asked for, and when; the latest last.
    asked: Mutex<Vec<(RunKind, Instant)>>,
    /// Forks that run.
    busy: AtomicUsize,
    freed: Notify,
    taken: Notify,
    added: Notify,
    hits: AtomicU64,
    misses: AtomicU64,
    made: AtomicU64,
    lost: AtomicU64,
    making_us: AtomicU64,
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, VecDeque<Fork>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, kind: RunKind) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.retain(|(other, _)| *other != kind);
        asked.push((kind, Instant::now()));
    }

    /// Whether forks of a kind should wait: of the one that was asked for last, and of one that was not
    /// long ago.
    fn is_wanted(&self, kind: RunKind, within: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_latest = asked.last().is_none_or(|(latest, _)| *latest == kind);
        is_latest
            || asked
                .iter()
                .any(|(other, at)| *other == kind && at.elapsed() < within)
    }

    fn count(&self, kind: RunKind) -> usize {
        let idle = self.idle();
        idle.iter().filter(|fork| fork.kind == kind).count()
    }
}

/// One of a pool's forks runs.
pub(crate) struct Busy(Arc<Shared>);

impl Busy {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.busy.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
        self.0.freed.notify_one();
    }
}

impl Pool {
    /// Begins to fill, for runs of a kind. Needs a runtime.
    pub fn new(zygote: Zygote, config: PoolConfig, first: RunKind) -> Self {
        let zygote = Arc::new(zygote);
        let shared = Arc::new(Shared::default());
        shared.ask(first);
        let filler = Filler {
            zygote: Arc::clone(&zygote),
            shared: Arc::clone(&shared),
            config,
            wanted: config.idle_min,
            affordable: usize::MAX,
            is_failing: false,
        };
        Self {
            zygote,
            shared,
            owner: tokio::spawn(filler.fill()),
        }
    }

    /// As [`crate::run`], from a fork made ahead if there is one.
    pub async fn run(&self, request: RunRequest, events: mpsc::Sender<Event>) -> RunResult {
        let requested = std::time::Instant::now();
        let fork = self.take(request.kind());
        sandbox::run_in(&self.zygote, requested, fork, request, events).await
    }

    /// A fork made ahead for such runs, or else one made now.
    pub(crate) async fn take(&self, kind: RunKind) -> Result<Fork, ForkError> {
        self.shared.ask(kind);
        let busy = Some(Busy::new(&self.shared));
        while let Some(mut fork) = self.pop(kind) {
            if fork.is_alive() {
                self.shared.hits.fetch_add(1, Ordering::Relaxed);
                self.shared.taken.notify_one();
                return Ok(Fork { busy, ..fork });
            }
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.shared.misses.fetch_add(1, Ordering::Relaxed);
        self.shared.taken.notify_one();
        let fork = Fork::of(&self.zygote, kind).await?;
        Ok(Fork { busy, ..fork })
    }

    fn pop(&self, kind: RunKind) -> Option<Fork> {
        let mut idle = self.shared.idle();
        let first = idle.iter().position(|fork| fork.kind == kind)?;
        idle.remove(first)
    }

    /// The zygote that it forks from.
    pub fn zygote(&self) -> &Zygote {
        &self.zygote
    }

    /// The same, to be kept.
    pub fn zygote_arc(&self) -> Arc<Zygote> {
        Arc::clone(&self.zygote)
    }

    /// What it has done so far.
    pub fn stats(&self) -> PoolStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PoolStats {
            idle: self.shared.idle().len() as u64,
            hits: count(&self.shared.hits),
            misses: count(&self.shared.misses),
            made: count(&self.shared.made),
            lost: count(&self.shared.lost),
            making: Duration::from_micros(count(&self.shared.making_us)),
        }
    }

    /// The processes of forks that wait, to be measured.
    pub(crate) fn processes(&self) -> Vec<OwnedFd> {
        let idle = self.shared.idle();
        idle.iter()
            .filter_map(|fork| fork.runner.process.try_clone().ok())
            .collect()
    }

    /// Waits until so many forks wait; false if that takes longer than making one may.
    pub async fn filled(&self, forks: usize) -> bool {
        loop {
            // Before looking, so that none is missed.
            let made = self.shared.added.notified();
            if self.shared.idle().len() >= forks {
                return true;
            }
            if timeout(PARK_MAX, made).await.is_err() {
                return false;
            }
        }
    }

    /// Ends the forks that wait and the zygote, and waits until they are gone.
    pub async fn shut_down(mut self) {
        self.owner.abort();
        // Cancelled, as asked for; its share of the zygote is dropped with it.
        let _ = (&mut self.owner).await;
        let zygote = Arc::clone(&self.zygote);
        drop(self);
        if let Some(zygote) = Arc::into_inner(zygote) {
            zygote.shut_down().await;
        }
    }
}

/// Ends by itself what [`Pool::shut_down`] waits for.
impl Drop for Pool {
    fn drop(&mut self) {
        self.owner.abort();
        self.shared.idle().clear();
    }
}

/// The pool's owner task.
struct Filler {
    zygote: Arc<Zygote>,
    shared: Arc<Shared>,
    config: PoolConfig,
    /// How many should wait: grows when requests find none, and shrinks when none come.
    wanted: usize,
    /// How many the budget allows, once it is known what one costs.
    affordable: usize,
    /// Whether the last one could not be made, which is told once.
    is_failing: bool,
}

impl Filler {
    async fn fill(mut self) {
        let mut misses = 0;
        loop {
            let missed = self.shared.misses.load(Ordering::Relaxed);
            if missed > misses {
                let grown = (self.wanted * 2).max(1);
                self.wanted = grown.min(self.config.idle_max.max(self.config.idle_min));
                misses = missed;
            }
            self.sweep();
            match self.lacking() {
                None => self.rest().await,
                Some(kind) => {
                    self.leave_processors().await;
                    self.add_one(kind).await;
                }
            }
        }
    }

    /// Of which kind there are too few.
    fn lacking(&self) -> Option<RunKind> {
        if self.shared.idle().len() >= self.affordable {
            return None;
        }
        KINDS.into_iter().find(|kind| {
            let is_wanted = self.shared.is_wanted(*kind, self.config.drain_after);
            is_wanted && self.shared.count(*kind) < self.wanted
        })
    }

    /// Waits while runs have all processors: making one ahead would only slow them down.
    async fn leave_processors(&self) {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let quiet = async {
            loop {
                let freed = self.shared.freed.notified();
                if self.shared.busy.load(Ordering::Relaxed) < processors {
                    return;
                }
                freed.await;
            }
        };
        let _ = timeout(QUIET_MAX, quiet).await;
    }

    /// Drops those that have died.
    fn sweep(&self) {
        let mut idle = self.shared.idle();
        let before = idle.len();
        idle.retain_mut(Fork::is_alive);
        let lost = (before - idle.len()) as u64;
        self.shared.lost.fetch_add(lost, Ordering::Relaxed);
    }

    /// Until a request comes; without any, goes back to the minimum.
    async fn rest(&mut self) {
        let patience = self.config.drain_after;
        let resting = timeout(patience, self.shared.taken.notified()).await;
        if resting.is_ok() {
            return;
        }
        self.wanted = self.config.idle_min;
        for kind in KINDS {
            let is_wanted = self.shared.is_wanted(kind, patience);
            let mut kept = if is_wanted { self.config.idle_min } else { 0 };
            self.shared.idle().retain(|fork| {
                let is_kept = fork.kind != kind || kept > 0;
                kept -= usize::from(is_kept && fork.kind == kind);
                is_kept
            });
        }
    }

    async fn add_one(&mut self, kind: RunKind) {
        let started = Instant::now();
        let fork = match Fork::of(&self.zygote, kind).await {
            Ok(fork) if timeout(PARK_MAX, fork.parked()).await == Ok(true) => fork,
            // Who comes now learns why by trying.
            made => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    let why = made
                        .map_or_else(|error| error.to_string(), |_| "it did not park".to_owned());
                    tracing::warn!("a fork that was to wait could not be made: {why}");
                }
                self.shared.lost.fetch_add(1, Ordering::Relaxed);
                sleep(RETRY.saturating_sub(started.elapsed())).await;
                return;
            }
        };
        self.is_failing = false;
        if self.affordable == usize::MAX {
            self.affordable = self.afford(&fork).await;
        }
        self.shared.made.fetch_add(1, Ordering::Relaxed);
        let took = started.elapsed().as_micros();
        let took = u64::try_from(took).unwrap_or(u64::MAX);
        self.shared.making_us.fetch_add(took, Ordering::Relaxed);
        self.shared.idle().push_back(fork);
        self.shared.added.notify_waiters();
    }

    async fn afford(&self, fork: &Fork) -> usize {
        let usage = Meter::of(&fork.runner).await;
        let each_kib = usage.map_or(1, |usage| usage.private_kib + usage.page_tables_kib);
        (self.config.memory_max_kib / each_kib.max(1)) as usize
    }
}
