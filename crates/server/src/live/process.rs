//! Processes of a live sandbox: starting them, their output as it comes, their input.

use super::words::{live_failure, lost, process_info, result};
use crate::answer::json;
use crate::exec::{BUDGET, read};
use crate::lines::Lines;
use crate::local::start_code;
use crate::request::{check_env, time_limit};
use crate::stream::{EVENTS_MAX, Form, answer_at_once};
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_api::{
    AttachRequest, COLLECTED_MAX_BYTES, Collected, Failure, ProcessEvent, ProcessInput,
    ProcessOutput, ProcessRequest, ProcessResult, TerminalSize,
};
use zygote_engine::live::{Attach, Attachment, LiveError, Piece, ProcessSpec, Sandbox};
use zygote_engine::{STREAM_CHUNK_MAX_BYTES, Stream};

/// `POST …/exec`.
pub async fn exec(sandbox: Arc<Sandbox>, request: Request<Body>) -> Result<Response, Failure> {
    let (form, asked, lines) = read::<ProcessRequest>(request).await?;
    let spec = spec(&asked)?;
    let (info, output) = match sandbox.start(spec).await {
        Ok(started) => started,
        Err(error @ LiveError::StartFailed { .. }) if !asked.detach => {
            return Ok(not_started(form, &sandbox, &error));
        }
        Err(error) => return Err(live_failure(&error)),
    };
    let process = info.id;
    let feed = Feed {
        sandbox: Arc::clone(&sandbox),
        process,
        first: asked.stdin.map(|stdin| stdin.0),
        lines: lines.filter(|_| asked.stdin_stream || asked.terminal.is_some()),
        ends: true,
    };
    let Some(output) = output else {
        feed.pass().await;
        let info = sandbox.process(process).map_err(|e| live_failure(&e))?;
        return Ok(json(&process_info(&sandbox, &info)));
    };
    let started = ProcessEvent::Started {
        process,
        pid: info.pid,
    };
    serve(form, sandbox, output, Some(started), feed).await
}

/// As a shell would tell it.
fn not_started(form: Form, sandbox: &Sandbox, error: &LiveError) -> Response {
    let exit_code = match error {
        LiveError::StartFailed { reason, .. } => start_code(*reason),
        _ => 125,
    };
    let result = ProcessResult {
        sandbox: sandbox.id_text(),
        exit_code,
        error: Some(live_failure(error)),
        ..ProcessResult::default()
    };
    if form == Form::Json {
        return json(&result);
    }
    let (_, happening) = mpsc::channel(EVENTS_MAX);
    let last = ProcessEvent::Result(Box::new(result));
    let work = Box::pin(std::future::ready(Ok(Some(last))));
    answer_at_once(form, work, happening, |error| ProcessEvent::Error { error })
}

/// `POST …/attach`.
pub async fn attach(
    sandbox: Arc<Sandbox>,
    process: u32,
    request: Request<Body>,
) -> Result<Response, Failure> {
    let (form, asked, lines) = read::<AttachRequest>(request).await?;
    let attached = sandbox.attach(Attach {
        process,
        from: asked.from,
        follow: true,
        holds: asked.hold,
    });
    let output = attached.await.map_err(|error| live_failure(&error))?;
    let feed = Feed {
        sandbox: Arc::clone(&sandbox),
        process,
        first: None,
        lines,
        ends: false,
    };
    serve(form, sandbox, output, None, feed).await
}

/// The same, by channels.
pub async fn attached(
    sandbox: Arc<Sandbox>,
    process: u32,
    asked: AttachRequest,
    mut input: mpsc::Receiver<ProcessInput>,
    events: mpsc::Sender<ProcessEvent>,
) -> Result<(), Failure> {
    let attached = sandbox.attach(Attach {
        process,
        from: asked.from,
        follow: true,
        holds: asked.hold,
    });
    let output = attached.await.map_err(|error| live_failure(&error))?;
    let following = follow(Arc::clone(&sandbox), output, None, events);
    // Side by side: a process may take no input before its output is taken.
    let feeding = async {
        while let Some(line) = input.recv().await {
            take(&sandbox, process, line).await;
        }
    };
    tokio::pin!(following);
    tokio::select! {
        ended = &mut following => ended,
        () = feeding => following.await,
    }
}

