//! A build of a template in memory: a pool for each of its replicas, loaded when it is first used.

use crate::admission::Admission;
use crate::engine::Settings;
use crate::pool::Pool;
use crate::zygote::{EngineConfig, Zygote, ZygoteError};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use zygote_runner::control::Load;

/// A build, used by whoever has a share of it.
pub struct Loaded {
    pub template: String,
    pub build: String,
    pub replicas: Vec<Replica>,
    /// Whose turn it is.
    next: AtomicUsize,
    last_used: StdMutex<Instant>,
}

/// One of its snapshots.
pub struct Replica {
    snapshot: PathBuf,
    /// Locked while it is loaded: who comes meanwhile waits for that.
    pool: Mutex<Option<Arc<Pool>>>,
}

impl Loaded {
    /// Its replicas take turns, from a random one on.
    pub fn new(template: &str, build: &str, snapshots: Vec<PathBuf>) -> Self {
        let first = uuid::Uuid::new_v4().as_u128() % snapshots.len().max(1) as u128;
        let replica = |snapshot| Replica {
            snapshot,
            pool: Mutex::default(),
        };
        Self {
            template: template.to_owned(),
            build: build.to_owned(),
            replicas: snapshots.into_iter().map(replica).collect(),
            next: AtomicUsize::new(first as usize),
            last_used: StdMutex::new(Instant::now()),
        }
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
    /// Its pool; loads it if it is not, or if its zygote has died.
    pub async fn pool(
        &self,
        settings: &Settings,
        admission: &Arc<Admission>,
        loading: impl Fn(),
    ) -> Result<Arc<Pool>, ZygoteError> {
        let mut pool = self.pool.lock().await;
        if let Some(pool) = pool.as_ref().filter(|pool| pool.zygote().is_alive()) {
            return Ok(Arc::clone(pool));
        }
        loading();
        *pool = None;
        let store = &settings.store;
        let config = EngineConfig {
            command: settings.command.clone(),
            load: Load {
                snapshot: self.snapshot.clone(),
                pieces: store.pieces(),
                stamps: store.stamps(),
                group: None,
            },
            admission: Arc::clone(admission),
            // The engine looks for itself, at each run.
            allow_missing_walls: true,
            patience: settings.patience,
        };
        let zygote = Zygote::load(&config).await?;
        let fresh = Arc::new(Pool::new(zygote, settings.pool));
        *pool = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    /// Its pool, if it is loaded.
    pub async fn loaded(&self) -> Option<Arc<Pool>> {
        self.pool.lock().await.clone()
    }

    /// Ends it, and waits until it is gone if nobody else has a share of it.
    pub async fn shut_down(&self) {
        let pool = self.pool.lock().await.take();
        if let Some(pool) = pool.and_then(Arc::into_inner) {
            pool.shut_down().await;
        }
    }
}
