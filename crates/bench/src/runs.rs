//! How long runs take, as the engine's caller sees it.

use crate::samples::Samples;
use futures_util::future::join_all;
use serde::Serialize;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use zygote_engine::{
    Buffering, Event, ExitStatus, Outcome, Pool, Program, RunRequest, RunResult, Stdin, Zygote, run,
};

/// Events that wait for who measures.
const EVENTS_MAX: usize = 16;

/// Times of runs; each clock begins with the request.
#[derive(Clone, Debug, Serialize)]
pub struct RunTimes {
    /// Until the guest is somebody.
    pub ready: Samples,
    /// Until the first byte of output.
    pub first_output: Samples,
    /// Until the exit status.
    pub run: Samples,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
#[error("a run that is measured has failed: {0}")]
pub struct RunError(String);

impl RunError {
    pub(crate) fn new(what: &str) -> Self {
        Self(what.to_owned())
    }
}

impl From<std::io::Error> for RunError {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Where forks come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Made ahead, or made when there is none.
    Pool(&'a Pool),
    /// Made when asked for.
    Zygote(&'a Zygote),
}

/// A run of a program, without input.
pub fn request(program: Program) -> RunRequest {
    RunRequest {
        program,
        env: Vec::new(),
        cwd: String::new(),
        stdin: Stdin::Empty,
        buffering: Buffering::Full,
        gets: Vec::new(),
        puts: None,
        signals: None,
        timeout: Some(Duration::from_secs(300)),
        measure: false,
    }
}

/// Runs it once, to its good end.
pub async fn once(source: Source<'_>, request: RunRequest) -> Result<RunResult, RunError> {
    let (sender, mut events) = mpsc::channel::<Event>(EVENTS_MAX);
    let drained = async { while events.recv().await.is_some() {} };
    let running = async {
        match source {
            Source::Pool(pool) => pool.run(request, sender).await,
            Source::Zygote(zygote) => run(zygote, request, sender).await,
        }
    };
    let (result, ()) = tokio::join!(running, drained);
    match &result.outcome {
        Outcome::Exited(ExitStatus::Code(0)) => Ok(result),
        other => Err(RunError(format!("{other:?}"))),
    }
}

/// Runs it so many times, one after the other. A pool is full before each.
pub async fn one_by_one(
    source: Source<'_>,
    program: &Program,
    count: usize,
) -> Result<RunTimes, RunError> {
    let mut results = Vec::new();
    for _ in 0..count {
        if let Source::Pool(pool) = source {
            pool.filled(2).await;
        }
        results.push(once(source, request(program.clone())).await?);
    }
    Ok(times(&results))
}

/// So many at once, again and again until there were `count`; gives back runs a second as well.
pub async fn at_once(
    source: Source<'_>,
    program: &Program,
    count: usize,
    clients: usize,
) -> Result<(RunTimes, f64), RunError> {
    let begun = Instant::now();
    let client = || async {
        let mut results = Vec::new();
        for _ in 0..count.div_ceil(clients) {
            results.push(once(source, request(program.clone())).await?);
        }
        Ok(results)
    };
    let all = join_all((0..clients).map(|_| client())).await;
    let all: Result<Vec<_>, RunError> = all.into_iter().collect();
    let results: Vec<RunResult> = all?.into_iter().flatten().collect();
    let rate = results.len() as f64 / begun.elapsed().as_secs_f64();
    Ok((times(&results), rate))
}

fn times(results: &[RunResult]) -> RunTimes {
    RunTimes {
        ready: Samples::of(results.iter().filter_map(|result| result.fork_time)),
        first_output: Samples::of(results.iter().filter_map(|result| result.first_output_time)),
        run: Samples::of(results.iter().map(|result| result.total_time)),
    }
}
