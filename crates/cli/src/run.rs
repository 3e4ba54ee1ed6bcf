//! `zygote run`: fork, run, pass streams and the exit code on.

use crate::args::{Global, RunArgs, Settings};
use crate::engine::{self, Engine};
use crate::host::{self, Place};
use crate::interrupt::Interrupts;
use crate::program::{self, Job};
use crate::report::die_of;
use crate::{many, one, template};
use std::time::Duration;
use zygote_template::Store;

/// What a lab may take beside a program's own time: loading and checking the template,
const LAB_OVERHEAD_MAX: Duration = Duration::from_secs(300);
/// and making each fork. Ten times what has been seen.
const LAB_FORK_MAX: Duration = Duration::from_secs(10);

/// How a run of this program ends.
pub enum End {
    /// With this exit code.
    Code(u8),
    /// By the signal that it was sent.
    Signal(i32),
}

/// Runs; gives back the exit code.
pub fn run(global: &Global, args: &RunArgs) -> anyhow::Result<u8> {
    let job = program::read(args)?;
    let store = host::store(global)?;
    let missing = template::is_missing(&store, &args.template)?;
    let is_alone = args.no_daemon || args.memory_max.is_some();
    if is_alone && host::choose(global, &store)? == Place::Lab {
        return alone_in_lab(&store, args, missing);
    }
    raise_descriptors();
    let runtime = engine::runtime()?;
    let end = runtime.block_on(conduct(global, &store, args, job, is_alone, missing));
    // A thread may still wait for standard input that nobody wants any more.
    runtime.shutdown_background();
    Ok(match end? {
        End::Code(code) => code,
        End::Signal(signal) => die_of(signal),
    })
}

/// A lab for this run, in which this program does without an engine that stays as well.
fn alone_in_lab(store: &Store, args: &RunArgs, missing: bool) -> anyhow::Result<u8> {
    let _lock = if missing {
        template::say_missing(&args.template);
        Some(template::gather_for(store, &args.template)?)
    } else {
        None
    };
    let folders = args.get.iter().map(|get| match &get.target {
        Some(target) => target.parent().unwrap_or(target).to_owned(),
        None => ".".into(),
    });
    let folders: Vec<_> = folders.collect();
    host::again_in_lab(
        store,
        program::wants_stdin(args),
        lab_timeout(args),
        &folders,
    )
}

/// Each run takes descriptors; the usual soft limit is for programs that use select(2).
pub fn raise_descriptors() {
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
async fn conduct(
    global: &Global,
    store: &Store,
    args: &RunArgs,
    job: Job,
    is_alone: bool,
    missing: bool,
) -> anyhow::Result<End> {
    let interrupts = Interrupts::listen()?;
    let prepared = async {
        let engine = if is_alone {
            Engine::own(global, store, &alone(args)).await?
        } else {
            Engine::shared(global, store).await?
        };
        if missing {
            template::build_missing(engine.client(), &args.template).await?;
        }
        anyhow::Ok(engine)
    };
    // Before there is a program, a signal is ours.
    let engine = tokio::select! {
        engine = prepared => engine?,
        signal = interrupts.after(1) => return Ok(many::interrupted(args, signal)),
    };
    let is_one = args.count == 1 && !args.json;
    // Several tell their ends, which a second signal brings about.
    let last = if is_one { 2 } else { 3 };
    let work = async {
        if is_one {
            one::run(engine.client(), args, job, &interrupts).await
        } else {
            many::run(engine.client(), args, job, &interrupts).await
        }
    };
    // Leaving the block drops whatever runs, and with it the forks.
    let end = tokio::select! {
        end = work => end,
        signal = interrupts.after(last) => Ok(End::Signal(signal)),
    };
    engine.leave().await;
    end
}

/// The settings of an engine for one command: nothing is made ahead, and all of its runs may begin.
fn alone(args: &RunArgs) -> Settings {
    Settings {
        pool_min: Some(0),
        pool_max: Some(0),
        runs_max: Some(many::AT_ONCE_MAX),
        memory_max: args.memory_max.map(|bytes| bytes.to_string()),
        ..Settings::default()
    }
}
