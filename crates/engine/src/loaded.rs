//! A build of a template in memory: a pool for each of its replicas, loaded when it is first used.

use crate::admission::Admission;
use crate::engine::Settings;
use crate::live::{Contexts, contexts_of};
use crate::pool::Pool;
use crate::zygote::{EngineConfig, Zygote, ZygoteError};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use zygote_runner::control::Load;
use zygote_snapshot::{RunKind, Watch};

/// A build, used by whoever has a share of it.
pub struct Loaded {
    pub template: String,
    pub build: String,
    /// Whose it is; `None`: everybody's.
    pub tenant: Option<String>,
    pub replicas: Vec<Replica>,
    /// The interpreters of the sandbox that it was made of, if it was.
    pub held: Option<Contexts>,
    /// Whose turn it is.
    next: AtomicUsize,
    last_used: StdMutex<Instant>,
}

/// One of its snapshots.
pub struct Replica {
    pub snapshot: PathBuf,
    /// Locked while it is loaded: who comes meanwhile waits for that.
    pool: Mutex<Option<Filled>>,
}

/// A pool, and the files that its zygote maps.
struct Filled {
    pool: Arc<Pool>,
    watch: Option<Watch>,
}

impl Filled {
    /// Whether its zygote lives, and its files are those that were verified.
    fn is_good(&self) -> bool {
        let is_same = self.watch.as_ref().is_none_or(Watch::holds);
        is_same && self.pool.zygote().is_alive()
    }
}

impl Loaded {
    /// Its replicas take turns, from a random one on.
    pub fn new(
        template: &str,
        build: &str,
        tenant: Option<String>,
        snapshots: Vec<PathBuf>,
    ) -> Self {
        let first = uuid::Uuid::new_v4().as_u128() % snapshots.len().max(1) as u128;
        let replica = |snapshot| Replica {
            snapshot,
            pool: Mutex::default(),
        };
        Self {
            template: template.to_owned(),
            build: build.to_owned(),
            tenant,
            held: snapshots.first().and_then(|first| contexts_of(first)),
            replicas: snapshots.into_iter().map(replica).collect(),
            next: AtomicUsize::new(first as usize),
            last_used: StdMutex::new(Instant::now()),
        }
    }

    /// Whether somebody of a tenant may use it.
    pub fn is_for(&self, tenant: &str) -> bool {
        self.tenant.as_deref().is_none_or(|owner| owner == tenant)
    }

    /// The one whose turn it is.
    pub fn next(&self) -> &Replica {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &self.replicas[turn % self.replicas.len()]
    }

    /// It is used now.
    pub fn used(&self) {
        *self.lock() = Instant::now();
    }

    /// Since its last use.
    pub fn idle_for(&self) -> Duration {
        self.lock().elapsed()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.last_used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    /// Its pool; loads it if it is not, if its zygote has died, or if its files have been changed since.
    /// The pool begins with forks for such runs as the `first`. The look at the files takes 13 µs at most (four files).
    pub async fn pool(
        &self,
        settings: &Settings,
        admission: &Arc<Admission>,
        first: RunKind,
        loading: impl Fn(),
    ) -> Result<Arc<Pool>, ZygoteError> {
        let mut pool = self.pool.lock().await;
        if let Some(filled) = pool.as_ref().filter(|filled| filled.is_good()) {
            return Ok(Arc::clone(&filled.pool));
        }
        loading();
        *pool = None;
        let store = &settings.store;
        let config = EngineConfig {
            command: settings.command.clone(),
            load: Load {
                snapshot: self.snapshot.clone(),
                pieces: store.pieces_of(&self.snapshot),
                stamps: store.stamps(),
                group: None,
            },
            admission: Arc::clone(admission),
            // The engine looks for itself, at each run.
            allow_missing_walls: true,
            patience: settings.patience,
        };
        // Before it is verified; what cannot be opened is for the zygote process to tell.
        let watch = Watch::begin(&self.snapshot, &store.pieces_of(&self.snapshot)).ok();
        let begun = Instant::now();
        let zygote = Zygote::load(&config).await?;
        let ms = begun.elapsed().as_secs_f64() * 1e3;
        tracing::info!(
            template = self.snapshot.display().to_string(),
            ms,
            "loaded a template"
        );
        let fresh = Arc::new(Pool::new(zygote, settings.pool, first));
        *pool = Some(Filled {
            pool: Arc::clone(&fresh),
            watch,
        });
        Ok(fresh)
    }

    /// Its pool, if it is loaded.
    pub async fn loaded(&self) -> Option<Arc<Pool>> {
        let filled = self.pool.lock().await;
        filled.as_ref().map(|filled| Arc::clone(&filled.pool))
    }

    /// Forgets a pool; those who run from it go on.
    pub async fn unload(&self, pool: &Arc<Pool>) {
        let mut filled = self.pool.lock().await;
        if filled
            .as_ref()
            .is_some_and(|filled| Arc::ptr_eq(&filled.pool, pool))
        {
            *filled = None;
        }
    }

    /// Ends it, and waits until it is gone if nobody else has a share of it.
    pub async fn shut_down(&self) {
        let pool = self.pool.lock().await.take();
        if let Some(pool) = pool.and_then(|filled| Arc::into_inner(filled.pool)) {
            pool.shut_down().await;
        }
    }
}
