//! The engine: templates that stay loaded while they are used, a pool of forks for each, a line of
//! those who want one, and the end of it all.

use crate::admission::{Admission, Budget, Ended, memory_left_bytes};
use crate::census::{Census, Counted};
use crate::fork::{Fork, ForkError};
use crate::held::{Holder, HolderConfig};
use crate::live::{LiveLimits, Registry};
use crate::loaded::{Loaded, Replica};
use crate::pool::{Pool, PoolConfig, PoolStats};
use crate::queue::{NoTurn, Queue, QueueLimits, QueueStats, Turn};
use crate::sandbox::{Event, RunRequest, RunResult, run_in};
use crate::share::{OverQuota, Quota, Shares};
use crate::walls::{list, remedy};
use crate::zygote::ZygoteError;
use std::collections::HashMap;
use std::ffi::OsString;
use std::future::ready;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tracing::{Instrument, debug_span};
use zygote_runner::control::MissingWall;
use zygote_snapshot::RunKind;
use zygote_template::{Store, StoreError};

/// How often it is looked which templates nobody uses.
const SWEEP_EVERY: Duration = Duration::from_secs(15);

/// How an engine works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Program and arguments that end in [`zygote_runner::zygote_main`].
    pub command: Vec<OsString>,
    /// Where templates are.
    pub store: Store,
    /// What all sandboxes may take.
    pub budget: Budget,
    /// How many may run at once.
    pub queue: QueueLimits,
    /// Forks made ahead, for each replica of a template.
    pub pool: PoolConfig,
    /// What live sandboxes may take.
    pub live: LiveLimits,
    /// Who holds live sandboxes beyond this engine's end; `None`: nobody, they end with it.
    pub holder: Option<HolderConfig>,
    /// After so long without a run a template is unloaded.
    pub unload_after: Duration,
    /// Whether to run although main walls of the jail are missing.
    pub allow_missing_walls: bool,
    /// How long a step of a sandbox may take: [`crate::PATIENCE`], or
    /// [`crate::PATIENCE_EMULATED`].
    pub patience: Duration,
}

impl Settings {
    /// What most hosts want.
    pub fn new(command: Vec<OsString>, store: Store) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            command,
            store,
            budget: Budget::default(),
            queue: QueueLimits::for_host(processors, memory_left_bytes().unwrap_or(u64::MAX)),
            pool: PoolConfig::default(),
            live: LiveLimits::default(),
            holder: None,
            unload_after: Duration::from_secs(600),
            allow_missing_walls: false,
            patience: crate::PATIENCE,
        }
    }
}

/// A program to run, and from what.
#[derive(Debug)]
pub struct Order {
    /// The template's name.
    pub template: String,
    /// One build of it; `None`: what the name stands for now.
    pub build: Option<String>,
    /// Whether this one may run although main walls are missing.
    pub allow_missing_walls: bool,
    /// Who sees the template; `None`: whoever it is for.
    pub tenant: Option<String>,
    /// In whose line it waits.
    pub whose: String,
    /// What all machines of that tenant may take at once.
    pub quota: Quota,
    /// The run.
    pub request: RunRequest,
}

