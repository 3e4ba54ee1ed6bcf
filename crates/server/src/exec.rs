//! `POST /v1/exec`, in its three forms.

use crate::answer::{Made, json};
use crate::backend::{Backend, Input};
use crate::files::Files;
use crate::lines::{Lines, object};
use crate::request::check;
use crate::stream::{EVENTS_MAX, Form, answer};
use axum::http::{HeaderMap, Request, header};
use axum::response::Response;
use futures_util::stream::{self, StreamExt};
use serde::de::DeserializeOwned;
use std::sync::{Arc, LazyLock};
use tokio::sync::mpsc;
use zygote_access::{Access, Caller, Held};
use zygote_api::{
    BatchRequest, BatchResult, COLLECTED_MAX_BYTES, Collected, CommandRequest, ErrorCode,
    ExecEvent, ExecInput, ExecRequest, ExecResult, Failure, NDJSON, Octets, OutputBudget,
};

/// Output that is kept of all runs whose answer is one object.
pub static BUDGET: LazyLock<Arc<OutputBudget>> = LazyLock::new(|| OutputBudget::new(1 << 30));
/// Programs of a batch, and how many of them run or wait at once: others find room between them.
const BATCH_MAX: usize = 1000;
const BATCH_AT_ONCE: usize = 32;
/// As the command line exits when there is no sandbox.
const FAILED: u8 = 125;
/// Lines of input that wait for the sandbox.
const INPUT_MAX: usize = 4;

/// `POST /v1/exec`.
pub async fn exec<B: Backend>(
    backend: Arc<B>,
    access: Arc<Access>,
    caller: Caller,
    request: Request<axum::body::Body>,
) -> Result<Response, Failure> {
    answered(
        request,
        move |asked: ExecRequest, input, events| async move {
            let _held = held(&access, &caller)?;
            let asked = limited(asked, &caller);
            cut(&*backend, &caller, asked, input, events).await
        },
    )
    .await
}

/// One more run of a key's.
fn held(access: &Access, caller: &Caller) -> Result<Held, Failure> {
    access.hold(caller).ok_or_else(|| {
        let most = caller.limits.runs.unwrap_or_default();
        let message = format!("{most} runs of this key go on, as many as may");
        Failure::new(ErrorCode::LimitReached, message).retry_after(1)
    })
}

/// Runs it, and throws away what it says beyond what a key's runs may.
async fn cut<B: Backend>(
    backend: &B,
    caller: &Caller,
    asked: ExecRequest,
    input: Input,
    events: mpsc::Sender<ExecEvent>,
) -> Result<(), Failure> {
    let Some(most) = caller.limits.output_bytes else {
        return backend.exec(caller, asked, input, events).await;
    };
    let (sender, mut happening) = mpsc::channel(EVENTS_MAX);
    let passing = async {
        let mut left = usize::try_from(most).unwrap_or(usize::MAX);
        let mut is_cut = false;
        while let Some(mut event) = happening.recv().await {
            match &mut event {
                ExecEvent::Stdout { data } | ExecEvent::Stderr { data } => {
                    is_cut |= data.0.len() > left;
                    data.0.truncate(left);
                    left -= data.0.len();
                    if data.0.is_empty() {
                        continue;
                    }
                }
                ExecEvent::Result(result) => result.truncated |= is_cut,
                _ => {}
            }
            // Who does not listen any more drops this.
            let _ = events.send(event).await;
        }
    };
    let (ran, ()) = tokio::join!(backend.exec(caller, asked, input, sender), passing);
    ran
}

/// No longer than a key's runs may take.
fn limited(asked: ExecRequest, caller: &Caller) -> ExecRequest {
    let most = caller.limits.timeout_s.unwrap_or(f64::INFINITY);
    let is_less = asked.timeout_seconds != 0.0 && asked.timeout_seconds <= most;
    ExecRequest {
        timeout_seconds: if is_less || most.is_infinite() {
            asked.timeout_seconds
        } else {
            most
        },
        ..asked
    }
}

/// `POST /v1/lab/exec`.
pub async fn lab_exec<B: Backend>(
    backend: Arc<B>,
    request: Request<axum::body::Body>,
) -> Result<Response, Failure> {
    answered(request, move |asked, input, events| async move {
        backend.lab_exec(asked, input, events).await
    })
    .await
}

/// What an answer that is one object needs to know of a request.
trait Asked {
    fn gets(&self) -> Vec<Octets>;
}

impl Asked for ExecRequest {
    fn gets(&self) -> Vec<Octets> {
        self.get.clone()
    }
}

impl Asked for CommandRequest {
    fn gets(&self) -> Vec<Octets> {
        Vec::new()
    }
}

async fn answered<T, W, F>(request: Request<axum::body::Body>, work: W) -> Result<Response, Failure>
where
    T: DeserializeOwned + Asked,
    W: FnOnce(T, Input, mpsc::Sender<ExecEvent>) -> F,
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let (form, asked, lines) = read::<T>(request).await?;
    let (sender, input) = mpsc::channel(INPUT_MAX);
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    let files = Files::new(match form {
        Form::Json => asked.gets(),
        _ => Vec::new(),
    });
    let running = run(
        work(asked, input, events),
        lines.map(|lines| (lines, sender)),
    );
    if form == Form::Json {
        let result = collect(running, happening, files).await?;
        let mut answer = json(&result);
        answer.extensions_mut().insert(Made(result.id));
        return Ok(answer);
    }
    let work = Box::pin(async move { running.await.map(|()| None) });
    answer(form, work, happening, |error| ExecEvent::Error { error }).await
}