/// `GET …/output`.
pub async fn output(
    sandbox: Arc<Sandbox>,
    attach: Attach,
    form: Form,
) -> Result<Response, Failure> {
    let attached = sandbox.attach(attach).await;
    let output = attached.map_err(|error| live_failure(&error))?;
    if form == Form::Json {
        return kept(&sandbox, output).await;
    }
    let feed = Feed {
        sandbox: Arc::clone(&sandbox),
        process: attach.process,
        first: None,
        lines: None,
        ends: false,
    };
    serve(form, sandbox, output, None, feed).await
}

fn spec(asked: &ProcessRequest) -> Result<ProcessSpec, Failure> {
    if asked.command.is_empty() {
        return Err(Failure::bad_request("command: it has no program"));
    }
    if asked.command.iter().any(|word| word.0.contains(&0)) {
        return Err(Failure::bad_request("command: no word may have a NUL"));
    }
    if asked.stdin_stream && asked.stdin.is_some() {
        return Err(Failure::bad_request(
            "give stdin, or stdin_stream and lines, not both",
        ));
    }
    if asked.detach && asked.kill_on_disconnect {
        return Err(Failure::bad_request(
            "give detach or kill_on_disconnect, not both",
        ));
    }
    if asked.cwd.contains('\0') || asked.user.contains('\0') {
        return Err(Failure::bad_request("cwd, user: neither may have a NUL"));
    }
    check_env(&asked.env)?;
    let size = |size: TerminalSize| zygote_engine::TerminalSize {
        rows: size.rows,
        columns: size.columns,
    };
    Ok(ProcessSpec {
        command: asked.command.iter().map(|word| word.0.clone()).collect(),
        env: asked.env.clone().into_iter().collect(),
        cwd: asked.cwd.clone(),
        user: asked.user.clone(),
        stdin: asked.stdin_stream || asked.stdin.is_some(),
        terminal: asked.terminal.map(size),
        timeout: time_limit(asked.timeout_seconds)?,
        follow: !asked.detach,
        ends_with_reader: asked.kill_on_disconnect,
        task: None,
    })
}

/// Answers with what the process writes, while it is given what the client sends.
async fn serve(
    form: Form,
    sandbox: Arc<Sandbox>,
    output: Attachment,
    first: Option<ProcessEvent>,
    feed: Feed,
) -> Result<Response, Failure> {
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    let running = async move {
        let following = follow(sandbox, output, first, events);
        tokio::pin!(following);
        tokio::select! {
            ended = &mut following => ended,
            // It has had all of its input.
            () = feed.pass() => following.await,
        }
    };
    if form == Form::Json {
        return collect(running, happening).await;
    }
    let work = Box::pin(async move { running.await.map(|()| None) });
    let error = |error| ProcessEvent::Error { error };
    Ok(answer_at_once(form, work, happening, error))
}

async fn follow(
    sandbox: Arc<Sandbox>,
    mut output: Attachment,
    first: Option<ProcessEvent>,
    events: mpsc::Sender<ProcessEvent>,
) -> Result<(), Failure> {
    let process = output.process;
    if let Some(first) = first {
        let _ = events.send(first).await;
    }
    loop {
        let event = match output.next().await {
            Piece::Output {
                offset,
                stream,
                data,
            } => told(stream, offset, data),
            Piece::Skipped { from, to } => ProcessEvent::Skipped { from, to },
            // Of cells, whose readers are others.
            Piece::Cell(_) => continue,
            Piece::End => break,
            Piece::Lost => return Err(lost(&sandbox)),
        };
        // Who does not listen any more drops this.
        let _ = events.send(event).await;
    }
    let info = sandbox.process(process).map_err(|e| live_failure(&e))?;
    if info.state.is_over() {
        let result = result(&sandbox, &info)?;
        let _ = events.send(ProcessEvent::Result(Box::new(result))).await;
    }
    Ok(())
}