/// A word on the way to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// Something takes its time.
    Doing(String),
    /// Something that its user should know.
    Warning(String),
}

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no turn.
    #[error(transparent)]
    NoTurn(#[from] NoTurn),
    /// The template.
    #[error(transparent)]
    Template(#[from] StoreError),
    /// It may not have more at once.
    #[error(transparent)]
    OverQuota(#[from] OverQuota),
    /// This host does not allow what must stand between it and untrusted code.
    #[error("this host does not allow {}, so untrusted code could reach it", list(.0))]
    MissingWalls(Vec<MissingWall>),
    /// Its snapshot cannot be forked.
    #[error("cannot fork the template {template}")]
    Fork {
        /// Which template.
        template: String,
        /// Why.
        #[source]
        source: ForkError,
    },
}

impl EngineError {
    /// What to do about missing walls.
    pub fn walls_remedy(walls: &[MissingWall]) -> &'static str {
        remedy(walls)
    }
}

/// A loaded snapshot.
#[derive(Clone, Debug)]
pub struct LoadedStatus {
    /// The template.
    pub template: String,
    /// Which build of it.
    pub build: String,
    /// Which of its replicas.
    pub replica: u32,
    /// Its forks.
    pub pool: PoolStats,
}

/// One for a host, or one for a process.
pub struct Engine {
    settings: Settings,
    admission: Arc<Admission>,
    queue: Arc<Queue>,
    live: Registry,
    holder: Arc<Holder>,
    loaded: Mutex<HashMap<String, Arc<Loaded>>>,
    counted: Counted,
    shares: Arc<Shares>,
}

impl Engine {
    /// With nothing loaded.
    pub fn new(settings: Settings) -> Arc<Self> {
        let holder = Holder::new(settings.holder.clone());
        Arc::new(Self {
            admission: Admission::new(settings.budget),
            queue: Queue::new(settings.queue),
            live: Registry::new(settings.live, Arc::clone(&holder)),
            holder,
            settings,
            loaded: Mutex::default(),
            counted: Counted::default(),
            shares: Arc::default(),
        })
    }

    /// How it works.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Sandboxes that live.
    pub fn live(&self) -> &Registry {
        &self.live
    }

    /// Who holds them beyond this engine's end.
    pub(crate) fn holder(&self) -> &Arc<Holder> {
        &self.holder
    }

    pub(crate) fn shares(&self) -> &Arc<Shares> {
        &self.shares
    }

    pub(crate) fn admission(&self) -> &Arc<Admission> {
        &self.admission
    }

    /// A turn to make a sandbox, for somebody.
    pub(crate) async fn turn(&self, whose: &str) -> Result<Turn, NoTurn> {
        let mut turn = self.queue.turn(whose).await?;
        turn.for_no_run();
        Ok(turn)
    }

    /// Runs a program in a fork. `events` gets its output, as [`crate::run`] gives it; `notes` gets what
    /// else there is to say. Dropping the future kills the fork.
    ///
    /// # Errors
    /// If there is no sandbox for it, see [`EngineError`]. What happens to a program that has one is
    /// in the result.
    pub async fn run(
        &self,
        order: Order,
        events: mpsc::Sender<Event>,
        notes: &(dyn Fn(Note) + Sync),
    ) -> Result<RunResult, EngineError> {
        let requested = Instant::now();
        // First: who is not there is told at once, and waits in no line.
        let loaded = self.find(&order.template, order.build, order.tenant.as_deref())?;
        let tenant = order.tenant.as_deref();
        let _part = self.begin_run(tenant, &loaded.template, &loaded.build, order.quota)?;
        let waiting = self.queue.turn(&order.whose);
        let mut turn = waiting.instrument(debug_span!("queue")).await?;
        let kind = order.request.kind();
        let forked = self
            .fork(&loaded, kind, order.allow_missing_walls, notes)
            .instrument(debug_span!("fork", template = loaded.template))
            .await;
        let ended = match forked {
            Ok((pool, fork)) => {
                let span = debug_span!("exec", sandbox = %fork.id);
                let fork = ready(Ok(fork));
                let running = run_in(pool.zygote(), requested, fork, order.request, events);
                Ok(running.instrument(span).await)
            }
            Err(error) => Err(error),
        };
        loaded.used();
        turn.done();
        ended
    }

    /// A fork of the replica whose turn it is. What is loaded but of no use is loaded once more: its
    /// process may have been killed since it was asked last, or the host may allow walls by now that
    /// it did not allow then.
    pub(crate) async fn fork(
        &self,
        loaded: &Loaded,
        kind: RunKind,
        allow_missing_walls: bool,
        notes: &(dyn Fn(Note) + Sync),
    ) -> Result<(Arc<Pool>, Fork), EngineError> {
        let failed = |source| EngineError::Fork {
            template: loaded.template.clone(),
            source,
        };
        let replica = loaded.next();
        let mut again = true;
        loop {
            let pool = self.pool(loaded, replica, kind, notes).await;
            let pool = pool.map_err(|error| failed(error.into()))?;
            let missing = pool.zygote().missing_walls();
            let taken = match self.check_walls(missing, allow_missing_walls, notes) {
                Ok(()) => pool.take(kind).await.map_err(failed),
                Err(error) => Err(error),
            };
            let is_stale = matches!(
                taken,
                Err(EngineError::MissingWalls(_)
                    | EngineError::Fork {
                        source: ForkError::Zygote(ZygoteError::Gone),
                        ..
                    })
            );
            if is_stale {
                replica.unload(&pool).await;
            }
            match taken {
                Ok(mut fork) => {
                    // What goes on in all of its forks must not draw the same in each.
                    fork.identity.reseed = loaded.held.is_some();
                    return Ok((pool, fork));
                }
                Err(_) if is_stale && again => again = false,
                Err(error) => return Err(error),
            }
        }
    }

    /// What the template is loaded as, for somebody of a tenant; finds out what that is now.
    pub(crate) fn find(
        &self,
        template: &str,
        build: Option<String>,
        tenant: Option<&str>,
    ) -> Result<Arc<Loaded>, EngineError> {
        let found = self.find_any(template, build);
        let Some(tenant) = tenant else { return found };
        match found {
            Ok(loaded) if loaded.is_for(tenant) => Ok(loaded),
            // Another's is as if it were not there.
            Ok(_) | Err(EngineError::Template(StoreError::NotFound { .. })) => {
                Err(self.settings.store.none_for(template, tenant).into())
            }
            Err(error) => Err(error),
        }
    }

    fn find_any(&self, template: &str, build: Option<String>) -> Result<Arc<Loaded>, EngineError> {
        let store = &self.settings.store;
        let build = match build {
            Some(build) => build,
            None => store.current(template)?,
        };
        if let Some(loaded) = self.loaded().get(&build) {
            loaded.used();
            return Ok(Arc::clone(loaded));
        }
        let replicas = store.replicas_of(template, &build)?;
        // One whose description is damaged is for the engine's owner alone: no tenant is called so.
        let described = store.inspect_build(template, &build);
        let owner = described.map_or(Some(String::new()), |template| template.tenant);
        let fresh = Arc::new(Loaded::new(template, &build, owner, replicas));
        let mut loaded = self.loaded();
        // A build that has been replaced serves those that have it, and nobody else.
        let is_replaced = |other: &Loaded| other.template == template && other.build != build;
        loaded.retain(|_, other| !is_replaced(other));
        Ok(Arc::clone(loaded.entry(build).or_insert(fresh)))
    }

    async fn pool(
        &self,
        loaded: &Loaded,
        replica: &Replica,
        first: RunKind,
        notes: &(dyn Fn(Note) + Sync),
    ) -> Result<Arc<Pool>, ZygoteError> {
        let pooled = replica.pool(&self.settings, &self.admission, first, || {
            let doing = format!("loading the template {}", loaded.template);
            notes(Note::Doing(doing));
        });
        pooled.await
    }

    fn check_walls(
        &self,
        missing: &[MissingWall],
        allowed: bool,
        notes: &(dyn Fn(Note) + Sync),
    ) -> Result<(), EngineError> {
        if !missing.iter().any(|wall| wall.is_main) {
            return Ok(());
        }
        if !allowed && !self.settings.allow_missing_walls {
            return Err(EngineError::MissingWalls(missing.to_vec()));
        }
        let walls = list(missing);
        let warning = format!("untrusted code could reach this host: no {walls}");
        notes(Note::Warning(warning));
        Ok(())
    }

    fn loaded(&self) -> MutexGuard<'_, HashMap<String, Arc<Loaded>>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Loaded>> {
        self.loaded().values().cloned().collect()
    }

    /// What is loaded, by template.
    pub async fn status(&self) -> Vec<LoadedStatus> {
        let mut all = Vec::new();
        for loaded in self.all() {
            for (number, replica) in loaded.replicas.iter().enumerate() {
                if let Some(pool) = replica.loaded().await {
                    all.push(LoadedStatus {
                        template: loaded.template.clone(),
                        build: loaded.build.clone(),
                        replica: number as u32,
                        pool: pool.stats(),
                    });
                }
            }
        }
        all.sort_by(|a, b| (&a.build, a.replica).cmp(&(&b.build, b.replica)));
        all
    }

    /// What sandboxes take from the host; as it was a few seconds ago, if it was asked for then.
    pub async fn census(&self) -> Census {
        self.counted.recent(self).await
    }

    /// What those have taken that have ended.
    pub fn ended(&self) -> Ended {
        self.admission.ended()
    }

    pub(crate) async fn pools(&self) -> Vec<Arc<Pool>> {
        let mut pools = Vec::new();
        for loaded in self.all() {
            for replica in &loaded.replicas {
                pools.extend(replica.loaded().await);
            }
        }
        pools
    }

    /// Who runs, and what has come of the others.
    pub fn runs(&self) -> QueueStats {
        self.queue.stats()
    }

    /// Unloads what nobody uses, for as long as it is polled.
    pub async fn sweep(&self) {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            self.unload_unused();
        }
    }

    fn unload_unused(&self) {
        let limit = self.settings.unload_after;
        // Whoever runs from it has a share of it.
        let is_used = |loaded: &Arc<Loaded>| Arc::strong_count(loaded) > 1;
        self.loaded()
            .retain(|_, loaded| loaded.idle_for() < limit || is_used(loaded));
    }

    /// Forgets a template that has been removed; those who run from it go on.
    pub fn forget(&self, template: &str) {
        self.loaded()
            .retain(|_, loaded| loaded.template != template);
    }

    /// Begins nothing more.
    pub fn close(&self) {
        self.queue.close();
        self.live.close();
    }

    /// Ends the pools and their zygotes, and waits until they are gone.
    pub async fn shut_down(&self) {
        self.close();
        self.live.end_all().await;
        let all: Vec<_> = self.loaded().drain().map(|(_, loaded)| loaded).collect();
        for loaded in all {
            for replica in &loaded.replicas {
                replica.shut_down().await;
            }
        }
    }
}