/// The form of the answer that is wanted, what is asked for, and the lines that follow, if there may be some.
pub async fn read<T: DeserializeOwned>(
    request: Request<axum::body::Body>,
) -> Result<(Form, T, Option<Lines>), Failure> {
    let (head, body) = request.into_parts();
    let form = Form::of(value(&head.headers, header::ACCEPT));
    let is_lines = value(&head.headers, header::CONTENT_TYPE)
        .is_some_and(|kind| kind.split(';').next().unwrap_or_default().trim() == NDJSON);
    if is_lines {
        let mut lines = Lines::new(body);
        Ok((form, lines.first().await?, Some(lines)))
    } else {
        Ok((form, object(body).await?, None))
    }
}

fn value(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

type Feed = Option<(Lines, mpsc::Sender<Result<ExecInput, Failure>>)>;

/// Runs while it reads the input.
async fn run(
    running: impl Future<Output = Result<(), Failure>>,
    feed: Feed,
) -> Result<(), Failure> {
    let Some((lines, sender)) = feed else {
        return running.await;
    };
    tokio::pin!(running);
    tokio::select! {
        ended = &mut running => ended,
        // The program has had all of its input.
        () = pass(lines, sender) => running.await,
    }
}

async fn pass(mut lines: Lines, sender: mpsc::Sender<Result<ExecInput, Failure>>) {
    loop {
        let next = lines.next().await.transpose();
        let Some(line) = next else { return };
        let is_last = line.is_err();
        if sender.send(line).await.is_err() || is_last {
            return;
        }
    }
}

/// One object, with all output.
async fn collect(
    running: impl Future<Output = Result<(), Failure>>,
    mut events: mpsc::Receiver<ExecEvent>,
    mut files: Files,
) -> Result<ExecResult, Failure> {
    let collecting = async {
        let mut output = Collected::new(COLLECTED_MAX_BYTES, &BUDGET);
        let mut end = Err(Failure::internal("the run has ended without a result"));
        while let Some(event) = events.recv().await {
            match event {
                ExecEvent::Progress { .. }
                | ExecEvent::Warning { .. }
                | ExecEvent::Ready { .. } => {}
                ExecEvent::Stdout { data } => output.push_stdout(&data.0),
                ExecEvent::Stderr { data } => output.push_stderr(&data.0),
                ExecEvent::Get { index, piece } => files.take(index, piece),
                ExecEvent::Result(result) => end = Ok(*result),
                ExecEvent::Error { error } => end = Err(error),
            }
        }
        (end, output, files.end())
    };
    let (ran, (end, output, files)) = tokio::join!(running, collecting);
    ran?;
    let result = with_output(end?, output);
    Ok(ExecResult { files, ..result })
}

/// `POST /v1/exec/batch`.
pub async fn batch<B: Backend>(
    backend: Arc<B>,
    access: Arc<Access>,
    caller: Caller,
    asked: BatchRequest,
) -> Result<BatchResult, Failure> {
    let count = asked.executions.len();
    let most = caller.limits.batch.map_or(BATCH_MAX, |most| most as usize);
    let most = most.min(BATCH_MAX);
    if !(1..=most).contains(&count) {
        let message = format!("executions: 1 to {most}");
        return Err(Failure::bad_request(message));
    }
    let in_lines = |one: &ExecRequest| one.stdin_stream || one.files_stream;
    if let Some(index) = asked.executions.iter().position(in_lines) {
        let message = format!("executions[{index}]: no lines follow in a batch");
        return Err(Failure::bad_request(message).remedy("give stdin and files whole"));
    }
    for (index, one) in asked.executions.iter().enumerate() {
        check(one).map_err(|failure| {
            let message = format!("executions[{index}]: {}", failure.message);
            Failure { message, ..failure }
        })?;
    }
    // So many of it run as may.
    let runs = caller
        .limits
        .runs
        .map_or(BATCH_AT_ONCE, |most| most as usize);
    let (access, caller) = (&access, &caller);
    let all = asked.executions.into_iter().map(|one| {
        let backend = Arc::clone(&backend);
        async move {
            let run = whole(&*backend, access, caller, one).await;
            run.unwrap_or_else(without_sandbox)
        }
    });
    // In their order, so many at a time; dropped, those that run end.
    let results = stream::iter(all).buffered(runs.min(BATCH_AT_ONCE));
    Ok(BatchResult {
        results: results.collect().await,
    })
}

async fn whole<B: Backend>(
    backend: &B,
    access: &Access,
    caller: &Caller,
    asked: ExecRequest,
) -> Result<ExecResult, Failure> {
    let _held = held(access, caller)?;
    let asked = limited(asked, caller);
    let (_, input) = mpsc::channel(1);
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    let files = Files::new(asked.gets());
    let running = cut(backend, caller, asked, input, events);
    collect(running, happening, files).await
}

fn without_sandbox(failure: Failure) -> ExecResult {
    let mut result = ExecResult {
        exit_code: FAILED,
        error: Some(failure),
        ..ExecResult::default()
    };
    result.set_output(Vec::new(), Vec::new());
    result
}

fn with_output(mut result: ExecResult, mut output: Collected) -> ExecResult {
    let (stdout, stderr) = output.take();
    result.set_output(stdout, stderr);
    result.truncated |= output.truncated;
    result
}
