//! Everything that `zygote bench` measures, in one run on one host.

use crate::baseline::{self, Baselines};
use crate::branches::{self, BranchTimes};
use crate::held::{Held, hold};
use crate::runs::{RunError, RunTimes, Source, at_once, one_by_one};
use serde::Serialize;
use std::ffi::OsString;
use std::time::Duration;
use zygote_engine::{
    Admission, Budget, EngineConfig, Pool, PoolConfig, RunKind, Zygote, ZygoteError,
};
use zygote_runner::control::Load;
use zygote_template::{Store, StoreError, rehearsal};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Program and arguments that end in [`zygote_runner::zygote_main`].
    pub zygote_command: Vec<OsString>,
    /// The template.
    pub template: String,
    /// Runs of each kind.
    pub runs: usize,
    /// Sandboxes that are held at once; 0: none.
    pub held: usize,
    /// How long a step of a sandbox may take.
    pub patience: Duration,
    /// Whether the host is emulated.
    pub is_emulated: bool,
}

/// The host that it was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct HostInfo {
    /// `kvm`, or `lab`: an emulated host, whose times say nothing about any other.
    pub kind: &'static str,
    /// `uname -r`.
    pub kernel: String,
    /// From /proc/cpuinfo.
    pub processor: String,
    /// Processors.
    pub processors: usize,
    /// MemTotal.
    pub memory_mib: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where.
    pub host: HostInfo,
    /// Of which template.
    pub template: String,
    /// The same without a machine of its own.
    pub baselines: Baselines,
    /// `print(1+1)` in a fork made ahead.
    pub pooled: RunTimes,
    /// In one that is made when it is asked for.
    pub unpooled: RunTimes,
    /// As many at once as `clients`.
    pub under_load: RunTimes,
    /// Callers at once.
    pub clients: usize,
    /// Runs a second meanwhile.
    pub runs_per_second: f64,
    /// Many held at once.
    pub held: Option<Held>,
    /// Sandboxes that live.
    pub branches: BranchTimes,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The template.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its zygote.
    #[error(transparent)]
    Zygote(#[from] ZygoteError),
    /// A run.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Measures; `tell` is told what is being done.
///
/// # Errors
/// See [`BenchError`].
pub async fn measure(
    store: &Store,
    plan: &Plan,
    tell: &dyn Fn(&str),
) -> Result<Report, BenchError> {
    let program = rehearsal::python("print(1+1)");
    tell("python3 and fork(2) on the host");
    let baselines = baseline::measure(plan.runs);
    tell("forks made when they are asked for");
    let zygote = load(store, plan).await?;
    // Page cache, and whatever else is slow once.
    one_by_one(Source::Zygote(&zygote), &program, 2).await?;
    let unpooled = one_by_one(Source::Zygote(&zygote), &program, plan.runs).await?;
    tell("many at once");
    let clients = 2 * processors();
    let (under_load, runs_per_second) =
        at_once(Source::Zygote(&zygote), &program, plan.runs, clients).await?;
    tell("forks made ahead");
    let pool = pool(zygote, 2);
    let pooled = one_by_one(Source::Pool(&pool), &program, plan.runs).await?;
    pool.shut_down().await;
    let held = match plan.held {
        0 => None,
        count => {
            tell("many held at once");
            let pool = self::pool(load(store, plan).await?, count);
            let held = hold(&pool, count).await?;
            pool.shut_down().await;
            Some(held)
        }
    };
    tell("branches, and the ways back");
    let branches = branches::measure(store, plan).await?;
    Ok(Report {
        host: HostInfo::of_this(plan.is_emulated),
        template: plan.template.clone(),
        baselines,
        pooled,
        unpooled,
        under_load,
        clients,
        runs_per_second,
        held,
        branches,
    })
}

async fn load(store: &Store, plan: &Plan) -> Result<Zygote, BenchError> {
    let build = store.current(&plan.template)?;
    let replicas = store.replicas_of(&plan.template, &build)?;
    let snapshot = replicas.into_iter().next().unwrap_or_default();
    let config = EngineConfig {
        command: plan.zygote_command.clone(),
        load: Load {
            pieces: store.pieces_of(&snapshot),
            snapshot,
            stamps: store.stamps(),
            group: None,
        },
        admission: Admission::new(Budget::default()),
        // Nothing runs but programs of ours.
        allow_missing_walls: true,
        patience: plan.patience,
    };
    Ok(Zygote::load(&config).await?)
}

fn pool(zygote: Zygote, idle: usize) -> Pool {
    let config = PoolConfig {
        idle_min: idle,
        idle_max: idle,
        ..PoolConfig::default()
    };
    Pool::new(zygote, config, RunKind::Python)
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl HostInfo {
    fn of_this(is_emulated: bool) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let after = |text: &str, key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
        };
        let memory = after(&read("/proc/meminfo"), "MemTotal:").unwrap_or_default();
        let kib = memory.split(' ').next().and_then(|kib| kib.parse().ok());
        Self {
            kind: if is_emulated { "lab" } else { "kvm" },
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: after(&read("/proc/cpuinfo"), "model name").unwrap_or_default(),
            processors: processors(),
            memory_mib: kib.unwrap_or(0_u64) >> 10,
        }
    }
}
