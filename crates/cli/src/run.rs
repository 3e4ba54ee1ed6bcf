//! `zygote run`: fork, run, pass streams and the exit code on.

use crate::args::{Global, RunArgs};
use crate::host::{self};
use crate::interrupt::Interrupts;
use crate::out::complain;
use crate::program::{self, Job, Unreadable};
use crate::report::die_of;
use crate::{many, one, template};
use anyhow::{Context, bail};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use zygote_engine::*;
use zygote_runner::control::Load;
use zygote_template::Store;

/// Hidden verb by which this program becomes a zygote process.
pub const ZYGOTE_VERB: &str = "zygote-process";
/// What a lab may take beside a program's own time: loading and checking the template,
const LAB_OVERHEAD_MAX: Duration = Duration::from_secs(300);
/// and making each fork. Ten times what has been seen.
const LAB_FORK_MAX: Duration = Duration::from_secs(10);
/// How often a template may be replaced while it is being loaded.
const REPLACED_MAX: u32 = 10;
/// python3's own code for a program that it cannot open.
const CANNOT_OPEN: u8 = 2;

/// How a run of this program ends.
pub enum End {
    /// With this exit code.
    Code(u8),
    /// By the signal that it was sent.
    Signal(i32),
}

/// Runs; gives back the exit code.
pub fn run(global: &Global, args: &RunArgs) -> anyhow::Result<u8> {
    let job = match program::read(args) {
        Ok(job) => job,
        Err(Unreadable::File(sentence)) => {
            complain!("zygote: {sentence}");
            return Ok(CANNOT_OPEN);
        }
        Err(Unreadable::Usage(sentence)) => bail!(sentence),
    };
    let store = host::store(global)?;
    let place = host::choose(global, &store)?;
    let missing = template::is_missing(&store, &args.template)?;
    if place == host::Place::Lab {
        let _lock = if missing {
            complain!(
                "zygote: there is no template {} yet; building it first",
                args.template
            );
            Some(template::gather_for(&store, &args.template)?)
        } else {
            None
        };
        return host::again_in_lab(&store, program::wants_stdin(args), lab_timeout(args));
    }
    if missing {
        template::build_missing(&store, &args.template)?;
    }
    raise_descriptors();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let end = runtime.block_on(conduct(&store, args, job));
    // A thread may still wait for standard input that nobody wants any more.
    runtime.shutdown_background();
    Ok(match end? {
        End::Code(code) => code,
        End::Signal(signal) => die_of(signal),
    })
}

/// Each run takes four descriptors; the usual soft limit is for programs that use select(2).
fn raise_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // What cannot be had is told by the run that lacks it.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// How long a lab may take for runs that keep their own time limits inside.
fn lab_timeout(args: &RunArgs) -> Option<Duration> {
    let limit = args.timeout.0?;
    Some(limit + LAB_OVERHEAD_MAX + LAB_FORK_MAX * args.count)
}

/// Runs all forks to their ends.
async fn conduct(store: &Store, args: &RunArgs, job: Job) -> anyhow::Result<End> {
    let interrupts = Interrupts::listen()?;
    // Before there is a program, a signal is ours.
    let zygotes = tokio::select! {
        zygotes = load(store, args) => zygotes?,
        signal = interrupts.after(1) => return Ok(End::Signal(signal)),
    };
    let work = async {
        if args.count == 1 && !args.json {
            one::run(&zygotes[0], args, job, &interrupts).await
        } else {
            many::run(&zygotes, args, job, &interrupts).await
        }
    };
    // Leaving the block drops whatever runs, and with it the forks.
    let end = tokio::select! {
        end = work => end,
        signal = interrupts.after(2) => Ok(End::Signal(signal)),
    };
    for zygote in zygotes {
        zygote.shut_down().await;
    }
    end
}

/// A zygote for each replica that will be forked; they take turns, from a random one on. A template
/// that is replaced meanwhile is looked up again.
async fn load(store: &Store, args: &RunArgs) -> anyhow::Result<Vec<Zygote>> {
    let mut replicas = store.replicas(&args.template)?;
    for _ in 0..REPLACED_MAX {
        let error = match load_all(store, args, &replicas).await {
            Ok(zygotes) => return Ok(zygotes),
            Err(error) => error,
        };
        let now = store.replicas(&args.template)?;
        if now == replicas {
            return Err(error);
        }
        replicas = now;
    }
    bail!(
        "the template {} is being replaced all the time",
        args.template
    )
}

async fn load_all(
    store: &Store,
    args: &RunArgs,
    replicas: &[PathBuf],
) -> anyhow::Result<Vec<Zygote>> {
    let mut replicas = replicas.to_vec();
    let random = uuid::Uuid::new_v4().as_u128() % replicas.len().max(1) as u128;
    replicas.rotate_left(random as usize);
    replicas.truncate(args.count as usize);
    let mut budget = Budget::default();
    budget.memory_max_bytes = args.memory_max.unwrap_or(budget.memory_max_bytes);
    let admission = Admission::new(budget);
    let mut zygotes = Vec::new();
    for snapshot in replicas {
        let load = Load {
            snapshot,
            pieces: store.pieces(),
            stamps: store.stamps(),
            group: None,
        };
        let zygote = Zygote::load(&config(args, &admission, load)?).await;
        let zygote =
            zygote.with_context(|| format!("cannot fork the template {}", args.template))?;
        let walls = list_walls(zygote.missing_walls());
        if !walls.is_empty() && zygotes.is_empty() {
            complain!("zygote: warning: untrusted code could reach this host: no {walls}");
        }
        zygotes.push(zygote);
    }
    Ok(zygotes)
}

/// This program is also the zygote process.
fn config(args: &RunArgs, admission: &Arc<Admission>, load: Load) -> anyhow::Result<EngineConfig> {
    let program: PathBuf = std::env::current_exe().context("cannot find this program")?;
    Ok(EngineConfig {
        command: vec![program.into(), ZYGOTE_VERB.into()],
        load,
        admission: Arc::clone(admission),
        allow_missing_walls: args.allow_missing_walls,
        patience: if host::in_lab() {
            PATIENCE_EMULATED
        } else {
            PATIENCE
        },
    })
}
