//! The load itself. In a closed loop each client waits for its answer; in an open one requests are due at their times,
//! and an engine that falls behind is not asked less for that: times count from when a request was due.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use zygote_api::{ExecEvent, ExecRequest};
use zygote_bench::Samples;
use zygote_daemon::{Client, ClientError};

/// How long answers are waited for when no more is asked.
const REST_MAX: Duration = Duration::from_secs(60);
/// Longest pause that a refused client makes before it asks again.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Requests on their way at once; the next ones wait, and their times run.
const UNDER_WAY_MAX: usize = 10_000;

/// How it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// One after the other, by each client.
    Closed,
    /// At a rate.
    Open {
        /// Requests a second.
        rate: u32,
    },
}

/// What is asked.
pub struct Load {
    pub course: Course,
    pub duration: Duration,
    pub request: ExecRequest,
}

/// What came of it.
pub struct Outcome {
    /// Times of requests that were answered.
    pub answered: Samples,
    /// Of those, what the engine says that each took.
    pub in_guest: Samples,
    /// Those that were not, by the code of why.
    pub refused: BTreeMap<String, u64>,
    /// How long it took in all.
    pub took: Duration,
}

#[derive(Default)]
struct Seen {
    answered: Vec<Duration>,
    in_guest: Vec<Duration>,
    refused: BTreeMap<String, u64>,
}

#[derive(Clone, Default)]
struct Record(Arc<Mutex<Seen>>);

impl Record {
    fn note(&self, took: Duration, asked: Result<Duration, String>) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match asked {
            Ok(told) => {
                seen.answered.push(took);
                seen.in_guest.push(told);
            }
            Err(code) => *seen.refused.entry(code).or_default() += 1,
        }
    }
}

/// Asks for as long as it is to be.
pub async fn run(clients: Vec<Client>, load: &Load) -> Outcome {
    let (record, begun) = (Record::default(), Instant::now());
    let until = begun + load.duration;
    let mut tasks = JoinSet::new();
    let clients = clients.into_iter().map(Arc::new);
    match load.course {
        Course::Closed => clients.for_each(|client| {
            tasks.spawn(one_by_one(
                client,
                load.request.clone(),
                until,
                record.clone(),
            ));
        }),
        Course::Open { rate } => {
            let clients: Vec<_> = clients.collect();
            at_rate(&clients, load, rate, until, &record, &mut tasks).await;
        }
    }
    // What does not come to its end is seen as not answered.
    let ended = async { while tasks.join_next().await.is_some() {} };
    let rest = until.saturating_duration_since(Instant::now()) + REST_MAX;
    if timeout(rest, ended).await.is_err() {
        record.note(Duration::ZERO, Err("no answer within a minute".to_owned()));
    }
    let took = begun.elapsed();
    let seen = std::mem::take(&mut *record.0.lock().unwrap_or_else(PoisonError::into_inner));
    Outcome {
        answered: Samples::of(seen.answered),
        in_guest: Samples::of(seen.in_guest),
        refused: seen.refused,
        took,
    }
}

async fn one_by_one(client: Arc<Client>, request: ExecRequest, until: Instant, record: Record) {
    while Instant::now() < until {
        let begun = Instant::now();
        match ask(&client, &request).await {
            Ok(told) => record.note(begun.elapsed(), Ok(told)),
            Err(error) => {
                let failure = error.to_failure();
                record.note(begun.elapsed(), Err(code(&error)));
                let pause = failure
                    .retry_after_seconds
                    .map(|s| Duration::from_secs(s.into()));
                // Whoever is refused comes again, but does not press.
                sleep(pause.unwrap_or(PAUSE_MAX).min(PAUSE_MAX)).await;
            }
        }
    }
}

async fn at_rate(
    clients: &[Arc<Client>],
    load: &Load,
    rate: u32,
    until: Instant,
    record: &Record,
    tasks: &mut JoinSet<()>,
) {
    let begun = Instant::now();
    let mut next = clients.iter().cycle();
    for number in 0_u64.. {
        let due = begun + Duration::from_secs_f64(number as f64 / f64::from(rate));
        if due >= until {
            return;
        }
        sleep_until(due).await;
        while tasks.len() >= UNDER_WAY_MAX {
            tasks.join_next().await;
        }
        while tasks.try_join_next().is_some() {}
        let Some(client) = next.next().map(Arc::clone) else {
            return;
        };
        let (request, record) = (load.request.clone(), record.clone());
        tasks.spawn(async move {
            let asked = ask(&client, &request).await;
            // From when it was due: what waited in line here waited for the engine.
            record.note(due.elapsed(), asked.map_err(|error| code(&error)));
        });
    }
}

fn code(error: &ClientError) -> String {
    let code = serde_json::to_value(error.to_failure().code);
    let code = code.ok().and_then(|code| code.as_str().map(str::to_owned));
    code.unwrap_or_default()
}

/// One run; gives back how long the engine says that it took.
async fn ask(client: &Client, request: &ExecRequest) -> Result<Duration, ClientError> {
    let mut events = client.exec(request, None).await?;
    while let Some(event) = events.next().await? {
        match event {
            ExecEvent::Result(result) => {
                let ms = result.total_time_ms.max(0.0);
                return Ok(Duration::try_from_secs_f64(ms / 1000.0).unwrap_or_default());
            }
            ExecEvent::Error { error } => return Err(ClientError::Refused(Box::new(error))),
            _ => {}
        }
    }
    Err(ClientError::Broken("it ended without a result".to_owned()))
}