fn told(stream: Stream, offset: u64, data: Vec<u8>) -> ProcessEvent {
    let data = data.into();
    match stream {
        Stream::Stdout => ProcessEvent::Stdout { data, offset },
        Stream::Stderr => ProcessEvent::Stderr { data, offset },
    }
}

/// One object, with all output.
async fn collect(
    running: impl Future<Output = Result<(), Failure>>,
    mut events: mpsc::Receiver<ProcessEvent>,
) -> Result<Response, Failure> {
    let collecting = async {
        let mut output = Collected::new(COLLECTED_MAX_BYTES, &BUDGET);
        let mut end = Err(Failure::internal("the process has ended without a result"));
        while let Some(event) = events.recv().await {
            match event {
                ProcessEvent::Started { .. } => {}
                ProcessEvent::Stdout { data, .. } => output.push_stdout(&data.0),
                ProcessEvent::Stderr { data, .. } => output.push_stderr(&data.0),
                ProcessEvent::Skipped { .. } => output.truncated = true,
                ProcessEvent::Result(result) => end = Ok(*result),
                ProcessEvent::Error { error } => end = Err(error),
            }
        }
        (end, output)
    };
    let (ran, (end, mut output)) = tokio::join!(running, collecting);
    ran?;
    let mut result: ProcessResult = end?;
    let (stdout, stderr) = output.take();
    result.set_output(stdout, stderr);
    result.truncated |= output.truncated;
    Ok(json(&result))
}

/// What is kept, as one object.
async fn kept(sandbox: &Sandbox, mut output: Attachment) -> Result<Response, Failure> {
    let mut told = ProcessOutput {
        process: output.process,
        ..ProcessOutput::default()
    };
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match output.next().await {
            Piece::Output {
                offset,
                stream,
                data,
            } => {
                told.next = offset + data.len() as u64;
                match stream {
                    Stream::Stdout => stdout.extend(data),
                    Stream::Stderr => stderr.extend(data),
                }
            }
            Piece::Skipped { from, to } => {
                told.skipped_bytes += to - from;
                told.next = to;
            }
            Piece::Cell(_) => {}
            Piece::End => break,
            Piece::Lost => return Err(lost(sandbox)),
        }
    }
    told.set_output(stdout, stderr);
    Ok(json(&told))
}

/// What a client sends to a process.
struct Feed {
    sandbox: Arc<Sandbox>,
    process: u32,
    first: Option<Vec<u8>>,
    lines: Option<Lines>,
    /// Whether the end of the lines is that of its input.
    ends: bool,
}

impl Feed {
    /// Ends when all has been passed on, or nothing is taken any more.
    async fn pass(mut self) {
        if let Some(first) = self.first.take() {
            for piece in first.chunks(STREAM_CHUNK_MAX_BYTES) {
                let taken = self.sandbox.input(self.process, piece.to_vec()).await;
                if taken.is_err() {
                    return;
                }
            }
            let _ = self.sandbox.end_input(self.process).await;
        }
        let Some(mut lines) = self.lines.take() else {
            return;
        };
        loop {
            match lines.next::<ProcessInput>().await {
                Ok(Some(line)) => take(&self.sandbox, self.process, line).await,
                // The client has gone, and may come back.
                Err(_) => return,
                Ok(None) => break,
            }
        }
        if self.ends {
            let _ = self.sandbox.end_input(self.process).await;
        }
    }
}

/// What a process does not take, because it has ended or reads no more, is for nobody.
async fn take(sandbox: &Sandbox, process: u32, line: ProcessInput) {
    let _ = match line {
        ProcessInput::Stdin { data } => sandbox.input(process, data.0).await,
        ProcessInput::StdinEnd => sandbox.end_input(process).await,
        ProcessInput::Signal { signal } => sandbox.signal(process, signal, true).await,
        ProcessInput::Resize { rows, columns } => {
            let size = zygote_engine::TerminalSize { rows, columns };
            sandbox.resize(process, size).await
        }
    };
}
