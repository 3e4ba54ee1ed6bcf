//! The process in which a template is built: its own, so that it can be killed with all that it has
//! started, and so that the engine never holds a guest. It reads a request from standard input and
//! tells of itself on standard output, a line each.

use crate::BUILDS_LOCK_HINT;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use zygote_api::{BuildRequest, Built, ErrorCode, Failure, with_causes};
use zygote_template::{
    BuildError, BuildOptions, Built as BuiltHere, Progress, Recipe, Store, gather, up_to_date,
};

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All of it.
    Whole,
    /// Only what needs the network: then it holds the lock of builds until its input ends.
    Gather,
    /// Only what needs KVM; the lock is held elsewhere.
    Machine,
}

impl Mode {
    pub fn word(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Gather => "gather",
            Self::Machine => "machine",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Self::Whole, Self::Gather, Self::Machine]
            .into_iter()
            .find(|mode| mode.word() == word)
    }
}

/// What it tells.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Told {
    Progress {
        message: String,
        done: Option<u64>,
        total: Option<u64>,
    },
    /// The ingredients are there; the template is not.
    Gathered,
    Built(Box<Built>),
    Error {
        error: Failure,
    },
}

/// Who keeps others from building at the same time: file locks do not reach through the shared folder
/// of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildsLock {
    /// This process, by the lock's file.
    OursToTake,
    /// In a lab: this program's other half, on the host.
    HeldOutside,
    /// In a lab that somebody has started by hand: nobody can.
    OutOfReach,
}

/// Who does, here.
pub fn builds_lock() -> BuildsLock {
    let told = std::env::var(BUILDS_LOCK_HINT).unwrap_or_default();
    let in_lab = std::env::var_os(zygote_lab::IN_LAB).is_some();
    match (in_lab, told.as_str()) {
        (false, _) | (true, "own") => BuildsLock::OursToTake,
        (true, "held") => BuildsLock::HeldOutside,
        (true, _) => BuildsLock::OutOfReach,
    }
}

/// Runs it to its end; `words`: the mode, the state directory, and that of the templates that are somebody
/// else's, if there is one.
pub fn build_main(words: &[std::ffi::OsString]) -> ExitCode {
    let ([mode, state], shared) = match words {
        [mode, state, shared] => ([mode, state], Some(shared.into())),
        [mode, state] => ([mode, state], None),
        _ => return ExitCode::from(2),
    };
    let Some(mode) = mode.to_str().and_then(Mode::of) else {
        return ExitCode::from(2);
    };
    let store = Store::open(state.into()).with_shared(shared);
    let last = match work(mode, &store) {
        Ok(told) => told,
        Err(error) => Told::Error { error },
    };
    let is_good = !matches!(last, Told::Error { .. });
    tell(&last);
    ExitCode::from(u8::from(!is_good))
}

/// Whoever does not listen any more has killed us, or is about to.
fn tell(told: &Told) {
    if let Ok(mut line) = serde_json::to_vec(told) {
        line.push(b'\n');
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(&line).and_then(|()| stdout.flush());
    }
}

fn progress(progress: Progress) {
    let (done, total) = progress.part.unzip();
    tell(&Told::Progress {
        message: progress.message,
        done,
        total,
    });
}

fn work(mode: Mode, store: &Store) -> Result<Told, Failure> {
    let mut input = io::stdin().lock();
    let mut line = String::new();
    let read = input.read_line(&mut line);
    read.map_err(|error| Failure::internal(error.to_string()))?;
    let request: BuildRequest = serde_json::from_str(&line)
        .map_err(|error| Failure::bad_request(format!("no request: {error}")))?;
    let recipe = recipe(store, &request)?;
    let options = options(&recipe, &request)?;
    let _lock = lock(mode, store)?;
    if mode == Mode::Gather {
        let gathered = gather(store, &recipe, request.force, &mut progress);
        let gathered = gathered.map_err(|error| failed(&recipe, &error))?;
        if let Some(template) = up_to_date(store, &recipe, &options, &gathered) {
            return built(store, BuiltHere::UpToDate(template));
        }
        tell(&Told::Gathered);
        // The lock is held meanwhile.
        let _ = io::copy(&mut input.take(u64::MAX), &mut io::sink());
        return Ok(Told::Gathered);
    }
    match zygote_template::build(store, &recipe, &options, &mut progress) {
        Ok(made) => built(store, made),
        Err(BuildError::Store(error)) => Err(zygote_server::template_failure(&error)),
        Err(error) => Err(failed(&recipe, &error)),
    }
}

fn lock(mode: Mode, store: &Store) -> Result<Option<File>, Failure> {
    if mode == Mode::Machine {
        return Ok(None);
    }
    let lock = store.lock_builds(&mut progress);
    lock.map(Some)
        .map_err(|error| zygote_server::template_failure(&error))
}

fn recipe(store: &Store, request: &BuildRequest) -> Result<Recipe, Failure> {
    let name = &request.recipe;
    let recipe = match &request.recipe_toml {
        Some(text) => {
            let path = name.ends_with(".toml").then(|| Path::new(name));
            Recipe::parse(name, text, path)
        }
        None => store.recipe(name),
    };
    recipe.map_err(|error| zygote_server::recipe_failure(&error))
}

fn options(recipe: &Recipe, request: &BuildRequest) -> Result<BuildOptions, Failure> {
    let is_asked = request.memory_bytes.is_some() || request.vcpus.is_some();
    if let Some(from) = recipe.from.as_ref().filter(|_| is_asked) {
        let message = format!("memory and vCPUs are those of {from}, from which it is derived");
        return Err(Failure::bad_request(message));
    }
    if recipe.from.is_some() && request.replicas.is_some_and(|replicas| replicas != 1) {
        return Err(Failure::bad_request("replicas: a derived template has one"));
    }
    let memory_bytes = request
        .memory_bytes
        .unwrap_or_else(|| recipe.memory_bytes());
    let written = format!("{memory_bytes}");
    if let Some(problem) = zygote_template::memory_problem(&written) {
        return Err(Failure::bad_request(format!("memory_bytes: {problem}")));
    }
    let vcpus = request.vcpus.unwrap_or(recipe.vcpus());
    if !(1..=32).contains(&vcpus) {
        return Err(Failure::bad_request("vcpus: from 1 to 32"));
    }
    Ok(BuildOptions {
        memory_bytes,
        vcpus,
        replicas: request.replicas.unwrap_or(1),
        force: request.force,
    })
}

fn failed(recipe: &Recipe, error: &dyn std::error::Error) -> Failure {
    let sentence = format!("cannot build the template {}", recipe.name);
    Failure::new(ErrorCode::BuildFailed, sentence).cause(with_causes(error))
}

fn built(store: &Store, made: BuiltHere) -> Result<Told, Failure> {
    let (template, is_new) = match made {
        BuiltHere::New(template) => (template, true),
        BuiltHere::UpToDate(template) => (template, false),
    };
    let build = store.current(&template.name);
    let build = build.map_err(|error| zygote_server::template_failure(&error))?;
    Ok(Told::Built(Box::new(Built {
        is_new,
        info: zygote_server::template_info(build, template),
    })))
}
