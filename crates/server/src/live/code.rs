//! `POST …/code`: a cell of code in an interpreter that stays.

use super::words::{live_failure, lost, result};
use crate::answer::json;
use crate::exec::{BUDGET, read};
use crate::local::{milliseconds, printable};
use crate::request::time_limit;
use crate::stream::{EVENTS_MAX, Form, answer_at_once};
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use zygote_api::{
    Bundle, COLLECTED_MAX_BYTES, CodeEvent, CodeRequest, CodeResult, Collected, ContextInfo,
    ErrorCode, Exception, Failure, base64,
};
use zygote_engine::live::{self, Attachment, CellSpec, Piece, Sandbox};
use zygote_engine::{CellError, CellEvent, Representation, Stream};

/// Most of what is shown that an answer that is one object has, in bytes.
const DISPLAYS_MAX_BYTES: usize = 64 << 20;

/// Runs a cell.
pub async fn run(sandbox: Arc<Sandbox>, request: Request<Body>) -> Result<Response, Failure> {
    let (form, asked, _) = read::<CodeRequest>(request).await?;
    let begun = Instant::now();
    let limit = time_limit(asked.timeout_seconds)?;
    let spec = CellSpec {
        context: asked.context.clone(),
        code: asked.code.0,
        timeout: limit,
        ends_with_reader: asked.interrupt_on_disconnect,
    };
    let running = sandbox.run_cell(spec).await;
    let output = running.map_err(|error| live_failure(&error))?;
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    let cell = Cell {
        sandbox,
        context: asked.context,
        limit,
        begun,
    };
    let running = cell.follow(output, events);
    if form == Form::Json {
        return collect(running, happening).await;
    }
    let work = Box::pin(async move { running.await.map(|()| None) });
    let error = |error| CodeEvent::Error { error };
    Ok(answer_at_once(form, work, happening, error))
}

struct Cell {
    sandbox: Arc<Sandbox>,
    context: String,
    limit: Option<Duration>,
    begun: Instant,
}

impl Cell {
    async fn follow(
        self,
        mut output: Attachment,
        events: mpsc::Sender<CodeEvent>,
    ) -> Result<(), Failure> {
        let mut truncated = false;
        loop {
            let event = match output.next().await {
                Piece::Output {
                    stream: Stream::Stdout,
                    data,
                    ..
                } => CodeEvent::Stdout { data: data.into() },
                Piece::Output { data, .. } => CodeEvent::Stderr { data: data.into() },
                Piece::Skipped { .. } => {
                    truncated = true;
                    continue;
                }
                Piece::Cell(CellEvent::Display { data }) => {
                    CodeEvent::Display { data: bundle(data) }
                }
                Piece::Cell(CellEvent::Done {
                    count,
                    result,
                    error,
                }) => {
                    let mut told = self.told(count, result, error);
                    told.truncated = truncated;
                    // Who does not listen any more drops this.
                    let _ = events.send(CodeEvent::Result(Box::new(told))).await;
                    return Ok(());
                }
                Piece::End => return Err(self.dead(output.process)),
                Piece::Lost => return Err(lost(&self.sandbox)),
            };
            let _ = events.send(event).await;
        }
    }

    fn told(
        &self,
        count: u32,
        result: Option<Vec<Representation>>,
        error: Option<CellError>,
    ) -> CodeResult {
        let took = self.begun.elapsed();
        let was_interrupted = error
            .as_ref()
            .is_some_and(|e| e.name == "KeyboardInterrupt");
        CodeResult {
            sandbox: self.sandbox.id_text(),
            context: self.context.clone(),
            execution_count: count,
            result: result.map(bundle),
            timed_out: was_interrupted && self.limit.is_some_and(|limit| took >= limit),
            exception: error.map(|error| Exception {
                name: error.name,
                value: error.value,
                traceback: error.traceback,
            }),
            total_time_ms: milliseconds(took),
            ..CodeResult::default()
        }
    }

    /// The interpreter has ended under the cell.
    fn dead(&self, process: u32) -> Failure {
        let ended = self.sandbox.process(process).ok();
        let ended = ended.and_then(|info| result(&self.sandbox, &info).ok());
        let how = match ended {
            Some(ended) if ended.out_of_memory => "the guest ran out of memory".to_owned(),
            Some(ended) => match ended.signal {
                Some(signal) => format!("its interpreter was killed by signal {signal}"),
                None => format!(
                    "its interpreter has ended (exit status {})",
                    ended.exit_code
                ),
            },
            None => "its interpreter was restarted or removed".to_owned(),
        };
        let message = format!("the context {} has died: {how}", self.context);
        let failure = Failure::new(ErrorCode::ContextDead, printable(&message));
        failure.remedy("restart it: POST …/contexts/{name}/restart; zygote python --restart")
    }
}

/// Text as it is, anything else as base64.
fn bundle(shown: Vec<Representation>) -> Bundle {
    let told = shown.into_iter().map(|shown| {
        let is_text = !shown.kind.starts_with("image/") || shown.kind == "image/svg+xml";
        let text = match String::from_utf8(shown.data) {
            Ok(text) if is_text => text,
            Ok(text) => base64(text.as_bytes()),
            Err(error) => base64(error.as_bytes()),
        };
        (shown.kind, text)
    });
    told.collect()
}

async fn collect(
    running: impl Future<Output = Result<(), Failure>>,
    mut events: mpsc::Receiver<CodeEvent>,
) -> Result<Response, Failure> {
    let collecting = async {
        let mut output = Collected::new(COLLECTED_MAX_BYTES, &BUDGET);
        let (mut displays, mut bytes) = (Vec::new(), 0);
        let mut end = Err(Failure::internal("the cell has ended without a result"));
        while let Some(event) = events.recv().await {
            match event {
                CodeEvent::Stdout { data } => output.push_stdout(&data.0),
                CodeEvent::Stderr { data } => output.push_stderr(&data.0),
                CodeEvent::Display { data } => {
                    bytes += data.values().map(String::len).sum::<usize>();
                    if bytes > DISPLAYS_MAX_BYTES {
                        output.truncated = true;
                    } else {
                        displays.push(data);
                    }
                }
                CodeEvent::Result(result) => end = Ok(*result),
                CodeEvent::Error { error } => end = Err(error),
            }
        }
        (end, output, displays)
    };
    let (ran, (end, mut output, displays)) = tokio::join!(running, collecting);
    ran?;
    let mut result: CodeResult = end?;
    let (stdout, stderr) = output.take();
    let text = |bytes: Vec<u8>| Some(String::from_utf8_lossy(&bytes).into_owned());
    (result.stdout, result.stderr) = (text(stdout), text(stderr));
    result.displays = displays;
    result.truncated |= output.truncated;
    Ok(json(&result))
}

/// A context in the API's words.
pub fn context_info(info: live::ContextInfo) -> ContextInfo {
    let state = match (&info.dead, info.is_busy) {
        (Some(_), _) => "dead",
        (None, true) => "busy",
        (None, false) => "idle",
    };
    let error = info
        .dead
        .map(|why| Failure::new(ErrorCode::ContextDead, why));
    ContextInfo {
        name: info.spec.name,
        language: info.spec.language,
        cwd: info.spec.cwd,
        process: info.process,
        state: state.to_owned(),
        execution_count: info.count,
        error,
    }
}
